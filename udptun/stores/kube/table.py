"""Every node that is a host, by name, and what a change of some means for the leases.  Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

from udptun.core.errors import one_line
from udptun.core.family import Family
from udptun.core.lease import EventType, Lease, LeaseEvent, LeaseFormatError
from udptun.core.network_state import IPAddress
from udptun.stores.kube.annotations import Annotations, lack
from udptun.stores.kube.node import Node

K = TypeVar("K")

_PROBLEM_CHARS = 1000
"""What is wrong may be as long as an annotation, 256 kB."""

_NAMED = 20
"""So many addresses that several nodes have are named."""


@dataclass(frozen=True, slots=True)
class _Known:
    """A node that is a host.  `lease` is None when its annotations cannot be read; then `problem` says why."""

    lease: Lease | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Difference:
    """What a change of nodes means, in the terms of `WatchBatch`."""

    events: tuple[LeaseEvent, ...] = ()
    skipped: tuple[str, ...] = ()
    mended: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.events or self.skipped or self.mended)


class NodeTable:
    """Two nodes with one podCIDR have one lease between them: `own_name`'s, or that of the first by name."""

    def __init__(self, annotations: Annotations, own_name: str, families: Collection[Family]) -> None:
        """`families`: what pods have.  A node without a podCIDR of any of them has no lease."""
        self._annotations = annotations
        self._own_name = own_name
        self._families = families
        self._known: dict[str, _Known] = {}
        self._holders: dict[str, set[str]] = {}
        """The names of the nodes with a lease, by its key."""
        self._at: dict[IPAddress, set[str]] = {}
        """The names of the nodes with a lease, by PublicIP or, without one, by PublicIPv6."""

    def __len__(self) -> int:
        return len(self._known)

    @property
    def leases(self) -> tuple[Lease, ...]:
        """In the order of their addresses: a server lists nodes out of its cache in any order."""
        leases = [lease for key in self._holders if (lease := self._lease_of(key)) is not None]
        return tuple(sorted(leases, key=lambda it: (int(it.subnet.network_address), it.subnet.prefixlen)))

    @property
    def skipped(self) -> tuple[str, ...]:
        """A line for each node that says that it is a host, and whose lease is not used."""
        bad = [known.problem for known in self._known.values() if known.problem]
        return (*bad, *(line for key in self._holders for line in self._hidden(key)))

    @property
    def shared_addresses(self) -> tuple[str, ...]:
        """A line for each PublicIP and port that several nodes publish.  May be read on another thread."""
        lines = []
        for public_ip, names in list(self._at.items()):
            by_port: dict[int, list[str]] = {}
            for name in sorted(names.copy()):
                known = self._known.get(name)
                if known is not None and known.lease is not None:
                    by_port.setdefault(known.lease.attrs.port(0), []).append(name)
            for same in by_port.values():
                if len(same) > 1:
                    fact = f"the nodes {' and '.join(same[:5])} publish one PublicIP {public_ip}"
                    names_of = self._annotations
                    key = names_of.public_ip_overwrite if public_ip.version == 4 else names_of.public_ipv6_overwrite
                    lines.append(
                        f"{one_line(fact)}, so packets for their pods go to one of them: give each --iface or the "
                        f"annotation {key}"
                    )
        more = len(lines) - _NAMED
        return (*lines[:_NAMED], f"{more} more addresses are shared by nodes") if more > 0 else tuple(lines)

    def apply(self, nodes: Iterable[Node], gone: Iterable[str] = ()) -> Difference:
        """These nodes are so now, and those are gone; what that means."""
        before: dict[str, Lease | None] = {}
        lines: dict[str, bool] = {}
        for name in gone:
            self._change(name, None, before, lines)
        for node in nodes:
            self._change(node.name, self._read(node), before, lines)
        return self._difference(before, lines)

    def _difference(self, before: dict[str, Lease | None], lines: dict[str, bool]) -> Difference:
        """`before` has the leases of the keys that were touched, `lines` which lines hold, of those that may not."""
        removed, added = [], []
        for key, old in before.items():
            new = self._lease_of(key)
            if old is not None and new is None:
                removed.append(LeaseEvent(EventType.REMOVED, old))
            elif new is not None and (old is None or replace(old, revision=new.revision) != new):
                added.append(LeaseEvent(EventType.ADDED, new))
            lines |= dict.fromkeys(self._hidden(key), True)
        return Difference(
            (*removed, *added),
            tuple(line for line, holds in lines.items() if holds),
            tuple(line for line, holds in lines.items() if not holds),
        )

    def _read(self, node: Node) -> _Known | None:
        if not self._annotations.is_host(node):
            return None
        try:
            lease = self._annotations.lease(node)
            has_any = any(lease.subnets.of(family) is not None for family in self._families)
            problem = "" if has_any else lack(node, self._families)
        except LeaseFormatError as exc:
            problem = str(exc)
        if problem:
            return _Known(None, one_line(f"node {node.name}: {problem}"[:_PROBLEM_CHARS]))
        return _Known(lease)

    def _change(self, name: str, new: _Known | None, before: dict[str, Lease | None], lines: dict[str, bool]) -> None:
        old = self._known.get(name)
        for known in (old, new):
            if known is not None and known.lease is not None and known.lease.key not in before:
                before[known.lease.key] = self._lease_of(known.lease.key)
                lines |= dict.fromkeys(self._hidden(known.lease.key), False)
        if old is not None:
            del self._known[name]
            if old.lease is None:
                lines[old.problem] = False
            else:
                _discard(self._holders, old.lease.key, name)
                _discard(self._at, old.lease.attrs.host_address, name)
        if new is not None:
            self._known[name] = new
            if new.lease is None:
                lines[new.problem] = True
            else:
                self._holders.setdefault(new.lease.key, set()).add(name)
                self._at.setdefault(new.lease.attrs.host_address, set()).add(name)

    def _lease_of(self, key: str) -> Lease | None:
        names = self._holders.get(key)
        return self._known[min(names, key=self._order)].lease if names else None

    def _hidden(self, key: str) -> list[str]:
        """A line for each node whose podCIDR is another one's, too."""
        first, *others = sorted(self._holders.get(key, ()), key=self._order) or [""]
        return [one_line(f"node {name}: its podCIDR {key} is that of node {first}, too") for name in others]

    def _order(self, name: str) -> tuple[bool, str]:
        return name != self._own_name, name


def _discard(index: dict[K, set[str]], key: K, name: str) -> None:
    index[key].discard(name)
    if not index[key]:
        del index[key]
