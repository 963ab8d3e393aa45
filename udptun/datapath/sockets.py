"""The UDP sockets of the tunnel: one a worker, all on the same address and port, and those that VXLAN is sent from.

A host may have a second set, of IPv6 beside those of IPv4, on the same port.  Each function works on sockets of one
family; those that take an address take it from that.
"""

from __future__ import annotations

import errno
import socket
import struct
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address

from udptun._fastpath import spread
from udptun._kabi import lib
from udptun.core.errors import KernelError
from udptun.core.family import Family
from udptun.core.network_state import IPAddress
from udptun.core.offload import ALL, Offload

_RECEIVE_BUFFER_BYTES = 8 << 20
"""Room for what arrives while no process reads: about 0.1 s at 60,000 small datagrams a second, each of which the
kernel counts as some 1.3 KiB."""


_SO_ATTACH_REUSEPORT_CBPF, _SO_MEMINFO, _SO_DETACH_REUSEPORT_BPF = 51, 55, 68
"""asm-generic/socket.h, since Linux 4.5, 4.12 and 5.3."""
_MEMINFO_RMEM_ALLOC, _MEMINFO_RCVBUF, _MEMINFO_DROPS = 0, 1, 8
"""SK_MEMINFO_* of linux/sock_diag.h."""
_SOCKET_FAMILY = {Family.IPV4: socket.AF_INET, Family.IPV6: socket.AF_INET6}
_TOLD_TOS = {
    socket.AF_INET: (socket.IPPROTO_IP, socket.IP_RECVTOS),
    socket.AF_INET6: (socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS),
}
_MTU_DISCOVER = {
    socket.AF_INET: (socket.IPPROTO_IP, lib.IP_MTU_DISCOVER),
    socket.AF_INET6: (socket.IPPROTO_IPV6, lib.IPV6_MTU_DISCOVER),
}
_MTU = {
    socket.AF_INET: (socket.IPPROTO_IP, lib.IP_MTU),
    socket.AF_INET6: (socket.IPPROTO_IPV6, lib.IPV6_MTU),
}
_DROP_ALL = struct.pack("=HBBI", 0x06, 0, 0, 0)
"""A program of classic BPF: return 0, which for a filter means no byte of the datagram."""


def open_sockets(address: IPAddress, port: int, n: int, wanted: Offload = ALL) -> list[socket.socket]:
    """`n` non-blocking sockets bound to the interface address; the caller owns them.  Raises KernelError.

    SPREAD in `wanted`: see `spread_over`.
    """
    opened = new_sockets(n, Family(address.version))
    try:
        bind_sockets(opened, address, port, wanted=wanted)
        if Offload.SPREAD in wanted:
            spread_over(opened)
    except BaseException:
        for udp in opened:
            udp.close()
        raise
    return opened


def new_sockets(n: int, family: Family, buffer_bytes: int = _RECEIVE_BUFFER_BYTES) -> list[socket.socket]:
    """`n` non-blocking sockets that nothing arrives in before `bind_sockets`; the caller owns them."""
    return [_new_socket(buffer_bytes, family) for _ in range(n)]


def bind_sockets(
    sockets: Sequence[socket.socket],
    address: IPAddress,
    port: int,
    beside: Sequence[socket.socket] = (),
    wanted: Offload = ALL,
) -> None:
    """Bind sockets of `new_sockets`.  Raises KernelError; the caller then closes them.

    `beside` are sockets of ours that have the port already.  With SPREAD in `wanted` these go on to get everything.
    Without it, or where the kernel cannot, all get their share at once.
    """
    if sockets:
        share_port(beside, among_several=True)
    try:
        if sockets and not beside:
            # With the option the first would bind beside a stranger, and without it no program can be attached to it.
            # So another one tries without, and makes way.
            with _new_socket(0, Family(address.version)) as alone:
                _bind(alone, address, port)
                port = alone.getsockname()[1]
        for udp in sockets:
            share_port([udp], among_several=True)
            _bind(udp, address, port)
            if beside and Offload.SPREAD in wanted:
                # Again with each: sockets of an earlier build become a group only when another one joins them.
                spread_over(beside)
        if len(beside) + len(sockets) == 1:
            share_port(sockets, among_several=False)
    except BaseException:
        share_port(beside, among_several=len(beside) > 1)
        raise


