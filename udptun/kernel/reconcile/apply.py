"""Do in the kernel what was planned.

Most changes are single netlink messages.  Those that follow each other go to the kernel in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Protocol

from udptun.core.desired import DesiredLink, Sysctl
from udptun.core.errors import KernelError
from udptun.core.network_state import Address, FdbEntry, Link, LinkSettings, Neighbour, Route
from udptun.kernel import link_messages, rtnetlink
from udptun.kernel.netlink import Netlink
from udptun.kernel.reconcile.change import Change, Verb
from udptun.kernel.rtnetlink import Request
from udptun.kernel.sysctl import write_sysctl

_REQUESTS: Mapping[tuple[Verb, type], Callable[..., Request]] = {
    (Verb.ADD, Route): rtnetlink.add_route,
    (Verb.DELETE, Route): rtnetlink.delete_route,
    (Verb.SET, Neighbour): rtnetlink.set_neighbour,
    (Verb.DELETE, Neighbour): rtnetlink.delete_neighbour,
    (Verb.SET, FdbEntry): rtnetlink.set_fdb,
    (Verb.DELETE, FdbEntry): rtnetlink.delete_fdb,
    (Verb.ADD, Address): link_messages.add_address,
    (Verb.DELETE, Address): link_messages.delete_address,
    (Verb.SET, LinkSettings): link_messages.set_link,
    (Verb.DELETE, Link): link_messages.delete_link,
}
"""The changes that are one netlink message."""


class Device(Protocol):
    """The device that packets go through (`udptun.kernel.tun.Tun`)."""

    name: str

    def is_attached(self) -> bool:
        """Whether its queues still reach a device of this name."""

    def reattach(self) -> None:
        """Bring a deleted device back.  Raises KernelError."""


async def apply(
    kernel: Netlink, device: Device | None, changes: Iterable[Change]
) -> tuple[list[Change], list[tuple[Change, KernelError]]]:
    """Make the changes in order, each whatever becomes of the others.

    Returns those that were made, and those that failed with the reasons.  Raises KernelError when the conversation
    itself fails.
    """
    done: list[Change] = []
    failed: list[tuple[Change, KernelError]] = []
    for is_message, group in groupby(changes, lambda change: (change.verb, type(change.thing)) in _REQUESTS):
        together = list(group)
        for change, error in zip(
            together,
            await (_send(kernel, together) if is_message else _do_each(kernel, device, together)),
            strict=True,
        ):
            if error is None:
                done.append(change)
            else:
                failed.append((change, error))
    return done, failed


async def _send(kernel: Netlink, changes: Iterable[Change]) -> list[KernelError | None]:
    return await kernel.change([_REQUESTS[change.verb, type(change.thing)](change.thing) for change in changes])


async def _do_each(kernel: Netlink, device: Device | None, changes: Sequence[Change]) -> list[KernelError | None]:
    errors: list[KernelError | None] = []
    for change in changes:
        try:
            match change.verb, change.thing:
                case Verb.REVIVE, _:
                    assert device is not None
                    device.reattach()
                case Verb.CREATE, DesiredLink() as link:
                    await _create_vxlan(kernel, link)
                case Verb.SET, Sysctl() as sysctl:
                    write_sysctl(sysctl)
                case _:
                    raise AssertionError(change)
        except KernelError as exc:
            errors.append(exc)
        else:
            errors.append(None)
    return errors


async def create_missing_vxlans(links: Iterable[DesiredLink], alias: str) -> None:
    """Create the VXLAN devices that are not there yet, and nothing else; `alias` marks them.  Raises KernelError."""
    async with Netlink() as kernel:
        for link in links:
            if link.vxlan is not None and await kernel.link(link.name) is None:
                await _create_vxlan(kernel, link)
                # Set afterwards: the kernel ignores the alias of a device that it is about to create.
                if (made := await kernel.link(link.name)) is not None:
                    await kernel.do(link_messages.set_link(LinkSettings(made, alias=alias)))


async def _create_vxlan(kernel: Netlink, desired: DesiredLink) -> None:
    assert desired.vxlan is not None
    await kernel.do(link_messages.add_vxlan(desired.name, desired.vxlan, desired.mac, desired.mtu))
