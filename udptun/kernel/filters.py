"""BPF programs on devices as filters of traffic control, for kernels without tcx, which came with Linux 6.6.

    clsact      the queueing discipline that holds the filters of a device.  There is one at most, whoever has made it
    priority    decides which filter comes first; ours is one of our own
    name        begins with the owner's alias, as in `udptun 10.244.0.0/16 decap`: only by that is a filter ours
    sign        a filter that sees no packet, as nothing leads to its chain.  It says that udptun has made the clsact,
                which itself cannot be marked

A filter stays when its process ends, however that ends.  Filters of others are never touched, and those behind ours
have their turn when ours answers TC_ACT_UNSPEC.

Making or deleting a clsact stops the device's sending for some milliseconds, and what is sent meanwhile is lost
(dev_deactivate in net/sched/sch_generic.c).  So ours stays until everything of ours goes, and then only where nobody
else has a filter on it.

Some programs take packets and send them into devices of ours; the others get them out there.  Filters of the former go
first, and those of the latter a moment later, so that what was taken gets out.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from udptun.core.errors import KernelError
from udptun.kernel.bpf import Hook, load_program
from udptun.kernel.netlink import Netlink
from udptun.kernel.rtnetlink import F_CREATE, F_DUMP, F_EXCL, Request, attribute, attributes

_NEWQDISC, _DELQDISC, _GETQDISC = 36, 37, 38
_NEWTFILTER, _DELTFILTER, _GETTFILTER = 44, 45, 46
_MESSAGE = struct.Struct("=BxxxiIII")
"""struct tcmsg: family, ifindex, handle, parent, info."""
_TCA_KIND, _TCA_OPTIONS, _TCA_CHAIN = 1, 2, 11
_TCA_BPF_FD, _TCA_BPF_NAME, _TCA_BPF_FLAGS = 6, 7, 8
_U32 = struct.Struct("=I")
_DIRECT_ACTION = 1
"""TCA_BPF_FLAG_ACT_DIRECT: what the program answers is what becomes of the packet."""
_CLSACT_PARENT, _CLSACT_HANDLE = 0xFFFFFFF1, 0xFFFF0000
_PARENTS = {Hook.INGRESS: 0xFFFFFFF2, Hook.EGRESS: 0xFFFFFFF3}
_HOLDERS = {Hook.INGRESS: ("clsact", "ingress"), Hook.EGRESS: ("clsact",)}
"""The queueing disciplines that can hold filters there."""
_PRIORITY = 0xD57A
"""Behind the filters that have none of their own: the kernel gives them 0xC000 and less."""
_ETH_P_ALL = 3
_INFO = _PRIORITY << 16 | socket.htons(_ETH_P_ALL)
_MARK = "udptun "
_SIGN = "clsact"
_SIGN_CHAIN = 0x7574
_SIGN_PROGRAM = struct.pack("=BBhiBBhi", 0xB7, 0, 0, -1, 0x95, 0, 0, 0)
"""r0 = TC_ACT_UNSPEC; exit"""
_OUT = ("deliver", "arrive")
"""The programs that get packets out of our devices, which others have sent there."""
_DRAIN_S = 0.05
"""So long packets may be on the way from one program to the next."""
_GONE = (errno.ENOENT, errno.ENODEV, errno.EINVAL)
"""What a deletion answers when the thing, its device, or what held it is gone already."""
_HINT = "a kernel without tcx (Linux 6.6) needs CONFIG_NET_CLS_ACT, CONFIG_NET_SCH_INGRESS and CONFIG_NET_CLS_BPF"


@dataclass(frozen=True, slots=True)
class Filter:
    """A filter of udptun's, of whichever daemon."""

    link_index: int
    hook: Hook
    handle: int
    chain: int
    name: str

    @property
    def is_sign(self) -> bool:
        return self.chain == _SIGN_CHAIN

    @property
    def gets_out(self) -> bool:
        return self.name.rpartition(" ")[2] in _OUT

    def belongs_to(self, aliases: Collection[str]) -> bool:
        return any(self.name.startswith(f"{alias} ") for alias in aliases)


