"""What `udptun config show` is told: the settings in force and where each came from."""

from __future__ import annotations

import os
from typing import Any

from udptun import __version__
from udptun.backends.choice import parse_net_conf
from udptun.config.flags import Options
from udptun.config.in_force import SCHEMA, flag_rows, key_rows
from udptun.control.running import Running
from udptun.core.errors import ConfigError


def config_document(options: Options, running: Running | None, text: str, source: str, waiting: str) -> dict[str, Any]:
    """That of this daemon.

    `text` is the network config that was read last, from `source`.  Without `running` no config is in force yet, and
    `waiting` says why.
    """
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "daemon": {"pid": os.getpid(), "version": __version__},
        "config_source": source,
        "keys": [],
        "flags": flag_rows(options),
        "problems": [],
    }
    if running is None:
        return {**document, "problems": [f"no network config is in force yet: the daemon {waiting}"]}
    try:
        latest = parse_net_conf(text, source)
    except ConfigError as exc:
        # It was good when it was read.
        return {**document, "problems": list(exc.problems)}
    n_cpus = len(os.sched_getaffinity(0))
    return {**document, "keys": key_rows(options, running.conf, text, source, n_cpus, latest)}
