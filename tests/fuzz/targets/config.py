"""net-conf.json: a valid configuration, or a line for each problem."""

from __future__ import annotations

from ipaddress import ip_network

from tests.bad_data import CONFIGS
from tests.fuzz.mutate import json_mutator
from tests.fuzz.oracles import check_few_lines, check_line
from udptun.backends.choice import KINDS, KernelSupport, choose, parse_net_conf
from udptun.backends.vxlan import VxlanKeys
from udptun.config import subnet_env
from udptun.config.net_conf import NetConf, keys_that_need_a_restart, replace_live_keys
from udptun.core.errors import ConfigError, UdptunError
from udptun.core.lease import Subnets, is_inside

GOOD = (
    '{"Network": "10.244.0.0/16"}',
    '{"Network": "10.0.0.0/8", "SubnetLen": 20, "SubnetMin": "10.10.0.0", "SubnetMax": "10.99.0.0", '
    '"Backend": {"Type": "udp", "Port": 7890, "MTU": 1400, "Workers": 2, "SourceCheck": "strict", "Probe": false, '
    '"OffloadDisabled": ["tso", "uso"], "SourcePorts": "auto", "LogLevel": "debug"}}',
    '{"EnableIPv6": true, "EnableNFTables": true, "Network": "172.16.0.0/12", "IPv6Network": "fd00:1::/48", '
    '"IPv6SubnetLen": 64, "IPv6SubnetMin": "fd00:1:0:8::", "IPv6SubnetMax": "fd00:1:0:99::", '
    '"Backend": {"Type": "vxlan", "VNI": 7, "Port": 4789, "GBP": true, "DirectRouting": true, "Learning": false, '
    '"Fallback": "none", "Userspace": true}}',
    '{"Network": "192.168.0.0/20", "Backend": {"Type": "host-gw"}}',
    '{"Network": "192.168.0.0/28", "Backend": {"Type": "alloc"}}',
)
FOUND = {
    "an unknown key begins a line of the log": b'{"Network": "10.244.0.0/16", "a\\nb": 1}',
    "a Type commands a terminal": b'{"Network": "10.244.0.0/16", "Backend": {"Type": "\\u001b[31m"}}',
    "an unknown Type is 3,000 characters long": b'{"Network": "10.244.0.0/16", "Backend": {"Type": "%s"}}'
    % (b"x" * 3000),
    "each of hundreds of unknown keys is a line": b'{"Network": "10.244.0.0/16"%s}'
    % b"".join(b', "k%d": 1' % i for i in range(300)),
}
SEEDS = tuple(text.encode() for text in (*GOOD, *(text for text, _ in CONFIGS if len(text) < 4000)))

mutate = json_mutator(
    (
        *("Network", "SubnetLen", "SubnetMin", "SubnetMax", "EnableIPv4", "EnableIPv6", "EnableNFTables", "Backend"),
        *("IPv6Network", "IPv6SubnetLen", "IPv6SubnetMin", "IPv6SubnetMax", "Type", "Port", "MTU", "Workers"),
        *("SourceCheck", "Probe", "OffloadDisabled", "SourcePorts", "LogLevel", "VNI", "GBP", "DirectRouting"),
        *("Learning", "Fallback", "Userspace", "network", "BACKEND", "\u212aey"),
    ),
    (
        *("10.0.0.0/8", "10.0.0.0/6", "10.244.0.0/30", "10.244.0.5/16", "10.244.0.0/255.255.0.0", "10.244.255.0"),
        *("10.244.16.0", "fd00:1::/64", "::/0", "udp", "vxlan", "host-gw", "alloc", "UDP", "wireguard", "auto"),
        *("peer", "strict", "off", "debug", "vtep", "none", "tso", ["tso"], ["tso", "tso", 7], 16, 17, 20, 28, 31),
        *(1450, 8285, 4789, 16777215, 16777216),
    ),
)


def check(data: bytes) -> None:
    text = data.decode("utf-8", "surrogatepass") if _is_wide(data) else data.decode("latin-1")
    try:
        conf = parse_net_conf(text, "net-conf.json")
    except ConfigError as exc:
        check_few_lines(exc.problems)
        return
    check_few_lines(conf.notes)
    _check_pool(conf)
    assert conf == parse_net_conf(text, "net-conf.json")
    assert keys_that_need_a_restart(conf, conf) == []
    assert replace_live_keys(conf.backend, conf.backend) == conf.backend
    pools = [conf.ipv4, conf.ipv6]
    ipv4, ipv6 = (None if it is None else ip_network((it.subnet_min, it.subnet_len)) for it in pools)
    subnets = Subnets(ipv4, ipv6)
    written = subnet_env.render(conf, subnets, 1450, ip_masq=True)
    assert subnet_env.parse(written) == (subnets, "")
    assert subnet_env.parse_networks(written) == (None if ipv4 is None else (conf.network, ipv4))
    for support in (KernelSupport(), KernelSupport(no_vxlan="EOPNOTSUPP")):
        try:
            choose(conf.backend, support, "02:00:00:00:00:01")
        except UdptunError as exc:
            check_line(str(exc))


def _is_wide(data: bytes) -> bool:
    try:
        data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return False
    return True


def _check_pool(conf: NetConf) -> None:
    """What the datapath, the routes and the allocation rely on."""
    for pool in map(conf.pool, conf.families):
        assert pool.network.prefixlen + 2 <= pool.subnet_len
        assert pool.subnet_min in pool.network
        assert pool.subnet_max in pool.network
        assert int(pool.subnet_min) <= int(pool.subnet_max)
        assert all(is_inside(prefix, pool.network) for prefix in pool.leasable)
        assert sum(prefix.num_addresses for prefix in pool.leasable) % pool.subnet_size == 0
    if conf.ipv4 is not None:
        assert 8 <= conf.ipv4.network.prefixlen <= 28
        assert 16 <= conf.ipv4.subnet_len <= 30
        first = int(conf.ipv4.network.network_address) >> 24
        assert first not in (0, 127)
        assert first < 224
    assert type(conf.backend) in KINDS.values()
    if isinstance(conf.backend, VxlanKeys):
        assert 0 <= conf.backend.vni < 1 << 24
