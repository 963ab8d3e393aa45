"""The peers of the status document as hosts: each once, with its subnets of both families, its traffic and its rates.

Pure.  The document is docs/status.md's; keys that an earlier daemon does not know may lack.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from udptun.core.ip_text import ip_address, ip_network
from udptun.core.tunnel import device_mtu_to

if TYPE_CHECKING:
    from udptun.core.network_state import IPAddress

Document = Mapping[str, Any]

COUNTERS = ("encap_packets", "encap_bytes", "decap_packets", "decap_bytes")
_NOTHING = dict.fromkeys(COUNTERS, 0)


@dataclass(frozen=True, slots=True)
class Look:
    """One answer of the daemon.  `at_s`: when it came, by the time that passes; `unix_s`: by the clock."""

    document: Document
    at_s: float
    unix_s: float


class Traffic(NamedTuple):
    """In all, or a second.  Inner packets and their bytes: encap to a host, decap from it."""

    encap_packets: float = 0
    encap_bytes: float = 0
    decap_packets: float = 0
    decap_bytes: float = 0

    def plus(self, other: Traffic) -> Traffic:
        return Traffic(
            self.encap_packets + other.encap_packets,
            self.encap_bytes + other.encap_bytes,
            self.decap_packets + other.decap_packets,
            self.decap_bytes + other.decap_bytes,
        )

    @property
    def sum_bytes(self) -> float:
        return self.encap_bytes + self.decap_bytes


@dataclass(frozen=True, slots=True)
class Host:
    """A peer.  `parts` are its items of the document, one a family.  `total` None: the kernel carries its packets.

    `rates` None: there was no earlier look, or the counters began anew.
    """

    parts: tuple[Document, ...]
    liveness: str
    is_narrow: bool
    total: Traffic | None
    rates: Traffic | None

    @property
    def first(self) -> Document:
        return self.parts[0]

    @property
    def subnets(self) -> list[str]:
        return [part["subnet"] for part in self.parts]

    @property
    def rank(self) -> tuple[float, ...]:
        """What to show first has the smallest: trouble, then traffic."""
        trouble = 0 if "dead" in self.liveness else 1 if self.is_narrow else 2 if self.first.get("strays") else 3
        return trouble, -(self.rates or Traffic()).sum_bytes, -(self.total or Traffic()).sum_bytes


@dataclass(frozen=True, slots=True)
class Sum:
    """Many hosts at once."""

    n: int
    liveness: Mapping[str, int]
    rates: Traffic | None


def hosts_of(look: Look, earlier: Look | None) -> list[Host]:
    """All hosts, in the order in which to show them."""
    document = look.document
    ipv6 = {part["subnet"]: part for part in (document.get("ipv6") or {}).get("peers", ())}
    before = {} if earlier is None else parts_of(earlier.document)
    elapsed_s = 0.0 if earlier is None else look.at_s - earlier.at_s
    grouped: list[tuple[Document, ...]] = []
    for part in document["peers"]:
        # Where IPv6 is alone, `peers` has it too.
        ipv6.pop(part["subnet"], None)
        twin = ipv6.pop(part.get("ipv6_subnet"), None)
        grouped.append((part,) if twin is None else (part, twin))
    grouped += [(part,) for part in ipv6.values()]
    found = [_host(document, parts, before, elapsed_s) for parts in grouped]
    # Of equals the order of the document stays.
    return sorted(found, key=lambda host: host.rank)


def sum_of(hosts: Iterable[Host]) -> Sum:
    """How many there are of each liveness, and what they send and receive together."""
    n, liveness, rates = 0, dict.fromkeys(("alive", "unknown", "dead"), 0), []
    for host in hosts:
        n += 1
        kind = "dead" if "dead" in host.liveness else host.liveness
        liveness[kind] = liveness.get(kind, 0) + 1
        if host.rates is not None:
            rates.append(host.rates)
    whole = Traffic(*map(sum, zip(*rates, strict=True))) if rates else None
    return Sum(n, {kind: k for kind, k in liveness.items() if k and kind != "-"}, whole)


def matching(document: Document, wanted: str) -> set[str]:
    """Subnets of the peers that `wanted` means: a subnet, a public address, or an address of a pod or of the device.

    Raises ValueError when it is no address and no subnet.
    """
    parts = _parts(document)
    if "/" in wanted:
        subnet = ip_network(wanted, strict=False)
        found = {part["subnet"] for part in parts if ip_network(part["subnet"]) == subnet}
    else:
        address = ip_address(wanted)
        found = {part["subnet"] for part in parts if _is_of(part, str(address), address)}
    twins = {part["subnet"]: part.get("ipv6_subnet") for part in document["peers"]}
    return {it for pair in twins.items() if found & {*pair} for it in pair if it is not None} | found


def restrict(document: Document, subnets: set[str]) -> dict[str, Any]:
    """The same document with these peers alone."""
    kept = {**document, "peers": [part for part in document["peers"] if part["subnet"] in subnets]}
    if ipv6 := document.get("ipv6"):
        kept["ipv6"] = {**ipv6, "peers": [part for part in ipv6["peers"] if part["subnet"] in subnets]}
    return kept


def counters_of(document: Document) -> dict[str, int]:
    """All counters, summed over the datapaths: IPv6 may have one of its own."""
    counters = dict(document["counters"])
    for name, n in (document.get("ipv6") or {}).get("counters", {}).items():
        counters[name] = counters.get(name, 0) + n
    return counters


def traffic_of(part: Document) -> Traffic:
    """All that was exchanged with a peer by one family, by its item of the document."""
    return Traffic(part["encap_packets"], part["encap_bytes"], part["decap_packets"], part["decap_bytes"])


def rates_of(part: Document, before: Document | None, elapsed_s: float) -> Traffic | None:
    """The same a second, since its item was as `before`; None: it was not there, and had nothing to count.

    None when nobody knows: there was no look before, or it has begun to count anew.
    """
    if elapsed_s <= 0:
        return None
    old = before or _NOTHING
    sent, sent_bytes = part["encap_packets"] - old["encap_packets"], part["encap_bytes"] - old["encap_bytes"]
    got, got_bytes = part["decap_packets"] - old["decap_packets"], part["decap_bytes"] - old["decap_bytes"]
    if sent < 0 or got < 0 or sent_bytes < 0 or got_bytes < 0:
        return None
    return Traffic(sent / elapsed_s, sent_bytes / elapsed_s, got / elapsed_s, got_bytes / elapsed_s)


def parts_of(document: Document) -> dict[str, Document]:
    """The items of all peers by both families, by subnet."""
    return {part["subnet"]: part for part in _parts(document)}


def _parts(document: Document) -> Sequence[Document]:
    return [*document["peers"], *(document.get("ipv6") or {}).get("peers", ())]


def _is_of(part: Document, text: str, address: IPAddress) -> bool:
    learned = [it["address"] for it in part.get("learned", ())]
    return text in (part["public_ip"], *learned) or address in ip_network(part["subnet"])


def _host(document: Document, parts: tuple[Document, ...], before: Mapping[str, Document], elapsed_s: float) -> Host:
    counted = [part for part in parts if COUNTERS[0] in part]
    total: Traffic | None = None
    rates: Traffic | None = None
    if counted:
        total, *further = map(traffic_of, counted)
        rates, *others = (rates_of(part, before.get(part["subnet"]), elapsed_s) for part in counted)
        for other in further:
            total = total.plus(other)
        for a_second in others:
            rates = None if rates is None or a_second is None else rates.plus(a_second)
    return Host(parts, _liveness(parts), _is_narrow(document, parts[0]), total, rates)


def _liveness(parts: tuple[Document, ...]) -> str:
    """Of the host, and where only one family is dead, which."""
    states = [part.get("liveness", "-") for part in parts]
    if len(states) == 2 and states.count("dead") == 1:
        return f"{'IPv4' if states[0] == 'dead' else 'IPv6'} dead"
    return str(states[0])


def _is_narrow(document: Document, part: Document) -> bool:
    """Whether the path takes less than the device allows, beside what the outer header of another family takes."""
    path_mtu = part.get("path_mtu")
    if path_mtu is None:
        return False
    full = device_mtu_to(part["public_ip"], document["underlay"]["address"], document["backend"]["mtu"])
    return bool(path_mtu < full)
