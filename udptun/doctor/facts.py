"""What the checks look at: gathered once, so that they agree with each other and cost little.

Nothing here changes the host, and everything has an end: a store that does not answer costs `_STORE_S`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from udptun.backends.choice import parse_net_conf
from udptun.backends.vxlan import VxlanKeys
from udptun.config import subnet_env
from udptun.config.command_flags import DoctorRequest
from udptun.config.flags import Options
from udptun.config.net_conf import NetConf
from udptun.config.store_flags import StoreKind
from udptun.core.errors import ConfigError, KernelError, UdptunError
from udptun.core.family import Family
from udptun.core.ip_text import ip_address, ip_network
from udptun.core.network_state import Address, IPAddress, IPNetwork, Link, Route
from udptun.core.ownership import marked_network
from udptun.core.pod_path import PodPath
from udptun.doctor.endpoints import Endpoint, ask_endpoints
from udptun.kernel.netlink import Netlink
from udptun.stores.base import Snapshot
from udptun.stores.open import open_store

Document = Mapping[str, Any]
"""See docs/status.md."""

_STORE_S = 3.0
_OTHER_CNI_BIN_DIRS = (Path("/usr/lib/cni"), Path("/usr/libexec/cni"))
"""Of Debian's packages and of others."""


@dataclass(frozen=True, slots=True)
class StoreView:
    """What the store says.  `error`: why it does not."""

    name: str
    config: str | None = None
    snapshot: Snapshot | None = None
    config_name: str = ""
    node_name: str = ""
    lack: str = ""
    """Why our node of Kubernetes has no lease to give; empty elsewhere."""
    error: str = ""
    config_error: str = ""


@dataclass(frozen=True, slots=True)
class Peer:
    """One subnet of another host.  `inner`: the address that answers through the tunnel."""

    subnet: IPNetwork
    public_ip: IPAddress
    inner: IPAddress
    port: int | None = None
    liveness: str = "unknown"
    path_mtu: int | None = None

    def __str__(self) -> str:
        return f"{self.subnet} at {self.public_ip}"


@dataclass(frozen=True)
class Facts:
    """See the module's text.  What is made of it is made once: there may be 10,000 peers."""

    options: Options
    cni_conf_dir: Path
    cni_bin_dirs: tuple[Path, ...]
    document: Document | None
    """Of the daemon that answers; None: none does."""
    silence: str
    """Why none answers."""
    ask_again: Callable[[], Document | None]
    daemon_pid: int | None
    """Of the daemon; None when it cannot be seen from here."""
    store: StoreView
    conf: NetConf | None
    conf_problems: tuple[str, ...]
    links: Mapping[int, Link]
    addresses: tuple[Address, ...]
    routes: tuple[Route, ...]
    blind: str
    """Why the kernel's links and routes are not known; empty when they are."""
    release: str
    now_s: float = field(default_factory=time.time)
    endpoints: tuple[Endpoint, ...] = ()
    """The servers of the store."""

    @property
    def is_kube(self) -> bool:
        return self.options.store.kind is StoreKind.KUBE

    @property
    def backend_type(self) -> str:
        """The type in use, or the one that the network config asks for; empty when nobody knows."""
        if self.document is not None:
            return str(self.document["backend"]["type"])
        return self.conf.backend.type if self.conf is not None else ""

    @property
    def has_datapath(self) -> bool:
        """Whether packets pass the datapath, or would."""
        if self.document is not None:
            return self.document["datapath"] is not None
        return self.backend_type in ("udp", "")

    @property
    def mtu(self) -> int | None:
        """The largest packet of a pod, by the daemon."""
        return None if self.document is None else int(self.document["backend"]["mtu"])

    @cached_property
    def networks(self) -> tuple[IPNetwork, ...]:
        """Network and IPv6Network, as far as they are known."""
        if self.document is not None:
            found = [ip_network(self.document["network"])]
            if ipv6 := self.document.get("ipv6"):
                found.append(ip_network(ipv6["network"]))
            return tuple(dict.fromkeys(found))
        if self.conf is not None:
            return tuple(self.conf.pool(family).network for family in self.conf.families)
        return ()

    @cached_property
    def own_subnets(self) -> tuple[IPNetwork, ...]:
        """Of the pods here, by the daemon or else by subnet.env."""
        if self.document is not None:
            ipv6 = (self.document.get("ipv6") or {}).get("subnet")
            return tuple(dict.fromkeys(ip_network(it) for it in (self.document["lease"]["subnet"], ipv6) if it))
        written, _ = subnet_env.read_previous(self.options.subnet_file)
        return () if written is None else tuple(it for it in (written.ipv4, written.ipv6) if it is not None)

    @cached_property
    def paths(self) -> tuple[PodPath, ...]:
        """Where the pods' packets pass, by each family that is carried."""
        found = []
        for subnet in self.own_subnets:
            network = next((it for it in self.networks if it.version == subnet.version), None)
            device = self.device(Family(subnet.version))
            if network is not None and device:
                found.append(PodPath(network, subnet, device))
        return tuple(found)

    def device(self, family: Family) -> str:
        """The device that packets to other hosts go through; empty: there is none, or it is not known."""
        if self.document is None:
            marked = {marked_network(link): link.name for link in self.links.values()}
            return next((marked[it] for it in self.networks if it in marked), "")
        backend, ipv6 = self.document["backend"], self.document.get("ipv6")
        if backend["type"] == "alloc":
            return ""
        if family is Family.IPV6 and ipv6 is not None:
            return "" if ipv6["mtu"] is None else str(ipv6["device"] or self.underlay)
        return str(backend["device"] or self.underlay)

    def link_name(self, index: int | None) -> str:
        """The name of the link with that index; empty when there is none."""
        link = None if index is None else self.links.get(index)
        return "" if link is None else link.name

    @property
    def underlay(self) -> str:
        """The interface to the other hosts; empty when it is not known."""
        return "" if self.document is None else str(self.document["underlay"]["interface"])

    @cached_property
    def peers(self) -> tuple[Peer, ...]:
        """The other hosts' subnets of both families, by the daemon or else by the store."""
        if self.document is not None:
            ipv6 = (self.document.get("ipv6") or {}).get("peers", ())
            shown = {it["subnet"]: it for it in (*self.document["peers"], *ipv6)}
            return tuple(self._peer(it) for it in shown.values() if "liveness" in it)
        if self.store.snapshot is None:
            return ()
        ours = {address.ip for address in self.addresses}
        return tuple(
            Peer(lease.subnet, lease.attrs.host_address, lease.subnet.network_address, lease.attrs.port(8285))
            for lease in self.store.snapshot.leases
            if lease.attrs.host_address not in ours
        )

    def _peer(self, it: Document) -> Peer:
        subnet, public_ip = ip_network(it["subnet"]), ip_address(it["public_ip"])
        assert self.document is not None
        has_device = self.document["backend"]["device"] is not None
        inner = subnet.network_address if has_device else public_ip
        port = it.get("port") or self.vxlan_port
        return Peer(subnet, public_ip, inner, port, it["liveness"], it.get("path_mtu"))

    @property
    def vxlan_port(self) -> int | None:
        """The UDP port of all hosts with Backend.Type vxlan, whose leases name none; None: another type, or unknown."""
        keys = None if self.conf is None else self.conf.backend
        return keys.port if isinstance(keys, VxlanKeys) and self.backend_type == VxlanKeys.type else None


