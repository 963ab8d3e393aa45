"""What the kernel does with UDP sockets and datagrams."""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from namespace import KERNEL, Namespace, namespace, requires_netns, seconds_until
from udp_sockets import n_waiting

IP_MTU_DISCOVER, IP_MTU = 10, 14
IP_PMTUDISC_WANT, IP_PMTUDISC_DO, IP_PMTUDISC_PROBE = 1, 2, 3
UDP_SEGMENT, UDP_GRO = 103, 104
SO_ATTACH_FILTER, SO_MEMINFO, SK_MEMINFO_DROPS = 26, 55, 8
MAX_UDP_PAYLOAD = 65_507

passes_trains_whole = pytest.mark.skipif(KERNEL <= (5, 10), reason="needs Linux after 5.10: trains cross lo whole")
merges_on_veth = pytest.mark.skipif(KERNEL <= (5, 10), reason="needs Linux after 5.10: datagrams are merged on a veth")


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as undo:
        yield undo


def bound(undo: ExitStack, address: tuple[str, int] = ("127.0.0.1", 0), *, shared: bool = False) -> socket.socket:
    udp = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    udp.setblocking(False)
    if shared:
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    udp.bind(address)
    return udp


# --- what is dropped


def test_a_socket_counts_what_its_filter_drops_and_what_finds_no_room_alike(undo: ExitStack) -> None:
    """So a filter on a socket that is read cannot say what it has dropped (SK_MEMINFO_DROPS: sk_drops).

    Only UDP's RcvbufErrors tell the two apart, for all sockets of a network namespace together.  The program that keeps
    strangers away has a socket of its own for them, where nothing else is dropped.
    """

    def drop(udp: socket.socket) -> int:
        for _ in range(20):
            source.sendto(bytes(1000), udp.getsockname())
        return struct.unpack("9I", udp.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36))[SK_MEMINFO_DROPS]

    source, filtering, full = bound(undo), bound(undo), bound(undo)
    return_0 = array("B", struct.pack("=HBBI", 6, 0, 0, 0))
    filtering.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", 1, return_0.buffer_info()[0]))
    assert drop(filtering) == 20
    full.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
    n_lost = drop(full)
    assert 0 < n_lost == 20 - n_waiting(full)


# --- several sockets on one port


def group(undo: ExitStack, n: int = 4) -> list[socket.socket]:
    first = bound(undo, shared=True)
    return [first, *(bound(undo, first.getsockname(), shared=True) for _ in range(n - 1))]


def send_from_many_ports(undo: ExitStack, target: socket.socket, n: int = 200) -> None:
    for _ in range(n):
        bound(undo).sendto(b"x", target.getsockname())


def test_a_reuseport_group_shares_what_comes_while_the_option_is_set(undo: ExitStack) -> None:
    """Datagrams of many sources spread over the sockets (net/ipv4/udp.c, udp4_lib_lookup2 and lookup_reuseport)."""
    sockets = group(undo)
    send_from_many_ports(undo, sockets[0])
    got = [n_waiting(udp) for udp in sockets]
    assert sum(got) == 200
    assert min(got) >= 200 / 4 / 4, got


def test_a_reuseport_group_gives_all_to_one_socket_once_the_option_is_switched_off(undo: ExitStack) -> None:
    """The lookup asks sk_reuseport of the socket that it has found, so an option taken back ends the sharing.

    Keeping strangers out by taking the option back cost every worker but one its datagrams.
    """
    sockets = group(undo)
    for udp in sockets:
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
    send_from_many_ports(undo, sockets[0])
    assert sorted(n_waiting(udp) for udp in sockets) == [0, 0, 0, 200]


def test_one_source_always_reaches_the_same_socket_of_a_group(undo: ExitStack) -> None:
    """The choice is a hash of both addresses and ports: the packets of one peer stay in order."""
    sockets = group(undo)
    source = bound(undo)
    for _ in range(50):
        source.sendto(b"x", sockets[0].getsockname())
    assert sorted(n_waiting(udp) for udp in sockets) == [0, 0, 0, 50]


