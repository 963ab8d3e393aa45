"""What `udptun trace --live` asks: which packets, how many of them and for how long; as words and as a query.  Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from udptun.core.errors import UsageError
from udptun.core.ip_text import ip_network
from udptun.core.network_state import IPNetwork
from udptun.core.trace_request import read_number, read_port, read_protocol

ANY = "any"
"""In place of an address: of either family."""
SNAP_LEN_MAX = 256
"""Bytes of a packet that are kept at most."""
_PACKETS_MAX, _SECONDS_MAX, _SECONDS = 1_000_000, 3600, 60


@dataclass(frozen=True, slots=True)
class LiveTraceRequest:
    """Packets from `source` to `destination`; unless `is_one_way`, also those from `destination` to `source`.

    None is anything.  ICMP stands for ICMPv6, too.  `port` is that of `destination`.  `snap_len`: bytes to show of each
    packet; 0: its headers alone.  It ends after `n_packets` or `seconds`.
    """

    source: IPNetwork | None
    destination: IPNetwork | None
    protocol: int | None
    port: int | None
    n_packets: int
    seconds: int = _SECONDS
    is_one_way: bool = False
    is_drops_alone: bool = False
    snap_len: int = 0

    @property
    def version(self) -> int | None:
        """Of IP; None: any."""
        return next((it.version for it in (self.source, self.destination) if it is not None), None)

    @classmethod
    def from_words(
        cls,
        source: str,
        destination: str,
        protocol: str = "",
        port: str = "",
        *,
        n_packets: str,
        seconds: str = "",
        is_one_way: bool = False,
        is_drops_alone: bool = False,
        snap_len: str = "",
    ) -> Self:
        """What a person has typed; an empty word was not given.  Raises UsageError."""
        ends = _prefix("SRC", source), _prefix("DST", destination)
        if len({it.version for it in ends if it is not None}) > 1:
            raise UsageError(f"SRC {source} and DST {destination} are of different families")
        number = read_protocol(protocol) if protocol else None
        return cls(
            *ends,
            number,
            read_port(port, number),
            read_number("--live", n_packets, 1, _PACKETS_MAX),
            read_number("--seconds", seconds, 1, _SECONDS_MAX) if seconds else _SECONDS,
            is_one_way,
            is_drops_alone,
            read_number("--snap-len", snap_len, 1, SNAP_LEN_MAX) if snap_len else 0,
        )

    def query(self) -> str:
        """For the daemon's `GET /trace/live?…`."""
        values = {
            "src": self.source or ANY,
            "dst": self.destination or ANY,
            "proto": "" if self.protocol is None else self.protocol,
            "port": self.port or "",
            "packets": self.n_packets,
            "seconds": self.seconds,
            "one_way": "1" * self.is_one_way,
            "drops": "1" * self.is_drops_alone,
            "snap_len": self.snap_len or "",
        }
        return "&".join(f"{name}={value}" for name, value in values.items() if value != "")

    @classmethod
    def from_query(cls, query: str) -> Self:
        """Of what `query` has made.  Raises UsageError."""
        values = dict(part.partition("=")[::2] for part in query.split("&") if part)
        return cls.from_words(
            values.get("src", ""),
            values.get("dst", ""),
            values.get("proto", ""),
            values.get("port", ""),
            n_packets=values.get("packets", ""),
            seconds=values.get("seconds", ""),
            is_one_way=values.get("one_way", "") == "1",
            is_drops_alone=values.get("drops", "") == "1",
            snap_len=values.get("snap_len", ""),
        )


def _prefix(what: str, text: str) -> IPNetwork | None:
    if text in ("", ANY):
        return None
    try:
        return ip_network(text, strict=False)
    except ValueError as exc:
        raise UsageError(f"{what} {text!r} is no IP address, no prefix and not {ANY!r}") from exc
