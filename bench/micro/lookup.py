"""Nanoseconds per peer lookup, for tables of 1, 1,000 and 65,534 leases.

A lookup is what encap does for a packet: destination address -> peer -> the peer's remote address.  Addresses come from
one lease (a burst of one connection) or at random from all leases (the worst a cache can get).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

import numpy as np
from numpy.typing import NDArray

from bench.session import whole_number
from bench.summary import Spread, table
from udptun._fastpath import TableReader
from udptun.core.errors import DatapathError
from udptun.core.tunnel import SourceCheck
from udptun.datapath.settings import PacketSettings, Remote
from udptun.datapath.stats import Stats
from udptun.datapath.table import TableWriter

N_LEASES = (1, 1_000, 65_534)
N_ADDRESSES = 1 << 20
"""In one timed call, which takes a millisecond or so: the cost of the call itself does not show."""

_NETWORK = IPv4Network("10.0.0.0/8")
_FIRST_REMOTE = int(IPv4Address("198.18.0.0"))
_SEED = 1


@dataclass(frozen=True, slots=True)
class Lookups:
    """One table and the addresses to look up in it."""

    reader: TableReader
    one_lease: NDArray[np.uint32]
    all_leases: NDArray[np.uint32]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.micro.lookup", description=__doc__)
    parser.add_argument(
        "--repeats", type=whole_number(1, 10_000), default=50, metavar="N", help="timed calls (default: %(default)s)"
    )
    repeats = parser.parse_args(arguments).repeats
    cases = {n: make(n) for n in N_LEASES}
    figures = measure(cases, repeats)
    rows = [[f"{n:,}", *(f"{of.median:.2f} ({of.low:.2f} to {of.high:.2f})" for of in figures[n])] for n in N_LEASES]
    print(f"ns per lookup, median (least to greatest) of {repeats} x {N_ADDRESSES:,} lookups")
    print("\n".join(table(["leases", "of one lease", "of all, at random"], rows)))


def make(n_leases: int) -> Lookups:
    """A table with `n_leases` /24 leases of 10.0.0.0/8, the first /24 being our own."""
    stats, writer = Stats.create(), TableWriter.create()
    subnets = [IPv4Network((int(_NETWORK.network_address) + ((1 + i) << 8), 24)) for i in range(n_leases)]
    own = next(_NETWORK.subnets(new_prefix=24))
    writer.configure(PacketSettings(_NETWORK, own, IPv4Address("192.0.2.1"), 1472, SourceCheck.PEER))
    for i, subnet in enumerate(subnets):
        writer.set_peer(subnet, Remote(IPv4Address(_FIRST_REMOTE + i), 8285, True), 1472)
    if not writer.publish(stats):
        raise DatapathError("a new table could not be published")
    firsts = np.array([int(subnet.network_address) for subnet in subnets], np.uint32)
    rng = np.random.default_rng(_SEED)
    hosts = rng.integers(1, 255, N_ADDRESSES, np.uint32)
    lookups = Lookups(
        TableReader(writer.fd, stats.fd, 0),
        np.asarray(firsts[n_leases // 2] + hosts, np.uint32),
        np.asarray(rng.choice(firsts, N_ADDRESSES) + hosts, np.uint32),
    )
    # The reader has mapped both files.
    writer.close()
    stats.close()
    return lookups


def measure(cases: dict[int, Lookups], repeats: int) -> dict[int, tuple[Spread, Spread]]:
    """Time all cases in turn, `repeats` times; (of one lease, of all leases) of each, ns per lookup."""
    peers, remotes = np.zeros(N_ADDRESSES, np.uint32), np.zeros(N_ADDRESSES, np.uint32)
    took_ns = np.zeros((len(cases), 2, repeats))
    for repeat in range(-1, repeats):  # the first round only warms up, and is checked
        for i, (n_leases, lookups) in enumerate(cases.items()):
            for j, addresses in enumerate((lookups.one_lease, lookups.all_leases)):
                start = time.perf_counter_ns()
                lookups.reader.lookup(addresses, peers, remotes)
                took = time.perf_counter_ns() - start
                if repeat >= 0:
                    took_ns[i, j, repeat] = took / N_ADDRESSES
                else:
                    _check(n_leases, addresses, remotes)
    return {
        n_leases: (Spread.of(took_ns[i, 0].tolist()), Spread.of(took_ns[i, 1].tolist()))
        for i, n_leases in enumerate(cases)
    }


def _check(n_leases: int, addresses: NDArray[np.uint32], remotes: NDArray[np.uint32]) -> None:
    """The remotes must be those that `make` gave the leases.  Raises DatapathError."""
    expected = _FIRST_REMOTE + (addresses >> 8) - (int(_NETWORK.network_address) >> 8) - 1
    if not np.array_equal(remotes.byteswap(), expected):
        raise DatapathError(f"wrong answers from the table of {n_leases} leases")


if __name__ == "__main__":
    main()
