"""Our own node: its podCIDR, its annotations and its condition, written and kept.

Three things may happen to them behind our back, and each is put right at once: somebody changes or removes our
annotations, somebody else sets NetworkUnavailable (cloud controllers do), the node is deleted and comes again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from contextlib import suppress
from datetime import UTC, datetime

from udptun.config.store_flags import KubeOptions
from udptun.core.errors import ConfigError, LeaseLostError, StoreUnavailableError
from udptun.core.family import Family
from udptun.core.lease import Lease, LeaseAttrs, LeaseFormatError
from udptun.stores.base import PublicAddresses
from udptun.stores.kube.annotations import Annotations, annotations_patch, condition_patch, lack, subnets
from udptun.stores.kube.client import Client, GoneError, NotFoundError, SilentError
from udptun.stores.kube.node import Node, NodeFormatError, read_node, read_page, read_pods_node

log = logging.getLogger(__name__)

WAIT_S = 60.0
"""A claim waits so long for the node to come or to get a podCIDR before it says again that it has none."""

QUARREL_S = (1.0, 60.0)
"""First and longest pause before NetworkUnavailable is set again, when somebody else keeps setting it."""

_RUNNING = "Flannel is running on this node"
"""flannel's message of a condition that is well, and the beginning of ours."""

_CALM_S = 300.0
"""Nobody has touched the condition for so long: the next pause is the first."""


