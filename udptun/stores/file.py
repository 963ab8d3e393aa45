"""The `file` store: leases that a person wrote down, the same file on each host.

It is for a few real hosts without a server.  The file is a JSON list with one entry for each host:

    [
      {"Subnet": "10.244.1.0/24", "PublicIP": "192.0.2.1", "Port": 8285, "Node": "alpha"},
      {"Subnet": "10.244.2.0/24", "PublicIP": "192.0.2.2", "IPv6Subnet": "fd00:244:0:2::/64", "PublicIPv6": "fd00::2"}
    ]

Subnet or IPv6Subnet is required, or both, and so is PublicIP or PublicIPv6.  Port is where that host listens; without
it, that is the port that is configured on this host.  Node is a name for --node.  Keys are matched without regard to
case, as in net-conf.json.  An unknown key is refused, because a mistyped Port would send packets to the wrong port in
silence.

All hosts in the file run udptun, and all have the backend of this one.  One that has to know more of a peer than its
addresses and Port does not work with this store.

The file is the allocation, and nothing here ever writes it.  A claim finds the own entry and never asks the chooser.
The daemon checks the subnet against Network as it does with a lease from any other store.

The file is read in the event loop, without a thread: one stat each POLL_S, and parsing only when it has changed.
"""

from __future__ import annotations

import asyncio
import json
import time
from bisect import bisect
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import TypeVar

from udptun.config.go_json import JsonObject, shown
from udptun.core.errors import ConfigError, LeaseLostError, one_line
from udptun.core.family import Family
from udptun.core.ip_text import ipv6_address, ipv6_network
from udptun.core.lease import EventType, Json, Lease, LeaseAttrs, LeaseEvent, Subnets, is_same_host
from udptun.stores.base import (
    LEASE_TTL_S,
    Chooser,
    HostsWithoutNames,
    Snapshot,
    WatchBatch,
    read_network_config,
    reason,
)

T = TypeVar("T")

POLL_S = 0.2
"""How often a watch looks whether the file has changed, seconds."""

_SETTLED_NS = 1_000_000_000
"""A file that was changed more recently than this is read again at the next look.  Another edit of the same length
within one tick of the filesystem's clock would leave the same stat behind.  ctime is what counts: editors set mtime
back."""

_STARTER = """\
[
  {"Subnet": "10.244.1.0/24", "PublicIP": "192.0.2.1", "Port": 8285, "Node": "alpha"},
  {"Subnet": "10.244.2.0/24", "PublicIP": "192.0.2.2", "Port": 8285, "Node": "beta"}
]
"""

_KEYS = {name.lower(): name for name in ("Subnet", "PublicIP", "IPv6Subnet", "PublicIPv6", "Port", "Node")}
_TWINS = {"Subnet": "IPv6Subnet", "PublicIP": "PublicIPv6"}
"""What may stand in the place of a key."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One usable entry; `number` counts from 1, as the messages do."""

    number: int
    lease: Lease
    node: str | None


@dataclass(frozen=True, slots=True)
class Leases:
    """What a leases file says: its usable entries and a line for each of the others."""

    entries: tuple[Entry, ...] = ()
    skipped: tuple[str, ...] = ()


def parse(text: str) -> Leases:
    """Read a leases file.  Pure.  Raises ConfigError when it is no JSON list.

    An entry that cannot be used costs only itself.  Of two entries that overlap the first is used, so that all hosts
    agree.
    """
    try:
        items = json.loads(text, object_pairs_hook=JsonObject)
    except json.JSONDecodeError as exc:
        raise ConfigError(f"line {exc.lineno} column {exc.colno}: {exc.msg}") from exc
    except (ValueError, RecursionError) as exc:  # a number of thousands of digits, thousands of brackets
        raise ConfigError(f"not usable JSON: {exc}") from exc
    if not isinstance(items, list):
        raise ConfigError('not a JSON list; write [{"Subnet": ..., "PublicIP": ...}, ...]')
    entries: list[Entry] = []
    skipped: list[str] = []
    taken: dict[Family, list[_Range]] = {family: [] for family in Family}
    for number, item in enumerate(items, 1):
        try:
            entry = _entry(number, item)
            _take(taken, entry)
        except ValueError as exc:
            skipped.append(one_line(f"entry {number}: {exc}"))
        else:
            entries.append(entry)
    return Leases(tuple(entries), tuple(skipped))


