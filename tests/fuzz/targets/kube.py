"""What the API server says of nodes: a list in the first line of an input, events of a watch in the others.

Whoever follows has what the table has, and one bad node costs no other its place.
"""

from __future__ import annotations

import json
from contextlib import suppress

from tests.fuzz.mutate import json_mutator, lines_mutator
from tests.fuzz.oracles import check_line, check_lines
from udptun.core.family import Family
from udptun.core.lease import EventType, Lease, LeaseAttrs, LeaseFormatError, Subnets
from udptun.membership import saved
from udptun.stores.kube.annotations import Annotations, annotations_patch, condition_patch, lack, subnets
from udptun.stores.kube.node import (
    Node,
    NodeEvent,
    NodeFormatError,
    lines_of,
    read_event,
    read_failure,
    read_node,
    read_page,
    read_pods_node,
)
from udptun.stores.kube.table import Difference, NodeTable

PREFIX = "flannel.alpha.coreos.com/"
ANNOTATIONS = Annotations(PREFIX)
_ATTRS = LeaseAttrs.from_json('{"PublicIP":"192.0.2.7","PublicIPv6":"fd00::7","BackendType":"udp"}')


def _node(name: str, cidr: str, revision: int, **annotations: str) -> dict[str, object]:
    texts = {"kube-subnet-manager": "true", "backend-type": "vxlan", "public-ip": "192.0.2.1"}
    texts |= {key.replace("_", "-"): text for key, text in annotations.items()}
    return {
        "metadata": {
            "name": name,
            "resourceVersion": str(revision),
            "annotations": {f"{PREFIX}{key}": text for key, text in texts.items()},
            "managedFields": [{"manager": "kubelet"}],
        },
        "spec": {"podCIDR": cidr, "podCIDRs": [cidr]},
        "status": {"conditions": [{"type": "NetworkUnavailable", "status": "False"}], "images": [{"names": ["x"]}]},
    }


_NODES = (
    _node("a", "10.244.1.0/24", 5, backend_data='{"VNI":1,"VtepMAC":"3e:a4:b3:b6:22:6a"}'),
    _node("b", "10.244.2.0/24", 6, backend_data="null", public_ip="192.0.2.2", public_ipv6="fd00::2"),
    _node("c", "10.244.2.0/24", 7, public_ip_overwrite="192.0.2.9", node_public_ip="192.0.2.8"),
)
_EVENTS = (
    {"type": "MODIFIED", "object": _NODES[1]},
    {"type": "DELETED", "object": _NODES[0]},
    {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "9"}}},
    {"type": "ERROR", "object": {"code": 410, "reason": "Expired", "message": "too old resource version"}},
)
_LIST = {"metadata": {"resourceVersion": "8", "continue": "abc"}, "items": list(_NODES)}
FOUND = {
    "an object is nested too deep": b'{"type": %s%s}' % (b"[" * 1500, b"]" * 1500),
    "a revision has thousands of digits": b'{"metadata": {"resourceVersion": "%s"}}' % (b"9" * 4400),
    "the name of a node begins a line of the log": json.dumps(
        {"metadata": {"resourceVersion": "8"}, "items": [_node(name, "10.244.1.0/24", 5) for name in ("a\nb", "c")]}
    ).encode(),
    "a podCIDR turns a line of the log around": json.dumps(
        {"metadata": {"resourceVersion": "5"}, "spec": {"podCIDRs": ["255.255.255.255", "\u202e"]}}
    ).encode(),
}
SEEDS = (
    json.dumps(_LIST).encode(),
    *(json.dumps(event).encode() for event in _EVENTS),
    b"\n".join(json.dumps(it).encode() for it in (_LIST, *_EVENTS)),
    b'{"metadata": {"resourceVersion": "1"}, "items": null}\n\n{"type": "ADDED", "object": {}}',
    b'{"kind": "Status", "code": 403, "reason": "Forbidden", "message": "nodes is forbidden"}',
)

