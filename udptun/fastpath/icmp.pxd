# cython: cdivision=True
"""Tell the sender of a dropped packet why (ICMP errors; docs/wire-format.md, "ICMP that we send").

    offender    the packet that is dropped; the answer quotes it as it came, before our TTL step
    answer      an IPv4 packet from our tunnel address to the offender's source
                  IPv4 header, 20 bytes
                  0  ICMP type                     4  unused, 0
                  1  code                          6  MTU of the next hop (only "fragmentation needed", RFC 1191)
                  2  checksum                      8  the offender, as much as fits
    token       the right to send one answer; they come back at ICMP_PER_S a second, ICMP_BURST at most

Every answer that is called for is counted, as icmp_sent or icmp_suppressed.  What may not be answered takes no token.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from udptun.fastpath.loop cimport *
from udptun.fastpath.vxlan cimport put_prefix
from udptun.fastpath.wire cimport *

cdef enum:
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
    """Whether RFC 1122 3.2.2 allows an answer, and a token is left, which is taken.

    No answer is sent about an ICMP error, about a fragment but the first, or to what is no single host.
    """
    cdef const uint8_t *d = p.data
    cdef int header = ip_header_len(d), kind
    if is_martian(ip_source(d)) or ip_destination(d) >> 29 == 7:
        return False
    if ip_fragment_word(d) & FRAGMENT_MASK:
        return False
    if ip_protocol(d) == PROTO_ICMP:
        if p.len < header + ICMP_HEADER:
            return False
        kind = d[header]
        if kind != ICMP_ECHO and kind != ICMP_ECHO_REPLY and kind != ICMP_TIMESTAMP and kind != ICMP_TIMESTAMP_REPLY:
            return False
    return take_token(w)


cdef inline int build_icmp(Loop *w, const Packet *offender, int kind, int code, uint32_t mtu, int most) noexcept nogil:
    """Put the answer about `offender`, `most` bytes at most, into w.icmp at ICMP_ROOM, zeros before it.

    Returns its length, bytes.
    """
    cdef uint8_t *d = w.icmp + ICMP_ROOM
    cdef uint8_t *icmp = d + IPV4_HEADER_MIN
    cdef int quote = min(offender.len, most - IPV4_HEADER_MIN - ICMP_HEADER)
    cdef int total = IPV4_HEADER_MIN + ICMP_HEADER + quote
    memset(w.icmp, 0, ICMP_ROOM + IPV4_HEADER_MIN + ICMP_HEADER)
    d[0] = 0x45                   # version 4, a header of 5 words
    d[IP_TOS] = 0xC0              # internetwork control, RFC 1812 4.3.2.5
    store_be16(d + IP_TOTAL_LEN, total)
    d[IP_TTL] = 64
    d[IP_PROTOCOL] = PROTO_ICMP
    store_be32(d + IP_SOURCE, w.slot.tunnel_address)
    memcpy(d + IP_DESTINATION, offender.data + IP_SOURCE, 4)
    store_memory16(d + IP_CHECKSUM, ~ut_fold(ut_sum(d, IPV4_HEADER_MIN, 0)))
    icmp[0] = <uint8_t>kind
    icmp[1] = <uint8_t>code
    store_be16(icmp + 6, mtu)
    memcpy(icmp + ICMP_HEADER, offender.data, quote)
    store_memory16(icmp + 2, ~ut_fold(ut_sum(icmp, ICMP_HEADER + quote, 0)))
    return total


cdef inline void answer_local(Loop *w, const Packet *offender, int kind, int code, uint32_t mtu) noexcept nogil:
    """Answer a packet that came from our own kernel: through the TUN, back into it."""
    if may_answer(w, offender):
        send_local_answer(w, offender, kind, code, mtu)
    else:
        w.counters.icmp_suppressed += 1


cdef inline void send_local_answer(Loop *w, const Packet *offender, int kind, int code, uint32_t mtu) noexcept nogil:
    """The second half of `answer_local`, once `may_answer` has said yes."""
    cdef int n = build_icmp(w, offender, kind, code, mtu, ICMP_MAX)
    if write(w.tun_fd, w.icmp + ICMP_ROOM - w.vnet_len, w.vnet_len + n) >= 0:
        w.counters.icmp_sent += 1
    else:
        w.counters.icmp_suppressed += 1


cdef inline int longest_answer(const Packet *offender) noexcept nogil:
    """How long an answer over the underlay may be, bytes: no longer than its cause, so that nobody makes us a source of
    more than he sends.  The least that an answer has to quote goes before that (RFC 1122 3.2.2).
    """
    cdef int least = IPV4_HEADER_MIN + ICMP_HEADER + ip_header_len(offender.data) + ICMP_QUOTED
    return min(max(offender.len, least), <int>ICMP_MAX)


cdef inline void answer_peer(Loop *w, const Packet *offender, int kind, int code) noexcept nogil:
    """Answer a packet that came through the tunnel: back through it, to the peer that leases its source."""
    cdef msghdr message
    cdef iovec iov
    # check_source has found the peer.  Unless SourceCheck is off it has also seen that the packet came from there.
    if offender.peer != 0 and may_answer(w, offender):
        iov.iov_base = w.icmp + ICMP_ROOM - w.prefix_len
        iov.iov_len = w.prefix_len + build_icmp(w, offender, kind, code, 0, longest_answer(offender))
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
