"""A route that leads the tunnel's own datagrams into the tunnel: each is dropped once, and nothing goes round.

h1: flannel0 <-- route to h2's PublicIP, set by somebody; pod h1/p1 -- pings --> pod h2/p1
"""

from __future__ import annotations

import pytest

from tests.netns.traffic import read_status
from udptun.lab.machine import wait_until
from udptun.lab.topology import Lab

pytestmark = pytest.mark.netns

N_LOOPED = 5


def test_datagrams_that_a_route_leads_into_the_tunnel_are_dropped_once() -> None:
    """They had no peer: each was answered with an ICMP error.  Where a peer leases the address they went round."""
    with Lab("loops", n_hosts=2, n_pods=1) as lab:
        # A peer that does not answer would be refused before.
        lab.daemon_command.append("--probe=false")
        lab.start()
        one, two = lab.hosts

        def ping() -> bool:
            return one.pod(1).run(["ping", "-c1", "-W1", str(two.pod(1).address)], check=False).returncode == 0

        def ping_with_the_route() -> bool:
            """The daemon takes it away again: it is not ours, and on our device."""
            one.run(["ip", "route", "replace", str(two.underlay_address), "dev", "flannel0"])
            ping()
            return read_status(one)["counters"]["encap_drop_loop"] >= N_LOOPED

        wait_until("the first packet", ping, 10)
        before = read_status(one)["counters"]
        wait_until("datagrams to come back", ping_with_the_route, 30)
        after = read_status(one)["counters"]
        moved = {name: n - before[name] for name, n in after.items() if name.startswith(("encap", "icmp"))}
        moved = {name: n for name, n in moved.items() if n}
        print(moved)
        assert set(moved) == {"encap_packets", "encap_sent", "encap_drop_loop"}
        assert moved["encap_packets"] == moved["encap_sent"] + moved["encap_drop_loop"]
        assert moved["encap_drop_loop"] <= moved["encap_sent"], "each has come back once at most"
        one.run(["ip", "route", "del", str(two.underlay_address), "dev", "flannel0"], check=False)
        wait_until("the pings to pass", ping, 20)
