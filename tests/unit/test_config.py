"""net-conf.json: flannel's defaults, its leniency, and one clear line for everything that is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

import pytest
from any_text import TEXT
from fake_store import FakeStore
from hypothesis import given
from hypothesis import strategies as st

from udptun.backends.alloc import AllocKeys
from udptun.backends.base import Backend, LiveSettings, check_underlay, mtu_for
from udptun.backends.choice import KernelSupport, choose, parse_net_conf
from udptun.backends.hostgw import HostGwKeys
from udptun.backends.udp import UdpKeys
from udptun.backends.vxlan import Fallback, VxlanKeys
from udptun.config.flags import Options, parse_daemon_flags
from udptun.config.net_conf import (
    BackendKeys,
    LogLevel,
    NetConf,
    SubnetPool,
    keys_that_need_a_restart,
)
from udptun.control.settings import check_store, live_settings, underlay_options
from udptun.control.settings import lack as lack_of
from udptun.core.errors import ConfigError
from udptun.core.family import Family
from udptun.core.lease import Subnets
from udptun.core.tunnel import AS_MANY_AS_WORKERS, ShortcutMode, SourceCheck, default_workers
from udptun.datapath.settings import OUTER_HEADERS
from udptun.kernel.underlay import Underlay

IPV4_PODS: dict[str, object] = {"Network": "10.3.0.0/16"}
IPV6_PODS: dict[str, object] = {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "fd00:3::/48"}


@pytest.fixture(autouse=True)
def _ipv6_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine's own eth0 has."""
    monkeypatch.setattr("udptun.control.settings.read_sysctl", lambda path: "0")


def parse(text: str) -> NetConf:
    return parse_net_conf(text, "net-conf.json")


