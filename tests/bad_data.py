"""What operators, other programs and accidents put where a config, a lease or a subnet.env should be.

Each with words of the one line that must be said about it.
"""

from __future__ import annotations

import json


def _value(public_ip: object, **more: object) -> str:
    return json.dumps({"PublicIP": public_ip, "PublicIPv6": None, **more})


GOOD = _value("192.0.2.200")

LEASES: list[tuple[str, str, str]] = [
    # Keys that are none.
    ("config", GOOD, "is not of the form"),
    ("", GOOD, "is not of the form"),
    ("junk", GOOD, "is not of the form"),
    ("10.244.150.0", GOOD, "is not of the form"),
    ("10.244.150.0/24", GOOD, "is not of the form"),
    ("10.244.150.0-024", GOOD, "is not of the form"),
    ("10.244.150.0-24hi", GOOD, "is not of the form"),
    ("10.244.150.0-24/sub", GOOD, "is not of the form"),
    ("10.244.150.0-24&", GOOD, "is not of the form"),
    ("fd00:1::1-64", GOOD, "host bits"),
    ("&fd00:1::-64", GOOD, "is not of the form"),
    ("10.244.150.0-24\n", GOOD, "is not of the form"),
    ("10.244.300.0-24", GOOD, "300"),
    ("10.244.0150.0-24", GOOD, "0150"),
    ("10.244.150.7-24", GOOD, "has host bits set"),
    ("10.244.150.0-33", GOOD, "33"),
    ("10.244.150.0-24&fd00:::-64", GOOD, "fd00"),
    ("10.244.150.0-24&fd00:1::-129", GOOD, "129"),
    # Values that are none.
    ("10.244.151.0-24", "", "not JSON"),
    ("10.244.152.0-24", "{", "not JSON"),
    ("10.244.153.0-24", "[" * 100_000, "not JSON"),
    ("10.244.104.0-24", "9" * 5000, "not JSON"),
    ("10.244.105.0-24", "null", "a lease is a JSON object"),
    ("10.244.106.0-24", "[]", "a lease is a JSON object"),
    ("10.244.107.0-24", "{}", "PublicIP is missing"),
    ("10.244.108.0-24", _value(None), "PublicIP is missing"),
    ("10.244.109.0-24", _value(3232235777), "PublicIP is missing or not a string"),
    ("10.244.110.0-24", _value(""), "Address cannot be empty"),
    ("10.244.111.0-24", _value("2001:db8::1"), "2001:db8::1"),
    ("10.244.112.0-24", _value("host.example"), "host.example"),
    ("10.244.113.0-24", _value("192.0.2.1/24"), "192.0.2.1/24"),
    ("10.244.114.0-24", _value("192.0.2.256"), "256"),
    ("10.244.115.0-24", _value("192.0.2.1\nPeer: x"), "Only decimal digits"),
    ("10.244.116.0-24", _value("1" * 100_000), "Expected 4 octets"),
    ("10.244.117.0-24", _value("192.0.2.117", PublicIPv6="192.0.2.1"), "192.0.2.1"),
    ("10.244.118.0-24", _value("192.0.2.118", PublicIPv6=7), "PublicIPv6 is missing or not a string"),
    ("10.244.119.0-24", _value("192.0.2.119", BackendType=7), "BackendType is not a string"),
    # Addresses that no peer can have.
    ("10.244.120.0-24", _value("0.0.0.0"), "PublicIP 0.0.0.0 is not a unicast address"),
    ("10.244.121.0-24", _value("127.0.0.1"), "PublicIP 127.0.0.1 is not a unicast address"),
    ("10.244.122.0-24", _value("224.0.0.1"), "PublicIP 224.0.0.1 is not a unicast address"),
    ("10.244.123.0-24", _value("239.1.2.3"), "PublicIP 239.1.2.3 is not a unicast address"),
    ("10.244.124.0-24", _value("255.255.255.255"), "PublicIP 255.255.255.255 is not a unicast address"),
    ("10.244.125.0-24", _value("240.0.0.1"), "PublicIP 240.0.0.1 is not a unicast address"),
    ("10.244.126.0-24", _value("10.244.126.1"), "PublicIP 10.244.126.1 lies inside Network"),
    # Subnets that are nobody's to lease.
    ("0.0.0.0-0", GOOD, "subnet 0.0.0.0/0 "),
    ("10.0.0.0-8", GOOD, "subnet 10.0.0.0/8 "),
    ("10.9.0.0-24", GOOD, "subnet 10.9.0.0/24 is outside Network"),
    ("192.0.2.0-24", GOOD, "subnet 192.0.2.0/24 is outside Network"),
    ("224.0.0.0-24", GOOD, "subnet 224.0.0.0/24 is outside Network"),
    ("10.244.127.0-31", GOOD, "prefix length 31 is outside"),
    ("10.244.127.2-32", GOOD, "prefix length 32 is outside"),
    ("10.244.0.0-16", GOOD, "overlaps"),
]
"""Key, value, and words of the reason: none of them can be used in Network 10.244.0.0/16."""

