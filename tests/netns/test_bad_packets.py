"""Every kind of bad packet of tests/datapath over a real underlay, to a daemon that is configured like any.

    [senders: each address that the cases have for a peer or a stranger]  eth0 -- underlay -- eth0  [h1: the daemon]

Leases make peers of the senders.  tests/datapath/test_refusals.py has more modes, and the fast path alone.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from traffic import read_status, socket_in

from tests.datapath import ipv6_cases
from tests.datapath.cases import DECAP, DECAP_VXLAN, ELSEWHERE, Bad
from tests.packets import (
    LEARNED,
    LOCALS,
    LOCALS6,
    NARROW,
    NEAR,
    OUR_MAC,
    STRANGER,
    TWIN,
    UNDERLAY,
    VNI,
    WIDE,
    peer_mac,
    vxlan,
)
from udptun.lab import host as lab_host
from udptun.lab.host import Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import LEASES, NET_CONF, Lab

pytestmark = [pytest.mark.netns, pytest.mark.full, pytest.mark.timeout(600)]

OWN_SUBNET, OWN_IPV6_SUBNET = "10.244.1.0/24", "fd00:244:0:1::/64"
SOURCES = {NEAR: 52, NARROW: 53, TWIN: 54, WIDE: 55, STRANGER: 99, "127.0.0.1": 97}
"""Of cases.py, and which address of the underlay stands for each."""
FLOODER = lab_host.UNDERLAY[98]
SUBNETS = {
    ("10.244.2.0/24", "fd00:244:0:2::/64"): SOURCES[NEAR],
    ("10.244.3.0/24", "fd00:244:0:3::/64"): SOURCES[NARROW],
    ("10.244.4.0/24", "fd00:244:0:4::/64"): SOURCES[TWIN],
    ("10.244.5.64/26", "fd00:244:0:5:8000::/65"): 56,
    ("10.244.16.0/20", "fd00:244:0:10::/60"): SOURCES[WIDE],
}
FLOOD_PER_S = 5000

CLAIM = """
import asyncio, ipaddress, json, pathlib, sys
from udptun.core.lease import LeaseAttrs, Subnets
from udptun.stores.base import SubnetChoice
from udptun.stores.local.store import LocalStore

async def claim():
    store = LocalStore(pathlib.Path(sys.argv[1]), pathlib.Path("/net-conf.json"))
    for both, attributes in json.loads(sys.argv[2]):
        subnets = Subnets(*map(ipaddress.ip_network, both))
        await store.claim(LeaseAttrs.from_json(attributes), lambda leases: SubnetChoice(subnets))
    await store.aclose()

