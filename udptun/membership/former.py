"""Whether a lease that flanneld wrote is this host's, of before its address changed.  Pure: others ask the network.

flannel's leases say no more of a host than its PublicIP, so one with another PublicIP may be anybody's.  If subnet.env
names its subnet, this host had that subnet once.  But its lease ended 24 hours after it was last renewed, and then any
host could get the subnet.  So one more thing has to be true before the lease counts as ours (docs/decisions/0006):

* its PublicIP is still an address of this host, or
* its VtepMAC is that of our VTEP, which we took over from flanneld's device, or
* its PublicIP is on a link of ours, and nobody there has it.

A reservation is never ours by this: flanneld did not write it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from ipaddress import IPv4Address

from udptun.core.errors import LeaseError
from udptun.core.lease import Lease, LeaseAttrs, Subnets, is_same_host

IsInUse = Callable[[IPv4Address], Awaitable[bool]]
"""Whether another host has the address, or may have it: true wherever that cannot be told."""


class UndecidedError(LeaseError):
    """Whether a lease is ours is not known yet.  After `find_out` the chooser that raised this can be asked again."""

    def __init__(self, former: FormerLease, lease: Lease) -> None:
        super().__init__(f"it is not known yet whether the lease {lease.subnet} is ours")
        self._former = former
        self._lease = lease

    async def find_out(self) -> bool:
        """Whether it is ours.  May take seconds."""
        return await self._former.find_out(self._lease)


class FormerLease:
    """The lease of `subnets`, which subnet.env names, if flanneld wrote it.

    `own` is what our lease will say, and `addresses` are all of this host's.
    """

    def __init__(
        self, subnets: Subnets, own: LeaseAttrs, addresses: Collection[IPv4Address], is_in_use: IsInUse
    ) -> None:
        self._subnets = subnets
        self._own = own
        self._addresses = addresses
        self._is_in_use = is_in_use
        self._answers: dict[tuple[IPv4Address | None, int], bool] = {}
        """Whether the lease is ours, by its PublicIP and revision: what is written later is asked about anew."""

    def is_ours(self, lease: Lease) -> bool:
        """Whether `lease` is ours.  Raises UndecidedError where the network has to be asked first."""
        if not self._may_be_ours(lease):
            return False
        if lease.attrs.public_ip in self._addresses or _has_same_vtep(lease.attrs, self._own):
            return True
        answer = self._answers.get((lease.attrs.public_ip, lease.revision))
        if answer is None:
            raise UndecidedError(self, lease)
        return answer

    async def find_out(self, lease: Lease) -> bool:
        """Ask the network, so that `is_ours` has an answer for the lease as it is now."""
        public_ip = lease.attrs.public_ip
        is_ours = public_ip is not None and not await self._is_in_use(public_ip)
        self._answers[public_ip, lease.revision] = is_ours
        return is_ours

    def left_alone(self, leases: Iterable[Lease], own: Lease) -> str:
        """A line about that lease among `leases` where it was not taken for ours; `own` is the one that we have.

        Empty where there is nothing to say.
        """
        if own.subnets == self._subnets:
            return ""
        for lease in leases:
            if self._may_be_ours(lease) and not is_same_host(lease.attrs, own.attrs):
                flag = "--public-ipv6" if own.attrs.public_ip is None else "--public-ip"
                return (
                    f"{lease.subnet}, which subnet.env names, is left to {lease.attrs.host_address}, which may be "
                    f"another host; if it was this host's address, `udptun lease release {lease.subnet}` and `udptun "
                    f"lease reserve {lease.subnet} {flag} {own.attrs.host_address}`: the first start after a "
                    "reboot or `udptun cleanup` takes it"
                )
        return ""

    def _may_be_ours(self, lease: Lease) -> bool:
        """Whether flanneld of this host may have written it."""
        attrs = lease.attrs
        is_flannels = attrs.node_id is None and not attrs.is_udptun and not lease.is_reservation
        return is_flannels and lease.subnets == self._subnets


def _has_same_vtep(one: LeaseAttrs, other: LeaseAttrs) -> bool:
    mac = _vtep_mac(one)
    return mac is not None and mac == _vtep_mac(other)


def _vtep_mac(attrs: LeaseAttrs) -> str | None:
    mac = attrs.backend_data.get("VtepMAC") if isinstance(attrs.backend_data, Mapping) else None
    return mac.lower() if isinstance(mac, str) and mac else None
