"""The reconciler against the kernel: whatever is taken away comes back, whatever is left over goes."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest
from namespace import Namespace, linked_namespace, open_fds, requires_netns, seconds_until

from udptun.backends.base import BackendInput, LiveSettings
from udptun.backends.udp import TUN_NAME, Udp
from udptun.backends.vxlan import KernelVxlan, VxlanKeys
from udptun.core.desired import DesiredRoute, DesiredState
from udptun.core.errors import KernelError
from udptun.core.lease import Lease, LeaseAttrs, Subnets
from udptun.core.network_state import ROUTE_PROTOCOL
from udptun.core.offload import ALL
from udptun.core.ownership import Ownership
from udptun.core.tunnel import SourceCheck
from udptun.kernel import netlink, notices
from udptun.kernel.detour_device import delete_detour
from udptun.kernel.reconcile import reconciler
from udptun.kernel.reconcile.change import Change
from udptun.kernel.reconcile.ownership import remove_ours
from udptun.kernel.reconcile.plan import plan
from udptun.kernel.reconcile.reconciler import Outcome, Reconciler
from udptun.kernel.tun import VNET_HDR_LEN, Tun, open_queues
from udptun.kernel.underlay import Underlay
from udptun.kernel.veth import delete_pair

pytestmark = [pytest.mark.netns, requires_netns]

NETWORK = IPv4Network("10.244.0.0/16")
SUBNET = IPv4Network("10.244.3.0/24")


def udp(network: IPv4Network, subnet: IPv4Network, mtu: int) -> DesiredState:
    underlay = Underlay("v0", 1, 1500, IPv4Address("192.0.2.1"), IPv4Address("192.0.2.1"))
    live = LiveSettings(mtu, 1, SourceCheck.PEER, ALL)
    return Udp(8285).desired(BackendInput(network, (network,), underlay, subnet, live))


WANTED = udp(NETWORK, SUBNET, 1472)
OURS = Ownership((NETWORK,))
REPAIR_LIMIT_S = 5.0
IP_RECVERR = 11
ACCEPT_LOCAL = Path(f"/proc/sys/net/ipv4/conf/{TUN_NAME}/accept_local")


@pytest.fixture
def ns() -> Iterator[Namespace]:
    """v0 (192.0.2.1/24, default route through it) -- v1."""
    with linked_namespace() as ns:
        ns.ip("route add default via 192.0.2.254")
        yield ns


@pytest.fixture
def tun(ns: Namespace) -> Iterator[Tun]:
    tun = ns.call(lambda: open_queues(TUN_NAME, 1))
    yield tun
    tun.close()


def shape(ns: Namespace, network: IPv4Network = NETWORK) -> dict[str, Any]:
    """All that the reconciler looks after, as `ip` and /proc show it."""
    links = ns.show(f"link show {TUN_NAME}")
    addresses = ns.show(f"address show dev {TUN_NAME}")
    routes = ns.show(f"-4 route show root {network}")

    def accept_local() -> str:
        return ACCEPT_LOCAL.read_text().strip()

    return {
        "link": [(link["mtu"], "UP" in link["flags"]) for link in links],
        "queue": [link["txqlen"] >= 500 for link in links],
        "alias": [link.get("ifalias") for link in links],
        "addresses": [(a["family"], a["local"], a["prefixlen"]) for e in addresses for a in e["addr_info"]],
        "routes": [
            (r["type"], r["dst"], r.get("dev"), r.get("metric", 0), r["protocol"], r.get("scope")) for r in routes
        ],
        "accept_local": ns.call(accept_local) if links else "",
    }


def wanted_shape(subnet: IPv4Network = SUBNET, mtu: int = 1472, network: IPv4Network = NETWORK) -> dict[str, Any]:
    proto = str(ROUTE_PROTOCOL)
    return {
        "link": [(mtu, True)],
        "queue": [True],
        "alias": [f"udptun {network}"],
        "addresses": [("inet", str(subnet.network_address), 32)],
        "routes": [
            ("unicast", str(network), TUN_NAME, 0, proto, "global"),
            ("unreachable", str(network), None, 0xFFFFFFFF, proto, "global"),
        ],
        "accept_local": "1",
    }


def converge(ns: Namespace, tun: Tun, desired: DesiredState = WANTED, ownership: Ownership = OURS) -> Outcome:
    async def once() -> Outcome:
        return await Reconciler(desired, tun, ownership).converge()

    return ns.call_async(once)


class Running:
    """A reconciler that runs in the namespace, in a thread of its own."""

    def __init__(self, ns: Namespace, tun: Tun, stack: ExitStack) -> None:
        self.ns = ns
        started = threading.Event()

        async def main() -> None:
            self.reconciler = Reconciler(WANTED, tun, OURS)
            started.set()
            await self.reconciler.run()

        self.loop = stack.enter_context(ns.background(main))
        assert started.wait(10)
        self.wait_until_wanted()

    def wait_until_wanted(self, **wanted: Any) -> float:
        goal = wanted_shape(**wanted)
        return seconds_until(lambda: shape(self.ns, wanted.get("network", NETWORK)) == goal, 10)

    def on_loop(self, function: Callable[[], None]) -> None:
        self.loop.call_soon_threadsafe(function)


@pytest.fixture
def running(ns: Namespace, tun: Tun) -> Iterator[Running]:
    with ExitStack() as stack:
        yield Running(ns, tun, stack)


def test_everything_is_set_up_from_nothing(ns: Namespace, tun: Tun) -> None:
    outcome = converge(ns, tun)
    assert outcome.problems == ()
    assert shape(ns) == wanted_shape()


def test_nothing_is_changed_when_all_is_as_wanted(ns: Namespace, tun: Tun) -> None:
    converge(ns, tun)
    assert converge(ns, tun) == Outcome()


def test_a_packet_to_the_network_goes_to_the_tunnel_and_its_source_is_the_tunnel_address(
    ns: Namespace, tun: Tun
) -> None:
    converge(ns, tun)
    (way,) = ns.show("route get 10.244.9.9")
    assert (way["dev"], way["prefsrc"]) == (TUN_NAME, "10.244.3.0")


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


@pytest.mark.parametrize("source", ["10.244.3.0", "192.0.2.1"])
def test_an_icmp_error_from_the_tunnel_address_reaches_the_local_sender(ns: Namespace, tun: Tun, source: str) -> None:
    """Its source is an address of the host itself: a martian to the kernel, but for accept_local."""
    converge(ns, tun)

    def send_and_be_told() -> int:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((source, 0))
            sock.connect(("10.244.9.9", 9))
            sock.settimeout(10)
            # "Net unreachable" is a passing error: a UDP socket hears of it only when it asks to (ip(7)).
            sock.setsockopt(socket.SOL_IP, IP_RECVERR, 1)
            sock.send(b"x")
            offender = os.read(tun.fds[0], 2048)[VNET_HDR_LEN:]
            icmp = struct.pack("!BBHI", 3, 0, 0, 0) + offender[:28]
            icmp = icmp[:2] + struct.pack("!H", checksum(icmp)) + icmp[4:]
            ends = socket.inet_aton("10.244.3.0") + offender[12:16]
            header = struct.pack("!BBHHHBBH", 0x45, 0xC0, 20 + len(icmp), 0, 0, 64, 1, 0) + ends
            header = header[:10] + struct.pack("!H", checksum(header)) + header[12:]
            os.write(tun.fds[0], bytes(VNET_HDR_LEN) + header + icmp)
            try:
                sock.recv(1)
            except OSError as exc:
                return exc.errno or 0
        return 0

    assert ns.call(send_and_be_told) == errno.ENETUNREACH


DAMAGES = [
    f"link delete {TUN_NAME}",
    f"address flush dev {TUN_NAME}",
    f"address delete 10.244.3.0/32 dev {TUN_NAME}",
    f"address add 10.9.9.9/32 dev {TUN_NAME}",
    f"route flush dev {TUN_NAME}",
    f"route delete {NETWORK} dev {TUN_NAME}",
    f"route delete unreachable {NETWORK} metric 4294967295",
    f"route flush root {NETWORK}",
    f"link set {TUN_NAME} down",
    f"link set {TUN_NAME} mtu 1300",
    f"link set {TUN_NAME} txqueuelen 10",
    f"link set {TUN_NAME} alias nobody's",
    f"route add 10.244.77.0/24 dev v0 proto {ROUTE_PROTOCOL}",
    f"route add default dev {TUN_NAME} metric 7 proto dhcp",
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_repaired_within_the_limit(running: Running, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    ns = running.ns

    def is_repaired() -> bool:
        strangers = [*ns.show("route show 10.244.77.0/24"), *ns.show(f"route show default dev {TUN_NAME}")]
        return shape(ns) == wanted_shape() and not strangers

    seconds_until(lambda: running.reconciler.last.changes == (), 10)
    with caplog.at_level(logging.INFO, logger="udptun.kernel.reconcile.reconciler"):
        ns.ip(damage)
        # The command returns with the damage done; a repair that was faster than our first look counts as well.
        took = seconds_until(is_repaired, REPAIR_LIMIT_S)
        seconds_until(lambda: caplog.records, 10)
    print(f"repaired in {took * 1000:.0f} ms (as seen through `ip`)")
    assert all(record.levelno == logging.INFO for record in caplog.records)
    # One line for a repair; two where it began between the two messages of one command.
    assert len(caplog.records) <= 2
    assert running.reconciler.last.problems == ()


def test_link_down_and_up_again_is_repaired(running: Running) -> None:
    """With the link the kernel removes its routes, without a notice for any of them."""
    running.ns.ip(f"link set {TUN_NAME} down")
    running.ns.ip(f"link set {TUN_NAME} up")
    running.wait_until_wanted()


def test_packets_are_refused_not_leaked_while_the_device_is_gone(ns: Namespace, tun: Tun) -> None:
    converge(ns, tun)
    ns.ip(f"link delete {TUN_NAME}")

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"x", ("10.244.9.9", 9))

    with pytest.raises(OSError, match="No route to host"):
        ns.call(send)


def test_a_sysctl_that_was_turned_back_is_repaired_at_the_next_look(ns: Namespace, tun: Tun) -> None:
    converge(ns, tun)

    ns.call(lambda: ACCEPT_LOCAL.write_text("0"))
    assert shape(ns)["accept_local"] == "0"
    assert [str(c) for c in converge(ns, tun).changes] == [f"set sysctl net/ipv4/conf/{TUN_NAME}/accept_local=1"]
    assert shape(ns) == wanted_shape()


def test_changes_without_a_notice_are_found_by_the_timer(
    ns: Namespace, tun: Tun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconciler, "_PACE", replace(reconciler._PACE, period_s=0.2))
    with ExitStack() as stack:
        running = Running(ns, tun, stack)
        ns.call(lambda: ACCEPT_LOCAL.write_text("0"))
        running.wait_until_wanted()


def test_a_new_mtu_and_subnet_replace_the_old_ones_while_running(running: Running) -> None:
    subnet = IPv4Network("10.244.7.0/24")
    changed = udp(NETWORK, subnet, 1300)
    running.on_loop(lambda: running.reconciler.set_desired(changed))
    running.wait_until_wanted(subnet=subnet, mtu=1300)


def test_changes_are_counted_as_repairs_only_where_nobody_of_us_wanted_them(running: Running) -> None:
    def counts(is_repair: bool) -> dict[str, int]:
        return {thing: n for (thing, it), n in running.reconciler.changes.items() if it is is_repair}

    # The last look of the set-up, which finds nothing left to do, may not be over.
    seconds_until(lambda: running.reconciler._n_fulfilled == 1, 10)
    assert counts(is_repair=True) == {}
    set_up = counts(is_repair=False)
    running.ns.ip(f"route del {NETWORK} dev flannel0")
    running.wait_until_wanted()
    seconds_until(lambda: counts(is_repair=True) == {"route": 1}, 10)
    running.on_loop(lambda: running.reconciler.set_desired(udp(NETWORK, SUBNET, 1300)))
    running.wait_until_wanted(mtu=1300)
    seconds_until(lambda: counts(is_repair=False) == {**set_up, "link": set_up["link"] + 1}, 10)
    assert counts(is_repair=True) == {"route": 1}


def test_a_repair_is_counted_as_one_while_something_else_is_refused_for_good(running: Running) -> None:
    """One route that the kernel refuses made every repair count as a change of ours."""
    index = running.ns.show("link show v0")[0]["ifindex"]
    refused = DesiredRoute(IPv4Network("10.9.0.0/24"), gateway=IPv4Address("203.0.113.9"), oif=index)
    wanted = replace(WANTED, routes=(*WANTED.routes, refused))
    running.on_loop(lambda: running.reconciler.set_desired(wanted))
    seconds_until(lambda: any("10.9.0.0/24" in line for line in running.reconciler.last.problems), 10)
    running.ns.ip(f"route del {NETWORK} dev flannel0")
    running.wait_until_wanted()
    seconds_until(lambda: running.reconciler.changes["route", True] == 1, 10)


def test_nothing_of_an_old_network_is_left(ns: Namespace, tun: Tun) -> None:
    converge(ns, tun)
    network, subnet = IPv4Network("10.96.0.0/12"), IPv4Network("10.97.1.0/24")
    outcome = converge(ns, tun, udp(network, subnet, 1472), Ownership((network, NETWORK)))
    assert outcome.problems == ()
    assert shape(ns)["routes"] == []
    assert shape(ns, network) == wanted_shape(subnet, 1472, network)


def test_the_route_is_there_throughout_a_change_of_address(ns: Namespace, tun: Tun) -> None:
    """Deleting a device's last address makes the kernel delete all its routes; the new one has to come first."""
    converge(ns, tun)
    outcome = converge(ns, tun, udp(NETWORK, IPv4Network("10.244.7.0/24"), 1472))
    assert [str(c) for c in outcome.changes] == ["add address 10.244.7.0/32", "delete address 10.244.3.0/32"]