def test_a_port_bound_without_reuseport_is_nobody_elses(undo: ExitStack) -> None:
    """Both sockets have to have the option (inet_rcv_saddr_equal and udp_lib_lport_inuse in net/ipv4/udp.c)."""
    alone = bound(undo)
    with pytest.raises(OSError) as refused:
        bound(undo, alone.getsockname(), shared=True)
    assert refused.value.errno == errno.EADDRINUSE


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user for a moment")
def test_another_user_cannot_join_a_reuseport_group(undo: ExitStack) -> None:
    """udp_lib_lport_inuse compares the users (uid_eq): what root has bound only root can join."""
    first = bound(undo, shared=True)
    os.seteuid(65534)
    try:
        with pytest.raises(OSError) as refused:
            bound(undo, first.getsockname(), shared=True)
    finally:
        os.seteuid(0)
    assert refused.value.errno == errno.EADDRINUSE


def test_a_connected_socket_gets_its_peers_datagrams_and_no_others(undo: ExitStack) -> None:
    """compute_score in net/ipv4/udp.c: so a socket that is to serve a port must not be connected."""
    group_of_two = group(undo, 2)
    peer, stranger = bound(undo), bound(undo)
    group_of_two[0].connect(peer.getsockname())
    for source in (peer, stranger):
        for _ in range(20):
            source.sendto(b"x", group_of_two[1].getsockname())
    assert [n_waiting(udp) for udp in group_of_two] == [20, 20]


# --- trains: UDP_SEGMENT and UDP_GRO


def send_train(udp: socket.socket, address: tuple[str, int], n_bytes: int, size: int) -> None:
    udp.sendmsg([bytes(n_bytes)], [(socket.SOL_UDP, UDP_SEGMENT, struct.pack("H", size))], 0, address)


def refusal(udp: socket.socket, address: tuple[str, int], n_bytes: int, size: int) -> int:
    with pytest.raises(OSError) as refused:
        send_train(udp, address, n_bytes, size)
    assert refused.value.errno is not None
    return refused.value.errno


def test_a_message_with_a_segment_size_arrives_as_so_many_datagrams(undo: ExitStack) -> None:
    """The last may be shorter (udp_send_skb, __udp_gso_segment)."""
    source, target = bound(undo), bound(undo)
    send_train(source, target.getsockname(), 2500, 1000)
    assert [len(target.recv(4000)) for _ in range(3)] == [1000, 1000, 500]


def test_64_segments_are_sent_by_every_kernel_and_129_by_none(undo: ExitStack) -> None:
    """EINVAL above UDP_MAX_SEGMENTS: 64, since Linux 6.9 128.  send.pxd stays at 64."""
    source, target = bound(undo), bound(undo)
    send_train(source, target.getsockname(), 64 * 10, 10)
    assert refusal(source, target.getsockname(), 129 * 10, 10) == errno.EINVAL


def test_a_train_longer_than_one_datagram_can_be_is_refused(undo: ExitStack) -> None:
    """EMSGSIZE above 65,507 bytes in all: the train is one datagram until it is cut."""
    source, target = bound(undo), bound(undo)
    target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    send_train(source, target.getsockname(), MAX_UDP_PAYLOAD, 1472)
    assert refusal(source, target.getsockname(), MAX_UDP_PAYLOAD + 1, 1472) == errno.EMSGSIZE


@passes_trains_whole
def test_a_receiver_with_udp_gro_gets_a_train_whole_and_is_told_its_segment_size(undo: ExitStack) -> None:
    """udp_cmsg_recv: the control message is an int, the one for sending a u16.  One datagram alone has none."""
    source, target = bound(undo), bound(undo)
    target.setsockopt(socket.SOL_UDP, UDP_GRO, 1)
    send_train(source, target.getsockname(), 2500, 1000)
    data, control, _flags, _source = target.recvmsg(65_536, 100)
    assert len(data) == 2500
    assert [(level, kind, struct.unpack("i", value)) for level, kind, value in control] == [
        (socket.SOL_UDP, UDP_GRO, (1000,))
    ]
    source.sendto(bytes(300), target.getsockname())
    data, control, _flags, _source = target.recvmsg(65_536, 100)
    assert (len(data), control) == (300, [])


