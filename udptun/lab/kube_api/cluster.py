"""The objects of a cluster, their resourceVersions and their history.  No I/O; for one thread at a time."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

from udptun.lab.kube_api import patch as patches

Json = Any
"""A value as `json.loads` returns it."""


class ApiError(Exception):
    """What the server refuses, as the Status object that it answers with."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.body = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            "code": status,
        }


def too_old(revision: int, oldest: int) -> ApiError:
    return ApiError(HTTPStatus.GONE, "Expired", f"too old resource version: {revision} ({oldest})")


def not_found(resource: str, name: str) -> ApiError:
    return ApiError(HTTPStatus.NOT_FOUND, "NotFound", f'{resource} "{name}" not found')


@dataclass(frozen=True, slots=True)
class Stored:
    """An object at one resourceVersion, and its JSON."""

    revision: int
    value: Mapping[str, Json]
    text: bytes


@dataclass(frozen=True, slots=True)
class Change:
    """One event of the history: ADDED, MODIFIED or DELETED."""

    revision: int
    kind: str
    stored: Stored


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list; `token` leads to the next part, empty at the end."""

    revision: int
    items: tuple[Stored, ...]
    token: str = ""
    n_left: int = 0


class Objects:
    """All objects of one resource, by name (a pod's is `namespace/name`).

    They share `revision` with the other resources of the cluster, which counts every write.
    """

    def __init__(self, resource: str, kind: str, next_revision: Callable[[], int], revision: Callable[[], int]) -> None:
        self.resource = resource
        self.kind = kind
        self._next_revision = next_revision
        self._revision = revision
        self._there: dict[str, Stored] = {}
        self._history: list[Change] = []
        self._compacted = 0
        """The history begins after this revision."""
        self._listed: dict[int, tuple[Stored, ...]] = {}
        """Lists of which a client has read a part, by their revision."""

    # ------------------------------------------------------------------------------------------------------ reading

    def get(self, name: str) -> Stored:
        if name not in self._there:
            raise not_found(self.resource, name.rpartition("/")[2])
        return self._there[name]

    def names(self) -> list[str]:
        return sorted(self._there)

    def page(self, limit: int, token: str) -> Page:
        """The first `limit` objects (0: all), or those behind `token`; all pages are of one revision."""
        first, revision = 0, self._revision()
        if token:
            told = json.loads(base64.b64decode(token))
            first, revision = told["first"], told["rv"]
            if revision not in self._listed:
                raise ApiError(
                    HTTPStatus.GONE,
                    "Expired",
                    "The provided continue parameter is too old to display a consistent list result. You can start a "
                    "new list without the continue parameter.",
                )
        items = self._listed.get(revision) or tuple(self._there[name] for name in sorted(self._there))
        last = first + limit if limit else len(items)
        if last >= len(items):
            return Page(revision, items[first:])
        self._listed[revision] = items
        token = base64.b64encode(json.dumps({"rv": revision, "first": last}).encode()).decode()
        return Page(revision, items[first:last], token, len(items) - last)

    def since(self, revision: int) -> list[Change]:
        """What has changed after `revision`.  Raises ApiError (410) where the history does not reach back."""
        if revision < self._compacted:
            raise too_old(revision, self._compacted)
        return [change for change in self._tail(revision) if change.revision > revision]

    def _tail(self, revision: int) -> Iterator[Change]:
        """At least the changes after `revision`, oldest first."""
        first = len(self._history)
        while first and self._history[first - 1].revision > revision:
            first -= 1
        yield from self._history[first:]

    # ------------------------------------------------------------------------------------------------------ writing

    def create(self, value: Mapping[str, Json], name: str = "") -> Stored:
        name = name or value["metadata"]["name"]
        if name in self._there:
            raise ApiError(HTTPStatus.CONFLICT, "AlreadyExists", f'{self.resource} "{name}" already exists')
        given = {"uid": str(uuid.uuid4()), "creationTimestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
        return self._write("ADDED", name, {**value, "metadata": {**given, **value["metadata"]}})

    def delete(self, name: str) -> Stored:
        gone = self.get(name)
        del self._there[name]
        return self._note("DELETED", gone.value)

    def patch(self, name: str, kind: str, patch: Mapping[str, Json], *, is_status: bool) -> Stored:
        """As a client patches it: metadata and, with `is_status`, the status, else the rest."""
        old = self.get(name).value
        if (
            patch.get("metadata", {}).get("resourceVersion", old["metadata"]["resourceVersion"])
            != (old["metadata"]["resourceVersion"])
        ):
            raise ApiError(
                HTTPStatus.CONFLICT,
                "Conflict",
                f'Operation cannot be fulfilled on {self.resource} "{name}": the object has been modified; please '
                "apply your changes to the latest version and try again",
            )
        asked = patches.apply(kind, old, patch)
        kept = "spec" if is_status else "status"
        new = {**asked, kept: old.get(kept, {})}
        if new.get("spec", {}).get("podCIDR") != (was := old.get("spec", {}).get("podCIDR")) and was:
            raise ApiError(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                "Invalid",
                f'Node "{name}" is invalid: spec: Forbidden: node updates may only change labels, taints, or capacity',
            )
        return self.put(name, new)

    def put(self, name: str, value: Mapping[str, Json]) -> Stored:
        """Replace the object; nothing is written when it is the same."""
        old = self.get(name)
        if value == old.value:
            return old
        return self._write("MODIFIED", name, value)

    def compact(self) -> None:
        """Forget what happened until now, as etcd does after some minutes."""
        self._history.clear()
        self._listed.clear()
        self._compacted = self._revision()

    def _write(self, kind: str, name: str, value: Mapping[str, Json]) -> Stored:
        stored = self._note(kind, value)
        self._there[name] = stored
        return stored

    def _note(self, kind: str, value: Mapping[str, Json]) -> Stored:
        revision = self._next_revision()
        value = {**value, "metadata": {**value["metadata"], "resourceVersion": str(revision)}}
        stored = Stored(revision, value, json.dumps(value, separators=(",", ":")).encode())
        self._history.append(Change(revision, kind, stored))
        return stored


class Cluster:
    """Nodes and pods.  `on_change` is called after each write."""

    def __init__(self) -> None:
        self.revision = 1
        self.nodes = Objects("nodes", "Node", self._next, lambda: self.revision)
        self.pods = Objects("pods", "Pod", self._next, lambda: self.revision)
        self.on_change: Callable[[], None] = lambda: None

    def _next(self) -> int:
        self.revision += 1
        self.on_change()
        return self.revision

    def add_node(self, name: str, pod_cidrs: str = "", annotations: Mapping[str, str] = {}, **more: Json) -> Stored:
        """A node as kubelet registers it, and as the controller manager gives it podCIDRs, which commas separate.

        `more` is its status.
        """
        cidrs = pod_cidrs.split(",")
        spec = {"podCIDR": cidrs[0], "podCIDRs": cidrs} if pod_cidrs else {}
        metadata = {"name": name, "labels": {"kubernetes.io/hostname": name}, "annotations": dict(annotations)}
        conditions = [{"type": "Ready", "status": "True", "reason": "KubeletReady"}]
        status = {"conditions": conditions, **more}
        return self.nodes.create(
            {"kind": "Node", "apiVersion": "v1", "metadata": metadata, "spec": spec, "status": status}
        )

    def add_pod(self, namespace: str, name: str, node: str) -> Stored:
        metadata = {"name": name, "namespace": namespace}
        pod = {"kind": "Pod", "apiVersion": "v1", "metadata": metadata, "spec": {"nodeName": node}, "status": {}}
        return self.pods.create(pod, f"{namespace}/{name}")
