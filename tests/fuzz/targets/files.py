"""Files that others may have written or damaged: subnet.env, a leases file, the saved table.

The first line of an input says which of them the rest is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from ipaddress import IPv4Network
from itertools import pairwise
from random import Random

from tests.bad_data import SUBNET_ENVS
from tests.fuzz.mutate import json_mutator, words_mutator
from tests.fuzz.oracles import check_line, check_lines
from udptun.config import env_file, subnet_env
from udptun.core.errors import ConfigError
from udptun.core.family import Family
from udptun.core.lease import Lease, LeaseAttrs, Subnets
from udptun.membership import saved
from udptun.stores import file

NETWORK = IPv4Network("10.244.0.0/16")
NOW_S = 1_800_000_000.0

_LAST = saved.LastLeases(
    '{"Network": "10.244.0.0/16"}',
    NETWORK,
    Lease(Subnets.from_key("10.244.3.0-24"), LeaseAttrs.from_json('{"PublicIP":"192.0.2.3"}'), NOW_S + 80_000),
    tuple(
        Lease(Subnets.from_key(key), LeaseAttrs.from_json('{"PublicIP":"192.0.2.4","BackendType":"udp"}'), expires_s)
        for key, expires_s in (("10.244.4.0-24", NOW_S + 5), ("10.244.5.0-24&fd00:1::-64", None))
    ),
)
_ENTRIES = (
    '[{"Subnet": "10.244.1.0/24", "PublicIP": "192.0.2.1", "Port": 8285, "Node": "alpha"}, '
    '{"subnet": "10.244.2.0/24", "publicip": "192.0.2.2"}]'
)
FOUND = {
    "a saved lease never expires": b"saved\n" + saved.render(_LAST, NOW_S).replace(f"{NOW_S + 5}", "NaN").encode(),
    "a saved lease expires at the end of time": b"saved\n"
    + saved.render(_LAST, NOW_S).replace(f"{NOW_S + 5}", "1e999").encode(),
    "a Node of a leases file is 5,000 characters long": b'leases\n[{"Subnet": "%s"}]' % (b"x" * 5000),
    "each of hundreds of subnets has its words": b"env\nFLANNEL_SUBNET=" + b"x," * 300,
    "the Network of a saved file has a zone": b"saved\n"
    + saved.render(_LAST, NOW_S).replace('"network":"10.244.0.0/16"', r'"network":"fe80::1%a\nb/128"').encode(),
    "a schema is 5,000 characters long": b'saved\n{"schema": "%s"}' % (b"x" * 5000),
}
SEEDS = (
    *(b"env\n" + text for text, _ in SUBNET_ENVS if len(text) < 4000),
    b"env\nFLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.3.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n",
    b"env\nexport FLANNEL_IPV6_SUBNET='fd00:1::1/64' # x\nFLANNEL_SUBNET=\"10.244.3.1/24\"\nDOCKER_OPT_BIP=x\n",
    b"leases\n" + _ENTRIES.encode(),
    b"saved\n" + saved.render(_LAST, NOW_S).encode(),
)

_ENV = words_mutator(
    (
        *(b"FLANNEL_SUBNET=", b"FLANNEL_NETWORK=", b"FLANNEL_IPV6_SUBNET=", b"FLANNEL_MTU=", b"FLANNEL_IPMASQ=true\n"),
        *(b"10.244.3.1/24", b"fd00:1::1/64", b",", b"'", b'"', b"\n", b" #", b"export ", b"/33", b"%eth0", b"\xd9\xa1"),
    )
)
_LEASES = json_mutator(
    ("Subnet", "PublicIP", "IPv6Subnet", "PublicIPv6", "Port", "Node", "port"),
    ("10.244.3.0/24", "10.244.0.0/30", "fd00:1::/64", "fd00::7", "0.0.0.0", 8285),
)
_SAVED = json_mutator(
    ("schema", "saved_at", "config", "network", "own", "peers", "key", "value", "expires"),
    ("10.244.9.0-24", '{"PublicIP":"192.0.2.9"}', NOW_S, NOW_S - 9, 2, {}, []),
)
_MUTATORS = {b"env": _ENV, b"leases": _LEASES, b"saved": _SAVED}


def mutate(data: bytes, random: Random) -> bytes:
    kind, _, text = data.partition(b"\n")
    if kind not in _MUTATORS or random.random() < 0.02:
        kind = random.choice(list(_MUTATORS))
    return kind + b"\n" + _MUTATORS[kind](text, random)


def check(data: bytes) -> None:
    kind, _, text = data.partition(b"\n")
    checks: dict[bytes, Callable[[str], None]] = {b"env": _env, b"leases": _leases, b"saved": _saved}
    if kind in checks:
        checks[kind](text.decode(errors="replace"))


def _env(text: str) -> None:
    subnets, wrong = subnet_env.parse(text)
    if wrong:
        check_line(wrong)
    assert subnets is not None or wrong
    networks = subnet_env.parse_networks(text)
    assert networks is None or len(networks) == 2
    for name, value in env_file.parse(text).items():
        assert name.isidentifier()
        assert len(value.splitlines()) <= 1
    for line in text.splitlines():
        assert env_file.name_of(line) == next(iter(env_file.parse(line)), "")


def _leases(text: str) -> None:
    try:
        leases = file.parse(text)
    except ConfigError as exc:
        check_lines(exc.problems)
        return
    check_lines(leases.skipped)
    for family in Family:
        subnets = [subnet for it in leases.entries if (subnet := it.lease.subnets.of(family)) is not None]
        spans = sorted((int(subnet[0]), int(subnet[-1])) for subnet in subnets)
        assert all(last < first for (_, last), (first, _) in pairwise(spans))
    for entry in leases.entries:
        assert Subnets.from_key(entry.lease.key) == entry.lease.subnets
        assert LeaseAttrs.from_json(entry.lease.attrs.to_json()) == entry.lease.attrs
        subnets, attrs = entry.lease.subnets, entry.lease.attrs
        fields = {"Subnet": subnets.ipv4, "PublicIP": attrs.public_ip}
        fields |= {"IPv6Subnet": subnets.ipv6, "PublicIPv6": attrs.public_ipv6}
        again = {key: str(value) for key, value in fields.items() if value is not None} | {"Node": entry.node}
        port = entry.lease.attrs.port(0)
        (found,) = file.parse(json.dumps([again | ({"Port": port} if port else {})])).entries
        assert (found.lease, found.node) == (entry.lease, entry.node)


def _saved(text: str) -> None:
    found = saved.parse(text, NETWORK, NOW_S)
    if found.last is None:
        check_line(found.reason)
        return
    last = found.last
    assert last.network == NETWORK
    for lease in (last.own, *last.peers):
        assert not lease.is_expired(NOW_S)
        assert lease.expires_s is None or math.isfinite(lease.expires_s + 1e6)
    assert saved.parse(saved.render(last, NOW_S), NETWORK, NOW_S) == found