# --- the TOS of the outer packet


def received_tos(udp: socket.socket) -> list[int]:
    _data, control, _flags, _source = udp.recvmsg(65_536, 100)
    return [value[0] for level, kind, value in control if (level, kind, len(value)) == (0, socket.IP_TOS, 1)]


def test_a_message_carries_a_tos_of_its_own_beside_a_segment_size(undo: ExitStack) -> None:
    """ip_cmsg_send; all its datagrams have it, and the socket's stays as it is.  The receiver is told one byte."""
    source, target = bound(undo), bound(undo)
    target.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
    control = [(socket.SOL_UDP, UDP_SEGMENT, struct.pack("H", 100)), (0, socket.IP_TOS, struct.pack("i", 3))]
    source.sendmsg([bytes(300)], control, 0, target.getsockname())
    source.sendto(bytes(100), target.getsockname())
    assert [received_tos(target) for _ in range(4)] == [[3], [3], [3], [0]]


@passes_trains_whole
def test_the_segment_size_is_told_before_the_tos(undo: ExitStack) -> None:
    """udp_recvmsg: udp_cmsg_recv, then ip_cmsg_recv.

    So a build that has room for the first alone cuts trains up rightly with sockets that tell the second too.
    """
    source, target = bound(undo), bound(undo)
    target.setsockopt(socket.SOL_UDP, UDP_GRO, 1)
    target.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
    send_train(source, target.getsockname(), 2500, 1000)
    _data, control, flags, _source = target.recvmsg(65_536, socket.CMSG_SPACE(4))
    assert [(level, kind, struct.unpack("i", value)) for level, kind, value in control] == [
        (socket.SOL_UDP, UDP_GRO, (1000,))
    ]
    assert flags & socket.MSG_CTRUNC


MARK_SOME = """
table netdev marks {
    chain some { type filter hook ingress device v1 priority 0; numgen inc mod 8 < 4 ip ecn set ce; }
}
"""


@merges_on_veth
@requires_netns
@pytest.mark.netns
@pytest.mark.parametrize("is_marked", [False, True], ids=["alike", "marked"])
def test_datagrams_that_differ_in_their_tos_are_not_merged_on_receipt(undo: ExitStack, is_marked: bool) -> None:
    """udp_gro_receive_segment, since Linux 6.9 and some stable releases (5babae7).

    v0 == train ==> v1 [cut up, and four of eight marked] b0 [w0] -- datagrams --> w1 [merged again] socket
    """
    ns, switch, far = (undo.enter_context(namespace()) for _ in range(3))
    ns.ip(f"link add v0 type veth peer name v1 netns {switch.name}")
    switch.ip(f"link add w0 type veth peer name w1 netns {far.name}")
    switch.ip("link add b0 type bridge")
    for link in ("v1", "w0"):
        switch.ip(f"link set {link} master b0 up")
    switch.ip("link set b0 up")
    for end, link, address in ((ns, "v0", "192.0.2.1/24"), (far, "w1", "192.0.2.2/24")):
        end.ip(f"address add {address} dev {link}")
        end.ip(f"link set {link} up")
    # A veth merges what comes from a link that cuts nothing up itself (veth_skb_is_eligible_for_gro).
    none = ["tso", "off", "gso", "off", "tx-udp-segmentation", "off"]
    for space, link, features in ((ns, "v0", none), (switch, "w0", none), (far, "w1", ["gro", "on"])):
        subprocess.run(["ip", "netns", "exec", space.name, "ethtool", "-K", link, *features], check=True)
    if is_marked:
        nft = ["ip", "netns", "exec", switch.name, "nft", "-f", "-"]
        subprocess.run(nft, input=MARK_SOME, text=True, check=True)
    source = ns.call(lambda: bound(undo, ("192.0.2.1", 0)))
    target = far.call(lambda: bound(undo, ("192.0.2.2", 0)))
    target.setsockopt(socket.SOL_UDP, UDP_GRO, 1)
    target.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
    source.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 2)
    # Resolves the address.
    source.sendto(bytes(100), target.getsockname())
    target.settimeout(10)
    target.recv(200)
    found: dict[int, list[int]] = {}
    while sum(map(sum, found.values())) < 64:
        if not found:
            send_train(source, target.getsockname(), 64 * 100, 100)
        data, control, _flags, _source = target.recvmsg(65_536, 100)
        (tos,) = (value[0] for level, _kind, value in control if level == 0)
        found.setdefault(tos, []).append(len(data) // 100)
    assert max(map(max, found.values())) > 1, "nothing was merged at all"
    if is_marked:
        assert {tos: sum(sizes) for tos, sizes in found.items()} == {2: 32, 3: 32}
        assert max(map(max, found.values())) <= 4
    else:
        assert set(found) == {2}


# --- paths that are too narrow, and routes that refuse


@pytest.fixture
def narrow(undo: ExitStack) -> Namespace:
    """lo with 127.0.0.1, and routes to addresses that are narrow or refuse."""
    ns = undo.enter_context(namespace())
    ns.ip("route add local 127.0.0.2/32 dev lo mtu 1000 table local")
    ns.ip("route add blackhole 192.0.2.1/32")
    ns.ip("route add unreachable 192.0.2.2/32")
    ns.ip("route add prohibit 192.0.2.3/32")
    return ns


def sending_socket(ns: Namespace, undo: ExitStack, discover: int = IP_PMTUDISC_DO) -> socket.socket:
    udp = ns.call(lambda: bound(undo, ("0.0.0.0", 0)))
    udp.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, discover)
    return udp


