"""`udptun config check|show`: a network config tried out, and the settings in force with where each came from."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from udptun.backends.choice import parse_net_conf
from udptun.commands.parser import Parser
from udptun.commands.status import fetch
from udptun.config import env_file
from udptun.config.command_flags import ConfigRequest, config_help, parse_config_flags
from udptun.config.flags import ENVIRONMENT_PREFIX, Options
from udptun.config.in_force import SCHEMA, Row, flag_rows, key_rows
from udptun.config.net_conf import NetConf
from udptun.config.store_flags import StoreKind
from udptun.core.errors import ConfigError, UdptunError, UsageError
from udptun.stores.base import read_network_config, reason
from udptun.stores.open import open_store

USAGE = """\
usage: udptun config check [--json] FILE
       udptun config show [--json] [--env-file FILE] [FLAG...]

check   say all that is wrong with a net-conf.json, a line each with what to do
        FILE may be - for standard input.  Exit status 0: good, 1: warnings, as of keys that have no effect, 2: the
        daemon would refuse it
show    every flag and key of the network config with its value, and where that came from
        Without flags it asks the daemon that runs here.  With flags, or where none answers, it says what a daemon would
        make of the flags, the environment and --env-file.  Exit status 0, or 2 when the network config cannot be used
"""

_WIDEST_VALUE = 44
"""Characters; a longer value does not move the column behind it."""


def run(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Returns the exit status.  Raises UdptunError."""
    action, rest = (argv[0], argv[1:]) if argv else ("", [])
    if action in ("-h", "--help", "-help"):
        print(USAGE + config_help())
        return 0
    if action == "check":
        return _check(rest)
    if action == "show":
        return _show(rest, environ)
    what = f"unknown action {action}" if action else "what to do is missing"
    raise UsageError(f"config: {what}: check or show")


# ------------------------------------------------------------------------------------------------------------- check


def _check(argv: Sequence[str]) -> int:
    parser = Parser(prog="udptun config check", description="Say all that is wrong with a net-conf.json.")
    parser.add_argument("file", metavar="FILE", help="the file, or - for standard input")
    parser.add_argument("--json", action="store_true", help="for programs")
    given = parser.parse_args(argv)
    source = "standard input" if given.file == "-" else given.file
    problems: Sequence[str] = ()
    warnings: Sequence[str] = ()
    conf = None
    try:
        conf = parse_net_conf(_text_of(given.file), source)
        warnings = conf.notes
    except ConfigError as exc:
        problems, warnings = exc.problems, exc.notes
    status = 2 if problems else 1 if warnings else 0
    if given.json:
        document = {"schema": SCHEMA, "file": source, "problems": list(problems), "warnings": list(warnings)}
        print(json.dumps(document))
        return status
    for kind, lines in (("error", problems), ("warning", warnings)):
        for line in lines:
            print(f"{kind}: {line}")
    if conf is not None:
        print(f"{source}: good: {_summary(conf)}")
    return status


def _text_of(name: str) -> str:
    if name != "-":
        return read_network_config(Path(name))
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as exc:
        raise ConfigError(f"cannot read standard input: {reason(exc)}") from exc


def _summary(conf: NetConf) -> str:
    pools = [
        f"{pool.network} in subnets of /{pool.subnet_len} from {pool.subnet_min} to {pool.subnet_max}"
        for pool in map(conf.pool, conf.families)
    ]
    return f"{', '.join(pools)}, Backend.Type {conf.backend.type}"


# -------------------------------------------------------------------------------------------------------------- show


def _show(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    request = parse_config_flags(argv, environ)
    if request.options.help:
        print(USAGE + config_help())
        return 0
    document, silence = None, ""
    if not _names_settings(request):
        try:
            document = json.loads(fetch(request.options.run_dir, "/config"))
        except UdptunError as exc:
            silence = f"{exc}\n"
    if document is None:
        document = _document_of_flags(argv, environ, request)
    if request.json:
        print(json.dumps(document))
    else:
        print(silence + as_text(document), end="")
    return 2 if document["problems"] else 0


def _names_settings(request: ConfigRequest) -> bool:
    """Whether the command line says more than which daemon to ask."""
    by_flag = [name for name, said in request.options.said.items() if said.startswith("--")]
    return request.env_file is not None or not {"run-dir", "json"}.issuperset(by_flag)


def _document_of_flags(argv: Sequence[str], environ: Mapping[str, str], request: ConfigRequest) -> dict[str, Any]:
    options, variables = request.options, dict[str, str]()
    if request.env_file is not None:
        try:
            of_file = env_file.parse(request.env_file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as exc:
            raise UdptunError(f"cannot read {request.env_file}: {reason(exc)}") from exc
        variables = {name: f"{name} in {request.env_file}" for name in of_file if name.startswith(ENVIRONMENT_PREFIX)}
        # As systemd has it: what a file sets wins over what the unit sets.
        options = parse_config_flags(argv, {**environ, **of_file}).options
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "daemon": None,
        "config_source": None,
        "keys": [],
        "flags": flag_rows(options, variables),
        "problems": [],
    }
    try:
        text, source = _network_config(options)
        document["config_source"] = source
        conf = parse_net_conf(text, source)
        document["keys"] = key_rows(options, conf, text, source, len(os.sched_getaffinity(0)))
    except UdptunError as exc:
        document["problems"] = list(exc.problems)
    return document


def _network_config(options: Options) -> tuple[str, str]:
    """The text of the network config and where it is.  Raises UdptunError."""
    if options.store.kind is not StoreKind.ETCD:
        return read_network_config(options.net_config_path), str(options.net_config_path)

    async def ask() -> tuple[str, str]:
        store = open_store(options)
        try:
            return await store.network_config(), store.config_name
        finally:
            await store.aclose()

    return asyncio.run(ask())


def as_text(document: Mapping[str, Any]) -> str:
    """The document for people."""
    daemon = document["daemon"]
    if daemon is None:
        head = "What these flags and this environment bring:"
    else:
        head = f"In force in the daemon, pid {daemon['pid']}, version {daemon['version']}:"
    lines = [head, *(f"problem: {line}" for line in document["problems"])]
    source = document["config_source"]
    for title, rows in ((f"Network config ({source})", document["keys"]), ("Flags", document["flags"])):
        if rows:
            lines += ["", title, *_table(rows)]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row]) -> list[str]:
    cells = [(row["name"], _value_text(row["value"]), row["source"]) for row in rows]
    names_width = max(len(name) for name, _, _ in cells)
    values_width = min(max(len(value) for _, value, _ in cells), _WIDEST_VALUE)
    return [f"  {name:<{names_width}}  {value:<{values_width}}  {source}" for name, value, source in cells]


def _value_text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(map(_value_text, value)) or "-"
    return "-" if value is None or value == "" else str(value)