def problems(text: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert caught.value.exit_status == 2
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


def test_config_gets_flannels_defaults_when_only_a_lower_case_network_is_given() -> None:
    conf = parse('{"network":"10.3.0.0/16"}')
    assert conf == NetConf(
        enable_nftables=False,
        ipv4=SubnetPool(
            network=IPv4Network("10.3.0.0/16"),
            subnet_min=IPv4Address("10.3.1.0"),
            subnet_max=IPv4Address("10.3.255.0"),
            subnet_len=24,
        ),
        ipv6=None,
        backend=UdpKeys(port=8285, mtu=None, workers=None, source_check=SourceCheck.PEER),
        notes=(),
    )


def test_config_takes_overrides_of_the_ipv4_range() -> None:
    conf = parse(
        '{"Network":"10.3.0.0/16","SubnetMin":"10.3.5.0","SubnetMax":"10.3.8.0","SubnetLen":28,'
        '"Backend":{"Type":"udp","Port":7890}}'
    )
    pool = conf.ipv4
    assert (str(pool.subnet_min), str(pool.subnet_max), pool.subnet_len) == ("10.3.5.0", "10.3.8.0", 28)
    assert conf.backend == UdpKeys(port=7890)


def test_config_takes_words_in_any_letter_case() -> None:
    text = '{"Network":"10.3.0.0/16","Backend":{"Type":"UDP","SourceCheck":"OFF","logLevel":"Warning"}}'
    backend = parse(text).backend
    assert isinstance(backend, UdpKeys)
    assert (backend.source_check, backend.log_level) == (SourceCheck.OFF, LogLevel.WARNING)


def test_config_gets_flannels_ipv6_defaults() -> None:
    conf = parse('{"EnableIPv6":true,"Network":"10.3.0.0/16","IPv6Network":"fc00::/48"}')
    first, last = IPv6Address("fc00:0:0:1::"), IPv6Address("fc00:0:0:ffff::")
    assert conf.ipv6 == SubnetPool(IPv6Network("fc00::/48"), first, last, 64)


def test_config_takes_ipv6_alone_and_asks_for_no_network_then() -> None:
    conf = parse('{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48","Backend":{"Type":"vxlan"}}')
    assert conf.ipv4 is None
    assert conf.families == (Family.IPV6,)
    assert conf.network == IPv6Network("fc00::/48")


def test_config_takes_overrides_of_the_ipv6_range() -> None:
    conf = parse(
        '{"EnableIPv6":true,"Network":"10.3.0.0/16","IPv6Network":"fc00::/48","IPv6SubnetMin":"fc00:0:0:1::",'
        '"IPv6SubnetMax":"fc00:0:0:f::","IPv6SubnetLen":124}'
    )
    first, last = IPv6Address("fc00:0:0:1::"), IPv6Address("fc00:0:0:f::")
    assert conf.ipv6 == SubnetPool(IPv6Network("fc00::/48"), first, last, 124)


@pytest.mark.parametrize(
    ("network", "subnet_len", "first", "last"),
    [
        ("10.0.0.0/8", 24, "10.0.1.0", "10.255.255.0"),
        ("10.244.0.0/22", 24, "10.244.1.0", "10.244.3.0"),
        ("10.244.0.0/23", 25, "10.244.0.128", "10.244.1.128"),
        ("10.244.0.0/26", 28, "10.244.0.16", "10.244.0.48"),
        ("10.244.0.0/28", 30, "10.244.0.4", "10.244.0.12"),
    ],
)
def test_config_derives_the_subnets_from_the_network(network: str, subnet_len: int, first: str, last: str) -> None:
    conf = parse(json.dumps({"Network": network}))
    pool = conf.ipv4
    assert (pool.subnet_len, str(pool.subnet_min), str(pool.subnet_max)) == (subnet_len, first, last)


def test_config_masks_host_bits_of_the_network() -> None:
    assert parse('{"Network":"10.3.4.5/16"}').network == IPv4Network("10.3.0.0/16")


def test_config_reads_keys_and_backend_type_in_any_letter_case() -> None:
    conf = parse('{"NETWORK":"10.3.0.0/16","backend":{"type":"UDP","port":9000,"sourcecheck":"strict"}}')
    assert conf.backend == UdpKeys(port=9000, source_check=SourceCheck.STRICT)


def test_config_takes_every_backend_key() -> None:
    conf = parse(
        '{"Network":"10.3.0.0/16","EnableNFTables":true,'
        '"Backend":{"Type":"udp","Port":1,"MTU":9000,"Workers":16,"SourceCheck":"off"}}'
    )
    assert conf.backend == UdpKeys(port=1, mtu=9000, workers=16, source_check=SourceCheck.OFF)
    assert conf.enable_nftables


@pytest.mark.parametrize(("text", "ports"), [("4", 4), ('"auto"', AS_MANY_AS_WORKERS), ('"AUTO"', AS_MANY_AS_WORKERS)])
def test_config_takes_a_number_of_source_ports_or_auto(text: str, ports: int) -> None:
    conf = parse('{"Network":"10.3.0.0/16","Backend":{"Type":"udp","SourcePorts":' + text + "}}")
    assert conf.backend == UdpKeys(source_ports=ports)


def live(options: Options, keys: BackendKeys) -> LiveSettings:
    """What a host with these flags runs with, on an interface with an MTU of 1500."""
    address = IPv4Address("192.0.2.1")
    conf = replace(parse('{"Network":"10.3.0.0/16"}'), backend=keys)
    return live_settings(options, conf, Underlay("eth0", 2, 1500, address, address), backend(keys), None)


@pytest.mark.parametrize("keys", [UdpKeys, VxlanKeys, HostGwKeys])
def test_peers_are_probed_unless_the_flag_or_the_config_says_no(
    keys: type[UdpKeys] | type[VxlanKeys] | type[HostGwKeys],
) -> None:
    def is_on(flags: list[str], keys: BackendKeys) -> bool:
        return live(parse_daemon_flags(flags, {}), keys).probe

    conf = '{"Network":"10.3.0.0/16","Backend":{"Type":"' + keys.type + '","Probe":false}}'
    assert parse(conf).backend == keys(probe=False)
    assert is_on([], keys())
    assert not is_on([], keys(probe=False))
    assert is_on(["--probe"], keys(probe=False))
    assert not is_on(["--probe=false"], keys())


@pytest.mark.parametrize(
    ("argv", "keys", "mode"),
    [
        ([], UdpKeys(), "off"),
        ([], UdpKeys(shortcut=ShortcutMode.AUTO), "auto"),
        (["--shortcut=auto"], UdpKeys(), "auto"),
        (["--shortcut=off"], UdpKeys(shortcut=ShortcutMode.REQUIRE), "off"),
        (["--shortcut=auto"], VxlanKeys(), "off"),
    ],
)
def test_the_shortcut_is_the_flags_then_the_configs(argv: list[str], keys: BackendKeys, mode: str) -> None:
    assert live(parse_daemon_flags(argv, {}), keys).shortcut == mode


def test_a_shortcut_that_is_required_and_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("udptun.datapath.shortcut.programs.find_lack", lambda: "this kernel is too old")
    with pytest.raises(ConfigError, match="Shortcut: it is required, and this host cannot have it: this kernel is too"):
        live(parse_daemon_flags(["--shortcut=require"], {}), UdpKeys())
    assert live(parse_daemon_flags(["--shortcut=auto"], {}), UdpKeys()).shortcut == "auto"


@pytest.mark.parametrize(
    ("argv", "keys", "ports"),
    [
        ([], UdpKeys(), 1),
        ([], UdpKeys(source_ports=4), 4),
        ([], UdpKeys(source_ports=AS_MANY_AS_WORKERS, workers=3), 3),
        (["--workers=5"], UdpKeys(source_ports=AS_MANY_AS_WORKERS, workers=3), 5),
        (["--source-ports=2"], UdpKeys(source_ports=4), 2),
        (["--source-ports=1"], UdpKeys(source_ports=4), 1),
        (["--source-ports=auto", "--workers=6"], UdpKeys(source_ports=4), 6),
        (["--source-ports=4"], VxlanKeys(), 1),
    ],
)
def test_source_ports_are_the_flags_then_the_configs_and_auto_is_one_a_worker(
    argv: list[str], keys: BackendKeys, ports: int
) -> None:
    options = parse_daemon_flags(argv, {})
    assert live(options, keys).source_ports == ports


@pytest.mark.parametrize(
    ("kind", "pods", "argv", "wanted"),
    [
        ("udp", IPV4_PODS, [], (Family.IPV4,)),
        ("udp", IPV4_PODS, ["--public-ipv6=2001:db8::1"], tuple(Family)),
        ("udp", IPV4_PODS, ["--iface=eth0", "--iface=2001:db8::1"], tuple(Family)),
        ("udp", IPV4_PODS, ["--iface=eth0", "--iface=192.0.2.1"], (Family.IPV4,)),
        ("udp", IPV4_PODS, ["--iface-can-reach=2001:db8::1"], tuple(Family)),
        ("udp", IPV6_PODS, [], tuple(Family)),
        ("vxlan", IPV4_PODS, ["--public-ipv6=2001:db8::1"], (Family.IPV4,)),
        ("vxlan", IPV6_PODS, [], (Family.IPV6,)),
    ],
)
def test_udp_looks_for_an_address_of_either_family_whatever_the_pods_have(
    kind: str, pods: dict[str, object], argv: list[str], wanted: tuple[Family, ...]
) -> None:
    conf = parse(json.dumps({**pods, "Backend": {"Type": kind}}))
    options = underlay_options(parse_daemon_flags(argv, {}), conf)
    assert options.families == wanted


def test_config_takes_every_key_of_a_vxlan_backend() -> None:
    conf = parse(
        '{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan","VNI":7,"Port":4789,"GBP":true,"Learning":true,'
        '"DirectRouting":true,"MTU":9000,"Userspace":true,"Fallback":"udp","LogLevel":"debug","Workers":2}}'
    )
    assert conf.backend == VxlanKeys(
        vni=7,
        port=4789,
        gbp=True,
        learning=True,
        direct_routing=True,
        mtu=9000,
        userspace=True,
        fallback=Fallback.UDP,
        log_level=LogLevel.DEBUG,
        workers=2,
    )
    assert conf.notes == ()


@pytest.mark.parametrize(
    ("backend", "wanted"),
    [
        ('{"Type":"vxlan"}', VxlanKeys()),
        ('{"Type":"vxlan","Port":0,"VNI":0}', VxlanKeys(vni=0, port=8472)),
        ('{"type":"Host-GW"}', HostGwKeys()),
        ('{"Type":"alloc"}', AllocKeys()),
    ],
)
def test_config_gets_flannels_defaults_for_each_type(backend: str, wanted: BackendKeys) -> None:
    assert parse(f'{{"Network":"10.3.0.0/16","Backend":{backend}}}').backend == wanted


def test_config_notes_a_key_of_another_backend_type() -> None:
    conf = parse('{"Network":"10.3.0.0/16","Backend":{"Type":"udp","VNI":3}}')
    assert conf.notes == ("net-conf.json: Backend.VNI: is for Type vxlan; Type udp ignores it",)


def test_config_notes_the_keys_of_a_family_that_is_not_enabled() -> None:
    """They had no effect in silence: a host with IPv6Network and without EnableIPv6 has no IPv6."""
    conf = parse('{"Network":"10.3.0.0/16","IPv6Network":"fc00::/48","IPv6SubnetLen":64}')
    assert conf.notes == (
        "net-conf.json: IPv6Network, IPv6SubnetLen: not used without EnableIPv6; set that to true, or leave this out",
    )
    assert parse('{"Network":"10.3.0.0/16","IPv6Network":"fc00::/48","EnableIPv6":true}').notes == ()


def test_config_tells_what_is_odd_beside_what_is_wrong() -> None:
    with pytest.raises(ConfigError) as caught:
        parse('{"Network":"10.3.0.0/33","Zebra":1}')
    assert len(caught.value.problems) == 1
    assert caught.value.notes == ("net-conf.json: Zebra: unknown key, ignored",)


def test_keys_that_need_a_restart_are_named_as_the_file_has_them() -> None:
    def vxlan(**keys: object) -> NetConf:
        return parse(net(Backend={"Type": "vxlan", **keys}))

    assert keys_that_need_a_restart(vxlan(), vxlan(MTU=1400, Workers=2, LogLevel="debug")) == []
    assert keys_that_need_a_restart(vxlan(), vxlan(VNI=2, GBP=True, DirectRouting=True)) == [
        "Backend.VNI",
        "Backend.GBP",
        "Backend.DirectRouting",
    ]
    assert keys_that_need_a_restart(vxlan(), parse(net(EnableNFTables=True))) == [
        "EnableNFTables",
        "Backend.Type",
    ]


def test_config_counts_null_and_zero_values_as_not_given() -> None:
    conf = parse(
        '{"Network":"10.3.0.0/16","SubnetLen":0,"SubnetMin":"0.0.0.0","SubnetMax":null,"EnableIPv4":null,'
        '"Backend":{"Type":"udp","Port":null,"MTU":0}}'
    )
    assert conf == parse('{"Network":"10.3.0.0/16"}')


def test_config_ignores_unknown_keys_and_notes_what_they_may_mean() -> None:
    conf = parse('{"Network":"10.3.0.0/16","SubnetLength":25,"Zebra":[{}],"Backend":{"Type":"udp","Prt":9}}')
    assert conf.ipv4.subnet_len == 24
    assert conf.notes == (
        "net-conf.json: SubnetLength: unknown key, ignored; did you mean SubnetLen?",
        "net-conf.json: Zebra: unknown key, ignored",
        "net-conf.json: Backend.Prt: unknown key, ignored; did you mean Backend.Port?",
    )


def test_config_ignores_what_is_wrong_with_the_range_of_a_disabled_family() -> None:
    assert parse('{"Network":"10.3.0.0/16","IPv6Network":"fc00::/127","IPv6SubnetLen":3}').ipv6 is None


@pytest.mark.parametrize(
    ("keys", "underlay", "lack", "mtus"),
    [
        (UdpKeys(), {}, "", (1472, 1472, 1472)),
        (UdpKeys(), {"ipv6": None, "public_ipv6": None, "ipv6_problem": "eth0 has none"}, "", (1472, 1472, 1472)),
        (
            UdpKeys(),
            {"mtu": 1307},
            "an underlay MTU of 1307 leaves 1279 bytes for the pods' packets; IPv6 needs 1280, so the underlay needs "
            "1308",
            (1279, None, 1279),
        ),
        (VxlanKeys(), {}, "", (1450, 1430, 1430)),
        (HostGwKeys(), {}, "", (1500, 1500, 1500)),
        (AllocKeys(), {}, "", (1500, 1500, 1500)),
        (VxlanKeys(), {"ipv6": None, "ipv6_problem": "eth0 has none"}, "eth0 has none", (1450, None, 1450)),
        (VxlanKeys(), {"mtu": 1350}, "", (1300, 1280, 1280)),
        *(
            (
                VxlanKeys(),
                {name: IPv6Address("fc00:0:0:9::1")},
                "this host's fc00:0:0:9::1 lies in fc00:0:0:8::/61, where hosts lease their subnets; "
                "choose another IPv6Network",
                (1450, None, 1450),
            )
            for name in ("ipv6", "public_ipv6")
        ),
        (
            VxlanKeys(),
            {"mtu": 1349},
            "an underlay MTU of 1349 leaves 1279 bytes for the pods' packets; IPv6 needs 1280, so the underlay needs "
            "1350",
            (1299, None, 1299),
        ),
        (VxlanKeys(userspace=True), {}, "", (1450, 1430, 1430)),
    ],
)
def test_ipv6_is_carried_or_the_reason_is_said_and_ipv4_is_not_touched(
    keys: BackendKeys, underlay: dict[str, object], lack: str, mtus: tuple[int, int | None, int]
) -> None:
    conf = replace(parse('{"EnableIPv6":true,"Network":"10.3.0.0/16","IPv6Network":"fc00::/48"}'), backend=keys)
    own = IPv4Address("192.0.2.1"), IPv6Address("2001:db8::1")
    here = replace(Underlay("eth0", 2, 1500, own[0], own[0], ipv6=own[1], public_ipv6=own[1]), **underlay)  # type: ignore[arg-type]  # of the table
    options = parse_daemon_flags([], {})
    assert lack_of(options, conf, here, backend(keys), None, Family.IPV6) == lack
    live = live_settings(options, conf, here, backend(keys), None)
    assert (live.mtu, live.ipv6_mtu, live.pod_mtu) == mtus
    assert lack_of(options, replace(conf, ipv6=None), here, backend(keys), None, Family.IPV6) == ""


NO_SUBNET = "our lease has no {0} subnet; give this host one, as a second podCIDR where Kubernetes does"


@pytest.mark.parametrize("given", Family, ids=str)
def test_a_family_of_which_the_lease_has_no_subnet_is_not_carried(given: Family) -> None:
    conf = parse('{"EnableIPv6":true,"Network":"10.3.0.0/16","IPv6Network":"fc00::/48","Backend":{"Type":"vxlan"}}')
    (lacking,) = set(Family) - {given}
    options, how = parse_daemon_flags([], {}), backend(conf.backend)
    own = ONE_SUBNET[given]
    live = live_settings(options, conf, BOTH_ADDRESSES, how, own)
    assert live.families == (given,)
    assert live.mtu == live.pod_mtu == (1450 if given is Family.IPV4 else 1430)
    assert lack_of(options, conf, BOTH_ADDRESSES, how, own, given) == ""
    assert lack_of(options, conf, BOTH_ADDRESSES, how, own, lacking) == NO_SUBNET.format(lacking)


@pytest.mark.parametrize("given", Family, ids=str)
def test_a_lease_of_one_family_on_a_host_with_addresses_of_the_other_is_an_error_that_names_both(given: Family) -> None:
    """An AssertionError came again and again after such a host had lost its address, and no line told anybody."""
    conf = parse('{"EnableIPv6":true,"Network":"10.3.0.0/16","IPv6Network":"fc00::/48","Backend":{"Type":"vxlan"}}')
    (lacking,) = set(Family) - {given}
    here = replace(BOTH_ADDRESSES, **WITHOUT[given])
    with pytest.raises(ConfigError) as caught:
        live_settings(parse_daemon_flags([], {}), conf, here, backend(conf.backend), ONE_SUBNET[given])
    assert f"pods have no {lacking} to other hosts: {NO_SUBNET.format(lacking)}" in str(caught.value)
    assert f"pods have no {given} to other hosts: eth0 has none" in str(caught.value)


WITHOUT: dict[Family, dict[str, Any]] = {
    Family.IPV4: {"address": None, "public_ip": None, "ipv4_problem": "eth0 has none"},
    Family.IPV6: {"ipv6": None, "public_ipv6": None, "ipv6_problem": "eth0 has none"},
}
ONE_SUBNET = {
    Family.IPV4: Subnets(IPv4Network("10.3.1.0/24")),
    Family.IPV6: Subnets(None, IPv6Network("fc00:0:0:1::/64")),
}
BOTH_ADDRESSES = Underlay(
    *("eth0", 2, 1500, IPv4Address("192.0.2.1"), IPv4Address("192.0.2.1")),
    ipv6=IPv6Address("2001:db8::1"),
    public_ipv6=IPv6Address("2001:db8::1"),
)


def test_a_link_that_has_ipv6_switched_off_is_named_and_not_its_want_of_an_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`give it one` was the advice, and the kernel refuses one there."""
    monkeypatch.setattr("udptun.control.settings.read_sysctl", lambda path: "1" if "/eth0/" in path else "0")
    conf = parse('{"EnableIPv6":true,"Network":"10.3.0.0/16","IPv6Network":"fc00::/48","Backend":{"Type":"vxlan"}}')
    here = replace(BOTH_ADDRESSES, **WITHOUT[Family.IPV6])
    said = lack_of(parse_daemon_flags([], {}), conf, here, backend(conf.backend), None, Family.IPV6)
    assert said == (
        "net/ipv6/conf/eth0/disable_ipv6 is 1, so eth0 has no IPv6 address; `sysctl -w "
        "net/ipv6/conf/eth0/disable_ipv6=0`, and give it one"
    )


def test_a_kernel_without_ipv6_is_named_as_what_ipv6_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each address and route of IPv6 would have failed, again and again."""
    monkeypatch.setattr("udptun.control.settings.read_sysctl", lambda path: None)
    conf = parse('{"EnableIPv6":true,"Network":"10.3.0.0/16","IPv6Network":"fc00::/48"}')
    here = Underlay("eth0", 2, 1500, IPv4Address("192.0.2.1"), IPv4Address("192.0.2.1"))
    said = lack_of(parse_daemon_flags([], {}), conf, here, backend(UdpKeys()), None, Family.IPV6)
    assert said == "this kernel has no IPv6; boot it without ipv6.disable=1"


def net(**keys: object) -> str:
    return json.dumps({"Network": "10.244.0.0/16", **keys})


def udp(**keys: object) -> str:
    return net(Backend={"Type": "udp", **keys})


DUAL = {"EnableIPv6": True, "IPv6Network": "fc00::/48"}
NO_CIDR = "invalid IPv4 CIDR format: must be like 10.244.0.0/16, not "
TYPES = "error decoding Backend property of config: must be "
BUILT = "built: udp, vxlan, host-gw, alloc"

# One row per malformed configuration: the text and the only line it shall give, without the source's name.
MALFORMED = [
    ("", "not JSON: line 1 column 1: Expecting value"),
    ("{", "not JSON: line 1 column 2: Expecting property name enclosed in double quotes"),
    ('{"Network":"10.0.0.0/8"\n "SubnetLen":24}', "not JSON: line 2 column 2: Expecting ',' delimiter"),
    ('{"Network":"10.0.0.0/8",}', None),  # the column and wording differ between Python versions
    ('{"Network":"10.0.0.0/8"} x', "not JSON: line 1 column 26: Extra data"),
    ("\ufeff{}", "not JSON: line 1 column 1: Unexpected UTF-8 BOM (decode using utf-8-sig)"),
    ('{"Network":NaN}', "not JSON: NaN is not a JSON value"),
    ('{"Network":"10.0.0.0/8","SubnetLen":-Infinity}', "not JSON: -Infinity is not a JSON value"),
    ("[" * 100_000, None),
    ('{"SubnetLen":' + "9" * 5000 + "}", None),
    ("null", "not a configuration: a JSON object is needed, not null"),
    ("[]", "not a configuration: a JSON object is needed, not an array"),
    ('"x"', 'not a configuration: a JSON object is needed, not "x"'),
    ("{}", "Network: please define a correct Network parameter in the flannel config"),
    ('{"Network":null}', "Network: please define a correct Network parameter in the flannel config"),
    ('{"Network":""}', f'Network: {NO_CIDR}""'),
    ('{"Network":10}', f"Network: {NO_CIDR}10"),
    ('{"Network":["10.0.0.0/8"]}', f"Network: {NO_CIDR}an array"),
    ('{"Network":"10.0.0.0"}', f'Network: {NO_CIDR}"10.0.0.0"'),
    ('{"Network":"10.0.0.0/33"}', f'Network: {NO_CIDR}"10.0.0.0/33"'),
    ('{"Network":"10.0.0.256/8"}', f'Network: {NO_CIDR}"10.0.0.256/8"'),
    ('{"Network":"010.0.0.0/8"}', f'Network: {NO_CIDR}"010.0.0.0/8"'),
    ('{"Network":"10.0.0.0/255.0.0.0"}', f'Network: {NO_CIDR}"10.0.0.0/255.0.0.0"'),
    ('{"Network":"fc00::/48"}', f'Network: {NO_CIDR}"fc00::/48"'),
    ('{"Network":"10.0.0.0/8","Network":"10.0.0.0/8"}', "Network: given twice; keep one"),
    ('{"Network":"10.0.0.0/8","network":"10.1.0.0/16"}', "Network: given twice (as Network and network); keep one"),
    ('{"Network":"10.0.0.0/8","zz":1,"zz":2}', "zz: given twice; keep one"),
    (
        '{"Network":"10.0.0.0/8","Backend":{"Type":"udp","Port":1,"PORT":2}}',
        "Backend.Port: given twice (as Port and PORT); keep one",
    ),
    (
        '{"Network":"10.0.0.0/7"}',
        "Network: 10.0.0.0/7 is wider than /8, the most that the datapath's direct index covers",
    ),
    (
        '{"Network":"127.0.0.0/8"}',
        "Network: 127.0.0.0/8 overlaps 127.0.0.0/8 (loopback addresses), which no host can route",
    ),
    (
        '{"Network":"127.5.0.0/16"}',
        "Network: 127.5.0.0/16 overlaps 127.0.0.0/8 (loopback addresses), which no host can route",
    ),
    (
        '{"Network":"224.0.0.0/8"}',
        "Network: 224.0.0.0/8 overlaps 224.0.0.0/4 (multicast addresses), which no host can route",
    ),
    (
        '{"Network":"250.0.0.0/16"}',
        "Network: 250.0.0.0/16 overlaps 240.0.0.0/4 (reserved addresses), which no host can route",
    ),
    (
        '{"Network":"0.0.0.0/8"}',
        "Network: 0.0.0.0/8 overlaps 0.0.0.0/8 (this-network addresses), which no host can route",
    ),
    *(
        (
            f'{{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"{network}"}}',
            f"IPv6Network: {network}: {what} addresses ({within}), which no host can route",
        )
        for network, what, within in (
            ("ff00::/48", "multicast", "ff00::/8"),
            ("fe80::/10", "link-local", "fe80::/10"),
            ("::ffff:0:0/96", "IPv4-mapped", "::ffff:0:0/96"),
            ("::/112", "loopback and IPv4-compatible", "::/96"),
        )
    ),
    (
        '{"Network":"10.244.0.0/29"}',
        "Network: network is too small. Minimum useful network prefix is /28, not /29",
    ),
    (net(SubnetLen=31), "SubnetLen: SubnetLen must be less than /31, not /31"),
    (net(SubnetLen=300), "SubnetLen: SubnetLen must be less than /31, not /300"),
    (
        net(SubnetLen=17),
        "SubnetLen: network must be able to accommodate at least four subnets: "
        "10.244.0.0/16 takes SubnetLen 18 or more, not 17",
    ),
    (
        '{"Network":"10.0.0.0/8","SubnetLen":15}',
        "SubnetLen: /15 is shorter than /16, the largest subnet that the datapath's direct index takes",
    ),
    (net(SubnetLen=-1), "SubnetLen: must not be negative, not -1"),
    (net(SubnetLen="24"), 'SubnetLen: must be a JSON integer, not "24"'),
    (net(SubnetLen=24.0), "SubnetLen: must be a JSON integer, not 24.0"),
    (net(SubnetLen=True), "SubnetLen: must be a JSON integer, not true"),
    (net(SubnetMin=1), "SubnetMin: must be an IPv4 address like 10.244.1.0, not 1"),
    (net(SubnetMin="10.244.1"), 'SubnetMin: must be an IPv4 address like 10.244.1.0, not "10.244.1"'),
    (net(SubnetMax="fc00::1"), 'SubnetMax: must be an IPv4 address like 10.244.1.0, not "fc00::1"'),
    (
        net(SubnetMin="10.243.0.0"),
        "SubnetMin: SubnetMin is not in the range of the Network: 10.243.0.0 in 10.244.0.0/16",
    ),
    (
        net(SubnetMax="10.245.0.0"),
        "SubnetMax: SubnetMax is not in the range of the Network: 10.245.0.0 in 10.244.0.0/16",
    ),
    (
        net(SubnetMin="10.244.1.1"),
        "SubnetMin: SubnetMin is not on a SubnetLen boundary: 10.244.1.1 for /24",
    ),
    (
        net(SubnetMax="10.244.9.128"),
        "SubnetMax: SubnetMax is not on a SubnetLen boundary: 10.244.9.128 for /24",
    ),
    (
        net(SubnetMin="10.244.9.0", SubnetMax="10.244.5.0"),
        "SubnetMin: 10.244.9.0 is above SubnetMax 10.244.5.0, so no subnet is left",
    ),
    (net(EnableIPv4="yes"), 'EnableIPv4: must be true or false, not "yes"'),
    (net(EnableIPv6=1), "EnableIPv6: must be true or false, not 1"),
    (net(EnableNFTables={}), "EnableNFTables: must be true or false, not an object"),
    (net(EnableIPv4=False), "EnableIPv4: none defined stack: set EnableIPv4 or EnableIPv6 to true"),
    (
        '{"EnableIPv4": false, "EnableIPv6": true, "Network": "10.244.0.0/16"}',
        "IPv6Network: please define a correct IPv6Network parameter in the flannel config",
    ),
    (net(EnableIPv6=True), "IPv6Network: please define a correct IPv6Network parameter in the flannel config"),
    (
        net(EnableIPv6=True, IPv6Network="10.0.0.0/8"),
        'IPv6Network: invalid IPv6 CIDR format: must be like fd00:244::/48, not "10.0.0.0/8"',
    ),
    (
        net(EnableIPv6=True, IPv6Network="fc00::/125"),
        "IPv6Network: IPv6Network is too small. Minimum useful network prefix is /124, not /125",
    ),
    (net(**DUAL, IPv6SubnetLen=127), "IPv6SubnetLen: SubnetLen must be less than /127, not /127"),
    (
        net(**DUAL, IPv6SubnetLen=49),
        "IPv6SubnetLen: network must be able to accommodate at least four subnets: "
        "fc00::/48 takes SubnetLen 50 or more, not 49",
    ),
    (
        net(**DUAL, IPv6SubnetMin="fd00::"),
        "IPv6SubnetMin: IPv6SubnetMin is not in the range of the IPv6Network: fd00:: in fc00::/48",
    ),
    (
        net(**DUAL, IPv6SubnetMax="fc00::1"),
        "IPv6SubnetMax: IPv6SubnetMax is not on a SubnetLen boundary: fc00::1 for /64",
    ),
    (
        net(**DUAL, IPv6SubnetMin="fe80::%eth0"),
        'IPv6SubnetMin: must be an IPv6 address like fd00:244:0:1::, not "fe80::%eth0"',
    ),
    (net(Backend="udp"), f'Backend: {TYPES}an object, not "udp"'),
    (net(Backend=[]), f"Backend: {TYPES}an object, not an array"),
    (
        net(Backend={}),
        f'Backend.Type: unknown backend type: "" (name one, or leave Backend out to get udp); {BUILT}',
    ),
    (
        net(Backend=None),
        f'Backend.Type: unknown backend type: "" (name one, or leave Backend out to get udp); {BUILT}',
    ),
    (net(Backend={"Type": 7}), f"Backend.Type: {TYPES}a string, not 7"),
    (net(Backend={"Type": "nope"}), f"Backend.Type: unknown backend type: nope; {BUILT}"),
    (net(Backend={"Type": "upd"}), "Backend.Type: unknown backend type: upd; did you mean udp?"),
    (net(Backend={"Type": "vxlam"}), "Backend.Type: unknown backend type: vxlam; did you mean vxlan?"),
    (net(Backend={"Type": "VXLAN", "VNI": "x"}), 'Backend.VNI: must be a JSON integer, not "x"'),
    (net(Backend={"Type": "vxlan", "VNI": 1 << 24}), "Backend.VNI: must be 0..16777215, not 16777216"),
    (net(Backend={"Type": "vxlan", "Port": 65536}), "Backend.Port: must be 1..65535, not 65536"),
    (net(Backend={"Type": "vxlan", "GBP": "yes"}), 'Backend.GBP: must be true or false, not "yes"'),
    (
        net(Backend={"Type": "vxlan", "Fallback": "vxlan"}),
        'Backend.Fallback: must be "vtep", "udp" or "none", not "vxlan"',
    ),
    (
        net(Backend={"Type": "wireguard"}),
        f"Backend.Type: backend type wireguard is flannel's alone; {BUILT}",
    ),
    (udp(Port=0), "Backend.Port: must be 1..65535, not 0"),
    (udp(Port=65536), "Backend.Port: must be 1..65535, not 65536"),
    (udp(Port=-1), "Backend.Port: must be 1..65535, not -1"),
    (udp(Port="8285"), 'Backend.Port: must be a JSON integer, not "8285"'),
    (udp(Port=8285.5), "Backend.Port: must be a JSON integer, not 8285.5"),
    (udp(MTU=95), "Backend.MTU: must be 96..65535, not 95"),
    (udp(MTU=65536), "Backend.MTU: must be 96..65535, not 65536"),
    (udp(MTU=False), "Backend.MTU: must be a JSON integer, not false"),
    (udp(Workers=0), "Backend.Workers: must be 1..16, not 0"),
    (udp(Workers=17), "Backend.Workers: must be 1..16, not 17"),
    (udp(SourcePorts=0), 'Backend.SourcePorts: must be 1..16 or "auto", not 0'),
    (udp(SourcePorts=17), 'Backend.SourcePorts: must be 1..16 or "auto", not 17'),
    (udp(SourcePorts=True), 'Backend.SourcePorts: must be 1..16 or "auto", not true'),
    (udp(SourcePorts=2.0), 'Backend.SourcePorts: must be 1..16 or "auto", not 2.0'),
    (udp(SourcePorts="4"), 'Backend.SourcePorts: must be 1..16 or "auto", not "4"'),
    (udp(SourcePorts=[]), 'Backend.SourcePorts: must be 1..16 or "auto", not an array'),
    (udp(SourceCheck="none"), 'Backend.SourceCheck: must be "off", "peer" or "strict", not "none"'),
    (udp(SourceCheck=True), 'Backend.SourceCheck: must be "off", "peer" or "strict", not true'),
    (udp(Shortcut="on"), 'Backend.Shortcut: must be "off", "auto" or "require", not "on"'),
    (udp(Shortcut=True), 'Backend.Shortcut: must be "off", "auto" or "require", not true'),
    (udp(LogLevel="loud"), 'Backend.LogLevel: must be "debug", "info", "warning" or "error", not "loud"'),
    (udp(LogLevel=10), 'Backend.LogLevel: must be "debug", "info", "warning" or "error", not 10'),
]


@pytest.mark.parametrize(("text", "line"), MALFORMED, ids=[f"{i:02}" for i in range(len(MALFORMED))])
def test_config_gives_one_clear_line_when_one_thing_is_wrong(text: str, line: str | None) -> None:
    found = problems(text)
    if line is None:
        assert len(found) == 1
        assert found[0].startswith("net-conf.json: not JSON: ")
    else:
        assert found == (f"net-conf.json: {line}",)


def test_config_reports_all_problems_at_once() -> None:
    found = problems(
        '{"network":"10.0.0.0/6","SubnetLen":12,"SubnetMin":"10.0.0.1","EnableNFTables":3,'
        '"Backend":{"Type":"udp","Port":0,"MTU":1,"Workers":99,"SourceCheck":""}}'
    )
    assert [problem.split(": ")[1] for problem in found] == [
        "EnableNFTables",
        "Backend.Port",
        "Backend.MTU",
        "Backend.Workers",
        "Backend.SourceCheck",
        "SubnetMin",
        "Network",
        "SubnetLen",
    ]


def test_config_error_text_shortens_a_long_value() -> None:
    assert len(problems(net(SubnetMin="x" * 10_000))[0]) < 160


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from(["10.0.0.0/8", "udp"]),
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=8,
)
KEYS = st.sampled_from(["Network", "SubnetLen", "SubnetMin", "SubnetMax", "EnableIPv6", "IPv6Network", "Backend"])
BACKENDS = st.dictionaries(
    st.sampled_from(["Type", "Port", "MTU", "Workers", "SourcePorts", "SourceCheck", "LogLevel"]), JSON_VALUES
)