def spread_over(sockets: Sequence[socket.socket]) -> bool:
    """Have the kernel spread what comes to the port over these, the first of those that share it, and no others.

    By source address and port: what comes from one port always reaches the same socket, and so stays in order.
    False when the kernel cannot.
    """
    try:
        spread(sockets[0].fileno(), len(sockets))
    except OSError:
        return False
    return True


def share_port(sockets: Iterable[socket.socket], *, among_several: bool) -> None:
    """Have the kernel spread what comes to the port over our sockets, or keep the port for a single one.

    The kernel spreads datagrams only while the option is set, and lets nobody join without it.  While it is set, only
    processes of the same user can join, and we are root (net/ipv4/udp.c, udp_lib_lport_inuse).
    """
    for udp in sockets:
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, among_several)


def open_senders(address: IPAddress, n: int, beside: Sequence[socket.socket] = ()) -> list[socket.socket]:
    """`n` non-blocking sockets on ports that the kernel picks, for sending only; the caller owns them.

    Each inner flow leaves from one of them: the routers on the way and the peer's processors tell flows apart by the
    source port (RFC 7348 5).  The ports follow each other, and that of the last one `beside`, where they are free: then
    a receiver of ours spreads them evenly.  Nobody reads what comes to them.  Raises KernelError.
    """
    opened = new_sockets(n, Family(address.version), buffer_bytes=0)
    last = beside[-1] if beside else None
    try:
        for udp in opened:
            try:
                # 0: the kernel picks one.
                _bind(udp, address, 0 if last is None else (last.getsockname()[1] + 1) % 65536)
            except KernelError:
                _bind(udp, address, 0)
            last = udp
    except BaseException:
        for udp in opened:
            udp.close()
        raise
    return opened


def set_offload(sockets: Sequence[socket.socket], wanted: Offload) -> Offload:
    """Have the kernel put received datagrams together and tell their TOS if `wanted` says so; return what it grants.

    Only UDP_GRO, UDP_SEGMENT, SPREAD, STRANGER_FILTER and ECN concern sockets; the rest of `wanted` is not looked at.
    """
    granted = Offload(0)
    for udp in sockets:
        with suppress(OSError):
            udp.setsockopt(lib.SOL_UDP, lib.UDP_GRO, Offload.UDP_GRO in wanted)
            granted |= wanted & Offload.UDP_GRO
        with suppress(OSError):
            level, option = _TOLD_TOS[udp.family]
            udp.setsockopt(level, option, Offload.ECN in wanted)
            granted |= wanted & Offload.ECN
        with suppress(OSError):
            # This only asks whether the kernel knows it: the size goes with each message.
            udp.getsockopt(lib.SOL_UDP, lib.UDP_SEGMENT)
            granted |= wanted & Offload.UDP_SEGMENT
    if Offload.SPREAD not in wanted:
        with suppress(OSError):
            sockets[0].setsockopt(socket.SOL_SOCKET, _SO_DETACH_REUSEPORT_BPF, 0)
    elif len(sockets) == 1 or spread_over(sockets):
        granted |= Offload.SPREAD
        if Offload.STRANGER_FILTER in wanted and _takes_programs():
            granted |= Offload.STRANGER_FILTER
    return granted


def choose_socket(udp: socket.socket, program: bytes) -> None:
    """Have a program choose among the sockets on the port of `udp`, from now on.  Raises OSError."""
    _attach(udp, _SO_ATTACH_REUSEPORT_CBPF, program)


def open_sink(beside: socket.socket) -> socket.socket:
    """A socket that joins those on the port of `beside`, behind them, and drops what it gets; the caller owns it.

    Raises OSError.
    """
    sink = _new_socket(0, family_of(beside))
    try:
        _attach(sink, lib.SO_ATTACH_FILTER, _DROP_ALL)
        share_port([sink], among_several=True)
        sink.bind(beside.getsockname())
    except BaseException:
        sink.close()
        raise
    return sink


