"""What the daemon is doing, for those who wait for subnet.env: a small file beside it, `<subnet.env>.status`.

The CNI plugin quotes it, so that a pod that cannot start says what this node waits for, and since when (docs/cni.md).
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from types import TracebackType

from udptun.config import subnet_env
from udptun.core.errors import UdptunError
from udptun.kernel.supervisor import first_failure

log = logging.getLogger(__name__)

SCHEMA = 1


def path_beside(subnet_file: Path) -> Path:
    """Where the status of the daemon with this --subnet-file is."""
    return subnet_file.with_name(f"{subnet_file.name}.status")


class NodeStatus(logging.Handler):
    """The file of one daemon: a context manager, which ends with what ended the daemon.

    While the daemon starts, warnings of the log are added to the reason: they say what is in its way.  A file that
    cannot be written costs one warning and nothing else.
    """

    def __init__(self, subnet_file: Path) -> None:
        super().__init__(logging.WARNING)
        self._path = path_beside(subnet_file)
        self._state = "starting"
        self._stage = ""
        self._reason = ""
        self._since_s = time.time()
        self._is_writable = True

    def __enter__(self) -> NodeStatus:
        self.starts("starts")
        logging.getLogger("udptun").addHandler(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        logging.getLogger("udptun").removeHandler(self)
        cause = None if error is None else first_failure(error)
        if isinstance(cause, UdptunError):
            self._change("failed", f"the daemon ended: {cause}")
        elif isinstance(cause, Exception):
            self._change("failed", f"the daemon ended: {cause!r}; its log says more")
        else:
            self._change("stopped", "the daemon was stopped")

    def starts(self, stage: str) -> None:
        """This is what the daemon does now, or waits for."""
        self._change("starting", stage)

    def is_ready(self) -> None:
        """subnet.env is written."""
        self._change("ready", "ready")

    @property
    def waiting(self) -> str:
        """What the daemon does, what is in its way, and for how long it has been at it; for people."""
        return f"{self._reason} (for {max(0, int(time.time() - self._since_s))} s)"

    def emit(self, record: logging.LogRecord) -> None:
        """A warning of the log."""
        if self._state == "starting" and record.name != __name__:
            self._write(f"{self._stage}: {record.getMessage()}")

    def _change(self, state: str, stage: str) -> None:
        self._state, self._stage, self._since_s = state, stage, time.time()
        self._write(stage)

    def _write(self, reason: str) -> None:
        self._reason = reason
        if not self._is_writable:
            return
        said = {
            "schema": SCHEMA,
            "state": self._state,
            "reason": reason,
            "since": round(self._since_s, 3),
            "pid": os.getpid(),
        }
        try:
            subnet_env.write(self._path, json.dumps(said) + "\n")
        except UdptunError as exc:
            self._is_writable = False
            log.warning("pods do not learn what this node waits for: %s", exc)
