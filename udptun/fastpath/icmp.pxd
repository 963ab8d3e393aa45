# cython: cdivision=True
"""Tell the sender of a dropped packet why (ICMP and ICMPv6 errors; docs/wire-format.md, "ICMP that we send").

    offender    the packet that is dropped; the answer quotes it as it came, before our TTL step
    answer      a packet of the offender's family, from our tunnel address to the offender's source
                  IP header, 20 bytes, or 40 of IPv6
                  0  type                          4  MTU of the next hop, only of "too big" (RFC 1191, RFC 4443 3.2)
                  1  code                          8  the offender, as much as fits
                  2  checksum
    reason      type and code of ICMP, type and code of ICMPv6: a byte each, from the upper one
    token       the right to send one answer; they come back at ICMP_PER_S a second, ICMP_BURST at most

Every answer that is called for is counted, as icmp_sent or icmp_suppressed.  What may not be answered takes no token.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from udptun.fastpath.loop cimport *
from udptun.fastpath.vxlan cimport put_prefix
from udptun.fastpath.wire cimport *

cdef enum:
    NO_ROUTE = 0x03000100
    PEER_IS_DEAD = 0x03010103
    TOO_BIG = 0x03040200
    TTL_EXCEEDED = 0x0b000300
    ICMP_QUOTED = 8               # bytes behind the IP header of what is quoted, at least
    ICMP_PER_S = 1000
    ICMP_BURST = 50
    NS_PER_S = 1000000000
    NS_PER_TOKEN = NS_PER_S // ICMP_PER_S


cdef inline bint take_token(Loop *w) noexcept nogil:
    cdef timespec now
    cdef uint64_t now_ns, earned
    clock_gettime(CLOCK_MONOTONIC, &now)
    now_ns = <uint64_t>now.tv_sec * NS_PER_S + <uint64_t>now.tv_nsec
    earned = (now_ns - w.icmp_refilled_ns) // NS_PER_TOKEN
    if earned:
        w.icmp_tokens = <long>min(<uint64_t>w.icmp_tokens + earned, <uint64_t>ICMP_BURST)
        w.icmp_refilled_ns += earned * NS_PER_TOKEN
    if w.icmp_tokens == 0:
        return False
    w.icmp_tokens -= 1
    return True


cdef inline bint may_answer(Loop *w, const Packet *p) noexcept nogil:
    """Whether RFC 1122 3.2.2 or RFC 4443 2.4(e) allows an answer, and a token is left, which is taken.

    No answer is sent about an ICMP error, about a fragment but the first, or to what is no single host.
    """
    cdef int kind
    if is_martian(p, source_of(p)) or is_multicast(p, destination_of(p)):
        return False
    if p.is_later_fragment or p.protocol == UNKNOWN_PROTOCOL:
        return False
    if p.protocol == (PROTO_ICMPV6 if p.is_ipv6 else PROTO_ICMP):
        if not is_icmp(p):
            return False
        kind = p.data[p.header]
        if p.is_ipv6:
            if kind < ICMPV6_ECHO or kind == ICMPV6_REDIRECT:
                return False
        elif kind != ICMP_ECHO and kind != ICMP_ECHO_REPLY and kind != ICMP_TIMESTAMP and kind != ICMP_TIMESTAMP_REPLY:
            return False
    return take_token(w)


cdef inline int build_icmp(Loop *w, const Packet *offender, uint32_t reason, uint32_t mtu, int most) noexcept nogil:
    """Put the answer about `offender`, `most` bytes at most, into w.icmp at ICMP_ROOM, zeros before it.

    Returns its length, bytes.
    """
    cdef Packet p
    cdef uint8_t *icmp
    cdef int quote
    p.data = w.icmp + ICMP_ROOM
    p.is_ipv6 = offender.is_ipv6
    p.header = IPV6_HEADER if p.is_ipv6 else IPV4_HEADER_MIN
    p.protocol = PROTO_ICMPV6 if p.is_ipv6 else PROTO_ICMP
    quote = min(offender.len, most - p.header - ICMP_HEADER)
    p.len = p.header + ICMP_HEADER + quote
    memset(w.icmp, 0, ICMP_ROOM + p.header + ICMP_HEADER)
    write_ip_header(w.slot, &p, source_of(offender))
    icmp = p.data + p.header
    icmp[0] = <uint8_t>(reason >> 8 if p.is_ipv6 else reason >> 24)
    icmp[1] = <uint8_t>(reason if p.is_ipv6 else reason >> 16)
    store_be32(icmp + 4, mtu)
    memcpy(icmp + ICMP_HEADER, offender.data, quote)
    if p.is_ipv6:
        store_memory16(icmp + 2, ~ut_fold(ut_sum(icmp, ICMP_HEADER + quote, pseudo_sum(&p))))
    else:
        store_memory16(icmp + 2, ~ut_fold(ut_sum(icmp, ICMP_HEADER + quote, 0)))
    return p.len


cdef inline void write_ip_header(const ut_slot *table, const Packet *p, const uint8_t *destination) noexcept nogil:
    """Of an answer, in memory that is zero, from our tunnel address.  Internetwork control (RFC 1812 4.3.2.5)."""
    cdef uint8_t *d = p.data
    if p.is_ipv6:
        d[0] = 0x6C               # version 6, traffic class 0xC0
        store_be16(d + IPV6_PAYLOAD_LEN, p.len - IPV6_HEADER)
        d[IPV6_NEXT_HEADER] = PROTO_ICMPV6
        d[IPV6_HOP_LIMIT] = 64
        memcpy(d + IPV6_SOURCE, &table.tunnel_address_ipv6, sizeof(ut_address))
        memcpy(d + IPV6_DESTINATION, destination, sizeof(ut_address))
        return
    d[0] = 0x45                   # version 4, a header of 5 words
    d[IP_TOS] = 0xC0
    store_be16(d + IP_TOTAL_LEN, p.len)
    d[IP_TTL] = 64
    d[IP_PROTOCOL] = PROTO_ICMP
    store_be32(d + IP_SOURCE, table.tunnel_address)
    memcpy(d + IP_DESTINATION, destination, 4)
    store_memory16(d + IP_CHECKSUM, ~ut_fold(ut_sum(d, IPV4_HEADER_MIN, 0)))


cdef inline int most_of(const Packet *offender) noexcept nogil:
    """Bytes of the longest answer about it."""
    return ICMPV6_MAX if offender.is_ipv6 else ICMP_MAX


cdef inline void answer_local(Loop *w, const Packet *offender, uint32_t reason, uint32_t mtu) noexcept nogil:
    """Answer a packet that came from our own kernel: through the TUN, back into it."""
    if may_answer(w, offender):
        send_local_answer(w, offender, reason, mtu)
    else:
        w.counters.icmp_suppressed += 1


cdef inline void send_local_answer(Loop *w, const Packet *offender, uint32_t reason, uint32_t mtu) noexcept nogil:
    """The second half of `answer_local`, once `may_answer` has said yes."""
    cdef int n = build_icmp(w, offender, reason, mtu, most_of(offender))
    if write(w.tun_fd, w.icmp + ICMP_ROOM - w.vnet_len, w.vnet_len + n) >= 0:
        w.counters.icmp_sent += 1
    else:
        w.counters.icmp_suppressed += 1


cdef inline int longest_answer(const Packet *offender) noexcept nogil:
    """How long an answer over the underlay may be, bytes: no longer than its cause, so that nobody makes us a source of
    more than he sends.  The least that an answer has to quote goes before that (RFC 1122 3.2.2): the IP header, without
    extension headers, and ICMP_QUOTED bytes.
    """
    cdef int header = IPV6_HEADER if offender.is_ipv6 else ip_header_len(offender.data)
    cdef int least = (IPV6_HEADER if offender.is_ipv6 else IPV4_HEADER_MIN) + ICMP_HEADER + header + ICMP_QUOTED
    return min(max(offender.len, least), most_of(offender))


cdef inline void answer_peer(Loop *w, const Packet *offender, uint32_t reason) noexcept nogil:
    """Answer a packet that came through the tunnel: back through it, to the peer that leases its source."""
    cdef msghdr message
    cdef iovec iov
    # check_source has found the peer.  Unless SourceCheck is off it has also seen that the packet came from there.
    if offender.peer != 0 and may_answer(w, offender):
        iov.iov_base = w.icmp + ICMP_ROOM - w.prefix_len
        iov.iov_len = w.prefix_len + build_icmp(w, offender, reason, 0, longest_answer(offender))
        put_prefix(w, offender.peer, <uint8_t *>iov.iov_base)
        memset(&message, 0, sizeof(msghdr))
        message.msg_name = <void *>&remote_of(w.slot, offender.peer).where
        message.msg_namelen = remote_of(w.slot, offender.peer).where_len
        message.msg_iov = &iov
        message.msg_iovlen = 1
        if sendmsg(own_socket(w, remote_of(w.slot, offender.peer)), &message, MSG_DONTWAIT) >= 0:
            w.counters.icmp_sent += 1
            return
    w.counters.icmp_suppressed += 1