asyncio.run(claim())
"""
READ = """
import sqlite3, sys
print(*sqlite3.connect(sys.argv[1]).execute("select value from leases where key = ?", sys.argv[2:]).fetchone())
"""


class Mode(NamedTuple):
    carried: str
    """"udp" (IPv4 alone), "dual" (both families in udp), "vxlan"."""
    n_workers: int
    flood: str
    """Who gets it: "nobody", "workers", "kernel"."""

    def __str__(self) -> str:
        return f"{self.carried}-workers_{self.n_workers}-flood_{self.flood}"

    def net_conf(self, source_check: str) -> dict[str, object]:
        kind = {"Type": "vxlan", "Userspace": True} if self.carried == "vxlan" else {"Type": "udp"}
        off = [] if self.flood == "kernel" else ["stranger_filter"]
        ours = {"Workers": self.n_workers, "SourceCheck": source_check, "OffloadDisabled": off}
        ipv6 = {"EnableIPv6": True, "IPv6Network": "fd00:244::/48"} if self.carried == "dual" else {}
        return {"Network": "10.244.0.0/16", "Backend": kind | ours, **ipv6}


MODES = [Mode(*it) for it in itertools.product(("udp", "dual", "vxlan"), (1, 2), ("nobody", "workers", "kernel"))]


class Target:
    """The daemon of h1, and sockets that send to it from the addresses of its peers and of strangers."""

    def __init__(self, undo: ExitStack, mode: Mode) -> None:
        self._mode = mode
        self._is_vxlan, is_dual = mode.carried == "vxlan", mode.carried == "dual"
        self._elsewhere = ipv6_cases.ELSEWHERE if is_dual else ELSEWHERE
        self._type = "vxlan" if self._is_vxlan else "udp"
        self._port, self._device = (8472, "flannel.1") if self._is_vxlan else (8285, "flannel0")
        lab = undo.enter_context(Lab(f"bp{os.getpid()}", n_hosts=2, net_conf=mode.net_conf("peer"), ipv6=is_dual))
        self._one, self._senders = lab.hosts
        addresses = [lab_host.UNDERLAY[it] for it in {*SOURCES.values(), *SUBNETS.values()}]
        self._senders.machine.at().ip(*(f"address add {it}/32 dev eth0" for it in (*addresses, FLOODER)))
        self._one.machine.at().ip(*(f"address add {it}/32 dev lo" for it in (UNDERLAY, *LOCALS)))
        self._one.machine.at().ip(*(f"address add {it}/128 dev lo" for it in LOCALS6 * is_dual))
        self._sockets = {it: undo.enter_context(socket_in(self._senders, socket.SOCK_DGRAM)) for it in SOURCES}
        self._n_received = 0
        for it, sock in self._sockets.items():
            sock.setblocking(False)
            # Answers to peers go to the port of the tunnel.
            sock.bind((str(lab_host.UNDERLAY[SOURCES[it]]), self._port))
        peers = ((both, str(lab_host.UNDERLAY[number])) for both, number in SUBNETS.items())
        leases = [((OWN_SUBNET, OWN_IPV6_SUBNET), str(self._one.underlay_address)), *peers]
        claims = [
            (both if is_dual else both[:1], self._attributes(public_ip, peer_mac(i)))
            for i, (both, public_ip) in enumerate(leases)
        ]
        self._one.run([sys.executable, "-c", CLAIM, str(LEASES), json.dumps(claims)])
        self._one.start_daemon(["--probe=false", "--iface=eth0"])
        self._one.wait_ready(20)
        assert str(self._one.subnet) == OWN_SUBNET
        wait_until("the peers", lambda: len(read_status(self._one)["peers"]) == len(SUBNETS), 10)
        if is_dual:
            wait_until("those of IPv6", lambda: len(read_status(self._one)["ipv6"]["peers"]) == len(SUBNETS), 10)
        self._mac = _mac_of(self._one) if self._is_vxlan else OUR_MAC

    def _attributes(self, public_ip: str, mac: bytes) -> str:
        """A lease's, as flannel writes it; with both families as udptun does, because flannel's udp takes no IPv6."""
        data = {"BackendData": {"VNI": VNI, "VtepMAC": mac.hex(":")}} if self._is_vxlan else {}
        if self._mode.carried == "dual":
            data = {"BackendData": {"Udptun": 1, "IPv6": True}}
        return json.dumps({"PublicIP": public_ip, "PublicIPv6": None, "BackendType": self._type, **data})

    def use(self, source_check: str) -> None:
        assert self._one.daemon is not None
        self._one.path(NET_CONF).write_text(json.dumps(self._mode.net_conf(source_check)))
        self._one.daemon.send_signal(signal.SIGHUP)
        self._one.wait_ready(20)
        self._check = source_check
        assert read_status(self._one)["backend"]["source_check"] == source_check

    @contextmanager
    def flooded(self, program: Path) -> Iterator[None]:
        """Zeros from a stranger to the port while the block runs."""
        if self._mode.flood == "nobody":
            yield
            return
        arguments = (FLOODER, self._one.underlay_address, self._port, FLOOD_PER_S)
        with self._senders.popen([str(program), *map(str, arguments)]) as running:
            try:
                is_on = self._mode.flood == "kernel" and self._check != "off"
                wait_until("the filter", lambda: self._filter() == ("on" if is_on else "off"), 15)
                yield
            finally:
                running.send_signal(signal.SIGKILL)

    def refuse(self, case: Bad, *, is_wire: bool) -> None:
        """Send the case's datagram, and fail unless it ends as it has to, and nothing comes out anywhere."""
        counter = case.counter if is_wire else self._elsewhere.get((case.slug, self._check), case.counter)
        is_stranger = case.source in (STRANGER, "127.0.0.1")
        of_flood = {"drop_stranger", "decap_packets", "decap_drop_vxlan_flags", "decap_drop_version"}
        not_looked_at = of_flood if self._mode.flood != "nobody" else set()
        is_counted_with_the_flood = counter in not_looked_at or (is_stranger and self._mode.flood == "kernel")
        # What this SourceCheck lets in is left out, too: the host may answer it.  And a daemon that does not probe has
        # learned nothing.
        if is_counted_with_the_flood or counter == "decap_delivered" or case.source == LEARNED:
            return
        expected = Counter({"decap_packets": 1, counter: 1})
        if counter == case.counter and (case.answer or case.is_suppressed):
            expected["icmp_sent" if case.answer else "icmp_suppressed"] = 1
        n_answers = expected["icmp_sent"]
        for name in not_looked_at:
            del expected[name]
        before, n_written, n_received = self._counters(not_looked_at), self._n_written(), self._count_received()
        payload = self._with_our_mac(case.packet if is_wire else vxlan(case.packet)) if self._is_vxlan else case.packet
        self._sockets[case.source].sendto(payload, (str(self._one.underlay_address), self._port))
        wait_until(f"{dict(expected)}", lambda: self._counters(not_looked_at) - before == expected, 10)
        wait_until("the answer", lambda: self._count_received() >= n_received + n_answers, 10)
        assert (self._n_written(), self._n_received) == (n_written, n_received + n_answers)

    def _with_our_mac(self, payload: bytes) -> bytes:
        """The payload, with what differs from our MAC address by as many bits as it does from OUR_MAC."""
        mac = payload[8:14]
        if len(mac) < 6 or mac[0] & 1 or mac in (bytes(6), peer_mac(1)):
            return payload
        return payload[:8] + bytes(a ^ b ^ c for a, b, c in zip(mac, OUR_MAC, self._mac, strict=True)) + payload[14:]

    def _counters(self, without: set[str]) -> Counter[str]:
        found: dict[str, int] = read_status(self._one)["counters"]
        return Counter({name: n for name, n in found.items() if name not in without})

    def _filter(self) -> str:
        return str(read_status(self._one)["datapath"]["stranger_filter"])

    def _n_written(self) -> int:
        """Packets that the device has got from the datapath."""
        return int(self._one.path(f"/sys/class/net/{self._device}/statistics/rx_packets").read_text())

    def _count_received(self) -> int:
        """How many datagrams have come back to any of the senders since the beginning."""
        for sock in self._sockets.values():
            with suppress(BlockingIOError):
                while sock.recv(1 << 16):
                    self._n_received += 1
        return self._n_received


def _mac_of(host: Host) -> bytes:
    """The VtepMAC in the host's lease."""
    lease = json.loads(host.run([sys.executable, "-c", READ, str(LEASES), OWN_SUBNET.replace("/", "-")]).stdout)
    return bytes.fromhex(lease["BackendData"]["VtepMAC"].replace(":", ""))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_every_kind_of_bad_packet_is_refused_by_a_daemon(mode: Mode, tmp_path: Path) -> None:
    """Beside a flood what has the flood's own counter is left out, and of strangers what the kernel may keep."""
    program = tmp_path / "flood"
    subprocess.run(["gcc", "-O2", "-o", program, Path(__file__).with_name("flood.c")], check=True)
    with ExitStack() as undo:
        target = Target(undo, mode)
        for source_check in ("strict", "peer", "off"):
            target.use(source_check)
            with target.flooded(program):
                inner = ipv6_cases.DECAP if mode.carried == "dual" else DECAP
                for is_wire, cases in ((False, inner), (True, DECAP_VXLAN if mode.carried == "vxlan" else [])):
                    for case in cases:
                        try:
                            target.refuse(case, is_wire=is_wire)
                        except BaseException as exc:
                            exc.add_note(f"{case.slug} with SourceCheck {source_check}")
                            raise
