"""The `etcd` store: flannel's keys and values in etcd v3.

    <prefix>/config                                 net-conf.json
    <prefix>/subnets/10.244.3.0-24                  a lease; its value is `LeaseAttrs.to_json`
    <prefix>/subnets/10.244.3.0-24&fd00:1::-64      the same in dual stack

A lease's key hangs on an etcd lease of 24 h.  A key without one is a reservation.  As flannel's, a renewal takes a new
etcd lease and writes the key again, and nothing is deleted at shutdown.  What differs, each because flannel's way
loses something: a key is written only if it is as we saw it; a reservation stays one; the etcd lease that a key hung
on before is revoked when nothing else hangs on it.

Reading costs one request: every lease in one range.  etcd does not say there when a lease will expire, and asking costs
a request a lease, so `expires_s` of another host's lease begins as the time of looking, and the watch finds out at
leisure (see `Store.is_remote`).  Nobody removes a lease by the clock: etcd reports its end.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from udptun.config.flags import EtcdOptions
from udptun.core.errors import ConfigError, LeaseError, LeaseLostError, StoreUnavailableError
from udptun.core.lease import EventType, Lease, LeaseAttrs, LeaseEvent, LeaseFormatError, Subnets
from udptun.stores.base import LEASE_TTL_S, Chooser, Snapshot, WatchBatch, is_same_node, reservation
from udptun.stores.etcd import etcd_pb2 as pb
from udptun.stores.etcd.client import GRANT, RANGE, REVOKE, TIME_TO_LIVE, TXN, Client, Watch
from udptun.stores.etcd.failures import RevisionGoneError

log = logging.getLogger(__name__)

TRIES = 10
"""How often a write is tried that others keep forestalling (flannel's raceRetries)."""

_RETRY_S = (0.02, 0.5)
"""A lost race is run again after a random time, up to the first at first, doubled each time up to the second: else many
lose together."""

CHECK_S = 60.0
"""How often a watch is checked against etcd, on average, seconds, plus a tenth of a second a lease: each check makes
etcd look at every lease, and as many hosts ask as there are leases."""

EXPIRY_LOOKUPS_PER_S = 2000
"""How many expiries all the hosts together ask etcd for, given one host a lease: 100 hosts know them all after five
seconds, 10,000 after 14 hours."""

_LOOKUPS_AT_ONCE = 100
"""Expiries are asked for one by one and told so many at a time."""

_LOOKUP_RETRY_S = 60.0

_CONCURRENT_LOOKUPS = 64
"""For an exact snapshot."""

_MIN_RESET_S = 0.5
"""A watch takes a snapshot no sooner than this after another."""


@dataclass(frozen=True, slots=True)
class _Known:
    """What is under one key.  `lease`: None when it cannot be read."""

    mod_revision: int
    etcd_lease: int
    lease: Lease | None


_Table = dict[bytes, _Known]


class EtcdStore:
    """See the module's text and `udptun.stores.base.Store`.

    Connects with the first call; `clock` gives Unix seconds.
    """

    def __init__(self, settings: EtcdOptions, clock: Callable[[], float] = time.time) -> None:
        self.name = "etcd"
        self.config_name = f"{settings.prefix}/config"
        self.is_remote = True
        self._client = Client(settings)
        self._clock = clock
        self._prefix = f"{settings.prefix}/subnets/".encode()
        # The first key behind all that begin with the prefix: "0" follows "/".
        self._range_end = self._prefix[:-1] + b"0"
        self._cluster_id = 0
        self._granted: dict[int, float] = {}
        """When the etcd leases end that we hold, Unix seconds."""
        self._expiries: dict[int, float] = {}
        """When those end that we have asked for."""
        self._table: _Table = {}
        self._table_revision = -1
        """What `_table` was at this revision, for a watch that goes on from there."""

    # ------------------------------------------------------------------------------------------------ reading

    async def network_config(self) -> str:
        key = self.config_name
        response = await self._client.call(RANGE, pb.RangeRequest(key=key.encode()), "read the network config")
        if not response.kvs:
            raise ConfigError(
                f"no network config in etcd at {key}: write it, for example etcdctl put {key} "
                """'{"Network": "10.244.0.0/16", "Backend": {"Type": "udp"}}', or name another --etcd-prefix"""
            )
        try:
            return response.kvs[0].value.decode()
        except UnicodeDecodeError as exc:
            raise ConfigError(f"cannot read the network config {key} in etcd: not UTF-8 at byte {exc.start}") from exc

    async def snapshot(self, *, exact: bool = False) -> Snapshot:
        response = await self._list("list the leases")
        if exact:
            await self._look_up_all({kv.lease for kv in response.kvs if self._is_unknown(kv.lease)})
        in_use = {kv.lease for kv in response.kvs}
        self._expiries = {it: expiry for it, expiry in self._expiries.items() if it in in_use}
        self._cluster_id = response.header.cluster_id
        skipped: list[str] = []
        table = {kv.key: self._read(kv, skipped) for kv in response.kvs}
        self._table, self._table_revision = table, response.header.revision
        leases = tuple(it.lease for it in table.values() if it.lease is not None)
        return Snapshot(response.header.revision, leases, tuple(skipped))

    async def watch(self, after: int) -> AsyncGenerator[WatchBatch, None]:
        follower = _Follower(self, after)
        try:
            while True:
                yield await follower.next()
        finally:
            await follower.stop()

    # ---------------------------------------------------------------------------------------------- our lease

    async def claim(self, attrs: LeaseAttrs, choose: Chooser, ttl_s: int = LEASE_TTL_S) -> Lease:
        """As the contract says; `choose` is asked again after each lost race, TRIES times before it is a LeaseError."""
        for turn in range(TRIES):
            await _pause(turn, "claim a subnet")
            response = await self._list("claim a subnet")
            found = {kv.key: kv for kv in response.kvs}
            skipped: list[str] = []
            known = [self._read(kv, skipped).lease for kv in response.kvs]
            choice = choose([lease for lease in known if lease is not None])
            drop = [kv for name in choice.drop if (kv := found.get(self._key(name))) is not None]
            lease = await self._write(
                "claim a subnet", choice.subnets, attrs, found.get(self._key(choice.subnets.key)), ttl_s, drop
            )
            if lease is not None:
                return lease
        raise LeaseError(f"cannot claim a subnet in etcd: other nodes were faster {TRIES} times; trying again may help")

    async def renew(self, lease: Lease, ttl_s: int = LEASE_TTL_S) -> Lease:
        operation = f"renew {lease.subnet}"
        for turn in range(TRIES):
            await _pause(turn, operation)
            kv = await self._get(lease, operation)
            if kv is None:
                raise LeaseLostError(f"cannot renew {lease.subnet}: it is no longer in etcd; claim again")
            holder = self._read(kv, []).lease
            if holder is None or not is_same_node(holder.attrs, lease.attrs):
                whose = "unreadable" if holder is None else f"{holder.attrs.public_ip}'s"
                node = "" if holder is None else f" (node {holder.attrs.node_id or 'without id'})"
                raise LeaseLostError(f"cannot renew {lease.subnet}: in etcd it is {whose}{node}; claim again")
            renewed = await self._write(operation, lease.subnets, lease.attrs, kv, ttl_s)
            if renewed is not None:
                return renewed
        raise StoreUnavailableError(f"cannot {operation} in etcd: it was written by others {TRIES} times; trying again")

    async def release(self, lease: Lease) -> None:
        operation = f"release {lease.subnet}"
        for turn in range(TRIES):
            await _pause(turn, operation)
            kv = await self._get(lease, operation)
            holder = None if kv is None else self._read(kv, []).lease
            if kv is None or not kv.lease or holder is None or not is_same_node(holder.attrs, lease.attrs):
                return
            if await self._delete(kv, operation):
                return
        raise StoreUnavailableError(f"cannot {operation} in etcd: it was written by others {TRIES} times; trying again")

    # --------------------------------------------------------------------------------------------- operators

    async def reserve(self, subnets: Subnets, attrs: LeaseAttrs) -> Lease:
        operation = f"reserve {subnets.ipv4}"
        for turn in range(TRIES):
            await _pause(turn, operation)
            response = await self._list(operation)
            leases = [lease for kv in response.kvs if (lease := self._read(kv, []).lease) is not None]
            attrs = reservation(leases, subnets, attrs)
            there = next((kv for kv in response.kvs if kv.key == self._key(subnets.key)), None)
            lease = await self._write(operation, subnets, attrs, there, None)
            if lease is not None:
                return lease
        raise LeaseError(f"cannot {operation} in etcd: it was written by others {TRIES} times; try again")

    async def delete(self, lease: Lease) -> None:
        operation = f"delete {lease.subnet}"
        kv = await self._get(lease, operation)
        if kv is None or kv.mod_revision != lease.revision or not await self._delete(kv, operation):
            raise LeaseError(f"cannot {operation} in etcd: it has changed; look again")

    async def aclose(self) -> None:
        await self._client.aclose()

    # ---------------------------------------------------------------------------------------------- requests

    async def _list(self, operation: str) -> pb.RangeResponse:
        return await self._client.call(RANGE, pb.RangeRequest(key=self._prefix, range_end=self._range_end), operation)

    async def _get(self, lease: Lease, operation: str) -> pb.KeyValue | None:
        response = await self._client.call(RANGE, pb.RangeRequest(key=self._key(lease.key)), operation)
        return response.kvs[0] if response.kvs else None

    async def _write(
        self,
        operation: str,
        subnets: Subnets,
        attrs: LeaseAttrs,
        there: pb.KeyValue | None,
        ttl_s: int | None,
        drop: Sequence[pb.KeyValue] = (),
    ) -> Lease | None:
        """Write the key if `there` is what is under it and each of `drop` is as it was; None when one is not.

        Without `ttl_s`, or over a reservation, the result is a reservation.
        """
        key = self._key(subnets.key)
        # Junk is no reservation.
        is_reserved = there is not None and not there.lease and self._read(there, []).lease is not None
        etcd_lease, expires_s = 0, None
        if ttl_s is not None and not is_reserved:
            now_s = self._clock()
            self._granted = {it: expiry for it, expiry in self._granted.items() if expiry > now_s}
            granted = await self._client.call(GRANT, pb.LeaseGrantRequest(TTL=ttl_s), operation)
            etcd_lease, expires_s = granted.ID, now_s + granted.TTL
            # Before the write: the watch may tell of it before its answer is here.
            self._granted[etcd_lease] = expires_s
        response = await self._client.call(
            TXN,
            pb.TxnRequest(
                compare=[_unchanged(key, there), *(_unchanged(kv.key, kv) for kv in drop)],
                success=[
                    pb.RequestOp(
                        request_put=pb.PutRequest(key=key, value=attrs.to_json().encode(), lease=etcd_lease)
                    ),
                    *(pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=kv.key)) for kv in drop),
                ],
            ),
            operation,
        )
        if not response.succeeded:
            await self._revoke_unused([etcd_lease])
            return None
        await self._revoke_unused([*([there.lease] if there is not None else []), *(kv.lease for kv in drop)])
        return Lease(subnets, attrs, expires_s, response.header.revision)

    async def _delete(self, kv: pb.KeyValue, operation: str) -> bool:
        """Delete the key as `kv` shows it; False when it has changed."""
        request = pb.TxnRequest(
            compare=[_unchanged(kv.key, kv)],
            success=[pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=kv.key))],
        )
        response = await self._client.call(TXN, request, operation)
        if response.succeeded:
            await self._revoke_unused([kv.lease])
        return response.succeeded

    async def _revoke_unused(self, etcd_leases: Iterable[int]) -> None:
        """Revoke those on which no key hangs.  What fails here, etcd does by itself within 24 hours."""
        operation = "revoke an unused etcd lease"
        for etcd_lease in {*etcd_leases} - {0}:
            self._granted.pop(etcd_lease, None)
            with suppress(LeaseError, ConfigError):
                request = pb.LeaseTimeToLiveRequest(ID=etcd_lease, keys=True)
                found = await self._client.call(TIME_TO_LIVE, request, operation)
                if found.TTL >= 0 and not found.keys:
                    await self._client.call(REVOKE, pb.LeaseRevokeRequest(ID=etcd_lease), operation)

    async def _look_up(self, etcd_lease: int) -> float:
        """When an etcd lease ends, Unix seconds, up to a second too soon; now when there is none."""
        now_s = self._clock()
        request = pb.LeaseTimeToLiveRequest(ID=etcd_lease)
        response = await self._client.call(TIME_TO_LIVE, request, "look up when a lease expires")
        return now_s + max(response.TTL, 0)

    async def _look_up_all(self, etcd_leases: Iterable[int]) -> None:
        wanted = iter(etcd_leases)

        async def some(ids: Iterator[int]) -> None:
            for etcd_lease in ids:
                self._expiries[etcd_lease] = await self._look_up(etcd_lease)

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(_CONCURRENT_LOOKUPS):
                    tasks.create_task(some(wanted))
        except ExceptionGroup as group:
            raise group.exceptions[0] from group

    # ----------------------------------------------------------------------------------------------- values

    def _is_unknown(self, etcd_lease: int) -> bool:
        """Whether nobody has told us when it ends."""
        return bool(etcd_lease) and etcd_lease not in self._granted and etcd_lease not in self._expiries

    def _expiry(self, etcd_lease: int) -> float | None:
        """The earliest end that is known of what hangs on it, Unix seconds; None: it hangs on nothing."""
        if not etcd_lease:
            return None
        return self._granted.get(etcd_lease) or self._expiries.get(etcd_lease) or self._clock()

    def _key(self, name: str) -> bytes:
        return self._prefix + name.encode()

    def _read(self, kv: pb.KeyValue, skipped: list[str]) -> _Known:
        """What is under a key; when it is no lease a line in `skipped` says why."""
        name = kv.key.removeprefix(self._prefix)
        lease = None
        try:
            subnets = Subnets.from_key(name.decode())
            attrs = LeaseAttrs.from_json(kv.value.decode())
            lease = Lease(subnets, attrs, self._expiry(kv.lease), kv.mod_revision)
        except LeaseFormatError as exc:
            skipped.append(f"lease {name.decode(errors='backslashreplace')!r}: {exc}")
        except UnicodeDecodeError as exc:
            which = "key" if exc.object == name else "value"
            skipped.append(f"lease {name.decode(errors='backslashreplace')!r}: its {which} is not UTF-8")
        return _Known(kv.mod_revision, kv.lease, lease)


