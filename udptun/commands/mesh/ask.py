"""Asks hosts for their views, all at once and not for long.  What comes back may be anything, from anybody."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus

from udptun.commands.mesh.answer import MOST_BYTES, AnswerError, View, read_view
from udptun.core.mesh import PATH
from udptun.core.network_state import IPAddress, IPNetwork

_MOST_HEAD_BYTES = 8192
_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Question:
    """The host of `subnet` is asked at `to`, from `here`, which it knows for an address of ours."""

    subnet: IPNetwork
    to: IPAddress
    here: IPAddress


@dataclass(frozen=True, slots=True)
class Answer:
    """`view` None: there is none, for `reason`.  `is_wrong`: something came that is none.  `took_s`: until then."""

    view: View | None
    reason: str = ""
    took_s: float = 0.0
    is_wrong: bool = False


async def ask_all(
    questions: Sequence[Question], port: int, wait_s: float, of: Collection[IPNetwork] = ()
) -> Mapping[IPNetwork, Answer]:
    """What the host of each subnet says of itself and the hosts with subnets `of`, at most `wait_s` seconds after now.

    Nothing is read before all is there: that takes a while, in which others would seem to be late.
    """
    came = await asyncio.gather(*(_ask(it, port, wait_s) for it in questions))
    return {
        question.subnet: it if isinstance(it, Answer) else _read(question, *it, of)
        for question, it in zip(questions, came, strict=True)
    }


def _read(question: Question, answer: bytes, took_s: float, of: Collection[IPNetwork]) -> Answer:
    try:
        view = read_view(_body(answer), of)
        if question.subnet not in (view.subnet, view.ipv6_subnet):
            raise AnswerError(f"it comes from the host of {view.subnet}")
    except AnswerError as exc:
        return Answer(None, f"its answer is not used: {exc}", took_s, is_wrong=True)
    return Answer(view, "", took_s)


async def _ask(question: Question, port: int, wait_s: float) -> Answer | tuple[bytes, float]:
    """All that has come, and how long that took; or why nothing has."""
    began_s = time.monotonic()
    try:
        async with asyncio.timeout(wait_s):
            answer = await _fetch(question, port)
    except TimeoutError:
        return Answer(None, f"no answer within {wait_s:g} s", wait_s)
    except OSError as exc:
        return Answer(None, _why_not(exc, port), time.monotonic() - began_s)
    return answer, time.monotonic() - began_s


async def _fetch(question: Question, port: int) -> bytes:
    """The answer, or more of it than may be.  Raises OSError."""
    reader, writer = await asyncio.open_connection(
        str(question.to), port, local_addr=(str(question.here), 0), limit=_CHUNK_BYTES
    )
    try:
        writer.write(f"GET {PATH} HTTP/1.1\r\nHost: udptun\r\nConnection: close\r\n\r\n".encode())
        answer = bytearray()
        while len(answer) <= _MOST_HEAD_BYTES + MOST_BYTES and (chunk := await reader.read(_CHUNK_BYTES)):
            answer += chunk
    finally:
        writer.transport.abort()
    if not answer:
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
    return bytes(answer)


def _body(answer: bytes) -> bytes:
    """Raises AnswerError."""
    if len(answer) > _MOST_HEAD_BYTES + MOST_BYTES:
        raise AnswerError(f"it has more than {MOST_BYTES} bytes")
    head, end, body = answer.partition(b"\r\n\r\n")
    words = head[:_MOST_HEAD_BYTES].split(b"\r\n")[0].split(b" ")
    if not end or len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        raise AnswerError("it is none of an HTTP server")
    if (status := int(words[1][:3])) != HTTPStatus.OK:
        raise AnswerError(f"it has HTTP status {status}, so something else listens at the port")
    return body


def _why_not(exc: OSError, port: int) -> str:
    # asyncio makes one OSError of the errors of several addresses, without a number.
    number = exc.errno or 0
    if number == errno.ECONNREFUSED:
        return f"port {port} is closed there: no --mesh-port, or an earlier version"
    if number in (errno.ECONNRESET, errno.EPIPE):
        return "it hung up without an answer: it does not know this host for a peer"
    if number in (errno.EHOSTUNREACH, errno.ENETUNREACH):
        return f"it cannot be reached from here ({errno.errorcode[number]})"
    return f"cannot ask it ({errno.errorcode.get(number, 'no reason given')})"
