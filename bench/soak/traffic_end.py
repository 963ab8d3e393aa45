"""One end of a flow, run in a pod for hours: `python -I -S traffic_end.py ROLE ADDRESS PORT RATE`.

It prints "ready" when it is set up.  A line on its standard input asks what it has seen since the last one, and the
answer is one line of JSON (tcp-send has none to give).  The end of its standard input ends it.  RATE is packets/s of
udp-send, bytes/s of tcp-send.  Content is made from position and time of sending alone, so that the receiver can tell
every byte.  Times are CLOCK_MONOTONIC, nanoseconds; all pods have the same clock.
"""

import hashlib
import json
import select
import socket
import sys
import time

HEAD_BYTES = 16
"""Number and time of sending."""
DATAGRAM_BYTES = 256
BLOCK = 1 << 15
LOST_AFTER_NS = 500_000_000
"""A packet that a later one has overtaken by so much is lost."""
_SO_RCVBUFFORCE = 33


def datagram(number: int, at_ns: int) -> bytes:
    head = number.to_bytes(8, "big") + at_ns.to_bytes(8, "big")
    return head + hashlib.shake_128(head).digest(DATAGRAM_BYTES - HEAD_BYTES)


def stream_block(number: int) -> bytes:
    return hashlib.shake_128(number.to_bytes(8, "big")).digest(BLOCK)


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def asked(timeout_s: float) -> str | None:
    """A line from standard input: None when none comes in time, "" at its end."""
    return sys.stdin.readline() if select.select([sys.stdin], [], [], max(0.0, timeout_s))[0] else None


def send_udp(address: str, port: int, rate: float) -> None:
    sent = 0
    refused: dict[str, int] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        print("ready", flush=True)
        start = time.monotonic()
        while True:
            if (line := asked(start + sent / rate - time.monotonic())) is not None:
                if not line:
                    return
                say(sent=sent, refused=refused)
            # After a pause of the whole machine: the flow is late, not dense.
            start = max(start, time.monotonic() - sent / rate - 0.02)
            try:
                sock.sendto(datagram(sent, time.monotonic_ns()), (address, port))
            except OSError as exc:
                refused[str(exc.errno)] = refused.get(str(exc.errno), 0) + 1
            sent += 1


class Arrivals:
    """Tells from numbers and times which packets have been lost, doubled or overtaken."""

    def __init__(self) -> None:
        self.received = 0
        self.n_doubled = self.n_overtaken = self.n_spoilt = 0
        self._next = 0
        self._last_sent_ns = 0
        self._last_ns = 0
        self._longest_ns = 0
        self._missing: dict[int, tuple[int, int, int]] = {}
        """Number -> when the packets before and after the gap were sent, and when the gap was seen."""

    def take(self, data: bytes, now_ns: int) -> None:
        number, sent_ns = int.from_bytes(data[:8], "big"), int.from_bytes(data[8:HEAD_BYTES], "big")
        if data != datagram(number, sent_ns):
            self.n_spoilt += 1
            return
        self.received += 1
        if self._last_ns:
            self._longest_ns = max(self._longest_ns, now_ns - self._last_ns)
        self._last_ns = now_ns
        if number < self._next:
            if self._missing.pop(number, None) is None:
                self.n_doubled += 1
            else:
                self.n_overtaken += 1
            return
        for lost in range(self._next, number):
            self._missing[lost] = (self._last_sent_ns, sent_ns, now_ns)
        self._next = number + 1
        self._last_sent_ns = sent_ns

    def report(self, now_ns: int) -> dict[str, object]:
        """What has happened since the last report.  `lost`: [packets, sent after ns, sent before ns] for each gap."""
        gaps: dict[tuple[int, int], int] = {}
        for number, (after_ns, before_ns, seen_ns) in list(self._missing.items()):
            if now_ns - seen_ns > LOST_AFTER_NS:
                del self._missing[number]
                gaps[after_ns, before_ns] = gaps.get((after_ns, before_ns), 0) + 1
        facts = {
            "received": self.received,
            "lost": [[n, *between] for between, n in gaps.items()],
            "doubled": self.n_doubled,
            "overtaken": self.n_overtaken,
            "spoilt": self.n_spoilt,
            "longest_silence_ns": self._longest_ns,
        }
        self.n_doubled = self.n_overtaken = self.n_spoilt = self._longest_ns = 0
        return facts


def receive_udp(address: str, port: int, rate: float) -> None:
    arrivals = Arrivals()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        # Half a minute of the flow, for a machine that gives this process no time.
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 24)
        sock.bind((address, port))
        poller = select.poll()
        poller.register(sock, select.POLLIN)
        poller.register(sys.stdin, select.POLLIN)
        print("ready", flush=True)
        while True:
            events = dict(poller.poll())
            if sock.fileno() in events:
                arrivals.take(sock.recv(65536), time.monotonic_ns())
            elif sys.stdin.fileno() in events:
                # Only once there is nothing left to read.
                if not sys.stdin.readline():
                    return
                say(**arrivals.report(time.monotonic_ns()))


def send_tcp(address: str, port: int, rate: float) -> None:
    sent = 0
    with socket.create_connection((address, port), timeout=600) as sock:
        print("ready", flush=True)
        start = time.monotonic()
        while True:
            # It is not asked anything, as it may have to wait for the connection for a long time.
            if asked(start + sent / rate - time.monotonic()) is not None:
                return
            start = max(start, time.monotonic() - sent / rate - 0.1)
            sock.sendall(stream_block(sent // BLOCK))
            sent += BLOCK


def receive_tcp(address: str, port: int, rate: float) -> None:
    received = n_spoilt = longest_ns = 0
    block = b""
    with socket.create_server((address, port)) as server:
        print("ready", flush=True)
        connection, _ = server.accept()
    with connection:
        poller = select.poll()
        poller.register(connection, select.POLLIN)
        poller.register(sys.stdin, select.POLLIN)
        last = time.monotonic_ns()
        while True:
            events = dict(poller.poll())
            if sys.stdin.fileno() in events:
                if not sys.stdin.readline():
                    return
                # A silence that has not ended yet counts as long as it is.
                longest_ns = max(longest_ns, time.monotonic_ns() - last)
                say(received=received, spoilt=n_spoilt, longest_silence_ns=longest_ns)
                n_spoilt = longest_ns = 0
            if connection.fileno() in events:
                data = connection.recv(1 << 18)
                if not data:
                    raise SystemExit("the connection has ended")
                now = time.monotonic_ns()
                longest_ns, last = max(longest_ns, now - last), now
                block += data
                received += len(data)
                while len(block) >= BLOCK:
                    n_spoilt += block[:BLOCK] != stream_block((received - len(block)) // BLOCK)
                    block = block[BLOCK:]


ROLES = {"udp-send": send_udp, "udp-receive": receive_udp, "tcp-send": send_tcp, "tcp-receive": receive_tcp}

if __name__ == "__main__":
    role, address, port, rate = sys.argv[1:]
    ROLES[role](address, int(port), float(rate))
