"""What the kernel does with UDP sockets of IPv6, where the datapath uses them as it does those of IPv4."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from namespace import KERNEL, Namespace, namespace, requires_netns, seconds_until
from udp_sockets import n_waiting

UDP_SEGMENT, UDP_GRO, SO_ATTACH_REUSEPORT_CBPF = 103, 104, 51
IPV6_MTU_DISCOVER, IPV6_MTU = 23, 24
IPV6_PMTUDISC_DONT, IPV6_PMTUDISC_DO, IPV6_PMTUDISC_PROBE = 0, 2, 3
LOAD_WORD, LOAD_HALF, MODULO_K, RETURN_A = 0x20, 0x28, 0x94, 0x16
NETWORK_HEADER = -0x100000
"""SKF_NET_OFF: where offsets into the IP header begin."""
Address = tuple[str, int]


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as undo:
        yield undo


def bound(
    undo: ExitStack, address: Address = ("::1", 0), *, shared: bool = False, v6only: bool = True
) -> socket.socket:
    udp = undo.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
    udp.setblocking(False)
    udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
    udp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
    udp.bind(address)
    return udp


def target_of(udp: socket.socket) -> Address:
    address, port, *_ = udp.getsockname()
    return address, port


def send_train(udp: socket.socket, address: Address, n_bytes: int, size: int) -> None:
    udp.sendmsg([bytes(n_bytes)], [(socket.SOL_UDP, UDP_SEGMENT, struct.pack("H", size))], 0, address)


# --- beside sockets of IPv4


def test_a_socket_of_ipv6_alone_has_the_port_beside_one_of_ipv4(undo: ExitStack) -> None:
    """Without IPV6_V6ONLY it is EADDRINUSE, as that socket would get what comes by IPv4 (ipv6_rcv_saddr_equal)."""
    ipv4 = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    ipv4.bind(("0.0.0.0", 0))
    port = ipv4.getsockname()[1]
    bound(undo, ("::", port))
    with pytest.raises(OSError) as refused:
        bound(undo, ("::", port), v6only=False)
    assert refused.value.errno == errno.EADDRINUSE


def test_a_program_of_the_ipv6_sockets_reads_their_headers_and_leaves_those_of_ipv4_alone(undo: ExitStack) -> None:
    """Each family has a group of its own (reuseport_add_sock): the source is at 8 to 23, and UDP's header at 40."""
    ipv4 = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    ipv4.setblocking(False)
    ipv4.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    ipv4.bind(("127.0.0.1", 0))
    port = ipv4.getsockname()[1]
    sockets = [bound(undo, ("::1", port), shared=True) for _ in range(3)]
    sources = [bound(undo) for _ in range(30)]

    def spread_by(load: int, offset: int) -> list[int]:
        program = ((load, NETWORK_HEADER + offset), (MODULO_K, 3), (RETURN_A, 0))
        code = b"".join(struct.pack("=HBBi", op, 0, 0, k) for op, k in program)
        memory = ctypes.create_string_buffer(code, len(code))
        fprog = struct.pack("@HP", len(program), ctypes.addressof(memory))
        sockets[0].setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, fprog)
        for source in sources:
            source.sendto(b"x", ("::1", port))
        return [n_waiting(udp) for udp in sockets]

    assert spread_by(LOAD_HALF, 40) == [sum(it.getsockname()[1] % 3 == i for it in sources) for i in range(3)]
    # ::1 has 1 in its last word and 0 in the others.
    assert [spread_by(LOAD_WORD, offset) for offset in (8, 12, 16)] == [[30, 0, 0]] * 3
    assert spread_by(LOAD_WORD, 20) == [0, 30, 0]
    sender = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    sender.sendto(b"x", ("127.0.0.1", port))
    assert n_waiting(ipv4) == 1


# --- trains, and the traffic class of the outer packet


@pytest.mark.skipif(KERNEL <= (5, 10), reason="needs Linux after 5.10: trains cross lo whole")
def test_a_train_arrives_whole_with_the_control_messages_of_ipv4_and_a_class_of_four_bytes(undo: ExitStack) -> None:
    """UDP_GRO is told first, and the class as an int (ip6_datagram_recv_specific_ctl), which a byte's room holds."""
    source, target = bound(undo), bound(undo)
    target.setsockopt(socket.SOL_UDP, UDP_GRO, 1)
    target.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, 1)
    control = [
        (socket.SOL_UDP, UDP_SEGMENT, struct.pack("H", 1000)),
        (socket.IPPROTO_IPV6, socket.IPV6_TCLASS, struct.pack("i", 3)),
    ]
    source.sendmsg([bytes(2500)], control, 0, target_of(target))
    source.sendto(bytes(10), target_of(target))
    room = socket.CMSG_SPACE(4) + socket.CMSG_SPACE(1)
    received = [target.recvmsg(65_536, room)[:3] for _ in range(2)]
    of_class = (socket.IPPROTO_IPV6, socket.IPV6_TCLASS)
    assert [(len(data), told, flags) for data, told, flags in received] == [
        (2500, [(socket.SOL_UDP, UDP_GRO, struct.pack("i", 1000)), (*of_class, struct.pack("i", 3))], 0),
        (10, [(*of_class, struct.pack("i", 0))], 0),
    ]


