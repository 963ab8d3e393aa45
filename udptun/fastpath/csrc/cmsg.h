/* The two control messages of UDP offload, in the form that sendmmsg and recvmmsg want (udp(7)). */
#ifndef UDPTUN_CMSG_H
#define UDPTUN_CMSG_H

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

#define UT_CMSG_BYTES CMSG_SPACE(sizeof(int))

/* Ask the kernel to cut the message into datagrams of `size` bytes; `room` has UT_CMSG_BYTES. */
static inline void ut_put_segment_size(struct msghdr *message, void *room, uint16_t size)
{
    struct cmsghdr *cmsg = (struct cmsghdr *)room;

    cmsg->cmsg_level = SOL_UDP;
    cmsg->cmsg_type = UDP_SEGMENT;
    cmsg->cmsg_len = CMSG_LEN(sizeof(size));
    memcpy(CMSG_DATA(cmsg), &size, sizeof(size));
    message->msg_control = room;
    message->msg_controllen = CMSG_SPACE(sizeof(size));
}

/* Size of the datagrams that the kernel has put together in a received message; 0: it is one datagram. */
static inline int ut_segment_size(struct msghdr *message)
{
    for (struct cmsghdr *cmsg = CMSG_FIRSTHDR(message); cmsg; cmsg = CMSG_NXTHDR(message, cmsg))
        if (cmsg->cmsg_level == SOL_UDP && cmsg->cmsg_type == UDP_GRO) {
            int size;
            memcpy(&size, CMSG_DATA(cmsg), sizeof(size));
            return size;
        }
    return 0;
}

#endif