async def attach_filter(alias: str, name: str, program_fd: int, link_index: int, hook: Hook) -> None:
    """Run a program on a device until `remove_filters`.  `name`: what it is called behind the owner's alias.

    Raises KernelError: ENODEV when there is no such device, EEXIST when something of others holds the place of clsact.
    """
    operation = f"cannot attach a BPF program to link {link_index} by clsact"
    async with Netlink() as kernel:
        holder = (await _holders(kernel)).get(link_index)
        if holder is None:
            await _add_sign(kernel, operation, alias, link_index, with_clsact=True)
        elif holder in _HOLDERS[hook]:
            signs = [it for it in await _filters_on(kernel, link_index, holder) if it.is_sign]
            if signs and not any(it.belongs_to([alias]) for it in signs):
                # Of each network one: the clsact is there for all of them.
                await _add_sign(kernel, operation, alias, link_index, with_clsact=False)
        else:
            hint = f"it has a qdisc {holder} of somebody else, which has no egress"
            raise KernelError(operation, errno.EEXIST, hint)
        await _add(kernel, _new_filter(operation, f"{alias} {name}", program_fd, link_index, hook))


async def find_filters(aliases: Collection[str], link_indexes: Collection[int]) -> list[Filter]:
    """Those of the owners with these aliases on these devices.  Raises KernelError."""
    async with Netlink() as kernel:
        holders = await _holders(kernel)
        return await _find(kernel, aliases, {index: holders[index] for index in link_indexes if index in holders})


async def remove_filters(aliases: Collection[str], *, with_clsact: bool = False) -> list[Filter]:
    """Take out those of the owners with these aliases, whichever process has attached them.  Returns them.

    What is between the programs gets out, which takes a moment.  `with_clsact`: each clsact of theirs as well, unless
    somebody else uses it.  Raises KernelError.
    """
    async with Netlink() as kernel:
        found = await _find(kernel, aliases, await _holders(kernel))
        gone = [it for it in found if with_clsact or not it.is_sign]
        last = [it for it in gone if it.gets_out]
        await _delete_filters(kernel, [it for it in gone if not it.gets_out])
        if last:
            await asyncio.sleep(_DRAIN_S)
        await _delete_filters(kernel, last)
        for link_index in sorted({it.link_index for it in gone if it.is_sign}):
            await _delete_empty_clsact(kernel, link_index)
        return gone


async def _find(kernel: Netlink, aliases: Collection[str], holders: Mapping[int, str]) -> list[Filter]:
    return [it for link in holders.items() for it in await _filters_on(kernel, *link) if it.belongs_to(aliases)]


async def _holders(kernel: Netlink) -> dict[int, str]:
    """By the index of each device that can have filters the kind of what holds them."""
    try:
        bodies = await kernel.dump(Request("cannot list qdiscs", _GETQDISC, F_DUMP, _MESSAGE.pack(0, 0, 0, 0, 0)))
    except KernelError as exc:
        # A kernel without CONFIG_NET_SCHED knows no such question.
        if exc.errno == errno.EOPNOTSUPP:
            return {}
        raise
    found = {}
    for body in bodies:
        _, link_index, _, parent, _ = _MESSAGE.unpack_from(body)
        if parent == _CLSACT_PARENT:
            found[link_index] = _text(dict(attributes(body, _MESSAGE.size)).get(_TCA_KIND, b""))
    return found


async def _filters_on(kernel: Netlink, link_index: int, holder: str) -> list[Filter]:
    """Udptun's on one device, of all its daemons."""
    found = []
    # `ingress` shows the same filters at both.
    for hook in [it for it in Hook if holder in _HOLDERS[it]]:
        for body in await _dump_filters(kernel, link_index, hook, _INFO):
            _, _, handle, _, info = _MESSAGE.unpack_from(body)
            parts = dict(attributes(body, _MESSAGE.size))
            name = _text(dict(attributes(parts.get(_TCA_OPTIONS, b""), 0)).get(_TCA_BPF_NAME, b""))
            if info == _INFO and name.startswith(_MARK):
                (chain,) = _U32.unpack(parts.get(_TCA_CHAIN, bytes(4)))
                found.append(Filter(link_index, hook, handle, chain, name))
    return found