async def gather(
    request: DoctorRequest,
    document: Document | None,
    silence: str,
    ask_again: Callable[[], Document | None],
    daemon_pid: int | None,
) -> Facts:
    """Look at the kernel and ask the store, at the same time."""
    options = request.options
    (links, addresses, routes, blind), store, endpoints = await asyncio.gather(
        _read_kernel(), _read_store(options), ask_endpoints(options)
    )
    conf, problems = None, tuple(filter(None, [store.config_error]))
    if store.config is not None:
        try:
            conf = parse_net_conf(store.config, store.config_name)
        except ConfigError as exc:
            problems = exc.problems
    return Facts(
        options,
        request.cni_conf_dir,
        (request.cni_bin_dir, *_OTHER_CNI_BIN_DIRS),
        document,
        silence,
        ask_again,
        daemon_pid,
        store,
        conf,
        problems,
        {link.index: link for link in links},
        tuple(addresses),
        tuple(routes),
        blind,
        os.uname().release,
        endpoints=endpoints,
    )


async def _read_kernel() -> tuple[list[Link], list[Address], list[Route], str]:
    try:
        async with Netlink() as kernel:
            links = await kernel.links()
            addresses = [it for family in Family for it in await kernel.addresses(family=family)]
            return links, addresses, [it for family in Family for it in await kernel.routes(family=family)], ""
    except KernelError as exc:
        return [], [], [], str(exc)


def _why_not_there(path: Path) -> str:
    """Why the local store must not be opened, which would make it, or cannot be; empty where it is there."""
    try:
        path.stat()
    except FileNotFoundError:
        return f"there is no lease store {path}; a daemon with these flags makes it"
    except OSError as exc:
        return f"the lease store {path} cannot be looked at ({exc.strerror}); run as root"
    return ""


async def _read_store(options: Options) -> StoreView:
    name = str(options.store)
    if options.store.kind is StoreKind.LOCAL and (error := _why_not_there(options.store.path)):
        return StoreView(name, error=error)
    try:
        store = open_store(options)
    except UdptunError as exc:
        return StoreView(name, error=str(exc))
    config: str | None = None
    config_error = error = node_name = lack = ""
    snapshot: Snapshot | None = None
    has_answered = False
    try:
        async with asyncio.timeout(_STORE_S):
            try:
                config = await store.network_config()
            except ConfigError as exc:
                config_error = str(exc)
            has_answered = store.is_config_remote
            if options.store.kind is StoreKind.KUBE:
                from udptun.stores.kube.store import KubeStore

                assert isinstance(store, KubeStore)
                lack, node_name, has_answered = await store.find_lack(), store.node_name, True
            snapshot = await store.snapshot()
    except TimeoutError:
        # The leases of thousands of hosts may take longer than the answer to one question.
        error = "" if has_answered else f"{store.name} does not answer within {_STORE_S:.0f} s"
    except UdptunError as exc:
        error = str(exc)
    finally:
        await store.aclose()
    return StoreView(store.name, config, snapshot, store.config_name, node_name, lack, error, config_error)
