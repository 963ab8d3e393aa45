"""`udptun trace`: what would happen to a packet here, or what happens to those that come (docs/trace.md)."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from udptun.commands import trace_live
from udptun.commands.parser import Parser
from udptun.commands.screen import BOLD, DIM, GREEN, RED, sgr
from udptun.commands.status import fetch
from udptun.commands.terminal import has_colours
from udptun.core.errors import UsageError
from udptun.core.live_trace import LiveTraceRequest
from udptun.core.network_state import socket_address
from udptun.core.trace_request import TraceRequest, protocol_name

_MARKS = {True: "ok  ", False: "FAIL", None: "-   "}
_COLOURS = {_MARKS[True]: GREEN, _MARKS[False]: f"{BOLD};{RED}", _MARKS[None]: DIM}
_LABEL = 11
"""Columns of the word that a line begins with."""

Document = Mapping[str, Any]


def run(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Returns 0 when the packet would get to its destination, or to the host that has it, and else 1.

    With --live, what `trace_live.show` returns.  Raises UsageError, and UdptunError when no daemon answers.
    """
    # Words may stand between the flags, although all may be left out.
    given = _parser(environ).parse_intermixed_args(argv)
    has_colour = sys.stdout.isatty() and has_colours(environ)
    if given.live:
        return _run_live(given, has_colour=has_colour)
    if not given.source or not given.destination:
        raise UsageError("trace: SRC and DST are missing; with --live N they may be left out")
    for flag in ("seconds", "one_way", "drops", "snap_len", "write"):
        if getattr(given, flag):
            raise UsageError(f"trace: --{flag.replace('_', '-')} is for --live N")
    request = TraceRequest.from_words(
        *(given.source, given.destination, given.protocol, given.port),
        size=given.size,
        ttl=given.ttl,
        has_df=given.df,
        outer=given.outer,
    )
    text = fetch(given.run_dir, f"/trace?{request.query()}")
    document = json.loads(text)
    sys.stdout.write(text if given.json else render(document, has_colour=has_colour))
    return 0 if document["verdict"]["delivered"] else 1


def _parser(environ: Mapping[str, str]) -> Parser:
    parser = Parser(
        prog="udptun trace",
        description="Say what would happen to a packet here: the kernel's route, the datapath's checks, its end.  "
        "Nothing is sent.  Exit status 0: it would be delivered, 1: it would be dropped, or is not the tunnel's.  "
        "With --live say what happens to packets that come.",
    )
    parser.add_argument(
        "source", metavar="SRC", nargs="?", default="", help="its source; where a peer leases it, the packet arrives"
    )
    parser.add_argument(
        "destination",
        metavar="DST",
        nargs="?",
        default="",
        help="its destination; in this host's subnet, the packet arrives",
    )
    parser.add_argument(
        "protocol",
        metavar="PROTO",
        nargs="?",
        default="",
        help="tcp, udp, icmp or a number (default: icmp, with --live any)",
    )
    parser.add_argument(
        "port", metavar="PORT", nargs="?", default="", help="the destination's (default: 80, with --live any)"
    )
    parser.add_argument("--size", metavar="BYTES", default="", help="of the whole packet (default: 56 bytes of data)")
    parser.add_argument("--ttl", metavar="N", default="", help="as its sender has set it (default: 64)")
    parser.add_argument("--df", action="store_true", help="it must not be fragmented (IPv4)")
    parser.add_argument(
        "--from",
        dest="outer",
        metavar="ADDRESS[:PORT]",
        default="",
        help="it arrives in a datagram from there (default: from the host that leases SRC)",
    )
    parser.add_argument(
        "--live",
        metavar="N",
        default="",
        help="show the next N packets between SRC and DST, which may be prefixes or `any`, and their ends",
    )
    parser.add_argument("--seconds", metavar="N", default="", help="of --live: end after so many (default: 60)")
    parser.add_argument("--one-way", action="store_true", help="of --live: from SRC to DST alone, without answers")
    parser.add_argument("--drops", action="store_true", help="of --live: dropped packets alone")
    parser.add_argument(
        "--snap-len",
        metavar="BYTES",
        default="",
        help="of --live: keep so many bytes of a packet, 256 at most (default: its headers alone)",
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="of --live: into a new pcapng file, too")
    parser.add_argument("--json", action="store_true", help="for programs; see docs/trace.md")
    parser.add_run_dir(environ)
    return parser


def _run_live(given: Namespace, *, has_colour: bool) -> int:
    if given.size or given.ttl or given.df or given.outer:
        raise UsageError("trace: --size, --ttl, --df and --from are not for --live N")
    request = LiveTraceRequest.from_words(
        *(given.source, given.destination, given.protocol, given.port),
        n_packets=given.live,
        seconds=given.seconds,
        is_one_way=given.one_way,
        is_drops_alone=given.drops,
        snap_len=given.snap_len,
    )
    return trace_live.show(request, given.run_dir, as_json=given.json, write=given.write, has_colour=has_colour)