def leave_paths_to_us(sockets: Iterable[socket.socket]) -> None:
    """Have every datagram of IPv4 get DF, as flannel's do by default, and one too long for its device get EMSGSIZE.

    With IP_PMTUDISC_WANT the kernel would fragment it in silence.  With IP_PMTUDISC_DO it would refuse for 10 minutes
    what one ICMP error has said to be too long, whether that was true or not, or is any more.  `believed_mtus` says it.
    """
    for udp in sockets:
        level, option = _MTU_DISCOVER[udp.family]
        # IPv6 has the same numbers for its modes (linux/in6.h).
        udp.setsockopt(level, option, lib.IP_PMTUDISC_PROBE)


def believed_mtus(source: IPAddress, addresses: Iterable[IPAddress]) -> dict[IPAddress, int]:
    """How long outer packets to each address may be, in bytes, as the kernel believes.  All are of one family.

    By the device, by the route where it has an `mtu`, and by ICMP errors about datagrams of this host's sockets.
    Addresses without a route are left out.
    """
    found: dict[IPAddress, int] = {}
    family = _SOCKET_FAMILY[Family(source.version)]
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as udp, suppress(OSError):
        udp.bind((str(source), 0))
        for address in addresses:
            with suppress(OSError):
                # Only a connected socket can ask.  The port does not matter.
                udp.connect((str(address), 9))
                found[address] = udp.getsockopt(*_MTU[family])
    return found


def address_of(udp: socket.socket) -> tuple[IPAddress, int]:
    """The address and port that the socket is bound to."""
    address, port, *_ = udp.getsockname()
    return ip_address(address), port


def family_of(udp: socket.socket) -> Family:
    return Family.IPV4 if udp.family == socket.AF_INET else Family.IPV6


@dataclass(frozen=True, slots=True)
class ReceiveQueue:
    """What waits in a socket, and how much may, in bytes as the kernel counts them: with what it needs around a packet.

    `drops`: how many datagrams the socket has dropped, modulo 2**32: those that found no room, or failed a checksum.
    With a filter what the filter dropped, too.
    """

    waiting_bytes: int
    limit_bytes: int
    drops: int


def receive_queue(udp: socket.socket) -> ReceiveQueue:
    """Raises OSError."""
    info = udp.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 4 * (_MEMINFO_DROPS + 1))
    numbers = memoryview(info).cast("I")
    return ReceiveQueue(numbers[_MEMINFO_RMEM_ALLOC], numbers[_MEMINFO_RCVBUF], numbers[_MEMINFO_DROPS])


def n_drops(udp: socket.socket) -> int:
    """`ReceiveQueue.drops` of the socket."""
    return receive_queue(udp).drops


def _takes_programs() -> bool:
    """Whether the kernel lets a program choose a socket, and tells what a socket has dropped."""
    with _new_socket(0, Family.IPV4) as udp:
        share_port([udp], among_several=True)
        try:
            choose_socket(udp, _DROP_ALL)
            n_drops(udp)
        except OSError:
            return False
    return True


def _attach(udp: socket.socket, option: int, program: bytes) -> None:
    code = array("B", program)
    # struct sock_fprog.
    udp.setsockopt(socket.SOL_SOCKET, option, struct.pack("@HP", len(program) // 8, code.buffer_info()[0]))


def _new_socket(buffer_bytes: int, family: Family) -> socket.socket:
    udp = socket.socket(_SOCKET_FAMILY[family], socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    if family is Family.IPV6:
        # Otherwise no socket of IPv4 could have the port, and what comes by IPv4 would come here.
        udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    leave_paths_to_us([udp])
    try:
        udp.setsockopt(socket.SOL_SOCKET, lib.SO_RCVBUFFORCE, buffer_bytes)
    except PermissionError:
        # Without CAP_NET_ADMIN in the initial user namespace the system's limit applies.
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    return udp


def _bind(udp: socket.socket, address: IPAddress, port: int) -> None:
    try:
        udp.bind((str(address), port))
    except OSError as exc:
        what = f"cannot bind the tunnel's socket to {address} UDP port {port}"
        hint = {
            errno.EADDRINUSE: "`ss -ulpn` shows who has the port",
            errno.EACCES: "a port as low as this needs CAP_NET_BIND_SERVICE (net.ipv4.ip_unprivileged_port_start)",
        }.get(exc.errno or 0, "is the address still on the interface?")
        raise KernelError(what, exc.errno or 0, hint) from exc
