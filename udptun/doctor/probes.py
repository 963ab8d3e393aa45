"""Asks many addresses at once whether they answer: ICMP echoes, and datagrams to UDP ports that may be closed.

The echoes leave from raw sockets, which need CAP_NET_RAW.  Each carries a nonce of its own, so that an answer is known
whatever else this host pings.  An empty datagram reaches a datapath as one that is too short, and is dropped there.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address

from udptun._kabi import lib
from udptun.core.echo import NONCE_LEN, echo_message, echo_request, parse_echo_reply, parse_echo_reply_message
from udptun.core.network_state import IPAddress

_TRIES = 2
_WAIT_S = 0.7
"""For the answers to each try."""
_BUFFER_LEN = 1 << 20
_HEAD_LEN = 128
"""Of a reply, bytes: headers and nonce."""


@dataclass(frozen=True, slots=True)
class Echo:
    """A question: does `to` answer a packet of `length` bytes, headers and all?  0: of the shortest."""

    to: IPAddress
    length: int = 0


@dataclass(slots=True)
class Echoes:
    """`answered`: the questions that were.  `refused`: the error with which the kernel would not send, by question."""

    answered: set[Echo] = field(default_factory=set)
    refused: dict[Echo, OSError] = field(default_factory=dict)


async def ask_echoes(questions: Collection[Echo]) -> Echoes:
    """Ask all at once, each twice where nothing comes; at most 1.4 s.  Raises OSError without CAP_NET_RAW."""
    found = Echoes()
    nonces: dict[bytes, Echo] = {}
    changed = asyncio.Event()

    def take(nonce: bytes | None) -> None:
        if nonce is not None and (question := nonces.get(nonce)) is not None:
            found.answered.add(question)
            changed.set()

    with contextlib.ExitStack() as undo:
        senders = {version: _open(version, take, undo) for version in {it.to.version for it in questions}}
        for attempt in range(_TRIES):
            waiting = [it for it in questions if it not in found.answered]
            for question in waiting:
                nonce = os.urandom(NONCE_LEN)
                nonces[nonce] = question
                try:
                    _send(senders[question.to.version], question, nonce, attempt)
                    found.refused.pop(question, None)
                except OSError as exc:
                    found.refused[question] = exc
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_WAIT_S):
                    while len(found.answered | found.refused.keys()) < len(questions):
                        changed.clear()
                        await changed.wait()
    return found


def _open(version: int, take: Callable[[bytes | None], None], undo: contextlib.ExitStack) -> socket.socket:
    """The socket to send with.  The nonce of each reply goes to `take` until `undo` is closed; None: it has none."""
    family, protocol = (
        (socket.AF_INET, socket.IPPROTO_ICMP) if version == 4 else (socket.AF_INET6, socket.IPPROTO_ICMPV6)
    )
    heard = undo.enter_context(socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK, protocol))
    heard.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_LEN)
    loop = asyncio.get_running_loop()

    def read() -> None:
        with contextlib.suppress(OSError):
            while True:
                data = heard.recv(_HEAD_LEN)
                if version == 6:
                    take(parse_echo_reply_message(data, 6))
                elif (reply := parse_echo_reply(data)) is not None:
                    take(reply.nonce)

    loop.add_reader(heard, read)
    undo.callback(loop.remove_reader, heard)
    if version == 6:
        heard.setsockopt(socket.IPPROTO_IPV6, lib.IPV6_MTU_DISCOVER, lib.IP_PMTUDISC_PROBE)
        heard.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DONTFRAG, 1)
        return heard
    return undo.enter_context(socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_RAW))


def _send(sender: socket.socket, question: Echo, nonce: bytes, attempt: int) -> None:
    to = question.to
    if isinstance(to, IPv4Address):
        # The kernel fills in the source.
        packet = echo_request(IPv4Address(0), to, os.getpid() & 0xFFFF, attempt, nonce, question.length)
        packet = packet.ljust(question.length, b"\0")
    else:
        packet = echo_message(nonce, max(question.length, 64), to.version)
    sender.sendto(packet, (str(to), 0))


Remote = tuple[IPAddress, int]


async def find_closed_ports(remotes: Iterable[Remote], wait_s: float = _WAIT_S) -> Mapping[Remote, str]:
    """Those of the UDP ports at which nobody listens, or that a router or firewall refuses, each with the error's name.

    An open port and one from which nothing comes back look the same.
    """
    loop = asyncio.get_running_loop()
    closed: dict[Remote, str] = {}
    with contextlib.ExitStack() as undo:
        for address, port in dict.fromkeys(remotes):
            family = socket.AF_INET if address.version == 4 else socket.AF_INET6
            asking = undo.enter_context(socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK))

            def read(asking: socket.socket = asking, remote: Remote = (address, port)) -> None:
                try:
                    asking.recv(1)
                except BlockingIOError:
                    return
                except OSError as exc:
                    closed[remote] = errno.errorcode.get(exc.errno or 0, str(exc))

            try:
                asking.connect((str(address), port))
                asking.send(b"")
            except OSError as exc:
                closed[address, port] = errno.errorcode.get(exc.errno or 0, str(exc))
                continue
            loop.add_reader(asking, read)
            undo.callback(loop.remove_reader, asking)
        await asyncio.sleep(wait_s)
    return closed
