"""A classic BPF program that keeps the datagrams of strangers from the workers' sockets.  Pure.

It chooses among the sockets of one port (SO_ATTACH_REUSEPORT_CBPF): those of the workers come first, and behind them
stands the sink, a socket that drops all it gets.  Addresses are numbers in host order, as the program loads them.

    key         32 bits that stand for a source address: of IPv4 the address, of IPv6 a hash of it
    tree        a binary search for the key, with a few keys in each leaf
    stranger    no key of the tree: the sink, or by chance, once in `one_in`, a worker
    worker      the socket that csrc/spread.h would choose

A stranger of IPv6 whose key is also a peer's gets to a worker, which refuses him.  Nobody can look for such an address
but by trying, because the hash has a secret multiplier.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from udptun.core.family import Family

MAX_ADDRESSES = 2000
"""Some 3,000 instructions; the kernel takes 4,096 (BPF_MAXINSNS)."""

# linux/filter.h and linux/bpf_common.h
LOAD_WORD, LOAD_HALF, TO_INDEX = 0x20, 0x28, 0x07
MULTIPLY, SHIFT_RIGHT, AND, MODULO, ADD_INDEX, XOR_INDEX = 0x24, 0x74, 0x54, 0x94, 0x0C, 0xAC
JUMP, IF_EQUAL, IF_GREATER_OR_EQUAL = 0x05, 0x15, 0x35
RETURN, RETURN_ACCUMULATOR = 0x06, 0x16
RANDOM = 0xFFFFF038
"""SKF_AD_OFF + SKF_AD_RANDOM."""
SOURCE_WORDS = {Family.IPV4: (0xFFF0000C,), Family.IPV6: (0xFFF00008, 0xFFF0000C, 0xFFF00010, 0xFFF00014)}
SOURCE_PORT = {Family.IPV4: 0xFFF00014, Family.IPV6: 0xFFF00028}
"""SKF_NET_OFF + 12 or 8, and + 20 or 40: in the IP header, and in UDP's behind one without options or extensions."""

_MULTIPLIER = 0x9E3779B1
_LEAF = 8
_MAX_CONDITIONAL_JUMP = 255
_INSTRUCTION = struct.Struct("=HBBI")


class Instruction(NamedTuple):
    """`struct sock_filter`.  The jumps are relative to the next instruction."""

    code: int
    if_true: int
    if_false: int
    k: int


# Stand for jumps to what follows the tree.
_TO_STRANGER, _TO_WORKER = Instruction(JUMP, 0, 0, 1 << 32), Instruction(JUMP, 0, 0, 2 << 32)


def source_keys(addresses: Iterable[int], family: Family, multiplier: int) -> list[int]:
    """The keys of these addresses, ascending, each once.  `multiplier` is odd, and counts for IPv6 only."""
    if family is Family.IPV4:
        return sorted(set(addresses))
    keys = set()
    for address in addresses:
        key = 0
        for shift in (96, 64, 32, 0):
            key = (key * multiplier ^ address >> shift) & 0xFFFFFFFF
        keys.add(key)
    return sorted(keys)


def stranger_program(
    keys: Sequence[int], n_workers: int, one_in: int, family: Family, multiplier: int = 1
) -> list[Instruction]:
    """What sends strangers to socket `n_workers` of the port, and the rest to those before it.

    `keys`: those that are no strangers', by `source_keys`, MAX_ADDRESSES at most.  One stranger's datagram in `one_in`,
    a power of two, goes where the rest does.
    """
    first_word, *words = SOURCE_WORDS[family]
    key = [_statement(LOAD_WORD, first_word)]
    for word in words:
        key += [_statement(MULTIPLY, multiplier), *_xor_with(word)]
    tree = [*key, *_tree(keys)]
    stranger = [
        _statement(LOAD_WORD, RANDOM),
        _statement(AND, one_in - 1),
        Instruction(IF_EQUAL, 1, 0, 0),
        _statement(RETURN, n_workers),
    ]
    worker = [
        _statement(LOAD_WORD, first_word),
        *(instruction for word in words for instruction in _xor_with(word)),
        _statement(MULTIPLY, _MULTIPLIER),
        _statement(SHIFT_RIGHT, 16),
        _statement(TO_INDEX, 0),
        _statement(LOAD_HALF, SOURCE_PORT[family]),
        _statement(ADD_INDEX, 0),
        _statement(MODULO, n_workers),
        _statement(RETURN_ACCUMULATOR, 0),
    ]
    first = {_TO_STRANGER: len(tree), _TO_WORKER: len(tree) + len(stranger)}
    linked = [_statement(JUMP, first[it] - i - 1) if it in first else it for i, it in enumerate(tree)]
    return [*linked, *stranger, *worker]


def packed(program: Sequence[Instruction]) -> bytes:
    """The instructions as the kernel reads them."""
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in program)


def _xor_with(word: int) -> list[Instruction]:
    """The accumulator with another word of the headers."""
    return [_statement(TO_INDEX, 0), _statement(LOAD_WORD, word), _statement(XOR_INDEX, 0)]


def _tree(keys: Sequence[int]) -> list[Instruction]:
    """Search for the accumulator among the keys."""
    if len(keys) <= _LEAF:
        equal = [Instruction(IF_EQUAL, len(keys) - i, 0, key) for i, key in enumerate(keys)]
        return [*equal, _TO_STRANGER, _TO_WORKER]
    middle = len(keys) // 2
    lower, upper = _tree(keys[:middle]), _tree(keys[middle:])
    if len(lower) <= _MAX_CONDITIONAL_JUMP:
        return [Instruction(IF_GREATER_OR_EQUAL, len(lower), 0, keys[middle]), *lower, *upper]
    # A conditional jump has 8 bits, and one without condition has 32.
    split = [Instruction(IF_GREATER_OR_EQUAL, 0, 1, keys[middle]), _statement(JUMP, len(lower))]
    return [*split, *lower, *upper]


def _statement(code: int, k: int) -> Instruction:
    return Instruction(code, 0, 0, k)