@given(TEXT | st.dictionaries(KEYS, JSON_VALUES | BACKENDS).map(json.dumps))
def test_config_parser_never_raises_anything_but_config_error(text: str) -> None:
    try:
        conf = parse(text)
    except ConfigError as exc:
        assert exc.problems  # noqa: PT017 - the point is that this type alone may come
    else:
        assert conf.ipv4.subnet_min <= conf.ipv4.subnet_max
        assert conf.ipv4.subnet_min in conf.network


FLANNELS_EXAMPLE = '{"Network": "10.0.0.0/8", "SubnetLen": 20, "SubnetMin": "10.10.0.0", "SubnetMax": "10.99.0.0"}'
BETWEEN = r"SubnetMin \(10\.10\.0\.0\) and SubnetMax \(10\.99\.0\.0\)"
NOT_UDP: dict[str, BackendKeys] = {
    "vxlan": VxlanKeys(),
    "vtep": VxlanKeys(userspace=True),
    "host-gw": HostGwKeys(),
    "alloc": AllocKeys(),
}


def backend(keys: BackendKeys) -> Backend:
    return choose(keys, KernelSupport(), "02:00:00:00:00:01").backend


def test_check_underlay_refuses_a_network_that_holds_the_hosts_own_address() -> None:
    conf = parse('{"Network":"10.244.0.0/16"}')
    check_underlay(backend(UdpKeys()), conf, IPv4Address("192.168.1.5"))
    with pytest.raises(ConfigError, match=r"Network: 10\.244\.0\.0/16 contains .* address 10\.244\.7\.1;"):
        check_underlay(backend(UdpKeys()), conf, IPv4Address("10.244.7.1"))


