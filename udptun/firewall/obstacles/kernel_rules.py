"""Reads the chains that packets pass, out of the kernel.

Both of its packet filters are asked directly, without a program: nf_tables, in which iptables-nft keeps its rules too,
and the tables of legacy iptables.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from udptun.core.errors import KernelError
from udptun.core.family import Family
from udptun.firewall.obstacles.nft_messages import (
    INET,
    ChainHead,
    SetContents,
    decode_chain,
    decode_dormant_table,
    decode_set,
    dump_chains,
    dump_elements,
    dump_rules,
    dump_tables,
    get_set,
)
from udptun.firewall.obstacles.nft_rules import decode_rules, set_names
from udptun.firewall.obstacles.ruleset import BaseChain, Hook, Rule, Tool, Traffic
from udptun.firewall.obstacles.xtables import ENTRIES_AT, INFO, LEGACY_TABLES, decode_legacy_table
from udptun.firewall.rules import NFPROTO
from udptun.kernel.conversation import Conversation

log = logging.getLogger(__name__)

_NETLINK_NETFILTER = 12
_IPT_SO_GET_INFO, _IPT_SO_GET_ENTRIES = 64, 65
"""And IP6T_SO_GET_INFO, IP6T_SO_GET_ENTRIES."""
_LEGACY = {
    Family.IPV4: (socket.AF_INET, socket.SOL_IP, Path("/proc/thread-self/net/ip_tables_names")),
    Family.IPV6: (socket.AF_INET6, socket.IPPROTO_IPV6, Path("/proc/thread-self/net/ip6_tables_names")),
}
_IPTABLES_NFT = {Family.IPV4: Tool.IPTABLES_NFT, Family.IPV6: Tool.IP6TABLES_NFT}
_libc = ctypes.CDLL(None, use_errno=True)

NO_NF_TABLES = (errno.EPROTONOSUPPORT, errno.EINVAL)
"""What a kernel without netfilter's netlink sockets answers, and one whose have no nf_tables (nfnetlink_rcv_msg)."""
_MAX_RULES = 2000
"""A chain of more rules, with all that it leads to, is not judged: reading them would hold up the daemon."""

Chains = dict[Traffic, list[BaseChain]]
"""The chains that each traffic passes, with the rules as it meets them."""


async def read_nft(
    links: Mapping[int, str], traffics: Sequence[Traffic]
) -> tuple[Chains, frozenset[tuple[int, str, str]]]:
    """The chains of nf_tables; and netfilter's family, table and name of every chain that was read.

    `links`: the names of the links that matter, by index.  Raises KernelError.
    """
    async with Conversation(_NETLINK_NETFILTER) as kernel:
        reader = _NftReader(kernel, links, traffics)
        return await reader.read(), frozenset(reader.seen)


async def find_chain_at(link: str) -> ChainHead | None:
    """A chain of nf_tables at the link's ingress or egress, where those of IP are not met yet, or no more.

    Raises KernelError.
    """
    try:
        async with Conversation(_NETLINK_NETFILTER) as kernel:
            dormant = {decode_dormant_table(body) for body in await kernel.dump(dump_tables())}
            heads = [decode_chain(body) for body in await kernel.dump(dump_chains())]
    except KernelError as exc:
        if exc.errno not in NO_NF_TABLES:
            raise
        return None
    awake = [it for it in heads if (it.family, it.table) not in dormant]
    return next((it for it in awake if any(fnmatchcase(link, name) for name in it.devices)), None)


