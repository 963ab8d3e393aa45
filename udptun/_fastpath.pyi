from collections.abc import Sequence
from typing import Final, final

import numpy as np
from numpy.typing import NDArray

COUNTERS: Final[tuple[str, ...]]
FIELDS: Final[dict[str, dict[str, tuple[int, int]]]]
LAYOUT: Final[dict[str, int]]
__test__: Final[dict[str, str]]

@final
class Worker:
    def __new__(
        cls,
        table_fd: int,
        stats_fd: int,
        index: int,
        tun_fd: int,
        udp_fd: int,
        senders: Sequence[int] = (),
        n_workers: int = 16,
        events: Sequence[int] = (),
        ipv6_fd: int = -1,
        more_queues: Sequence[int] = (),
        ipv6_senders: Sequence[int] = (),
    ) -> Worker: ...
    def turn(self) -> bool: ...
    def run(self) -> None: ...
    def stop(self) -> None: ...

@final
class TableReader:
    def __new__(cls, table_fd: int, stats_fd: int, index: int) -> TableReader: ...
    def lookup(self, addresses: NDArray[np.uint32], peers: NDArray[np.uint32], remotes: NDArray[np.uint32]) -> None: ...

@final
class Judge:
    def __new__(cls, table_fd: int, stats_fd: int) -> Judge: ...
    def encap(self, packet: bytes) -> tuple[str, int]: ...
    def decap(self, packet: bytes, source: bytes) -> tuple[str, int]: ...

def store_u64(words: memoryview, i: int, value: int) -> None: ...
def load_u64(words: memoryview, i: int) -> int: ...
def spread(udp_fd: int, n: int, first: int = 0) -> None: ...
def confine(wanted: int) -> int: ...
