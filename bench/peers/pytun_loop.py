"""A first tunnel in Python to compare with: python-pytun, select, one packet at a time.

    python pytun_loop.py DEVICE LOCAL-ADDRESS PORT REMOTE-ADDRESS

Like naive.c it makes DEVICE, says "ready" and speaks flannel's udp wire format with one peer, until it is killed.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import sys

from pytun import IFF_NO_PI, IFF_TUN, TunTapDevice

_PACKET_MAX = 65536
_IPV4_HEADER = 20


def step_ttl(packet: bytearray) -> bool:
    """Take one from the TTL and update the header's checksum (RFC 1624, equation 3).  False: drop the packet."""
    if len(packet) < _IPV4_HEADER or packet[0] >> 4 != 4 or packet[8] <= 1:
        return False
    checksum, old = struct.unpack_from("!H", packet, 10)[0], packet[8] << 8 | packet[9]
    packet[8] -= 1
    total = (~checksum & 0xFFFF) + (~old & 0xFFFF) + (packet[8] << 8 | packet[9])
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    struct.pack_into("!H", packet, 10, ~total & 0xFFFF)
    return True


def main(device: str, local: str, port: int, remote: str) -> None:
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind((local, port))
    udp.setblocking(False)
    # The device comes last: whoever sees it may rely on the socket.
    tun = TunTapDevice(name=device, flags=IFF_TUN | IFF_NO_PI)
    os.set_blocking(tun.fileno(), False)
    print("ready", flush=True)
    while True:
        for ready in select.select([tun, udp], [], [])[0]:
            try:
                if ready is tun:
                    packet = bytearray(tun.read(_PACKET_MAX))
                    if step_ttl(packet):
                        udp.sendto(packet, (remote, port))
                else:
                    packet = bytearray(udp.recv(_PACKET_MAX))
                    if step_ttl(packet):
                        tun.write(bytes(packet))
            except OSError:
                # A full queue or an unreachable peer drops the packet, as in flannel.
                continue


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
