"""The faults of a soak: how each comes and goes, and what may be lost meanwhile.

A fault is a context manager: it has come when its block begins, and has gone when the block is left.  What may be lost
is what the documentation allows, and flows between other hosts may lose nothing at any time:

    after_s None    not one packet (a killed process, restart, upgrade, a store that is away)
    after_s         packets sent between the fault's coming and so many seconds, SLACK times, after it has gone
"""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from bench.soak.ground import (
    FIRST_STRANGER,
    Ground,
    cleanup,
    datapath_pids,
    lease_key,
    other_address,
    pids,
    read_status,
    reconfigure,
    send_signal,
    shell,
    start,
    stop,
    wait_dead,
    wait_full,
)
from bench.soak.schedule import Kind
from bench.soak.store import DEADLINE_S
from udptun.lab.host import UNDERLAY, Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import Lab

SLACK = 5
"""Times a promise before it counts as broken: the machine may be busy."""

Act = Callable[[Ground, Host, random.Random], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Fault:
    """`hold_s`: how long the schedule lets it last.  For the rest see the module."""

    name: str
    act: Act
    after_s: float | None = None
    hold_s: tuple[float, float] = (0.2, 3.0)
    ends_processes: bool = False
    may_double: int = 0
    """Packets: each datapath process that is killed may have sent its last batch already."""
    counters_begin_anew: bool = False
    may_narrow: bool = False
    """The paths of the host are narrow meanwhile, and may be taken for that for a while longer."""
    may_leak: bool = False
    """It takes away what keeps packets from leaving in clear text."""
    modes: str = "ABC"
    """Underlay modes in which it can be made."""

    @property
    def kind(self) -> Kind:
        return Kind(self.name, self.hold_s, self.ends_processes)


BATCH = 128
"""What the datapath reads at most before it sends (UT_READS in shm.h)."""


# --- processes


@contextmanager
def daemon_killed(_ground: Ground, host: Host, _draw: random.Random) -> Iterator[None]:
    send_signal(host, "KILL", pids(host)[0])
    wait_dead(host)
    yield
    start(host)


@contextmanager
def active_killed(_ground: Ground, host: Host, _draw: random.Random) -> Iterator[None]:
    _, active, _ = pids(host)
    send_signal(host, "KILL", active)
    yield
    wait_full(host, active)


@contextmanager
def standby_killed(_ground: Ground, host: Host, _draw: random.Random) -> Iterator[None]:
    send_signal(host, "KILL", *pids(host)[2])
    yield
    wait_full(host)


@contextmanager
def daemon_and_active_killed(_ground: Ground, host: Host, _draw: random.Random) -> Iterator[None]:
    daemon, active, _ = pids(host)
    send_signal(host, "KILL", daemon)
    wait_dead(host)
    send_signal(host, "KILL", active)
    yield
    start(host)


@contextmanager
def all_killed(_ground: Ground, host: Host, _draw: random.Random) -> Iterator[None]:
    send_signal(host, "KILL", pids(host)[0], *datapath_pids(host))
    wait_dead(host)
    wait_until("all to be dead", lambda: not datapath_pids(host), DEADLINE_S)
    yield
    start(host)


@contextmanager
def daemon_stopped(_ground: Ground, host: Host, draw: random.Random) -> Iterator[None]:
    stop(host, draw.choice([signal.SIGTERM, signal.SIGINT]))
    yield
    start(host)


@contextmanager
def taken_over(_ground: Ground, host: Host, _draw: random.Random) -> Iterator[None]:
    """As in an upgrade from container to container: the next daemon begins while the last one runs."""
    old = host.leave_daemon()
    start(host, "--take-over")
    yield
    old.terminate()
    if (ended := old.wait(DEADLINE_S)) != 0:
        raise AssertionError(f"the daemon in reserve ended with status {ended}")


@contextmanager
def daemon_suspended(_ground: Ground, host: Host, _draw: random.Random) -> Iterator[None]:
    daemon = pids(host)[0]
    send_signal(host, "STOP", daemon)
    yield
    send_signal(host, "CONT", daemon)


@contextmanager
def active_suspended(_ground: Ground, host: Host, _draw: random.Random) -> Iterator[None]:
    """The daemon has the standby go on in its place."""
    _, active, _ = pids(host)
    send_signal(host, "STOP", active)
    yield
    wait_full(host, active)


@contextmanager
def cleaned_up(ground: Ground, host: Host, _draw: random.Random) -> Iterator[None]:
    stop(host)
    cleanup(ground, host)
    yield
    start(host)


# --- the network config


@contextmanager
def config_read_again(_ground: Ground, host: Host, _draw: random.Random) -> Iterator[None]:
    assert host.daemon is not None
    host.daemon.send_signal(signal.SIGHUP)
    host.wait_ready(DEADLINE_S)
    yield


CHANGES: list[Mapping[str, object]] = [
    {"SourceCheck": "strict"},
    {"SourceCheck": "off"},
    {"Workers": 2},
    {"Workers": 3},
    {"SourcePorts": 4},
    {"Probe": False},
    {"OffloadDisabled": ["udp_segment", "udp_gro"]},
    {"OffloadDisabled": ["tso", "uso", "write_tcp", "write_udp"]},
]


@contextmanager
def config_rolled_out(ground: Ground, _host: Host, draw: random.Random) -> Iterator[None]:
    """Each host in turn, there and back."""
    reconfigure(ground, draw.choice(CHANGES))
    yield
    reconfigure(ground, {})


@contextmanager
def config_broken(ground: Ground, host: Host, _draw: random.Random) -> Iterator[None]:
    ground.store.configure({"Network": "nonsense"})
    assert host.daemon is not None
    host.daemon.send_signal(signal.SIGHUP)
    yield
    reconfigure(ground, {})


# --- the store


@contextmanager
def store_away(ground: Ground, _host: Host, draw: random.Random) -> Iterator[None]:
    with ground.store.away(draw.choice(ground.store.outages)):
        yield


@contextmanager
def restarted_without_store(ground: Ground, host: Host, draw: random.Random) -> Iterator[None]:
    """It begins with the table of its last run."""
    stop(host)
    with ground.store.away(draw.choice(ground.store.outages_at_start)):
        start(host)
        yield


@contextmanager
def lease_deleted(ground: Ground, host: Host, _draw: random.Random) -> Iterator[None]:
    ground.store.delete([lease_key(host)])
    yield


@contextmanager
def strangers_come_and_go(ground: Ground, _host: Host, _draw: random.Random) -> Iterator[None]:
    kind = {"udp": "", "vtep": "vxlan"}[ground.backend]
    data = {"VNI": 1, "VtepMAC": "02:00:00:00:00:01"} if ground.backend == "vtep" else None
    leases = {
        f"10.244.{FIRST_STRANGER + n}.0-24": json.dumps(
            {"PublicIP": f"10.99.0.{n + 1}", "BackendType": kind, "BackendData": data}
        )
        for n in range(100)
    }
    ground.store.put(leases)
    yield
    ground.store.delete(leases)


@contextmanager
def joined_and_gone(ground: Ground, _host: Host, draw: random.Random) -> Iterator[None]:
    """One more host, which leaves in order or loses power."""
    host = ground.lab.add_host()
    start(host)
    host.add_pod()
    subnet = str(host.subnet)
    for each in ground.hosts:
        wait_until(
            f"{each} to know the new host",
            lambda each=each: any(peer["subnet"] == subnet for peer in read_status(each)["peers"]),  # type: ignore[misc]
            DEADLINE_S,
        )
    yield
    key = lease_key(host)
    if draw.random() < 0.5:
        stop(host)
        cleanup(ground, host, "--release")
        host.down()
    else:
        host.down()
        ground.store.delete([key])


# --- the kernel's state


def sudden(command: Callable[[Ground, random.Random], str]) -> Act:
    """What the daemon has to put right by itself."""

    @contextmanager
    def act(ground: Ground, host: Host, draw: random.Random) -> Iterator[None]:
        shell(host, command(ground, draw))
        yield

    return act


def lasting(come: str, go: str) -> Act:
    """Lines of the shell on the host.  `{device}` is the tunnel's."""

    @contextmanager
    def act(ground: Ground, host: Host, _draw: random.Random) -> Iterator[None]:
        shell(host, come.format(device=ground.device))
        yield
        shell(host, go.format(device=ground.device))

    return act


def link_local(draw: random.Random) -> str:
    return f"169.254.{draw.randint(1, 250)}.{draw.randint(1, 250)}/16"


# --- the underlay


@contextmanager
def moved(ground: Ground, host: Host, draw: random.Random) -> Iterator[None]:
    address = other_address(ground, draw)
    host.move(address)
    wait_until(
        f"the lease of {host} to name {address}",
        lambda: read_status(host)["lease"]["public_ip"] == str(address),
        DEADLINE_S,
    )
    yield


@contextmanager
def mtu_smaller(ground: Ground, host: Host, draw: random.Random) -> Iterator[None]:
    set_mtu(ground.lab, host, draw.randint(1300, 1460))
    yield
    set_mtu(ground.lab, host, ground.lab.underlay_mtu)


def set_mtu(lab: Lab, host: Host, mtu: int) -> None:
    """At both ends of the host's link."""
    lab.switch.at().ip(f"link set {host.name} mtu {mtu}")
    host.machine.at().ip(f"link set eth0 mtu {mtu}")


@contextmanager
def underlay_down(_ground: Ground, host: Host, _draw: random.Random) -> Iterator[None]:
    host.machine.at().ip("link set eth0 down")
    yield
    host.machine.at().ip("link set eth0 up", f"route add default via {UNDERLAY[1]}")


@contextmanager
def cable_pulled(ground: Ground, host: Host, _draw: random.Random) -> Iterator[None]:
    ground.lab.switch.at().ip(f"link set {host.name} down")
    yield
    ground.lab.switch.at().ip(f"link set {host.name} up")


@contextmanager
def path_filter(ground: Ground, host: Host, rule: str) -> Iterator[None]:
    """The switch drops what comes from or goes to the host and fits `rule` of nft.  Nobody is told."""
    table = f"netdev soak_{host.name}"
    ports = ", ".join(each.name for each in ground.hosts)
    lines = [
        f"add table {table}",
        f"add chain {table} in {{ type filter hook ingress devices = {{ {ports} }} priority 0; }}",
        f"add rule {table} in ip saddr {host.underlay_address} {rule} drop",
        f"add rule {table} in ip daddr {host.underlay_address} {rule} drop",
    ]
    ground.lab.switch.run(["nft", "; ".join(lines)])
    try:
        yield
    finally:
        ground.lab.switch.run(["nft", f"delete table {table}"])


def path_black_hole(ground: Ground, host: Host, _draw: random.Random) -> AbstractContextManager[None]:
    return path_filter(ground, host, "meta l4proto udp")


def path_narrow(ground: Ground, host: Host, draw: random.Random) -> AbstractContextManager[None]:
    return path_filter(ground, host, f"ip length > {draw.randint(900, 1450)}")


# --- the table

REPAIR_S = 1.0
"""The kernel's state is put right within it (docs/operations.md, What is kept, and what comes back)."""
MOVE_S = 2.0
"""Socket, lease and peers have followed a change of the address."""
START_S = 0.5
"""From the start of a daemon to the first packet."""
ALIVE_S = 1.0
"""A peer that was found dead is used again: its own probes, or ours, tell of it."""
ARP_S = 1.0
"""A host asks once a second for a neighbour that it does not find."""

DELETE_RULES = "*filter\n-F FORWARD\n-F FLANNEL-FWD\n-X FLANNEL-FWD\nCOMMIT"

FAULTS: dict[str, Fault] = {
    fault.name: fault
    for fault in [
        Fault("daemon killed", daemon_killed, ends_processes=True),
        Fault("active datapath process killed", active_killed, ends_processes=True, may_double=BATCH),
        Fault("standby killed", standby_killed, ends_processes=True),
        Fault("daemon and active killed", daemon_and_active_killed, ends_processes=True, may_double=BATCH),
        Fault("all killed", all_killed, START_S, ends_processes=True, may_double=2 * BATCH, counters_begin_anew=True),
        Fault("daemon stopped", daemon_stopped, ends_processes=True),
        Fault("daemon taken over", taken_over, ends_processes=True),
        Fault("daemon suspended", daemon_suspended),
        Fault("active suspended", active_suspended, START_S, ends_processes=True, may_double=BATCH),
        Fault("cleanup", cleaned_up, START_S, ends_processes=True, counters_begin_anew=True, may_leak=True),
        Fault("config read again", config_read_again),
        Fault("config rolled out", config_rolled_out),
        Fault("config broken", config_broken),
        Fault("store away", store_away, hold_s=(0.5, 8)),
        Fault("restart without store", restarted_without_store, hold_s=(0.5, 4), ends_processes=True),
        Fault("lease deleted", lease_deleted),
        Fault("leases of strangers", strangers_come_and_go),
        Fault("host joins and goes", joined_and_gone),
        Fault("device deleted", sudden(lambda ground, _: f"ip link del {ground.device}"), REPAIR_S),
        Fault("device down", sudden(lambda ground, _: f"ip link set {ground.device} down"), REPAIR_S),
        Fault("device's address flushed", sudden(lambda ground, _: f"ip addr flush dev {ground.device}"), REPAIR_S),
        # It goes on until there is none left, which fails when they are repaired meanwhile.
        Fault("routes deleted", sudden(lambda *_: "ip route flush proto 158 || true"), REPAIR_S, may_leak=True),
        Fault(
            "stranger's address on the device",
            sudden(lambda ground, draw: f"ip address add {link_local(draw)} dev {ground.device}"),
        ),
        Fault("device's MTU changed", sudden(lambda ground, _: f"ip link set {ground.device} mtu 1000")),
        Fault(
            "firewall rules deleted",
            # In one transaction, as they are repaired between two commands.
            sudden(lambda *_: f"printf '%s\\n' '{DELETE_RULES}' | iptables-restore --noflush"),
        ),
        Fault(
            "packets rejected",
            lasting("iptables -I FORWARD -j REJECT", "iptables -D FORWARD -j REJECT"),
            0.2,
        ),
        Fault("ip_forward off", lasting("sysctl -qw net.ipv4.ip_forward=0", "sysctl -qw net.ipv4.ip_forward=1"), 0.2),
        Fault("address changed", moved, MOVE_S),
        Fault("underlay MTU changed", mtu_smaller, may_narrow=True),
        Fault("underlay down", underlay_down, ALIVE_S + ARP_S, hold_s=(0.2, 5)),
        Fault("cable pulled", cable_pulled, ALIVE_S + ARP_S, hold_s=(0.2, 5)),
        Fault("path black hole", path_black_hole, ALIVE_S, hold_s=(0.2, 6)),
        Fault("path narrow", path_narrow, hold_s=(1, 6), may_narrow=True, modes="BC"),
    ]
}


def faults_of(mode: str) -> list[Fault]:
    """Those that can be made on an underlay of this mode (udptun.lab.topology.Offload)."""
    return [fault for fault in FAULTS.values() if mode in fault.modes]
