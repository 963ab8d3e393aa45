"""How the page of a mesh looks: CSS alone, for dark and light.  Pure.

A cell's colours follow from its classes: `s0` to `s5` are steps from fast to slow, `l0` to `l4` of loss, `m0` to `m3`
of how much less the path takes than the device.  The map that is chosen above the matrix decides which of them counts.
"""

from __future__ import annotations

CSS = """\
:root { color-scheme: light dark;
  --back: #fbfbfc; --text: #1b1f24; --dim: #616a75; --line: #d9dde3; --box: #fff; --link: #0b5cad;
  --good: #1a7f4b; --bad: #c4162d; --warn: #b35900;
  --s0: #cdebd5; --s1: #8ed3b5; --s2: #48aeb0; --s3: #2f7fb5; --s4: #3f4fa6; --s5: #5b2a86;
  --l1: #ffe39a; --l2: #ffc14d; --l3: #f08c1b; --l4: #b8500b;
  --dead: #c4162d; --unsure: #8f5600; --none: #ececf0; --hatch: #b4bac4; --ring: #f08c1b;
  --dark: #14201a; --pale: #fff; }
@media (prefers-color-scheme: dark) { :root {
  --back: #13161b; --text: #e4e7eb; --dim: #98a2ae; --line: #2f353e; --box: #1a1e25; --link: #7db8ff;
  --good: #4cc38a; --bad: #ff6b7a; --warn: #ffb454;
  --s0: #1f4d3a; --s1: #2a7358; --s2: #2d8f93; --s3: #4aa0d9; --s4: #8f9cf0; --s5: #c9a2f2;
  --l1: #5e4b16; --l2: #8a6a14; --l3: #c98516; --l4: #ffb454;
  --dead: #e5484d; --unsure: #9a6700; --none: #22272f; --hatch: #4c5563; --ring: #ffb454;
  --dark: #e4e7eb; --pale: #0c1014; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1.6rem 3rem; max-width: 100rem; background: var(--back); color: var(--text);
  font: 15px/1.45 system-ui, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 1.5rem; } h2 { margin: 1.6rem 0 .5rem; font-size: 1.1rem; }
header { display: flex; flex-wrap: wrap; gap: .3rem 1rem; align-items: center; }
.verdict { padding: .15rem .7rem; border-radius: 1rem; font-weight: 600; color: #fff; background: var(--good); }
.verdict.wrong { background: var(--dead); } .verdict.unsure { background: var(--unsure); }
p.when { margin: .3rem 0 0; color: var(--dim); }
ul { margin: .4rem 0; padding-left: 1.2rem; } li { margin: .15rem 0; }
ul.problems li::marker { color: var(--bad); }
ul.notes { color: var(--dim); }
.maps { display: flex; flex-wrap: wrap; gap: .4rem; margin: 0 0 .6rem; }
.maps label { cursor: pointer; } .maps .axes { align-self: center; margin-left: .6rem; color: var(--dim); }
input.map { position: absolute; opacity: 0; pointer-events: none; }
.maps label { padding: .2rem .8rem; border: 1px solid var(--line); border-radius: 1rem; background: var(--box); }
#by-rtt:checked ~ section .maps .rtt, #by-loss:checked ~ section .maps .loss, #by-mtu:checked ~ section .maps .mtu {
  background: var(--text); color: var(--back); border-color: var(--text); }
#by-rtt:focus-visible ~ section .maps .rtt, #by-loss:focus-visible ~ section .maps .loss,
#by-mtu:focus-visible ~ section .maps .mtu { outline: 2px solid var(--link); outline-offset: 2px; }
.scroll { overflow: auto; max-height: 92vh; width: fit-content; max-width: 100%; padding: 2px;
  border: 1px solid var(--line); border-radius: .5rem; background: var(--box); }
table.matrix { border-collapse: separate; border-spacing: var(--gap); width: max-content; }
.matrix th { position: sticky; z-index: 1; background: var(--box); color: var(--dim); font-weight: 600; padding: 0;
  font-size: var(--font); line-height: 1; white-space: nowrap; }
.matrix thead th { top: -2px; height: 1.6em; } .matrix tbody th { left: -2px; text-align: right; padding-right: .4em; }
.matrix tr:hover th { color: var(--text); }
.matrix thead th:first-child { left: -2px; z-index: 2; min-width: 3em; }
.n0 tbody th small { margin-left: .6em; font-weight: 400; font-size: .9em; }
.matrix td, .n0 thead th + th, .n1 thead th + th { width: var(--wide); min-width: var(--wide); max-width: var(--wide); }
.matrix td { height: var(--high); padding: 0; text-align: center; font-size: var(--font); line-height: 1;
  border-radius: var(--round); background: var(--none); overflow: hidden; font-variant-numeric: tabular-nums; }
.matrix td:hover { outline: 2px solid var(--text); outline-offset: 0; }
.matrix td.self { background: var(--line); opacity: .55; } .matrix td i { display: none; font-style: normal; }
.n0 { --wide: 5.4em; --high: 2.3em; --gap: 3px; --font: 14px; --round: 4px; }
.n1 { --wide: 24px; --high: 22px; --gap: 2px; --font: 11px; --round: 3px; }
.n2 { --wide: 11px; --high: 11px; --gap: 1px; --font: 9px; --round: 2px; }
.n3 { --wide: 6px; --high: 6px; --gap: 1px; --font: 9px; --round: 1px; }
.n2 thead th, .n3 thead th { text-align: left; }
.n2 tbody th, .n3 tbody th { line-height: var(--high); }
td.dead, .key.dead { background: var(--dead) !important; color: #fff !important; }
td.unknown, .key.unknown { background: repeating-linear-gradient(45deg, var(--hatch) 0 2px, var(--none) 2px 5px); }
td.missing, .key.missing { background: var(--text) !important; color: var(--back) !important; }
td.untold, .key.untold { background: none !important; box-shadow: inset 0 0 0 1px var(--line); }
.n1 td.dead::before { content: "\\00d7"; font-weight: 700; } .n1 td.missing::before { content: "!"; font-weight: 700; }
#by-rtt:checked ~ section td i.rtt, #by-loss:checked ~ section td i.loss, #by-mtu:checked ~ section td i.mtu {
  display: inline; }
.rule0, #by-rtt:checked ~ section td.s0 { background: var(--s0); color: var(--dark); }
.rule1, #by-rtt:checked ~ section td.s1 { background: var(--s1); color: var(--dark); }
.rule2, #by-rtt:checked ~ section td.s2 { background: var(--s2); color: var(--pale); }
.rule3, #by-rtt:checked ~ section td.s3 { background: var(--s3); color: var(--pale); }
.rule4, #by-rtt:checked ~ section td.s4 { background: var(--s4); color: var(--pale); }
.rule5, #by-rtt:checked ~ section td.s5 { background: var(--s5); color: var(--pale); }
.less0, #by-loss:checked ~ section td.l0, #by-mtu:checked ~ section td.m0 { background: var(--s0); color: var(--dark); }
.less1, #by-loss:checked ~ section td.l1, #by-mtu:checked ~ section td.m1 { background: var(--l1); color: var(--dark); }
.less2, #by-loss:checked ~ section td.l2, #by-mtu:checked ~ section td.m2 { background: var(--l2); color: var(--dark); }
.less3, #by-loss:checked ~ section td.l3, #by-mtu:checked ~ section td.m3 { background: var(--l3); color: var(--pale); }
.less4, #by-loss:checked ~ section td.l4 { background: var(--l4); color: var(--pale); }
td.odd, .key.odd { box-shadow: inset 0 0 0 var(--thick, 2px) var(--ring); }
.n3 td.odd { --thick: 1.5px; }
.legend { display: none; flex-wrap: wrap; gap: .3rem 1.1rem; margin: .6rem 0 0; padding: 0; list-style: none;
  color: var(--dim); font-size: .9rem; }
#by-rtt:checked ~ section .legend.rtt, #by-loss:checked ~ section .legend.loss, #by-mtu:checked ~ section .legend.mtu {
  display: flex; }
.key { display: inline-block; width: 1.1em; height: 1.1em; margin-right: .4em; border-radius: 3px;
  vertical-align: -.15em; }
table.hosts { border-collapse: collapse; } .hosts th { text-align: left; color: var(--dim); font-weight: 600; }
.hosts td, .hosts th { padding: .2rem 1rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.hosts td:first-child { font-weight: 600; text-align: right; } .hosts .why { color: var(--warn); }
.hosts .wrong { color: var(--bad); } .wide { overflow-x: auto; }
footer { margin-top: 2rem; color: var(--dim); font-size: .9rem; }
@media print { .scroll { max-height: none; overflow: visible; } }
"""
