"""`udptun trace` where the kernel carries the family, or nobody does: by the kernel's routes, neighbours and fdb."""

from __future__ import annotations

from udptun.control.running import Running
from udptun.control.trace.ends import Document, end_before, end_behind, end_here, leased_peer, verdict
from udptun.control.trace.kernel import KernelView
from udptun.core.lease import LeasePart
from udptun.core.network_state import IPAddress
from udptun.core.trace_request import TraceRequest


class ByKernel:
    """Of a family that the kernel carries, or nobody."""

    def __init__(self, running: Running, packet: TraceRequest, kernel: KernelView) -> None:
        self._running, self._packet, self._kernel = running, packet, kernel
        forwarding = running.forwarding
        self._device = forwarding.device(packet.family) if packet.family in forwarding.families else None

    def is_leased_by_peer(self, address: IPAddress) -> bool:
        return self._leasing(address) is not None

    async def outgoing(self) -> Document:
        way, part = await self._kernel.from_here(self._packet, self._device), self._leasing(self._packet.destination)
        document = {"kernel": way.document(), "peer": leased_peer(part)}
        if way.refusal or way.is_local or way.route is None:
            return {**document, **(end_before(way, self._device) or {})}
        gateway = way.route.gateway
        if way.device == self._device and self._device is not None:
            return {**document, **await self._over_vxlan(self._device, gateway or self._packet.destination)}
        if part is not None and gateway == part.public_ip:
            return {**document, "verdict": verdict("kernel", f"the kernel sends it to {gateway}", is_delivered=True)}
        return {**document, **end_here(f"it leaves by {way.device}, and no host of ours is its gateway")}

    async def arriving(self) -> Document:
        part, way = self._leasing(self._packet.source), await self._kernel.from_tunnel(self._packet, self._device)
        document = {"kernel": way.document(), "peer": leased_peer(part)}
        if self._packet.destination not in (self._running.membership.own.subnets.of(self._packet.family) or ()):
            return {**document, **end_here("its destination is not in this host's subnet")}
        return {**document, **end_behind(way, self._device, None)}

    async def _over_vxlan(self, device: str, gateway: IPAddress) -> Document:
        mac = await self._kernel.mac_of(device, gateway)
        vtep = None if mac is None else await self._kernel.vtep_of(device, mac)
        neighbour = {"ip": str(gateway), "mac": mac, "vtep": None if vtep is None else str(vtep)}
        if vtep is None:
            what = f"neighbour {gateway}" if mac is None else f"fdb entry {mac}"
            end = verdict("kernel", f"the kernel has no {what} on {device}", is_delivered=False)
        else:
            end = verdict("kernel", f"the kernel sends it over VXLAN to {vtep}", is_delivered=True)
        return {"neighbour": neighbour, "verdict": end}

    def _leasing(self, address: IPAddress) -> LeasePart | None:
        for table in self._running.membership.tables:
            if table.family is self._packet.family:
                for lease in table.peers.values():
                    if address in lease.subnet_of(table.family):
                        return table.part(lease)
        return None
