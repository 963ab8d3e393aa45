"""Follow all nodes: a list in pages, and a watch from there on, told as differences of leases.

A list is asked for at the start and where the server has forgotten what was before (410), never by a clock.  A watch
that ends, breaks off or is silent goes on from the last revision that it has told of.

When a server restarts, all hosts lose their watches at the same moment, and it has forgotten what was before: thousands
would list at once.  So whoever loses a watch before its time waits by chance before it asks again.  The wait is before
the question and not before the list, so a table is right as soon after the server's answer as a list takes.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from http import HTTPStatus

from udptun.core.errors import StoreUnavailableError
from udptun.stores.base import Snapshot, WatchBatch, reconnect_spread_s
from udptun.stores.kube.annotations import Annotations
from udptun.stores.kube.client import Client, GoneError, NotFoundError, SilentError
from udptun.stores.kube.node import Node, NodeEvent, NodeFormatError, read_page
from udptun.stores.kube.own_node import OwnNode
from udptun.stores.kube.table import NodeTable

log = logging.getLogger(__name__)

PAGE = 500
"""Nodes a page (client-go's defaultPageSize)."""

_TRIES = 5
"""So often a list begins anew because the server has forgotten the page before."""

_SHORT_S = 1.0
"""A watch that breaks off sooner than this is no watch: whoever follows waits and tries again."""

_RELIST_S = 1.0
"""Lists are at least so far apart."""


@dataclass(slots=True)
class _Place:
    """How far somebody has followed: what there was at `revision`, of which they were told up to `told`."""

    table: NodeTable
    revision: int
    told: int


class Nodes:
    """What is known of all nodes, and how to learn more."""

    def __init__(self, client: Client, annotations: Annotations, own: OwnNode) -> None:
        self._client = client
        self._annotations = annotations
        self._own = own
        self._last: _Place | None = None
        """Where a list or a watch has ended.  There is one copy, so a watch takes it out."""
        self._table = NodeTable(annotations, own.name, own.families)
        """The newest, also while a watch has it."""
        self._listed_s: float | None = None

    @property
    def problems(self) -> tuple[str, ...]:
        return self._table.shared_addresses

    async def snapshot(self) -> Snapshot:
        """List all nodes."""
        table, revision, skipped = await self._list()
        self._table, self._last = table, _Place(table, revision, revision)
        return Snapshot(revision, table.leases, (*skipped, *table.skipped))

    async def follow(self, after: int) -> AsyncGenerator[WatchBatch, None]:
        """See `Store.watch`."""
        place = self._take_last(after)
        try:
            while True:
                began_s = asyncio.get_running_loop().time()
                try:
                    if place is None:
                        raise GoneError(f"nothing is known of revision {after}")
                    async with aclosing(self._follow_once(place)) as batches:
                        async for batch in batches:
                            place.told = batch.revision
                            yield batch
                except GoneError as exc:
                    snapshot = await self._list_again(str(exc))
                    place = self._take_last(snapshot.revision)
                    yield WatchBatch(snapshot.revision, snapshot=snapshot)
                except (SilentError, NotFoundError) as exc:
                    if asyncio.get_running_loop().time() - began_s < _SHORT_S:
                        raise StoreUnavailableError(f"cannot watch the nodes at {self._client.url}: {exc}") from exc
                    log.debug("node watch is opened again reason=%r", str(exc))
                    # See the module's text.
                    await asyncio.sleep(random.uniform(0, reconnect_spread_s(len(self._table))))
        finally:
            self._last = place

    def _take_last(self, after: int) -> _Place | None:
        """The place of who was told up to `after`, which is the caller's then; None when it is not known."""
        if self._last is None or self._last.told != after:
            return None
        place, self._last = self._last, None
        return place

    async def _list_again(self, reason: str) -> Snapshot:
        log.info("node watch starts over with a list reason=%r", reason)
        if self._listed_s is not None:
            since_s = asyncio.get_running_loop().time() - self._listed_s
            await asyncio.sleep(max(0.0, _RELIST_S - since_s))
        return await self.snapshot()

    async def _follow_once(self, place: _Place) -> AsyncGenerator[WatchBatch, None]:
        """The batches of one watch; they end with it."""
        params = {"resourceVersion": str(place.revision)}
        async with self._client.watch(params, self._annotations.prefix) as streams, aclosing(streams) as stream:
            # Empty.  It tells the caller that the server answers, before anything changes.
            yield WatchBatch(place.told)
            async for events in stream:
                n_good = next((i for i, event in enumerate(events) if event.kind == "ERROR"), len(events))
                if (batch := self._take(place, events[:n_good])) is not None:
                    yield batch
                for failure in events[n_good:]:
                    if failure.code == HTTPStatus.GONE:
                        raise GoneError(failure.message)
                    raise SilentError(f"the server says {failure.code} {failure.message}")

    def _take(self, place: _Place, events: list[NodeEvent]) -> WatchBatch | None:
        """What the events mean; None: nothing.  Raises GoneError."""
        # Of each node the last event counts.
        nodes: dict[str, Node | None] = {}
        for event in events:
            if event.revision < place.revision:
                raise GoneError(f"the server is at revision {event.revision}, before our {place.revision}")
            place.revision = event.revision
            if event.node is not None:
                nodes[event.node.name] = None if event.kind == "DELETED" else event.node
        if self._own.name in nodes:
            self._own.see(nodes[self._own.name], place.revision)
        present = [node for node in nodes.values() if node is not None]
        difference = place.table.apply(present, [name for name, node in nodes.items() if node is None])
        if difference:
            return WatchBatch(place.revision, difference.events, skipped=difference.skipped, mended=difference.mended)
        return None

    async def _list(self) -> tuple[NodeTable, int, list[str]]:
        """A new table, its revision, and lines about nodes that cannot be read."""
        for _ in range(_TRIES):
            # Any revision that the server has at hand will do at first, as flannel asks: it costs etcd nothing.
            found = await self._list_once(is_first=self._listed_s is None)
            if found is not None and found[1] < self._own.revision:
                # An API server that is behind the one that has taken our annotations.
                found = await self._list_once(is_first=False)
            if found is not None:
                table, revision, skipped, own = found
                self._own.see_anew(own, revision)
                return table, revision, skipped
        raise StoreUnavailableError(f"cannot list the nodes at {self._client.url}: each page is forgotten too soon")

    async def _list_once(self, *, is_first: bool) -> tuple[NodeTable, int, list[str], Node | None] | None:
        """The same, and our own node; None when the server has forgotten the page before."""
        table, own = NodeTable(self._annotations, self._own.name, self._own.families), None
        skipped: list[str] = []
        params = {"limit": str(PAGE), **({"resourceVersion": "0"} if is_first else {})}
        while True:
            try:
                text = await self._client.ask("GET", "/api/v1/nodes", "list the nodes", params=params)
                page = read_page(text, self._annotations.prefix)
            except GoneError:
                return None
            except (NotFoundError, NodeFormatError) as exc:
                raise StoreUnavailableError(f"cannot list the nodes at {self._client.url}: {exc}") from exc
            del text
            skipped += page.skipped
            own = next((node for node in page.nodes if node.name == self._own.name), own)
            for at in range(0, len(page.nodes), PAGE):
                table.apply(page.nodes[at : at + PAGE])
                await asyncio.sleep(0)
            if not page.next:
                break
            params = {"limit": str(PAGE), "continue": page.next}
        self._listed_s = asyncio.get_running_loop().time()
        return table, page.revision, skipped, own
