"""The programs of shortcut.bpf.c in the kernel, with their maps, and where they are attached.

Everything is a descriptor of ours, and gone with the last one.  Only filters, which the programs are where the kernel
has no tcx, outlive this process and keep programs and maps.  So all programs take packets only until a time that is put
off again and again, whichever way they are attached: a process that is dead, or stands still, follows no peers.
"""

from __future__ import annotations

import errno
import json
import os
import re
import struct
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, Self

from udptun.core.errors import KernelError
from udptun.datapath.shortcut.counts import COUNTS, PEER_COUNTS_LEN
from udptun.datapath.shortcut.entries import PEER
from udptun.kernel.bpf import Hook, Map, MapType, attach, load_program, map_loads, monotonic_ns
from udptun.kernel.filters import attach_filter, find_filters

_BYTECODE = Path(__file__).parent / "bytecode.json"
_CONFIG = struct.Struct("=4s4s4s4s4sIIII2sH")
"""struct config of shortcut.bpf.c."""
_LEAST_PEERS = 4096
"""Room for so many at least: some 100 bytes each, and 32 for each processor."""
_PASSING = frozenset((errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EINTR, errno.ENOSPC, errno.EBUSY))
"""What may be otherwise a moment later."""
DETOUR = struct.Struct("=QI4s2s12sH")
"""struct detour of shortcut.bpf.c: since when, whether it is on, VNI and port as the headers have them, MAC addresses,
sign."""
_N_FLOWS = 1 << 12
_FLOW_LEN = 16
"""struct flow of shortcut.bpf.c."""
_SCRATCH_LEN = 152
"""struct scratch."""
_CONTROL = struct.Struct("=Q")
"""Until when the programs take packets, ns of `monotonic_ns`."""
_VALID_S = 3.0
_LEAST_KERNEL = (5, 13)
"""Has all that the programs and their maps need; earlier ones do not merge packets in a veth pair either."""


@dataclass(frozen=True, slots=True)
class ShortcutSettings:
    """What the programs are told of this host.

    `underlay` is the name of the link that datagrams leave by.  `mtu`: of our device, bytes.  `carries_ecn`: whether
    marks of congestion are carried on.
    """

    underlay: str
    address: IPv4Address
    port: int
    own_subnet: IPv4Network
    mtu: int
    carries_ecn: bool


@dataclass(frozen=True, slots=True)
class LinkIndexes:
    """Of the underlay's link, of our device, and of both ends of the pair between the programs."""

    underlay: int
    device: int
    near: int
    far: int


