"""The file in which the daemon says what it is doing, and the CNI plugin that quotes it."""

from __future__ import annotations

import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import pytest

from udptun.cni import subnet_env
from udptun.cni.errors import CniError
from udptun.control.node_status import NodeStatus, path_beside
from udptun.core.errors import KernelError

log = logging.getLogger("udptun.some.module")


@pytest.fixture
def subnet_file(tmp_path: Path) -> Path:
    return tmp_path / "flannel" / "subnet.env"


def said(subnet_file: Path) -> dict[str, Any]:
    return json.loads(path_beside(subnet_file).read_text())  # type: ignore[no-any-return]


def quoted(subnet_file: Path) -> str:
    with pytest.raises(CniError) as error:
        subnet_env.read(str(subnet_file))
    message = error.value.message.removeprefix("udptun on this node is not ready: ")
    # The machine may be busy.
    return re.sub(r"since \d+ s", "since N s", message)


def test_status_says_each_stage_and_since_when(subnet_file: Path) -> None:
    with NodeStatus(subnet_file) as status:
        assert said(subnet_file) | {"since": 0, "pid": 0} == {
            "schema": 1,
            "state": "starting",
            "reason": "starts",
            "since": 0,
            "pid": 0,
        }
        before_s = time.time()
        status.starts("waits for its lease in etcd")
        log.info("no reason")
        since_s = said(subnet_file)["since"]
        assert before_s - 0.001 <= since_s <= time.time()
        log.warning("lease store unavailable error=%r", "refused")
        assert said(subnet_file)["reason"] == "waits for its lease in etcd: lease store unavailable error='refused'"
        assert said(subnet_file)["since"] == since_s
        assert quoted(subnet_file) == (
            "waits for its lease in etcd: lease store unavailable error='refused' (since N s)"
        )
        assert re.fullmatch(
            r"waits for its lease in etcd: lease store unavailable error='refused' \(for \d+ s\)", status.waiting
        )
        status.is_ready()
        log.warning("a warning of a daemon that is ready")
        assert (said(subnet_file)["state"], said(subnet_file)["reason"]) == ("ready", "ready")
        assert quoted(subnet_file) == "its daemon is ready, but somebody has deleted the file; restart the daemon"
    assert said(subnet_file)["state"] == "stopped"
    assert quoted(subnet_file) == "the daemon was stopped (since N s)"
    assert path_beside(subnet_file).stat().st_mode & 0o777 == 0o644
    log.warning("nobody writes any more")
    assert said(subnet_file)["state"] == "stopped"


def test_status_of_a_daemon_that_failed_has_its_words(subnet_file: Path) -> None:
    with pytest.raises(KernelError), NodeStatus(subnet_file):
        raise KernelError("cannot create flannel0", 1, "give the container /dev/net/tun")
    assert said(subnet_file)["state"] == "failed"
    assert quoted(subnet_file) == (
        "the daemon ended: cannot create flannel0: EPERM; give the container /dev/net/tun (since N s)"
    )


def test_status_that_cannot_be_written_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "flannel").write_text("a file")
    with NodeStatus(tmp_path / "flannel" / "subnet.env") as status:
        status.starts("waits")
        log.warning("another warning")
    lines = [record.getMessage() for record in caplog.records if "pods do not learn" in record.getMessage()]
    assert len(lines) == 1
    assert "cannot write" in lines[0]
