"""Nodes as the API server sends them, reduced to the five fields that matter here.  Pure: bytes in, values out.

A node has ten kilobytes of images, conditions and managedFields.  msgspec skips over what it is not asked for without
making an object of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

Text = bytes | memoryview | msgspec.Raw
"""JSON in UTF-8."""


class NodeFormatError(ValueError):
    """What the server has sent is not what Kubernetes says that it sends."""


class _Metadata(msgspec.Struct):
    name: str = ""
    resource_version: str = msgspec.field(default="", name="resourceVersion")
    annotations: dict[str, str] | None = None
    next_page: str = msgspec.field(default="", name="continue")


class _Spec(msgspec.Struct):
    pod_cidr: str = msgspec.field(default="", name="podCIDR")
    pod_cidrs: list[str] | None = msgspec.field(default=None, name="podCIDRs")
    node_name: str = msgspec.field(default="", name="nodeName")


class _Condition(msgspec.Struct):
    type: str
    status: str = ""
    message: str = ""


class _Status(msgspec.Struct):
    conditions: list[_Condition] | None = None


class _Object(msgspec.Struct):
    metadata: _Metadata = msgspec.field(default_factory=_Metadata)
    spec: _Spec = msgspec.field(default_factory=_Spec)
    status: _Status = msgspec.field(default_factory=_Status)


class _List(msgspec.Struct):
    metadata: _Metadata = msgspec.field(default_factory=_Metadata)
    items: list[msgspec.Raw] | None = None


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw = msgspec.field(default_factory=lambda: msgspec.Raw(b"{}"))


class _Failure(msgspec.Struct):
    code: int = 0
    reason: str = ""
    message: str = ""


_REVISION_DIGITS = 20
"""Of 2^64; int() refuses a number that is much longer."""

_OBJECT = msgspec.json.Decoder(_Object)
_LIST = msgspec.json.Decoder(_List)
_EVENT = msgspec.json.Decoder(_Event)
_FAILURE = msgspec.json.Decoder(_Failure)

_CHANGES = ("ADDED", "MODIFIED", "DELETED")

NETWORK_UNAVAILABLE = "NetworkUnavailable"
"""The condition that keeps pods away from a node (core/v1 NodeNetworkUnavailable)."""


@dataclass(frozen=True, slots=True)
class Node:
    """`annotations` are those with our prefix.  `network_unavailable` is the condition's status, empty without one, and
    `network_message` its message.
    """

    name: str
    revision: int
    annotations: Mapping[str, str]
    pod_cidrs: tuple[str, ...]
    network_unavailable: str
    network_message: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list.  `next` leads to the next part, empty at the end.  `skipped`: a line for each bad item."""

    revision: int
    nodes: tuple[Node, ...]
    next: str
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeEvent:
    """`kind` is ADDED, MODIFIED, DELETED, BOOKMARK or ERROR.  `node` is None for the last two.

    `code` and `message` are those of an ERROR.
    """

    kind: str
    revision: int
    node: Node | None = None
    code: int = 0
    message: str = ""


def read_node(text: Text, prefix: str) -> Node:
    """The node that `text` is; of its annotations those that begin with `prefix`.  Raises NodeFormatError."""
    value = _decoded(_OBJECT, text)
    metadata, spec = value.metadata, value.spec
    condition = next((it for it in value.status.conditions or () if it.type == NETWORK_UNAVAILABLE), _Condition(""))
    cidrs = tuple(spec.pod_cidrs or ()) or ((spec.pod_cidr,) if spec.pod_cidr else ())
    return Node(
        metadata.name,
        _revision(metadata.resource_version),
        {key: text for key, text in (metadata.annotations or {}).items() if key.startswith(prefix)},
        cidrs,
        condition.status,
        condition.message,
    )


def read_page(text: Text, prefix: str) -> Page:
    """The answer to a list.  One bad node costs no other its place.  Raises NodeFormatError for what is no list."""
    value = _decoded(_LIST, text)
    nodes, skipped = [], []
    for item in value.items or ():
        try:
            nodes.append(read_node(item, prefix))
        except NodeFormatError as exc:
            skipped.append(f"a node cannot be read: {exc}")
    return Page(_revision(value.metadata.resource_version), tuple(nodes), value.metadata.next_page, tuple(skipped))


def read_event(line: bytes, prefix: str) -> NodeEvent:
    """One line of a watch.  Raises NodeFormatError."""
    event = _decoded(_EVENT, line)
    if event.type == "ERROR":
        failure = _decoded(_FAILURE, event.object)
        return NodeEvent(event.type, 0, code=failure.code, message=failure.message or failure.reason)
    if event.type == "BOOKMARK":
        return NodeEvent(event.type, _revision(_decoded(_OBJECT, event.object).metadata.resource_version))
    if event.type not in _CHANGES:
        raise NodeFormatError(f"an event of type {event.type[:40]!r}")
    node = read_node(event.object, prefix)
    return NodeEvent(event.type, node.revision, node)


def read_failure(text: Text) -> tuple[str, str]:
    """Reason and message of the Status object that refuses a request; empty when it is none.  Never raises."""
    try:
        failure = _decoded(_FAILURE, text)
    except NodeFormatError:
        return "", ""
    return failure.reason, failure.message


def read_pods_node(text: Text) -> str:
    """The name of the node that a pod runs on; empty while it has none.  Raises NodeFormatError."""
    return str(_decoded(_OBJECT, text).spec.node_name)


def lines_of(buffer: bytearray) -> Iterator[bytes]:
    """The whole lines at the beginning of `buffer`, taken out of it."""
    *lines, rest = bytes(buffer).split(b"\n")
    buffer[:] = rest
    return filter(None, lines)


def _decoded(decoder: msgspec.json.Decoder[Any], text: Text) -> Any:
    try:
        return decoder.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise NodeFormatError(str(exc)) from exc


def _revision(text: str) -> int:
    """A resourceVersion as a number: etcd's revision in every Kubernetes, and comparable by its own word since 1.35."""
    if not (text.isascii() and text.isdecimal() and len(text) <= _REVISION_DIGITS):
        raise NodeFormatError(f"its resourceVersion is {text[:40]!r}, not a number")
    return int(text)
