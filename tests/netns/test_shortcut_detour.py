"""Super-packets between hosts of one machine: the kernel takes them by a detour, or leaves them to the workers."""

from __future__ import annotations

import json
import re
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from select import select

import pytest
from shortcut_labs import ATTACHED_BY, reload, started_lab
from traffic import (
    CLEANUP,
    in_network_of,
    read_status,
    socket_in,
    tcp_flow,
    udp_flow,
)

from tests.packets import udp
from udptun.datapath.shortcut.detour import DETOUR_PORT
from udptun.datapath.shortcut.programs import find_lack
from udptun.kernel.detour_device import detour_name
from udptun.lab.host import Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import Lab, Offload

pytestmark = [pytest.mark.netns, pytest.mark.skipif(bool(find_lack()), reason=find_lack())]

LIMIT_S = 20
FAST = 20e6
"""Bytes a second, which a sender hands over in super-packets."""
NAME = detour_name("flannel0")


@pytest.fixture(scope="module", params=ATTACHED_BY)
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with started_lab("d", request.param, Offload.FULL) as lab:
        yield lab


def is_on(host: Host) -> bool:
    return bool(read_status(host)["datapath"]["shortcut"] == "on")


def detour(host: Host) -> dict[str, object]:
    found: dict[str, object] = read_status(host)["datapath"]["shortcut_detour"]
    return found


def state(host: Host) -> str:
    return str(detour(host)["state"])


def n_taken(host: Host) -> int:
    n = detour(host)["packets"]
    assert isinstance(n, int)
    return n


def has_device(host: Host) -> bool:
    return NAME in host.run(["ip", "-o", "link"]).stdout


def switch_off(host: Host) -> None:
    reload(host, "off")
    wait_until("it to be off", lambda: not is_on(host), LIMIT_S)
    wait_until("its devices to go", lambda: "flannel0-" not in host.run(["ip", "-o", "link"]).stdout, LIMIT_S)


def switch_on(host: Host) -> None:
    reload(host, "auto")
    wait_until("the shortcut", lambda: is_on(host), LIMIT_S)


def transfer_until(lab: Lab, what: str, holds: Callable[[], bool], *, port: int = 5010) -> None:
    """Send super-packets to the second host until then; each byte arrives."""
    one, two = lab.hosts
    with tcp_flow(one.pods[0], two.pods[0], FAST, port) as flow:
        wait_until(what, holds, LIMIT_S)
    flow.report.assert_exact()


def bring_on(lab: Lab) -> None:
    """Have the second host's detour on, with packets that take it."""
    two = lab.hosts[1]
    before = n_taken(two)
    transfer_until(lab, "the detour", lambda: state(two) == "on" and n_taken(two) > before + 50)


def test_super_packets_take_the_kernel_both_ways_and_every_one_is_counted(lab: Lab) -> None:
    """They went to the workers.  No device is made, and no port opened, before the first one comes."""
    one, two = lab.hosts
    assert all(state(it) == "off: no peer has sent a super-packet yet" for it in lab.hosts)
    assert not any(map(has_device, lab.hosts))
    with (
        tcp_flow(one.pods[0], two.pods[0], FAST) as there,
        tcp_flow(two.pods[0], one.pods[0], FAST, 5003) as back,
        udp_flow(one.pods[0], two.pods[0], 500) as singles,
    ):
        wait_until("detours", lambda: all(state(it) == "on" and n_taken(it) > 200 for it in lab.hosts), LIMIT_S)
        passed = [read_status(it)["datapath"]["shortcut_passed"]["decap_super"] for it in lab.hosts]
        time.sleep(1.5)
    there.report.assert_exact()
    back.report.assert_exact()
    assert not singles.report.lost
    assert not singles.report.n_spoilt
    time.sleep(1.2)
    for host, before in zip(lab.hosts, passed, strict=True):
        document = read_status(host)
        counters = document["counters"]
        drops = sum(n for name, n in counters.items() if name.startswith("decap_drop_"))
        assert counters["decap_packets"] == counters["decap_delivered"] + counters["decap_punted"] + drops
        found = document["datapath"]["shortcut_detour"]
        assert found.keys() == {"state", "packets", "lost", "refused"}
        assert (found["lost"], found["refused"]) == (0, 0)
        assert found["packets"] > 5 * (document["datapath"]["shortcut_passed"]["decap_super"] - before)


