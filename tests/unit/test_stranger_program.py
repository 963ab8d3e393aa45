"""The program that keeps strangers from the workers' sockets, run by an interpreter of classic BPF."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from udptun.core.family import Family
from udptun.datapath import stranger_program as bpf
from udptun.datapath.stranger_program import MAX_ADDRESSES, Instruction, packed, source_keys, stranger_program

BPF_MAXINSNS = 4096


def run(
    program: Sequence[Instruction], source: int, port: int, chance: int, family: Family = Family.IPV4
) -> int:
    """What the program returns for a datagram, as the kernel's documentation defines the instructions."""
    accumulator = index = at = 0
    loads = {bpf.SOURCE_PORT[family]: port, bpf.RANDOM: chance}
    loads |= dict(zip(bpf.SOURCE_WORDS[family], words_of(source, family), strict=True))
    while True:
        code, if_true, if_false, k = program[at]
        at += 1
        if code in (bpf.LOAD_WORD, bpf.LOAD_HALF):
            accumulator = loads[k]
        elif code == bpf.TO_INDEX:
            index = accumulator
        elif code == bpf.MULTIPLY:
            accumulator = accumulator * k & 0xFFFFFFFF
        elif code == bpf.SHIFT_RIGHT:
            accumulator >>= k
        elif code == bpf.AND:
            accumulator &= k
        elif code == bpf.MODULO:
            accumulator %= k
        elif code == bpf.XOR_INDEX:
            accumulator ^= index
        elif code == bpf.ADD_INDEX:
            accumulator = accumulator + index & 0xFFFFFFFF
        elif code == bpf.JUMP:
            at += k
        elif code == bpf.IF_EQUAL:
            at += if_true if accumulator == k else if_false
        elif code == bpf.IF_GREATER_OR_EQUAL:
            at += if_true if accumulator >= k else if_false
        elif code == bpf.RETURN:
            return k
        else:
            assert code == bpf.RETURN_ACCUMULATOR
            return accumulator


def words_of(source: int, family: Family) -> list[int]:
    return [source >> shift & 0xFFFFFFFF for shift in range(family.bits - 32, -1, -32)]


def worker_of(source: int, port: int, n_workers: int, family: Family = Family.IPV4) -> int:
    """csrc/spread.h."""
    word = 0
    for it in words_of(source, family):
        word ^= it
    return (((word * 0x9E3779B1 & 0xFFFFFFFF) >> 16) + port) % n_workers


def addresses(n: int, seed: int) -> list[int]:
    """`n` of them: a run, as hosts of one network have, or by chance over all that there are."""
    chance = random.Random(seed)
    if seed % 2:
        first = chance.randrange(1 << 31)
        return list(range(first, first + n))
    return sorted(chance.sample(range(1 << 32), n))


@pytest.mark.parametrize("n", [0, 1, 2, 8, 9, 16, 17, 31, 100, 255, 256, 257, 700, 1999, MAX_ADDRESSES])
@pytest.mark.parametrize("seed", [1, 2])
def test_each_address_reaches_its_worker_and_a_stranger_the_sink(n: int, seed: int) -> None:
    known = addresses(n, seed)
    chance = random.Random(n)
    n_workers = chance.choice([1, 2, 4, 16])
    program = stranger_program(known, n_workers, 256, Family.IPV4)
    for source in known:
        port = chance.randrange(1 << 16)
        assert run(program, source, port, chance.randrange(1 << 32)) == worker_of(source, port, n_workers)
    near = {it + step & 0xFFFFFFFF for it in known for step in (-1, 1)} | {0, 1 << 31, (1 << 32) - 1}
    for source in near - set(known):
        assert run(program, source, 8285, 1) == n_workers


@pytest.mark.parametrize("seed", [1, 2])
def test_each_ipv6_address_reaches_its_worker_and_a_stranger_the_sink(seed: int) -> None:
    """Addresses of one network differ in few bits, and their keys in all."""
    chance = random.Random(seed)
    multiplier = chance.getrandbits(32) | 1
    known = [(0xFD00 << 112) + (host << 64 * (seed - 1)) for host in range(1, MAX_ADDRESSES + 1)]
    keys = source_keys(known, Family.IPV6, multiplier)
    assert len(keys) > MAX_ADDRESSES - 5
    program = stranger_program(keys, 4, 256, Family.IPV6, multiplier)
    assert len(program) <= BPF_MAXINSNS
    for source in known[::7]:
        port = chance.randrange(1 << 16)
        assert run(program, source, port, 1, Family.IPV6) == worker_of(source, port, 4, Family.IPV6)
    strangers = [known[0] ^ 1 << bit for bit in range(12, 128)]
    n_in = sum(run(program, source, 8285, 1, Family.IPV6) != 4 for source in strangers if source not in known)
    assert n_in == 0


def test_keys_of_ipv4_are_the_addresses_whatever_the_multiplier() -> None:
    assert source_keys([30, 10, 20, 10], Family.IPV4, 7) == [10, 20, 30]


@pytest.mark.parametrize("one_in", [1, 8, 256, 1 << 20])
def test_one_of_so_many_datagrams_of_a_stranger_reaches_a_worker(one_in: int) -> None:
    program = stranger_program([10, 20, 30], 4, one_in, Family.IPV4)
    chances = {0, 1, 2, 3, *range(one_in - 2, one_in + 3), 2 * one_in - 1, 2 * one_in, 3 * one_in, 3 * one_in + 1}
    passed = {chance for chance in chances if run(program, 15, 8285, chance) != 4}
    assert passed == {chance for chance in chances if chance % one_in == 0}
    assert run(program, 15, 8285, 0) == worker_of(15, 8285, 4)


@pytest.mark.parametrize("seed", range(20))
def test_the_kernel_takes_a_program_of_as_many_addresses_as_we_promise(seed: int) -> None:
    program = stranger_program(addresses(MAX_ADDRESSES, seed), 16, 256, Family.IPV4)
    assert len(program) <= BPF_MAXINSNS
    assert all(it.if_true < 256 and it.if_false < 256 and it.k < 1 << 32 for it in program)
    assert len(packed(program)) == 8 * len(program)
