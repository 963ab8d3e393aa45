"""What a node's annotations say as a lease, and the patches that write them, as flannel's (pkg/subnet/kube).  Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TypeVar

from udptun.core.errors import one_line
from udptun.core.family import Family
from udptun.core.ip_text import ip_address, ipv6_address, ipv6_network
from udptun.core.lease import NO_ADDRESS, Json, Lease, LeaseAttrs, LeaseFormatError, Subnets, load_json
from udptun.stores.base import PublicAddresses
from udptun.stores.kube.node import NETWORK_UNAVAILABLE, Node

T = TypeVar("T")

_NO_IPV6_ADDRESS = IPv6Address(0)
"""What public-ipv6 says of a node that had an address before."""


class Annotations:
    """The names of flannel's annotations under one prefix, which ends in `/` or `-`."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.subnet_manager = f"{prefix}kube-subnet-manager"
        self.backend_type = f"{prefix}backend-type"
        self.backend_data = f"{prefix}backend-data"
        self.backend_v6_data = f"{prefix}backend-v6-data"
        self.public_ip = f"{prefix}public-ip"
        self.public_ipv6 = f"{prefix}public-ipv6"
        self.public_ip_overwrite = f"{prefix}public-ip-overwrite"
        self.public_ipv6_overwrite = f"{prefix}public-ipv6-overwrite"
        self.node_public_ip = f"{prefix}node-public-ip"
        self.node_public_ipv6 = f"{prefix}node-public-ipv6"

    # ---------------------------------------------------------------------------------------------------- reading

    def is_host(self, node: Node) -> bool:
        """Whether a daemon, flannel's or ours, has said that it runs there."""
        return node.annotations.get(self.subnet_manager) == "true"

    def lease(self, node: Node) -> Lease:
        """The lease of a node that `is_host`.  It never expires.  Raises LeaseFormatError."""
        texts = node.annotations
        data, v6_data = self._json(node, self.backend_data), self._json(node, self.backend_v6_data)
        public_ip = self._address(node, self.public_ip, IPv4Address)
        public_ipv6 = self._address(node, self.public_ipv6, ipv6_address)
        if public_ip is not None and public_ipv6 == _NO_IPV6_ADDRESS:
            public_ipv6 = None
        if public_ip is None and public_ipv6 is None:
            raise LeaseFormatError(f"it has no annotation {self.public_ip} or {self.public_ipv6}")
        attrs = LeaseAttrs(public_ip, public_ipv6, texts.get(self.backend_type, ""), data, v6_data)
        return Lease(subnets(node), attrs, None, node.revision, node.name)

    def node_public_addresses(self, node: Node) -> PublicAddresses:
        """What a person has annotated as this node's, which acts as --public-ip and --public-ipv6.

        Raises LeaseFormatError.
        """
        return PublicAddresses(
            self._address(node, self.node_public_ip, IPv4Address),
            self._address(node, self.node_public_ipv6, ipv6_address),
        )

    def _address(self, node: Node, key: str, kind: Callable[[str], T]) -> T | None:
        text = node.annotations.get(key, "")
        try:
            return kind(text) if text else None
        except ValueError as exc:
            raise LeaseFormatError(f"its annotation {key}: {exc}") from exc

    def _json(self, node: Node, key: str) -> Json:
        text = node.annotations.get(key, "null")
        try:
            return load_json(text or "null")
        except ValueError as exc:
            raise LeaseFormatError(f"its annotation {key} is not JSON: {exc}") from exc

    # ---------------------------------------------------------------------------------------------------- writing

    def missing(self, node: Node, attrs: LeaseAttrs) -> dict[str, str]:
        """Which annotations the node has not, or otherwise, when its daemon says `attrs` of itself.

        public-ip-overwrite and public-ipv6-overwrite are a person's: the peers get these addresses, and the daemon goes
        on with its own.  One that is no address is ignored.  Without a PublicIP, flannel writes 0.0.0.0 or nothing.
        """
        texts = node.annotations
        wanted = {
            self.backend_data: _text(attrs.backend_data),
            self.backend_type: attrs.backend_type,
            self.subnet_manager: "true",
        }
        if attrs.public_ip is not None:
            wanted[self.public_ip] = _address_or(texts.get(self.public_ip_overwrite, ""), attrs.public_ip)
        elif self.public_ip in texts:
            # Of a run before, in which pods had IPv4 too.
            wanted[self.public_ip] = str(NO_ADDRESS)
        if attrs.public_ipv6 is not None:
            wanted[self.backend_v6_data] = _text(attrs.backend_v6_data)
            wanted[self.public_ipv6] = _address_or(texts.get(self.public_ipv6_overwrite, ""), attrs.public_ipv6)
        elif self.public_ipv6 in texts:
            # The same of IPv6.  To flannel, a node without an address there would be none of IPv4 either.
            wanted[self.backend_v6_data] = _text(attrs.backend_v6_data)
            wanted[self.public_ipv6] = str(_NO_IPV6_ADDRESS)
        return {key: text for key, text in sorted(wanted.items()) if texts.get(key) != text}


def subnets(node: Node) -> Subnets:
    """What the control plane has given the node, in whatever order.  Raises LeaseFormatError."""
    if not node.pod_cidrs:
        raise LeaseFormatError("it has no podCIDR")
    if len(node.pod_cidrs) > 2:
        raise LeaseFormatError(
            f"it has {len(node.pod_cidrs)} podCIDRs, and one of each family is the most there can be"
        )
    ipv4: IPv4Network | None = None
    ipv6: IPv6Network | None = None
    for text in node.pod_cidrs:
        try:
            if ":" in text:
                ipv6 = ipv6 or ipv6_network(text, strict=False)
            else:
                ipv4 = ipv4 or IPv4Network(text, strict=False)
        except ValueError as exc:
            raise LeaseFormatError(f"its podCIDR: {exc}") from exc
    return Subnets(ipv4, ipv6)


def lack(node: Node, families: Collection[Family]) -> str:
    """Why the node has no subnet for pods that have `families`; empty when it has one of any of them."""
    try:
        found = subnets(node)
    except LeaseFormatError as exc:
        return str(exc)
    if any(found.of(family) is not None for family in families):
        return ""
    wanted = " and no ".join(f"{family} podCIDR" for family in families)
    return one_line(f"it has no {wanted}, only {', '.join(node.pod_cidrs)}")


def _address_or(text: str, own: IPv4Address | IPv6Address) -> str:
    """`text`, if it is an address of the same family as `own`, else that."""
    try:
        return text if ip_address(text).version == own.version else str(own)
    except ValueError:
        return str(own)


def annotations_patch(annotations: Mapping[str, str]) -> bytes:
    """The body of the strategic-merge patch that writes them, in flannel's bytes."""
    return _text({"metadata": {"annotations": dict(annotations)}}).encode()


def condition_patch(status: str, reason: str, message: str, now: str) -> bytes:
    """The body of the strategic-merge patch that sets NetworkUnavailable, in flannel's bytes; `now` in RFC 3339."""
    condition = {
        "type": NETWORK_UNAVAILABLE,
        "status": status,
        "lastHeartbeatTime": now,
        "lastTransitionTime": now,
        "reason": reason,
        "message": message,
    }
    return _text({"status": {"conditions": [condition]}}).encode()


def _text(value: Json) -> str:
    return json.dumps(value, separators=(",", ":"))