def vxlan(host: Host) -> tuple[int, str]:
    """VNI and MAC address of the host's detour, as anybody on it may read them."""
    said = host.run(["ip", "-d", "-o", "link", "show", NAME]).stdout
    vni, mac = re.search(r"vxlan id (\d+)", said), re.search(r"link/ether (\S+)", said)
    assert vni
    assert mac
    return int(vni[1]), mac[1]


def forged(host: Host, inner: bytes) -> list[bytes]:
    """VXLAN packets with this inside, to the device and to all, of one who knows its VNI and MAC address."""
    vni, mac = vxlan(host)
    head = struct.pack(">II", 0x08000000, vni << 8)
    frames = [bytes.fromhex(it.replace(":", "")) + bytes.fromhex("020000000001") for it in (mac, "ff:ff:ff:ff:ff:ff")]
    return [head + frame + b"\x08\x00" + inner for frame in frames]


def test_strangers_get_nothing_in_by_the_port_of_the_detour(lab: Lab) -> None:
    """Not from a peer's host, from this host itself or from a pod, nor while no daemon is there."""
    one, two = lab.hosts
    bring_on(lab)
    pod, own = two.pods[0], two.underlay_address
    with socket_in(pod, socket.SOCK_DGRAM) as of_pod, socket_in(two, socket.SOCK_DGRAM) as of_host:
        for it in (of_pod, of_host):
            it.bind(("0.0.0.0", 53))
            it.setblocking(False)

        def attack() -> int:
            """From all places; how many datagrams that were."""
            inner = [udp("10.244.77.7", str(to), b"let me in") for to in (pod.address, own)]
            datagrams = [it for packet in inner for it in forged(two, packet)]

            def send() -> None:
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                    for datagram in datagrams:
                        sock.sendto(datagram, (str(own), DETOUR_PORT))

            places = (one, two, pod)
            for place in places:
                in_network_of(place, send)
            return len(places) * len(datagrams)

        def has_come() -> bool:
            return bool(select([of_pod, of_host], [], [], 0.3)[0])

        before = detour(two)["refused"]
        n = attack()
        wait_until("all to be refused", lambda: detour(two)["refused"] == before + n, LIMIT_S)  # type: ignore[operator]
        assert not has_come()
        two.stop_daemon(signal.SIGKILL)
        attack()
        assert not has_come()
    two.start_daemon()
    two.wait_ready()
    wait_until("it to be on again", lambda: is_on(two), LIMIT_S)


def test_it_sends_nothing_and_learns_nothing(lab: Lab) -> None:
    two = lab.hosts[1]
    bring_on(lab)
    assert "NOARP" in two.run(["ip", "-o", "link", "show", NAME]).stdout
    assert not two.run(["ip", "-o", "address", "show", "dev", NAME]).stdout
    assert not two.run(["bridge", "fdb", "show", "dev", NAME]).stdout
    document = json.loads(two.run(["ip", "-j", "-s", "link", "show", NAME]).stdout)
    assert document[0]["stats64"]["tx"]["packets"] == 0


def test_killing_and_switching_lose_nothing(lab: Lab) -> None:
    """With super-packets under way, of which the receiver's daemon, and then its shortcut, goes and comes back."""
    one, two = lab.hosts
    bring_on(lab)
    with (
        udp_flow(one.pods[0], two.pods[0], 500) as singles,
        tcp_flow(one.pods[0], two.pods[0], FAST) as supers,
    ):
        two.stop_daemon(signal.SIGKILL)
        singles.wait_for_more(100)
        two.start_daemon()
        two.wait_ready()
        wait_until("the detour again", lambda: is_on(two) and state(two) == "on", LIMIT_S)
        singles.wait_for_more(100)
        switch_off(two)
        singles.wait_for_more(100)
        reload(two, "auto")
        wait_until("the detour once more", lambda: is_on(two) and state(two) == "on", LIMIT_S)
        singles.wait_for_more(100)
    assert not singles.report.lost
    supers.report.assert_exact()