def test_a_train_may_be_as_long_as_the_datagram_that_it_is_until_it_is_cut(undo: ExitStack) -> None:
    """65,527 bytes: an IPv6 payload length does not count the header.  So what fits into IPv4's 65,507 fits here."""
    source, target = bound(undo), bound(undo)
    target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    send_train(source, target_of(target), 65_527, 1400)
    with pytest.raises(OSError) as refused:
        send_train(source, target_of(target), 65_528, 1400)
    assert refused.value.errno == errno.EMSGSIZE


# --- paths that are too narrow


def mode(udp: socket.socket, discover: int) -> socket.socket:
    udp.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, discover)
    return udp


@requires_netns
@pytest.mark.netns
def test_with_pmtudisc_probe_the_device_alone_says_how_long_a_datagram_may_be(undo: ExitStack) -> None:
    """ip6_setup_cork: neither the `mtu` of a route counts nor an ICMPv6 error, which the kernel still learns from.

    The error disturbs the socket, which is not connected, in nothing.  What is longer than the device gets EMSGSIZE,
    and leaves in fragments with IPV6_PMTUDISC_DONT.
    """
    near, router, far = (undo.enter_context(namespace()) for _ in range(3))
    for n, host in ((1, near), (2, far)):
        host.ip(f"link add e0 type veth peer name r{n} netns {router.name}")
        host.ip(f"address add fd00:{n}::2/64 dev e0 nodad")
        host.ip("link set e0 up")
        router.ip(f"address add fd00:{n}::1/64 dev r{n} nodad")
        router.ip(f"link set r{n} up")
        host.ip(f"route add default via fd00:{n}::1")
    router.call(lambda: Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("1"))
    router.ip("link set r2 mtu 1300")
    target = far.call(lambda: bound(undo, ("fd00:2::2", 0)))
    ours = mode(near.call(lambda: bound(undo, ("fd00:1::2", 0))), IPV6_PMTUDISC_PROBE)
    asking = mode(near.call(lambda: bound(undo, ("fd00:1::2", 0))), IPV6_PMTUDISC_DO)

    def believed() -> int:
        # A connected socket goes on to say what it said first.
        asking.connect(target_of(target))
        return asking.getsockopt(socket.IPPROTO_IPV6, IPV6_MTU)

    assert believed() == 1500
    ours.sendto(bytes(1452), target_of(target))
    seconds_until(lambda: believed() == 1300, 10)
    assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    router.ip("link set r2 mtu 1500")
    target.settimeout(10)
    ours.sendto(bytes(1452), target_of(target))
    send_train(ours, target_of(target), 2 * 1400, 1400)
    assert [len(target.recv(4000)) for _ in range(3)] == [1452, 1400, 1400]
    with pytest.raises(OSError) as refused:
        ours.sendto(bytes(1453), target_of(target))
    assert refused.value.errno == errno.EMSGSIZE
    mode(ours, IPV6_PMTUDISC_DONT).sendto(bytes(3000), target_of(target))
    assert len(target.recv(4000)) == 3000


@requires_netns
@pytest.mark.netns
def test_an_address_cannot_be_bound_before_the_kernel_knows_that_nobody_else_has_it(undo: ExitStack) -> None:
    """EADDRNOTAVAIL while duplicate address detection runs, about a second (inet6_bind, IFA_F_TENTATIVE)."""
    ns: Namespace = undo.enter_context(namespace())
    ns.ip("link add v0 type veth peer name v1")
    # Ten seconds: a busy machine may need more than one until it looks.
    ns.call(lambda: Path("/proc/sys/net/ipv6/conf/v0/dad_transmits").write_text("10"))
    ns.ip("link set v0 up")
    ns.ip("link set v1 up")
    ns.ip("address add fd00::1/64 dev v0")

    def bind() -> int:
        try:
            bound(undo, ("fd00::1", 0))
        except OSError as exc:
            return exc.errno or 0
        return 0

    assert ns.call(bind) == errno.EADDRNOTAVAIL
    # The rest of the ten transmits follow at once.
    ns.call(lambda: Path("/proc/sys/net/ipv6/neigh/v0/retrans_time_ms").write_text("10"))
    seconds_until(lambda: ns.call(bind) == 0, 30)


@pytest.mark.parametrize("domain", [socket.AF_INET, socket.AF_INET6])
def test_a_message_to_the_other_family_is_refused(undo: ExitStack, domain: int) -> None:
    """EAFNOSUPPORT or ENETUNREACH: a worker counts it as refused by the kernel, and nothing else happens."""
    libc = ctypes.CDLL(None, use_errno=True)
    udp = undo.enter_context(socket.socket(domain, socket.SOCK_DGRAM))
    if domain == socket.AF_INET6:
        udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        address = struct.pack("=H", socket.AF_INET) + struct.pack("!H4s8x", 9, bytes([127, 0, 0, 1]))
    else:
        address = struct.pack("=H", socket.AF_INET6) + struct.pack("!HI16sI", 9, 0, bytes(15) + b"\x01", 0)
    assert libc.sendto(udp.fileno(), b"x", 1, 0, address, len(address)) == -1
    assert ctypes.get_errno() in (errno.EAFNOSUPPORT, errno.ENETUNREACH), os.strerror(ctypes.get_errno())