async def _dump_filters(kernel: Netlink, link_index: int, hook: Hook, info: int) -> list[bytes]:
    """Those of one priority, or of all (0).  A device that is gone has none."""
    body = _MESSAGE.pack(0, link_index, 0, _PARENTS[hook], info)
    return await kernel.dump(Request(f"cannot list the filters of link {link_index}", _GETTFILTER, F_DUMP, body))


async def _delete_filters(kernel: Netlink, filters: Iterable[Filter]) -> None:
    for it in filters:
        body = _MESSAGE.pack(0, it.link_index, it.handle, _PARENTS[it.hook], _INFO)
        body += attribute(_TCA_KIND, b"bpf\0") + attribute(_TCA_CHAIN, _U32.pack(it.chain))
        operation = f"cannot delete the filter {it.name} of link {it.link_index}"
        await _delete(kernel, Request(operation, _DELTFILTER, 0, body))


async def _add_sign(kernel: Netlink, operation: str, alias: str, link_index: int, *, with_clsact: bool) -> None:
    """`with_clsact`: make that too.  Raises KernelError: neither is there then."""
    sign_fd = load_program("ut_sign", _SIGN_PROGRAM)
    try:
        if with_clsact:
            await _add(kernel, Request(operation, _NEWQDISC, F_CREATE | F_EXCL, _clsact_body(link_index)))
        try:
            sign = _new_filter(operation, f"{alias} {_SIGN}", sign_fd, link_index, Hook.INGRESS, _SIGN_CHAIN)
            await _add(kernel, sign)
        except BaseException:
            if with_clsact:
                # Without a sign nobody would know that it is ours.
                with suppress(KernelError):
                    await _delete_empty_clsact(kernel, link_index)
            raise
    finally:
        os.close(sign_fd)


async def _delete_empty_clsact(kernel: Netlink, link_index: int) -> None:
    """Nothing is deleted when a filter of anybody is on it."""
    for hook in Hook:
        if await _dump_filters(kernel, link_index, hook, 0):
            return
    operation = f"cannot delete the clsact of link {link_index}"
    await _delete(kernel, Request(operation, _DELQDISC, 0, _clsact_body(link_index)))


def _clsact_body(link_index: int) -> bytes:
    head = _MESSAGE.pack(0, link_index, _CLSACT_HANDLE, _CLSACT_PARENT, 0)
    return head + attribute(_TCA_KIND, b"clsact\0")


def _new_filter(operation: str, name: str, program_fd: int, link_index: int, hook: Hook, chain: int = 0) -> Request:
    """The kernel gives it a handle that is free."""
    options = attribute(_TCA_BPF_FD, _U32.pack(program_fd)) + attribute(_TCA_BPF_NAME, name.encode() + b"\0")
    options += attribute(_TCA_BPF_FLAGS, _U32.pack(_DIRECT_ACTION))
    body = _MESSAGE.pack(0, link_index, 0, _PARENTS[hook], _INFO) + attribute(_TCA_KIND, b"bpf\0")
    body += attribute(_TCA_OPTIONS, options) + attribute(_TCA_CHAIN, _U32.pack(chain))
    return Request(operation, _NEWTFILTER, F_CREATE | F_EXCL, body)


async def _add(kernel: Netlink, request: Request) -> None:
    try:
        await kernel.do(request)
    except KernelError as exc:
        # So it says that it does not know the kind.
        if exc.errno in (errno.ENOENT, errno.EOPNOTSUPP):
            raise KernelError(request.operation, exc.errno, _HINT) from exc
        raise


async def _delete(kernel: Netlink, request: Request) -> None:
    """What is gone already is no error."""
    for error in await kernel.change([request]):
        if error is not None and error.errno not in _GONE:
            raise error


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")
