"""Nanoseconds per peer lookup, for tables of 1, 1,000 and 65,534 leases of each family.

A lookup is what encap does for a packet: destination address -> peer -> the peer's remote address.  Addresses come from
one lease (a burst of one connection) or at random from all leases (the worst a cache can get).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Network

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

_NETWORK, _NETWORK_IPV6 = IPv4Network("10.0.0.0/8"), IPv6Network("2001:db8::/40")
_FIRST_REMOTE = int(IPv4Address("198.18.0.0"))
_SEED = 1

Case = tuple[int, int]
"""IP version and number of leases."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Addresses to look up, and the number of the lease of each."""

    addresses: NDArray[np.uint32]
    leases: NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Lookups:
    """One table and what to look up in it."""

    reader: TableReader
    one_lease: Asked
    all_leases: Asked


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.micro.lookup", description=__doc__)
    parser.add_argument(
        "--repeats", type=whole_number(1, 10_000), default=50, metavar="N", help="timed calls (default: %(default)s)"
    )
    repeats = parser.parse_args(arguments).repeats
    cases = {(version, n): make(version, n) for version in (4, 6) for n in N_LEASES}
    figures = measure(cases, repeats)
    rows = [
        [f"IPv{version}", f"{n:,}", *(f"{of.median:.2f} ({of.low:.2f} to {of.high:.2f})" for of in figures[version, n])]
        for version, n in cases
    ]
    print(f"ns per lookup, median (least to greatest) of {repeats} x {N_ADDRESSES:,} lookups")
    print("\n".join(table(["", "leases", "of one lease", "of all, at random"], rows)))


def make(version: int, n_leases: int) -> Lookups:
    """A table with `n_leases` /24 leases of 10.0.0.0/8, the first /24 being our own; or /64 leases of 2001:db8::/40."""
    stats, writer = Stats.create(), TableWriter.create()
    own = next(_NETWORK.subnets(new_prefix=24))
    writer.configure(PacketSettings(_NETWORK, own, IPv4Address("192.0.2.1"), 1472, SourceCheck.PEER))
    for i in range(n_leases):
        writer.set_peer(_subnet(version, i), Remote(IPv4Address(_FIRST_REMOTE + i), 8285, True), 1472)
    if not writer.publish(stats):
        raise DatapathError("a new table could not be published")
    rng = np.random.default_rng(_SEED)
    lookups = Lookups(
        TableReader(writer.fd, stats.fd, 0),
        _asked(version, np.full(N_ADDRESSES, n_leases // 2, np.uint32), rng),
        _asked(version, rng.integers(0, n_leases, N_ADDRESSES, np.uint32), rng),
    )
    # The reader has mapped both files.
    writer.close()
    stats.close()
    return lookups


def _subnet(version: int, i: int) -> IPv4Network | IPv6Network:
    """Of lease `i`."""
    if version == 4:
        return IPv4Network((int(_NETWORK.network_address) + ((1 + i) << 8), 24))
    return IPv6Network((int(_NETWORK_IPV6.network_address) + (i << 64), 64))


def _asked(version: int, leases: NDArray[np.uint32], rng: np.random.Generator) -> Asked:
    """An address at random of each of these leases."""
    hosts = rng.integers(1, 255, len(leases), np.uint32)
    if version == 4:
        first = int(_subnet(4, 0).network_address)
        return Asked(np.asarray((leases << np.uint32(8)) + np.uint32(first) + hosts, np.uint32), leases)
    words = np.zeros((len(leases), 4), ">u4")
    words[:, 0] = int(_NETWORK_IPV6.network_address) >> 96
    words[:, 1], words[:, 3] = leases, hosts
    return Asked(words.view(np.uint32), leases)


def measure(cases: dict[Case, Lookups], repeats: int) -> dict[Case, tuple[Spread, Spread]]:
    """Time all cases in turn, `repeats` times; (of one lease, of all leases) of each, ns per lookup."""
    peers, remotes = np.zeros(N_ADDRESSES, np.uint32), np.zeros(N_ADDRESSES, np.uint32)
    took_ns = np.zeros((len(cases), 2, repeats))
    for repeat in range(-1, repeats):  # the first round only warms up, and is checked
        for i, (case, lookups) in enumerate(cases.items()):
            for j, asked in enumerate((lookups.one_lease, lookups.all_leases)):
                start = time.perf_counter_ns()
                lookups.reader.lookup(asked.addresses, peers, remotes)
                took = time.perf_counter_ns() - start
                if repeat >= 0:
                    took_ns[i, j, repeat] = took / N_ADDRESSES
                # The remotes must be those that `make` gave the leases.
                elif not np.array_equal(remotes.byteswap(), asked.leases + np.uint32(_FIRST_REMOTE)):
                    raise DatapathError(f"wrong answers from the table of {case[1]} leases of IPv{case[0]}")
    return {
        case: (Spread.of(took_ns[i, 0].tolist()), Spread.of(took_ns[i, 1].tolist())) for i, case in enumerate(cases)
    }


if __name__ == "__main__":
    main()
