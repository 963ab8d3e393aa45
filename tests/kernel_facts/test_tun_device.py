"""What the kernel does with a TUN device (drivers/net/tun.c), its queues, and the virtio headers of packets."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from namespace import KERNEL, Namespace, namespace, requires_netns, seconds_until
from packets import (
    DESTINATION_OPTIONS,
    FULL,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP_L4,
    HOP_BY_HOP,
    NEEDS_CSUM,
    PARTIAL,
    authentication_header,
    destination_of,
    fragment_header,
    internet_sum,
    ipv6,
    options_header,
    routing_header,
    tcp,
    tcp_segment,
    udp,
    udp_segment,
    vnet_hdr,
)

pytestmark = [pytest.mark.netns, requires_netns]

TUNSETIFF, TUNSETPERSIST, TUNSETOFFLOAD, TUNSETQUEUE = 0x400454CA, 0x400454CB, 0x400454D0, 0x400454D9
IFF_DETACH_QUEUE = 0x0400
IFF_TUN, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x0100, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4, TUN_F_USO4, TUN_F_USO6 = 0x01, 0x02, 0x20, 0x40
UDP_GRO = 104
HEADER = 10
"""sizeof(struct virtio_net_hdr)."""

HERE, THERE, BEYOND = "192.0.2.1", "192.0.2.2", "198.51.100.1"


def attach(fd: int, flags: int = IFF_MULTI_QUEUE | IFF_VNET_HDR) -> None:
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"t0", IFF_TUN | IFF_NO_PI | flags))


def queue(ns: Namespace, undo: ExitStack, flags: int = IFF_MULTI_QUEUE | IFF_VNET_HDR) -> int:
    """A queue of t0 in `ns`, not blocking."""
    fd = ns.call(lambda: os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK))
    undo.callback(os.close, fd)
    attach(fd, flags)
    return fd


def udp_socket(ns: Namespace, undo: ExitStack, address: tuple[str, int] | None = None) -> socket.socket:
    """A socket in `ns`, bound to `address` if that is given."""
    sock = ns.call(lambda: undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)))
    sock.settimeout(10)
    if address:
        sock.bind(address)
    return sock


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as undo:
        yield undo


@pytest.fixture
def ns(undo: ExitStack) -> Namespace:
    return undo.enter_context(namespace())


def bring_up(ns: Namespace) -> None:
    """t0 has HERE; everything else goes through it, and nothing of IPv6 does."""
    ns.call(lambda: Path("/proc/sys/net/ipv6/conf/t0/disable_ipv6").write_text("1"))
    ns.ip("link set t0 up")
    ns.ip(f"address add {HERE}/32 dev t0")
    ns.ip("route add default dev t0")


def dropped(ns: Namespace) -> int:
    (link,) = ns.show("-s link show t0")
    return int(link["stats64"]["tx"]["dropped"])


def read_packets(fd: int) -> list[bytes]:
    """All that wait, each behind its virtio header."""
    found = []
    with suppress(BlockingIOError):
        while True:
            found.append(os.read(fd, 1 << 17))
    return found


# --- the device and its holders


def test_a_persistent_device_that_nobody_reads_drops_in_silence(ns: Namespace, undo: ExitStack) -> None:
    """tun_net_xmit: without a queue every packet is dropped and counted; the sender is told nothing.

    So a host whose datapath is dead leaks nothing: the packets go to their device and end there.
    """
    with ExitStack() as holder:
        fcntl.ioctl(queue(ns, holder), TUNSETPERSIST, 1)
        bring_up(ns)
    before = dropped(ns)
    sock = udp_socket(ns, undo)
    for _ in range(5):
        sock.sendto(b"x", (THERE, 9))
    # Linux 5.10 does not count them.
    assert dropped(ns) == before + (5 if KERNEL > (5, 10) else 0)


def test_packets_wait_in_a_queue_that_is_held_and_not_read(ns: Namespace, undo: ExitStack) -> None:
    """As many as txqueuelen says, 500: that is what the next reader of a dead datapath's queue finds."""
    fd = queue(ns, undo)
    bring_up(ns)
    (link,) = ns.show("link show t0")
    assert link["txqlen"] == 500
    sock = udp_socket(ns, undo)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
    for _ in range(600):
        with suppress(OSError):
            sock.sendto(b"x", (THERE, 9))
    assert len(read_packets(fd)) == 500


