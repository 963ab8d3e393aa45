"""The memory files that control plane and datapath share, and where their fields are.

csrc/shm.h describes the memory; all that is known of it here comes from `LAYOUT` and `FIELDS` of the extension, which
the compiler has made.  Words are read and written through memoryviews.  numpy would do that too, but importing it takes
longer than all else that a small table needs: only `bulk.py` does, for a large one.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import sys
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Literal

from udptun._fastpath import FIELDS, LAYOUT
from udptun.core.network_state import IPAddress, IPNetwork

_HEAD = struct.Struct("=II")
"""Magic and layout version, at the begin of each file."""
_CODES = {2: "H", 4: "I", 8: "Q"}
"""Letters of `struct` by length in bytes."""
MAPPED = bytes(10) + b"\xff\xff"
"""What is before the bytes of an IPv4 address in a `struct ut_address` (RFC 4291 2.5.5.2)."""
_ADDRESS_BITS, _MAPPED_BITS = 128, 8 * len(MAPPED)


class Structure:
    """One structure of shm.h: `size` bytes, with its fields at their places.

    A name that ends in `_be` is in network byte order, any other number in host order.
    """

    def __init__(self, name: str) -> None:
        self.size = LAYOUT[name]
        self._fields = FIELDS[name]

    def offset(self, field: str) -> int:
        """Where the field is, bytes from the begin of the structure."""
        return self._fields[field][0]

    def length(self, field: str) -> int:
        """How long it is, bytes."""
        return self._fields[field][1]

    def load(self, memory: memoryview, field: str) -> int:
        """The number in `field` of the structure that begins `memory` (bytes)."""
        offset, length = self._fields[field]
        return int.from_bytes(memory[offset : offset + length], _byte_order(field))

    def store(self, memory: memoryview, field: str, value: int) -> None:
        offset, length = self._fields[field]
        memory[offset : offset + length] = value.to_bytes(length, _byte_order(field))

    def packer(self, *fields: str) -> struct.Struct:
        """Packs and unpacks a whole structure at once, with `fields` in the order in which they lie and zeros between.

        Numbers of host order; what is in network byte order or no number is bytes.
        """
        text, end = "=", 0
        for field in fields:
            offset, length = self._fields[field]
            code = f"{length}s" if field.endswith("_be") else _CODES.get(length, f"{length}s")
            text += f"{offset - end}x{code}"
            end = offset + length
        return struct.Struct(f"{text}{self.size - end}x")


def _byte_order(field: str) -> Literal["big", "little"]:
    return "big" if field.endswith("_be") else sys.byteorder


def mapped(address: IPAddress) -> bytes:
    """The address as a `struct ut_address`."""
    return MAPPED + address.packed if isinstance(address, IPv4Address) else address.packed


def unmapped(field: bytes) -> IPAddress:
    """The address in a `struct ut_address`."""
    return IPv4Address(field[len(MAPPED) :]) if field.startswith(MAPPED) else IPv6Address(field)


def mapped_subnet(subnet: IPNetwork) -> tuple[bytes, int]:
    """Its first address as a `struct ut_address`, and its prefix length among the bits of that."""
    first = mapped(subnet.network_address)
    return first, subnet.prefixlen + _ADDRESS_BITS - subnet.max_prefixlen


def unmapped_subnet(first: bytes, length: int) -> IPNetwork:
    """The subnet of which `mapped_subnet` has made this."""
    address = unmapped(first)
    if isinstance(address, IPv4Address):
        return IPv4Network((address, length - _MAPPED_BITS))
    return IPv6Network((address, length))


def create(name: str, size: int, magic: int) -> int:
    """A new memory file of `size` bytes, all zero but for magic and layout version.  The caller owns the descriptor."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    # A process that shrank the file would kill the other with SIGBUS.
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    os.pwrite(fd, _HEAD.pack(magic, LAYOUT["version"]), 0)
    return fd


def map_whole(fd: int, size: int, magic: int, what: str) -> memoryview:
    """The bytes of the file, to read and write; mapped while somebody holds on to them.

    Raises ValueError when the file is not what `what` says, or of another layout version.
    """
    version = LAYOUT["version"]
    if os.fstat(fd).st_size != size:
        raise ValueError(f"the {what} has {os.fstat(fd).st_size} bytes, not {size}: of another layout version")
    memory = memoryview(mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE))
    if _HEAD.unpack_from(memory) != (magic, version):
        raise ValueError(f"the {what} is not one, or of another layout version than {version}")
    return memory


def version_of(fd: int, magic: int) -> int | None:
    """The layout version of a file of any build; None when it has not this magic."""
    head = os.pread(fd, _HEAD.size, 0)
    found, version = _HEAD.unpack(head) if len(head) == _HEAD.size else (0, 0)
    return int(version) if found == magic else None


def give_back(memory: memoryview, at: int, length: int) -> None:
    """Have so many bytes of what `map_whole` has mapped be zero and cost nothing, where that is whole pages."""
    mapping = memory.obj
    assert isinstance(mapping, mmap.mmap)
    with suppress(OSError):
        mapping.madvise(mmap.MADV_REMOVE, at, length)


def private(size: int) -> memoryview:
    """Zeros that nobody shares; only pages that are written to cost memory."""
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A huge page would cost 2 MiB for its first byte.
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memoryview(memory)