def _entry(number: int, item: Json) -> Entry:
    """Raises ValueError with the reason why the item cannot be used."""
    if not isinstance(item, JsonObject):
        raise ValueError('not a JSON object; write {"Subnet": ..., "PublicIP": ...}')
    fields: dict[str, Json] = {}
    for written, value in item.pairs:
        key = _KEYS.get(written.lower())
        if key is None:
            raise ValueError(f"unknown key {written!r}; known are {', '.join(_KEYS.values())}")
        if key in fields:
            raise ValueError(f"{key} is there twice")
        fields[key] = value
    ipv6 = _value(fields, "IPv6Subnet", ipv6_network)
    ipv4 = _value(fields, "Subnet", IPv4Network, is_required=ipv6 is None)
    for name, subnet in (("Subnet", ipv4), ("IPv6Subnet", ipv6)):
        # What is made of an address without a length.
        if subnet is not None and subnet.prefixlen == subnet.max_prefixlen:
            sample = "10.244.1.0/24" if name == "Subnet" else "fd00:244:0:1::/64"
            raise ValueError(f"{name} {subnet.network_address} has no prefix length; write it as {sample}")
    public_ipv6 = _value(fields, "PublicIPv6", ipv6_address)
    public_ip = _value(fields, "PublicIP", IPv4Address, is_required=public_ipv6 is None)
    backend_data: dict[str, Json] = {"Udptun": 1}
    if ipv6 is not None:
        backend_data["IPv6"] = True
    port = fields.get("Port")
    if port is not None:
        if type(port) is not int or not 0 < port < 65536:
            raise ValueError(f"Port {shown(port)} is not a whole number from 1 to 65535")
        backend_data["Port"] = port
    node = None if fields.get("Node") is None else _text(fields, "Node")
    attrs = LeaseAttrs(public_ip, public_ipv6, "udp", backend_data)
    return Entry(number, Lease(Subnets(ipv4, ipv6), attrs), node)


def _value(fields: dict[str, Json], key: str, kind: Callable[[str], T], *, is_required: bool = False) -> T | None:
    if fields.get(key) is None:
        if is_required:
            raise ValueError(f"{key} is missing, and so is {_TWINS[key]}")
        return None
    text = _text(fields, key)
    try:
        return kind(text)
    except ValueError as exc:
        # Python names what is wrong with a part of the value, and not the value.
        raise ValueError(f"{key} {shown(text)}: {exc}") from None


def _text(fields: dict[str, Json], key: str) -> str:
    value = fields[key]
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key} {shown(value)} is not a text" if value != "" else f"{key} is empty")
    return value


_Range = tuple[int, int, int]
"""First address, last address, entry number."""


def _take(taken: dict[Family, list[_Range]], entry: Entry) -> None:
    """Add the entry's addresses to those taken, sorted and disjoint.  Raises ValueError when some are."""
    places = []
    for family, ranges in taken.items():
        subnet = entry.lease.subnets.of(family)
        if subnet is None:
            continue
        first, last = int(subnet.network_address), int(subnet.broadcast_address)
        at = bisect(ranges, (first,))
        for other_first, other_last, number in ranges[max(at - 1, 0) : at + 1]:
            if other_first <= last and first <= other_last:
                raise ValueError(f"subnet {subnet} overlaps entry {number}")
        places.append((ranges, at, (first, last, entry.number)))
    for ranges, at, place in places:
        ranges.insert(at, place)


