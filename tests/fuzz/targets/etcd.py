"""What etcd answers: lists, watches, grants, refusals.  Whoever follows has what etcd has, or one of our errors.

An input is a JSON object: what the server has at first, and what its watches say then (`_Script`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import aclosing, suppress
from typing import Any

from tests import virtual_time
from tests.bad_data import LEASES
from tests.fuzz.mutate import json_mutator
from tests.fuzz.oracles import check_line, check_lines
from udptun.config.store_flags import Endpoint, EtcdOptions
from udptun.core.errors import ConfigError, LeaseError, StoreUnavailableError
from udptun.core.lease import EventType, Lease, LeaseAttrs, Subnets
from udptun.stores.base import SubnetChoice, WatchBatch
from udptun.stores.etcd import client, failures
from udptun.stores.etcd import etcd_pb2 as pb
from udptun.stores.etcd.failures import RevisionGoneError
from udptun.stores.etcd.store import EtcdStore

_SETTINGS = EtcdOptions(endpoints=(Endpoint("192.0.2.1", 2379, False),), prefix="/n")
_ATTRS = LeaseAttrs.from_json('{"PublicIP":"192.0.2.7","PublicIPv6":null,"BackendType":"udp"}')
_OURS = Subnets.from_key("10.244.7.0-24")
_VALUE = _ATTRS.to_json()
_MOST = 40
"""Batches that are taken of one script."""

_GOOD: Sequence[dict[str, Any]] = (
    {
        "kvs": [["/n/subnets/10.244.1.0-24", _VALUE, 5, 77], ["/n/subnets/10.244.2.0-24&fd00:1::-64", _VALUE, 6, 0]],
        "revision": 9,
        "responses": [
            {"revision": 9},
            {"revision": 11, "events": [[0, "/n/subnets/10.244.3.0-24", _VALUE, 10, 78]]},
            {"revision": 12, "events": [[1, "/n/subnets/10.244.1.0-24", "", 12, 0]]},
            {"revision": 13},
            {"sleep": 300},
        ],
        "ttls": [100, 0, -1],
        "checks": [[2, 10]],
    },
    {"kvs": [], "revision": 3, "responses": [{"revision": 3}, {"revision": 4, "compact": 4}, {"canceled": "lost"}]},
    {"blind": 5, "revision": 8, "responses": [{"revision": 8}, {"events": [[1, "/n/subnets/x", "", 7, 0, "old"]]}]},
    {
        "kvs": [["/n/subnets/10.244.7.0-24", _VALUE, 5, 77], ["/n/subnets/junk", "junk", 6, 7]],
        "revision": 9,
        "succeeds": [False, True, False, True],
        "grants": [[5, 86400], [6, 0]],
        "error": ["UNAVAILABLE", "etcdserver: no leader"],
        "responses": [{"revision": 9}, {"events": [[0, "/n/subnets/junk", _VALUE, 10, 1], [1, "/n/subnets/junk"]]}],
    },
)


def _found(**script: Any) -> bytes:
    return json.dumps({"revision": 9, "responses": [{"revision": 9}], **script}).encode()


FOUND = {
    "the last revision there can be": _found(revision=2**63 - 1),
    "a lease is under two keys": _found(
        kvs=[[f"/n/subnets/10.244.1.0-24&{v6}-64", _VALUE, 5, 7] for v6 in ("fd00:0::", "fd00::")],
        responses=[{"revision": 9}, {"events": [[1, "/n/subnets/10.244.1.0-24&fd00::-64", "", 10, 0]]}],
    ),
    "a key is not under the prefix": _found(
        kvs=[[f"{prefix}10.244.1.0-24", _VALUE, 5, 7] for prefix in ("", "/n/subnets/")],
        responses=[{"revision": 9}, {"events": [[1, "10.244.1.0-24", "", 10, 0]]}],
    ),
    "etcd's words begin a line of the log": _found(responses=[{"canceled": "a\nb"}]),
}
SEEDS = (
    *(json.dumps(it).encode() for it in _GOOD),
    *(
        json.dumps({"kvs": [[f"/n/subnets/{key}", value, 4, 9]], "revision": 4}).encode()
        for key, value, _ in LEASES
        if len(value) < 2000
    ),
)

mutate = json_mutator(
    (
        *("kvs", "revision", "responses", "events", "compact", "canceled", "cluster", "sleep", "ttls", "checks"),
        *("blind", "succeeds", "grants", "error", "PublicIP", "BackendData"),
    ),
    (
        *("/n/subnets/10.244.1.0-24", "/n/subnets/10.244.2.0-24&fd00:1:0::-64", "/n/subnets/", "/n/config", _VALUE),
        *("10.244.1.0-24", "etcdserver: mvcc: required revision has been compacted", "etcdserver: permission denied"),
        *("UNAUTHENTICATED", {"revision": 10}, {"sleep": 200}, [0, "/n/subnets/10.244.1.0-24", _VALUE, 20, 3]),
        *({"events": [[1, "/n/subnets/10.244.1.0-24", "", 21, 0]]}, [], 5, 10, 77),
    ),
)


def check(data: bytes) -> None:
    try:
        script = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(script, dict):
        virtual_time.run(_play(script))


async def _play(script: dict[str, Any]) -> None:
    server = _Script(script)
    store = EtcdStore(_SETTINGS, clock=lambda: 1_800_000_000.0)
    await store._client.aclose()
    # Everything above the connections is the store's own.
    store._client = store._etcd_leases._client = server  # type: ignore[assignment]
    with suppress(ConfigError, LeaseError):
        await store.network_config()
    await _follow(store, server, script)
    for operation in (
        store.claim(_ATTRS, lambda _: SubnetChoice(_OURS)),
        store.renew(Lease(_OURS, _ATTRS, 5.0, 9)),
        store.release(Lease(_OURS, _ATTRS, 5.0, 9)),
        store.reserve(_OURS, _ATTRS),
        store.delete(Lease(_OURS, _ATTRS, 5.0, 9)),
    ):
        try:
            lease = await operation
        except (ConfigError, LeaseError) as exc:
            check_line(str(exc))
        else:
            assert lease is None or (lease.subnets == _OURS and lease.attrs.public_ip == _ATTRS.public_ip)
    assert len(asyncio.all_tasks()) == 1


async def _follow(store: EtcdStore, server: _Script, script: dict[str, Any]) -> None:
    """As membership/peers.py does.  `seen`: what a follower knows of all leases."""
    seen: dict[str, Lease] = {}
    skipped: dict[str, None] = {}
    after, is_blind = _number(script.get("blind")), "blind" in script
    if not is_blind:
        try:
            snapshot = await store.snapshot(exact=bool(script.get("exact")))
        except (ConfigError, LeaseError) as exc:
            check_line(str(exc))
            return
        check_lines(snapshot.skipped)
        after = snapshot.revision
        seen = {lease.key: lease for lease in snapshot.leases}
        skipped = dict.fromkeys(snapshot.skipped)
    n = 0
    try:
        async with aclosing(store.watch(after)) as batches:
            async for batch in batches:
                n += 1
                is_blind = is_blind and batch.snapshot is None
                _take(batch, seen, skipped)
                if n > _MOST:
                    break
    except (ConfigError, LeaseError) as exc:
        check_line(str(exc))
    table = store._last._table
    if table is not None and not is_blind:
        expected = {it.lease.key: it.lease for it in table.values() if it.lease is not None}
        assert seen == expected, f"a follower has {sorted(seen)}, and the table {sorted(expected)}"
        assert set(skipped) == {it.problem for it in table.values() if it.lease is None}


def _take(batch: WatchBatch, seen: dict[str, Lease], skipped: dict[str, None]) -> None:
    if batch.snapshot is not None:
        seen.clear()
        seen |= {lease.key: lease for lease in batch.snapshot.leases}
        skipped.clear()
        skipped |= dict.fromkeys(batch.snapshot.skipped)
        check_lines(batch.snapshot.skipped)
        return
    check_lines(batch.skipped)
    assert not set(batch.skipped) & set(batch.mended)
    for line in batch.mended:
        skipped.pop(line, None)
    skipped |= dict.fromkeys(batch.skipped)
    for event in batch.events:
        if event.type is EventType.ADDED:
            seen[event.lease.key] = event.lease
        else:
            seen.pop(event.lease.key, None)


class _Script:
    """A server as `stores.etcd.client.Client` shows it.  What a script lacks is answered in the usual way."""

    def __init__(self, script: dict[str, Any]) -> None:
        self.n_hosts = 0
        self._kvs = [_kv(it) for it in _items(script.get("kvs"))]
        self._revision = _number(script.get("revision"))
        self._responses = list(_items(script.get("responses")))
        self._queues = {name: list(_items(script.get(name))) for name in ("ttls", "checks", "succeeds", "grants")}
        error = _items(script.get("error"))
        self._error = [it for it in error if isinstance(it, str)] if len(error) == 2 else []
        self._n_calls = 0

    async def call(self, method: client.Method[Any, Any], request: Any, operation: str) -> Any:
        await asyncio.sleep(0)
        self._n_calls += 1
        if self._n_calls % 7 == 0 and len(self._error) == 2:
            failure = failures.Failure(*self._error)
            failures.is_about_the_token(failure)
            failures.why_not_connected(failure, _SETTINGS.endpoints[0])
            raise failures.explain(failure, _SETTINGS.endpoints[0], _SETTINGS, operation)
        header = pb.ResponseHeader(revision=self._revision, cluster_id=1)
        if method is client.RANGE and request.limit:
            found = _items(self._next("checks"))
            count, highest = map(_number, found[:2]) if len(found) >= 2 else (len(self._kvs), 0)
            return pb.RangeResponse(header=header, count=count, kvs=[pb.KeyValue(mod_revision=highest)])
        if method is client.RANGE:
            kvs = self._kvs if request.range_end else [it for it in self._kvs if it.key == request.key]
            return pb.RangeResponse(header=header, kvs=kvs)
        if method is client.GRANT:
            found = _items(self._next("grants"))
            return pb.LeaseGrantResponse(ID=_number(found[0]) if found else 1, TTL=_number(found[-1]) if found else 9)
        if method is client.TIME_TO_LIVE:
            return pb.LeaseTimeToLiveResponse(TTL=_number(self._next("ttls")))
        if method is client.TXN:
            return pb.TxnResponse(header=header, succeeded=self._next("succeeds") is not False)
        return method.response()

    async def watch(self, request: pb.WatchCreateRequest, operation: str) -> _Script:
        return self

    async def read(self) -> pb.WatchResponse:
        while self._responses:
            said = self._responses.pop(0)
            if not isinstance(said, dict):
                continue
            if "sleep" in said:
                await asyncio.sleep(_number(said["sleep"]) % 10_000)
                continue
            if isinstance(said.get("canceled"), str):
                raise failures.refusal(said["canceled"], _SETTINGS.endpoints[0], _SETTINGS, "watch the leases")
            if said.get("compact"):
                raise RevisionGoneError(f"compacted up to {_number(said['compact'])}")
            cluster_id = _number(said.get("cluster", 1)) % 2**64
            header = pb.ResponseHeader(revision=_number(said.get("revision")), cluster_id=cluster_id)
            return pb.WatchResponse(header=header, events=[_event(it) for it in _items(said.get("events"))])
        raise StoreUnavailableError("cannot watch the leases in etcd: the script is over")

    async def close(self) -> None:
        pass

    async def aclose(self) -> None:
        pass

    def _next(self, name: str) -> Any:
        return self._queues[name].pop(0) if self._queues[name] else None


def _event(said: Any) -> pb.Event:
    fields = _items(said)
    event = pb.Event(type=_number(fields[0]) % 3 if fields else 0, kv=_kv(fields[1:]))  # type: ignore[arg-type]
    if len(fields) > 5:
        event.prev_kv.CopyFrom(_kv([*fields[1:2], fields[5]]))
    return event


def _kv(said: Any) -> pb.KeyValue:
    key, value, revision, lease = [*_items(said), None, None, None, None][:4]
    return pb.KeyValue(key=_bytes(key), value=_bytes(value), mod_revision=_number(revision), lease=_number(lease))


def _items(value: Any) -> list[Any]:
    return value[:_MOST] if isinstance(value, list) else []


def _number(value: Any) -> int:
    """Any int64."""
    return (value + 2**63) % 2**64 - 2**63 if type(value) is int else 0


def _bytes(value: Any) -> bytes:
    return value.encode("utf-8", "surrogatepass") if isinstance(value, str) else b""
