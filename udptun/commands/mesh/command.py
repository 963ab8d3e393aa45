"""`udptun mesh`: asks the daemon here and those of its peers, and shows who reaches whom (docs/mesh.md)."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from udptun.commands.mesh import page, report, table
from udptun.commands.mesh.answer import AnswerError, Peer, View, read_view
from udptun.commands.mesh.ask import Answer, Question, ask_all
from udptun.commands.mesh.matrix import MOST_HOSTS, Mesh, build, choose
from udptun.commands.mesh.problems import notes_of, problems_of
from udptun.commands.parser import Parser, seconds_up_to, subnet_or_address
from udptun.commands.screen import Page
from udptun.commands.status import fetch
from udptun.commands.terminal import has_colours, is_dumb, size_of
from udptun.config.go_flags import integer_in
from udptun.core.errors import UdptunError, UsageError
from udptun.core.mesh import PATH
from udptun.core.network_state import IPNetwork
from udptun.core.tunnel import PORTS

_WAIT_S = 3.0
_NOT_FOUND = "404 not found"
"""What a daemon says that does not know the path."""
_NO_ADDRESS = ("host-gw", "alloc")
"""The types whose hosts have no tunnel address, at which their views could be asked for."""


def run(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Returns 0 when nothing is wrong, and else 1.  Raises UsageError, and UdptunError when no daemon answers."""
    parser = Parser(
        prog="udptun mesh",
        description="Say which host reaches which: alive, RTT, loss, path MTU, as this host and each other one with "
        "--mesh-port sees it.  Exit status 0: nothing is wrong, 1: something is.",
    )
    parser.add_argument(
        "hosts",
        nargs="*",
        type=subnet_or_address,
        metavar="SUBNET|ADDRESS",
        help=f"this host and these alone (default: all, up to {MOST_HOSTS}, those in trouble first)",
    )
    parser.add_argument(
        "--port", type=_port, metavar="PORT", help="the --mesh-port of the others (default: this host's)"
    )
    parser.add_argument(
        "--wait",
        type=seconds_up_to(60),
        default=_WAIT_S,
        metavar="SECONDS",
        help="for their answers (default: %(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="for programs; see docs/mesh.md")
    parser.add_argument("--html", metavar="FILE", help="write one page with a heat map as well; -: to stdout, alone")
    parser.add_run_dir(environ)
    given = parser.parse_args(argv)
    if given.json and given.html == "-":
        raise UsageError("mesh: --json and --html - both write to stdout; leave one out")
    mesh = gather(given.run_dir, given.hosts, given.port, given.wait)
    problems, notes = problems_of(mesh), notes_of(mesh)
    if given.html is not None:
        _write(given.html, page.render(mesh, problems, notes))
    if given.json:
        print(report.as_json(mesh, problems, notes))
    elif given.html != "-":
        print("\n".join(table.render(mesh, problems, notes, _page(environ))))
    return 1 if problems else 0


def gather(run_dir: Path, wanted: Sequence[str], port: int | None, wait_s: float) -> Mesh:
    """Ask this host's daemon and those of its peers.  Raises UdptunError."""
    began_s, made_at = time.monotonic(), time.time()
    try:
        own = read_view(fetch(run_dir, PATH).encode())
    except UdptunError as exc:
        if str(exc) != _NOT_FOUND:
            raise
        raise UdptunError("the daemon here is of a version without a view: restart it, and ask again") from None
    except AnswerError as exc:
        raise UdptunError(f"the daemon of this host says what cannot be used: {exc}") from None
    try:
        peers = choose(own, wanted)
    except ValueError as exc:
        raise UsageError(f"mesh: nobody here knows a host with {exc}; `udptun status` lists them") from None
    port = own.mesh_port if port is None else port
    answers = _not_asked(own, peers, port)
    questions = [it for peer in peers if peer.subnet not in answers and (it := _question(own, peer)) is not None]
    subnets = [own.subnet, own.ipv6_subnet, *(it.subnet for it in peers), *(it.ipv6_subnet for it in peers)]
    of = {subnet for subnet in subnets if subnet is not None}
    answers |= asyncio.run(ask_all(questions, port, wait_s, of))
    took_s = time.monotonic() - began_s
    return build(own, peers, answers, made_at=made_at, took_s=took_s, port=port, are_named=bool(wanted))


def _not_asked(own: View, peers: Sequence[Peer], port: int) -> dict[IPNetwork, Answer]:
    """Why the hosts of these subnets are not asked."""
    if own.backend in _NO_ADDRESS:
        reason = f"with Backend.Type {own.backend} hosts have no tunnel address to be asked at"
    elif not port:
        reason = "--mesh-port is closed here, and --port is not given"
    else:
        return {}
    return {peer.subnet: Answer(None, reason) for peer in peers if peer.is_udptun}


def _question(own: View, peer: Peer) -> Question | None:
    """By the family that both have; flannel's hosts are not asked."""
    if not peer.is_udptun:
        return None
    for to in (peer.subnet, peer.ipv6_subnet):
        for here in (own.subnet, own.ipv6_subnet):
            if to is not None and here is not None and to.version == here.version:
                return Question(peer.subnet, to.network_address, here.network_address)
    return None


def _write(name: str, text: str) -> None:
    if name == "-":
        sys.stdout.write(text)
        return
    try:
        Path(name).write_text(text, encoding="utf-8")
    except OSError as exc:
        raise UdptunError(f"cannot write {name}: {exc.strerror}") from exc


def _page(environ: Mapping[str, str]) -> Page:
    if not sys.stdout.isatty() or is_dumb(environ):
        return Page()
    width, height = size_of(sys.stdout.fileno())
    # The prompt comes below.
    return Page(width, height - 1, has_colours(environ))


def _port(text: str) -> int:
    from argparse import ArgumentTypeError

    try:
        return integer_in(PORTS)(text)
    except ValueError as exc:
        raise ArgumentTypeError(f"{text!r} {exc}") from None