def test_what_waits_in_a_queue_is_lost_when_the_queue_is_detached(ns: Namespace, undo: ExitStack) -> None:
    """tun_queue_purge in __tun_detach, behind the wait for the rtnl lock and for all who may still put something in.

    So what comes between the last read and the end of that is lost, and no counter says so.  A queue is never given up.
    """
    first, second = queue(ns, undo), queue(ns, undo)
    bring_up(ns)
    before = dropped(ns)
    for _ in range(64):
        udp_socket(ns, undo).sendto(b"x", (BEYOND, 9))
    fcntl.ioctl(second, TUNSETQUEUE, struct.pack("16sH22x", b"", IFF_DETACH_QUEUE))
    n_left = len(read_packets(first))
    assert 0 < n_left < 64
    assert dropped(ns) == before
    with pytest.raises(OSError) as refused:
        os.read(second, 2000)
    assert refused.value.errno in (errno.EAGAIN, errno.EBADFD)


def test_a_queue_outlives_its_device_and_can_be_attached_again_for_every_holder(ns: Namespace, undo: ExitStack) -> None:
    """EBADFD once the device is deleted.  TUNSETIFF on the same descriptor brings it back, also for duplicates.

    They are one open file, and the device comes back in the network namespace that the file was opened in, whoever
    asks for it: so the control plane repairs the device while a datapath holds its queues.
    """
    fd = queue(ns, undo)
    held = os.dup(fd)
    undo.callback(os.close, held)
    ns.ip("link delete t0")
    for holder in (fd, held):
        with pytest.raises(OSError, match="descriptor") as gone:
            os.read(holder, 100)
        assert gone.value.errno == errno.EBADFD
    attach(fd)
    bring_up(ns)
    sock = udp_socket(ns, undo)
    sock.sendto(b"again", (THERE, 9))
    assert [packet[-5:] for packet in read_packets(held)] == [b"again"]


def errors_while_deleted(ns: Namespace, fd: int) -> set[int]:
    """What reads of the queue fail with, each after poll() said POLLERR, until t0 is gone."""
    looks = select.poll()
    looks.register(fd, select.POLLIN)
    read_packets(fd)
    assert looks.poll(0) == []
    deletion = threading.Thread(target=ns.ip, args=("link delete t0",))
    deletion.start()
    seen = set()
    while errno.EBADFD not in seen:
        if looks.poll(0) == [(fd, select.POLLERR)]:
            try:
                os.read(fd, 100)
            except OSError as err:
                seen.add(err.errno)
    deletion.join()
    return seen


def test_a_device_that_is_being_deleted_reads_as_empty_while_poll_reports_an_error(
    ns: Namespace, undo: ExitStack
) -> None:
    """tun_chr_poll says POLLERR from the begin of a deletion, before the queues are let go of, and never before.

    So whoever polls again after each read would not sleep until then, which is a second on a busy machine.
    """
    fd = queue(ns, undo)
    for _ in range(50):
        # The moment may be over before we look.
        if (seen := errors_while_deleted(ns, fd)) != {errno.EBADFD}:
            break
        attach(fd)
    assert seen == {errno.EAGAIN, errno.EBADFD}


@pytest.mark.parametrize(("first", "second"), [(IFF_MULTI_QUEUE, 0), (0, IFF_MULTI_QUEUE)], ids=["multi", "single"])
def test_a_device_is_attached_to_with_the_number_of_queues_it_was_made_for(
    ns: Namespace, undo: ExitStack, first: int, second: int
) -> None:
    """EINVAL otherwise (tun_set_iff).  A datapath of one worker says IFF_MULTI_QUEUE too, so that it can have more."""
    fcntl.ioctl(queue(ns, undo, first), TUNSETPERSIST, 1)
    with pytest.raises(OSError, match="Invalid") as refused:
        queue(ns, undo, second)
    assert refused.value.errno == errno.EINVAL


def test_udp_super_packets_are_offered_in_both_families_or_not_at_all(ns: Namespace, undo: ExitStack) -> None:
    """set_offload: TUN_F_USO4 alone is EINVAL; so is either on a kernel before 6.2."""
    fd = queue(ns, undo)
    fcntl.ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)
    with pytest.raises(OSError, match="Invalid"):
        fcntl.ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_USO4)
    with suppress(OSError):
        fcntl.ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_USO4 | TUN_F_USO6)


# --- virtio headers