@pytest.mark.parametrize("keys", NOT_UDP.values(), ids=NOT_UDP)
@pytest.mark.parametrize("address", ["10.0.0.1", "10.9.255.255", "10.99.16.0", "10.255.0.1", "192.0.2.1"])
def test_a_host_outside_what_is_leased_starts_inside_network(keys: BackendKeys, address: str) -> None:
    """No backend started where the host's address lay in Network.  flannel's do: its own example is such a Network."""
    check_underlay(backend(keys), parse(FLANNELS_EXAMPLE), IPv4Address(address))
    # By default the first subnet is not leased.
    check_underlay(backend(keys), parse('{"Network": "10.244.0.0/16"}'), IPv4Address("10.244.0.5"))


def test_ipv6_alone_is_refused_by_a_store_that_cannot_keep_it() -> None:
    conf = parse('{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48","Backend":{"Type":"host-gw"}}')
    store = FakeStore()
    check_store(store, conf, backend(HostGwKeys()))
    store.keeps_ipv6_alone = False
    with pytest.raises(ConfigError) as refused:
        check_store(store, conf, backend(HostGwKeys()))
    (line,) = refused.value.problems
    assert line.startswith("EnableIPv4: IPv6 alone does not work with the store fake: the keys of flannel's leases ")
    check_store(store, parse('{"Network":"10.3.0.0/16"}'), backend(HostGwKeys()))


