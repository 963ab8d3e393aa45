"""What the kernel does with ICMPv6 datagram sockets, where probes of hosts leave from them."""

from __future__ import annotations

import errno
import socket
import struct
from pathlib import Path

import pytest
from namespace import namespace, requires_netns

IPV6_MTU_DISCOVER, IPV6_PMTUDISC_DONT, IPV6_PMTUDISC_PROBE = 23, 0, 3
ECHO_REQUEST = 128


@requires_netns
@pytest.mark.netns
def test_with_pmtudisc_probe_an_echo_is_as_long_as_the_device_takes_and_never_fragmented() -> None:
    """EMSGSIZE beyond that without IPV6_DONTFRAG (__ip6_append_data), while the `mtu` of the route does not count.

    With IPV6_PMTUDISC_DONT the same echo is taken, and leaves in fragments.
    """
    with namespace() as ns:
        ns.ip("link add v0 mtu 1400 type veth peer name v1")
        ns.ip("address add fd00::1/64 dev v0 nodad")
        ns.ip("link set v0 up")
        ns.ip("link set v1 up")
        ns.ip("route add fd00:1::/64 dev v0 mtu 1300")
        ns.call(lambda: Path("/proc/sys/net/ipv4/ping_group_range").write_text("0 2147483647"))
        with ns.call(lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM, socket.IPPROTO_ICMPV6)) as icmp:

            def send(length: int) -> int:
                """An IPv6 packet of so many bytes."""
                return icmp.sendto(struct.pack("!BxHHH", ECHO_REQUEST, 0, 0, 1) + bytes(length - 48), ("fd00:1::2", 0))

            icmp.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, IPV6_PMTUDISC_PROBE)
            assert send(1400) == 1360
            with pytest.raises(OSError) as refused:
                send(1401)
            assert refused.value.errno == errno.EMSGSIZE
            icmp.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, IPV6_PMTUDISC_DONT)
            assert send(3000) == 2960