def test_a_packet_that_is_read_is_whole_unless_the_reader_offered_to_finish_it(ns: Namespace, undo: ExitStack) -> None:
    """The kernel computes checksums.  After TUNSETOFFLOAD with TUN_F_CSUM the field has the pseudo-header's sum."""
    fd = queue(ns, undo)
    bring_up(ns)
    sock = udp_socket(ns, undo)
    for offload, is_finished in ((0, True), (TUN_F_CSUM, False)):
        fcntl.ioctl(fd, TUNSETOFFLOAD, offload)
        sock.sendto(b"payload", (THERE, 9))
        (packet,) = read_packets(fd)
        segment = packet[HEADER + 20 :]
        pseudo = packet[HEADER + 12 : HEADER + 20] + struct.pack("!HH", socket.IPPROTO_UDP, len(segment))
        flags, start, offset = packet[0], *struct.unpack("<HH", packet[6:10])
        if is_finished:
            assert (flags, internet_sum(pseudo + segment)) == (0, 0xFFFF)
        else:
            assert (flags, start, offset) == (NEEDS_CSUM, 20, 6)
            assert int.from_bytes(segment[6:8]) == internet_sum(pseudo)


@pytest.mark.parametrize("check", [FULL, PARTIAL])
def test_a_packet_that_is_written_with_needs_csum_counts_as_right(ns: Namespace, undo: ExitStack, check: str) -> None:
    """Nobody verifies its checksum (tun_get_user).  Without the flag the pseudo-header's sum is dropped as wrong."""
    fd = queue(ns, undo)
    bring_up(ns)
    receiver = udp_socket(ns, undo, (HERE, 53))
    os.write(fd, vnet_hdr() + udp(THERE, HERE, b"without", check=check))
    os.write(fd, vnet_hdr(flags=NEEDS_CSUM, start=20, offset=6) + udp(THERE, HERE, b"with", check=PARTIAL))
    assert receiver.recv(100) == (b"without" if check == FULL else b"with")


def super_packet(kind: int, n_segments: int, size: int = 100, flags: int = NEEDS_CSUM) -> bytes:
    data = bytes(n_segments * size)
    if kind == GSO_TCPV4:
        packet, header, offset = tcp(THERE, HERE, data, check=PARTIAL), 40, 16
    else:
        packet, header, offset = udp(THERE, HERE, data, check=PARTIAL), 28, 6
    return vnet_hdr(flags=flags, gso_type=kind, hdr_len=header, gso_size=size, start=20, offset=offset) + packet


takes_udp_super_packets = pytest.mark.skipif(KERNEL < (6, 2), reason="needs Linux 6.2: super-packets of UDP on a TUN")


@takes_udp_super_packets
def test_a_udp_super_packet_is_taken_with_64_segments_and_received_as_so_many_datagrams(
    ns: Namespace, undo: ExitStack
) -> None:
    """virtio_net_hdr_to_skb.  EINVAL with more than UDP_MAX_SEGMENTS (64 before Linux 6.9, then 128), without
    NEEDS_CSUM, and where the kernel is one of those that take none at all (6.6.44)."""
    fd = queue(ns, undo)
    bring_up(ns)
    receiver = udp_socket(ns, undo, (HERE, 53))
    os.write(fd, super_packet(GSO_UDP_L4, 64))
    assert [len(receiver.recv(1000)) for _ in range(64)] == [100] * 64
    for wrong in (super_packet(GSO_UDP_L4, 129), super_packet(GSO_UDP_L4, 2, flags=0), super_packet(GSO_UDP_L4, 2, 0)):
        with pytest.raises(OSError, match="Invalid"):
            os.write(fd, wrong)


@takes_udp_super_packets
def test_a_device_that_is_down_refuses_a_good_super_packet_with_eio_and_a_bad_one_with_einval(
    ns: Namespace, undo: ExitStack
) -> None:
    """tun_get_user looks at the header first.  So tun.py can ask what the kernel takes without delivering anything."""
    fd = queue(ns, undo)
    for kind in (GSO_TCPV4, GSO_UDP_L4):
        with pytest.raises(OSError, match="Input/output") as refused:
            os.write(fd, super_packet(kind, 2))
        assert refused.value.errno == errno.EIO
    with pytest.raises(OSError, match="Invalid") as refused:
        os.write(fd, super_packet(GSO_UDP_L4, 129))
    assert refused.value.errno == errno.EINVAL


