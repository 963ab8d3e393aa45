"""What a daemon leaves of its probes for the next one."""

from __future__ import annotations

import json
import random
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from udptun.probing.liveness import Liveness, Probing
from udptun.probing.memory import Known, Memory
from udptun.probing.path_mtu import GROW_S, PathMtus

A, B = IPv4Network("10.244.1.0/24"), IPv4Network("10.244.2.0/24")
KNOWN = {A: Known("192.0.2.1", Liveness.ALIVE, 1272), B: Known("192.0.2.2", Liveness.DEAD, None, 12.5)}


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "probes.json")
    assert memory.load() == (0, {})
    memory.save(1472, KNOWN)
    assert memory.load() == (1472, KNOWN)
    assert (tmp_path / "probes.json").stat().st_mode & 0o777 == 0o600


def entry(*fields: object) -> dict[str, object]:
    return {"version": 1, "full": 1472, "peers": {str(A): list(fields)}}


@pytest.mark.parametrize(
    "document",
    [
        *("", "[]", "null", "7", '"x"', "{", "[" * 100_000, "\0", json.dumps({"version": 2})),
        *map(json.dumps, ({"version": 1}, {"version": 1, "full": 1472, "peers": []}, {"version": 1, "full": "x"})),
        json.dumps({"version": 1, "full": 1472.5, "peers": {}}),
        *map(json.dumps, (entry(), entry("x", "alive", 1272), entry("x", "alive", 1272, 0, 0))),
        *map(json.dumps, (entry("x", "well", 1272, 0), entry("x", "alive", "1272", 0), entry(7, "alive", 1272, 0))),
        *map(json.dumps, (entry("x", "alive", True, 0), entry("x", "dead", 1272, "0"), entry("x", "dead", 1, None))),
        json.dumps(entry("x", "dead", 1272, float("nan"))),
        json.dumps({"version": 1, "full": 1472, "peers": {"10.244.1.1/24": ["x", "alive", 1272, 0]}}),
    ],
)
def test_a_file_that_is_no_such_file_is_as_none(tmp_path: Path, document: str) -> None:
    path = tmp_path / "probes.json"
    path.write_text(document)
    assert Memory(path).load() == (0, {})


def test_a_directory_that_cannot_be_written_to_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    memory = Memory(tmp_path / "gone" / "probes.json")
    memory.save(1472, KNOWN)
    memory.save(1472, KNOWN)
    assert len(caplog.messages) == 1


def test_a_narrow_path_that_was_known_is_so_from_the_begin_and_grows_in_its_time() -> None:
    paths: PathMtus[str] = PathMtus()
    paths.add("a", 1472)
    paths.restore("a", 1272, 1000.0)
    assert (paths.measured("a"), paths.narrow()) == (1272, {"a": 1272})
    assert paths.due(["a"], 1000.0) == [("a", 1272)]
    paths.note_answer("a", 1272, 1000.1)
    assert max(size for _, size in paths.due(["a"], 1000.0 + GROW_S[0])) == 1472


def test_a_host_that_was_dead_is_so_from_the_begin_and_probed_at_once() -> None:
    probing: Probing[str] = Probing(random.Random(1))
    probing.add(["a", "b"], 1000.0)
    probing.restore("a", Liveness.DEAD, 990.0)
    probing.restore("b", Liveness.ALIVE, 0.0)
    assert probing.dead_since() == {"a": 990.0}
    assert "a" in probing.due(1000.0)
    probing.note_answer("a", 0.01, 1000.1)
    assert probing.take_changes() == {"a": Liveness.ALIVE}
    assert probing.liveness("b") == (Liveness.ALIVE, None)
