"""docs/compatibility.md: flannel's flags, keys and types are those of flannel, and ours are those of the code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from udptun.backends.choice import KINDS
from udptun.config import net_conf
from udptun.config.flags import FLAGS
from udptun.config.go_flags import Flag
from udptun.config.go_json import keys_of

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"

if not PAGE.exists():
    pytest.skip("the pages are in the repository, not in an installed package", allow_module_level=True)

FLANNELS_FLAGS: Mapping[str, str] = {
    "etcd-endpoints": "http://127.0.0.1:4001,http://127.0.0.1:2379",
    "etcd-prefix": "/coreos.com/network",
    "etcd-keyfile": "",
    "etcd-certfile": "",
    "etcd-cafile": "",
    "etcd-username": "",
    "etcd-password": "",
    "iface": "",
    "iface-regex": "",
    "iface-can-reach": "",
    "subnet-file": "/run/flannel/subnet.env",
    "public-ip": "",
    "public-ipv6": "",
    "subnet-lease-renew-margin": "60",
    "ip-masq": "false",
    "ip-masq-fully-random-disable": "false",
    "kube-subnet-mgr": "false",
    "kube-api-url": "",
    "kubeconfig-file": "",
    "kube-annotation-prefix": "flannel.alpha.coreos.com",
    "net-config-path": "/etc/kube-flannel/net-conf.json",
    "set-node-network-unavailable": "true",
    "version": "false",
    "healthz-ip": "0.0.0.0",
    "healthz-port": "0",
    "iptables-resync": "5",
    "iptables-forward-rules": "true",
    "ip-blackhole-route": "false",
    "v": "0",
    "vmodule": "",
    "log_backtrace_at": "",
    "logtostderr": "true",
    "alsologtostderr": "true",
    "stderrthreshold": "",
    "log_dir": "",
}
"""Name -> default, of flannel 0.12 to 0.28 (main.go; klog's and old glog's flags)."""

FLANNELS_KEYS: Mapping[str, set[str]] = {
    "": {
        *("EnableIPv4", "EnableIPv6", "EnableNFTables", "Network", "SubnetMin", "SubnetMax", "SubnetLen"),
        *("IPv6Network", "IPv6SubnetMin", "IPv6SubnetMax", "IPv6SubnetLen", "Backend"),
    },
    "udp": {"Type", "Port"},
    "vxlan": {"Type", "VNI", "Port", "GBP", "Learning", "DirectRouting", "MTU"},
    "host-gw": {"Type"},
    "alloc": {"Type"},
}
"""Backend.Type, or nothing for the top level -> the keys that flannel reads there (config.go, the backends)."""

OTHER_WORDS = {"iptables-forward-rules": "true", "kube-annotation-prefix": "flannel.alpha.coreos.com"}
"""Defaults that mean what flannel's does and that the code writes otherwise."""

ALL: Mapping[str, Flag] = {flag.name: flag for flags in FLAGS.values() for flag in flags}


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under the heading, without backticks."""
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines[2:]]


def our_default(name: str) -> str:
    """As the page has it; empty: none, or a key of the network config decides."""
    default = ALL[name].default
    text = "" if default in (None, "", ()) else str(default)
    return OTHER_WORDS.get(name, text.lower() if ALL[name].is_boolean else text)


def test_each_flag_of_flannel_has_a_row_with_both_defaults() -> None:
    table = {row[0].removeprefix("--"): row for row in rows("Flags of flannel")}
    assert {name: row[1] for name, row in table.items()} == FLANNELS_FLAGS
    ours = {name: row[1] if row[2] == "the same" else row[2] for name, row in table.items()}
    assert ours == {name: our_default(name) for name in table}
    assert all(row[3] for row in table.values())


def test_each_flag_of_ours_has_a_row() -> None:
    table = {row[0].removeprefix("--"): row[1] for row in rows("Flags that flannel does not have")}
    assert table == {name: our_default(name) for name in ALL.keys() - FLANNELS_FLAGS.keys()}


def test_each_key_has_a_row_that_says_whose_it_is() -> None:
    told = {(row[0], kind): row[2] for row in rows("Keys of the network config") for kind in row[1].split(", ")}
    there = {(f"Backend.{key.name}", kind): key for kind, keys in KINDS.items() for key in keys_of(keys).values()}
    ours = {*((name, "") for name in net_conf._TOP_KEYS), *there, *(("Backend.Type", kind) for kind in KINDS)}
    flannels = {(f"Backend.{key}" if kind else key, kind) for kind, keys in FLANNELS_KEYS.items() for key in keys}
    assert told == {key: "flannel" if key in flannels else "ours" for key in ours | flannels}
    assert flannels - ours == set(), "flannel's keys that nobody reads here need a note"


def test_each_backend_type_has_a_row() -> None:
    table = {row[0]: row[1] for row in rows("Backend types")}
    assert table == {**dict.fromkeys(KINDS, "yes"), **dict.fromkeys(net_conf._FLANNEL_BACKENDS, "no")}
