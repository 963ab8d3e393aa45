"""What a host remembers across restarts, in its state directory: who it is and the last good lease table.

`node-id` holds the NodeID of our leases and `vtep-mac` the MAC of our VTEP.  `last-leases.json` lets a daemon forward
before its store has answered.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

from udptun.core import atomic_file
from udptun.core.errors import ConfigError, KernelError
from udptun.core.lease import Lease, LeaseAttrs, LeaseFormatError, Subnets

SCHEMA = 2
"""Of last-leases.json.  Another number is ignored, not guessed at."""

CLOCK_SLACK_S = 60.0
"""How far the clock may be behind the time of saving before the saved expiries mean nothing, seconds."""

_NODE_ID = "node-id"
_VTEP_MAC = "vtep-mac"
_LAST_LEASES = "last-leases.json"


@dataclass(frozen=True, slots=True)
class LastLeases:
    """The lease table as it was good last: our own lease, and the peers as the store had them.

    `config` is the text of the net-conf.json that they belong to, `network` its Network.
    """

    config: str
    network: IPv4Network
    own: Lease
    peers: tuple[Lease, ...]


@dataclass(frozen=True, slots=True)
class Remembered:
    """What `load` found: either leases that may be used now, or the reason why there are none."""

    last: LastLeases | None
    reason: str = ""


def render(last: LastLeases, now_s: float) -> str:
    """The text of last-leases.json: each lease as flannel's key and JSON value, times in Unix seconds.  Pure.

    A lease a line, each made by itself: one call that makes megabytes of JSON would hold up every other thread.
    """
    head = {
        "schema": SCHEMA,
        "saved_at": now_s,
        "config": last.config,
        "network": str(last.network),
        "own": _to_json(last.own),
    }
    peers = ",\n".join(json.dumps(_to_json(peer), separators=(",", ":")) for peer in last.peers)
    return f'{json.dumps(head, separators=(",", ":"))[:-1]},"peers":[\n{peers}]}}\n'


def parse(text: str, network: IPv4Network | None, now_s: float) -> Remembered:
    """The inverse of `render`, without what has expired by `now_s`.  Pure; no content makes it raise.

    Nothing is used of a file that is damaged anywhere, of another `network` where one is given, or whose own lease has
    expired: each means that the store has to be asked first.
    """
    try:
        content = json.loads(text)
        if content["schema"] != SCHEMA:
            return Remembered(None, f"it has schema {content['schema']!r}, not {SCHEMA}")
        saved_at_s = float(content["saved_at"])
        config = content["config"]
        if not isinstance(config, str):
            return Remembered(None, f"it is damaged: config is {config!r}")
        saved_network = IPv4Network(content["network"])
        own = _from_json(content["own"])
        peers = tuple(_from_json(item) for item in content["peers"])
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as exc:
        return Remembered(None, f"it is damaged: {type(exc).__name__}: {exc}")
    if network not in (None, saved_network):
        return Remembered(None, f"it is about Network {saved_network}, not {network}")
    if not now_s >= saved_at_s - CLOCK_SLACK_S:
        return Remembered(None, f"it was saved {saved_at_s - now_s:.0f} s in the future: the clock is wrong")
    if own.is_expired(now_s):
        return Remembered(None, f"our lease {own.subnet} in it has expired")
    unexpired = tuple(peer for peer in peers if not peer.is_expired(now_s))
    return Remembered(LastLeases(config, saved_network, own, unexpired))


def _to_json(lease: Lease) -> dict[str, Any]:
    return {"key": lease.key, "value": lease.attrs.to_json(), "expires": lease.expires_s}


def _from_json(item: Any) -> Lease:
    """`item` as `_to_json` made it; what else it may be ends in one of the errors that `parse` catches."""
    expires = item["expires"]
    if expires is not None and type(expires) not in (int, float):
        raise LeaseFormatError(f"expires is {expires!r}")
    return Lease(Subnets.from_key(item["key"]), LeaseAttrs.from_json(item["value"]), expires)


def load(directory: Path, network: IPv4Network | None, now_s: float) -> Remembered:
    """What the last run saved in `directory`; see `parse`.  Never raises; the reason is one line for the log."""
    path = directory / _LAST_LEASES
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        return Remembered(None, f"cannot read {path}: {exc.strerror}")
    except UnicodeDecodeError as exc:
        return Remembered(None, f"cannot read {path}: not UTF-8 at byte {exc.start}")
    found = parse(text, network, now_s)
    return found if found.last is not None else Remembered(None, f"ignoring {path}: {found.reason}")


def save(directory: Path, last: LastLeases, now_s: float) -> None:
    """Replace last-leases.json in `directory`.  Raises KernelError; the caller decides how often to call."""
    path = directory / _LAST_LEASES
    try:
        atomic_file.replace(path, render(last, now_s))
    except OSError as exc:
        raise KernelError(f"cannot write {path}", exc.errno or 0, "a restart will wait for the store") from exc


def forget(directory: Path) -> None:
    """Have the next start wait for the store.  Raises KernelError."""
    path = directory / _LAST_LEASES
    try:
        path.unlink(missing_ok=True)
    except OSError as exc:
        raise KernelError(f"cannot delete {path}", exc.errno or 0, "a restart would begin with a lost lease") from exc


def node_id(directory: Path) -> str:
    """This host's NodeID, 32 hexadecimal digits: the one in `directory`, made at the first call.

    Of several processes that make it at once one wins and all return the same.  Raises ConfigError when it
    cannot be read or written, or is damaged: a new one in its stead would make our own lease look like
    another host's.
    """
    path = directory / _NODE_ID
    text = _kept(path, "node id", uuid.uuid4().hex)
    if len(text) != 32 or not set(text) <= set("0123456789abcdef"):
        raise ConfigError(
            f"{path} holds {text[:40]!r}, not the 32 hexadecimal digits of a node id; restore it, or delete it to "
            "become a new node (the old node's lease then stays until it expires)"
        )
    return text


def vtep_mac(directory: Path, first: str = "") -> str:
    """The MAC of this host's VTEP, kernel's or userspace's: the one in `directory`, made at the first call.

    It is `first` or, without that, random, unicast and locally administered; and the same for as long as the file is
    kept: the peers have it in their neighbour tables.  Raises ConfigError when it cannot be read or written, or is
    damaged.
    """
    path = directory / _VTEP_MAC
    fresh = bytearray(os.urandom(6))
    fresh[0] = fresh[0] & 0xFC | 0x02
    text = _kept(path, "VTEP's MAC", first or fresh.hex(":"))
    if not re.fullmatch(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}", text):
        raise ConfigError(
            f"{path} holds {text[:40]!r}, not a unicast MAC address; restore it, or delete it to get another one"
        )
    return text


def _kept(path: Path, what: str, fresh: str) -> str:
    """What the file holds; `fresh`, once and for all, when there is none yet."""
    try:
        if not path.exists():
            # FileExistsError: another process was first, and its text counts.
            with suppress(FileExistsError):
                atomic_file.create(path, f"{fresh}\n")
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError as exc:
        raise ConfigError(
            f"cannot keep the {what} in {path}: {exc.strerror}; --state-dir must name a directory that we may write to"
        ) from exc


def has_node_id(directory: Path) -> bool:
    """Whether a daemon with this state directory has ever held a lease."""
    return (directory / _NODE_ID).exists()


def files(directory: Path, *, with_identity: bool) -> list[Path]:
    """The files kept in `directory`; without the NodeID the host stays the node that it is."""
    return [directory / name for name in (_LAST_LEASES, *([_NODE_ID, _VTEP_MAC] if with_identity else []))]
