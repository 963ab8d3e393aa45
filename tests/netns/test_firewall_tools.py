"""Firewall tools that hang or fail for a while: the rules are tried again, and named until they stand.

The reconciler runs in a namespace of its own, with the system's tools.  A wrapper around each of them can be told which
of its calls hang or fail.
"""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
import subprocess
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path

import pytest
from namespace import Namespace, namespace, requires_netns

from udptun.core.errors import FirewallError
from udptun.core.lease import Subnets
from udptun.core.ownership import Ownership
from udptun.firewall import tool
from udptun.firewall.obstacles.watch import Obstacles
from udptun.firewall.reconciler import FirewallReconciler, FirewallSettings, remove_rules

pytestmark = [pytest.mark.netns, requires_netns]

NETWORK, SUBNET = IPv4Network("10.244.0.0/16"), IPv4Network("10.244.7.0/24")
OURS = Ownership((NETWORK,))
SYSTEM = "/usr/sbin:/usr/bin:/sbin:/bin"
LIMIT_S = 1.5
"""A tool that takes longer is taken to hang; 30 s in the product.  Messages round it to 2 s."""

WRAPPER = """\
#!/bin/sh
if [ -e {directory}/hangs ]; then
    case "{name} $*" in $(cat {directory}/hangs)) exec sleep 60 ;; esac
fi
if [ -e {directory}/fails ]; then
    case "{name} $*" in $(cat {directory}/fails)) echo 'not now' >&2; exit 4 ;; esac
fi
exec {real} "$@"
"""


class Tools:
    """The tools that the reconciler finds.  A pattern is one of the shell's, for a command with its arguments."""

    def __init__(self, directory: Path, iptables: str) -> None:
        self._directory = directory
        names = {f"{it}{suffix}" for it in ("iptables-nft", "iptables-legacy") for suffix in ("", "-restore")}
        real = {name: name for name in (*names, "nft")} | {
            f"iptables{suffix}": f"{iptables}{suffix}" for suffix in ("", "-restore")
        }
        for name, of in real.items():
            path = shutil.which(of, path=SYSTEM)
            if path is None:
                pytest.skip(f"needs {of}")
            (directory / name).write_text(WRAPPER.format(directory=directory, name=name, real=path))
            (directory / name).chmod(0o755)

    def hang(self, pattern: str) -> None:
        (self._directory / "hangs").write_text(pattern)

    def fail(self, pattern: str) -> None:
        (self._directory / "fails").write_text(pattern)

    def work(self) -> None:
        for name in ("hangs", "fails"):
            (self._directory / name).unlink(missing_ok=True)


@pytest.fixture
def ns(monkeypatch: pytest.MonkeyPatch) -> Iterator[Namespace]:
    monkeypatch.setattr(tool, "_LIMIT_S", LIMIT_S)
    with namespace() as ns:
        yield ns


def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, iptables: str) -> Tools:
    monkeypatch.setenv("PATH", f"{tmp_path}:{SYSTEM}")
    return Tools(tmp_path, iptables)


def sh(ns: Namespace, script: str) -> str:
    argv = ["ip", "netns", "exec", ns.name, "sh", "-ec", script]
    return subprocess.run(argv, check=True, timeout=30, capture_output=True, text=True, env={"PATH": SYSTEM}).stdout


def rules(ns: Namespace) -> str:
    """All that is in the kernel about flannel."""
    # Looking makes the tables of legacy iptables.
    legacy = "if grep -q . /proc/net/ip_tables_names; then iptables-legacy-save; fi"
    every = sh(ns, f"iptables-nft-save; {legacy}; nft list tables; nft list table ip flannel-ipv4 || true")
    return "\n".join(line for line in every.splitlines() if re.search("flannel|fully-random", line, re.IGNORECASE))


def reconciler(*, masquerade: bool = False, forward: bool | None = None, nftables: bool = False) -> FirewallReconciler:
    settings = FirewallSettings(masquerade, forward, random_fully=True, nftables=nftables, resync_s=0.1)
    return FirewallReconciler(settings, [OURS], Obstacles(list, list))