@pytest.mark.parametrize("protocol", [6, pytest.param(17, marks=takes_udp_super_packets)])
def test_a_super_packet_of_ipv6_is_cut_behind_options_but_not_behind_fragment_or_authentication_headers(
    ns: Namespace, undo: ExitStack, protocol: int
) -> None:
    """ipv6_gso_pull_exthdrs.  It is taken in any case, and what cannot be cut is lost on its way.

    TCP behind destination options or a routing header is cut by Linux 6.1 and 6.18.44, and lost by 6.12.118 and 7.3.4.
    """
    fd = queue(ns, undo)
    ns.ip("link set t0 up mtu 1400")
    ns.call(lambda: Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("1"))
    ns.ip("-6 route add default dev t0")
    # Each goes back out through the device that it came from.
    source, destination = "fd00:a::1", "fd00:b::1"
    differs = {0, 3} if protocol == 6 else {3}
    chains: dict[str, tuple[set[int], tuple[tuple[int, bytes], ...]]] = {
        "nothing": ({3}, ()),
        "hop-by-hop": ({3}, (options_header(HOP_BY_HOP),)),
        "destination": (differs, (options_header(HOP_BY_HOP), options_header(DESTINATION_OPTIONS))),
        "routing": (differs, (routing_header(4, 0),)),
        "fragment": ({0}, (fragment_header(),)),
        "authentication": ({0}, (authentication_header(),)),
    }
    make, offset, kind = (tcp_segment, 16, GSO_TCPV6) if protocol == 6 else (udp_segment, 6, GSO_UDP_L4)
    segment = make(source, destination, bytes(3000), check=PARTIAL)
    for name, (n_segments, headers) in chains.items():
        packet = ipv6(source, destination, segment, protocol=protocol, headers=headers)
        start = len(packet) - len(segment)
        header = vnet_hdr(
            flags=NEEDS_CSUM, gso_type=kind, hdr_len=len(packet) - 3000, gso_size=1000, start=start, offset=offset
        )
        os.write(fd, header + packet)
        sent = [read[HEADER:] for read in read_packets(fd) if destination_of(read[HEADER:]) == destination]
        assert len(sent) in n_segments, name
        assert {len(one) for one in sent} <= {len(packet) - 2000}, name


def test_a_kernel_that_encapsulates_hands_a_super_packet_over_whole_with_an_unfinished_checksum(
    ns: Namespace, undo: ExitStack
) -> None:
    """Over a virtual link, a datagram of kernel VXLAN reaches a socket longer than the MTU, and UDP_GRO says no size.

        t0 (super-packet written here) -> vxlan9 -> v0 ==== v1 [other namespace], a plain socket on the VXLAN's port

    decap.pxd takes an inner packet that covers the whole datagram for one super-packet, whatever UDP_GRO says, and a
    checksum that equals the pseudo-header's sum for unfinished.  Without that ping works and TCP never connects.
    """
    other = undo.enter_context(namespace())
    fd = queue(ns, undo)
    bring_up(ns)
    ns.ip(f"link add v0 type veth peer name v1 netns {other.name}")
    for place, link, address in ((ns, "v0", "203.0.113.1"), (other, "v1", "203.0.113.2")):
        place.ip(f"address add {address}/24 dev {link}")
        place.ip(f"link set {link} up")
    ns.ip("link add vxlan9 type vxlan id 9 dstport 4789 local 203.0.113.1 remote 203.0.113.2 dev v0 nolearning")
    ns.ip("link set vxlan9 mtu 1450 up")
    ns.ip(f"route add {BEYOND} dev vxlan9")
    ns.ip(f"neigh add {BEYOND} lladdr 02:00:00:00:00:09 dev vxlan9")
    ns.call(lambda: Path("/proc/sys/net/ipv4/ip_forward").write_text("1"))
    receiver = udp_socket(other, undo, ("203.0.113.2", 4789))
    receiver.setsockopt(socket.SOL_UDP, UDP_GRO, 1)

    content = bytes(range(256)) * 20
    packet = tcp(THERE, BEYOND, content, check=PARTIAL)
    header = vnet_hdr(flags=NEEDS_CSUM, gso_type=GSO_TCPV4, hdr_len=40, gso_size=1000, start=20, offset=16)
    os.write(fd, header + packet)
    datagram, control = b"", []
    while datagram[20:22] != b"\x08\x00":
        # EtherTypes other than IPv4: the kernel joins groups of IPv6 on the device, and says so through it.
        seconds_until(lambda: receiver.recv(1, socket.MSG_PEEK), 10)
        datagram, control, _flags, _source = receiver.recvmsg(1 << 16, 100)
    inner = datagram[8 + 14 :]
    assert len(inner) == len(packet) > 1450
    assert inner[40:] == content
    assert control == []
    pseudo = inner[12:20] + struct.pack("!HH", socket.IPPROTO_TCP, len(inner) - 20)
    assert int.from_bytes(inner[36:38]) == internet_sum(pseudo)
