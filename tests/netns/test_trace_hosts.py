"""`udptun trace` says what becomes of a packet: each is traced, and then sent.  `--live` shows it when it is sent.

    pod h1/p1 -- cni0 - flannel0 [h1: asked] eth0 -- underlay -- eth0 [h2: a peer, and a stranger beside it]

Both families, over the udp backend.  tests/datapath/test_judge.py has every packet that there can be, without the
kernel around it; test_backends.py has the other backends.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from traffic import (
    has_shortcut,
    ipv6_gateway,
    ping,
    read_status,
    read_trace,
    seconds_until,
    socket_in,
    tcp_flow,
    wait_for_peers,
)

from tests.packets import ipv4, ipv6, udp_segment
from udptun.core.counter_words import COUNTERS
from udptun.core.trace_request import TraceRequest
from udptun.lab.host import UNDERLAY, Host, Pod
from udptun.lab.machine import wait_until
from udptun.lab.topology import Lab

pytestmark = pytest.mark.netns

CONF: Mapping[str, object] = {
    "Network": "10.244.0.0/16",
    "SubnetMax": "10.244.99.0",
    "EnableIPv6": True,
    "IPv6Network": "fd00:244::/48",
    "IPv6SubnetMax": "fd00:244:0:99::",
    "Backend": {"Type": "udp"},
}
MTU = 1472
PORT = 8285
STRANGER = str(UNDERLAY[99])
ELSEWHERE = {4: "198.51.100.7", 6: "2001:db8::7"}
UNLEASED = {4: "10.244.177.5", 6: "fd00:244:0:177::5"}
MARTIAN = {4: "127.0.0.5", 6: "::5"}
GROUP = {4: "239.1.2.3", 6: "ff05::1:3"}
TRIES = 5
_HDRINCL = {4: (socket.AF_INET, socket.IPPROTO_RAW), 6: (socket.AF_INET6, socket.IPPROTO_RAW)}
_IP_MTU_DISCOVER, _IP_PMTUDISC_DONT = 10, 0


@dataclass(frozen=True, slots=True)
class Row:
    """A packet from `sender`, "pod", "host" (h1's), "peer" or "stranger", and the counter in which it must end.

    None: it does not come into the tunnel.  Addresses are those of `Net`, or text.
    """

    sender: str
    source: str
    destination: str
    counter: str | None
    port: int = 53
    ttl: int = 64
    size: int = 100
    has_df: bool = False
    is_delivered: bool | None = None
    """None: as the counter says."""


OUT = [
    Row("pod", "pod", "their_pod", "encap_sent"),
    Row("pod", "pod", "their_pod", "encap_sent", size=MTU, has_df=True),
    Row("pod", "pod", "their_pod", "encap_drop_ttl", ttl=2),
    Row("pod", "pod", "unleased", "encap_drop_no_route"),
    Row("host", "own", "their_pod", "encap_sent"),
    Row("host", "own", "their_pod", "encap_drop_ttl", ttl=1),
    Row("pod", "pod", "their_pod", None, ttl=1),
    Row("pod", "pod", "elsewhere", None),
    Row("pod", "pod", "group", None),
]
IN = [
    Row("peer", "their_pod", "pod", "decap_delivered"),
    Row("peer", "their_pod", "own", "decap_delivered"),
    Row("peer", "their_pod", "pod", "decap_delivered", ttl=2, is_delivered=False),
    Row("peer", "their_pod", "pod", "decap_drop_ttl", ttl=1),
    Row("peer", "unleased", "pod", "decap_drop_source_spoofed"),
    Row("peer", "elsewhere", "pod", "decap_delivered"),
    Row("peer", "martian", "pod", "decap_drop_source_martian"),
    Row("peer", "pod", "pod", "decap_drop_source_own"),
    Row("peer", "their_pod", "unleased", "decap_drop_foreign_destination"),
    Row("peer", "their_pod", "own", "decap_drop_loop", port=PORT),
    Row("peer", "their_pod", "pod", "decap_drop_oversize", size=MTU + 1),
    Row("stranger", "their_pod", "pod", "decap_drop_unknown_peer"),
]


class Net:
    """A lab, and sockets that send a row's packet from where it says."""

    def __init__(self, lab: Lab, undo: ExitStack) -> None:
        self.one, self.two = lab.hosts
        self.two.run(["ip", "addr", "add", f"{STRANGER}/24", "dev", "eth0"])
        places: Mapping[str, Pod | Host] = {"pod": self.one.pod(1), "host": self.one}
        self._raw = {
            (name, version): undo.enter_context(socket_in(place, socket.SOCK_RAW, protocol, family))
            for name, place in places.items()
            for version, (family, protocol) in _HDRINCL.items()
        }
        self._udp = {}
        for name, address in (("peer", str(self.two.underlay_address)), ("stranger", STRANGER)):
            sock = undo.enter_context(socket_in(self.two, socket.SOCK_DGRAM))
            sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DONT)
            sock.bind((address, 0))
            self._udp[name] = sock

    def address(self, name: str, version: int) -> str:
        ipv6_gateway = self.one.ipv6_gateway
        assert ipv6_gateway is not None
        own = {4: self.one.subnet.network_address, 6: ipv6_gateway.network.network_address}
        one, two = self.one.pod(1), self.two.pod(1)
        return {
            "pod": {4: str(one.address), 6: str(one.ipv6_address)},
            "their_pod": {4: str(two.address), 6: str(two.ipv6_address)},
            "own": {it: str(address) for it, address in own.items()},
            "unleased": UNLEASED,
            "elsewhere": ELSEWHERE,
            "martian": MARTIAN,
            "group": GROUP,
        }[name][version]

    def request(self, row: Row, version: int) -> TraceRequest:
        inner = self.address(row.source, version), self.address(row.destination, version)
        # A host that leases the source need not be named; any other sender must be.
        outer = "" if row.sender in ("pod", "host") else self._udp[row.sender].getsockname()[0]
        outer = "" if row.sender == "peer" and row.source == "their_pod" else outer
        words = {"size": str(row.size), "ttl": str(row.ttl), "has_df": row.has_df, "outer": outer}
        return TraceRequest.from_words(*inner, "udp", str(row.port), **words)  # type: ignore[arg-type]

    def send(self, row: Row, version: int, *, times: int = 1) -> None:
        source, destination = self.address(row.source, version), self.address(row.destination, version)
        header_len = 20 if version == 4 else 40
        payload = udp_segment(source, destination, bytes(row.size - header_len - 8), ports=(49152, row.port))
        if version == 4:
            packet = ipv4(source, destination, payload, ttl=row.ttl, flags="DF" * row.has_df)
        else:
            packet = ipv6(source, destination, payload, ttl=row.ttl)
        sock, to = self._raw.get((row.sender, version)), (destination, 0)
        if sock is None:
            sock, to = self._udp[row.sender], (str(self.one.underlay_address), PORT)
        for _ in range(times):
            sock.sendto(packet, to)

    def moved(self, row: Row, version: int) -> dict[str, int]:
        """Send the packet of a row that comes into the tunnel; the counters that have moved, but for the sums."""
        sums = "encap_packets" if row.sender in ("pod", "host") else "decap_packets"
        before = read_status(self.one)["counters"]
        self.send(row, version)
        wait_until(f"{row} to be counted", lambda: read_status(self.one)["counters"][sums] > before[sums], 10)
        after = read_status(self.one)["counters"]
        direction = sums.partition("_")[0]
        return {
            it: n - before[it] for it, n in after.items() if it.startswith(direction) and it != sums and n > before[it]
        }


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with ExitStack() as undo:
        lab = undo.enter_context(Lab(f"tr{os.getpid()}", n_hosts=2, net_conf=CONF, ipv6=True))
        # Nothing but the test's packets shall be counted.
        lab.daemon_command.append("--probe=false")
        lab.start()
        wait_for_peers(lab)
        yield Net(lab, undo)
        assert "Traceback" not in lab.host(1).daemon_log()


