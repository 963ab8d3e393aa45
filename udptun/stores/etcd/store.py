"""The `etcd` store: flannel's keys and values in etcd v3.

    <prefix>/config                                 net-conf.json
    <prefix>/subnets/10.244.3.0-24                  a lease; its value is `LeaseAttrs.to_json`
    <prefix>/subnets/10.244.3.0-24&fd00:1::-64      the same in dual stack

A lease's key hangs on an etcd lease of 24 h.  A key without one is a reservation.  As flannel's, a renewal takes a new
etcd lease and writes the key again, and nothing is deleted at shutdown.

Three things differ from flannel, because flannel's way loses something in each.  A key is written only while it is as
we saw it.  A reservation stays one.  The etcd lease that a key hung on before is revoked when nothing else hangs on it.

Reading costs one request: every lease in one range.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable, Sequence

from udptun.config.store_flags import EtcdOptions
from udptun.core.errors import ConfigError, LeaseError, LeaseLostError, StoreUnavailableError
from udptun.core.lease import Lease, LeaseAttrs, Subnets
from udptun.stores.base import (
    LEASE_TTL_S,
    Chooser,
    HostsWithoutNames,
    Snapshot,
    WatchBatch,
    dropped_by,
    is_same_node,
    reservation,
)
from udptun.stores.etcd import etcd_pb2 as pb
from udptun.stores.etcd.client import RANGE, TXN, Client
from udptun.stores.etcd.etcd_leases import EtcdLeases
from udptun.stores.etcd.table import LastTable, LeaseKeys
from udptun.stores.etcd.watch import LeaseWatch

log = logging.getLogger(__name__)

TRIES = 10
"""How often a write is tried while others keep writing first (flannel's raceRetries)."""

_RETRY_S = (0.02, 0.5)
"""A lost race is run again after a random time, or many would lose together.  Its upper bound is the first number after
the first race, doubles with each further one, and ends at the second number."""


class EtcdStore(HostsWithoutNames):
    """See the module's text and `udptun.stores.base.Store`.

    Connects with the first call; `clock` gives Unix seconds.
    """

    def __init__(self, settings: EtcdOptions, clock: Callable[[], float] = time.time) -> None:
        self.name = "etcd"
        self.config_name = f"{settings.prefix}/config"
        self.is_remote = self.is_config_remote = True
        self.keeps_backend_data = True
        self.keeps_ipv6_alone = False
        self._client = Client(settings)
        self._etcd_leases = EtcdLeases(self._client, clock)
        self._keys = LeaseKeys(settings.prefix, self._etcd_leases)
        self._last = LastTable()

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

    async def has_config(self) -> bool:
        """Whether there is a network config: the smallest question to which all of etcd has to agree."""
        request = pb.RangeRequest(key=self.config_name.encode(), count_only=True)
        return (await self._client.call(RANGE, request, "look for the network config")).count > 0

    async def snapshot(self, *, exact: bool = False) -> Snapshot:
        response = await self._list("list the leases")
        in_use = {kv.lease for kv in response.kvs}
        if exact:
            await self._etcd_leases.look_up_unknown(in_use)
        self._etcd_leases.keep_only(in_use)
        table = {kv.key: self._keys.read(kv) for kv in response.kvs}
        skipped = tuple(it.problem for it in table.values() if it.lease is None)
        leases = tuple(it.lease for it in table.values() if it.lease is not None)
        self._client.n_hosts = len(table)
        self._last.put(table, response.header.revision)
        self._last.cluster_id = response.header.cluster_id
        return Snapshot(response.header.revision, leases, skipped)

    async def watch(self, after: int) -> AsyncGenerator[WatchBatch, None]:
        watch = LeaseWatch(self._client, self._keys, self._etcd_leases, self._last, self.snapshot, after)
        try:
            while True:
                yield await watch.next()
        finally:
            await watch.stop()

    # ---------------------------------------------------------------------------------------------- our lease

    async def claim(self, attrs: LeaseAttrs, choose: Chooser, ttl_s: int = LEASE_TTL_S) -> Lease:
        """As the contract says; `choose` is asked again after each lost race.

        After TRIES of them it is a StoreUnavailableError: whoever waits for a lease goes on trying.
        """
        for turn in range(TRIES):
            await _pause(turn, "claim a subnet")
            response = await self._list("claim a subnet")
            found = {kv.key: kv for kv in response.kvs}
            leases = self._leases(response)
            choice = choose(leases)
            dropped, is_reserved = dropped_by(choice, leases)
            there = found.get(self._keys.key(choice.subnets.key))
            drop = [kv for it in dropped if (kv := found.get(self._keys.key(it.key))) is not None]
            lease = await self._write(
                "claim a subnet", choice.subnets, attrs, there, None if is_reserved else ttl_s, drop
            )
            if lease is not None:
                return lease
        raise StoreUnavailableError(
            f"cannot claim a subnet in etcd: other nodes were faster {TRIES} times; trying again may help"
        )

    async def renew(self, lease: Lease, ttl_s: int = LEASE_TTL_S) -> Lease:
        operation = f"renew {lease.subnet}"
        for turn in range(TRIES):
            await _pause(turn, operation)
            kv = await self._get(lease, operation)
            if kv is None:
                raise LeaseLostError(f"cannot renew {lease.subnet}: it is no longer in etcd; claim again")
            holder = self._keys.lease(kv)
            if holder is None or not is_same_node(holder.attrs, lease.attrs):
                whose = "unreadable" if holder is None else f"{holder.attrs.host_address}'s"
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
            holder = None if kv is None else self._keys.lease(kv)
            if kv is None or not kv.lease or holder is None or not is_same_node(holder.attrs, lease.attrs):
                return
            if await self._delete(kv, operation):
                return
        raise StoreUnavailableError(f"cannot {operation} in etcd: it was written by others {TRIES} times; trying again")

    # --------------------------------------------------------------------------------------------- operators

    async def reserve(self, subnets: Subnets, attrs: LeaseAttrs) -> Lease:
        operation = f"reserve {subnets.first}"
        for turn in range(TRIES):
            await _pause(turn, operation)
            response = await self._list(operation)
            attrs = reservation(self._leases(response), subnets, attrs)
            there = next((kv for kv in response.kvs if kv.key == self._keys.key(subnets.key)), None)
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
        request = pb.RangeRequest(key=self._keys.first, range_end=self._keys.end)
        return await self._client.call(RANGE, request, operation)

    def _leases(self, response: pb.RangeResponse) -> list[Lease]:
        """What of a `_list` is a lease."""
        return [lease for kv in response.kvs if (lease := self._keys.lease(kv)) is not None]

    async def _get(self, lease: Lease, operation: str) -> pb.KeyValue | None:
        response = await self._client.call(RANGE, pb.RangeRequest(key=self._keys.key(lease.key)), operation)
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
        key = self._keys.key(subnets.key)
        # Junk without an etcd lease is no reservation.
        is_reserved = there is not None and not there.lease and self._keys.lease(there) is not None
        etcd_lease, expires_s = 0, None
        if ttl_s is not None and not is_reserved:
            etcd_lease, expires_s = await self._etcd_leases.grant(ttl_s, operation)
        put = pb.PutRequest(key=key, value=attrs.to_json().encode(), lease=etcd_lease)
        request = pb.TxnRequest(
            compare=[_unchanged(key, there), *(_unchanged(kv.key, kv) for kv in drop)],
            success=[pb.RequestOp(request_put=put), *(_deletion(kv.key) for kv in drop)],
        )
        response = await self._client.call(TXN, request, operation)
        if not response.succeeded:
            await self._etcd_leases.revoke_unused([etcd_lease])
            return None
        await self._etcd_leases.revoke_unused(kv.lease for kv in (there, *drop) if kv is not None)
        return Lease(subnets, attrs, expires_s, response.header.revision)

    async def _delete(self, kv: pb.KeyValue, operation: str) -> bool:
        """Delete the key as `kv` shows it; False when it has changed."""
        request = pb.TxnRequest(compare=[_unchanged(kv.key, kv)], success=[_deletion(kv.key)])
        response = await self._client.call(TXN, request, operation)
        if response.succeeded:
            await self._etcd_leases.revoke_unused([kv.lease])
        return response.succeeded


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


def _deletion(key: bytes) -> pb.RequestOp:
    return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key))
