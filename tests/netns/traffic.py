"""Test flows between pods whose every packet and byte is accounted for, and what else the daemon's tests look at.

The oracles are independent of udptun: sockets in the pods, /proc, nstat and a capture on the underlay's switch.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Interface
from pathlib import Path
from typing import Any, TypeVar

from udptun.commands import status
from udptun.core.errors import UdptunError
from udptun.core.trace_request import TraceRequest
from udptun.lab.host import UNDERLAY, Host, Pod
from udptun.lab.machine import wait_until
from udptun.lab.topology import KUBE_PORT, LEASES, NET_CONF, Lab

T = TypeVar("T")

_END = Path(__file__).with_name("traffic_end.py")
_DEADLINE_S = 30.0

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)

REAL_TIME = ("chrt", "--rr", "1")
"""Goes before the command of a daemon whose packets are counted, and applies to its datapath.

The queues of the tunnel hold a quarter of a second at 2,000 packets/s. On a busy machine an ordinary process may wait
longer than that for a processor, and then packets are lost whatever the datapath does.
"""

AS_CONFIGURED = ("env", "--unset=FLANNELD_SHORTCUT")
"""Goes before the command of a daemon whose shortcut is what the network config says, with --shortcut too."""

CLEANUP = [sys.executable, "-m", "udptun", "cleanup", "--store", f"local:{LEASES}", "--net-config-path", str(NET_CONF)]
"""`udptun cleanup` with the flags of a lab's daemon."""

CLEAR_TEXT = "not arp and not (udp src port 8285 and udp dst port 8285)"
"""Of the frames on the underlay, those that neither the tunnel nor address resolution explains."""


