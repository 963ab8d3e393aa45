"""Every way to switch the offloads, each with the same traffic: nothing changes but the speed.

    pod h1/p1 == tcp, byte-exact, as fast as it goes ==> pod h2/p1, over underlay links that offload, and that do not
    pod h1/p1 -- udp, trains of equal datagrams (UDP_SEGMENT) and single ones --> pod h2/p1
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator

import pytest

from tests.netns.traffic import no_packet_errors, read_status, tcp_flow, udp_flow
from udptun.lab.topology import DEFAULT_NET_CONF, NET_CONF, Lab, Offload
from udptun.offload import ALL, names

pytestmark = pytest.mark.netns

EVERY = names(ALL)
SWITCHED_OFF = [[], EVERY, *([name] for name in EVERY)]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("offload", n_hosts=2, n_pods=1) as lab:
        lab.start()
        yield lab


@pytest.mark.parametrize("off", SWITCHED_OFF, ids=lambda off: "without_" + ("_".join(off) if off != EVERY else "any"))
@pytest.mark.parametrize("links", [Offload.FULL, Offload.NONE], ids=lambda links: f"links_{links.name.lower()}")
def test_traffic_is_exact_with_offloads_switched_off(lab: Lab, links: Offload, off: list[str]) -> None:
    lab.set_offload(links)
    conf = dict(DEFAULT_NET_CONF) | {"Backend": {"Type": "udp", "OffloadDisabled": off}}
    lab.host(1).path(NET_CONF).write_text(json.dumps(conf))
    for host in lab.hosts:
        assert host.daemon is not None
        host.daemon.send_signal(signal.SIGHUP)
        host.wait_ready()
        assert set(read_status(host)["backend"]["offloads"]) == set(EVERY) - set(off)
    one, two = lab.host(1).pod(1), lab.host(2).pod(1)
    before = [read_status(host)["counters"] for host in lab.hosts]
    with no_packet_errors(*lab.hosts, one, two):
        with tcp_flow(one, two, bytes_per_s=200e6) as stream, udp_flow(two, one, 500) as datagrams:
            datagrams.wait_for_more(150)
        stream.report.assert_exact()
        assert (datagrams.report.lost, datagrams.report.n_duplicates, datagrams.report.n_spoilt) == ([], 0, 0)
    for host, earlier in zip(lab.hosts, before, strict=True):
        counters = read_status(host)["counters"]
        moved = {name: n - earlier[name] for name, n in counters.items() if n != earlier[name]}
        print(f"{host.name}: {moved}")
        for way, end in (("encap", "sent"), ("decap", "delivered")):
            ends = sum(n for name, n in moved.items() if name.startswith((f"{way}_drop", f"{way}_{end}")))
            assert ends == moved[f"{way}_packets"] > 0