@requires_netns
@pytest.mark.netns
def test_a_datagram_that_the_path_is_too_narrow_for_is_refused_only_with_pmtudisc_do(
    narrow: Namespace, undo: ExitStack
) -> None:
    """EMSGSIZE (ip_append_data); with IP_PMTUDISC_WANT it is fragmented in silence."""
    target = narrow.call(lambda: bound(undo, ("127.0.0.2", 0)))
    strict = sending_socket(narrow, undo)
    strict.sendto(bytes(1000 - 28), target.getsockname())
    with pytest.raises(OSError) as refused:
        strict.sendto(bytes(1000 - 27), target.getsockname())
    assert refused.value.errno == errno.EMSGSIZE
    lax = sending_socket(narrow, undo, IP_PMTUDISC_WANT)
    lax.sendto(bytes(2000), target.getsockname())
    assert [len(target.recv(4000)) for _ in range(2)] == [1000 - 28, 2000]


@requires_netns
@pytest.mark.netns
def test_with_pmtudisc_probe_the_device_alone_says_how_long_a_datagram_may_be(undo: ExitStack) -> None:
    """ip_sk_use_pmtu: neither the `mtu` of a route counts nor an ICMP error, which the kernel still learns from.

    With IP_PMTUDISC_DO nothing longer leaves for 10 minutes, long after the path has been mended.
    """
    near, router, far = (undo.enter_context(namespace()) for _ in range(3))
    for n, host in ((1, near), (2, far)):
        host.ip(f"link add e0 type veth peer name r{n} netns {router.name}")
        host.ip(f"address add 10.{n}.0.2/24 dev e0")
        host.ip("link set e0 up")
        router.ip(f"address add 10.{n}.0.1/24 dev r{n}")
        router.ip(f"link set r{n} up")
        host.ip(f"route add default via 10.{n}.0.1")
    router.call(lambda: Path("/proc/sys/net/ipv4/ip_forward").write_text("1"))
    router.ip("link set r2 mtu 1300")
    target = far.call(lambda: bound(undo, ("10.2.0.2", 0)))
    ours, asking = sending_socket(near, undo, IP_PMTUDISC_PROBE), sending_socket(near, undo)

    def believed() -> int:
        # A connected socket goes on to say what it said first.
        asking.connect(target.getsockname())
        return asking.getsockopt(socket.IPPROTO_IP, IP_MTU)

    assert believed() == 1500
    ours.sendto(bytes(1472), target.getsockname())
    seconds_until(lambda: believed() == 1300, 10)
    router.ip("link set r2 mtu 1500")
    target.settimeout(10)
    with pytest.raises(OSError) as refused:
        asking.send(bytes(1472))
    assert refused.value.errno == errno.EMSGSIZE
    near.ip("route change default via 10.1.0.1 mtu 1200")
    ours.sendto(bytes(1472), target.getsockname())
    send_train(ours, target.getsockname(), 2 * 1400, 1400)
    assert [len(target.recv(4000)) for _ in range(3)] == [1472, 1400, 1400]
    with pytest.raises(OSError) as refused:
        ours.sendto(bytes(1473), target.getsockname())
    assert refused.value.errno == errno.EMSGSIZE


