/* A queue of a TUN device that is given up. */
#ifndef UDPTUN_QUEUE_H
#define UDPTUN_QUEUE_H

#include <linux/if.h>
#include <linux/if_tun.h>
#include <string.h>
#include <sys/ioctl.h>

/* Have the kernel give no more packets to the queue.  What waits in it is lost.  0 or -1. */
static inline int ut_detach_queue(int fd)
{
    struct ifreq request;

    memset(&request, 0, sizeof(request));
    request.ifr_flags = IFF_DETACH_QUEUE;
    return ioctl(fd, TUNSETQUEUE, &request);
}

#endif
