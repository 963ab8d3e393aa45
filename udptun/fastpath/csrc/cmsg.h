/* The control messages of the datapath, in the form that sendmmsg and recvmmsg want: UDP offload (udp(7)) and the TOS of
 * the outer packet (ip(7)), which is the traffic class with IPv6 (RFC 3542 6.5). */
#ifndef UDPTUN_CMSG_H
#define UDPTUN_CMSG_H

#include <netinet/in.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>

#ifndef SOL_UDP
#define SOL_UDP 17
#endif
#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103 /* since Linux 4.18 */
#endif
#ifndef UDP_GRO
#define UDP_GRO 104 /* since Linux 5.0 */
#endif

/* Room for all that goes with a message, and for all that comes with one: IPv6's int needs no more than IPv4's byte. */
#define UT_SEND_CMSG_BYTES (CMSG_SPACE(sizeof(uint16_t)) + CMSG_SPACE(sizeof(int)))
#define UT_CMSG_BYTES (CMSG_SPACE(sizeof(int)) + CMSG_SPACE(sizeof(uint8_t)))

/* One more control message; `room` has UT_SEND_CMSG_BYTES, and the same room is given for each. */
static inline void ut_put_control(struct msghdr *message, void *room, int level, int type, const void *value, size_t n)
{
    struct cmsghdr *cmsg = (struct cmsghdr *)((uint8_t *)room + message->msg_controllen);

    cmsg->cmsg_level = level;
    cmsg->cmsg_type = type;
    cmsg->cmsg_len = CMSG_LEN(n);
    memcpy(CMSG_DATA(cmsg), value, n);
    message->msg_control = room;
    message->msg_controllen += CMSG_SPACE(n);
}

/* Ask the kernel to cut the message into datagrams of `size` bytes. */
static inline void ut_put_segment_size(struct msghdr *message, void *room, uint16_t size)
{
    ut_put_control(message, room, SOL_UDP, UDP_SEGMENT, &size, sizeof(size));
}

/* Have the message's packets carry this TOS and not the socket's; since Linux 3.13.  The message has its address. */
static inline void ut_put_tos(struct msghdr *message, void *room, int tos)
{
    if (((const struct sockaddr *)message->msg_name)->sa_family == AF_INET6)
        ut_put_control(message, room, IPPROTO_IPV6, IPV6_TCLASS, &tos, sizeof(tos));
    else
        ut_put_control(message, room, IPPROTO_IP, IP_TOS, &tos, sizeof(tos));
}

/* What the kernel says of a received message.  `segment_size`: of the datagrams that it has put together; 0: it is one
 * datagram.  `tos`: of the outer packets; 0 when the socket does not ask for it. */
static inline void ut_read_control(struct msghdr *message, int *segment_size, int *tos)
{
    *segment_size = *tos = 0;
    for (struct cmsghdr *cmsg = CMSG_FIRSTHDR(message); cmsg; cmsg = CMSG_NXTHDR(message, cmsg))
        if (cmsg->cmsg_level == SOL_UDP && cmsg->cmsg_type == UDP_GRO)
            memcpy(segment_size, CMSG_DATA(cmsg), sizeof(*segment_size));
        else if (cmsg->cmsg_level == IPPROTO_IP && cmsg->cmsg_type == IP_TOS)
            *tos = *CMSG_DATA(cmsg);
        else if (cmsg->cmsg_level == IPPROTO_IPV6 && cmsg->cmsg_type == IPV6_TCLASS)
            memcpy(tos, CMSG_DATA(cmsg), sizeof(*tos));
}

#endif
