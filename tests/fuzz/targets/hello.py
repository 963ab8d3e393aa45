"""Messages between a control plane and datapath processes, both ways, over real sockets.

An input is a JSON list.  Each item is a message: its bytes in hexadecimal, or the fields of a HELLO, and how many
descriptors come with it.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

from tests.fuzz.mutate import json_mutator
from tests.fuzz.oracles import check_line
from udptun.core.errors import DatapathError
from udptun.datapath import processes, worker
from udptun.datapath.processes import Process, new_connection
from udptun.datapath.protocol import CONFINEMENTS, MAX_DESCRIPTORS, Descriptors, Hello

_FIELDS = ("length", "version", "active", "n_workers", "started_ns", "pid", "layout_version", "n_senders")
_GOOD = dict(zip(_FIELDS, (80, 4, 1, 2, 5, 7, 7, 1), strict=True)) | {"build": "abc", "confinement": [2, 2]}
_OLD = struct.Struct("=4sIIIIQ32s").pack(b"udpt", 3, 7, 1, 1, 5, b"old")
FOUND: dict[str, bytes] = {}
SEEDS = tuple(
    json.dumps(messages).encode()
    for messages in (
        [[_GOOD, 8], ["events", 2], [_GOOD, 8]],
        [[{**_GOOD, "active": 0, "version": 1, "confinement": []}, 8], ["stop", 0]],
        [[_OLD.hex(), 5]],
        [["udpt", 3], [_GOOD, 8]],
        [["events", 2], ["stop", 1], ["", 0], [{**_GOOD, "n_workers": 4_000_000_000}, 8]],
    )
)
mutate = json_mutator(
    (*_FIELDS, "build", "confinement", "magic", "more"),
    ([_GOOD, 8], ["events", 2], ["events", 1], ["stop", 0], [_OLD.hex(), 5], 72, 76, 80, 4096, 3, 253, "ff" * 40),
)
_LOOP = asyncio.new_event_loop()
_directory = tempfile.TemporaryDirectory(prefix="udptun-fuzz-hello-")
_NULL = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


def check(data: bytes) -> None:
    try:
        script = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(script, list):
        return
    messages = [(_message(it[0]), _count(it[1])) for it in script[:12] if isinstance(it, list) and len(it) == 2]
    _parse([message for message, _ in messages])
    before = _open_descriptors()
    # Who listens at a path is found in /proc, where it takes longer than all the rest.
    with mock.patch.object(processes, "_pids_listening_at", return_value=[]):
        _LOOP.run_until_complete(_hear(messages))
    _serve(messages)
    # Others of this process may end meanwhile.
    assert _open_descriptors() <= before


def _message(said: Any) -> bytes:
    if isinstance(said, dict):
        numbers = [_u32(said.get(name, 0)) for name in _FIELDS]
        length, version, active, n_workers, started_ns, pid, layout_version, n_senders = numbers
        fields = (length, version, active, n_workers, started_ns, _text(said.get("build"))[:32])
        given_up = said.get("confinement")
        numbers = [0] if given_up is None else list(map(_u32, _list(given_up)))
        more = struct.pack(f"={len(numbers)}I", *numbers)
        magic = _text(said["magic"])[:4] if "magic" in said else worker.HELLO_MAGIC
        return worker.HELLO.pack(magic, *fields, pid, layout_version, n_senders) + more + _text(said.get("more"))
    return _text(said)


def _text(said: Any) -> bytes:
    """Hexadecimal, or else the text itself."""
    if not isinstance(said, str):
        return b""
    try:
        return bytes.fromhex(said)
    except ValueError:
        return said.encode("utf-8", "surrogatepass")


def _list(said: Any) -> list[Any]:
    return said[:5] if isinstance(said, list) else []


def _u32(value: Any) -> int:
    return value % 2**32 if type(value) is int else 0


def _count(value: Any) -> int:
    return min(value % 2**32, MAX_DESCRIPTORS) if type(value) is int else 0


def _parse(messages: list[bytes]) -> None:
    for message in messages:
        hello = Hello.parse(message)
        if hello is None:
            continue
        assert message[:4] == worker.HELLO_MAGIC
        assert hello.confinement in (None, *CONFINEMENTS)
        for n in (0, 3, 5, 8, MAX_DESCRIPTORS):
            try:
                found = Descriptors.from_list(range(n), hello)
            except ValueError as exc:
                check_line(str(exc))
                continue
            assert len(found.tun) == len(found.udp) == hello.n_workers
            assert found.as_list() == list(range(n))[: len(found.as_list())]


async def _hear(messages: list[tuple[bytes, int]]) -> None:
    """The control plane's side: the other end says all that, and goes."""
    path = Path(_directory.name) / "datapath-1.sock"
    connection = new_connection()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        listener.listen(1)
        connection.connect(str(path))
        theirs, _ = listener.accept()
    process = Process(connection, path)
    process.observe(lambda: None)
    try:
        with theirs:
            for message, n in messages:
                if message:
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={n}i", *[_NULL] * n))] if n else []
                    theirs.sendmsg([message], rights)
        try:
            await process.wait_hello()
        except DatapathError as exc:
            check_line(str(exc))
        else:
            assert process.descriptors is not None
            assert len(process.descriptors.tun) == len(process.descriptors.udp)
            assert len(process.descriptors.events) in (0, 2)
            assert process.build_id
        while not process.is_gone:
            await asyncio.sleep(0)
        assert process.cause_of_death
    finally:
        process.detach()
        process.close_descriptors()


def _serve(messages: list[tuple[bytes, int]]) -> None:
    """The datapath's side: one control plane says all that, and another one, which comes later, is answered."""
    path = Path(_directory.name) / "worker.sock"
    path.unlink(missing_ok=True)
    listener = worker._socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen(8)
    woken, wake = os.pipe()
    hello = worker.HELLO.pack(b"udpt", 72, 1, 0, 1, 1, b"b", 1, 7, 0)
    clients = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]
    try:
        for client in clients:
            client.connect(str(path))
            client.setblocking(False)
        for message, n in messages:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={n}i", *[_NULL] * n))] if n else []
            with suppress(OSError):
                clients[0].sendmsg([message], rights)
        os.write(wake, b"a")
        clients[1].close()
        clients[2].send(worker.STOP)
        worker.serve(listener, [_NULL], [_NULL, _NULL], woken, lambda _: hello)
        if not any(message[:64] == worker.STOP for message, _ in messages):
            # Each that connects is greeted; it may have been told that we are the active one, too.
            assert clients[2].recv(4096) == hello
    finally:
        for end in (*clients, listener):
            end.close()
        os.close(woken)
        os.close(wake)


def _open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
