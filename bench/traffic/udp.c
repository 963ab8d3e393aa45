/* Both ends of the UDP workloads.
 *
 *     udp sink ADDRESS PORT                       count what `blast` sends; ends 300 ms after the last datagram
 *     udp blast ADDRESS PORT BYTES SECONDS        send datagrams of BYTES, unpaced, one per system call
 *     udp echo ADDRESS PORT                       send every datagram back, until killed
 *     udp pingpong ADDRESS PORT BYTES SECONDS     one datagram at a time there and back
 *
 * ADDRESS is where sink and echo listen.  They say "ready" when they do.  At its end sink prints
 *     received REORDERED-INCLUDED reordered COUNT first-to-last NANOSECONDS
 * blast prints "sent COUNT", pingpong one round-trip time a line in nanoseconds, then "lost COUNT".
 *
 * Receivers block in the kernel: none of the ends spins.  Nothing is batched (no sendmmsg, no segmentation offload), so
 * datagrams reach the tunnel as those of an ordinary program do.  Sequence numbers are in the machine's byte order.
 */
#include <err.h>
#include <errno.h>
#include <netdb.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { BYTES_MAX = 65507, RECEIVE_BUFFER = 4 << 20, WARM_UP = 100 };

/* A datagram that has not come back within this time is lost; so is, for sink, one after the end. */
static const struct timeval FIRST_WAIT = {.tv_sec = 20}, WAIT = {.tv_usec = 300000};

static unsigned char buffer[BYTES_MAX];

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static int open_socket(const char *address, const char *port, int listens)
{
    const struct addrinfo hints = {.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV, .ai_socktype = SOCK_DGRAM};
    struct addrinfo *there;
    int buffer_bytes = RECEIVE_BUFFER, udp;

    if (getaddrinfo(address, port, &hints, &there) != 0)
        errx(2, "%s and %s are not an IP address and a port", address, port);
    udp = socket(there->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (udp < 0)
        err(1, "cannot open a UDP socket");
    (void)setsockopt(udp, SOL_SOCKET, SO_RCVBUFFORCE, &buffer_bytes, sizeof buffer_bytes);
    if ((listens ? bind : connect)(udp, there->ai_addr, there->ai_addrlen) < 0)
        err(1, "cannot %s UDP %s port %s", listens ? "listen on" : "connect to", address, port);
    freeaddrinfo(there);
    return udp;
}

static void wait_at_most(int udp, const struct timeval *time)
{
    if (setsockopt(udp, SOL_SOCKET, SO_RCVTIMEO, time, sizeof *time) < 0)
        err(1, "cannot set a time limit");
}

static void sink(int udp)
{
    uint64_t n = 0, reordered = 0, next = 0, first = 0, last = 0, number;

    wait_at_most(udp, &FIRST_WAIT);
    while (recv(udp, buffer, sizeof buffer, 0) >= (ssize_t)sizeof number) {
        last = now_ns();
        if (n++ == 0) {
            first = last;
            wait_at_most(udp, &WAIT);
        }
        memcpy(&number, buffer, sizeof number);
        if (number < next)
            reordered++;
        else
            next = number + 1;
    }
    printf("received %llu reordered %llu first-to-last %llu\n", (unsigned long long)n, (unsigned long long)reordered,
           (unsigned long long)(last - first));
}

static void blast(int udp, size_t bytes, double seconds)
{
    uint64_t n = 0, end = now_ns() + (uint64_t)(seconds * 1e9);

    do {
        /* The clock costs a tenth of a send: it is read once in 32. */
        for (int i = 0; i < 32; i++) {
            memcpy(buffer, &n, sizeof n);
            if (send(udp, buffer, bytes, 0) >= 0)
                n++;
        }
    } while (now_ns() < end);
    printf("sent %llu\n", (unsigned long long)n);
}

static void echo(int udp)
{
    struct sockaddr_storage from;
    socklen_t size = sizeof from;
    ssize_t len;

    while ((len = recvfrom(udp, buffer, sizeof buffer, 0, (struct sockaddr *)&from, &size)) >= 0) {
        (void)!sendto(udp, buffer, (size_t)len, 0, (struct sockaddr *)&from, size);
        size = sizeof from;
    }
}

static void pingpong(int udp, size_t bytes, double seconds)
{
    uint64_t lost = 0, n = 0, end = now_ns() + (uint64_t)(seconds * 1e9), start, answer;

    wait_at_most(udp, &WAIT);
    do {
        start = now_ns();
        n++;
        memcpy(buffer, &n, sizeof n);
        answer = 0;
        if (send(udp, buffer, bytes, 0) < 0)
            err(1, "cannot send");
        /* What comes late belongs to a datagram that is lost already. */
        while (answer != n && recv(udp, buffer, sizeof buffer, 0) >= (ssize_t)sizeof answer)
            memcpy(&answer, buffer, sizeof answer);
        if (answer != n)
            lost++;
        else if (n > WARM_UP)
            printf("%llu\n", (unsigned long long)(now_ns() - start));
    } while (now_ns() < end);
    printf("lost %llu\n", (unsigned long long)lost);
}

int main(int argc, char **argv)
{
    int listens = argc == 4, udp;
    size_t bytes = 0;
    double seconds = 0;

    if (argc != 4 && argc != 6)
        errx(2, "usage: udp sink|echo ADDRESS PORT, udp blast|pingpong ADDRESS PORT BYTES SECONDS");
    udp = open_socket(argv[2], argv[3], listens);
    if (listens) {
        puts("ready");
        fflush(stdout);
    } else {
        bytes = strtoul(argv[4], NULL, 10);
        seconds = strtod(argv[5], NULL);
        if (bytes < sizeof(uint64_t) || bytes > sizeof buffer)
            errx(2, "datagrams have %zu to %zu bytes", sizeof(uint64_t), sizeof buffer);
    }
    if (strcmp(argv[1], "sink") == 0)
        sink(udp);
    else if (strcmp(argv[1], "echo") == 0)
        echo(udp);
    else if (strcmp(argv[1], "blast") == 0)
        blast(udp, bytes, seconds);
    else
        pingpong(udp, bytes, seconds);
    return 0;
}
