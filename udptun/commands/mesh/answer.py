"""What a host says of its peers, read from bytes that anybody may have sent.  Pure.

Every value is of its type and in its bounds, and every text is one that we have written anew, so that what is shown of
it can hold nothing that a terminal or a browser would obey.  Keys that we do not know are ignored.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NoReturn, TypeVar, cast

from udptun.core.ip_text import ip_address, ip_network
from udptun.core.mesh import MOST_PEERS, SCHEMA
from udptun.core.network_state import IPAddress, IPNetwork
from udptun.core.text_cache import TextCache

MOST_BYTES = 1 << 20
"""Of an answer's body; one of 1,000 peers with both families has about 400 kB."""

_LIVENESS = ("alive", "dead", "unknown")
_MOST = 1e9
"""Milliseconds, seconds or probes: more of them are a mistake."""
_WORD = re.compile(r"[0-9A-Za-z.+_-]{1,40}")
_LINE_CHARS = 400
_QUOTED = 40
"""Characters of a value that a line about it quotes."""

_ADDRESSES: TextCache[IPAddress] = TextCache(1 << 18)
_NETWORKS: TextCache[IPNetwork] = TextCache(1 << 18)
"""Each host names all the others."""

T = TypeVar("T")


class AnswerError(ValueError):
    """Why an answer is not used, in one line of printable ASCII."""


@dataclass(frozen=True, slots=True)
class Found:
    """What one host has found out about the way to another one.  None: it does not know.

    `probes_sent` and `probes_lost` are of the last 10 to 20 minutes.  `mtu`: how long packets may be by the device.
    """

    liveness: str | None = None
    rtt_ms: float | None = None
    rtt_age_s: float | None = None
    path_mtu: int | None = None
    probes_sent: int = 0
    probes_lost: int = 0
    mtu: int | None = None

    @property
    def is_narrow(self) -> bool:
        return self.path_mtu is not None and self.mtu is not None and self.path_mtu < self.mtu

    @property
    def loss(self) -> float | None:
        """The share of probes that were lost; None: there were none."""
        return self.probes_lost / self.probes_sent if self.probes_sent else None


@dataclass(frozen=True, slots=True)
class Peer:
    """A host as another one sees it.  `ipv6`: what is found by IPv6 where that goes a way of its own."""

    subnet: IPNetwork
    ipv6_subnet: IPNetwork | None
    public_ip: IPAddress
    is_udptun: bool
    found: Found
    ipv6: Found | None = None


@dataclass(frozen=True, slots=True)
class View:
    """What a host says of itself and its peers.  `made_at`: Unix time by its clock.  `mesh_port` 0: it has none open.

    `probes`: `on`, `off`, or `off: ` and why.  `is_whole`: it has named all its `n_peers` peers; `peers` may be fewer.
    """

    version: str
    made_at: float
    subnet: IPNetwork
    ipv6_subnet: IPNetwork | None
    public_ip: IPAddress
    backend: str
    mtu: int
    probes: str
    mesh_port: int
    n_peers: int
    is_whole: bool
    peers: tuple[Peer, ...]


def read_view(body: bytes, of: Collection[IPNetwork] = ()) -> View:
    """With the peers that have these subnets, or all of them.  Raises AnswerError."""
    if len(body) > MOST_BYTES:
        raise AnswerError(f"it has more than {MOST_BYTES} bytes")
    try:
        document = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise AnswerError("it is no JSON document") from None
    top = _Object(document, "it")
    if (schema := top.value("schema")) != SCHEMA:
        raise AnswerError(f"its schema is {_quoted(schema)}, and this udptun reads {SCHEMA}")
    items = top.value("peers")
    if not isinstance(items, list):
        raise AnswerError("peers is no list")
    if len(items) > MOST_PEERS:
        raise AnswerError(f"it has {len(items)} peers, more than {MOST_PEERS}")
    peers = [_peer(_Object(item, f"peers[{i}]")) for i, item in enumerate(items)]
    if len({peer.subnet for peer in peers}) < len(peers):
        raise AnswerError("it has two peers of one subnet")
    n_peers = top.integer("n_peers")
    return View(
        version=top.text("version", _word),
        made_at=top.number("made_at", most=1e11),
        subnet=top.text("subnet", _network),
        ipv6_subnet=top.text_or_none("ipv6_subnet", _network),
        public_ip=top.text("public_ip", _address),
        backend=top.text("backend", _word),
        mtu=top.integer("mtu", most=65535),
        probes=top.text("probes", _line),
        mesh_port=top.integer("mesh_port", most=65535),
        n_peers=n_peers,
        is_whole=n_peers <= len(peers),
        peers=tuple(peer for peer in peers if not of or peer.subnet in of or peer.ipv6_subnet in of),
    )


