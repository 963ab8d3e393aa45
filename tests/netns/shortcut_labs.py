"""Labs of hosts that have the shortcut on, its programs attached as this kernel attaches them or as older ones do."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from namespace import HAS_TCX
from traffic import AS_CONFIGURED, REAL_TIME, read_status, wait_for_peers

from udptun.lab.host import Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import DEFAULT_NET_CONF, NET_CONF, Lab, Offload

ATTACHED_BY = [
    pytest.param("tcx", marks=pytest.mark.skipif(not HAS_TCX, reason="needs a kernel with tcx, 6.6 or later")),
    pytest.param("clsact", marks=pytest.mark.full if HAS_TCX else ()),
]
"""Parameters of a fixture: what `started_lab` takes as `by`."""

WITHOUT_TCX = Path(__file__).with_name("without_tcx.py")
"""`udptun` that attaches by clsact."""
_LIMIT_S = 15
"""For the switch at all hosts, which takes some tenths of a second."""


@contextmanager
def started_lab(prefix: str, by: str, offload: Offload) -> Iterator[Lab]:
    """Of two hosts that have it on.  The lab's name begins with `prefix`."""
    with Lab(f"{prefix}{os.getpid()}{by[0]}", net_conf=_net_conf("auto")) as lab:
        if by == "clsact":
            run_in_its_place(lab, WITHOUT_TCX)
        lab.daemon_command[:0] = [*REAL_TIME, *AS_CONFIGURED]
        lab.set_offload(offload)
        lab.start()
        wait_for_peers(lab)
        wait_until_on(lab)
        yield lab


def wait_until_on(lab: Lab) -> None:
    """Until each host's kernel takes and sends."""
    wait_until("the shortcut at all hosts", lambda: all(map(takes_and_sends, map(read_status, lab.hosts))), _LIMIT_S)


def run_in_its_place(lab: Lab, script: Path) -> None:
    """Have the lab's daemons be this script, where they would be `-m udptun`."""
    at = lab.daemon_command.index("-m")
    lab.daemon_command[at : at + 2] = [str(script)]


def takes_and_sends(document: Mapping[str, Any]) -> bool:
    """Whether the host of this status has it on, and toward every peer."""
    return document["datapath"]["shortcut"] == "on" and all(it["shortcut"] for it in document["peers"])


def reload(host: Host, mode: str) -> None:
    """Have the host's net-conf.json say so from now on."""
    host.path(NET_CONF).write_text(json.dumps(_net_conf(mode)))
    assert host.daemon is not None
    host.daemon.send_signal(signal.SIGHUP)


def _net_conf(mode: str) -> dict[str, object]:
    return {**DEFAULT_NET_CONF, "Backend": {"Type": "udp", "Shortcut": mode}}
