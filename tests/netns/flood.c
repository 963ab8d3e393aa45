/* flood SOURCE TARGET PORT PACKETS_PER_S: datagrams of 64 bytes, 32 a system call, until killed. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>

enum { BURST = 32, BYTES = 64 };

int main(int argc, char **argv)
{
    static char payload[BYTES];
    struct iovec data = {payload, sizeof(payload)};
    struct sockaddr_in source = {.sin_family = AF_INET}, target = {.sin_family = AF_INET};
    struct mmsghdr burst[BURST] = {0};
    struct timespec due;
    int fd = socket(AF_INET, SOCK_DGRAM, 0), i;

    if (argc != 5 || !inet_aton(argv[1], &source.sin_addr) || !inet_aton(argv[2], &target.sin_addr))
        return 2;
    target.sin_port = htons((uint16_t)atoi(argv[3]));
    for (i = 0; i < BURST; i++) {
        burst[i].msg_hdr.msg_iov = &data;
        burst[i].msg_hdr.msg_iovlen = 1;
    }
    if (bind(fd, (struct sockaddr *)&source, sizeof(source)) || connect(fd, (struct sockaddr *)&target, sizeof(target)))
        return perror("flood"), 1;
    clock_gettime(CLOCK_MONOTONIC, &due);
    for (;;) {
        sendmmsg(fd, burst, BURST, 0);
        due.tv_nsec += 1000000000L / atoi(argv[4]) * BURST;
        if (due.tv_nsec >= 1000000000L) {
            due.tv_nsec -= 1000000000L;
            due.tv_sec++;
        }
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL);
    }
}
