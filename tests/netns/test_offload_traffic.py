"""Every way to switch the offloads, each with the same traffic: nothing changes but the speed.

pod h1/p1 == tcp, 20 MB and more, byte-exact ==> pod h2/p1, over underlay links of each mode
pod h1/p1 -- udp, trains of equal datagrams (UDP_SEGMENT) and single ones --> pod h2/p1
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator

import pytest

from tests.netns.traffic import (
    CLEANUP,
    REAL_TIME,
    no_packet_errors,
    read_status,
    tcp_flow,
    udp_flow,
    wait_until_counted,
)
from udptun.core.offload import ALL, names
from udptun.lab.host import Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import DEFAULT_NET_CONF, NET_CONF, Lab, Offload

pytestmark = pytest.mark.netns

EVERY = names(ALL)
SWITCHED_OFF = [[], EVERY, *([name] for name in EVERY)]
CASES = [
    pytest.param(
        links,
        off,
        id=f"links_{links.name.lower()}-without_{'any' if off == EVERY else '_'.join(off)}",
        # Links that merge on receipt differ from those that do nothing in what UDP_GRO gives.
        marks=[pytest.mark.full] if links is Offload.RECEIVE and off not in ([], EVERY, ["udp_gro"]) else [],
    )
    for links in Offload
    for off in SWITCHED_OFF
]
NEEDED_BY = {"vnet_hdr": {"tso", "uso", "write_tcp", "write_udp"}, "spread": {"stranger_filter"}}
"""What goes with a name that is switched off, with several workers."""
STREAM_BYTES = 20_000_000


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("offload", n_hosts=2, n_pods=1) as lab:
        lab.daemon_command[:0] = REAL_TIME
        lab.start()
        yield lab


def configure(host: Host, off: list[str]) -> None:
    """Have the host do without these: live, but for what is settled when the device is made."""
    conf = dict(DEFAULT_NET_CONF) | {"Backend": {"Type": "udp", "OffloadDisabled": off}}
    host.path(NET_CONF).write_text(json.dumps(conf))
    assert host.daemon is not None
    if ("vnet_hdr" in read_status(host)["backend"]["offloads"]) == ("vnet_hdr" not in off):
        host.daemon.send_signal(signal.SIGHUP)
    else:
        assert host.stop_daemon() == 0
        host.run(CLEANUP)
        host.start_daemon()
    host.wait_ready()


def peer_bytes(host: Host) -> int:
    return sum(peer["decap_bytes"] for peer in read_status(host)["peers"])


@pytest.mark.parametrize(("links", "off"), CASES)
def test_traffic_is_exact_with_offloads_switched_off(lab: Lab, links: Offload, off: list[str]) -> None:
    lab.set_offload(links)
    for host in lab.hosts:
        configure(host, off)
        in_use = set(EVERY).difference(off, *(NEEDED_BY.get(name, ()) for name in off))
        assert set(read_status(host)["backend"]["offloads"]) == in_use
    one, two = lab.host(1).pod(1), lab.host(2).pod(1)
    wait_until_counted(*lab.hosts)
    before = [read_status(host)["counters"] for host in lab.hosts]
    already = peer_bytes(lab.host(2))

    def received(host: Host) -> int:
        # Headers are counted too: at most a tenth.
        return int((peer_bytes(host) - already) * 0.9)

    with no_packet_errors(*lab.hosts, one, two):
        with tcp_flow(one, two, bytes_per_s=200e6) as stream, udp_flow(two, one, 1000) as datagrams:
            datagrams.wait_for_more(150)
            wait_until("the stream to be long enough", lambda: received(lab.host(2)) > STREAM_BYTES, 30)
        stream.report.assert_exact()
        assert stream.report.received > STREAM_BYTES
        assert (datagrams.report.lost, datagrams.report.n_duplicates, datagrams.report.n_spoilt) == ([], 0, 0)
    wait_until_counted(*lab.hosts)
    for host, earlier in zip(lab.hosts, before, strict=True):
        counters = read_status(host)["counters"]
        moved = {name: n - earlier[name] for name, n in counters.items() if n != earlier[name]}
        print(f"{host.name}: {moved}")
        for way, kept in (("encap", ("encap_sent",)), ("decap", ("decap_delivered", "decap_punted"))):
            ends = sum(n for name, n in moved.items() if name.startswith((f"{way}_drop", *kept)))
            assert ends == moved[f"{way}_packets"] > 0