def _peer(it: _Object) -> Peer:
    twin = it.value("ipv6")
    return Peer(
        subnet=it.text("subnet", _network),
        ipv6_subnet=it.text_or_none("ipv6_subnet", _network),
        public_ip=it.text("public_ip", _address),
        is_udptun=it.boolean("udptun"),
        found=_found(it),
        ipv6=None if twin is None else _found(_Object(twin, f"{it.name}.ipv6")),
    )


def _found(it: _Object) -> Found:
    sent, lost = it.integer_or_none("probes_sent") or 0, it.integer_or_none("probes_lost") or 0
    if lost > sent:
        raise AnswerError(f"{it.name} has lost more probes than were sent")
    return Found(
        liveness=it.text_or_none("liveness", _liveness),
        rtt_ms=it.number_or_none("rtt_ms"),
        rtt_age_s=it.number_or_none("rtt_age_s"),
        path_mtu=it.integer_or_none("path_mtu", most=65535),
        probes_sent=sent,
        probes_lost=lost,
        mtu=it.integer_or_none("mtu", most=65535),
    )


class _Object:
    """A JSON object whose keys are read by type; `name` stands in the lines about what is wrong."""

    def __init__(self, value: object, name: str) -> None:
        if not isinstance(value, dict):
            raise AnswerError(f"{name} is no object")
        self.name = name
        self._values = cast("Mapping[str, object]", value)

    def value(self, key: str) -> object:
        if key not in self._values:
            raise AnswerError(f"{self.name} has no {key}")
        return self._values[key]

    def text(self, key: str, read: Callable[[str], T]) -> T:
        value = self.value(key)
        try:
            if isinstance(value, str):
                return read(value)
        except ValueError:
            pass
        raise self._wrong(key, value)

    def text_or_none(self, key: str, read: Callable[[str], T]) -> T | None:
        return None if self.value(key) is None else self.text(key, read)

    def number(self, key: str, most: float = _MOST) -> float:
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
            raise self._wrong(key, value)
        return float(value)

    def number_or_none(self, key: str) -> float | None:
        return None if self.value(key) is None else self.number(key)

    def integer(self, key: str, most: float = _MOST) -> int:
        value = self.number(key, most)
        if value != math.floor(value):
            raise self._wrong(key, value)
        return int(value)

    def integer_or_none(self, key: str, most: float = _MOST) -> int | None:
        return None if self.value(key) is None else self.integer(key, most)

    def boolean(self, key: str) -> bool:
        value = self.value(key)
        if not isinstance(value, bool):
            raise self._wrong(key, value)
        return value

    def _wrong(self, key: str, value: object) -> AnswerError:
        return AnswerError(f"{key} of {self.name} is {_quoted(value)}")


def _network(text: str) -> IPNetwork:
    return _NETWORKS.get(text, ip_network)


def _address(text: str) -> IPAddress:
    return _ADDRESSES.get(text, ip_address)


def _refuse_constant(name: str) -> NoReturn:
    """NaN and Infinity are no JSON."""
    raise ValueError(name)


def _liveness(text: str) -> str:
    if text not in _LIVENESS:
        raise ValueError(text)
    return text


def _word(text: str) -> str:
    if not _WORD.fullmatch(text):
        raise ValueError(text)
    return text


def _line(text: str) -> str:
    if len(text) > _LINE_CHARS or not text.isascii() or not text.isprintable():
        raise ValueError(text)
    return text


def _quoted(value: object) -> str:
    """As JSON in ASCII, not too long."""
    if isinstance(value, dict | list):
        return "no value of its kind"
    text = json.dumps(value if not isinstance(value, str) else value[: _QUOTED + 1])
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."
