"""BPF maps and programs, and links that attach programs to devices (bpf(2)).

Each is a descriptor of ours, and the kernel takes it away with the last descriptor: a program is detached when the
process ends, however that ends.  Nothing is pinned.  Kernels that have no such links: see filters.py.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path

from udptun._kabi import ffi, lib
from udptun.core.errors import KernelError

# union bpf_attr of include/uapi/linux/bpf.h, as each command has it.
_MAP_CREATE = struct.Struct("=IIIIIII16s")
"""Type, key size, value size, entries, flags, inner map, NUMA node, name."""
_ELEMENT = struct.Struct("=IxxxxQQQ")
"""Map, key, value, flags."""
_BATCH = struct.Struct("=QQQQIIQQ")
"""In, out, keys, values, count, map, flags of the elements, flags."""
_PROGRAM_LOAD = struct.Struct("=IIQQIIQII16sII")
"""Type, instructions, them, licence, log level, log size, log, kernel version, flags, name, device, attach type."""
_LINK_CREATE = struct.Struct("=IIIIIxxxxQ")
"""Program, target, attach type, flags, relative to, expected revision."""

_LOG_LEN = 1 << 18
"""Room for what the verifier says, bytes."""
_LICENCE = b"GPL\0"
_HINT = (
    "the shortcut needs CAP_BPF and CAP_NET_ADMIN (or CAP_SYS_ADMIN), a filter of system calls that lets bpf through "
    "(systemd: SystemCallFilter=bpf), and a kernel with CONFIG_BPF_SYSCALL"
)


class MapType(Enum):
    HASH = lib.BPF_MAP_TYPE_HASH
    ARRAY = lib.BPF_MAP_TYPE_ARRAY
    PERCPU_ARRAY = lib.BPF_MAP_TYPE_PERCPU_ARRAY


class Hook(Enum):
    """Where a device runs programs."""

    INGRESS = lib.BPF_TCX_INGRESS
    EGRESS = lib.BPF_TCX_EGRESS


@dataclass(frozen=True, slots=True)
class Map:
    """Owns `fd`.  `value_len` is of one value, bytes; of PERCPU_ARRAY each processor has one.  Keys are u32."""

    fd: int
    type: MapType
    value_len: int
    n: int

    @classmethod
    def create(cls, name: str, type_: MapType, value_len: int, n: int) -> Map:
        """Of `n` entries; an array has them all, and they are zero.  Raises KernelError."""
        attributes = _MAP_CREATE.pack(type_.value, 4, value_len, n, 0, 0, 0, name.encode())
        return cls(_call(lib.BPF_MAP_CREATE, attributes, f"cannot make the BPF map {name}"), type_, value_len, n)

    def close(self) -> None:
        os.close(self.fd)

    def set(self, key: bytes, value: bytes) -> None:
        """Raises KernelError."""
        self._element(lib.BPF_MAP_UPDATE_ELEM, key, bytearray(value), "cannot write to a BPF map")

    def delete(self, key: bytes) -> None:
        """There may be no such key.  Raises KernelError."""
        try:
            self._element(lib.BPF_MAP_DELETE_ELEM, key, bytearray(), "cannot delete from a BPF map")
        except KernelError as exc:
            if exc.errno != errno.ENOENT:
                raise

    def read(self, index: int) -> bytes:
        """What stands at an index of an array, of each processor one after the other.  Raises KernelError."""
        value = bytearray(self.stored_len)
        self._element(lib.BPF_MAP_LOOKUP_ELEM, struct.pack("=I", index), value, "cannot read a BPF map")
        return bytes(value)

    def read_first(self, n: int) -> bytes:
        """The same of the first `n` indexes of an array, one after the other.  Raises KernelError."""
        keys, values, position = bytearray(4 * n), bytearray(self.stored_len * n), bytearray(4)
        attributes = _BATCH.pack(0, _address(position), _address(keys), _address(values), n, self.fd, 0, 0)
        try:
            _call(lib.BPF_MAP_LOOKUP_BATCH, attributes, "cannot read a BPF map")
        except KernelError as exc:
            # So it says that there are no more.
            if exc.errno != errno.ENOENT:
                raise
        return bytes(values)

    @property
    def stored_len(self) -> int:
        """Bytes at one index, of all processors."""
        if self.type is not MapType.PERCPU_ARRAY:
            return self.value_len
        return ((self.value_len + 7) & ~7) * n_possible_cpus()

    def _element(self, command: int, key: bytes, value: bytearray, operation: str) -> None:
        held = bytearray(key)
        _call(command, _ELEMENT.pack(self.fd, _address(held), _address(value) if value else 0, 0), operation)


def load_program(name: str, code: bytes) -> int:
    """A descriptor of a program for `Hook`; its map instructions hold descriptors.  Raises KernelError.

    What the verifier has against it is in the error.
    """
    held, licence, verdict = bytearray(code), bytearray(_LICENCE), bytearray(_LOG_LEN)
    operation = f"cannot load the BPF program {name}"

    def load(level: int) -> int:
        attributes = _PROGRAM_LOAD.pack(
            lib.BPF_PROG_TYPE_SCHED_CLS,
            len(code) // 8,
            _address(held),
            _address(licence),
            level,
            len(verdict) if level else 0,
            _address(verdict) if level else 0,
            0,
            0,
            name.encode(),
            0,
            0,
        )
        return _call(lib.BPF_PROG_LOAD, attributes, operation)

    try:
        return load(0)
    except KernelError as exc:
        if exc.errno == errno.EPERM:
            raise
    try:
        return load(1)
    except KernelError as exc:
        said = [line for line in verdict.split(b"\0")[0].decode(errors="replace").splitlines() if line.strip()]
        # The last line says how much was verified.
        raise KernelError(operation, exc.errno, " / ".join(said[-3:-1])) from exc


def attach(program_fd: int, link_index: int, hook: Hook) -> int:
    """Run a program on a device, behind those that are there (tcx); returns the descriptor that keeps it there.

    Raises KernelError: EINVAL before Linux 6.6, which has no tcx.
    """
    attributes = _LINK_CREATE.pack(program_fd, link_index, hook.value, 0, 0, 0)
    return _call(lib.BPF_LINK_CREATE, attributes, f"cannot attach a BPF program to link {link_index}")


def monotonic_ns() -> int:
    """What bpf_ktime_get_ns and bpf_ktime_get_coarse_ns tell the programs now."""
    return time.monotonic_ns() - _offset_ns()


@cache
def _offset_ns() -> int:
    """By which our time namespace is ahead of the kernel's own clock."""
    try:
        lines = Path("/proc/self/timens_offsets").read_text().splitlines()
    except OSError:
        # A kernel without time namespaces.
        return 0
    offsets = {clock: int(seconds) * 10**9 + int(ns) for clock, seconds, ns in map(str.split, lines)}
    return offsets.get("monotonic", 0)


@cache
def n_possible_cpus() -> int:
    """How many values each index of an array per processor has."""
    ranges = Path("/sys/devices/system/cpu/possible").read_text().strip().split(",")
    return sum(last - first + 1 for first, last in map(_range, ranges))


def _range(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    return int(first), int(last or first)


def _call(command: int, attributes: bytes, operation: str) -> int:
    held = bytearray(attributes)
    result = lib.bpf(command, ffi.from_buffer(held), len(held))
    if result < 0:
        raise KernelError(operation, ffi.errno, _HINT if ffi.errno in (errno.EPERM, errno.ENOSYS) else "")
    return result


def _address(buffer: bytearray) -> int:
    return int(ffi.cast("uintptr_t", ffi.from_buffer(buffer)))


def map_loads(code: bytes, at: dict[int, int]) -> bytes:
    """The program with the map of this descriptor loaded at each of these instructions (BPF_PSEUDO_MAP_FD)."""
    patched = bytearray(code)
    for instruction, fd in at.items():
        # struct bpf_insn: code, registers (the source in the upper half), offset, immediate.
        start = 8 * instruction
        patched[start + 1] = patched[start + 1] & 0x0F | 1 << 4
        struct.pack_into("=i", patched, start + 4, fd)
    return bytes(patched)
