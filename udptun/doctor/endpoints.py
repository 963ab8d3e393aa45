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
_CONNECT_S, _WAIT_S = 6.0, 3.0
"""For the first answer, with which a connection is made, and for each further one."""
_TRIES = 3
"""How often a server is asked then; the fastest answer counts, as one may have been held up by this host."""


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
    """All of them at the same time; none where the store has no server."""
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
    question = _question(store)
    fastest_s: float | None = None
    try:
        # The first answer takes a connection, too.
        fastest_s = await _time(question, _CONNECT_S)
        for _ in range(_TRIES):
            took_s = await _time(question, _WAIT_S)
            fastest_s = min(fastest_s, took_s)
            if took_s > SLOW_S:
                break
        return Endpoint(name, fastest_s)
    except TimeoutError:
        return Endpoint(name, fastest_s, "" if fastest_s is not None else f"no answer within {_CONNECT_S:.0f} s")
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


async def _time(question: Callable[[], Awaitable[object]], wait_s: float) -> float:
    """How long the answer takes, seconds.  Raises TimeoutError, and what the store raises."""
    began_s = time.monotonic()
    async with asyncio.timeout(wait_s):
        await question()
    return time.monotonic() - began_s
