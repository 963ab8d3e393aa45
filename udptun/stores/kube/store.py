"""The `kube` store: each node of Kubernetes is a host, its podCIDR the subnet, and its annotations the lease.

The annotations, the requests and the condition are flannel's (pkg/subnet/kube), so that its nodes and ours read each
other.  Nobody allocates anything here: the control plane has given each node its podCIDR.  A lease never expires, and
ends with its node or with the annotation `kube-subnet-manager`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from pathlib import Path

from udptun.config.store_flags import KubeOptions
from udptun.core.errors import LeaseError
from udptun.core.family import Family
from udptun.core.lease import Lease, LeaseAttrs, Subnets
from udptun.stores.base import LEASE_TTL_S, Chooser, PublicAddresses, Snapshot, WatchBatch, read_network_config
from udptun.stores.kube.annotations import Annotations
from udptun.stores.kube.client import Client
from udptun.stores.kube.own_node import OwnNode
from udptun.stores.kube.watch import Nodes


class KubeStore:
    """See the module's text and `udptun.stores.base.Store`.  Connects with the first call."""

    def __init__(self, options: KubeOptions, net_conf_path: Path) -> None:
        self.name = "kube"
        self.config_name = str(net_conf_path)
        self.is_remote = True
        self.is_config_remote = False
        self.keeps_backend_data = self.keeps_ipv6_alone = True
        self._net_conf_path = net_conf_path
        self._annotations = Annotations(options.kube_annotation_prefix)
        self._client = Client(options)
        self._own = OwnNode(self._client, self._annotations, options)
        self._nodes = Nodes(self._client, self._annotations, self._own)

    @property
    def node_name(self) -> str:
        return self._own.name

    @property
    def problems(self) -> tuple[str, ...]:
        return (*filter(None, [self._own.problem]), *self._nodes.problems)

    async def network_config(self) -> str:
        return read_network_config(self._net_conf_path)

    async def public_addresses(self) -> PublicAddresses:
        return await self._own.public_addresses()

    def want_families(self, families: Collection[Family]) -> None:
        self._own.families = families

    async def find_lack(self) -> str:
        """Why our node has no lease to give; empty when it has.  For `udptun doctor`; nothing is written."""
        return await self._own.find_lack()

    async def snapshot(self, *, exact: bool = False) -> Snapshot:
        return await self._nodes.snapshot()

    async def watch(self, after: int) -> AsyncGenerator[WatchBatch, None]:
        async with aclosing(self._nodes.follow(after)) as batches:
            async for batch in batches:
                yield batch

    async def claim(self, attrs: LeaseAttrs, choose: Chooser, ttl_s: int = LEASE_TTL_S) -> Lease:
        """The control plane has chosen; `choose` is not asked."""
        return await self._own.claim(attrs)

    async def renew(self, lease: Lease, ttl_s: int = LEASE_TTL_S) -> Lease:
        return await self._own.renew(lease, lease.attrs)

    async def release(self, lease: Lease) -> None:
        """The podCIDR is the node's for good, and flannel leaves its annotations, too."""

    async def note_ready(self, lacks: Sequence[str]) -> None:
        self._own.set_ready(lacks)

    async def reserve(self, subnets: Subnets, attrs: LeaseAttrs) -> Lease:
        raise LeaseError(
            f"cannot reserve {subnets.first}: in Kubernetes the controller manager gives each node its podCIDR"
        )

    async def delete(self, lease: Lease) -> None:
        raise LeaseError(
            f"cannot release {lease.subnet}: it is the podCIDR of the node {lease.node_name}; peers forget the node "
            f"when its annotation goes: kubectl annotate node {lease.node_name} {self._annotations.subnet_manager}-"
        )

    async def aclose(self) -> None:
        await self._own.aclose()
        await self._client.aclose()