class FileStore(HostsWithoutNames):
    """See the module's text and `udptun.stores.base.Store`.

    Before the first good reading every call raises ConfigError.  Afterwards, while the file is gone or unreadable as a
    whole, the last good leases stay in force, and the watch says why, once for each reason.

    The own entry is the one named `node`.  Without a name it is the one with the PublicIP (see `is_same_host`) of the
    attributes that are claimed with, and with their Port where several entries share that address.  Once claimed, it
    appears in snapshots and events with those attributes, and the others with the same backend.

    The revision counts the accepted changes that this object has seen.
    """

    def __init__(self, path: Path, net_config_path: Path, node: str | None = None) -> None:
        self.name = f"file:{path}"
        self.config_name = str(net_config_path)
        self.is_remote = self.is_config_remote = False
        self.keeps_backend_data = False
        self.keeps_ipv6_alone = True
        self._path = path
        self._net_config_path = net_config_path
        self._node = node
        self._own_attrs: LeaseAttrs | None = None
        self._revision = 0
        self._leases = Leases()
        self._text: str | None = None
        self._stat: tuple[int, ...] | None = None
        """The stat of the file that `_text` was read from; None: read it again."""
        self._problem: str | None = None
        self._told: tuple[str, ...] = ()
        """What was said of refused entries last."""

    async def network_config(self) -> str:
        return read_network_config(self._net_config_path)

    async def snapshot(self, *, exact: bool = False) -> Snapshot:
        self._refresh()
        return self._snapshot()

    async def watch(self, after: int) -> AsyncGenerator[WatchBatch, None]:
        self._refresh()
        known = self._by_key()
        if self._revision != after:
            # The revisions between are not kept.
            yield WatchBatch(self._revision, snapshot=self._snapshot())
        after = self._revision
        while True:
            self._refresh()
            told, self._told = self._told, self._skipped()
            skipped = tuple(line for line in self._told if line not in told)
            mended = tuple(line for line in told if line not in self._told)
            if self._revision != after or skipped or mended:
                before, known, after = known, self._by_key(), self._revision
                yield WatchBatch(after, _difference(before, known), skipped=skipped, mended=mended)
            await asyncio.sleep(POLL_S)

    async def claim(self, attrs: LeaseAttrs, choose: Chooser, ttl_s: int = LEASE_TTL_S) -> Lease:
        """The own entry as a lease with `attrs`.  `choose` is not called and `ttl_s` not used: see the module.

        Raises ConfigError when no entry or more than one is ours, saying what to write.
        """
        self._refresh()
        own = self._find_own(attrs)
        port = attrs.port(0)
        if is_same_host(own.lease.attrs, attrs) and port and own.lease.attrs.port(port) != port:
            raise ConfigError(
                f"{self._path} entry {own.number} says Port {own.lease.attrs.port(0)} for {attrs.host_address} and "
                f"this daemon listens on {port}: peers would send to the wrong port; make the two equal"
            )
        self._own_attrs = attrs
        return replace(own.lease, attrs=attrs)

    async def renew(self, lease: Lease, ttl_s: int = LEASE_TTL_S) -> Lease:
        """The own entry again, if its subnet is still the lease's.  Nothing is written, nothing expires."""
        self._refresh()
        try:
            own = self._find_own(lease.attrs)
        except ConfigError as exc:
            raise LeaseLostError(str(exc)) from exc
        if own.lease.key != lease.key:
            raise LeaseLostError(
                f"cannot keep {lease.subnet}: {self._path} entry {own.number} now gives this host "
                f"{own.lease.subnet}; claim again"
            )
        self._own_attrs = lease.attrs
        return replace(own.lease, attrs=lease.attrs)

    async def release(self, lease: Lease) -> None:
        """Does nothing.  The file is the operator's, who takes the entry out on every host."""

    async def reserve(self, subnets: Subnets, attrs: LeaseAttrs) -> Lease:
        """Raises ConfigError: the file is the operator's."""
        fields: dict[str, object] = {"Subnet": subnets.ipv4, "PublicIP": attrs.public_ip}
        fields |= {"IPv6Subnet": subnets.ipv6, "PublicIPv6": attrs.public_ipv6}
        entry = json.dumps({key: str(value) for key, value in fields.items() if value is not None})
        raise ConfigError(f"cannot reserve {subnets.first}: {self.name} is edited by hand; add {entry} on every host")

    async def delete(self, lease: Lease) -> None:
        """Raises ConfigError: the file is the operator's."""
        raise ConfigError(
            f"cannot release {lease.subnet}: {self.name} is edited by hand; take the entry out on every host"
        )

    async def aclose(self) -> None:
        """Nothing is held open between calls."""

    def _refresh(self) -> None:
        """Read the file if it may have changed.  Raises ConfigError while there has been no good reading."""
        try:
            status = self._path.stat()
            signature = (status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns)
            if signature == self._stat:
                return
            self._stat = signature if time.time_ns() - status.st_ctime_ns > _SETTLED_NS else None
            text = self._path.read_text(encoding="utf-8-sig")
            if text != self._text:
                self._accept(parse(text))
                self._text = text
            self._problem = None
        except FileNotFoundError:
            self._stat = None
            self._refuse(f"there is no leases file {self._path}; write a starter with: udptun lease init {self._path}")
        except OSError as exc:
            self._stat = None
            self._refuse(f"cannot read the leases file {self._path}: {reason(exc)}")
        except UnicodeDecodeError as exc:
            self._refuse(f"cannot use the leases file {self._path}: {reason(exc)}")
        except ConfigError as exc:
            self._refuse(f"cannot use the leases file {self._path}: {exc}")

    def _accept(self, leases: Leases) -> None:
        if leases != self._leases or self._revision == 0:
            self._leases = leases
            self._revision += 1

    def _refuse(self, problem: str) -> None:
        self._problem = problem
        if self._revision == 0:
            self._stat = None
            raise ConfigError(problem)

    def _find_own(self, attrs: LeaseAttrs) -> Entry:
        entries = self._leases.entries
        if self._node is not None:
            found = [entry for entry in entries if entry.node == self._node]
            sought = f"Node {self._node!r}"
            advice = f'"Node": {json.dumps(self._node)}'
        else:
            found = [entry for entry in entries if is_same_host(entry.lease.attrs, attrs)]
            key = "PublicIPv6" if attrs.public_ip is None else "PublicIP"
            sought = f"{key} {attrs.host_address}"
            advice = f'"{key}": "{attrs.host_address}"'
            if len(found) > 1:
                port = attrs.port(0)
                found = [entry for entry in found if entry.lease.attrs.port(port) == port] or found
                sought += f" and Port {port}"
        if len(found) == 1:
            return found[0]
        if found:
            numbers = ", ".join(str(entry.number) for entry in found)
            raise ConfigError(
                f"{self._path} entries {numbers} all have {sought}: which is this host's? "
                "give each its own Node and start with --node"
            )
        refused = f" ({'; '.join(self._leases.skipped)})" if self._leases.skipped else ""
        raise ConfigError(
            f"{self._path} has no usable entry with {sought}{refused}: add one with {advice} for this host"
            + ("" if self._node is not None else ", or name its entry with --node")
        )

    def _by_key(self) -> dict[str, Lease]:
        """The leases, the own one with the attributes it was claimed with."""
        leases = {entry.lease.key: entry.lease for entry in self._leases.entries}
        if self._own_attrs is not None:
            kind = self._own_attrs.backend_type
            leases = {key: replace(it, attrs=replace(it.attrs, backend_type=kind)) for key, it in leases.items()}
            # There is no entry, or there are several, because an edit took ours away.  renew() says so.
            with suppress(ConfigError):
                own = self._find_own(self._own_attrs).lease
                leases[own.key] = replace(own, attrs=self._own_attrs)
        return leases

    def _snapshot(self) -> Snapshot:
        self._told = self._skipped()
        return Snapshot(self._revision, tuple(self._by_key().values()), self._told)

    def _skipped(self) -> tuple[str, ...]:
        if self._problem is None:
            return self._leases.skipped
        return (*self._leases.skipped, f"{self._problem}; the last good leases stay in force")


def _difference(before: dict[str, Lease], after: dict[str, Lease]) -> tuple[LeaseEvent, ...]:
    """Removals come first, because a subnet may go from one entry to another one of a different length."""
    removed = [LeaseEvent(EventType.REMOVED, lease) for key, lease in before.items() if key not in after]
    added = [LeaseEvent(EventType.ADDED, lease) for key, lease in after.items() if before.get(key) != lease]
    return (*removed, *added)


def write_starter(path: Path, force: bool = False) -> None:
    """Write a leases file of two example hosts to edit.  Raises ConfigError; overwrites only with `force`."""
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(_STARTER)
    except FileExistsError as exc:
        raise ConfigError(f"{path} exists already and was left as it is; edit it, or name another file") from exc
    except OSError as exc:
        raise ConfigError(f"cannot write the leases file {path}: {reason(exc)}") from exc
