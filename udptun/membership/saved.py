"""The last good lease table, in `last-leases.json` of the state directory: its form, and the task that keeps it saved.

With it a daemon forwards before its store has answered.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from udptun.core.clock import Clock
from udptun.core.errors import KernelError, one_line
from udptun.core.ip_text import ip_network
from udptun.core.lease import Lease, LeaseAttrs, LeaseFormatError, Subnets
from udptun.core.network_state import IPNetwork
from udptun.membership.child_writer import ChildWriter

SCHEMA = 2
"""Of last-leases.json.  A file with another number is ignored."""

CLOCK_SLACK_S = 60.0
"""How far the clock may be behind the time of saving, seconds.  Further behind, the saved expiries mean nothing."""

FILE = "last-leases.json"

SAVE_DELAY_S = 1.0
"""Changes are collected for so long before the table is written to disk."""

SAVE_EXPIRIES_S = 60.0
"""How often the table is written when only expiries have changed: thousands of hosts renew all the time."""

FINISH_S = 5.0
"""How long a write may take at the end of the daemon."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LastLeases:
    """The lease table when it was last good: our own lease, and the peers as the store had them.

    `config` is the text of the net-conf.json that they belong to, and `network` its Network; IPv6Network where pods
    have IPv6 alone.
    """

    config: str
    network: IPNetwork
    own: Lease
    peers: tuple[Lease, ...]


@dataclass(frozen=True, slots=True)
class Remembered:
    """What `load` found: either leases that may be used now, or the reason why there are none."""

    last: LastLeases | None
    reason: str = ""


def render(last: LastLeases, now_s: float) -> str:
    """The text of last-leases.json: each lease as flannel's key and JSON value, times in Unix seconds.  Pure.

    Each lease is a line that is made by itself: one call that makes megabytes of JSON would hold up every other thread.
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


def parse(text: str, network: IPNetwork | None, now_s: float) -> Remembered:
    """The inverse of `render`, without the peers that have expired by `now_s`.  Pure; no content makes it raise.

    Nothing of the file is used in three cases, and then the store has to be asked first: it is damaged anywhere, it is
    about another Network than `network` (None: any will do), or our own lease in it has expired.
    """
    try:
        content = json.loads(text)
        if content["schema"] != SCHEMA:
            return Remembered(None, one_line(f"it has schema {content['schema']!r}, not {SCHEMA}"))
        saved_at_s = float(content["saved_at"])
        config = content["config"]
        if not isinstance(config, str):
            return Remembered(None, one_line(f"it is damaged: config is {config!r}"))
        saved_network = ip_network(content["network"])
        own = _from_json(content["own"])
        peers = tuple(_from_json(item) for item in content["peers"])
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as exc:
        return Remembered(None, one_line(f"it is damaged: {type(exc).__name__}: {exc}"))
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
    """The inverse of `_to_json`.  Anything else raises one of the errors that `parse` catches."""
    expires = item["expires"]
    if expires is not None and (type(expires) not in (int, float) or not math.isfinite(expires)):
        raise LeaseFormatError(f"expires is {expires!r}")
    return Lease(Subnets.from_key(item["key"]), LeaseAttrs.from_json(item["value"]), expires)


def load(directory: Path, network: IPNetwork | None, now_s: float) -> Remembered:
    """What the last run saved in `directory`; see `parse`.  Never raises; the reason is one line for the log."""
    path = directory / FILE
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        return Remembered(None, f"cannot read {path}: {exc.strerror}")
    except UnicodeDecodeError as exc:
        return Remembered(None, f"cannot read {path}: not UTF-8 at byte {exc.start}")
    found = parse(text, network, now_s)
    return found if found.last is not None else Remembered(None, f"ignoring {path}: {found.reason}")


def load_own(directory: Path, now_s: float) -> Lease | None:
    """Our own lease as the last run held it, without a look at the peers; None when it has expired or is not known."""
    try:
        with (directory / FILE).open(encoding="utf-8") as file:
            head = json.loads(file.readline() + "]}")
        own = _from_json(head["own"]) if head["schema"] == SCHEMA else None
    except (OSError, ValueError, TypeError, LookupError, OverflowError, RecursionError):
        return None
    return None if own is None or own.is_expired(now_s) else own


async def save(writer: ChildWriter, directory: Path, last: LastLeases, now_s: float) -> None:
    """Replace last-leases.json in `directory`.  Raises KernelError; the caller decides how often to call."""
    path = directory / FILE
    # In a thread, because it takes a while to make text of thousands of leases.
    text = await asyncio.to_thread(render, last, now_s)
    try:
        await writer.replace(path, text)
    except OSError as exc:
        raise KernelError(f"cannot write {path}", exc.errno or 0, "a restart will wait for the store") from exc


async def forget(writer: ChildWriter, directory: Path) -> None:
    """Have the next start wait for the store.  Raises KernelError."""
    path = directory / FILE
    try:
        await writer.delete(path)
    except OSError as exc:
        raise KernelError(f"cannot delete {path}", exc.errno or 0, "a restart would begin with a lost lease") from exc


class SavedTable:
    """Keeps the file as the table is: `keep` while the daemon runs, `finish` at its end.

    `content` gives what to save; None when our lease is no longer ours, so that the next start has to ask the store.
    """

    def __init__(self, directory: Path, content: Callable[[], LastLeases | None], clock: Clock) -> None:
        self._directory = directory
        self._content = content
        self._clock = clock
        self._changed = asyncio.Event()
        self._has_expiries = False
        """Whether the file has every expiry as the table has it."""
        self._saving: asyncio.Task[None] | None = None
        self._writer = ChildWriter()

    def note_change(self) -> None:
        """The file has to be written soon."""
        self._changed.set()

    def note_expiries(self) -> None:
        """Expiries have changed, at least."""
        self._has_expiries = False

    async def keep(self) -> None:
        """Write the file after changes, until cancelled."""
        self._changed.set()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(SAVE_EXPIRIES_S):
                    await self._changed.wait()
            if self._has_expiries and not self._changed.is_set():
                continue
            await asyncio.sleep(SAVE_DELAY_S)
            self._saving = asyncio.create_task(self._write(self._take()), name="write lease table")
            await asyncio.shield(self._saving)

    async def finish(self) -> None:
        """Write what `keep`, which has ended, has not written; a file system that hangs is not waited for long."""
        self._writer.hurry(FINISH_S)
        if self._saving is not None:
            await asyncio.wait([self._saving])
        if self._changed.is_set() or not self._has_expiries:
            await self._write(self._take())

    def _take(self) -> LastLeases | None:
        content = self._content()
        self._changed.clear()
        self._has_expiries = True
        return content

    async def _write(self, content: LastLeases | None) -> None:
        try:
            if content is None:
                await forget(self._writer, self._directory)
            else:
                await save(self._writer, self._directory, content, self._clock.unix_s())
                log.debug("lease table saved n_peers=%d", len(content.peers))
        except KernelError as exc:
            log.warning("the lease table is not saved error=%r", str(exc))
