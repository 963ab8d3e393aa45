"""Probes to peers whose packets the kernel carries leave from a socket of this host.

It is an ICMP datagram socket (SOCK_DGRAM with IPPROTO_ICMP or IPPROTO_ICMPV6), as ping has it.  The kernel chooses the
id, computes the checksums, and hands over the replies with that id and nothing else.  It needs no capability; a raw
socket needs CAP_NET_RAW, and is woken by every ICMP packet of the host.  But net.ipv4.ping_group_range has to name one
of our groups, for ICMPv6 too, which not even root's capabilities replace.

IP_PMTUDISC_PROBE sets DF and has the kernel send whatever the device takes, also when it believes the path narrower.
With IPV6_PMTUDISC_PROBE, too, it refuses what the device does not take, and fragments nothing.
ICMP errors are not looked at: anybody can make one up.  A probe has passed when its nonce has come back.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from collections.abc import Collection, Mapping
from ipaddress import ip_address

from udptun._kabi import lib
from udptun.core.echo import MIN_LENGTH, echo_message, parse_echo_reply_message
from udptun.core.family import Family
from udptun.core.network_state import IPAddress, IPNetwork
from udptun.probing.carrier import Fate, Take

_RETRY_S = 10.0
"""The setting may be changed at any time."""
_MOST_READ = 64
"""Answers at once.  Other tasks shall have their turn."""


class HostCarrier:
    """See `Carrier`.  Nothing comes of what is found but what is shown: the kernel carries the packets.

    `device` is the one that they go through; None: they go through the underlay's as they are.  All peers are asked by
    `family`.
    """

    def __init__(self, device: str | None, family: Family) -> None:
        self._device = device
        self._family = family
        self._socket: socket.socket | None = None
        self._obstacle: str | None = None
        self._try_at_s = float("-inf")

    def listen(self, take: Take) -> None:
        self._take = take

    def close(self) -> None:
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None

    def obstacle(self) -> str | None:
        if self._socket is None and time.monotonic() >= self._try_at_s:
            self._try_at_s = time.monotonic() + _RETRY_S
            try:
                self._socket = _open_socket(self._family)
            except OSError as exc:
                self._obstacle = _why_not(exc)
            else:
                self._obstacle = None
                asyncio.get_running_loop().add_reader(self._socket, self.poll)
        return self._obstacle

    def poll(self) -> None:
        if self._socket is None:
            return
        for _ in range(_MOST_READ):
            try:
                message, (source, *_) = self._socket.recvfrom(MIN_LENGTH)
            except OSError:
                return
            now_ns = time.monotonic_ns()
            nonce = parse_echo_reply_message(message, self._family.value)
            if nonce is not None:
                self._take(nonce, ip_address(source), now_ns)

    def add(self, peer: IPNetwork) -> bool:
        return True

    def remove(self, peer: IPNetwork) -> None:
        """Nothing was set for it."""

    def traffic(self) -> Mapping[IPNetwork, tuple[int, int]]:
        """The kernel counts packets by device, not by peer."""
        return {}

    def send(self, address: IPAddress, nonce: bytes, length: int) -> _Sent | None:
        if self._socket is None:
            return None
        at_ns = time.monotonic_ns()
        try:
            self._socket.sendto(echo_message(nonce, length, address.version), (str(address), 0))
        except OSError as exc:
            # Others: no route, no room, a rule of nftables.  That says nothing about the peer.
            return _Sent(Fate(has_left=False, is_too_long=exc.errno == errno.EMSGSIZE))
        return _Sent(Fate(has_left=True, at_ns=at_ns))

    def set_dead(self, peer: IPNetwork, *, is_dead: bool) -> None:
        """The kernel goes on sending."""

    def set_path_mtu(self, peer: IPNetwork, mtu: int) -> None:
        """The kernel goes by what it has learnt itself."""

    def believed_mtus(self, hosts: Collection[IPAddress]) -> Mapping[IPAddress, int]:
        """The kernel itself goes by what it believes."""
        return {}

    async def route_mtus(self, hosts: Collection[IPAddress]) -> Mapping[IPAddress, int]:
        return {}

    async def publish(self) -> None: ...

    def dead_line(self, host: str, since: str) -> str:
        carried = "the pods' packets" if self._device is None else f"the packets of {self._device}"
        return (
            f"{host} has answered and does not any more, its last answer came at {since}; packets to its pods are sent "
            "as before; is it up, does it still answer pings, and does the network between the two hosts carry "
            f"{carried}?"
        )

    def narrow_line(self, host: str, mtu: int, full: int) -> str:
        less = full - mtu
        lower = "interfaces with an MTU" if self._device is None else "a Backend.MTU"
        return (
            f"the path to {host} takes packets of {mtu} bytes, {less} fewer than pods may send; longer ones do not "
            f"arrive; have all hosts use {lower} that is {less} lower, or mend the path"
        )


class _Sent:
    """See `Sent`.  All is known at once."""

    __slots__ = ("_fate",)

    def __init__(self, fate: Fate) -> None:
        self._fate = fate

    def fate(self) -> Fate:
        return self._fate


def _open_socket(family: Family) -> socket.socket:
    """Raises OSError."""
    kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
    if family is Family.IPV4:
        found = socket.socket(socket.AF_INET, kind, socket.IPPROTO_ICMP)
        found.setsockopt(socket.IPPROTO_IP, lib.IP_MTU_DISCOVER, lib.IP_PMTUDISC_PROBE)
        return found
    found = socket.socket(socket.AF_INET6, kind, socket.IPPROTO_ICMPV6)
    # IPV6_PMTUDISC_PROBE is the same number.
    found.setsockopt(socket.IPPROTO_IPV6, lib.IPV6_MTU_DISCOVER, lib.IP_PMTUDISC_PROBE)
    return found


def _why_not(exc: OSError) -> str:
    what = f"cannot open an ICMP datagram socket ({errno.errorcode.get(exc.errno or 0, exc.errno)})"
    if exc.errno != errno.EACCES:
        return what
    return (
        f"{what}: group {os.getegid()} of the daemon is not in net.ipv4.ping_group_range; run "
        "`sysctl -w net.ipv4.ping_group_range='0 2147483647'`, as systemd sets it by default"
    )