mutate = lines_mutator(
    json_mutator(
        (
            *("metadata", "name", "resourceVersion", "annotations", "continue", "spec", "podCIDR", "podCIDRs"),
            *("nodeName", "status", "conditions", "type", "object", "items", "code", "reason", "message"),
            *(f"{PREFIX}public-ip", f"{PREFIX}backend-data", f"{PREFIX}public-ipv6", f"{PREFIX}kube-subnet-manager"),
        ),
        (
            *("10.244.3.0/24", "fd00:1::/64", "fe80::%1/64", "10.244.3.7/24", "192.0.2.3", "true", '{"VNI":1}'),
            *("9" * 30, _NODES[0], "a", "b", "ADDED", "MODIFIED", "DELETED", "BOOKMARK", "ERROR", "12"),
        ),
    )
)


def check(data: bytes) -> None:
    first, _, rest = data.partition(b"\n")
    for line in (first, memoryview(first)):
        with suppress(NodeFormatError):
            read_pods_node(line)
        read_failure(line)
        with suppress(NodeFormatError):
            _check_node(read_node(line, PREFIX))
    table = NodeTable(ANNOTATIONS, "b", tuple(Family))
    follower = _Follower()
    try:
        page = read_page(first, PREFIX)
    except NodeFormatError:
        pass
    else:
        for node in page.nodes:
            _check_node(node)
        table.apply(page.nodes)
        follower.reset(table)
    buffer, events = bytearray(), list[NodeEvent]()
    for at in range(0, len(rest), 100):
        buffer += rest[at : at + 100]
        for line in lines_of(buffer):
            try:
                events.append(read_event(line, PREFIX))
            except NodeFormatError:
                continue
    for event in events:
        if event.node is not None:
            _check_node(event.node)
            gone = event.kind == "DELETED"
            follower.take(table.apply([] if gone else [event.node], [event.node.name] if gone else []))
            follower.check(table)
    check_lines(table.shared_addresses)
    present = [event.node for event in events if event.node is not None]
    follower.take(table.apply(present[:1], [node.name for node in present[1:]]))
    follower.check(table)


def _check_node(node: Node) -> None:
    assert node.revision >= 0
    assert all(key.startswith(PREFIX) for key in node.annotations)
    missing = ANNOTATIONS.missing(node, _ATTRS)
    assert json.loads(annotations_patch(missing))["metadata"]["annotations"] == missing
    assert json.loads(condition_patch("True", "NoPodCIDR", node.name, "now"))
    for families in ((Family.IPV4,), (Family.IPV6,), tuple(Family)):
        check_lines([line] if (line := lack(node, families)) else [])
    for read in (subnets, ANNOTATIONS.lease, ANNOTATIONS.node_public_addresses):
        try:
            found = read(node)  # type: ignore[operator]  # each takes a node
        except LeaseFormatError as exc:
            check_line(str(exc))
            continue
        if isinstance(found, Lease):
            assert found.node_name == node.name
            assert Subnets.from_key(found.key) == found.subnets
            assert saved._from_json(saved._to_json(found)).attrs == found.attrs


class _Follower:
    """What whoever is told of differences has: leases by key, and lines about those that cannot be read."""

    def __init__(self) -> None:
        self._leases: dict[str, Lease] = {}
        self._skipped: set[str] = set()

    def reset(self, table: NodeTable) -> None:
        self._leases = {lease.key: lease for lease in table.leases}
        self._skipped = set(table.skipped)
        self.check(table)

    def take(self, difference: Difference) -> None:
        assert not set(difference.skipped) & set(difference.mended)
        for event in difference.events:
            if event.type is EventType.REMOVED:
                del self._leases[event.lease.key]
            else:
                self._leases[event.lease.key] = event.lease
        self._skipped = self._skipped - set(difference.mended) | set(difference.skipped)

    def check(self, table: NodeTable) -> None:
        leases = {lease.key: lease for lease in table.leases}
        assert leases.keys() == self._leases.keys()
        assert all(leases[key].attrs == lease.attrs for key, lease in self._leases.items())
        assert set(table.skipped) == self._skipped
        check_lines(table.skipped)