@pytest.mark.parametrize("change", ["down", "mtu 1000"])
def test_a_device_that_somebody_changes_is_made_anew(lab: Lab, change: str) -> None:
    """One that was down lost half a second of packets, and a firewall was blamed for it."""
    two = lab.hosts[1]
    bring_on(lab)
    before = index_of(two)
    two.run(["ip", "link", "set", NAME, *change.split()])
    wait_until("the device to go", lambda: not has_device(two) or index_of(two) != before, LIMIT_S)
    bring_on(lab)
    assert "mtu 1472" in two.run(["ip", "-o", "link", "show", NAME]).stdout
    assert not [line for line in read_status(two)["problems"] if "super-packets" in line]


def index_of(host: Host) -> str:
    return host.run(["cat", f"/sys/class/net/{NAME}/ifindex"], check=False).stdout


def test_a_rule_that_drops_its_port_is_seen_and_said(lab: Lab) -> None:
    two = lab.hosts[1]
    bring_on(lab)
    rule = f"table ip t {{ chain i {{ type filter hook input priority 0; udp dport {DETOUR_PORT} drop; }}; }}"
    with ExitStack() as undo:
        switch_off(two)
        two.run(["nft", "-f", "-"], input=rule)
        undo.callback(two.run, ["nft", "delete", "table", "ip", "t"])
        switch_on(two)
        transfer_until(lab, "the reason", lambda: f"of peers to UDP port {DETOUR_PORT} here" in state(two))
        assert n_taken(two) == 0
        assert not [line for line in read_status(two)["problems"] if "super-packets" in line]


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(f"udp dport {DETOUR_PORT} drop", id="all"),
        pytest.param(f"udp dport {DETOUR_PORT} numgen random mod 3 0 drop", id="a third", marks=pytest.mark.full),
    ],
)
def test_what_does_not_come_out_of_it_switches_it_off(lab: Lab, rule: str) -> None:
    """A rule of a minute ago: connections hung until somebody looked at the rules again."""
    two = lab.hosts[1]
    switch_off(two)
    switch_on(two)
    bring_on(lab)
    with ExitStack() as undo:
        two.run(["nft", "-f", "-"], input=f"table ip t {{ chain i {{ type filter hook input priority 0; {rule}; }}; }}")
        undo.callback(two.run, ["nft", "delete", "table", "ip", "t"])
        transfer_until(lab, "it to be off", lambda: "does not come out of it" in state(two))
        (line,) = [it for it in read_status(two)["problems"] if "super-packets" in it]
        assert f"UDP port {DETOUR_PORT}" in line
    wait_until("its device to go", lambda: not has_device(two), LIMIT_S)


def test_a_device_of_somebody_else_with_its_name_stays_and_the_workers_carry(lab: Lab) -> None:
    """So it is where the kernel has no VXLAN."""
    two = lab.hosts[1]
    switch_off(two)
    with ExitStack() as undo:
        two.run(["ip", "link", "add", NAME, "type", "bridge"])
        undo.callback(two.run, ["ip", "link", "delete", NAME])
        switch_on(two)
        transfer_until(lab, "the reason", lambda: state(two).startswith(f"off: cannot make {NAME}: the name is taken"))
        assert "bridge" in two.run(["ip", "-d", "link", "show", NAME]).stdout


def test_cleanup_takes_it_out(lab: Lab) -> None:
    two = lab.hosts[1]
    switch_off(two)
    switch_on(two)
    bring_on(lab)
    two.stop_daemon(signal.SIGKILL)
    assert has_device(two)
    two.run(CLEANUP)
    assert not has_device(two)