class OwnNode:
    """What the daemon has claimed and said of this host; `see` is told each time the server tells of the node."""

    def __init__(self, client: Client, annotations: Annotations, options: KubeOptions) -> None:
        self.name = options.node_name
        """Empty until it has been asked for, where only the pod's name is known."""
        self.problem = ""
        """What is wrong with the node right now."""
        self.families: Collection[Family] = tuple(Family)
        """What pods have."""
        self._client = client
        self._annotations = annotations
        self._options = options
        self._asked: LeaseAttrs | None = None
        self._is_ready = False
        self._message = _RUNNING
        """Of the condition, once we are ready."""
        self._node: Node | None = None
        self.revision = 0
        """What we know of the node is as old as this."""
        self._changed = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None
        self._said_unavailable = ""
        self._pause_s = QUARREL_S[0]
        self._set_s = float("-inf")

    # ------------------------------------------------------------------------------------------------ asked by others

    async def find_name(self) -> str:
        """The node's name, which only the pod knows where NODE_NAME is not given."""
        if not self.name:
            path = f"/api/v1/namespaces/{self._options.pod_namespace}/pods/{self._options.pod_name}"
            operation = f"learn on which node the pod {self._options.pod_namespace}/{self._options.pod_name} runs"
            try:
                self.name = read_pods_node(await self._client.ask("GET", path, operation))
            except (NotFoundError, GoneError, NodeFormatError) as exc:
                raise StoreUnavailableError(
                    f"cannot {operation}: {exc}; give NODE_NAME, or the right POD_NAME and POD_NAMESPACE"
                ) from exc
            if not self.name:
                raise StoreUnavailableError(f"cannot {operation}: it has no node yet")
        return self.name

    async def public_addresses(self) -> PublicAddresses:
        """What the annotations node-public-ip and node-public-ipv6 say.  Raises ConfigError when that is no address."""
        node = await self._read()
        try:
            return PublicAddresses() if node is None else self._annotations.node_public_addresses(node)
        except LeaseFormatError as exc:
            raise ConfigError(f"node {self.name}: {exc}") from exc

    async def find_lack(self) -> str:
        """Why the node has no lease to give; empty when it has."""
        return self._lacks(await self._read())

    async def claim(self, attrs: LeaseAttrs) -> Lease:
        """Write `attrs` into the annotations; the lease that the server then has.

        StoreUnavailableError while there is no such node, or it has no podCIDR.  The first time that is said at once;
        from then on the call waits for a change of the node.
        """
        if self._asked is None and self.problem:
            await self._wait_for_change()
        node = await self._read()
        problem = self._lacks(node)
        if problem:
            self.problem = problem
            await self._say_unavailable(node, problem)
            raise StoreUnavailableError(problem)
        assert node is not None
        return await self._write(node, attrs)

    async def renew(self, lease: Lease, attrs: LeaseAttrs) -> Lease:
        """The same for a lease that we have.  LeaseLostError when the node is gone or has another podCIDR."""
        node = await self._read()
        if node is None:
            raise LeaseLostError(f"cannot renew {lease.subnet}: there is no node {self.name}")
        if (problem := self._lacks(node)) or subnets(node) != lease.subnets:
            raise LeaseLostError(
                f"cannot renew {lease.subnet}: {problem or f'node {self.name} has another podCIDR now'}"
            )
        return await self._write(node, attrs)

    def set_ready(self, lacks: Sequence[str]) -> None:
        """Pods can talk: say so, and keep saying so.  `lacks`: by which families they cannot."""
        self._is_ready, self._message = True, "; ".join((_RUNNING, *lacks))
        self._changed.set()

    def see(self, node: Node | None, revision: int) -> None:
        """The server tells what the node is now; None: gone."""
        # The answer to a patch may come after what the watch tells of a later change.
        if revision >= self.revision:
            self.see_anew(node, revision)

    def see_anew(self, node: Node | None, revision: int) -> None:
        """The same where nothing before counts: a list that began anew."""
        self._node, self.revision = node, revision
        if self._asked is not None:
            self._changed.set()

    async def aclose(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
            self._keeping = None

    # ------------------------------------------------------------------------------------------------------- reading

    def _lacks(self, node: Node | None) -> str:
        """Why the node has no lease to give; empty when it has."""
        if node is None:
            return (
                f"there is no node {self.name} in Kubernetes: kubelet registers it, or NODE_NAME names another one; "
                "`kubectl get nodes` lists them"
            )
        if why := lack(node, self.families):
            return (
                f"node {node.name}: {why}; the controller manager gives each node one when it runs with "
                "--allocate-node-cidrs=true and --cluster-cidr (kubeadm: --pod-network-cidr=<Network>), or give one "
                # Without a quotation mark that the log would put a backslash before.
                f'by hand: kubectl patch node {node.name} -p "spec: {{podCIDR: <subnet>}}"'
            )
        return ""

    async def _read(self) -> Node | None:
        """The node as the server has it.  A list of one, because flannel's older roles have no right to `get`."""
        name = await self.find_name()
        params = {"fieldSelector": f"metadata.name={name}"}
        operation = f"read the node {name}"
        try:
            text = await self._client.ask("GET", "/api/v1/nodes", operation, params=params)
            page = read_page(text, self._annotations.prefix)
        except (NotFoundError, GoneError, NodeFormatError) as exc:
            raise StoreUnavailableError(f"cannot {operation}: {exc}") from exc
        if page.skipped:
            raise StoreUnavailableError(f"cannot {operation}: {page.skipped[0]}")
        node = next(iter(page.nodes), None)
        self.see(node, page.revision)
        return node

    async def _wait_for_change(self) -> None:
        """Until the server tells anything new of the node, WAIT_S at most."""
        params = {"fieldSelector": f"metadata.name={self.name}", "resourceVersion": str(self.revision)}
        with suppress(TimeoutError, SilentError, GoneError, NotFoundError):
            async with (
                asyncio.timeout(WAIT_S),
                self._client.watch(params, self._annotations.prefix) as batches,
            ):
                async for events in batches:
                    if any(event.kind != "BOOKMARK" for event in events):
                        return

    # ------------------------------------------------------------------------------------------------------- writing

    async def _write(self, node: Node, attrs: LeaseAttrs) -> Lease:
        missing = self._annotations.missing(node, attrs)
        if missing:
            node = await self._patch(annotations_patch(missing), f"annotate the node {node.name}")
        self._asked, self.problem = attrs, ""
        if self._keeping is None:
            self._keeping = asyncio.create_task(self._keep(), name="keep our node")
        try:
            # What the server has counts: public-ip-overwrite is a person's.
            return self._annotations.lease(node)
        except LeaseFormatError as exc:
            raise ConfigError(f"node {node.name}: {exc}") from exc

    async def _patch(self, body: bytes, operation: str) -> Node:
        path = f"/api/v1/nodes/{self.name}/status"
        try:
            text = await self._client.ask("PATCH", path, operation, body=body)
            node = read_node(text, self._annotations.prefix)
        except (NotFoundError, GoneError, NodeFormatError) as exc:
            raise StoreUnavailableError(f"cannot {operation}: {exc}") from exc
        self.see(node, node.revision)
        return node

    async def _say_unavailable(self, node: Node | None, problem: str) -> None:
        """Tell who asks Kubernetes why there are no pods here, once for each reason; as well as it goes."""
        if node is None or not self._options.set_node_network_unavailable or problem == self._said_unavailable:
            return
        with suppress(StoreUnavailableError):
            body = condition_patch("True", "NoPodCIDR", problem, _now())
            await self._patch(body, f"set NetworkUnavailable of the node {self.name}")
            self._said_unavailable = problem

    async def _keep(self) -> None:
        """Put right what others change, until cancelled."""
        retry_s: float | None = None
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(retry_s):
                    await self._changed.wait()
            self._changed.clear()
            try:
                wait_s = await self._put_right()
                retry_s = wait_s or None
                self.problem = "" if self._node is not None else self._lacks(None)
            except StoreUnavailableError as exc:
                retry_s = min(2 * retry_s, QUARREL_S[1]) if retry_s else QUARREL_S[0]
                if self.problem != str(exc):
                    self.problem = str(exc)
                    log.warning("our node is not as it should be, trying again error=%r", self.problem)

    async def _put_right(self) -> float:
        """Write what differs; in how many seconds to look again, 0 for only after news."""
        node, attrs = self._node, self._asked
        if node is None or attrs is None:
            return 0.0
        missing = self._annotations.missing(node, attrs)
        if missing and not self._lacks(node):
            log.warning("annotations of our node were changed, writing them again keys=%s", ",".join(sorted(missing)))
            node = await self._patch(annotations_patch(missing), f"annotate the node {node.name}")
        if not self._is_ready or not self._options.set_node_network_unavailable:
            return 0.0
        if node.network_unavailable == "False":
            # Somebody else's words stay: the condition is as we want it.
            if node.network_message.startswith(_RUNNING) and node.network_message != self._message:
                await self._set_available()
            return 0.0
        now_s = asyncio.get_running_loop().time()
        if now_s - self._set_s > _CALM_S:
            self._pause_s = QUARREL_S[0]
        elif (wait_s := self._set_s + self._pause_s - now_s) > 0:
            return wait_s
        else:
            self._pause_s = min(2 * self._pause_s, QUARREL_S[1])
        if self._set_s > float("-inf"):
            log.warning(
                "NetworkUnavailable of our node was set to %s by another, setting it to False again",
                node.network_unavailable or "nothing",
            )
        await self._set_available()
        self._set_s = now_s
        return 0.0

    async def _set_available(self) -> None:
        body = condition_patch("False", "FlannelIsUp", self._message, _now())
        await self._patch(body, f"set NetworkUnavailable of the node {self.name}")


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