@asynccontextmanager
async def running(firewall: FirewallReconciler) -> AsyncGenerator[None, None]:
    task = asyncio.create_task(firewall.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def standing(firewall: FirewallReconciler) -> dict[str, object]:
    """What the status says of the rules, but for how often they were repaired."""
    return {key: value for key, value in firewall.document().items() if key != "repairs"}


async def until_well(firewall: FirewallReconciler) -> None:
    async with running(firewall), asyncio.timeout(30):
        while firewall.problems:
            await asyncio.sleep(0.02)


@dataclass(frozen=True)
class Trouble:
    """What is in the way at the start, the problem lines that it makes, and what stands when it is over.

    `before` is done first; `stands` are the beginnings and ends of words in `rules`.
    """

    name: str
    hangs: str
    line: str
    stands: tuple[str, ...]
    iptables: str = "iptables-nft"
    fails: str = ""
    before: str = ""
    masquerade: bool = False
    forward: bool | None = None
    nftables: bool = False
    meanwhile: tuple[str, ...] = ()
    """What stands already while the trouble lasts."""


FORWARD = ("-j FLANNEL-FWD", "-A FLANNEL-FWD -s 10.244.0.0/16", "-A FLANNEL-FWD -d 10.244.0.0/16")
RANDOM = ("-j FLANNEL-POSTRTG", "--random-fully")
LOCKED = (
    "firewall rules: `iptables -w -t {} -S {}` has not ended after 2 s and was killed; another program may hold the "
    "lock of iptables, `lslocks | grep xtables.lock` names it"
)
KILLED = "has not ended after 2 s and was killed"

TROUBLES = [
    Trouble(
        "the lock of legacy iptables is held",
        "iptables *-t *",
        LOCKED.format("filter", "FLANNEL-FWD"),
        FORWARD,
        iptables="iptables-legacy",
    ),
    Trouble(
        "the lock of legacy iptables is held and masquerading was asked for",
        "iptables *-t *",
        LOCKED.format("nat", "FLANNEL-POSTRTG"),
        (*RANDOM, *FORWARD),
        iptables="iptables-legacy",
        masquerade=True,
        forward=True,
    ),
    Trouble(
        "setting the rules hangs once",
        "iptables-restore *",
        f"firewall rules: `iptables-restore --noflush -w` {KILLED}",
        (*RANDOM, *FORWARD),
        masquerade=True,
    ),
    Trouble(
        "nft hangs",
        "nft *",
        f"firewall rules: `nft -j list table ip flannel-ipv4` {KILLED}",
        ("table ip flannel-ipv4", "fully-random"),
        masquerade=True,
        nftables=True,
    ),
    Trouble(
        "the policy of the other packet filter cannot be read in time",
        "iptables *-S FORWARD",
        f"firewall rules: `iptables -w -t filter -S FORWARD` {KILLED}",
        ("table ip flannel-ipv4", *FORWARD),
        before="iptables-nft -P FORWARD DROP",
        nftables=True,
        meanwhile=("table ip flannel-ipv4",),
    ),
    Trouble(
        "leftovers of the other iptables cannot be read in time",
        "iptables-legacy *",
        "leftover firewall rules may stay: `iptables-legacy -w -t filter -S FLANNEL-FWD` " + LOCKED.partition("` ")[2],
        FORWARD,
        before="iptables-legacy -N FLANNEL-FWD",
        meanwhile=FORWARD,
    ),
    Trouble(
        "leftovers of the other form cannot be removed",
        "",
        "leftover firewall rules may stay: `nft -f -` ended with status 4: not now",
        FORWARD,
        fails="nft -f*",
        before="nft add table ip flannel-ipv4",
        meanwhile=FORWARD,
    ),
    Trouble(
        "forward rules that nobody asked for are refused once",
        "",
        "firewall rules: `iptables-restore --noflush -w` ended with status 4: not now; it needs root and iptables "
        "1.6.2 or newer; EnableNFTables in net-conf.json does it with nft, --ip-masq=false "
        "--iptables-forward-rules=false does without",
        FORWARD,
        fails="iptables-restore *",
    ),
    Trouble(
        "iptables does not say which one it is",
        "iptables --version",
        f"firewall rules: `iptables --version` {KILLED}",
        (*RANDOM, *FORWARD),
        masquerade=True,
    ),
]


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.name.replace(" ", "_"))
def test_what_fails_once_at_the_start_is_named_and_tried_again(
    trouble: Trouble,
    ns: Namespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Forward rules were given up until the next start, leftovers stayed, and asked-for rules ended the start; a tool
    that hung was taken to refuse random ports.
    """
    caplog.set_level(logging.INFO)
    its = tools(tmp_path, monkeypatch, trouble.iptables)
    if trouble.before:
        sh(ns, trouble.before)
    if trouble.hangs:
        its.hang(trouble.hangs)
    if trouble.fails:
        its.fail(trouble.fails)

    async def start() -> None:
        firewall = reconciler(masquerade=trouble.masquerade, forward=trouble.forward, nftables=trouble.nftables)
        await firewall.set_up(Subnets(SUBNET), None)
        assert firewall.problems == (trouble.line,)
        there = rules(ns)
        for words in trouble.stands:
            assert (words in there) == (words in trouble.meanwhile), words
        its.work()
        await until_well(firewall)
        form = "nftables" if trouble.nftables else "iptables"
        assert standing(firewall) == {"form": form, "masquerade": trouble.masquerade, "forward": True}
        # It made good what was missing.
        assert firewall.n_repairs > 0

    ns.call_async(start)
    there = rules(ns)
    for words in trouble.stands:
        assert words in there
    if trouble.name.startswith("leftovers"):
        assert len(there.splitlines()) == 4
    messages = [record.getMessage() for record in caplog.records]
    assert messages.count(trouble.line) == 1
    assert "firewall rules are as wanted again" in messages
    assert "guessable" not in "".join(messages)


def test_rules_that_were_asked_for_and_are_refused_end_the_start(
    ns: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tool that hangs is tried again; one that says no is not, as with flannel."""
    its = tools(tmp_path, monkeypatch, "iptables-nft")
    its.fail("iptables-restore *")

    async def start() -> None:
        with pytest.raises(
            FirewallError, match=r"cannot set the firewall's rules: .* ended with status 4: not now; it"
        ):
            await reconciler(masquerade=True).set_up(Subnets(SUBNET), None)

    ns.call_async(start)


# --- one table that cannot be read

HIDDEN = "ct state vmap { invalid : continue }"
"""A rule of nft's that iptables-nft cannot express."""


@dataclass(frozen=True)
class Unreadable:
    """A table that cannot be read (a call that fails, or a rule of nft's in it), and the problem line about it.

    `damage` is done to the other tables; `repaired` is what `rules` has again then.
    """

    name: str
    line: str
    damage: str
    repaired: tuple[str, ...]
    fails: str = ""
    hidden: str = ""
    iptables: str = "iptables-nft"
    nftables: bool = False


def hidden_line(table: str, chain: str) -> str:
    return (
        f"firewall rules: `iptables -w -t {table} -S {chain}` ended with status 1: iptables v.* chain `{chain}' in "
        rf"table `{table}' is incompatible, use 'nft' tool\.; rules set with nft hide those of iptables there: give "
        f"the table of nft another name than {table}, or set EnableNFTables in net-conf.json"
    )


UNREADABLE = [
    Unreadable(
        "nat", hidden_line("nat", "POSTROUTING"), "iptables-nft -F FLANNEL-FWD", FORWARD, hidden="nat POSTROUTING"
    ),
    Unreadable(
        "filter",
        hidden_line("filter", "FORWARD"),
        "iptables-nft -t nat -F FLANNEL-POSTRTG",
        RANDOM,
        hidden="filter FORWARD",
    ),
    Unreadable(
        "nat of legacy iptables",
        "firewall rules: `iptables -w -t nat -S FLANNEL-POSTRTG` ended with status 4: not now",
        "iptables-legacy -F FLANNEL-FWD",
        FORWARD,
        fails="iptables *-t nat *",
        iptables="iptables-legacy",
    ),
    Unreadable(
        "filter of legacy iptables",
        "firewall rules: `iptables -w -t filter -S FLANNEL-FWD` ended with status 4: not now",
        "iptables-legacy -t nat -F FLANNEL-POSTRTG",
        RANDOM,
        fails="iptables *-t filter *",
        iptables="iptables-legacy",
    ),
    Unreadable(
        "flannel's table of nftables",
        "firewall rules: `nft -j list table ip flannel-ipv4` ended with status 4: not now",
        "iptables-nft -F FLANNEL-FWD",
        FORWARD,
        fails="nft -j *",
        nftables=True,
    ),
    Unreadable(
        "filter beside the nftables form",
        "",
        "nft flush table ip flannel-ipv4",
        ("table ip flannel-ipv4", "masquerade fully-random"),
        hidden="filter FORWARD",
        nftables=True,
    ),
]


@pytest.mark.parametrize("case", UNREADABLE, ids=lambda case: re.sub(r"\W+", "_", case.name))
def test_a_table_that_cannot_be_read_is_named_and_keeps_no_other_from_its_repair(
    case: Unreadable, ns: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one that could not be read ended the look: the others stayed as they were damaged."""
    its = tools(tmp_path, monkeypatch, case.iptables)
    sh(ns, f"{case.iptables} -P FORWARD DROP")

    async def run() -> None:
        firewall = reconciler(masquerade=True, nftables=case.nftables)
        await firewall.set_up(Subnets(SUBNET), None)
        assert firewall.problems == ()
        whole = rules(ns)
        if case.hidden:
            sh(ns, f"nft add rule ip {case.hidden} {HIDDEN}")
        if case.fails:
            its.fail(case.fails)
        sh(ns, case.damage)
        assert rules(ns) != whole

        def is_repaired() -> bool:
            return bool(firewall.problems) == bool(case.line) and all(words in rules(ns) for words in case.repaired)

        async with running(firewall):
            async with asyncio.timeout(30):
                while not is_repaired():
                    await asyncio.sleep(0.05)
            assert re.fullmatch(case.line, "\n".join(firewall.problems))
        if case.hidden:
            (handle,) = re.findall("vmap .*handle (.*)", sh(ns, f"nft -a list chain ip {case.hidden}"))
            sh(ns, f"nft delete rule ip {case.hidden} handle {handle}")
        its.work()
        await until_well(firewall)
        assert rules(ns) == whole

    ns.call_async(run)


def test_masquerading_is_set_up_beside_a_filter_table_that_cannot_be_read(
    ns: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --ip-masq the start ended with status 1, and without it there were no forward rules until the next start."""
    tools(tmp_path, monkeypatch, "iptables-nft")
    sh(ns, f"iptables-nft -P FORWARD ACCEPT; nft add rule ip filter FORWARD {HIDDEN}")

    async def start() -> None:
        firewall = reconciler(masquerade=True)
        await firewall.set_up(Subnets(SUBNET), None)
        (line,) = firewall.problems
        assert re.fullmatch(hidden_line("filter", "FORWARD"), line)
        assert standing(firewall) == {"form": "iptables", "masquerade": True, "forward": False}
        sh(ns, "nft flush chain ip filter FORWARD")
        await until_well(firewall)
        assert standing(firewall) == {"form": "iptables", "masquerade": True, "forward": True}

    ns.call_async(start)
    assert all(words in rules(ns) for words in (*RANDOM, *FORWARD))


def test_cleanup_removes_what_it_can_and_names_what_it_cannot(
    ns: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hanging iptables was taken for one without our rules, and the first failure ended the removal."""
    its = tools(tmp_path, monkeypatch, "iptables-legacy")

    async def clean_up() -> tuple[list[str], list[str]]:
        await reconciler(masquerade=True).set_up(Subnets(SUBNET), None)
        sh(ns, "nft add table ip flannel-ipv4; iptables-nft -N FLANNEL-FWD")
        its.hang("iptables *-t *")
        its.fail("iptables-nft-restore *")
        return await remove_rules(OURS.networks, None)

    removed, left = ns.call_async(clean_up)
    assert removed == ["removed leftover table ip flannel-ipv4"]
    assert left == [
        f"cannot remove firewall rules: {LOCKED.format('nat', 'FLANNEL-POSTRTG').removeprefix('firewall rules: ')}",
        "cannot remove firewall rules: `iptables-nft-restore --noflush -w` ended with status 4: not now",
    ]
    its.work()
    removed, left = ns.call_async(lambda: remove_rules(OURS.networks, None))
    assert (sorted(removed), left) == (
        [
            "removed leftover chain FLANNEL-FWD",
            "removed leftover chain FLANNEL-FWD",
            "removed leftover chain FLANNEL-POSTRTG",
        ],
        [],
    )
    assert rules(ns) == ""