class _End:
    """A process of traffic_end.py.  Killed on leaving when it has not ended."""

    def __init__(self, pod: Pod, role: str, address: object, port: int, rate: float = 0) -> None:
        self._role = role
        self.process = pod.popen(
            [sys.executable, "-I", "-S", str(_END), role, str(address), str(port), str(rate)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> _End:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        with self.process:
            pass

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n", f"{self._role} has ended"

    def finish(self, line: str = "") -> Any:
        """Tell it to end, and return what it saw."""
        out, _ = self.process.communicate(f"{line}\n", timeout=_DEADLINE_S)
        return json.loads(out.splitlines()[-1])

    def wait(self) -> Any:
        """What it saw, when it ends by itself."""
        out, _ = self.process.communicate(timeout=_DEADLINE_S)
        return json.loads(out)


@dataclass(frozen=True, slots=True)
class UdpReport:
    """`arrivals`: (number, CLOCK_MONOTONIC ns) as they came.  `refused`: sends refused, by errno."""

    sent: int
    refused: Mapping[int, int]
    arrivals: list[tuple[int, int]]
    n_spoilt: int

    @property
    def lost(self) -> list[int]:
        return sorted(set(range(self.sent)) - {number for number, _ in self.arrivals})

    @property
    def n_duplicates(self) -> int:
        return len(self.arrivals) - len({number for number, _ in self.arrivals})

    @property
    def n_out_of_order(self) -> int:
        """Of first arrivals; a duplicate comes late by nature."""
        numbers = list(dict.fromkeys(number for number, _ in self.arrivals))
        return sum(later < earlier for earlier, later in itertools.pairwise(numbers))

    @property
    def longest_gap_ms(self) -> float:
        times = [at for _, at in self.arrivals]
        return max((b - a for a, b in itertools.pairwise(times)), default=0) / 1e6

    def longest_gap_ms_within(self, start_ns: int, end_ns: int) -> float:
        """The longest time between two arrivals of which the second one is in that span."""
        pairs = itertools.pairwise(at for _, at in self.arrivals)
        return max((b - a for a, b in pairs if start_ns <= b < end_ns), default=0) / 1e6

    def longest_gap_ends_s(self, since_ns: int) -> float:
        """How long after `since_ns` the packet arrived that ended the longest gap of lost packets; 0: none was lost."""
        gaps = [(b - a, b) for (m, a), (n, b) in itertools.pairwise(self.arrivals) if n > m + 1]
        return (max(gaps)[1] - since_ns) / 1e9 if gaps else 0.0

    def first_after_s(self, start_ns: int) -> float:
        """How long after `start_ns` the next packet arrived."""
        return next(at - start_ns for _, at in self.arrivals if at >= start_ns) / 1e9

    def __str__(self) -> str:
        return (
            f"sent {self.sent}, lost {len(self.lost)}, duplicates {self.n_duplicates}, out of order "
            f"{self.n_out_of_order}, spoilt {self.n_spoilt}, refused {dict(self.refused)}, "
            f"longest gap {self.longest_gap_ms:.1f} ms"
        )


class UdpFlow:
    """A running flow; `report` is there after the block."""

    def __init__(self, receiver: subprocess.Popen[str], *, ipv6: bool) -> None:
        self._receiver = receiver
        self._is_ipv6 = ipv6
        self._report: UdpReport | None = None

    @property
    def report(self) -> UdpReport:
        assert self._report is not None, "the flow has not ended"
        return self._report

    def received(self) -> int:
        """Datagrams that sockets in the receiving pod have read so far, by the kernel's count."""
        proc = Path(f"/proc/{self._receiver.pid}/net")
        if self._is_ipv6:
            return int(dict(line.split() for line in (proc / "snmp6").read_text().splitlines())["Udp6InDatagrams"])
        lines = [line.split() for line in (proc / "snmp").read_text().splitlines()]
        names, values = (line for line in lines if line[0] == "Udp:")
        return int(values[names.index("InDatagrams")])

    def wait_for_more(self, n: int = 200, timeout_s: float = 15) -> None:
        """Until `n` more packets than now have arrived."""
        goal = self.received() + n
        wait_until(f"{n} more packets of the flow", lambda: self.received() >= goal, timeout_s)


@contextlib.contextmanager
def udp_flow(
    source: Pod,
    destination: Pod,
    packets_per_s: float,
    port: int = 5001,
    *,
    ipv6: bool = False,
    from_many_ports: bool = False,
) -> Iterator[UdpFlow]:
    """UDP datagrams with checked content from pod to pod while the block runs, from one port or from 32."""
    role = "udp-send-from-many" if from_many_ports else "udp-send"
    address = _wait_for_path(source, destination, ipv6=ipv6)
    with _End(destination, "udp-receive", address, port) as receiver:
        receiver.wait_ready()
        with _End(source, role, address, port, packets_per_s) as sender:
            flow = UdpFlow(receiver.process, ipv6=ipv6)
            flow.wait_for_more(10)
            yield flow
            sent = sender.finish()
            got = receiver.finish(str(sent["sent"]))
        arrivals = list(zip(got["numbers"], got["times"], strict=True))
        refused = dict(zip(sent["errnos"], sent["refused"], strict=True))
        flow._report = UdpReport(sent["sent"], refused, arrivals, got["n_spoilt"])
        print(f"udp {source} -> {destination}: {flow.report}")


def _wait_for_path(source: Pod, destination: Pod, *, ipv6: bool) -> object:
    """Until addresses are resolved and every new link passes packets, which the kernel sees to in its own time.

    Returns the address of the destination.
    """
    address = destination.ipv6_address if ipv6 else destination.address
    wait_until(f"{destination} to answer {source}", lambda: is_answered(source, address), 15)
    return address


@dataclass(frozen=True, slots=True)
class TcpReport:
    sent: int
    received: int
    n_spoilt: int
    longest_silence_ms: float

    def __str__(self) -> str:
        return (
            f"sent {self.sent} bytes, received {self.received}, spoilt blocks {self.n_spoilt}, "
            f"longest silence {self.longest_silence_ms:.1f} ms"
        )

    def assert_exact(self) -> None:
        assert self.sent == self.received > 0
        assert self.n_spoilt == 0


class TcpFlow:
    """A running connection; `report` is there after the block."""

    def __init__(self) -> None:
        self._report: TcpReport | None = None

    @property
    def report(self) -> TcpReport:
        assert self._report is not None, "the flow has not ended"
        return self._report


@contextlib.contextmanager
def tcp_flow(
    source: Pod, destination: Pod, bytes_per_s: float = 2e6, port: int = 5002, *, ipv6: bool = False
) -> Iterator[TcpFlow]:
    """One TCP connection with checked content from pod to pod while the block runs."""
    address = _wait_for_path(source, destination, ipv6=ipv6)
    flow = TcpFlow()
    with _End(destination, "tcp-receive", address, port) as receiver:
        receiver.wait_ready()
        with _End(source, "tcp-send", address, port, bytes_per_s) as sender:
            sender.wait_ready()
            yield flow
            sent = sender.finish()
            got = receiver.wait()
        flow._report = TcpReport(sent["sent"], got["received"], got["n_spoilt"], got["longest_silence_ns"] / 1e6)
        print(f"tcp {source} -> {destination}: {flow.report}")


def ping(source: Host | Pod, address: object, *options: str, count: int = 2) -> str:
    """`count` echoes, all of which must be answered; ping's output."""
    return source.run(["ping", "-c", str(count), "-i", "0.02", "-W", "5", *options, str(address)]).stdout


def is_answered(source: Host | Pod, address: object, size: int = 56) -> bool:
    """Whether one echo of `size` bytes of data, which nobody may fragment, comes back within a second."""
    command = ["ping", "-c", "1", "-W", "1", "-M", "do", "-s", str(size), str(address)]
    return source.run(command, check=False).returncode == 0


def assert_no_traceback(hosts: Iterable[Host]) -> None:
    """None of the daemons of these hosts has logged one.  pytest shows a long log cut, and so not what matters."""
    for host in hosts:
        if host.machine.is_up:
            _, found, text = host.daemon_log().partition("Traceback")
            assert not found, f"the daemon of {host} has logged:\nTraceback{text[:4000]}"


def tunnel_address(host: Host) -> IPv4Address:
    """The address of the host's flannel0."""
    return host.subnet.network_address


def ipv6_gateway(host: Host) -> IPv6Interface:
    """FLANNEL_IPV6_SUBNET of a host that has one."""
    found = host.ipv6_gateway
    assert found is not None
    return found


def read_status(host: Host) -> Any:
    """What `udptun status --json` prints, without starting an interpreter for it."""
    return json.loads(status.fetch(host.path("/run/udptun")))


def read_trace(host: Host, request: TraceRequest) -> Any:
    """What `udptun trace --json` prints, likewise."""
    return json.loads(status.fetch(host.path("/run/udptun"), f"/trace?{request.query()}"))


def problems(host: Host) -> list[str] | None:
    """The problem lines.  None while the daemon has no status, as it begins again or is not ready."""
    try:
        found: list[str] = read_status(host)["problems"]
    except UdptunError:
        return None
    return found


def lock_database(host: Host, kind: str) -> subprocess.Popen[str]:
    """Somebody who holds a lock of the lease database: `exclusive`, or `immediate`, with which others can read it."""
    script = (
        "import sqlite3, sys, time; db = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "db.execute(f'begin {sys.argv[2]}'); print('locked', flush=True); time.sleep(600)"
    )
    process = host.popen([sys.executable, "-c", script, str(LEASES), kind], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


@contextlib.contextmanager
def locked_database(host: Host, kind: str) -> Iterator[None]:
    """The same while the block runs."""
    with lock_database(host, kind) as process:
        yield
        process.kill()


def wait_for_peers(lab: Lab) -> None:
    """Until the datapath of each host knows all the others: a host is ready before that."""

    def all_know_all() -> bool:
        return all(len(read_status(host)["peers"]) == len(lab.hosts) - 1 for host in lab.hosts)

    wait_until("every host to know every other", all_know_all, 20)


def has_shortcut(host: Host) -> bool:
    """Whether the kernel carries what needs no thought, as all hosts ask for with --shortcut."""
    return bool(read_status(host)["datapath"]["shortcut"] == "on")


def wait_until_counted(*hosts: Host) -> None:
    """Until all that has passed is in the counters: what the kernel carries is added to them each second."""
    if any(map(has_shortcut, hosts)):
        time.sleep(1.2)


def peers(host: Host) -> dict[str, str]:
    """Subnet -> public IP of the peers in the host's table."""
    return {peer["subnet"]: peer["public_ip"] for peer in read_status(host)["peers"]}


def seconds_until(holds: Callable[[], bool], what: str, timeout_s: float) -> float:
    """How long it takes from now until `holds`; the failure of one look counts as not yet."""

    def quietly() -> bool:
        try:
            return holds()
        except Exception:
            return False

    start = time.monotonic()
    wait_until(what, quietly, timeout_s)
    return time.monotonic() - start


def in_network_of(place: Host | Pod, act: Callable[[], T]) -> T:
    """What `act` returns, on a thread in the network namespace of `place`."""
    net_ns = place.machine.at().net_ns if isinstance(place, Host) else place.host.machine.at(place.name).net_ns
    found: list[T] = []

    def run() -> None:
        with net_ns.open() as file:
            if _libc.setns(file.fileno(), _CLONE_NEWNET) == 0:
                found.append(act())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found, f"that failed in {net_ns}"
    return found[0]


@contextlib.contextmanager
def socket_in(
    place: Host | Pod, kind: int, protocol: int = 0, family: int = socket.AF_INET
) -> Iterator[socket.socket]:
    """A socket of ours in the network namespace of `place`: it stays there, whichever thread uses it."""
    with in_network_of(place, lambda: socket.socket(family, kind, protocol)) as made:
        yield made


def listener_at(lab: Lab) -> socket.socket:
    """A listening socket of the switch's: it belongs to the namespace that it was made in."""
    made: list[socket.socket] = []

    def make() -> None:
        with lab.switch.at().net_ns.open() as file:
            assert _libc.setns(file.fileno(), _CLONE_NEWNET) == 0
        made.append(socket.create_server((str(UNDERLAY[1]), KUBE_PORT)))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]


def processes(host: Host) -> dict[int, str]:
    """The living processes of the host: command line by the host's own number.

    -ww: without a terminal ps cuts lines at 80 columns, before the name of the script in a deep directory.
    """
    found = {}
    for line in host.run(["ps", "-wweo", "pid=,stat=,args="]).stdout.splitlines():
        pid, state, command = line.split(None, 2)
        if not state.startswith("Z") and not command.startswith("ps -wweo"):
            found[int(pid)] = command
    return found


def datapath_pids(host: Host) -> set[int]:
    """Every datapath process that the host has, by its own numbers."""
    return {pid for pid, command in processes(host).items() if "datapath/worker.py" in command}


def kill(host: Host, *pids: int) -> None:
    """kill -9 by the numbers that the host itself has for its processes, as `udptun status` shows them."""
    host.run(["kill", "-KILL", *map(str, pids)])


def cpu_s(host: Host, pid: int) -> float:
    """Processor time that the host's process `pid` has used."""
    fields = host.path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def n_fds(host: Host, pid: int) -> int:
    return len(list(host.path(f"/proc/{pid}/fd").iterdir()))


def rss_mib(host: Host, pid: int) -> float:
    """Resident memory that is the process's own: without files and shared memory."""
    for line in host.path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise AssertionError(f"process {pid} of {host.name} has no RssAnon")


_ERRORS = [
    *("IpInHdrErrors", "IpInAddrErrors", "IpInDiscards", "IpReasmFails", "IpExtInTruncatedPkts", "IpExtInCsumErrors"),
    *("IcmpInErrors", "IcmpInCsumErrors", "TcpInErrs", "TcpInCsumErrors", "UdpInErrors", "UdpInCsumErrors"),
]


def packet_errors(*places: Host | Pod) -> dict[str, int]:
    """Every packet that a kernel in one of the places has found faulty so far, as `place counter` -> number."""
    found = {}
    for place in places:
        name = place.name if isinstance(place, Host) else str(place)
        for line in place.run(["nstat", "-asz"]).stdout.splitlines():
            counter, value, *_ = [*line.split(), "", ""]
            if counter in _ERRORS:
                found[f"{name} {counter}"] = int(value)
    assert len(found) >= len(places) * (len(_ERRORS) - 1), f"nstat does not know its counters: {found}"
    return found


@contextlib.contextmanager
def no_packet_errors(*places: Host | Pod) -> Iterator[None]:
    """No kernel in these places finds a faulty packet while the block runs."""
    before = packet_errors(*places)
    yield
    after = packet_errors(*places)
    new = {name: n - before[name] for name, n in after.items() if n != before[name]}
    print(f"checksum and header errors in {len(places)} namespaces: {sum(new.values())}")
    assert new == {}


@contextlib.contextmanager
def nothing_in_clear_text(lab: Lab, path: Path, besides: str = "") -> Iterator[None]:
    """Only the tunnel's datagrams and ARP, and what the expression `besides` fits, cross the underlay in the block.

    An echo to the switch after the block proves that the capture would have seen anything else.
    """

    def seen() -> list[str]:
        return lab.switch.run(["tcpdump", "-n", "-r", str(path)]).stdout.splitlines()

    witness = lab.hosts[0]
    with lab.capture(path, f"{CLEAR_TEXT} and not ({besides})" if besides else CLEAR_TEXT):
        yield
        ping(witness, UNDERLAY[1], count=1)
        wait_until("the capture to show the witness", lambda: any("ICMP echo" in line for line in seen()), 10)
    explained = (
        f"IP {witness.underlay_address} > {UNDERLAY[1]}: ICMP echo",
        f"IP {UNDERLAY[1]} > {witness.underlay_address}: ICMP echo",
        # What the kernel answers for a datapath that is dead: to the host that sent the datagram.
        "udp port 8285 unreachable",
    )
    leaked = [line for line in seen() if not any(text in line for text in explained)]
    print("\n".join([f"frames on the underlay in clear text: {len(leaked)}", *leaked[:10]]))
    assert leaked == []


@contextlib.contextmanager
def tcp_stream(lab: Lab, *limit: str) -> Iterator[None]:
    """Of iperf3 from h2's pod to h1's, while the block runs; `limit` are its options."""
    one, two = (host.pod(1) for host in lab.hosts)
    with one.popen(["iperf3", "-s", "-1", "--forceflush"], stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            next(line for line in server.stdout if "listening" in line)
            command = ["iperf3", "-c", str(one.address), "-t", "3600", *limit]
            with two.popen(command, stdout=subprocess.DEVNULL) as client:
                try:
                    time.sleep(1)
                    yield
                finally:
                    client.kill()
        finally:
            server.kill()


def make_private(host: Host, *directories: str) -> None:
    """Give the host these directories for itself, with all that is in them; the lab's machines share the real ones.

    What is in them stays where it was for others, such as an interpreter in /usr/local/bin.
    """
    for directory in directories:
        there, here = f"/run/real{directory}", f"/run/own{directory}"
        host.run(["sh", "-c", f"mkdir -p {there} {here} && mount --bind {directory} {there}"])
        host.run(["sh", "-c", f"find {there} -mindepth 1 -maxdepth 1 -exec ln -s '{{}}' {here} ';'"])
        host.run(["mount", "--bind", here, directory])
