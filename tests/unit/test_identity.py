"""Who a host is: the files that keep it the same node across restarts, and which leases are its own."""

from __future__ import annotations

import stat
import threading
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from pathlib import Path

import pytest

from udptun.core.errors import ConfigError
from udptun.core.lease import Lease, LeaseAttrs, Subnets
from udptun.membership.identity import Identity, Node, files, node_id, vtep_mac

# ------------------------------------------------------------------------------------------------------- NodeID


def test_the_node_id_is_made_once_and_kept(tmp_path: Path) -> None:
    made = node_id(tmp_path)
    assert len(made) == 32
    assert node_id(tmp_path) == made
    assert [path.name for path in tmp_path.iterdir()] == ["node-id"]
    other = tmp_path / "other"
    other.mkdir()
    assert node_id(other) != made


def test_the_node_id_is_one_when_many_make_it_at_once(tmp_path: Path) -> None:
    found: list[str] = []
    start = threading.Barrier(8)

    def make() -> None:
        start.wait()
        found.append(node_id(tmp_path))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert stat.S_ISREG((tmp_path / "node-id").stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["node-id"]


@pytest.mark.parametrize("data", [b"", b"host-a\n", b"\xff" * 32, b"0" * 31, b"0" * 33, b"G" * 32, b"\0" * 4096])
def test_a_damaged_node_id_is_refused_and_left_alone(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "node-id"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"node-id holds .*, not the 32 hexadecimal digits .*; restore it, or delete"):
        node_id(tmp_path)
    assert path.read_bytes() == data


def test_a_node_id_that_cannot_be_kept_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot keep the node id .*: No such file or directory; --state-dir must"):
        node_id(tmp_path / "missing")


# ------------------------------------------------------------------------------------------------------- VtepMAC


def test_vtep_mac_is_made_once_and_kept(tmp_path: Path) -> None:
    mac = vtep_mac(tmp_path)
    assert vtep_mac(tmp_path) == mac
    first = int(mac[:2], 16)
    assert (first & 1, first & 2) == (0, 2)
    other = tmp_path / "other"
    other.mkdir()
    assert vtep_mac(other) != mac


@pytest.mark.parametrize("text", ["", "0a:00:00:00:00", "01:00:5e:00:00:01", "0A:00:00:00:00:01"])
def test_damaged_vtep_mac_is_said_in_one_line_and_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "vtep-mac").write_text(text)
    with pytest.raises(ConfigError, match="delete it to get another one"):
        vtep_mac(tmp_path)
    assert (tmp_path / "vtep-mac").read_text() == text


def test_vtep_mac_goes_with_the_identity(tmp_path: Path) -> None:
    assert [path.name for path in files(tmp_path)] == ["node-id", "vtep-mac", "vtep-mac-v6"]


# ------------------------------------------------------------------------------------------------- among the leases

OURS, OTHERS = "1" * 32, "2" * 32


def lease(ip: str, port: int | None = None, node: str | None = None) -> Lease:
    data = {key: value for key, value in (("Port", port), ("NodeID", node)) if value is not None}
    return Lease(Subnets(IPv4Network("10.244.1.0/24")), LeaseAttrs(IPv4Address(ip), backend_data=data or None))


@pytest.mark.parametrize(
    ("port", "default_port", "held", "is_ours"),
    [
        (8285, None, lease("192.0.2.1", 8285), True),
        (8285, None, lease("192.0.2.1", 9000), False),
        (8285, None, lease("192.0.2.2", 8285), False),
        (8285, None, lease("192.0.2.1"), True),
        (9000, 8285, lease("192.0.2.1"), False),
        (None, None, lease("192.0.2.1", 9000), True),
    ],
    ids=["ours", "port", "address", "flannel's", "flannel's beside us", "no port"],
)
def test_lease_is_ours_by_address_and_port(
    port: int | None, default_port: int | None, held: Lease, is_ours: bool
) -> None:
    assert Identity(IPv4Address("192.0.2.1"), port, OURS, default_port).owns(held) is is_ours


@pytest.mark.parametrize(("node", "must_be_us"), [(OURS, True), (None, True), (OTHERS, False)])
def test_lease_at_our_address_is_written_by_us_unless_it_names_another_node(node: str | None, must_be_us: bool) -> None:
    me = Identity(IPv4Address("192.0.2.1"), 8285, OURS)
    assert me.must_have_written(lease("192.0.2.1", 8285, node)) is must_be_us
    assert not me.must_have_written(lease("192.0.2.2", 8285, node))


def test_node_is_named_by_address_port_and_id() -> None:
    me = Identity(IPv4Address("192.0.2.1"), 8285, OURS)
    assert str(me.node_of(lease("192.0.2.2", 9000, OTHERS))) == f"192.0.2.2:9000 (node {OTHERS})"
    assert str(me.node_of(lease("192.0.2.2"))) == "192.0.2.2:8285 (node without id)"
    assert str(Node(IPv4Address("192.0.2.2"), 0, None)) == "192.0.2.2 (node without id)"


@pytest.mark.parametrize(
    ("node", "is_double"),
    [
        (Node(IPv4Address("192.0.2.1"), 8285, OTHERS), True),
        (Node(IPv4Address("192.0.2.9"), 9000, OURS), True),
        (Node(IPv4Address("192.0.2.1"), 9000, OTHERS), False),
        (Node(IPv4Address("192.0.2.9"), 8285, None), False),
    ],
    ids=["address", "clone", "port", "stranger"],
)
def test_double_has_our_address_or_our_node_id(node: Node, is_double: bool) -> None:
    assert Identity(IPv4Address("192.0.2.1"), 8285, OURS).is_double(node) is is_double


@pytest.mark.parametrize(
    ("addresses", "is_ours"),
    [
        (("192.0.2.1", None), True),
        ((None, "2001:db8::1"), True),
        (("192.0.2.1", "2001:db8::9"), True),
        (("192.0.2.9", "2001:db8::1"), False),
        ((None, "2001:db8::9"), False),
    ],
    ids=str,
)
def test_lease_that_names_one_of_our_addresses_is_ours(
    addresses: tuple[str | None, str | None], is_ours: bool
) -> None:
    """Before, a host with both had PublicIP alone, and was another one than that of its PublicIPv6."""
    ipv4, ipv6 = addresses
    public = (None if ipv4 is None else IPv4Address(ipv4), None if ipv6 is None else IPv6Address(ipv6))
    attrs = LeaseAttrs(*public, backend_data={"Port": 8285})
    held = Lease(Subnets(IPv4Network("10.244.1.0/24")), attrs)
    me = Identity(IPv4Address("192.0.2.1"), 8285, OURS, public_ipv6=IPv6Address("2001:db8::1"))
    assert me.owns(held) is me.is_double(me.node_of(held)) is is_ours


def test_double_of_a_backend_without_ports_has_our_address() -> None:
    """Its port 0 was compared with our None, so with vxlan and host-gw it was a stranger."""
    me = Identity(IPv4Address("192.0.2.1"), None, OURS)
    assert me.is_double(Node(IPv4Address("192.0.2.1"), 0, OTHERS))
    assert not me.is_double(Node(IPv4Address("192.0.2.9"), 0, OTHERS))