class _NftReader:
    """Reads the chains of nf_tables that any of the traffics passes."""

    def __init__(self, kernel: Conversation, links: Mapping[int, str], traffics: Sequence[Traffic]) -> None:
        self._kernel = kernel
        self._links = links
        self._traffics = traffics
        self.seen: set[tuple[int, str, str]] = set()

    async def read(self) -> Chains:
        dormant = {decode_dormant_table(body) for body in await self._kernel.dump(dump_tables())}
        heads = [decode_chain(body) for body in await self._kernel.dump(dump_chains())]
        found: Chains = {traffic: [] for traffic in self._traffics}
        for head in heads:
            passing = [it for it in self._traffics if _is_passed(head, it)]
            if passing and (head.family, head.table) not in dormant:
                for traffic, base in (await self._read_base(head, passing)).items():
                    found[traffic].append(base)
        return found

    async def _read_base(self, head: ChainHead, traffics: Sequence[Traffic]) -> dict[Traffic, BaseChain]:
        assert head.hook is not None
        is_iptables = head.family != INET and head.table in LEGACY_TABLES and head.name == Hook(head.hook).name
        chains: dict[Traffic, dict[str, list[Rule]]] = {traffic: {} for traffic in traffics}
        waiting, done = [head.name], set[str]()
        n_rules = 0
        while waiting:
            name = waiting.pop()
            if name in done:
                continue
            done.add(name)
            self.seen.add((head.family, head.table, name))
            bodies = await self._kernel.dump(dump_rules(head.family, head.table, name))
            n_rules += len(bodies)
            if n_rules > _MAX_RULES:
                chains = {traffic: {} for traffic in traffics}
                break
            sets = {it: await self._read_set(head, it) for it in set_names(bodies)}
            known = {it: contents for it, contents in sets.items() if contents is not None}
            for traffic in traffics:
                rules = decode_rules(bodies, known, self._links, traffic, is_iptables=is_iptables)
                chains[traffic][name] = rules
                waiting += [rule.target for rule in rules if rule.target]
        return {
            traffic: BaseChain(
                _IPTABLES_NFT[traffic.family] if is_iptables else Tool.NFT,
                "inet" if head.family == INET else traffic.family.nft_name,
                head.table,
                head.name,
                Hook(head.hook),
                head.priority,
                head.is_policy_drop,
                of_traffic,
            )
            for traffic, of_traffic in chains.items()
        }

    async def _read_set(self, head: ChainHead, name: str) -> SetContents | None:
        ((error, bodies),) = await self._kernel.ask([get_set(head.family, head.table, name)])
        if error is not None or not bodies:
            return None
        return decode_set(bodies[0], await self._kernel.dump(dump_elements(head.family, head.table, name)))


def _is_passed(head: ChainHead, traffic: Traffic) -> bool:
    # A table of type nat sees the first packet of a connection, and is not for dropping.
    of_family = head.family in (INET, NFPROTO[traffic.family])
    return of_family and head.type == "filter" and head.hook in traffic.hooks


def read_legacy(traffics: Iterable[Traffic]) -> Chains:
    """The chains of legacy iptables and ip6tables.  One that does not exist is not asked for: that would make it."""
    found: Chains = {traffic: [] for traffic in traffics}
    for family in {traffic.family for traffic in found}:
        for table, info, entries in _legacy_tables(family):
            for traffic, chains in found.items():
                if traffic.family is family:
                    chains += decode_legacy_table(table, info, entries, traffic)
    return found


def _legacy_tables(family: Family) -> Iterator[tuple[str, bytes, bytes]]:
    """Name of each table, what the kernel says of it, and its entries."""
    socket_family, level, names = _LEGACY[family]
    try:
        tables = names.read_text().split()
    except OSError:
        return
    with socket.socket(socket_family, socket.SOCK_DGRAM) as sock:
        for table in tables:
            if table in LEGACY_TABLES:
                try:
                    info = _ask_legacy(sock, level, _IPT_SO_GET_INFO, table.encode().ljust(INFO.size, b"\0"))
                    *_, n_rules, size = INFO.unpack(info)
                    if n_rules > _MAX_RULES:
                        continue
                    question = table.encode().ljust(32, b"\0") + size.to_bytes(4, sys.byteorder)
                    answer = _ask_legacy(sock, level, _IPT_SO_GET_ENTRIES, question.ljust(ENTRIES_AT + size, b"\0"))
                except OSError as exc:
                    # EAGAIN: it has changed between the two questions.
                    log.debug("legacy iptables table not read table=%s error=%s", table, exc)
                    continue
                yield table, info, answer[ENTRIES_AT:]


def _ask_legacy(sock: socket.socket, level: int, question: int, buffer: bytes) -> bytes:
    """getsockopt() that gets a question in the buffer of the answer, which Python's cannot.  Raises OSError."""
    answer = ctypes.create_string_buffer(buffer, len(buffer))
    length = ctypes.c_uint32(len(buffer))
    if _libc.getsockopt(sock.fileno(), level, question, answer, ctypes.byref(length)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return answer.raw[: length.value]