class Programs:
    """Owns the descriptors.  They do nothing before `attach`, and take packets while `keep_on` is called in time."""

    def __init__(self, owned: ExitStack, maps: Mapping[str, Map], programs: Mapping[str, int]) -> None:
        self._owned, self._maps, self._programs = owned, maps, programs
        self._links: list[int] = []
        self._filters: dict[str, int] = {}
        """By the name of each the index of its link."""
        self._detour_fd: int | None = None
        """The link of `arrive`, or the program itself while there is none."""

    @classmethod
    def load(cls, top: int, least: int = _LEAST_PEERS) -> Self:
        """With room for twice `top`, the highest index of a peer, and for `least` peers.  Raises KernelError."""
        with ExitStack() as undo:
            n_peers = max(least, 1 << (2 * top).bit_length())
            shapes = {
                "config": (MapType.ARRAY, _CONFIG.size, 1),
                "control": (MapType.ARRAY, _CONTROL.size, 1),
                "detour": (MapType.ARRAY, DETOUR.size, 1),
                "peers": (MapType.HASH, PEER.size, n_peers),
                "flows": (MapType.ARRAY, _FLOW_LEN, _N_FLOWS),
                "counts": (MapType.PERCPU_ARRAY, 8, len(COUNTS)),
                "peer_counts": (MapType.PERCPU_ARRAY, PEER_COUNTS_LEN, n_peers),
                "scratch": (MapType.PERCPU_ARRAY, _SCRATCH_LEN, 1),
            }
            maps: dict[str, Map] = {}
            for name, shape in shapes.items():
                maps[name] = Map.create(f"ut_{name}", *shape)
                undo.callback(maps[name].close)
            programs = {}
            for name, (code, loads) in _bytecode().items():
                at = {instruction: maps[of_map].fd for of_map, where in loads.items() for instruction in where}
                programs[name] = load_program(f"ut_{name}", map_loads(code, at))
                undo.callback(os.close, programs[name])
            return cls(undo.pop_all(), maps, programs)

    def program_fd(self, name: str) -> int:
        """Of `encap`, `decap`, `deliver` or `arrive`."""
        return self._programs[name]

    @property
    def peers(self) -> Map:
        return self._maps["peers"]

    @property
    def counts(self) -> Map:
        return self._maps["counts"]

    @property
    def peer_counts(self) -> Map:
        return self._maps["peer_counts"]

    def configure(self, settings: ShortcutSettings, links: LinkIndexes) -> None:
        """Only while they are not attached.  Raises KernelError."""
        own = settings.own_subnet
        value = _CONFIG.pack(
            settings.address.packed,
            own.network_address.packed,
            own.netmask.packed,
            own.network_address.packed,
            own.netmask.packed,
            links.underlay,
            links.device,
            links.near,
            settings.mtu,
            settings.port.to_bytes(2),
            settings.carries_ecn,
        )
        self._maps["config"].set(bytes(4), value)

    def set_detour(self, value: bytes) -> None:
        """See `DETOUR`.  Programs may read while the kernel writes more than one word.  Raises KernelError."""
        self._maps["detour"].set(bytes(4), value)

    def set_peer(self, key: bytes, value: bytes | None) -> None:
        """See `KernelPeers.changes`.  Raises KernelError."""
        if value is None:
            self.peers.delete(key)
        else:
            self.peers.set(key, value)

    def keep_on(self, seconds: float = _VALID_S) -> None:
        """Take packets for so long from now on; called each second.  Raises KernelError."""
        self._maps["control"].set(bytes(4), _CONTROL.pack(monotonic_ns() + int(seconds * 10**9)))

    async def attach(self, links: LinkIndexes, alias: str) -> None:
        """First what receives.  Filters get names that begin with `alias`.

        Raises KernelError: nothing is attached but filters, which take nothing.
        """
        self.keep_on()
        # When a process is killed, Linux closes what it has opened last first: so `decap` ends before those behind it.
        self._detour_fd = os.dup(self._programs["arrive"])
        try:
            await self._attach("deliver", links.far, Hook.INGRESS, alias)
            await self._attach("decap", links.underlay, Hook.INGRESS, alias)
            await self._attach("encap", links.device, Hook.EGRESS, alias)
        except KernelError:
            self.stop()
            self.detach()
            raise

    async def _attach(self, name: str, link_index: int, hook: Hook, alias: str) -> None:
        try:
            self._links.append(attach(self._programs[name], link_index, hook))
        except KernelError as exc:
            if exc.errno != errno.EINVAL:
                raise
            await attach_filter(alias, name, self._programs[name], link_index, hook)
            self._filters[f"{alias} {name}"] = link_index

    async def attach_detour(self, link_index: int, alias: str) -> None:
        """As `attach`, to the detour's device.  Raises KernelError."""
        assert self._detour_fd is not None
        n_links = len(self._links)
        await self._attach("arrive", link_index, Hook.INGRESS, alias)
        for link in self._links[n_links:]:
            os.dup2(link, self._detour_fd, inheritable=False)
            os.close(link)
        del self._links[n_links:]

    def detach_detour(self, alias: str) -> None:
        """A filter goes with the device."""
        self._filters.pop(f"{alias} arrive", None)
        if self._detour_fd is not None:
            os.dup2(self._programs["arrive"], self._detour_fd, inheritable=False)

    @property
    def has_filters(self) -> bool:
        """Whether `remove_filters` has something to do after the end."""
        return bool(self._filters)

    async def are_attached(self, alias: str) -> bool:
        """False when somebody has taken out a filter, as everybody may.  Raises KernelError."""
        if not self._filters:
            return True
        found = await find_filters([alias], self._filters.values())
        return self._filters.items() <= {(it.name, it.link_index) for it in found}

    def stop(self) -> None:
        """No packet enters from now on.  Those that are between the programs still get out."""
        with suppress(KernelError):
            # If that ever fails, the time ends soon.
            self._maps["control"].set(bytes(4), _CONTROL.pack(0))

    def detach(self) -> None:
        """A moment later.  Filters stay: see `remove_filters`."""
        if self._detour_fd is not None:
            os.close(self._detour_fd)
            self._detour_fd = None
        while self._links:
            os.close(self._links.pop())

    def close(self) -> None:
        """Let go of everything."""
        if self._filters:
            self.stop()
        self.detach()
        self._owned.close()


def find_lack() -> str:
    """Why this kernel or this process cannot have the shortcut; empty when it can.

    Found by trying, once unless it may pass, as a lack of memory or of descriptors.
    """
    try:
        return _find_lasting_lack()
    except (KernelError, OSError) as exc:
        return str(exc)


@cache
def _find_lasting_lack() -> str:
    """Raises KernelError or OSError for what may pass."""
    release = os.uname().release
    if tuple(map(int, re.findall(r"\d+", release)[:2])) < _LEAST_KERNEL:
        return f"it needs Linux {'.'.join(map(str, _LEAST_KERNEL))} or later, and this is {release}"
    try:
        programs = Programs.load(0, least=1)
    except KernelError as exc:
        if exc.errno in _PASSING:
            raise
        return str(exc)
    programs.close()
    return ""


@cache
def _bytecode() -> dict[str, tuple[bytes, dict[str, list[int]]]]:
    """Of each program its code, and which instructions load which map."""
    document: dict[str, Any] = json.loads(_BYTECODE.read_text())
    return {name: (bytes.fromhex("".join(it["code"])), it["maps"]) for name, it in document["programs"].items()}
