"""Each server of the store: whether it answers, and how long an answer takes.  Nothing is written.

The store itself goes on with the next server where one does not answer, so nobody sees that it has one less.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace

from udptun.config.flags import Options
from udptun.config.store_flags import StoreKind
from udptun.core.errors import UdptunError
from udptun.stores.base import Store
from udptun.stores.open import open_store

SLOW_S = 0.5
"""An answer to a small question that takes longer is slow: a start asks a dozen of them one after the other."""
_WAIT_S = 3.0
_TRIES = 3
"""How often a server is asked; the fastest answer counts, as one may have been held up by this host."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server of the store.  `latency_s`: how long an answer takes; None: there is none, and `error` says why."""

    name: str
    latency_s: float | None
    error: str = ""

    def __str__(self) -> str:
        if self.latency_s is None:
            return f"{self.name} does not answer"
        return f"{self.name} answers in {1000 * self.latency_s:.1f} ms"


async def ask_endpoints(options: Options) -> tuple[Endpoint, ...]:
    """All of them at the same time; none where the store has no server.  At most `_WAIT_S`."""
    return tuple(await asyncio.gather(*(_ask(*it) for it in _servers(options))))


def _servers(options: Options) -> Iterator[tuple[str, Options]]:
    """The name of each server, and the flags with which it is the only one."""
    match options.store.kind:
        case StoreKind.ETCD:
            for it in options.etcd.endpoints:
                yield str(it), replace(options, etcd=replace(options.etcd, endpoints=(it,)))
        case StoreKind.KUBE:
            yield options.kube.kube_api_url or "the API server", options


async def _ask(name: str, options: Options) -> Endpoint:
    try:
        store = open_store(options)
    except UdptunError as exc:
        return Endpoint(name, None, str(exc))
    try:
        async with asyncio.timeout(_WAIT_S):
            question = _question(store)
            # The first answer takes a connection, too.
            await question()
            return Endpoint(name, min([await _time(question) for _ in range(_TRIES)]))
    except TimeoutError:
        return Endpoint(name, None, f"no answer within {_WAIT_S:.0f} s")
    except UdptunError as exc:
        return Endpoint(name, None, str(exc))
    finally:
        await store.aclose()


def _question(store: Store) -> Callable[[], Awaitable[object]]:
    """Asks for something small that a daemon asks for, too."""
    if store.name == StoreKind.KUBE.value:
        from udptun.stores.kube.store import KubeStore

        assert isinstance(store, KubeStore)
        return store.find_lack
    from udptun.stores.etcd.store import EtcdStore

    assert isinstance(store, EtcdStore)
    return store.has_config


async def _time(question: Callable[[], Awaitable[object]]) -> float:
    began_s = time.monotonic()
    await question()
    return time.monotonic() - began_s