@pytest.mark.parametrize("version", [4, 6])
def test_packet_ends_in_the_counter_that_trace_names(net: Net, version: int) -> None:
    for row in (*OUT, *IN):
        said = read_trace(net.one, net.request(row, version))
        verdict = said["verdict"]
        assert verdict["counter"] == row.counter, (row, said)
        assert said["direction"] == ("outgoing" if row.sender in ("pod", "host") else "arriving")
        is_delivered = (
            row.counter in ("encap_sent", "decap_delivered") if row.is_delivered is None else row.is_delivered
        )
        assert verdict["delivered"] == is_delivered, (row, said)
        if row.counter is None:
            assert (verdict["where"], verdict["docs"]) == ("kernel", None)
            continue
        failed = [check for check in said["checks"] if check["passed"] is False]
        assert [check["counter"] for check in failed] == [row.counter] * ("_drop_" in row.counter), (row, said)
        # The kernel sends packets of its own into a device now and then, as to all routers.
        for _ in range(TRIES):
            if (moved := net.moved(row, version)) == {row.counter: 1}:
                break
        assert moved == {row.counter: 1}, (row, said)


@pytest.mark.parametrize("version", [4, 6])
def test_packet_that_does_not_come_into_the_tunnel_moves_no_counter(net: Net, version: int) -> None:
    good = OUT[0]
    for row in (it for it in OUT if it.counter is None):
        for _ in range(TRIES):
            before = read_status(net.one)["counters"]
            net.send(row, version)
            net.moved(good, version)
            after = read_status(net.one)["counters"]
            moved = {it: n - before[it] for it, n in after.items() if it.startswith("encap") and n > before[it]}
            if moved == {"encap_packets": 1, "encap_sent": 1}:
                break
        assert moved == {"encap_packets": 1, "encap_sent": 1}, row


