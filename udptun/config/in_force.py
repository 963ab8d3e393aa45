"""The settings in force, and where each came from: a flag, a variable, the network config or a default.  Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import Any

from udptun.config import flags
from udptun.config.flags import Options
from udptun.config.go_json import keys_of
from udptun.config.net_conf import BackendKeys, NetConf, keys_given, values_of
from udptun.config.store_flags import ETCD_FLAGS, StoreKind
from udptun.core.offload import ALL, Offload, names
from udptun.core.tunnel import AS_MANY_AS_WORKERS, default_workers

SCHEMA = 1
"""Of the document: keys are only ever added."""

DEFAULT = "default"

FLAGS_OVER_KEYS: Mapping[str, str] = {
    "MTU": "mtu",
    "Workers": "workers",
    "SourceCheck": "source-check",
    "OffloadDisabled": "offload-disabled",
    "Probe": "probe",
}
"""The key of `Backend` -> the flag that wins over it on one host."""

FLAGS_OVER_KEYS_OF_UDP: Mapping[str, str] = {"Port": "port", "SourcePorts": "source-ports", "Shortcut": "shortcut"}
"""The same of Type udp alone."""

_ETCD = tuple(it.name for it in ETCD_FLAGS.values())

Row = dict[str, Any]
"""One setting: `name`, `value` and `source`."""


def flag_rows(options: Options, variables: Mapping[str, str] | None = None) -> list[Row]:
    """A row for each flag.  `variables`: what is known of where a variable was set, by its name."""
    rows = []
    for flag, value in flags.values_of(options):
        said = _said_of_store(options) if flag.name == "store" else options.said.get(flag.name, DEFAULT)
        # A secret is not told, and neither is its length.
        told = "..." if flag.is_secret and value else shown(value)
        rows.append(_row(f"--{flag.name}", told, (variables or {}).get(said, said)))
    return rows


def key_rows(
    options: Options, conf: NetConf, text: str, source: str, n_cpus: int, latest: NetConf | None = None
) -> list[Row]:
    """A row for each key of the network config, with what this host's flags make of it.

    `text` is what `source`, a path or a key of etcd, holds.  It may have changed since `conf` came into force; then
    `latest` is what it means now.
    """
    given, now = keys_given(text), dict(_values(latest or conf))
    rows = []
    for name, value in _values(conf):
        where = source if name.casefold() in given else DEFAULT
        if now.get(name) != value:
            where = f"{source} as it was at the start; a restart brings {shown(now.get(name))}"
        rows.append(_row(name, *_on_this_host(options, conf.backend, name, value, where, n_cpus)))
    return rows


def _said_of_store(options: Options) -> str:
    """What named the store: other flags name one too."""
    others: Mapping[StoreKind, Iterable[str]] = {StoreKind.ETCD: _ETCD, StoreKind.KUBE: ["kube-subnet-mgr"]}
    names_it = ["store", *others.get(options.store.kind, ())]
    return next((options.said[it] for it in names_it if it in options.said), DEFAULT)


def _values(conf: NetConf) -> Iterator[tuple[str, object]]:
    yield from values_of(conf).items()
    yield "Backend.Type", conf.backend.type
    for field_name, key in keys_of(conf.backend).items():
        yield f"Backend.{key.name}", getattr(conf.backend, field_name)


def _on_this_host(
    options: Options, backend: BackendKeys, name: str, value: object, where: str, n_cpus: int
) -> tuple[object, str]:
    """What is in force for the key, and why."""
    key = name.removeprefix("Backend.")
    over = {**FLAGS_OVER_KEYS, **(FLAGS_OVER_KEYS_OF_UDP if backend.type == "udp" else {})}
    if isinstance(value, Offload):
        value = ALL & ~value
    if name != key and key in over:
        flag = over[key]
        by_flag = getattr(options, flag.replace("-", "_"))
        if by_flag is not None:
            value, where = by_flag, options.said.get(flag, DEFAULT)
    match name, value:
        case "Backend.Workers", None:
            return default_workers(n_cpus), f"{DEFAULT} for {n_cpus} processors"
        case "Backend.MTU", None:
            return None, "the interface's"
        case "Backend.SourcePorts", int(n) if n == AS_MANY_AS_WORKERS:
            return "auto", where
        case "Backend.LogLevel", None:
            return ("debug" if options.v >= 1 else "info"), options.said.get("v", DEFAULT)
    return shown(value), where


def shown(value: object) -> object:
    """The value for a JSON document: numbers, booleans, lists and null stay, all else is text."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Offload):
        return names(value)
    if isinstance(value, Enum):
        return value.name.lower()
    if isinstance(value, tuple | list):
        return [shown(it) for it in value]
    return str(value)


def _row(name: str, value: object, source: str) -> Row:
    return {"name": name, "value": value, "source": source}
