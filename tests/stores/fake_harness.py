"""The tests' fake store under the contract test."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fake_store import FakeStore
from store_harness import NET_CONF, SUBNETS, Can, host

from udptun.core.lease import Lease


class FakeHarness:
    """The fake of the membership tests, which so cannot drift from the real stores."""

    name = "fake"
    lacks: Mapping[Can, str] = {Can.KEEP_CONFIG_IN_A_FILE: "a test says what it is"}
    needs: Sequence[str] = ()
    slack_descriptors = 0

    def __init__(self, directory: Path) -> None:
        self._hands = FakeStore(config=NET_CONF)
        self._hands.ends_leases = True

    def store(self, number: int = 1) -> FakeStore:
        return self._hands.another()

    def write(self, leases: Iterable[tuple[int, int]]) -> None:
        self._hands.write(*(Lease(SUBNETS[subnet], host(number)) for subnet, number in leases))

    def spoil(self, number: int) -> str:
        key = SUBNETS[number].key
        self._hands.spoil(key, f"lease {key!r}: PublicIP '2001:db8::1' is no IPv4 address")
        return key

    def lose_history(self) -> None:
        self._hands.lose_history()