def trace(host: Host, *words: str) -> tuple[int, str]:
    """Exit status of the command, and what it has printed."""
    result = host.run([sys.executable, "-m", "udptun", "trace", *words], check=False)
    return result.returncode, result.stdout + result.stderr


def test_a_person_reads_the_way_the_checks_and_the_end(net: Net) -> None:
    pod, theirs = net.address("pod", 4), net.address("their_pod", 4)
    status, text = trace(net.one, pod, theirs, "tcp", "443")
    print(text)
    assert status == 0
    for expected in (
        f"{pod} -> {theirs} tcp 443, 96 bytes, TTL 64\n",
        "  kernel   from cni0: 10.244.0.0/16 dev flannel0",
        f"  peer     {net.two.subnet} of {net.two.underlay_address}:{PORT}, packets up to {MTU} bytes\n",
        f"a host leases the destination: {net.two.subnet} of ",
        f" -> {net.two.underlay_address}:{PORT}, 124 bytes, dev eth0, MTU 1500\n",
        f"than {MTU} bytes: in fragments; with DF dropped (encap_drop_too_big)\n",
        f"delivered: {COUNTERS['encap_sent'].words} (encap_sent)\n",
        "see docs/wire-format.md#encap-tun-to-udp\n",
    ):
        assert expected in text
    status, text = trace(net.one, UNLEASED[4], pod)
    print(text)
    assert status == 1
    for expected in (
        f"any host ({net.two.underlay_address}): decap_drop_source_spoofed\n",
        "anybody else: decap_drop_unknown_peer\n",
        "FAIL its source is the sending host's, where that is asked: no host leases it (decap_drop_source_spoofed)\n",
        f"dropped: {COUNTERS['decap_drop_source_spoofed'].words} (decap_drop_source_spoofed)\n",
    ):
        assert expected in text


def test_programs_get_the_document_and_bad_words_one_line(net: Net) -> None:
    status, text = trace(net.one, net.address("pod", 6), ELSEWHERE[6], "--json")
    document: dict[str, Any] = json.loads(text)
    assert (status, document["schema"], document["verdict"]["delivered"]) == (1, 1, False)
    assert trace(net.one, "10.244.1.2", "fd00::1")[0] == 2
    status, text = trace(net.one, "pod-7", "10.244.1.2")
    assert (status, text) == (2, "udptun: error: SRC 'pod-7' is no IP address\n")


def test_packets_between_this_hosts_pods_are_none_of_the_tunnels(net: Net) -> None:
    pod, gateway = net.address("pod", 4), str(net.one.gateway.ip)
    status, text = trace(net.one, gateway, pod)
    assert status == 1
    assert "nothing: not the tunnel's: it stays on this host" in text


def test_trace_says_who_else_may_send_the_packet_and_what_becomes_of_it(net: Net) -> None:
    request = net.request(Row("peer", "their_pod", "pod", None), 4)
    senders = read_trace(net.one, request)["senders"]
    assert [(it["who"], it["counter"]) for it in senders] == [
        ("the host that leases the source", "decap_delivered"),
        ("anybody else", "decap_drop_unknown_peer"),
    ]


def test_long_packets_of_pods_are_cut_or_refused_by_the_kernel(net: Net) -> None:
    row = Row("pod", "pod", "their_pod", None, size=3000, has_df=True)
    said = read_trace(net.one, net.request(row, 4))
    assert said["verdict"]["words"] == (f"the kernel drops it: it has more than {MTU} bytes and must not be fragmented")
    said = read_trace(net.one, net.request(Row("pod", "pod", "their_pod", None, size=3000), 4))
    assert said["kernel"]["bytes"] == 20 + 1448
    assert said["verdict"]["counter"] == "encap_sent"
    said = read_trace(net.one, net.request(Row("pod", "pod", "their_pod", None, size=3000), 6))
    assert said["verdict"]["delivered"] is False


