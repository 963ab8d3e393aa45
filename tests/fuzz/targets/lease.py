"""Keys and values of leases: each is read or refused with a line, and no lease makes a route outside Network.

An input has a lease a line: key, blank, JSON value.  All of them come into one table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network
from itertools import pairwise
from random import Random

from tests.bad_data import LEASES
from tests.fuzz.mutate import Mutate, json_mutator, lines_mutator, words_mutator
from tests.fuzz.oracles import check_line
from udptun.backends import vxlan
from udptun.core.family import Family
from udptun.core.lease import EventType, Lease, LeaseAttrs, LeaseEvent, LeaseFormatError, Subnets, is_inside, validate
from udptun.core.lease_table import LeaseTable
from udptun.core.network_state import IPNetwork
from udptun.membership import saved
from udptun.membership.other_types import OtherTypes

NETWORK = IPv4Network("10.244.0.0/16")
OWN = IPv4Network("10.244.3.0/24")
NETWORKS: Mapping[Family, IPNetwork] = {Family.IPV4: NETWORK, Family.IPV6: IPv6Network("fd00:1::/48")}
OWNS: Mapping[Family, IPNetwork] = {Family.IPV4: OWN, Family.IPV6: IPv6Network("fd00:1:0:3::/64")}
"""By family, of the tables."""

_VALUES = (
    '{"PublicIP":"192.0.2.7","PublicIPv6":null}',
    '{"PublicIP":"192.0.2.8","PublicIPv6":"fd00::8","BackendType":"vxlan",'
    '"BackendData":{"VNI":1,"VtepMAC":"3e:a4:b3:b6:22:6a"},"BackendV6Data":{"VNI":1}}',
    '{"PublicIP":"192.0.2.9","PublicIPv6":null,"BackendType":"udp",'
    '"BackendData":{"NodeID":"6f","Udptun":1,"Port":8286,"AnySourcePort":true}}',
    '{"PublicIP":"10.244.9.9","PublicIPv6":null,"BackendType":"host-gw"}',
    '{"PublicIP":"0.0.0.0","PublicIPv6":"fd00::9","BackendType":"vxlan","BackendV6Data":{"VtepMAC":"3e:a4:b3:b6:22:6b"}}',
)
FOUND = {
    "NaN comes into a lease": b'10.244.1.0-24 {"PublicIP": "192.0.2.1", "BackendData": NaN}',
    "a large number becomes Infinity": b'10.244.1.0-24 {"PublicIP": "192.0.2.1", "BackendData": [1e999]}',
    "a BackendType begins a line of the log": b'10.244.1.0-24 {"PublicIP": "192.0.2.1", "BackendType": "a\\nb"}',
    "a reason is as long as the key": b"9" * 3000 + b" {}",
}
SEEDS = (
    *(f"10.244.{i}.0-24 {value}".encode() for i, value in enumerate(_VALUES)),
    "\n".join(f"10.244.{i + 4}.0-24&fd00:1:0:{i}::-64 {value}" for i, value in enumerate(_VALUES)).encode(),
    *(f"fd00:1:0:{i + 16}::-64 {value}".encode() for i, value in enumerate(_VALUES)),
    b"10.244.9.0-25 " + _VALUES[0].encode() + b"\n10.244.9.0-24 " + _VALUES[1].encode(),
    *(f"{key} {value}".encode() for key, value, _ in LEASES if "\n" not in key + value and len(value) < 4000),
)

_KEY = words_mutator((b"10.244.", b".0-24", b"-25", b"-16", b"-30", b"&fd00:1::-64", b"0", b"255", b"&::ffff:1:2-128"))
_VALUE = json_mutator(
    (
        *("PublicIP", "PublicIPv6", "BackendType", "BackendData", "BackendV6Data", "VNI", "VtepMAC", "NodeID"),
        *("Udptun", "Port", "AnySourcePort"),
    ),
    ("192.0.2.1", "10.244.9.9", "02:00:00:00:00:01", "01:00:5e:00:00:01", "vxlan", "udp", "host-gw", "ipsec\n"),
)


def _line(data: bytes, random: Random) -> bytes:
    key, blank, value = data.partition(b" ")
    of_key = not blank or random.random() < 0.3
    return _KEY(key, random) + blank + value if of_key else key + blank + _VALUE(value, random)


mutate: Mutate = lines_mutator(_line)


def check(data: bytes) -> None:
    leases = [lease for line in data.split(b"\n")[:50] if (lease := _read(line)) is not None]
    for family in Family:
        _check_family(leases, family)


def _check_family(leases: list[Lease], family: Family) -> None:
    def refusal(lease: Lease) -> str | None:
        return vxlan.refusal(lease, family)

    network = NETWORKS[family]
    table = LeaseTable(
        *(family, network, [network], OWNS[family], lambda _: False, refusal, ("vxlan",)), outer=lambda _: family
    )
    other_types = OtherTypes(table.of_other_type, "vxlan")
    known: dict[str, Lease] = {}
    for lease in leases:
        _take(known, table.update([LeaseEvent(EventType.ADDED, lease)]))
        _check_table(table, known, other_types)
    for lease in leases:
        _take(known, table.update([LeaseEvent(EventType.REMOVED, lease)]))
        _check_table(table, known, other_types)
    assert not known
    if leases:
        _take(known, table.reset(leases))
        _check_table(table, known, other_types)


def _read(line: bytes) -> Lease | None:
    try:
        key, _, value = line.decode("utf-8", "surrogatepass").partition(" ")
    except UnicodeDecodeError:
        return None
    subnets = attrs = None
    try:
        subnets = Subnets.from_key(key)
    except LeaseFormatError as exc:
        check_line(str(exc))
    try:
        attrs = LeaseAttrs.from_json(value)
    except LeaseFormatError as exc:
        check_line(str(exc))
    if subnets is not None:
        assert Subnets.from_key(subnets.key) == subnets
    if attrs is not None:
        _check_attrs(attrs)
    if subnets is None or attrs is None:
        return None
    lease = Lease(subnets, attrs, 1e9, 7)
    last = saved.LastLeases("{}", NETWORK, Lease(Subnets(OWN), attrs, 1e9), (lease,))
    again = saved.parse(saved.render(last, 5.0), NETWORK, 5.0)
    assert again.last is not None, again.reason
    assert [(it.subnets, it.attrs) for it in again.last.peers] == [(subnets, attrs)]
    for family, network in NETWORKS.items():
        if subnets.of(family) is not None and (reason := validate(lease, family, network, [network], family)):
            check_line(reason)
    return lease


def _check_attrs(attrs: LeaseAttrs) -> None:
    text = attrs.to_json()
    json.loads(text, parse_constant=_refuse)
    assert LeaseAttrs._parse(text) == attrs
    assert 0 < attrs.port(8285) < 65536
    assert attrs.node_id is None or isinstance(attrs.node_id, str)
    assert attrs.is_udptun in (True, False)
    assert attrs.takes_any_source_port in (True, False)


def _refuse(name: str) -> None:
    raise AssertionError(f"{name} in a lease: Go reads none of it")


def _take(known: dict[str, Lease], events: list[LeaseEvent]) -> None:
    """As a backend does: a removal is of what it has, and what is added replaces nothing else."""
    for event in events:
        if event.type is EventType.REMOVED:
            assert event.lease.key in known
            del known[event.lease.key]
        else:
            known[event.lease.key] = event.lease


def _check_table(table: LeaseTable, known: dict[str, Lease], other_types: OtherTypes) -> None:
    assert dict(table.peers) == known
    family, parts = table.family, [table.part(lease) for lease in known.values()]
    spans = sorted((int(it.subnet.network_address), int(it.subnet.broadcast_address)) for it in parts)
    assert all(last < first for (_, last), (first, _) in pairwise(spans)), "two peers overlap"
    for part in parts:
        assert is_inside(part.subnet, NETWORKS[family])
        assert not part.subnet.overlaps(OWNS[family])
        assert family is Family.IPV6 or 16 <= part.subnet.prefixlen <= 30
        assert part.subnet.prefixlen <= family.bits - 2
        assert part.public_ip not in NETWORKS[family]
        assert not part.public_ip.is_multicast
        assert not part.public_ip.is_loopback
        assert vxlan.mac_in(part).count(":") == 5
    for key, reason in table.refused.items():
        assert key not in known
        check_line(f"{key}: {reason}")
    for line in other_types.problems:
        check_line(line)
