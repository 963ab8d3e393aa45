"""What `udptun trace --live` asks, how it says what comes, and the files that it writes; test_live_trace_hosts.py asks
daemons, and test_tracing.py the datapath."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from ipaddress import ip_address, ip_network
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.packets import (
    AUTHENTICATION,
    DESTINATION_OPTIONS,
    authentication_header,
    fragment_header,
    icmp_message,
    ipv4,
    ipv6,
    options_header,
    tcp_segment,
    udp,
    udp_segment,
)
from udptun.commands import trace as trace_command
from udptun.commands import trace_live
from udptun.commands.pcapng import PcapngFile
from udptun.control import http
from udptun.control.http import Request, Response, Routes, serve
from udptun.control.trace.live import LiveTraces
from udptun.core.errors import UdptunError, UsageError
from udptun.core.family import Family
from udptun.core.live_trace import LiveTraceRequest
from udptun.core.packet_head import PacketHead

POD, THEIRS, POD6, THEIRS6 = "10.244.1.2", "10.244.2.2", "fd00:244:0:1::2", "fd00:244:0:2::2"
NOW_NS = 1_764_425_411_123_456_789

# ------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("words", "flags", "expected"),
    [
        (("", ""), {}, LiveTraceRequest(None, None, None, None, 5)),
        (("any", THEIRS), {}, LiveTraceRequest(None, ip_network(THEIRS), None, None, 5)),
        (("10.244.1.9/24", "any"), {}, LiveTraceRequest(ip_network("10.244.1.0/24"), None, None, None, 5)),
        ((POD6, "::/0", "icmp"), {}, LiveTraceRequest(ip_network(POD6), ip_network("::/0"), 1, None, 5)),
        (("any", "any", "tcp", "443"), {"seconds": "9"}, LiveTraceRequest(None, None, 6, 443, 5, 9)),
        (
            ("any", "any", "47"),
            {"is_one_way": True, "is_drops_alone": True, "snap_len": "256"},
            LiveTraceRequest(None, None, 47, None, 5, 60, True, True, 256),
        ),
    ],
)
def test_words_and_query_say_the_same(
    words: tuple[str, ...], flags: dict[str, Any], expected: LiveTraceRequest
) -> None:
    asked = LiveTraceRequest.from_words(*words, n_packets="5", **flags)
    assert asked == expected
    assert LiveTraceRequest.from_query(asked.query()) == expected


@pytest.mark.parametrize(
    ("words", "flags", "message"),
    [
        (("pod-7", "any"), {}, "SRC 'pod-7' is no IP address, no prefix and not 'any'"),
        (("any", "fe80::1%eth0"), {}, "DST 'fe80::1%eth0' is no IP address, no prefix and not 'any'"),
        ((POD, THEIRS6), {}, f"SRC {POD} and DST {THEIRS6} are of different families"),
        (("any", "any", "sctp"), {}, "PROTO 'sctp' is no number from 0 to 255 or tcp, udp, icmp"),
        (("any", "any", "icmp", "53"), {}, "PORT 53: only tcp and udp have ports"),
        (("any", "any", "udp", "0"), {}, "PORT '0' is no number from 1 to 65535"),
        (("any", "any"), {"n_packets": "0"}, "--live '0' is no number from 1 to 1000000"),
        (("any", "any"), {"seconds": "3601"}, "--seconds '3601' is no number from 1 to 3600"),
        (("any", "any"), {"snap_len": "257"}, "--snap-len '257' is no number from 1 to 256"),
    ],
)
def test_wrong_word_is_named(words: tuple[str, ...], flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        LiveTraceRequest.from_words(*words, **{"n_packets": "5", **flags})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "trace: SRC and DST are missing; with --live N they may be left out"),
        ((POD, THEIRS, "--drops"), "trace: --drops is for --live N"),
        ((POD, THEIRS, "--snap-len", "60"), "trace: --snap-len is for --live N"),
        ((POD, THEIRS, "--write", "a"), "trace: --write is for --live N"),
        (("--live", "3", "--df"), "trace: --size, --ttl, --df and --from are not for --live N"),
    ],
)
def test_flags_of_one_kind_of_trace_are_refused_by_the_other(argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        trace_command.run(argv, {})


@pytest.mark.parametrize(
    "argv",
    [
        (POD, THEIRS, "tcp", "443", "--live", "3", "--drops"),
        ("--live", "3", POD, THEIRS, "--drops", "tcp", "443"),
        (POD, "--drops", THEIRS, "--live=3", "tcp", "443"),
    ],
)
def test_words_may_stand_between_flags(argv: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[LiveTraceRequest] = []

    def show(request: LiveTraceRequest, *_: object, **__: object) -> int:
        asked.append(request)
        return 0

    monkeypatch.setattr(trace_live, "show", show)
    assert trace_command.run(argv, {}) == 0
    ends = ip_network(POD), ip_network(THEIRS)
    assert asked == [LiveTraceRequest(*ends, 6, 443, 3, is_drops_alone=True)]


# ----------------------------------------------------------------------------------------------------- headers


@pytest.mark.parametrize(
    ("packet", "protocol", "ports", "flags"),
    [
        (udp(POD, THEIRS), 17, (5353, 53), None),
        (ipv4(POD, THEIRS, tcp_segment(POD, THEIRS, flags=0x12), protocol=6, options=b"\1" * 8), 6, (40000, 443), "SA"),
        (ipv4(POD, THEIRS, tcp_segment(POD, THEIRS)[:13], protocol=6), 6, (40000, 443), None),
        (ipv4(POD, THEIRS, icmp_message(8), protocol=1), 1, (None, None), None),
        (ipv4(POD, THEIRS, udp_segment(POD, THEIRS)[:3]), 17, (None, None), None),
        (ipv4(POD, THEIRS, udp_segment(POD, THEIRS), offset=8), 17, (None, None), None),
        (udp(POD6, THEIRS6), 17, (5353, 53), None),
        (
            ipv6(
                POD6,
                THEIRS6,
                udp_segment(POD6, THEIRS6),
                headers=[options_header(DESTINATION_OPTIONS), fragment_header(), authentication_header()],
            ),
            17,
            (5353, 53),
            None,
        ),
        (ipv6(POD6, THEIRS6, udp_segment(POD6, THEIRS6), headers=[fragment_header(offset=8)]), 17, (None, None), None),
        (ipv6(POD6, THEIRS6, headers=[authentication_header()])[:44], AUTHENTICATION, (None, None), None),
    ],
)
def test_head_has_what_the_headers_say(
    packet: bytes, protocol: int, ports: tuple[int | None, int | None], flags: str | None
) -> None:
    head = PacketHead.of(packet)
    ends = (POD, THEIRS) if packet[0] >> 4 == 4 else (POD6, THEIRS6)
    assert (head.source, head.destination) == tuple(map(ip_address, ends))
    assert (head.protocol, (head.source_port, head.port), head.flags) == (protocol, ports, flags)


@given(st.binary(max_size=120), st.sampled_from((b"", b"\x45", b"\x60" + bytes(5) + b"\x2b")))
def test_head_of_anything_is_read_without_a_fault(rest: bytes, first: bytes) -> None:
    PacketHead.of(first + rest)


@pytest.mark.parametrize("packet", [b"", b"\x45", b"\x45" * 19, b"\x60" * 39, b"\x25" * 60])
def test_head_of_no_packet_says_nothing(packet: bytes) -> None:
    assert PacketHead.of(packet) == PacketHead()


# ------------------------------------------------------------------------------------------------------- lines


def line(**changes: Any) -> dict[str, Any]:
    return {
        "event": "packet",
        "time_ns": NOW_NS,
        "direction": "outgoing",
        "device": "flannel0",
        "source": POD,
        "destination": THEIRS,
        "protocol": 6,
        "source_port": 40000,
        "port": 443,
        "flags": "SA",
        "fragment": False,
        "bytes": 60,
        "segments": 1,
        "dropped": 0,
        "outer": "192.0.2.2",
        "outer_port": 8285,
        "peer": "10.244.2.0/24",
        "counter": "encap_sent",
        "words": "sent to the host of the destination",
        "docs": "docs/wire-format.md#encap-tun-to-udp",
        "icmp_sent": False,
        "packet": udp(POD, THEIRS).hex(),
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {},
            f"out to 192.0.2.2:8285: {POD}:40000 > {THEIRS}:443 tcp [SA], 60 bytes: "
            "sent to the host of the destination (encap_sent)",
        ),
        (
            {"segments": 10, "dropped": 3, "bytes": 14040, "counter": "encap_drop_send", "words": "refused"},
            f"out to 192.0.2.2:8285: {POD}:40000 > {THEIRS}:443 tcp [SA], 14040 bytes in 10 "
            "packets: 3 of 10 packets dropped, refused (encap_drop_send)",
        ),
        (
            {
                "direction": "arriving",
                "source": THEIRS6,
                "destination": POD6,
                "protocol": 58,
                "source_port": None,
                "port": None,
                "flags": None,
                "dropped": 1,
                "outer": "2001:db8::2",
                "peer": None,
                "counter": "decap_drop_ttl",
                "words": "TTL used up",
                "icmp_sent": True,
            },
            f"in from [2001:db8::2]:8285: {THEIRS6} > {POD6} icmp, 60 bytes: "
            "dropped, TTL used up (decap_drop_ttl), ICMP error sent",
        ),
        (
            {"outer": None, "outer_port": None, "source": None, "dropped": 1, "counter": "encap_drop_malformed"},
            "out to nobody: no IP packet, 60 bytes: dropped, "
            "sent to the host of the destination (encap_drop_malformed)",
        ),
        (
            {"protocol": 17, "fragment": True, "flags": None, "source_port": None, "port": None},
            f"out to 192.0.2.2:8285: {POD} > {THEIRS} udp fragment, 60 bytes: "
            "sent to the host of the destination (encap_sent)",
        ),
    ],
)
def test_a_packet_is_one_line(changes: dict[str, Any], expected: str) -> None:
    clock, _, rest = trace_live.render(line(**changes)).partition(" ")
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.123456", clock)
    assert rest == expected


def test_on_a_terminal_the_end_has_a_colour() -> None:
    plain = trace_live.render(line())
    clock, end = plain.partition(" ")[0], "sent to the host of the destination (encap_sent)"
    coloured = plain.replace(clock, f"\x1b[2m{clock}\x1b[0m").replace(end, f"\x1b[32m{end}\x1b[0m")
    assert trace_live.render(line(), has_colour=True) == coloured
    assert "\x1b[31mdropped, " in trace_live.render(line(dropped=1), has_colour=True)


@pytest.mark.parametrize("has_shortcut", [False, True])
def test_packets_that_cannot_be_shown_are_spoken_of_first(
    has_shortcut: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever waits for a packet that the kernel carries by the shortcut would wait for ever."""
    begin = {"schema": 1, "event": "begin", "devices": ["flannel0"], "seconds": 9, "shortcut": has_shortcut}
    end = {"event": "end", "reason": "packets", "packets": 1, "lost": 0}
    answer = b"HTTP/1.1 200 OK\r\n\r\n" + "".join(f"{json.dumps(it)}\n" for it in (begin, line(), end)).encode()
    # In two pieces that are cut anywhere.
    monkeypatch.setattr(trace_live, "receive", lambda *_: (it for it in (answer[:50], answer[50:])))
    request = LiveTraceRequest(None, None, None, None, 1)
    assert trace_live.show(request, tmp_path, as_json=False, write=tmp_path / "a.pcapng") == 0
    out, said = capsys.readouterr()
    assert out == f"{trace_live.render(line())}\n"
    assert said.startswith("packets that the kernel carries by the shortcut are not shown") is has_shortcut
    assert (tmp_path / "a.pcapng").stat().st_size > 200


