"""One end of a test flow, run in a pod: `python -I -S traffic_end.py ROLE ADDRESS PORT RATE`.

Every end prints "ready" when it is set up, goes on until its standard input says so, and prints what it saw as one
line of JSON.  RATE is packets/s of udp-send, bytes/s of tcp-send, and not used by the receiving ends.  Content is made
from position alone, so that the receiver can tell every byte.  Times are CLOCK_MONOTONIC, nanoseconds.

The tests start some hundreds of these.  `json`, `random` and `socket` would take longer to import than the interpreter
to start.
"""

import _random
import _socket
import select
import sys
import time

SEQUENCE_BYTES = 8
DATAGRAM_BYTES = 256
BLOCK = 1 << 15
PLACES = 1 << 16
NOISE = _random.Random(1).getrandbits(8 * (PLACES + BLOCK)).to_bytes(PLACES + BLOCK, "big")
PRIME = 40503
TIMEOUT_S = 60.0
_SO_RCVBUFFORCE = 33


def noise(number: int, length: int) -> bytes:
    """Bytes by chance, the same for the same number.  Those of the next 65,535 numbers begin elsewhere in NOISE."""
    place = number * PRIME % PLACES
    return NOISE[place : place + length]


def content(sequence: int) -> bytes:
    """The datagram with this number: the number, and bytes that depend on it."""
    return sequence.to_bytes(SEQUENCE_BYTES, "big") + noise(sequence, DATAGRAM_BYTES - SEQUENCE_BYTES)


def stream_block(number: int) -> bytes:
    return noise(number, BLOCK)


def new_socket(address: str, kind: int) -> _socket.socket:
    return _socket.socket(_socket.AF_INET6 if ":" in address else _socket.AF_INET, kind)


def ready() -> None:
    print("ready", flush=True)


def told(timeout_s: float) -> str:
    """A line from standard input, "" when none comes in time."""
    return sys.stdin.readline() if select.select([sys.stdin], [], [], max(0.0, timeout_s))[0] else ""


def report(**facts: int | list[int]) -> None:
    """Numbers and lists of numbers are JSON as Python shows them."""
    print("{" + ", ".join(f'"{name}": {value}' for name, value in facts.items()) + "}", flush=True)


def send_udp(address: str, port: int, rate: float, n_ports: int = 1) -> None:
    """Send at `rate` until told to stop, from so many ports in turn.

    A refused send is counted by its errno and not repeated.
    """
    refused: dict[int, int] = {}
    sent = 0
    sockets = [new_socket(address, _socket.SOCK_DGRAM) for _ in range(n_ports)]
    ready()
    start = time.monotonic()
    while True:
        if told(start + sent / rate - time.monotonic()):
            break
        # After a pause of the whole machine: the flow is late, not dense.
        start = max(start, time.monotonic() - sent / rate - 0.02)
        try:
            sockets[sent % n_ports].sendto(content(sent), (address, port))
        except OSError as exc:
            number = exc.errno or 0
            refused[number] = refused.get(number, 0) + 1
        sent += 1
    report(sent=sent, errnos=list(refused), refused=list(refused.values()))


def send_udp_from_many(address: str, port: int, rate: float) -> None:
    """As many flows: the kernel spreads them over the queues of the device."""
    send_udp(address, port, rate, n_ports=32)


def receive_udp(address: str, port: int, rate: float) -> None:
    """Take down what arrives.  The line on standard input says how many were sent: wait for them or for silence."""
    numbers: list[int] = []
    times: list[int] = []
    n_spoilt = 0
    expected: int | None = None
    sock = new_socket(address, _socket.SOCK_DGRAM)
    sock.setsockopt(_socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 24)
    sock.bind((address, port))
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    poller.register(sys.stdin, select.POLLIN)
    ready()
    while expected is None or len(numbers) < expected:
        events = dict(poller.poll(None if expected is None else 1000))
        if not events:
            break
        if sock.fileno() in events:
            data = sock.recv(65536)
            numbers.append(int.from_bytes(data[:SEQUENCE_BYTES], "big"))
            times.append(time.monotonic_ns())
            n_spoilt += data != content(numbers[-1])
        if sys.stdin.fileno() in events:
            expected = int(sys.stdin.readline())
            poller.unregister(sys.stdin)
    report(numbers=numbers, times=times, n_spoilt=n_spoilt)


def send_tcp(address: str, port: int, rate: float) -> None:
    """Send blocks at `rate` until told to stop, then close."""
    sent = 0
    sock = new_socket(address, _socket.SOCK_STREAM)
    sock.settimeout(TIMEOUT_S)
    sock.connect((address, port))
    ready()
    start = time.monotonic()
    while not told(start + sent / rate - time.monotonic()):
        start = max(start, time.monotonic() - sent / rate - 0.1)
        sock.sendall(stream_block(sent // BLOCK))
        sent += BLOCK
    sock.close()
    report(sent=sent)


def receive_tcp(address: str, port: int, rate: float) -> None:
    """Compare what one connection carries with what it must be; note the longest silence."""
    received, n_spoilt, longest_ns = 0, 0, 0
    server = new_socket(address, _socket.SOCK_STREAM)
    server.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
    server.bind((address, port))
    server.listen()
    ready()
    connection = _socket.socket(fileno=server._accept()[0])
    last = time.monotonic_ns()
    block = b""
    while data := connection.recv(1 << 18):
        now = time.monotonic_ns()
        longest_ns, last = max(longest_ns, now - last), now
        block += data
        received += len(data)
        while len(block) >= BLOCK:
            n_spoilt += block[:BLOCK] != stream_block((received - len(block)) // BLOCK)
            block = block[BLOCK:]
    report(received=received, n_spoilt=n_spoilt + bool(block), longest_silence_ns=longest_ns)


ROLES = {
    "udp-send": send_udp,
    "udp-send-from-many": send_udp_from_many,
    "udp-receive": receive_udp,
    "tcp-send": send_tcp,
    "tcp-receive": receive_tcp,
}

if __name__ == "__main__":
    role, address, port, rate = sys.argv[1:]
    ROLES[role](address, int(port), float(rate))