def render(document: Document, *, has_colour: bool = False) -> str:
    """The document for people.  `has_colour`: it is for a terminal that has them."""
    lines = [_packet(document["packet"])]
    # What arrives comes to the kernel last.
    stages = [*_kernel(document), *_tunnel(document)]
    if document["direction"] == "arriving":
        stages = [*_tunnel(document), *_kernel(document)]
    verdict = document["verdict"]
    words = verdict["words"]
    if verdict["counter"] is not None:
        words += f" ({verdict['counter']})"
    end = "delivered" if verdict["delivered"] else "dropped"
    if words.startswith("not the tunnel's"):
        end = "nothing"
    lines += [*stages, f"{end}: {words}"]
    if verdict["docs"] is not None:
        lines.append(f"  see {verdict['docs']}")
    if has_colour:
        lines = [_coloured(line, GREEN if verdict["delivered"] else RED) for line in lines]
    return "\n".join(lines) + "\n"


def _coloured(line: str, end_colour: str) -> str:
    """The mark of a check in its colour, the word that a line begins with dim, and the end in `end_colour`."""
    if line.startswith(("delivered: ", "dropped: ", "nothing: ")):
        end, colon, words = line.partition(":")
        return sgr(end, f"{BOLD};{end_colour}") + colon + words
    if not line.startswith("  "):
        return line
    if line.startswith("  see "):
        return sgr(line, DIM)
    label, mark, rest = line[:_LABEL], line[_LABEL : _LABEL + 4], line[_LABEL + 4 :]
    return sgr(label, DIM) + (sgr(mark, _COLOURS[mark]) if mark in _COLOURS else mark) + rest


def _packet(packet: Document) -> str:
    protocol = protocol_name(packet["protocol"])
    port = "" if packet["port"] is None else f" {packet['port']}"
    flow = f"{packet['source']} -> {packet['destination']} {protocol}{port}"
    return f"{flow}, {packet['bytes']} bytes, TTL {packet['ttl']}{', DF' if packet['df'] else ''}"


def _kernel(document: Document) -> list[str]:
    kernel = document["kernel"]
    if kernel is None:
        return []
    came = "of this host" if kernel["from_device"] is None else f"from {kernel['from_device']}"
    route = kernel["route"] or f"refused: {kernel['refusal']}"
    mtu = "" if kernel["mtu"] is None else f", MTU {kernel['mtu']}"
    lines = [f"  kernel   {came}: {route}{mtu}"]
    if kernel["bytes"] < document["packet"]["bytes"]:
        lines.append(f"           in fragments of {kernel['bytes']} bytes")
    if (neighbour := document["neighbour"]) is not None:
        lines.append(f"           neighbour {neighbour['ip']} mac {neighbour['mac']} vtep {neighbour['vtep']}")
    return lines


def _tunnel(document: Document) -> list[str]:
    lines = []
    if (peer := document["peer"]) is not None:
        where = peer["public_ip"] if peer["port"] is None else socket_address(peer["public_ip"], peer["port"])
        limit = "" if peer["mtu"] is None else f", packets up to {peer['mtu']} bytes"
        lines.append(f"  peer     {peer['subnet']} of {where}{limit}{', dead' if peer['dead'] else ''}")
    for title, check in zip(["checks", *[""] * len(document["checks"])], document["checks"], strict=False):
        fact = f": {check['fact']}" if check["fact"] else ""
        counter = f" ({check['counter']})" if check["passed"] is False else ""
        lines.append(f"  {title:<8} {_MARKS[check['passed']]} {check['check']}{fact}{counter}")
    if (outer := document["outer"]) is not None:
        to = socket_address(outer["destination"], outer["port"])
        way = f"dev {outer['device']}" if outer["gateway"] is None else f"via {outer['gateway']} dev {outer['device']}"
        fragments = ", in fragments" if outer["is_fragmented"] else ""
        why = f"refused: {outer['refusal']}" if outer["refusal"] else f"{way}, MTU {outer['mtu']}"
        lines.append(f"  outer    {outer['source']} -> {to}, {outer['bytes']} bytes{fragments}, {why}")
    if (longer := document["longer"]) is not None:
        plain, with_df = (_of_longer(longer[it]) for it in ("without_df", "with_df"))
        lines.append(f"  longer   than {longer['than']} bytes: {plain}; with DF {with_df}")
    for title, sender in zip(["senders", *[""] * len(document["senders"])], document["senders"], strict=False):
        where = "" if sender["address"] is None else f" ({sender['address']})"
        lines.append(f"  {title:<8} {sender['who']}{where}: {sender['counter']}")
    return lines


def _of_longer(counter: str) -> str:
    return "in fragments" if counter == "encap_sent" else f"dropped ({counter})"
