"""Addresses and subnets from outside: no reader takes an IPv6 zone, which may be any text."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from udptun.backends.choice import parse_net_conf
from udptun.cni import subnet_env as cni_subnet_env
from udptun.cni.errors import CniError
from udptun.cni.reservations import Reservations
from udptun.commands.cli import main
from udptun.config import subnet_env
from udptun.config.flags import parse_daemon_flags
from udptun.control.instance import NETWORKS_FILE, claim_leftovers
from udptun.control.settings import underlay_options
from udptun.core.errors import UdptunError
from udptun.core.ip_text import ip_address, ip_network, ipv6_address, ipv6_network
from udptun.core.lease import Lease, LeaseAttrs, Subnets
from udptun.core.network_state import Link
from udptun.core.ownership import marked_network
from udptun.firewall.rules import network_or_none
from udptun.kernel.claims import Claims
from udptun.membership import saved
from udptun.probing.memory import Memory
from udptun.stores import file
from udptun.stores.kube.annotations import Annotations, subnets
from udptun.stores.kube.http import needs_proxy
from udptun.stores.kube.node import Node

ANNOTATIONS = Annotations("flannel.alpha.coreos.com/")
LINK = Link(1, "lo", "", 65536, is_up=True, has_carrier=True, is_loopback=True, tx_queue_len=0)
NODE = Node("n", 1, {}, ("fd00::/64",), None)
ATTRS = LeaseAttrs.from_json('{"PublicIP":"192.0.2.1"}')


class FakeClaims(Claims):
    def take(self, name: str) -> None:
        """The name is free."""


def _networks_file(text: str, directory: Path) -> object:
    (directory / NETWORKS_FILE).write_text(f"{text}\n")
    options = parse_daemon_flags([f"--state-dir={directory}", f"--subnet-file={directory}/none"], {})
    return claim_leftovers(FakeClaims(), options).networks


def _saved(text: str, directory: Path) -> object:
    last = saved.LastLeases("{}", IPv4Network("10.244.0.0/16"), Lease(Subnets.from_key("10.244.1.0-24"), ATTRS), ())
    document = json.loads(saved.render(last, 0.0)) | {"network": text}
    found = saved.parse(json.dumps(document), None, 0.0)
    assert len(found.reason.splitlines()) <= 1
    return found.last


def _probe_memory(text: str, directory: Path) -> object:
    (directory / "probes").write_text(json.dumps({"version": 1, "full": 1, "peers": {text: ["", "alive", 1280, 0]}}))
    return Memory(directory / "probes").load()[1]


def _iface(text: str, directory: Path) -> object:
    """IPv6 is looked for where --iface is an address of it."""
    options = parse_daemon_flags([f"--iface={text}"], {})
    return underlay_options(options, parse_net_conf('{"Network":"10.244.0.0/16"}', "net-conf.json")).families[1:]


def _net_conf(key: str) -> Callable[[str, Path], object]:
    fields = {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "fd00::/48"}
    return lambda text, _: parse_net_conf(json.dumps(fields | {key: text}), "net-conf.json")


def _file_store(text: str, directory: Path) -> object:
    key, other = ("IPv6Subnet", "PublicIPv6") if "/" in text else ("PublicIPv6", "IPv6Subnet")
    return file.parse(json.dumps([{key: text, other: "fd00::1" if other == "PublicIPv6" else "fd00::/64"}])).entries


def _node_public_ipv6(text: str, directory: Path) -> object:
    return ANNOTATIONS.node_public_addresses(replace(NODE, annotations={ANNOTATIONS.node_public_ipv6: text}))


def _overwrite(text: str, directory: Path) -> object:
    node = replace(NODE, annotations={ANNOTATIONS.public_ipv6_overwrite: text})
    attrs = replace(ATTRS, public_ipv6=ipv6_address("2001:db8::7"))
    return ANNOTATIONS.missing(node, attrs)[ANNOTATIONS.public_ipv6] != "2001:db8::7"


def _cni_subnet_env(text: str, directory: Path) -> object:
    lines = [f"FLANNEL_IPV6_NETWORK={text}", f"FLANNEL_IPV6_SUBNET={text}", "FLANNEL_MTU=1400", "FLANNEL_IPMASQ=true"]
    return cni_subnet_env.parse("\n".join(lines), "subnet.env").subnets


def _cni_reservations(text: str, directory: Path) -> object:
    (directory / "net").mkdir()
    (directory / "net" / text).write_text("container\neth0")
    return Reservations({"name": "net", "ipam": {"type": "host-local", "dataDir": str(directory)}}).all()


ADDRESS, SUBNET = "fd00::1{}", "fd00::{}/64"
READERS: dict[str, tuple[str, Callable[[str, Path], object]]] = {
    "ip_address": (ADDRESS, lambda text, _: ip_address(text)),
    "ipv6_address": (ADDRESS, lambda text, _: ipv6_address(text)),
    "ip_network": (SUBNET, lambda text, _: ip_network(text)),
    "ipv6_network": (SUBNET, lambda text, _: ipv6_network(text)),
    "PublicIPv6 of a lease": (
        ADDRESS,
        lambda text, _: LeaseAttrs.from_json(json.dumps({"PublicIP": "192.0.2.1", "PublicIPv6": text})),
    ),
    "key of a lease": (SUBNET, lambda text, _: Subnets.from_key(text.replace("/", "-"))),
    "alias of a device": (SUBNET, lambda text, _: marked_network(replace(LINK, alias=f"udptun {text}"))),
    "firewall rule": (SUBNET, lambda text, _: network_or_none(text)),
    "networks of earlier runs": (SUBNET, _networks_file),
    "last-leases.json": (SUBNET, _saved),
    "what the prober remembers": (SUBNET, _probe_memory),
    "--iface": (ADDRESS, _iface),
    "--iface-can-reach": (ADDRESS, lambda text, _: parse_daemon_flags([f"--iface-can-reach={text}"], {})),
    "--public-ipv6": (ADDRESS, lambda text, _: parse_daemon_flags([f"--public-ipv6={text}"], {})),
    "IPv6Network": (SUBNET, _net_conf("IPv6Network")),
    "IPv6SubnetMin": ("fd00:0:0:1::{}", _net_conf("IPv6SubnetMin")),
    "subnet.env": (SUBNET, lambda text, _: subnet_env.parse(f"FLANNEL_IPV6_SUBNET={text}")[0]),
    "leases file, address": (ADDRESS, _file_store),
    "leases file, subnet": (SUBNET, _file_store),
    "podCIDR": (SUBNET, lambda text, _: subnets(replace(NODE, pod_cidrs=(text,)))),
    "node-public-ipv6": (ADDRESS, _node_public_ipv6),
    "public-ipv6-overwrite": (ADDRESS, _overwrite),
    "NO_PROXY": ("fd00::{}/8", lambda text, _: not needs_proxy("https://[fd00::1]:6443", text)),
    "CNI: subnet.env": (SUBNET, _cni_subnet_env),
    "CNI: addresses given out": (ADDRESS, _cni_reservations),
}


@pytest.mark.parametrize("reader", READERS)
def test_no_reader_takes_a_zone(reader: str, tmp_path: Path) -> None:
    """Before, those for both families did.  A zone may have a line feed in it, which began another line of the log."""
    form, read = READERS[reader]
    for number, zone in enumerate(("%eth0", "%1", "%a\nb")):
        directory = tmp_path / str(number)
        directory.mkdir()
        with suppress(UdptunError, ValueError, CniError):
            assert not read(form.format(zone), directory)
    assert read(form.format(""), tmp_path)


def test_lease_command_takes_no_zone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["lease", "show", "fd00::%a/64"])
    assert "has a zone" in capsys.readouterr().err


def test_server_named_with_a_zone_needs_no_proxy_where_its_address_needs_none() -> None:
    assert not needs_proxy("https://[fe80::1%eth0]:6443", "fe80::/10")
    assert needs_proxy("https://[fe80::1%eth0]:6443", "fd00::/8")