@pytest.mark.parametrize("keys", NOT_UDP.values(), ids=NOT_UDP)
@pytest.mark.parametrize("address", ["10.10.0.0", "10.50.1.1", "10.99.15.255"])
def test_a_host_within_what_is_leased_is_told_of_subnet_min_and_max(keys: BackendKeys, address: str) -> None:
    said = rf"address {address} lies between {BETWEEN}, .*; set SubnetMin and SubnetMax"
    with pytest.raises(ConfigError, match=said):
        check_underlay(backend(keys), parse(FLANNELS_EXAMPLE), IPv4Address(address))


NARROW = FLANNELS_EXAMPLE.replace("10.99.0.0", "10.11.0.0")
NOT_UDP_TYPE = "use Backend.Type vxlan or host-gw"
NEW_NETWORK = "choose a Network that no host's own address lies in"
ALL_OF_IT = "the udp backend leads all of Network into its device, not only what lies between SubnetMin (10.10.0.0) and"


@pytest.mark.parametrize(
    ("text", "address", "ways"),
    [
        (NARROW, "10.0.0.1", f"{NOT_UDP_TYPE}, make Network 10.10.0.0/15, which has all that hosts lease"),
        (FLANNELS_EXAMPLE, "10.0.0.1", NOT_UDP_TYPE),
        # a narrower Network would have room for one subnet, and flannel wants four
        (FLANNELS_EXAMPLE.replace("10.99.0.0", "10.10.0.0"), "10.0.0.1", NOT_UDP_TYPE),
    ],
)
def test_udp_inside_network_is_told_the_ways_out_that_there_are(text: str, address: str, ways: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_underlay(backend(UdpKeys()), parse(text), IPv4Address(address))
    said = str(refused.value)
    assert said.startswith(f"Network: 10.0.0.0/8 contains this host's underlay address {address}; {ALL_OF_IT} ")
    assert said.endswith(f": {ways}, or {NEW_NETWORK}")


def test_udp_among_the_leased_subnets_has_no_way_out_but_another_network() -> None:
    """Neither SubnetMin and SubnetMax nor another backend help where the host's address may be a pod's."""
    with pytest.raises(ConfigError) as refused:
        check_underlay(backend(UdpKeys()), parse(FLANNELS_EXAMPLE), IPv4Address("10.50.0.1"))
    assert str(refused.value) == f"Network: 10.0.0.0/8 contains this host's underlay address 10.50.0.1; {NEW_NETWORK}"


def test_a_host_that_got_udp_for_want_of_vxlan_is_told_of_the_vtep() -> None:
    """It was told to use Backend.Type vxlan, which it had."""
    text = FLANNELS_EXAMPLE.removesuffix("}") + ', "Backend": {"Type": "vxlan", "Fallback": "udp"}}'
    conf = parse(text)
    udp = choose(conf.backend, KernelSupport(no_vxlan="EOPNOTSUPP"), "02:00:00:00:00:01").backend
    with pytest.raises(ConfigError, match=f'set Backend.Fallback to "vtep", or {NEW_NETWORK}$'):
        check_underlay(udp, conf, IPv4Address("10.0.0.1"))


@pytest.mark.parametrize(
    ("text", "prefixes"),
    [
        (
            FLANNELS_EXAMPLE,
            "10.10.0.0/15 10.12.0.0/14 10.16.0.0/12 10.32.0.0/11 10.64.0.0/11 10.96.0.0/15 10.98.0.0/16 10.99.0.0/20",
        ),
        ('{"Network": "10.3.0.0/16", "SubnetMin": "10.3.4.0", "SubnetMax": "10.3.7.0"}', "10.3.4.0/22"),
        ('{"Network": "10.3.0.0/24", "SubnetLen": 28}', "10.3.0.16/28 10.3.0.32/27 10.3.0.64/26 10.3.0.128/25"),
        ('{"Network": "10.3.0.0/16", "SubnetMin": "10.3.0.0"}', "10.3.0.0/16"),
        ('{"Network": "10.3.0.0/16", "SubnetMin": "10.3.9.0", "SubnetMax": "10.3.9.0"}', "10.3.9.0/24"),
    ],
)
def test_what_can_be_leased_is_said_in_the_fewest_prefixes(text: str, prefixes: str) -> None:
    assert " ".join(map(str, parse(text).ipv4.leasable)) == prefixes


def test_mtu_for_takes_off_the_28_bytes_of_the_outer_headers() -> None:
    assert mtu_for(1500, OUTER_HEADERS[4]) == 1472
    assert mtu_for(96, OUTER_HEADERS[4]) == 68


def test_mtu_for_refuses_less_than_ipv4_needs() -> None:
    with pytest.raises(ConfigError, match="an underlay MTU of 95 leaves 67 bytes"):
        mtu_for(95, OUTER_HEADERS[4])


@pytest.mark.parametrize(("n_cpus", "workers"), [(1, 1), (2, 1), (3, 1), (4, 2), (6, 3), (8, 4), (64, 4)])
def test_default_workers_leave_small_machines_to_their_pods(n_cpus: int, workers: int) -> None:
    assert default_workers(n_cpus) == workers
