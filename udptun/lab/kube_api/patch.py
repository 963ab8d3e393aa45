"""The patches that Kubernetes knows for an object: what each makes of it.  Pure: the old object stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Json = Any
"""A value as `json.loads` returns it."""

STRATEGIC = "application/strategic-merge-patch+json"
MERGE = "application/merge-patch+json"

_MERGE_KEYS = {"conditions": "type", "addresses": "type"}
"""Lists of a node whose elements have an identity: the field that names an element (patchMergeKey in core/v1)."""

_SETS = ("podCIDRs",)
"""Lists of a node that a patch adds to."""


def apply(kind: str, old: Mapping[str, Json], patch: Mapping[str, Json]) -> dict[str, Json]:
    """`old` with the patch of content type `kind` applied."""
    return _merged(old, patch, is_strategic=kind == STRATEGIC)


def _merged(old: Mapping[str, Json], patch: Mapping[str, Json], *, is_strategic: bool) -> dict[str, Json]:
    if is_strategic and patch.get("$patch") == "replace":
        return {key: value for key, value in patch.items() if key != "$patch"}
    new = dict(old)
    for key, value in patch.items():
        before = old.get(key)
        if is_strategic and key.startswith("$"):
            # Directives about the order of lists, which we keep anyway.
            continue
        if value is None:
            new.pop(key, None)
        elif isinstance(value, Mapping):
            under = before if isinstance(before, Mapping) else {}
            new[key] = _merged(under, value, is_strategic=is_strategic)
        elif is_strategic and isinstance(before, list) and key in _MERGE_KEYS:
            new[key] = _merged_list(before, value, _MERGE_KEYS[key])
        elif is_strategic and isinstance(before, list) and key in _SETS:
            new[key] = [*before, *(it for it in value if it not in before)]
        else:
            new[key] = value
    return new


def _merged_list(old: list[Json], patch: list[Json], name: str) -> list[Json]:
    """Elements with the same `name` are merged, `$patch: delete` removes one, and others come behind."""
    changes = {it[name]: it for it in patch}
    kept = [
        _merged(it, changes.pop(it[name]), is_strategic=True) if it[name] in changes else it
        for it in old
        if changes.get(it[name], {}).get("$patch") != "delete"
    ]
    there = {it[name] for it in kept}
    return kept + [it for it in changes.values() if it.get("$patch") != "delete" and it[name] not in there]
