/* One packet per system call: the loop that flannel's C proxy runs, written anew as a yardstick.
 *
 *     naive DEVICE LOCAL-ADDRESS PORT REMOTE-ADDRESS [SUBNET/LENGTH REMOTE-ADDRESS]...
 *
 * Makes the TUN device DEVICE (plain packets, no virtio header) and says "ready".  Then, until it is killed: a packet
 * read from DEVICE goes to REMOTE in one datagram, a datagram's payload goes to DEVICE.  The wire format is flannel's
 * udp backend: the inner IPv4 packet, nothing before or after it.  Each side takes one from the TTL, as flannel does.
 * The benches give it one peer, so that what a table costs is not in its figures.  Further ones, each with the subnet
 * behind it, are looked at one after the other, as flannel does, before the first.
 *
 * Errors of single packets are ignored (a full queue drops, as in flannel); everything else ends the program.
 */
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

enum { PACKET_MAX = 65536, IPV4_HEADER = 20, TTL = 8, CHECKSUM = 10, DESTINATION = 16, PEERS_MAX = 16 };

struct peer {
    uint32_t subnet, mask;
    struct sockaddr_in address;
};

static int open_tun(const char *device)
{
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    int tun = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);

    if (tun < 0)
        err(1, "cannot open /dev/net/tun");
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", device);
    if (ioctl(tun, TUNSETIFF, &request) < 0)
        err(1, "cannot make the TUN device %s", device);
    return tun;
}

static struct sockaddr_in address_of(const char *text, const char *port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};

    if (inet_pton(AF_INET, text, &address.sin_addr) != 1)
        errx(2, "%s is not an IPv4 address", text);
    return address;
}

static struct peer peer_of(char *subnet, const char *text, const char *port)
{
    char *length = strchr(subnet, '/');
    int bits = length ? atoi(length + 1) : 0;

    if (bits < 1 || bits > 32)
        errx(2, "%s is not a subnet", subnet);
    *length = 0;
    return (struct peer){ntohl(address_of(subnet, port).sin_addr.s_addr), ~0u << (32 - bits), address_of(text, port)};
}

/* Take one from the TTL and mend the header's checksum (RFC 1624, equation 3).  0 when the packet must not go on. */
static int step_ttl(unsigned char *packet, ssize_t len)
{
    uint16_t old, new, sum_be;
    uint32_t sum;

    if (len < IPV4_HEADER || packet[0] >> 4 != 4 || packet[TTL] <= 1)
        return 0;
    old = (uint16_t)(packet[TTL] << 8 | packet[TTL + 1]);
    packet[TTL]--;
    new = (uint16_t)(packet[TTL] << 8 | packet[TTL + 1]);
    memcpy(&sum_be, packet + CHECKSUM, 2);
    sum = (uint16_t)~ntohs(sum_be) + (uint32_t)(uint16_t)~old + new;
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum_be = htons((uint16_t)~sum);
    memcpy(packet + CHECKSUM, &sum_be, 2);
    return 1;
}

/* Nonzero when a packet was there. */
static int tun_to_udp(int tun, int udp, const struct peer *peer, unsigned char *packet)
{
    ssize_t len = read(tun, packet, PACKET_MAX);
    uint32_t destination;

    if (len < 0 && errno != EAGAIN)
        err(1, "cannot read from the TUN device");
    if (len > 0 && step_ttl(packet, len)) {
        memcpy(&destination, packet + DESTINATION, 4);
        /* The last one takes everything. */
        while ((ntohl(destination) & peer->mask) != peer->subnet)
            peer++;
        (void)!sendto(udp, packet, (size_t)len, 0, (const struct sockaddr *)&peer->address, sizeof peer->address);
    }
    return len > 0;
}

static int udp_to_tun(int tun, int udp, unsigned char *packet)
{
    ssize_t len = recv(udp, packet, PACKET_MAX, 0);

    if (len > 0 && step_ttl(packet, len))
        (void)!write(tun, packet, (size_t)len);
    return len > 0;
}

int main(int argc, char **argv)
{
    static unsigned char packet[PACKET_MAX];
    static struct peer peers[PEERS_MAX];
    struct sockaddr_in local;
    struct pollfd ready[2];
    int tun, udp, n = 0;

    if (argc < 5 || argc % 2 == 0 || argc > 5 + 2 * (PEERS_MAX - 1))
        errx(2, "usage: naive DEVICE LOCAL-ADDRESS PORT REMOTE-ADDRESS [SUBNET/LENGTH REMOTE-ADDRESS]...");
    local = address_of(argv[2], argv[3]);
    for (int i = 5; i < argc; i += 2)
        peers[n++] = peer_of(argv[i], argv[i + 1], argv[3]);
    peers[n] = (struct peer){.address = address_of(argv[4], argv[3])};
    udp = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (udp < 0 || bind(udp, (struct sockaddr *)&local, sizeof local) < 0)
        err(1, "cannot bind UDP %s:%s", argv[2], argv[3]);
    /* Last: whoever sees the device may rely on the rest. */
    tun = open_tun(argv[1]);
    puts("ready");
    fflush(stdout);
    ready[0] = (struct pollfd){.fd = tun, .events = POLLIN};
    ready[1] = (struct pollfd){.fd = udp, .events = POLLIN};
    for (;;) {
        int tun_had, udp_had;

        if (poll(ready, 2, -1) < 0 && errno != EINTR)
            err(1, "cannot wait for packets");
        /* As long as either has packets, both are tried without asking first. */
        do {
            tun_had = tun_to_udp(tun, udp, peers, packet);
            udp_had = udp_to_tun(tun, udp, packet);
        } while (tun_had || udp_had);
    }
}