@pytest.mark.parametrize(
    ("foreign", "says"),
    [
        (f"{NETWORK} via 192.0.2.7", "10.244.0.0/16 via 192.0.2.7 dev v0 proto 3 is not ours; it takes the traffic"),
        (f"{NETWORK} dev v0 metric 50", "dev v0 metric 50 proto 3 is not ours; it takes over, in clear text, when"),
    ],
)
def test_a_foreign_route_to_the_network_is_reported_and_stays(ns: Namespace, tun: Tun, foreign: str, says: str) -> None:
    ns.ip(f"route add {foreign}")
    before = ns.show("route show dev v0")
    outcome = converge(ns, tun)
    assert len(outcome.problems) == 1
    assert says in outcome.problems[0]
    assert ns.show("route show dev v0") == before
    assert ("unreachable", str(NETWORK), None, 0xFFFFFFFF, str(ROUTE_PROTOCOL), "global") in shape(ns)["routes"]


def test_our_route_is_added_once_a_foreign_one_gives_way(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    ns, reconciler = running.ns, running.reconciler
    ns.ip(f"route replace {NETWORK} via 192.0.2.7")
    seconds_until(lambda: reconciler.last.conflicts, REPAIR_LIMIT_S)
    assert shape(ns)["routes"][0][2] == "v0"
    ns.ip(f"route delete {NETWORK} via 192.0.2.7")
    running.wait_until_wanted()
    seconds_until(lambda: not reconciler.last.conflicts, REPAIR_LIMIT_S)
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1, "one line for one conflict"


def test_a_foreign_device_under_our_name_is_left_alone_and_reported(ns: Namespace, tun: Tun) -> None:
    converge(ns, tun)
    ns.ip(f"link delete {TUN_NAME}")
    ns.ip(f"link add {TUN_NAME} type bridge")
    outcome = converge(ns, tun)
    assert any("is not ours (it is a bridge device)" in failure for failure in outcome.failures)
    (link,) = ns.show(f"link show {TUN_NAME}")
    assert (link["linkinfo"]["info_kind"], "UP" in link["flags"]) == ("bridge", False)


def test_a_failed_repair_is_tried_again_by_itself(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []
    real = Tun.reattach

    def refuse_once(self: Tun) -> None:
        attempts.append(1)
        if len(attempts) == 1:
            raise KernelError("cannot attach", 16)
        real(self)

    monkeypatch.setattr(Tun, "reattach", refuse_once)
    running.ns.ip(f"link delete {TUN_NAME}")
    running.wait_until_wanted()
    assert len(attempts) == 2
    seconds_until(lambda: running.reconciler.last.problems == (), 10)


def test_a_mistake_in_one_look_is_a_problem_and_the_next_look_repairs(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception that nobody expected ended the loop, and with it the daemon."""
    seconds_until(lambda: running.reconciler.last.changes == (), 10)
    problems: list[tuple[str, ...]] = []

    def fail_twice(*state: Any) -> list[Change]:
        problems.append(running.reconciler.problems)
        if len(problems) <= 2:
            raise LookupError("a mistake of ours")
        return plan(*state)

    monkeypatch.setattr(reconciler, "plan", fail_twice)
    running.ns.ip(f"link delete {TUN_NAME}")
    running.wait_until_wanted()
    said = "kernel state: unexpected LookupError: a mistake of ours; it is tried again, the log has more"
    assert problems[:3] == [(), (said,), (said,)]
    seconds_until(lambda: running.reconciler.problems == (), 10)
    assert len([record for record in caplog.records if record.exc_info]) == 1


class Opponent:
    """Another program, which runs `ip COMMAND` as soon as we have changed something."""

    def __init__(self, ns: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
        self.command = ""
        real = reconciler.apply

        async def apply(*arguments: Any) -> Any:
            done, failed = await real(*arguments)
            if self.command and done:
                ns.ip(self.command)
            return done, failed

        monkeypatch.setattr(reconciler, "apply", apply)


def test_a_quarrel_over_a_strangers_address_is_named_once_and_as_such(
    ns: Namespace, tun: Tun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A DHCP client in a busy loop had also "not as wanted after 5 rounds: another program undoes our changes"."""
    opponent = Opponent(ns, monkeypatch)

    async def quarrel() -> None:
        ours = Reconciler(WANTED, tun, OURS)
        # The first round sets up the device, and the four others remove the address: not often enough for a line.
        opponent.command = f"address add 169.254.9.9/16 dev {TUN_NAME}"
        outcome = await ours.converge()
        assert (outcome.problems, outcome.is_unfinished) == ((), True)
        outcome = await ours.converge()
        (line,) = outcome.problems
        assert line.startswith("another program, a DHCP client perhaps, puts address 169.254.9.9/16 on flannel0 again")

    ns.call_async(quarrel)


def test_a_program_that_undoes_our_changes_is_named_with_what_it_undoes(
    ns: Namespace, tun: Tun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line said neither which change nor what to do."""
    opponent = Opponent(ns, monkeypatch)

    async def quarrel() -> None:
        ours = Reconciler(WANTED, tun, OURS)
        opponent.command = f"link set {TUN_NAME} mtu 1400"
        outcome = await ours.converge()
        assert outcome.problems == (
            "another program undoes set link flannel0 mtu 1472; `ip monitor` shows when, have that program leave our "
            "devices and routes alone",
        )
        opponent.command = ""
        assert (await ours.converge()).problems == ()

    ns.call_async(quarrel)
    assert shape(ns) == wanted_shape()


def test_damage_is_repaired_although_no_notice_socket_could_be_had_at_first(
    ns: Namespace, tun: Tun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = notices._open
    attempts = []

    def refuse_once(protocol: int, groups: int) -> socket.socket:
        attempts.append(1)
        if len(attempts) == 1:
            raise KernelError("cannot listen for netlink notices", 24)
        return real(protocol, groups)

    monkeypatch.setattr(notices, "_open", refuse_once)
    with ExitStack() as stack:
        running = Running(ns, tun, stack)
        assert "cannot listen for netlink notices: EMFILE" in caplog.text
        ns.ip(f"link delete {TUN_NAME}")
        running.wait_until_wanted()
    assert len(attempts) == 2


def test_an_empty_answer_from_the_kernel_deletes_nothing(
    ns: Namespace, tun: Tun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every dump comes back empty, twice: what is there is added again, refused as there already, and stays."""
    converge(ns, tun)

    async def nothing(*_args: object, **_keywords: object) -> list[Any]:
        return []

    monkeypatch.setattr(netlink.Netlink, "addresses", nothing)
    monkeypatch.setattr(netlink.Netlink, "routes", nothing)
    outcome = converge(ns, tun)
    assert outcome.changes == ()
    assert all("EEXIST" in failure for failure in outcome.failures)
    monkeypatch.undo()
    assert shape(ns) == wanted_shape()


def test_a_device_that_another_daemon_is_making_is_left_alone(ns: Namespace, tun: Tun) -> None:
    """It has no alias and no address yet.  It was deleted as a stray one, and the other daemon's start failed."""
    other = ns.call(lambda: open_queues("flannel1", 1))
    try:
        assert converge(ns, tun).problems == ()
        assert ns.show("link show flannel1") != []
        ns.ip("address add 10.244.9.0/32 dev flannel1")
        assert "delete link flannel1" in map(str, converge(ns, tun).changes)
        assert ns.show("link show flannel1") == []
    finally:
        other.close()


def test_remove_leaves_nothing_of_ours_and_everything_else(ns: Namespace) -> None:
    def everything() -> list[list[dict[str, Any]]]:
        return [ns.show(what) for what in ("link show", "address show", "route show table all")]

    clean = everything()
    tun = ns.call(lambda: open_queues(TUN_NAME, 1))
    converge(ns, tun)
    assert everything() != clean
    lines = ns.call_async(lambda: remove_ours(OURS))
    assert lines == [
        f"deleted link {TUN_NAME}",
        f"deleted route unreachable {NETWORK} metric 4294967295 proto {ROUTE_PROTOCOL}",
    ]
    assert everything() == clean
    assert ns.call_async(lambda: remove_ours(OURS)) == []
    tun.close()


def test_remove_takes_of_a_device_to_keep_the_addresses_alone_that_are_ours(ns: Namespace) -> None:
    """It was deleted under the daemon that went on with it for another family."""
    tun = ns.call(lambda: open_queues(TUN_NAME, 1))
    converge(ns, tun)
    ns.ip(f"address add 10.99.0.1/32 dev {TUN_NAME}")
    lines = ns.call_async(lambda: remove_ours(OURS, keep=TUN_NAME))
    assert lines[0] == f"deleted address {SUBNET.network_address} of {TUN_NAME}"
    assert [it["local"] for it in ns.show(f"address show dev {TUN_NAME}")[0]["addr_info"]] == ["10.99.0.1"]
    assert ns.show(f"route show proto {ROUTE_PROTOCOL}") == []
    tun.close()


@pytest.mark.parametrize("command", [f"tuntap add {TUN_NAME} mode tun", f"link add {TUN_NAME} type bridge"])
def test_remove_leaves_a_device_that_is_not_ours(ns: Namespace, command: str) -> None:
    ns.ip(command)
    assert ns.call_async(lambda: remove_ours(OURS)) == [f"left {TUN_NAME} alone: it is not a device of udptun"]
    assert ns.show(f"link show {TUN_NAME}")


@pytest.mark.parametrize(
    ("command", "is_ours"),
    [
        ("flannel0-in address 02:75:74:00:00:01 type veth peer name flannel0-gro address 02:75:74:00:00:02", True),
        ("flannel0-gso address 02:75:74:12:34:56 type vxlan id 7 dstport 18472", True),
        ("flannel0-in type veth peer name flannel0-gro", False),
        ("flannel0-gso address 02:75:75:12:34:56 type vxlan id 7 dstport 18472", False),
        ("flannel0-gso address 02:75:74:12:34:56 type bridge", False),
        ("else-gso2 address 02:75:74:12:34:56 type vxlan id 7 dstport 18472", False),
    ],
)
def test_what_a_killed_daemon_has_half_made_for_the_shortcut_is_removed(
    ns: Namespace, command: str, is_ours: bool
) -> None:
    """The kernel gives them an alias a moment after it has made them.  `udptun cleanup` left those without one."""
    name, before = command.split()[0], ns.show("link show")
    ns.ip(f"link add {command}")
    assert (f"deleted link {name}" in ns.call_async(lambda: remove_ours(OURS))) is is_ours
    assert (ns.show("link show") == before) is is_ours


@pytest.mark.parametrize("alias", ["", "ours", "others"])
def test_only_a_link_of_ours_makes_room_for_a_new_one(ns: Namespace, alias: str) -> None:
    """One without an alias is ours where it looks like it."""
    ns.ip("link add flannel0-gso address 02:75:74:12:34:56 type vxlan id 7 dstport 18472")
    ns.ip("link add flannel0-in address 02:75:74:00:00:01 type veth peer name flannel0-gro address 02:75:74:00:00:02")
    for name, delete in (("flannel0-gso", delete_detour), ("flannel0-in", delete_pair)):
        if alias:
            ns.ip(f"link set {name} alias {alias}")
        with pytest.raises(KernelError, match="somebody else") if alias == "others" else nullcontext():
            ns.call_async(partial(delete, "flannel0", "ours"))
        assert (name in {it["ifname"] for it in ns.show("link show")}) is (alias == "others")


def test_two_hundred_flaps_leak_no_descriptor(running: Running) -> None:
    ns, flaps = running.ns, 200
    before = open_fds()
    for n in range(flaps):
        ns.ip((f"link set {TUN_NAME} down", f"link delete {TUN_NAME}", f"route flush root {NETWORK}")[n % 3])
        if n % 3 == 1:
            seconds_until(lambda: ns.show(f"link show {TUN_NAME}"), 5)
    running.wait_until_wanted()
    seconds_until(lambda: open_fds() <= before, 5)


def test_no_processor_time_is_used_while_nothing_happens(running: Running) -> None:
    """A second without notices: no look, and next to no processor time in the whole process."""
    seconds_until(lambda: running.reconciler.last.changes == (), 10)
    looks = []
    original = running.reconciler.converge

    async def counted() -> Outcome:
        looks.append(1)
        return await original()

    running.reconciler.converge = counted  # type: ignore[method-assign]  # counting only
    cpu, start = time.process_time(), time.monotonic()
    stop = threading.Event()
    stop.wait(1.0)
    used = (time.process_time() - cpu) / (time.monotonic() - start)
    assert looks == []
    assert used < 0.02


def test_a_storm_of_other_peoples_routes_costs_no_look(running: Running) -> None:
    """A routing daemon changes thousands of routes; none has our mark or a prefix length of ours."""
    seconds_until(lambda: running.reconciler.last.changes == (), 10)
    looks = []
    original = running.reconciler.converge

    async def counted() -> Outcome:
        looks.append(1)
        return await original()

    running.reconciler.converge = counted  # type: ignore[method-assign]  # counting only
    for n in range(100):
        running.ns.ip(f"route add 172.20.{n}.0/24 dev v0 proto 99")
    # One more that does concern us: once it is repaired, all notices before it have been read.
    running.ns.ip(f"route delete {NETWORK} dev {TUN_NAME}")
    running.wait_until_wanted()
    assert 1 <= len(looks) <= 3


def test_a_storm_of_link_changes_is_bundled(running: Running) -> None:
    seconds_until(lambda: running.reconciler.last.changes == (), 10)
    looks = []
    original = running.reconciler.converge

    async def counted() -> Outcome:
        looks.append(1)
        return await original()

    running.reconciler.converge = counted  # type: ignore[method-assign]  # counting only
    start = time.monotonic()
    for n in range(200):
        running.ns.ip(f"link set v0 mtu {1400 + n % 2}")
    took = time.monotonic() - start
    assert len(looks) <= 6 + took / 0.1


def test_run_ends_when_cancelled_and_closes_what_it_opened(ns: Namespace, tun: Tun) -> None:
    async def start_and_stop() -> tuple[int, int]:
        before = open_fds()
        task = asyncio.create_task(Reconciler(WANTED, tun, OURS).run())
        async with asyncio.timeout(10):
            while await asyncio.to_thread(lambda: shape(ns) != wanted_shape()):
                pass
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return before, open_fds()

    before, after = ns.call_async(start_and_stop)
    assert after <= before


def test_a_setting_that_the_kernel_does_not_have_is_no_problem(ns: Namespace, tun: Tun) -> None:
    """As those of IPv6 on a kernel without it."""
    (link,) = WANTED.links
    missing = replace(link.sysctls[1], path="net/ipv6/conf/nowhere/no_such_setting")
    desired = replace(WANTED, links=(replace(link, sysctls=(missing, *link.sysctls)),))
    assert converge(ns, tun, desired).problems == ()
    assert shape(ns) == wanted_shape()


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        # Written by root and refused by the kernel; and a file that nobody can write.
        (f"net/ipv4/conf/{TUN_NAME}/accept_local", "many", "EINVAL"),
        ("net/ipv4/tcp_available_congestion_control", "1", "EACCES"),
    ],
)
def test_a_setting_that_is_refused_does_not_keep_the_rest_from_being_set(
    ns: Namespace, tun: Tun, setting: str, value: str, reason: str
) -> None:
    """The start ended with `cannot set up flannel0: set sysctl ...: EROFS` in every pod that is not privileged."""
    (link,) = WANTED.links
    refused = replace(link.sysctls[0], path=setting, value=value, without="something is missing")
    desired = replace(WANTED, links=(replace(link, sysctls=(refused, *link.sysctls)),))
    outcome = converge(ns, tun, desired)
    assert not outcome.is_broken
    assert outcome.problems == (
        f"sysctl {setting} cannot be set to {value} ({reason}), so something is missing; "
        f"run `sysctl -w {setting}={value}` on the host, or give the container a /proc/sys that it can write",
    )
    assert shape(ns) == wanted_shape()


def test_a_thousand_peers_of_vxlan_are_set_up_at_once_and_one_more_costs_little(ns: Namespace) -> None:
    """Neighbour, fdb entry and route each; promised: within a second or so.

    What one more costs is time of the processor, whoever else wants it meanwhile.
    """
    lower = ns.show("link show v0")[0]["ifindex"]
    underlay = Underlay("v0", lower, 1500, IPv4Address("192.0.2.1"), IPv4Address("192.0.2.1"))
    backend = KernelVxlan(VxlanKeys(), "02:00:00:00:00:01")

    def peer(n: int) -> Lease:
        data = {"VtepMAC": f"02:00:00:00:{n >> 8:02x}:{n & 255:02x}"}
        attrs = LeaseAttrs(IPv4Address(0xC6120000 + n), backend_type="vxlan", backend_data=data)
        return Lease(Subnets(IPv4Network((0x0A010000 + (n << 8), 24))), attrs)

    def wanted(n: int) -> DesiredState:
        live = LiveSettings(1450, 1, SourceCheck.PEER, ALL)
        peers = [peer(i) for i in range(1, n + 1)]
        wide = IPv4Network("10.0.0.0/8")
        inputs = BackendInput(wide, (wide,), underlay, IPv4Network("10.0.0.0/24"), live, peers)
        return backend.desired(inputs)

    async def grow() -> tuple[float, float]:
        reconciler = Reconciler(wanted(1000), None, Ownership((IPv4Network("10.0.0.0/8"),)))
        start = time.perf_counter()
        assert (await reconciler.converge()).problems == ()
        all_s = time.perf_counter() - start
        reconciler.set_desired(wanted(1001))
        start = time.process_time()
        outcome = await reconciler.converge()
        assert len(outcome.changes) == 3
        return all_s, time.process_time() - start

    all_s, one_s = ns.call_async(grow)
    print(f"1,000 peers set up in {all_s:.2f} s, one more in {one_s:.2f} s of processor")
    assert len(ns.show("route show dev flannel.1")) == 1001
    assert len(ns.show("neigh show dev flannel.1")) == 1001
    assert all_s < 5
    assert one_s < 1