CONFIGS: list[tuple[str, str]] = [
    ("", "not JSON"),
    ("{", "not JSON"),
    ("null", "JSON object"),
    ("[]", "JSON object"),
    ("7", "JSON object"),
    ("[" * 100_000, "JSON"),
    ("{}", "Network"),
    ('{"Network": null}', "Network"),
    ('{"Network": 10}', "Network"),
    ('{"Network": ""}', "Network"),
    ('{"Network": "10.244.0.0"}', "Network"),
    ('{"Network": "10.244.0.0/33"}', "Network"),
    ('{"Network": "fd00:1::/48"}', "Network"),
    ('{"Network": "10.0.0.0/7"}', "Network"),
    ('{"Network": "127.0.0.0/8"}', "Network"),
    ('{"Network": "224.0.0.0/8"}', "Network"),
    ('{"Network": "10.244.0.0/29"}', "too small"),
    ('{"Network": "10.244.0.0/16", "SubnetLen": 31}', "SubnetLen"),
    ('{"Network": "10.244.0.0/16", "SubnetLen": 17}', "four subnets"),
    ('{"Network": "10.244.0.0/16", "SubnetLen": "24"}', "SubnetLen"),
    ('{"Network": "10.244.0.0/16", "SubnetLen": -1}', "SubnetLen"),
    ('{"Network": "10.244.0.0/16", "SubnetMin": "10.9.0.0"}', "SubnetMin"),
    ('{"Network": "10.244.0.0/16", "SubnetMin": "10.244.3.7"}', "SubnetMin"),
    ('{"Network": "10.244.0.0/16", "SubnetMax": "x"}', "SubnetMax"),
    ('{"Network": "10.244.0.0/16", "SubnetMin": "10.244.9.0", "SubnetMax": "10.244.3.0"}', "SubnetM"),
    ('{"Network": "10.244.0.0/16", "EnableIPv4": false}', "EnableIPv4"),
    ('{"Network": "10.244.0.0/16", "EnableIPv4": "yes"}', "EnableIPv4"),
    ('{"Network": "10.244.0.0/16", "EnableIPv6": true}', "IPv6Network"),
    ('{"Network": "10.244.0.0/16", "Backend": 7}', "Backend"),
    ('{"Network": "10.244.0.0/16", "Backend": {}}', "Backend.Type"),
    ('{"Network": "10.244.0.0/16", "Backend": {"Type": 7}}', "Type"),
    ('{"Network": "10.244.0.0/16", "Backend": {"Type": "upd"}}', "upd"),
    ('{"Network": "10.244.0.0/16", "Backend": {"Type": "udp", "Port": 0}}', "Port"),
    ('{"Network": "10.244.0.0/16", "Backend": {"Type": "udp", "Port": 99999}}', "Port"),
    ('{"Network": "10.244.0.0/16", "Backend": {"Type": "udp", "Port": "8285"}}', "Port"),
    ('{"Network": "10.244.0.0/16", "Backend": {"Type": "udp", "MTU": 10}}', "MTU"),
]
"""The text of a net-conf.json, and words of the problem that is found in it."""

SUBNET_ENVS: list[tuple[bytes, str]] = [
    (b"", "no FLANNEL_SUBNET or FLANNEL_IPV6_SUBNET in it"),
    (b"\0\0\0", "no FLANNEL_SUBNET or FLANNEL_IPV6_SUBNET in it"),
    (b"\xff\xfe\xfa", "no FLANNEL_SUBNET or FLANNEL_IPV6_SUBNET in it"),
    (b"FLANNEL_SUBNET", "no FLANNEL_SUBNET or FLANNEL_IPV6_SUBNET in it"),
    (b"FLANNEL_SUBNET=\n", "no FLANNEL_SUBNET or FLANNEL_IPV6_SUBNET in it"),
    (b"FLANNEL_NETWORK=10.244.0.0/16\n", "no FLANNEL_SUBNET or FLANNEL_IPV6_SUBNET in it"),
    (b"FLANNEL_SUBNET=nonsense\n", "FLANNEL_SUBNET: 'nonsense' is not a subnet"),
    (b"FLANNEL_SUBNET=10.244.3.1\n", "FLANNEL_SUBNET: '10.244.3.1' is not a subnet"),
    (b"FLANNEL_SUBNET=10.244.3.1/33\n", "FLANNEL_SUBNET: '10.244.3.1/33' is not a subnet"),
    (b"FLANNEL_SUBNET=fd00::1/64\n", "FLANNEL_SUBNET: 'fd00::1/64' is not a subnet"),
    (b"FLANNEL_SUBNET=10.1.1.1/24,10.1.2.1/24\n", "FLANNEL_SUBNET: 2 subnets where one is expected"),
    (b"FLANNEL_SUBNET=" + b"1" * 200_000, "is not a subnet"),
]
"""The content of a subnet.env, and words of the reason why no previous subnet is taken from it."""
