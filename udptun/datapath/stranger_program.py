"""A classic BPF program that keeps the datagrams of strangers from the workers' sockets.  Pure.

It chooses among the sockets of one port (SO_ATTACH_REUSEPORT_CBPF): those of the workers come first, and behind them
stands the sink, a socket that drops all it gets.  Addresses are numbers in host order, as the program loads them.

    tree        a binary search for the source address, with a few addresses in each leaf
    stranger    no address of the tree: the sink, or by chance, once in `one_in`, a worker
    worker      the socket that csrc/spread.h would choose
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

MAX_ADDRESSES = 2000
"""Some 3,000 instructions; the kernel takes 4,096 (BPF_MAXINSNS)."""

# linux/filter.h and linux/bpf_common.h
LOAD_WORD, LOAD_HALF, TO_INDEX = 0x20, 0x28, 0x07
MULTIPLY, SHIFT_RIGHT, AND, MODULO, ADD_INDEX = 0x24, 0x74, 0x54, 0x94, 0x0C
JUMP, IF_EQUAL, IF_GREATER_OR_EQUAL = 0x05, 0x15, 0x35
RETURN, RETURN_ACCUMULATOR = 0x06, 0x16
SOURCE_ADDRESS, SOURCE_PORT, RANDOM = 0xFFF0000C, 0xFFF00014, 0xFFFFF038
"""SKF_NET_OFF + 12 and + 20: in the IP header, and in UDP's behind one without options.  SKF_AD_OFF +
SKF_AD_RANDOM."""

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


def stranger_program(addresses: Sequence[int], n_workers: int, one_in: int) -> list[Instruction]:
    """What sends strangers to socket `n_workers` of the port, and the rest to those before it.

    `addresses`: those that are no strangers', ascending, each once, MAX_ADDRESSES at most.  One stranger's datagram in
    `one_in`, a power of two, goes where the rest does.
    """
    tree = [_statement(LOAD_WORD, SOURCE_ADDRESS), *_tree(addresses)]
    stranger = [
        _statement(LOAD_WORD, RANDOM),
        _statement(AND, one_in - 1),
        Instruction(IF_EQUAL, 1, 0, 0),
        _statement(RETURN, n_workers),
    ]
    worker = [
        _statement(LOAD_WORD, SOURCE_ADDRESS),
        _statement(MULTIPLY, _MULTIPLIER),
        _statement(SHIFT_RIGHT, 16),
        _statement(TO_INDEX, 0),
        _statement(LOAD_HALF, SOURCE_PORT),
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


def _tree(addresses: Sequence[int]) -> list[Instruction]:
    """Search for the accumulator among the addresses."""
    if len(addresses) <= _LEAF:
        equal = [Instruction(IF_EQUAL, len(addresses) - i, 0, address) for i, address in enumerate(addresses)]
        return [*equal, _TO_STRANGER, _TO_WORKER]
    middle = len(addresses) // 2
    lower, upper = _tree(addresses[:middle]), _tree(addresses[middle:])
    if len(lower) <= _MAX_CONDITIONAL_JUMP:
        return [Instruction(IF_GREATER_OR_EQUAL, len(lower), 0, addresses[middle]), *lower, *upper]
    # A conditional jump has 8 bits, and one without condition has 32.
    split = [Instruction(IF_GREATER_OR_EQUAL, 0, 1, addresses[middle]), _statement(JUMP, len(lower))]
    return [*split, *lower, *upper]


def _statement(code: int, k: int) -> Instruction:
    return Instruction(code, 0, 0, k)
