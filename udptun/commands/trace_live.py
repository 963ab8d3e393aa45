"""`udptun trace --live`: packets as they come, with their peers and their ends, asked of the daemon (docs/trace.md)."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from udptun.commands.pcapng import PcapngFile
from udptun.commands.screen import DIM, GREEN, RED, sgr
from udptun.commands.status import receive
from udptun.core.daemon_socket import SOCKET_NAME
from udptun.core.errors import UdptunError
from udptun.core.live_trace import SNAP_LEN_MAX, LiveTraceRequest
from udptun.core.network_state import socket_address
from udptun.core.trace_request import protocol_name

Document = Mapping[str, Any]

_ENDS = {
    "seconds": "the time is over; --seconds N gives it more",
    "daemon": "the daemon has begun again; ask it once more",
}
PATIENCE_S = 5.0
"""So long the daemon waits until somebody reads what it sends; control/http.py has the number."""
_SHORTCUT = "packets that the kernel carries by the shortcut are not shown; Shortcut off shows all (docs/shortcut.md)"


def show(
    request: LiveTraceRequest, run_dir: Path, *, as_json: bool, write: Path | None, has_colour: bool = False
) -> int:
    """Print packets as they come, and write them to a file that is not there yet.  `has_colour`: as in `render`.

    Returns 0 when so many have come as were asked for, or somebody has pressed Ctrl-C, and else 1.  Raises UdptunError.
    """
    file: PcapngFile | None = None
    n_packets = 0
    try:
        with closing(_follow(request, run_dir)) as lines:
            for line in lines:
                document = json.loads(line)
                if as_json:
                    print(line, flush=True)
                if document["event"] == "begin":
                    if document["shortcut"]:
                        print(_SHORTCUT, file=sys.stderr)
                    if write is not None:
                        file = PcapngFile(write, document["devices"], SNAP_LEN_MAX)
                elif document["event"] == "packet":
                    n_packets += 1
                    if not as_json:
                        print(render(document, has_colour=has_colour), flush=True)
                    if file is not None:
                        _add(file, document)
                elif document["event"] == "end":
                    if file is not None:
                        lost = document["lost"]
                        file.add_statistics(n_packets=n_packets, n_lost=lost, time_ns=time.time_ns())
                    return _end(document)
    except KeyboardInterrupt:
        # That is how one ends it.
        print(f"{n_packets} packets", file=sys.stderr)
        return 0
    finally:
        if file is not None:
            file.close()
    raise AssertionError("a trace ends with its last line, or with an error")


def render(document: Document, *, has_colour: bool = False) -> str:
    """A packet for people, on one line.  `has_colour`: it is for a terminal that has them."""
    whole_s, part_ns = divmod(document["time_ns"], 10**9)
    clock = f"{time.strftime('%H:%M:%S', time.localtime(whole_s))}.{part_ns // 1000:06}"
    way = "out" if document["direction"] == "outgoing" else "in"
    end = verdict(document)
    if has_colour:
        clock, end = sgr(clock, DIM), sgr(end, RED if document["dropped"] else GREEN)
    return f"{clock} {way} {_where(document)}: {_packet(document)}: {end}"


def verdict(document: Document) -> str:
    """Where it has ended, in words."""
    dropped, segments = document["dropped"], document["segments"]
    part = f"{dropped} of {segments} packets " if 0 < dropped < segments else ""
    icmp = ", ICMP error sent" if document["icmp_sent"] else ""
    return f"{part}{'dropped, ' if dropped else ''}{document['words']} ({document['counter']}){icmp}"


def _where(document: Document) -> str:
    if document["outer"] is None:
        return "to nobody"
    where = socket_address(document["outer"], document["outer_port"])
    return f"{'to' if document['direction'] == 'outgoing' else 'from'} {where}"


def _packet(document: Document) -> str:
    if document["source"] is None:
        return f"no IP packet, {document['bytes']} bytes"
    source, destination = (
        f"{document[it]}" if document[port] is None else socket_address(document[it], document[port])
        for it, port in (("source", "source_port"), ("destination", "port"))
    )
    flags = f" [{document['flags']}]" if document["flags"] else ""
    fragment = " fragment" if document["fragment"] else ""
    segments = f" in {document['segments']} packets" if document["segments"] > 1 else ""
    what = f"{protocol_name(document['protocol'])}{flags}{fragment}"
    return f"{source} > {destination} {what}, {document['bytes']} bytes{segments}"


def _add(file: PcapngFile, document: Document) -> None:
    file.add(
        bytes.fromhex(document["packet"]),
        length=document["bytes"],
        time_ns=document["time_ns"],
        interface=document["device"],
        is_outgoing=document["direction"] == "outgoing",
        comment=f"{_where(document)} ({document['peer'] or 'no peer'}): {verdict(document)}",
    )


def _end(document: Document) -> int:
    n, lost = document["packets"], document["lost"]
    if lost:
        print(f"{lost} more packets came faster than they could be shown", file=sys.stderr)
    if document["reason"] == "packets":
        return 0
    print(f"{n} packets; {_ENDS.get(document['reason'], document['reason'])}", file=sys.stderr)
    return 1


def _follow(request: LiveTraceRequest, run_dir: Path) -> Generator[str]:
    """The lines that the daemon sends.  Raises UdptunError where there is no other one."""
    path = run_dir / SOCKET_NAME
    rest, has_begun, longest_s = b"", b"", 0.0
    with closing(receive(run_dir, f"/trace/live?{request.query()}", request.seconds)) as pieces:
        for piece in pieces:
            came_s = time.monotonic()
            rest += piece
            if not has_begun:
                head, has_begun, body = rest.partition(b"\r\n\r\n")
                if not has_begun:
                    continue
                status = head.partition(b"\r\n")[0]
                if b" 200 " not in status:
                    raise UdptunError(_refusal(status, body + b"".join(pieces), path))
                rest = body
            *lines, rest = rest.split(b"\n")
            for line in lines:
                yield line.decode()
            longest_s = max(longest_s, time.monotonic() - came_s)
    if longest_s >= PATIENCE_S:
        raise UdptunError(
            f"the lines were not read for {longest_s:.0f} s, and the daemon waits for {PATIENCE_S:.0f} s, so the trace "
            "has ended; write to a file what is to be read later (--write FILE, or --json >FILE)"
        )
    raise UdptunError(f"the daemon at {path} has ended, and the trace with it")


def _refusal(status: bytes, body: bytes, path: Path) -> str:
    """Why there is no trace, by the daemon's answer."""
    if b" 404 " in status:
        return f"the daemon at {path} is of a version without --live: restart it, and ask again"
    return body.decode(errors="replace").strip() or f"the daemon at {path} answered {status!r}"