BEGIN = {"schema": 1, "event": "begin", "devices": ["flannel0"], "seconds": 9, "shortcut": False}


@pytest.mark.parametrize(
    ("status", "more", "away_s", "message"),
    [
        ("200 OK", [BEGIN, line()], 0.0, r"the daemon at \S+ has ended, and the trace with it"),
        ("200 OK", [BEGIN, line()], 0.1, r"the lines were not read for 0 s, and the daemon waits for 0 s, "),
        ("404 Not Found", [], 0.0, r"the daemon at \S+ is of a version without --live: restart it, and ask again"),
        ("503 Service Unavailable", [], 0.0, r"the daemon at \S+ answered b'HTTP/1.1 503 Service Unavailable'"),
    ],
)
def test_an_answer_without_an_end_says_why(
    status: str,
    more: list[dict[str, Any]],
    away_s: float,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever held the lines back in a pager read that the daemon had ended."""
    answer = f"HTTP/1.1 {status}\r\n\r\n" + "".join(f"{json.dumps(it)}\n" for it in more)
    monkeypatch.setattr(trace_live, "receive", lambda *_: (it.encode() for it in (answer[:9], answer[9:])))
    monkeypatch.setattr(trace_live, "render", lambda *_, **__: time.sleep(away_s))
    assert trace_live.PATIENCE_S == http.REQUEST_S
    monkeypatch.setattr(trace_live, "PATIENCE_S", 0.05)
    with pytest.raises(UdptunError, match=f"^{message}"):
        trace_live.show(LiveTraceRequest(None, None, None, None, 1), tmp_path, as_json=False, write=None)


# ------------------------------------------------------------------------------------------------------- files


def tshark(path: Path, *fields: str) -> list[list[str]]:
    """The fields of each packet, as Wireshark's own reader finds them."""
    if shutil.which("tshark") is None:
        pytest.skip("tshark is not installed")
    columns = [argument for field in fields for argument in ("-e", field)]
    result = subprocess.run(
        ["tshark", "-n", "-r", path, "-T", "fields", *columns], check=True, capture_output=True, text=True
    )
    return [line.split("\t") for line in result.stdout.splitlines()]


def write(path: Path) -> None:
    with PcapngFile(path, ["flannel0", "flannel-v6.1"], 256) as file:
        long = ipv4(POD, THEIRS, tcp_segment(POD, THEIRS, bytes(1400)), protocol=6)
        packets = [
            (udp(POD, THEIRS), 28, "flannel0", True, "to 192.0.2.2:8285: sent (encap_sent)"),
            (udp(THEIRS6, POD6), 48, "flannel-v6.1", False, "from 192.0.2.2:8472: dropped, ä (decap_drop_ttl)"),
            (long[:41], len(long), "flannel0", False, "x" * 99),
        ]
        for number, (packet, length, device, is_outgoing, comment) in enumerate(packets):
            file.add(
                packet,
                length=length,
                time_ns=NOW_NS + number,
                interface=device,
                is_outgoing=is_outgoing,
                comment=comment,
            )
        file.add_statistics(n_packets=3, n_lost=7, time_ns=NOW_NS)


def test_wireshark_reads_packets_comments_and_directions(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    write(path)
    found = tshark(
        path,
        *("frame.comment", "frame.packet_flags_direction", "frame.len", "frame.cap_len", "frame.interface_name"),
        *("ip.src", "ipv6.src", "frame.time_epoch"),
    )
    assert [row[:5] for row in found] == [
        ["to 192.0.2.2:8285: sent (encap_sent)", "0x00000002", "28", "28", "flannel0"],
        ["from 192.0.2.2:8472: dropped, ä (decap_drop_ttl)", "0x00000001", "48", "48", "flannel-v6.1"],
        ["x" * 99, "0x00000001", "1440", "41", "flannel0"],
    ]
    assert [row[5:7] for row in found] == [[POD, ""], ["", THEIRS6], [POD, ""]]
    assert [row[7] for row in found] == [f"1764425411.{nanoseconds}" for nanoseconds in range(123456789, 123456792)]
    assert path.stat().st_mode & 0o777 == 0o600


def test_file_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    path.write_text("mine")
    with pytest.raises(UdptunError, match=f"^cannot write {path}: it is there already; name another file, or remove"):
        PcapngFile(path, ["flannel0"], 256)
    with pytest.raises(UdptunError, match=f"^cannot write {tmp_path}/no/a: No such file or directory$"):
        PcapngFile(tmp_path / "no/a", ["flannel0"], 256)
    assert path.read_text() == "mine"


def test_file_on_a_full_disk_ends_with_its_last_whole_packet(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    script = """if True:
        import resource, signal, sys
        from pathlib import Path
        from udptun.commands.pcapng import PcapngFile
        from udptun.core.errors import UdptunError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        file, packet = PcapngFile(Path(sys.argv[1]), ["flannel0"], 256), bytes.fromhex(sys.argv[2])
        try:
            while True:
                file.add(packet, length=99, time_ns=1, interface="flannel0", is_outgoing=True, comment="c")
        except UdptunError as exc:
            print(exc)
    """
    result = subprocess.run(
        [sys.executable, "-c", script, path, udp(POD, THEIRS).hex()], capture_output=True, text=True, check=True
    )
    assert result.stdout == f"cannot write {path}: no space is left for a packet\n"
    found = tshark(path, "ip.src", "frame.comment")
    assert found == [[POD, "c"]] * len(found)
    assert len(found) > 3


# ---------------------------------------------------------------------------------------------- the daemon's side


class FakeTracer:
    """Shows what the test puts into `waiting`."""

    def __init__(self) -> None:
        self.waiting: list[Any] = []
        self.is_on = False
        self.n_starts = 0
        self.n_lost = 0

    def start(self, asked: LiveTraceRequest, valid_s: float) -> None:
        self.is_on = True
        self.n_starts += 1

    def extend(self, valid_s: float) -> None:
        assert self.is_on

    def stop(self) -> None:
        self.is_on = False

    def take(self) -> list[Any]:
        taken, self.waiting = self.waiting, []
        return taken


def traced(number: int) -> Any:
    return SimpleNamespace(
        is_outgoing=True,
        time_ns=number,
        outer=ip_address("192.0.2.2"),
        outer_port=8285,
        peer=0,
        length=28,
        counter="encap_sent",
        n_segments=1,
        n_dropped=0,
        is_answered=False,
        packet=udp(POD, THEIRS),
    )


def running(tracer: FakeTracer | None, backend: str = "udp") -> Any:
    """A daemon that carries IPv4 by a datapath, or has the kernel carry it."""
    shortcut = SimpleNamespace(is_on=False)
    tunnel = SimpleNamespace(device="flannel0", tunnel=SimpleNamespace(tracer=tracer), shortcut=shortcut)
    tunnels = [] if tracer is None else [tunnel]
    device = "flannel.1" if backend == "vxlan" else None
    forwarding = SimpleNamespace(
        tunnels=tunnels,
        tunnel_of=lambda family: tunnels[0] if tunnels and family is Family.IPV4 else None,
        families=[Family.IPV4],
        device=lambda family: device,
        backend=SimpleNamespace(type=backend),
    )
    return SimpleNamespace(forwarding=forwarding, underlay=SimpleNamespace(link_name="eth0"))


@asynccontextmanager
async def daemon(what: Any, path: Path, is_current: Callable[[], bool] = lambda: True) -> AsyncIterator[None]:
    traces = LiveTraces()
    routes: Routes = {
        "/trace/live": lambda request: traces.answer(what, request, is_current),
        "/healthz": lambda request: Response(HTTPStatus.OK, "ok"),
    }
    server = await serve(routes, path)
    try:
        yield
    finally:
        server.close()


async def ask(path: Path, query: str, method: str = "GET") -> tuple[asyncio.StreamReader, asyncio.StreamWriter, str]:
    """The connection, and the first line of the answer."""
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(f"{method} /trace/live?{query} HTTP/1.1\r\n\r\n".encode())
    return reader, writer, (await reader.readline()).decode().strip()


async def lines_of(reader: asyncio.StreamReader) -> list[dict[str, Any]]:
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    assert b"Content-Length" not in head
    return [json.loads(it) for it in body.decode().splitlines()]


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.005)


ASKED = LiveTraceRequest(None, None, None, None, 2, 30).query()


def test_packets_are_sent_as_they_come_until_there_are_enough(tmp_path: Path) -> None:
    async def main() -> None:
        tracer = FakeTracer()
        async with daemon(running(tracer), tmp_path / "s"):
            reader, writer, status = await ask(tmp_path / "s", ASKED)
            assert status == "HTTP/1.1 200 OK"
            await until(lambda: tracer.is_on)
            tracer.n_lost = 4
            tracer.waiting = [traced(1)]
            await until(lambda: not tracer.waiting)
            tracer.waiting = [traced(2), traced(3)]
            begin, one, two, end = await lines_of(reader)
            assert begin == {"schema": 1, "event": "begin", "devices": ["flannel0"], "seconds": 30, "shortcut": False}
            assert [it["event"] for it in (one, two)] == ["packet"] * 2
            assert two["time_ns"] - one["time_ns"] < 10**9
            assert (one["source"], one["outer"], one["peer"]) == (POD, "192.0.2.2", None)
            assert end == {"event": "end", "reason": "packets", "packets": 2, "lost": 4}
            await until(lambda: not tracer.is_on)
            writer.close()

    asyncio.run(main())


@pytest.mark.parametrize(("reason", "seconds"), [("seconds", 1), ("daemon", 30)])
def test_trace_ends_by_itself(tmp_path: Path, reason: str, seconds: int) -> None:
    async def main() -> None:
        tracer, is_current = FakeTracer(), True
        async with daemon(running(tracer), tmp_path / "s", lambda: is_current):
            query = LiveTraceRequest(None, None, None, None, 2, seconds).query()
            reader, writer, _ = await ask(tmp_path / "s", query)
            is_current = reason != "daemon"
            *_, end = await lines_of(reader)
            assert (end["reason"], end["packets"]) == (reason, 0)
            await until(lambda: not tracer.is_on)
            writer.close()

    asyncio.run(main())


def test_trace_ends_with_its_client(tmp_path: Path) -> None:
    async def main() -> None:
        tracer = FakeTracer()
        async with daemon(running(tracer), tmp_path / "s"):
            for n_starts in (1, 2):
                _, writer, _ = await ask(tmp_path / "s", ASKED)
                assert tracer.n_starts == n_starts
                assert tracer.is_on
                writer.close()
                await until(lambda: not tracer.is_on)

    asyncio.run(main())


def test_head_alone_is_answered_without_a_trace(tmp_path: Path) -> None:
    async def main() -> None:
        tracer = FakeTracer()
        async with daemon(running(tracer), tmp_path / "s"):
            reader, writer, status = await ask(tmp_path / "s", ASKED, "HEAD")
            assert status == "HTTP/1.1 200 OK"
            assert (await reader.read()).endswith(b"Connection: close\r\n\r\n")
            assert not tracer.is_on
            writer.close()

    asyncio.run(main())


def test_there_is_one_trace_at_a_time(tmp_path: Path) -> None:
    async def main() -> None:
        tracer = FakeTracer()
        async with daemon(running(tracer), tmp_path / "s"):
            _, first, _ = await ask(tmp_path / "s", ASKED)
            reader, second, status = await ask(tmp_path / "s", ASKED)
            assert status == "HTTP/1.1 409 Conflict"
            body = (await reader.read()).decode()
            assert "another live trace runs, for 30 s at most: there can be one at a time\n" in body
            assert tracer.is_on
            assert tracer.n_starts == 1
            for writer in (first, second):
                writer.close()
            await until(lambda: not tracer.is_on)

    asyncio.run(main())


def test_trace_ends_with_the_daemon(tmp_path: Path) -> None:
    async def main() -> None:
        tracer = FakeTracer()
        async with daemon(running(tracer), tmp_path / "s"):
            _, writer, _ = await ask(tmp_path / "s", ASKED)
        await until(lambda: not tracer.is_on)
        writer.close()

    asyncio.run(main())


def test_client_that_does_not_read_is_turned_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "REQUEST_S", 0.3)

    async def main() -> None:
        tracer = FakeTracer()
        async with daemon(running(tracer), tmp_path / "s"):
            _, writer, _ = await ask(tmp_path / "s", LiveTraceRequest(None, None, None, None, 10**6, 30).query())
            transport = writer.transport
            assert isinstance(transport, asyncio.ReadTransport)
            transport.pause_reading()
            while tracer.is_on:
                tracer.waiting = [traced(1)] * 1000
                await asyncio.sleep(0.01)
            writer.close()

    asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.parametrize(
    ("backend", "words", "device"),
    [("vxlan", ("", ""), "flannel.1"), ("host-gw", ("", ""), "eth0"), ("udp", (POD6, "any"), "eth0")],
)
def test_what_the_kernel_carries_cannot_be_traced_live(backend: str, words: tuple[str, str], device: str) -> None:
    what = running(FakeTracer() if backend == "udp" else None, backend)
    query = LiveTraceRequest.from_words(*words, n_packets="3").query()
    answer = LiveTraces().answer(what, Request("GET", "/trace/live", query=query), lambda: True)
    assert answer.status == HTTPStatus.CONFLICT
    assert answer.body == (
        f"no packets to trace live: with the {backend} backend none of them pass through udptun; "
        f"`tcpdump -ni {device}` shows what the kernel carries\n"
    )
    assert LiveTraces().answer(what, Request("GET", "/", query="packets=x"), lambda: True).status == 400