async def _pause(turn: int, operation: str) -> None:
    """Before each turn of a race but the first."""
    if turn:
        log.debug("lost a race, trying again operation=%r turn=%d", operation, turn)
        first_s, longest_s = _RETRY_S
        await asyncio.sleep(random.uniform(0, min(first_s * 2 ** (turn - 1), longest_s)))


def _unchanged(key: bytes, there: pb.KeyValue | None) -> pb.Compare:
    """True while the key is as `there` shows it, or absent."""
    if there is None:
        return pb.Compare(key=key, target=pb.Compare.VERSION, result=pb.Compare.EQUAL, version=0)
    return pb.Compare(key=key, target=pb.Compare.MOD, result=pb.Compare.EQUAL, mod_revision=there.mod_revision)


class _DoubtError(Exception):
    """What we have seen may not be all there is; the text says why."""


class _Follower:
    """One watch of an EtcdStore.

    Folds what it reports into a table of its own, so that it knows what a deleted key held, can be checked against etcd
    and can find out the expiries.  When it starts from a revision whose table the store does not know, etcd has to tell
    what was deleted, and the first check is a snapshot.
    """

    def __init__(self, store: EtcdStore, after: int) -> None:
        self._store = store
        self._after = after
        is_known = after == store._table_revision
        self._table: _Table | None = dict(store._table) if is_known else None
        self._watch: Watch | None = None
        self._reading: asyncio.Task[pb.WatchResponse] | None = None
        self._checking: asyncio.Task[None] | None = None
        self._asking: asyncio.Task[dict[int, float]] | None = None
        self._unknown: dict[int, None] = {}
        """etcd leases whose expiry nobody knows, in the order in which to ask."""
        self._reset_s = float("-inf")

    async def next(self) -> WatchBatch:
        while True:
            try:
                if self._watch is None:
                    await self._open()
                    # Empty: who waits for etcd to answer need not wait for something to change.
                    return WatchBatch(self._after)
                batch = await self._next()
            except (_DoubtError, RevisionGoneError) as exc:
                await self._close()
                log.info("lease watch starts over with a snapshot reason=%r", str(exc))
                return await self._reset()
            if batch is not None:
                return batch

    async def stop(self) -> None:
        await self._close()
        if self._table is not None:
            self._store._table, self._store._table_revision = self._table, self._after

    async def _reset(self) -> WatchBatch:
        now_s = asyncio.get_running_loop().time()
        await asyncio.sleep(max(0.0, self._reset_s + _MIN_RESET_S - now_s))
        snapshot = await self._store.snapshot()
        self._reset_s = asyncio.get_running_loop().time()
        self._after, self._table = snapshot.revision, dict(self._store._table)
        return WatchBatch(snapshot.revision, snapshot=snapshot)

    async def _open(self) -> None:
        store = self._store
        request = pb.WatchCreateRequest(
            key=store._prefix,
            range_end=store._range_end,
            start_revision=self._after + 1,
            progress_notify=True,
            prev_kv=self._table is None,
        )
        self._watch = await store._client.watch(request, "watch the leases")
        created = await self._watch.read()
        if created.header.revision < self._after:
            raise _DoubtError(f"etcd is at revision {created.header.revision}, before our {self._after}")
        if store._cluster_id not in (0, created.header.cluster_id):
            raise _DoubtError("etcd is another cluster now")
        self._unknown = {it.etcd_lease: None for it in (self._table or {}).values() if self._is_unknown(it)}
        self._checking = asyncio.create_task(self._check())

    async def _next(self) -> WatchBatch | None:
        """The next batch, from etcd's events or from what was asked about expiries."""
        assert self._watch is not None
        if self._reading is None:
            self._reading = asyncio.create_task(self._watch.read())
        if self._asking is None and self._unknown:
            self._asking = asyncio.create_task(self._ask())
        running = {task for task in (self._reading, self._checking, self._asking) if task is not None}
        done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        if self._reading in done:
            response, self._reading = self._reading.result(), None
            return self._take(response)
        if self._checking in done:
            self._checking.result()
        if self._asking in done:
            expiries, self._asking = self._asking.result(), None
            return self._take_expiries(expiries)
        return None

    def _take(self, response: pb.WatchResponse) -> WatchBatch:
        if not response.events:  # progress: nothing happened up to there
            self._after = max(self._after, response.header.revision)
            return WatchBatch(self._after)
        events: list[LeaseEvent] = []
        skipped: list[str] = []
        for event in response.events:
            # Not the header's revision: that is etcd's now, and there may be more on the way.
            self._after = max(self._after, event.kv.mod_revision)
            before = self._before(event)
            self._forget_expiry(event.kv.key)
            if event.type == pb.Event.PUT:
                known = self._store._read(event.kv, skipped)
                if self._table is not None:
                    self._table[event.kv.key] = known
                if self._is_unknown(known):
                    self._unknown[known.etcd_lease] = None
                if known.lease is not None:
                    events.append(LeaseEvent(EventType.ADDED, known.lease))
                    continue
            elif self._table is not None:
                self._table.pop(event.kv.key, None)
            if before is not None:
                events.append(LeaseEvent(EventType.REMOVED, before))
        return WatchBatch(self._after, tuple(events), skipped=tuple(skipped))

    def _before(self, event: pb.Event) -> Lease | None:
        """The lease that was under the event's key."""
        if self._table is not None:
            known = self._table.get(event.kv.key)
            return None if known is None else known.lease
        if event.HasField("prev_kv"):
            return self._store._read(event.prev_kv, []).lease
        if event.type == pb.Event.DELETE:
            raise _DoubtError(f"etcd no longer knows what {event.kv.key!r} was")
        return None

    def _forget_expiry(self, key: bytes) -> None:
        """Its key goes on to another etcd lease, or to none: else each renewal of each host would leave one behind."""
        known = None if self._table is None else self._table.get(key)
        if known is not None:
            self._store._expiries.pop(known.etcd_lease, None)

    def _is_unknown(self, known: _Known) -> bool:
        return known.lease is not None and self._store._is_unknown(known.etcd_lease)

    async def _ask(self) -> dict[int, float]:
        """Ask for some of the unknown expiries, slowly enough for etcd when all hosts do; see EXPIRY_LOOKUPS_PER_S."""
        pause_s = len(self._table or ()) / EXPIRY_LOOKUPS_PER_S
        found: dict[int, float] = {}
        for etcd_lease in list(self._unknown)[:_LOOKUPS_AT_ONCE]:
            await asyncio.sleep(random.uniform(0, 2 * pause_s))
            try:
                found[etcd_lease] = await self._store._look_up(etcd_lease)
            except (LeaseError, ConfigError) as exc:
                log.debug("cannot look up an expiry error=%r", str(exc))
                await asyncio.sleep(_LOOKUP_RETRY_S)
                break
            self._unknown.pop(etcd_lease, None)
        return found

    def _take_expiries(self, found: dict[int, float]) -> WatchBatch | None:
        if self._table is None:
            return None
        events: list[LeaseEvent] = []
        for key, known in self._table.items():
            # Others were replaced while we asked.
            if known.lease is not None and known.etcd_lease in found:
                self._store._expiries[known.etcd_lease] = found[known.etcd_lease]
                lease = replace(known.lease, expires_s=found[known.etcd_lease])
                self._table[key] = replace(known, lease=lease)
                events.append(LeaseEvent(EventType.ADDED, lease))
        return WatchBatch(self._after, tuple(events)) if events else None

    async def _check(self) -> None:
        """Compare table and etcd now and then, by number and highest revision.  Raises _DoubtError when they differ."""
        store = self._store
        while True:
            mean_s = CHECK_S + len(self._table or ()) / 10
            await asyncio.sleep(random.uniform(0.5, 1.5) * mean_s)
            if self._table is None:
                raise _DoubtError("the first check")
            revision = self._after
            number, highest = len(self._table), max((it.mod_revision for it in self._table.values()), default=0)
            request = pb.RangeRequest(
                key=store._prefix,
                range_end=store._range_end,
                revision=revision,
                limit=1,
                sort_target=pb.RangeRequest.MOD,
                sort_order=pb.RangeRequest.DESCEND,
                keys_only=True,
            )
            try:
                response = await store._client.call(RANGE, request, "check the leases")
            except RevisionGoneError as exc:
                if "compacted" not in str(exc):
                    raise
                # Nothing has come for long.  Then what is there now should be the same.
                request.revision = 0
                response = await store._client.call(RANGE, request, "check the leases")
                if self._after != revision:
                    continue
            there = max((kv.mod_revision for kv in response.kvs), default=0)
            if (response.count, there) != (number, highest):
                raise _DoubtError(
                    f"etcd has {response.count} leases, the last of revision {there}; we have {number} and {highest}"
                )
            log.debug("lease table checked n_leases=%d revision=%d", number, highest)

    async def _close(self) -> None:
        tasks = [task for task in (self._reading, self._checking, self._asking) if task is not None]
        self._reading = self._checking = self._asking = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._watch is not None:
            await self._watch.close()
            self._watch = None