@requires_netns
@pytest.mark.netns
def test_segments_larger_than_the_path_are_refused_as_two_kinds_of_kernel_say_it(
    narrow: Namespace, undo: ExitStack
) -> None:
    """EMSGSIZE; older kernels say EINVAL, as they do when they know no UDP_SEGMENT (udp_send_skb in net/ipv4/udp.c).

    So send.pxd sends the datagrams one by one before it believes that the kernel cannot segment.
    """
    target = narrow.call(lambda: bound(undo, ("127.0.0.2", 0)))
    strict = sending_socket(narrow, undo)
    assert refusal(strict, target.getsockname(), 4000, 1200) in (errno.EMSGSIZE, errno.EINVAL)
    send_train(strict, target.getsockname(), 2000, 900)
    assert [len(target.recv(4000)) for _ in range(3)] == [900, 900, 200]


@requires_netns
@pytest.mark.netns
def test_a_train_leaves_a_device_without_checksum_offload_or_is_refused_with_eio(undo: ExitStack) -> None:
    """Kernels before 6.11 have nobody to compute the segments' checksums, and say EIO (udp_send_skb)."""
    ns = undo.enter_context(namespace())
    ns.ip("link add v0 type veth peer name v1")
    ns.ip("address add 192.0.2.1/24 dev v0")
    ns.ip("link set v0 up")
    ns.ip("link set v1 up")
    ns.ip("neigh add 192.0.2.2 lladdr 02:00:00:00:00:02 dev v0")
    subprocess.run(["ip", "netns", "exec", ns.name, "ethtool", "-K", "v0", "tx", "off"], check=True)
    udp = ns.call(lambda: bound(undo, ("192.0.2.1", 0)))
    udp.sendto(bytes(1000), ("192.0.2.2", 9))
    if tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 11):
        send_train(udp, ("192.0.2.2", 9), 2500, 1000)
    else:
        assert refusal(udp, ("192.0.2.2", 9), 2500, 1000) == errno.EIO


@requires_netns
@pytest.mark.netns
def test_a_connected_socket_knows_the_mtu_of_its_path(narrow: Namespace, undo: ExitStack) -> None:
    """IP_MTU (do_ip_getsockopt): of the route, not of the device.  icmp.pxd asks it for what to tell the sender."""
    udp = sending_socket(narrow, undo)
    udp.connect(("127.0.0.2", 9))
    assert udp.getsockopt(socket.IPPROTO_IP, IP_MTU) == 1000


@requires_netns
@pytest.mark.netns
@pytest.mark.parametrize(
    ("address", "number"),
    [("192.0.2.1", errno.EINVAL), ("192.0.2.2", errno.EHOSTUNREACH), ("192.0.2.3", errno.EACCES)],
    ids=["blackhole", "unreachable", "prohibit"],
)
def test_a_route_that_refuses_answers_with_an_error_of_its_own(
    narrow: Namespace, undo: ExitStack, address: str, number: int
) -> None:
    """fib_props in net/ipv4/fib_semantics.c.  A blackhole's EINVAL says nothing about what the kernel can segment."""
    udp = sending_socket(narrow, undo)
    assert refusal(udp, (address, 9), 3000, 1000) == number
    with pytest.raises(OSError) as refused:
        udp.sendto(b"x", (address, 9))
    assert refused.value.errno == number