def test_what_the_kernel_does_with_a_packet_that_has_come_out_of_the_tunnel_counts(net: Net) -> None:
    """Delivered by the datapath is not delivered to the pod: here nothing is forwarded."""
    request = net.request(IN[0], 4)
    net.one.run(["sysctl", "-qw", "net.ipv4.conf.flannel0.forwarding=0"])
    try:
        said = read_trace(net.one, request)
    finally:
        net.one.run(["sysctl", "-qw", "net.ipv4.conf.flannel0.forwarding=1"])
    assert said["verdict"]["counter"] == "decap_delivered"
    assert said["verdict"]["delivered"] is False
    assert "ip_forward" in said["verdict"]["words"]


# ---------------------------------------------------------------------------------------------------------- live


OF_WORKERS = pytest.mark.workers(reason="--live shows what they carry, and nothing of what the kernel does")
NOT_SHOWN = "packets that the kernel carries by the shortcut are not shown; Shortcut off shows all (docs/shortcut.md)\n"


class Watch:
    """`udptun trace --live`, which has begun."""

    def __init__(self, host: Host, *words: str) -> None:
        command = [sys.executable, "-m", "udptun", "trace", *words, "--json"]
        self.process = host.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.begin = self.line()
        assert self.begin["event"] == "begin"

    def line(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def packets(self, n: int) -> list[Any]:
        """The next lines."""
        lines = [self.line() for _ in range(n)]
        assert all(it["event"] == "packet" for it in lines), lines
        return lines

    def end(self) -> tuple[int, list[Any], str]:
        """Exit status, the lines that are left, and what it has said to people."""
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, [json.loads(line) for line in out.splitlines()], err


@contextmanager
def watch(host: Host, *words: str) -> Iterator[Watch]:
    found = Watch(host, *words)
    try:
        yield found
    finally:
        found.process.kill()
        found.process.wait()


def ends_of(line: Any) -> tuple[str, str, str, str | None]:
    return line["direction"], line["source"], line["destination"], line["counter"]


@pytest.mark.parametrize("version", [pytest.param(4, marks=OF_WORKERS), 6])
def test_echoes_of_pods_are_shown_as_they_come(net: Net, version: int, tmp_path: Path) -> None:
    pod, theirs = net.address("pod", version), net.address("their_pod", version)
    path = tmp_path / "echo.pcapng"
    words = (pod, theirs, "icmp", "--live", "4", "--write", str(path))
    with watch(net.one, *words) as asked:
        assert asked.begin["devices"] == ["flannel0"]
        ping(net.one.pod(1), theirs)
        status, lines, said = asked.end()
    *packets, end = lines
    there, back = ("outgoing", pod, theirs, "encap_sent"), ("arriving", theirs, pod, "decap_delivered")
    assert (status, said) == (0, NOT_SHOWN if has_shortcut(net.one) else "")
    # Neighbours of IPv6 ask for each other on the veth, never here.  On a busy machine the second request may leave
    # before the first answer comes.
    assert ends_of(packets[0]) == there
    assert sorted(ends_of(it) for it in packets) == sorted([there, back] * 2)
    assert end == {"event": "end", "reason": "packets", "packets": 4, "lost": 0}
    for it in packets:
        assert (it["outer"], it["outer_port"]) == (str(net.two.underlay_address), PORT)
        assert it["peer"] == str(net.two.subnet if version == 4 else ipv6_gateway(net.two).network)
        assert len(it["packet"]) == 2 * ((20 if version == 4 else 40) + 8), "headers alone"
        assert abs(it["time_ns"] / 1e9 - time.time()) < 60
    fields = ("-T", "fields", "-e", "frame.packet_flags_direction", "-e", "frame.comment")
    read = [line.split("\t") for line in net.one.run(["tshark", "-nr", str(path), *fields]).stdout.splitlines()]
    peer = f"{net.two.underlay_address}:{PORT} ({packets[0]['peer']})"
    shown = {
        "outgoing": ["0x00000002", f"to {peer}: {COUNTERS['encap_sent'].words} (encap_sent)"],
        "arriving": ["0x00000001", f"from {peer}: {COUNTERS['decap_delivered'].words} (decap_delivered)"],
    }
    assert read == [shown[it["direction"]] for it in packets]


@pytest.mark.parametrize("version", [pytest.param(4, marks=OF_WORKERS), 6])
def test_each_row_of_the_table_is_shown_live_with_its_end(net: Net, version: int) -> None:
    """Spoofed, without a route, too long, with a TTL that is used up: as their counters say."""
    rows = [row for row in (*OUT, *IN) if row.counter is not None]
    with watch(net.one, "any", "any", "udp", "--live", str(len(rows))) as asked:
        for row in rows:
            net.send(row, version)
            (it,) = asked.packets(1)
            ends = net.address(row.source, version), net.address(row.destination, version)
            direction = "outgoing" if row.sender in ("pod", "host") else "arriving"
            assert ends_of(it) == (direction, *ends, row.counter), row
            assert (it["port"], it["bytes"]) == (row.port, row.size)
            assert it["dropped"] == int("_drop_" in row.counter)
            if row.counter in ("encap_drop_no_route", "encap_drop_ttl", "decap_drop_ttl"):
                assert it["icmp_sent"] is True
            if direction == "arriving":
                address, port = net._udp["stranger" if row.sender == "stranger" else "peer"].getsockname()
                assert (it["outer"], it["outer_port"]) == (address, port)
        assert asked.end()[0] == 0


def test_only_drops_are_shown_when_asked_for(net: Net) -> None:
    with watch(net.one, "--live", "1", "--drops") as asked:
        for row in (OUT[0], IN[0], IN[4]):
            net.send(row, 4)
        assert asked.packets(1)[0]["counter"] == "decap_drop_source_spoofed"
        assert asked.end()[0] == 0


@OF_WORKERS
def test_super_packets_of_a_flow_are_shown_with_their_segments(net: Net) -> None:
    pod, theirs = net.address("pod", 4), net.address("their_pod", 4)
    with (
        watch(net.one, pod, theirs, "tcp", "--live", "400", "--one-way") as asked,
        tcp_flow(net.one.pod(1), net.two.pod(1), 20e6),
    ):
        status, lines, _ = asked.end()
    packets = [it for it in lines if it["event"] == "packet"]
    assert status == 0
    assert {ends_of(it) for it in packets} == {("outgoing", pod, theirs, "encap_sent")}
    long = [it for it in packets if it["segments"] > 1]
    assert long
    assert all(it["bytes"] > MTU and it["dropped"] == 0 for it in long)


def test_a_client_that_is_killed_ends_the_trace_and_two_do_not_get_one_at_a_time(net: Net) -> None:

    def is_let_in() -> bool:
        said = trace(net.one, "--live", "1", "--seconds", "1")[1]
        return said.removeprefix(NOT_SHOWN).startswith("0 packets")

    with watch(net.one, "--live", "5") as first:
        status, text = trace(net.one, "--live", "5")
        assert status == 1
        assert text.startswith("udptun: error: another live trace runs, for ")
        first.process.send_signal(signal.SIGKILL)
        first.process.wait()
        # The daemon has seen that, and the next one is let in.
        seconds_until(is_let_in, "let in", 10)


@OF_WORKERS
def test_packets_that_come_too_fast_are_counted(net: Net) -> None:
    daemon = net.one.daemon
    assert daemon is not None
    with watch(net.one, "any", "any", "udp", "--live", "100") as asked:
        daemon.send_signal(signal.SIGSTOP)
        try:
            # There is room for 1,024.  The device holds a thousand, however slow the machine.
            for _ in range(15):
                net.send(OUT[0], 4, times=100)
                time.sleep(0.01)
        finally:
            daemon.send_signal(signal.SIGCONT)
        status, lines, said = asked.end()
    *packets, end = lines
    assert status == 0
    assert {ends_of(it) for it in packets} == {
        ("outgoing", net.address("pod", 4), net.address("their_pod", 4), "encap_sent")
    }
    assert len(packets) == 100
    assert end["lost"] > 0
    assert said == f"{end['lost']} more packets came faster than they could be shown\n"


def test_every_key_of_the_document_is_documented(net: Net) -> None:
    page = (Path(__file__).parents[2] / "docs/trace.md").read_text()
    said = [read_trace(net.one, net.request(row, 4)) for row in (OUT[0], IN[0])]
    names = {name for document in said for name in keys(document)}
    assert {name for name in names if f"`{name}`" not in page} == set()


def keys(value: object) -> Iterator[str]:
    """Of an object, and of all that is in it."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys(inner)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_trace_ends_with_the_daemon_and_the_next_daemon_begins_without_one(net: Net, number: signal.Signals) -> None:
    """Last: the daemons here are others afterwards."""
    with watch(net.one, "--live", "5") as asked:
        net.one.stop_daemon(number)
        status, lines, said = asked.end()
    assert (status, lines) == (1, [])
    assert "has ended, and the trace with it" in said
    net.one.start_daemon()
    net.one.wait_ready()
    with watch(net.one, "any", "any", "udp", "--live", "1") as asked:
        net.send(IN[0], 4)
        assert asked.packets(1)[0]["counter"] == "decap_delivered"
        assert asked.end()[0] == 0
