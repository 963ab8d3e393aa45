"""Names that one process at a time holds (kernel/claims.py)."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from udptun.kernel.claims import Claims, find_holder

NAME = f"test {os.getpid()}"


@pytest.fixture
def claims() -> Iterator[Claims]:
    with closing(Claims()) as claims:
        yield claims


def test_a_name_has_one_holder_until_it_closes(claims: Claims) -> None:
    assert claims.take(NAME) is None
    with closing(Claims()) as others:
        assert others.take(NAME) == find_holder(NAME) == os.getpid()
    claims.close()
    assert find_holder(NAME) is None
    assert claims.take(NAME) is None


@pytest.mark.parametrize("ends", [True, False], ids=["has just ended", "does not listen yet"])
def test_a_holder_that_cannot_be_asked_for_a_moment_is_asked_again(
    claims: Claims, ends: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two daemons that repaired the firewall at the same moment both did, one with a warning about the other."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as holder:
        holder.bind(f"\0udptun {NAME}")
        monkeypatch.setattr(time, "sleep", lambda seconds: holder.close() if ends else holder.listen())
        assert claims.take(NAME) == (None if ends else os.getpid())
    assert not caplog.messages


def test_a_name_that_somebody_else_keeps_is_done_without(claims: Claims, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as deaf:
        deaf.bind(f"\0udptun {NAME}")
        assert claims.take(NAME) is None
    assert len(caplog.messages) == 1
    assert "cannot see a name of ours" in caplog.messages[0]
