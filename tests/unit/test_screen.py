"""What `udptun status` shows of a document: all of it in a pipe, one screen on a terminal."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
from page_commands import ROOT, blocks
from status_document import DOCUMENT, NOW_S

from udptun.commands import figures
from udptun.commands.hosts import Look, hosts_of, matching
from udptun.commands.screen import Page, render
from udptun.commands.views import Views
from udptun.core.counter_words import COUNTERS, is_drop
from udptun.core.offload import ALL, names

NO_LIMITS = Page()
(PEER,) = DOCUMENT["peers"]
QUIET = {**DOCUMENT, "problems": [], "skipped": [], "counters": {"encap_packets": 9, "encap_drop_ttl": 0}}


def peer(n: int, **more: Any) -> dict[str, Any]:
    address = {"subnet": f"10.{n // 250}.{n % 250}.0/24", "public_ip": f"172.16.{n // 250}.{n % 250}"}
    return {**PEER, **address, "path_mtu": 1472, **more}


def looks(document: dict[str, Any], earlier: dict[str, Any], apart_s: float = 0.5) -> tuple[Look, Look]:
    """Answers of the daemon, so many seconds apart."""
    return Look(document, 100 + apart_s, NOW_S), Look(earlier, 100, NOW_S)


def screen(document: dict[str, Any], earlier: dict[str, Any] | None = None, page: Page = NO_LIMITS) -> str:
    look, before = looks(document, earlier or document)
    return "\n".join(render(look, before, page))


def test_in_a_pipe_everything_is_shown() -> None:
    counters = {"encap_packets": 9, "encap_drop_ttl": 4, "decap_drop_unknown_peer": 1_000_007}
    earlier = {**DOCUMENT, "counters": {**counters, "encap_drop_ttl": 1}}
    grown = {"encap_packets": 1_234_567 + 500, "encap_bytes": 2 + 625_000, "decap_packets": 3 + 1}
    assert screen({**DOCUMENT, "counters": counters, "peers": [{**PEER, **grown}]}, earlier) == (
        "udptun     1 problem\n"
        "problem    route x is not ours\n"
        "skipped    1 of the leases in the store\n"
        "           junk: not JSON\n"
        "\n"
        "lease      10.244.1.0/24 of 10.244.0.0/16, expires in 2h01m\n"
        "store      local:/var/lib/udptun/leases.db\n"
        "underlay   eth0 192.0.2.1, MTU 1500, public 192.0.2.1:8285\n"
        "backend    udp, flannel0, MTU 1472, source check peer (as configured)\n"
        "datapath   up 1h00m, workers running, tun_lost, standby ready, confinement full\n"
        "firewall   iptables: masquerade and forward\n"
        "daemon     up 59s, version 0.1.0, pid 10\n"
        "\n"
        "peers      1 alive; out 10.0 Mbit/s, in 0 bit/s, measured for 0.5 s\n"
        "PEER SUBNET    ADDRESS         STATE  RTT ms  MTU  OUT bit/s  IN bit/s  OUT pkt/s  IN pkt/s    SENT  RECEIVED"
        "  BY\n"
        "10.244.2.0/24  192.0.2.2:9000  alive    0.25    -     10.0 M         0     1.00 k         2  625 kB       4 B"
        "  flannel\n"
        "\n"
        "drops      1.00 M packets, 6 a second now; see docs/wire-format.md\n"
        "        4  6/s  TTL or hop limit used up      encap_drop_ttl           #encap-tun-to-udp\n"
        "   1.00 M    -  sender is no host's PublicIP  decap_drop_unknown_peer  #decap-udp-to-tun"
    )


def test_a_healthy_node_is_said_to_be_well() -> None:
    lines = screen(QUIET, page=Page(80, 24)).splitlines()
    assert lines[:2] == ["udptun     all is well", ""]
    assert lines[-1] == "drops      none"


def test_a_node_that_forwards_nothing_itself_shows_peers_without_rates() -> None:
    by_kernel = {key: PEER[key] for key in ("subnet", "public_ip", "port", "liveness", "rtt_ms", "path_mtu")}
    document = {
        **QUIET,
        "lease": {**DOCUMENT["lease"], "expires_at": None},
        "backend": {"type": "vxlan", "reason": "x", "device": "flannel.1", "mtu": 1450, "probes": "off: why"},
        "datapath": None,
        "counters": {},
        "peers": [by_kernel],
        "firewall": {"form": None, "masquerade": False, "forward": False},
    }
    assert screen(document).splitlines()[2:] == [
        "lease      10.244.1.0/24 of 10.244.0.0/16, never expires",
        "store      local:/var/lib/udptun/leases.db",
        "underlay   eth0 192.0.2.1, MTU 1500, public 192.0.2.1:8285",
        "backend    vxlan, flannel.1, MTU 1450 (x)",
        "probes     off: why",
        "firewall   no rules",
        "daemon     up 59s, version 0.1.0, pid 10",
        "",
        "peers      1 alive",
        "PEER SUBNET    ADDRESS         STATE  RTT ms  MTU  BY",
        "10.244.2.0/24  192.0.2.2:9000  alive    0.25    -  udptun",
    ]
    alone = screen({**document, "peers": [], "lease": {**DOCUMENT["lease"], "expires_at": NOW_S - 1}})
    assert "peers      none" in alone
    assert "10.244.0.0/16, expired\n" in alone


def test_store_says_whether_it_answers_and_when_it_last_had_news() -> None:
    answers = {**QUIET, "store": "etcd", "store_answers": True, "store_answered_at": NOW_S - 7}
    assert "store      etcd, answers, last news 7s ago\n" in screen(answers)
    assert "store      etcd, away, last news 7s ago\n" in screen({**answers, "store_answers": False})
    assert "store      etcd, away\n" in screen({**answers, "store_answers": False, "store_answered_at": None})


# ------------------------------------------------------------------------------------------------ one screen


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (200, 60), (40, 24)])
def test_whatever_there_is_the_screen_fits_the_terminal(width: int, height: int) -> None:
    rng = random.Random(13)
    problems = [f"problem {i}: {'word ' * rng.randrange(4, 60)}" for i in range(30)]
    peers = [peer(i, liveness=rng.choice(("alive", "dead", "unknown"))) for i in range(100)]
    counters = {name: rng.randrange(10**12) for name in COUNTERS}
    full = {
        **DOCUMENT,
        "problems": problems,
        "skipped": ["x" * 1000] * 150,
        "peers": peers,
        "counters": counters,
        "store": "local:/a/path/that/is/quite/long" * 3,
    }
    for n_problems in (0, 1, 2, 5, 30):
        for n_peers in (0, 1, 12, len(peers)):
            for n_counters in (0, 3, len(counters)):
                part = {
                    "problems": problems[:n_problems],
                    "peers": peers[:n_peers],
                    "counters": dict(list(counters.items())[:n_counters]),
                    "skipped": full["skipped"] if n_problems > 10 else [],
                }
                lines = screen({**full, **part}, page=Page(width, height)).splitlines()
                assert max(map(len, lines)) <= width
                if width > 40:
                    assert len(lines) <= height


def test_ten_thousand_peers_are_summed_behind_those_that_matter() -> None:
    peers = [peer(i, liveness="unknown" if i % 1000 == 3 else "alive") for i in range(10_000)]
    peers[7]["liveness"] = "dead"
    peers[4000]["path_mtu"] = 1400
    peers[5000]["strays"] = 17
    later = [dict(it) for it in peers]
    later[9000]["encap_bytes"] += 1_000_000
    later[9001]["decap_bytes"] += 2_000_000
    lines = screen({**QUIET, "peers": later}, {**QUIET, "peers": peers}, Page(80, 24)).splitlines()
    at = lines.index(next(line for line in lines if line.startswith("PEER SUBNET")))
    assert lines[at - 1] == (
        "peers      9,989 alive, 10 unknown, 1 dead; out 16.0 Mbit/s, in 32.0 Mbit/s"
    )
    assert [line.split()[0] for line in lines[at + 1 : at + 6]] == [
        *("10.0.7.0/24", "10.16.0.0/24", "10.20.0.0/24", "10.36.1.0/24", "10.36.0.0/24")
    ]
    rest = next(line for line in lines if line.startswith("… and"))
    assert re.fullmatch(r"… and 9,99\d more: 9,98\d alive, \d+ unknown; out 0 bit/s, in 0 bit/s", rest)
    assert len(lines) <= 24


def test_few_peers_and_drops_use_the_room_that_there_is() -> None:
    peers = [peer(i) for i in range(12)]
    counters = {name: 5 for name in list(COUNTERS)[2:14] if is_drop(name)}
    text = screen({**QUIET, "peers": peers, "counters": counters}, page=Page(80, 40))
    assert "…" not in text
    assert all(it["subnet"] in text for it in peers)
    assert all(name in text for name in counters)


def test_many_problems_leave_room_for_peers_and_are_counted() -> None:
    text = screen({**QUIET, "problems": [f"number {i}" for i in range(50)]}, page=Page(80, 24))
    shown = re.findall(r"^problem    number (\d+)$", text, re.MULTILINE)
    assert shown == [str(i) for i in range(len(shown))]
    assert f"           … and {50 - len(shown)} more: udptun status | more\n" in text
    assert "10.244.2.0/24" in text
    long = screen({**QUIET, "problems": ["word " * 500, "other"]}, page=Page(80, 24))
    assert re.search(r"^           word .* …\n           … and 1 more", long, re.MULTILINE)


def test_many_skipped_leases_are_counted_and_the_first_of_them_shown() -> None:
    lines = screen({**DOCUMENT, "skipped": [f"key-{n}: {'x' * 1000}" for n in range(150)]}).splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith("skipped")]
    assert lines[at] == "skipped    150 of the leases in the store"
    shown = [line for line in lines if "key-" in line]
    assert len(shown) == 100
    assert max(map(len, shown)) < 320
    assert lines[at + 101] == "           … and 50 more: --json has them all"


def test_a_narrow_terminal_has_the_columns_that_fit() -> None:
    heads = {
        width: next(line for line in screen(DOCUMENT, page=Page(width, 40)).splitlines() if line.startswith("PEER"))
        for width in (50, 80, 120)
    }
    assert heads[50].split()[-2:] == ["ms", "MTU"]
    assert heads[80].split()[-4:] == ["OUT", "bit/s", "IN", "bit/s"]
    assert heads[120].split()[-1] == "BY"


def test_colours_are_for_terminals_that_have_them_and_change_no_text() -> None:
    dead = {**DOCUMENT, "peers": [peer(1, liveness="dead"), peer(2, path_mtu=1400)]}
    coloured = screen(dead, page=Page(80, 30, has_colours=True))
    assert "\x1b[1;31m1 problem\x1b[0m" in coloured
    assert "\x1b[31mdead" in coloured
    assert "\x1b[33m1400" in coloured
    plain = screen(dead, page=Page(80, 30))
    assert "\x1b" not in plain
    assert re.sub(r" *$", "", re.sub(r"\x1b\[[\d;]*m", "", coloured), flags=re.MULTILINE) == plain


def test_red_is_what_is_wrong_and_not_what_to_do_about_it() -> None:
    """Five red lines, of which three said what to do, were hard to read."""
    text = "the host of 10.0.1.0/24 does not answer any more, since 10:52; is it up, and does the network carry it?"
    lines = screen({**QUIET, "problems": [text]}, page=Page(50, 30, has_colours=True)).splitlines()
    assert lines[1:4] == [
        "\x1b[31mproblem    \x1b[0m\x1b[31mthe host of 10.0.1.0/24 does not answer\x1b[0m",
        "\x1b[31m           \x1b[0m\x1b[31many more, since 10:52\x1b[0m; is it up, and",
        "\x1b[31m           \x1b[0mdoes the network carry it?",
    ]


def test_what_was_measured_of_a_dead_host_is_dim() -> None:
    (line,) = _table_lines(screen({**QUIET, "peers": [peer(1, liveness="dead", path_mtu=1472)]}, page=COLOURS))
    assert "\x1b[31mdead" in line
    assert "\x1b[2m  0.25\x1b[0m" in line
    assert "\x1b[2m1472\x1b[0m" in line


COLOURS = Page(80, 30, has_colours=True)


def _table_lines(text: str) -> list[str]:
    lines = text.splitlines()
    (head,) = (i for i, line in enumerate(lines) if "PEER SUBNET" in line)
    return lines[head + 1 : lines.index("", head)]


# ------------------------------------------------------------------------------------------------------ the peers


def dual(**ipv6: Any) -> dict[str, Any]:
    of_ipv6 = {**PEER, "subnet": "fd00:2::/64", "encap_bytes": 100, **ipv6}
    return {
        **QUIET,
        "peers": [{**PEER, "ipv6_subnet": "fd00:2::/64", "path_mtu": 1472}],
        "ipv6": {
            "network": "fd00::/16",
            "subnet": "fd00:1::/64",
            "public_ip": None,
            "address": None,
            "device": "flannel0",
            "mtu": 1472,
            "peers": [of_ipv6],
        },
    }


def test_a_host_with_both_families_is_one_line_with_the_sum_of_its_traffic() -> None:
    later = dual(encap_bytes=100 + 62_500)
    later["peers"][0] = {**later["peers"][0], "encap_bytes": PEER["encap_bytes"] + 62_500}
    (host,) = hosts_of(*looks(later, dual()))
    assert host.subnets == ["10.244.2.0/24", "fd00:2::/64"]
    assert host.rates is not None
    assert host.rates.encap_bytes == 2 * 62_500 / 0.5
    text = screen(later, dual())
    assert "IPv6       fd00:1::/64 of fd00::/16, flannel0, MTU 1472\n" in text
    assert "peers      1 alive; out 2.00 Mbit/s" in text
    assert "fd00:2::/64" in text


def test_a_datapath_that_ipv6_has_beside_the_other_is_shown_and_its_drops_are_in_the_sums() -> None:
    document = dual(public_ip="2001:db8::2", learned=[{"address": "2001:db8::9", "port": 9}])
    document["counters"] = {"encap_drop_ttl": 1}
    document["ipv6"] |= {
        "datapath": {"pid": 21, "uptime_s": 3.0, "standby_pids": [22], "workers": ["running"]},
        "counters": {"encap_drop_ttl": 3, "decap_drop_vxlan_mac": 2},
    }
    text = screen(document)
    assert "\n           for IPv6: up 3s, 1 worker, standby ready\n" in text
    assert "\ndrops      6 packets, none now" in text
    assert "\n        4  -  TTL or hop limit used up" in text
    views = Views("2001:db8::2")
    views.note(Look(document, 0, NOW_S))
    assert views.lines(Page())[3] == "learned    sends from [2001:db8::9]:9, too"


def test_a_host_that_is_dead_by_one_family_alone_says_by_which() -> None:
    (host,) = hosts_of(Look(dual(liveness="dead"), 0, 0), None)
    assert (host.liveness, host.rank[0]) == ("IPv6 dead", 0)
    assert "1 dead" in screen(dual(liveness="dead"))


def test_where_ipv6_is_alone_each_host_is_shown_once() -> None:
    document = dual()
    document["peers"] = document["ipv6"]["peers"]
    assert [host.subnets for host in hosts_of(Look(document, 0, 0), None)] == [["fd00:2::/64"]]


def test_a_path_over_ipv6_is_not_narrow_for_its_longer_header() -> None:
    peers = [
        peer(1, public_ip="fd99::1", path_mtu=1452),
        peer(2, public_ip="fd99::2", path_mtu=1451),
        peer(3, path_mtu=1471),
    ]
    document = {**QUIET, "peers": peers}
    narrow = {host.first["subnet"]: host.is_narrow for host in hosts_of(Look(document, 0, 0), None)}
    assert narrow == {"10.0.1.0/24": False, "10.0.2.0/24": True, "10.0.3.0/24": True}


def test_counters_that_begin_anew_have_no_rate() -> None:
    """A datapath that could not be adopted has counters of its own, which begin at zero."""
    after = {**QUIET, "peers": [{**PEER, "encap_packets": 0, "encap_bytes": 0}]}
    (host,) = hosts_of(*looks(after, QUIET))
    assert host.rates is None
    text = screen({**after, "counters": {"encap_drop_ttl": 1}}, {**QUIET, "counters": {"encap_drop_ttl": 9}})
    assert "drops      1 packets, none now" in text


def test_a_peer_that_is_new_has_had_nothing_to_count_before() -> None:
    rates = [host.rates for host in hosts_of(*looks({**QUIET, "peers": [peer(1, encap_bytes=50)]}, QUIET))]
    assert [it and it.encap_bytes for it in rates] == [100]


# ---------------------------------------------------------------------------------------------------- one of them


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("10.244.2.0/24", True),
        ("10.244.2.77", True),
        ("192.0.2.2", True),
        ("fd00:2::/64", True),
        ("fd00:2:0:0::1:5", True),
        ("192.0.2.3", False),
        ("10.244.0.0/16", False),
        ("10.244.1.1", False),
        ("fd00:3::1", False),
    ],
)
def test_a_peer_is_found_by_its_subnets_its_address_and_its_pods(wanted: str, found: bool) -> None:
    assert matching(dual(public_ip="fd99::2"), wanted) == ({"10.244.2.0/24", "fd00:2::/64"} if found else set())


def test_a_host_with_the_shortcut_says_so_and_of_each_peer_who_sends_to_it() -> None:
    document = {**dual(), "datapath": {**DOCUMENT["datapath"], "shortcut": "on"}}
    document["peers"][0]["shortcut"] = True
    assert "shortcut on" in screen(document)
    by_kernel = "the kernel (shortcut), slower for floods of small datagrams, and with GRO for many streams"
    for is_sent_to, expected in ((True, by_kernel), (False, "the workers")):
        document["peers"][0]["shortcut"] = is_sent_to
        views = Views("10.244.2.0/24")
        views.note(next(iter(looks(document, document))))
        assert f"sent by    {expected}" in views.lines(Page())
    why = {**document["datapath"], "shortcut": "off: why"}
    assert "shortcut off: why" in screen({**document, "datapath": why})


def test_all_about_one_peer() -> None:
    document = dual()
    document["problems"] = ["the host of 10.244.2.0/24 is away", "192.0.2.22 is not this one", "10.244.2.0/24x neither"]
    document["peers"][0] |= {
        "learned": [{"address": "192.0.2.9", "port": 40_000}, {"address": "192.0.2.10", "port": None}],
        "strays": 3,
        "ecn": True,
        "any_source_port": True,
        "path_mtu": 1400,
        "probes_sent": 12,
        "probes_lost": 3,
        "expires_at": NOW_S + 60,
    }
    views = Views("192.0.2.9")
    for look in reversed(looks(document, document)):
        views.note(look)
    assert views.lines(Page()) == [
        "problem    the host of 10.244.2.0/24 is away",
        "",
        "peer       10.244.2.0/24 and fd00:2::/64",
        "state      alive, its last answer took 0.25 ms",
        "probes     12 in the last 20 minutes, 3 lost",
        "address    192.0.2.2, UDP port 9000, takes datagrams from any port",
        "learned    sends from 192.0.2.9:40000, too",
        "learned    sends from 192.0.2.10, too",
        "strays     3 packets of its subnet came from elsewhere and were dropped",
        "path       MTU 1400, the device's is 1472",
        "ECN        marks of congestion reach its pods",
        "lease      by flannel, expires in 1m00s",
        "IPv4 out   0 bit/s, 0 packets/s; 2 B in 1.23 M packets so far",
        "IPv4 in    0 bit/s, 0 packets/s; 4 B in 3 packets so far",
        "IPv6 out   0 bit/s, 0 packets/s; 100 B in 1.23 M packets so far",
        "IPv6 in    0 bit/s, 0 packets/s; 4 B in 3 packets so far",
    ]


def test_a_peer_by_ipv6_alone_whose_packets_the_kernel_carries_is_shown() -> None:
    """Its item has no port: `status --peer` ended with KeyError."""
    document = {**dual(), "peers": []}
    of_ipv6 = {"subnet": "fd00:2::/64", "public_ip": "2001:db8::2", "liveness": "alive", "rtt_ms": 1, "path_mtu": 1450}
    document["ipv6"]["peers"] = [of_ipv6]
    views = Views("fd00:2::/64")
    views.note(Look(document, 0, NOW_S))
    assert "address    2001:db8::2" in views.lines(Page())


def test_an_ipv6_network_of_which_the_lease_has_no_subnet_is_said_to_have_none() -> None:
    """It said "None of fd00::/16"."""
    document = dual()
    document["ipv6"] |= {"subnet": None, "mtu": None}
    assert "IPv6       no subnet of fd00::/16, public none, not carried\n" in screen(document)


def test_hosts_that_share_an_address_are_shown_one_below_the_other() -> None:
    views = Views("192.0.2.2")
    views.note(Look({**QUIET, "peers": [PEER, {**PEER, "subnet": "10.244.3.0/24"}]}, 0, NOW_S))
    assert [line for line in views.lines(Page()) if line.startswith("peer")] == [
        *("peer       10.244.2.0/24", "peer       10.244.3.0/24")
    ]


def test_while_the_daemon_is_away_the_last_screen_stays_below_the_reason() -> None:
    views = Views(None)
    views.note_failure("no daemon", 10)
    assert views.lines(Page()) == ["udptun     no daemon"]
    views.note(Look(QUIET, 11, NOW_S))
    views.note_failure("no daemon", 12)
    views.note_failure("not ready", 14)
    lines = views.lines(Page(80, 24))
    assert lines[:3] == ["udptun     not ready (for 2s)", "", "udptun     all is well"]
    assert len(lines) <= 24
    views.note(Look(QUIET, 15, NOW_S))
    assert views.lines(Page(80, 24))[0] == "udptun     all is well"


@pytest.mark.parametrize(
    ("n", "scaled", "count"),
    [
        (0, "0", "0"),
        (0.4, "0.4", "0"),
        (7, "7", "7"),
        (999.4, "999", "999"),
        (999.6, "1.00 k", "1,000"),
        (12_345, "12.3 k", "12,345"),
        (999_600, "1.00 M", "999,600"),
        (1_234_567, "1.23 M", "1.23 M"),
        (45_600_000_000, "45.6 G", "45.6 G"),
        (10**21, "1000000 P", "1000000 P"),
    ],
)
def test_numbers_have_three_digits_and_a_prefix(n: float, scaled: str, count: str) -> None:
    assert (figures.scaled(n), figures.count(n)) == (scaled, count)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.9, "0s"), (59.9, "59s"), (61, "1m01s"), (7265, "2h01m"), (86_399, "23h59m"), (273_600, "3d04h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert figures.duration(seconds) == text


# ------------------------------------------------------------------------------------------------------- the page


def of_the_page(seconds_ago: float) -> dict[str, Any]:
    """The host of docs/status.md, and its two peers."""
    peer = {
        **PEER,
        "udptun": True,
        "any_source_port": True,
        "ecn": True,
        "expires_at": NOW_S + 23 * 3600 + 42 * 60,
        "port": 8285,
        "path_mtu": 1472,
    }
    dead = {**peer, "subnet": "10.244.95.0/24", "public_ip": "192.168.77.13", "liveness": "dead", "rtt_ms": 0.24}
    n_packets, n_bytes = 2_783 - round(220 * seconds_ago), 3_880_000 - round(322_500 * seconds_ago)
    traffic = {"encap_packets": n_packets, "encap_bytes": n_bytes, "decap_packets": n_packets, "decap_bytes": n_bytes}
    alive = {**peer, **traffic, "subnet": "10.244.8.0/24", "public_ip": "192.168.77.12", "rtt_ms": 0.05}
    alive |= {"probes_sent": 3, "probes_lost": 0}
    line = (
        "the host of 10.244.95.0/24 at 192.168.77.13 UDP port 8285 has answered and does not any more, nothing has "
        "come from it since 10:52:37; packets to its pods are refused (host unreachable) until something does; is it "
        "up, and does the network between the two hosts carry the tunnel's datagrams?"
    )
    return {
        **QUIET,
        "pid": 2,
        "uptime_s": 1_050,
        "store": "local:/run/udptun-lab/leases.db",
        "store_answers": True,
        "store_answered_at": NOW_S - 1_049,
        "lease": {
            **DOCUMENT["lease"],
            "subnet": "10.244.90.0/24",
            "public_ip": "192.168.77.11",
            "expires_at": NOW_S + 23 * 3600 + 42 * 60,
        },
        "underlay": {"interface": "eth0", "address": "192.168.77.11", "mtu": 1500},
        "backend": {**DOCUMENT["backend"], "offloads": names(ALL)},
        "datapath": {**DOCUMENT["datapath"], "uptime_s": 1_049, "workers": ["running"]},
        "firewall": {"form": "iptables", "masquerade": False, "forward": True},
        "peers": [dead, alive],
        "counters": {
            "encap_drop_dead": 3_053 - round(62 * seconds_ago),
            "decap_drop_length": 900,
            "encap_drop_no_route": 300,
        },
        "problems": [line],
    }


def test_the_page_shows_what_the_screens_print() -> None:
    screen_block, peer_block, *_ = blocks(ROOT / "docs" / "status.md")
    views = {wanted: Views(wanted) for wanted in (None, "10.244.8.0/24")}
    for seconds_ago in (0.5, 0):
        for view in views.values():
            view.note(Look(of_the_page(seconds_ago), 100 - seconds_ago, NOW_S))
    shown = views[None].lines(Page(80, 24))
    assert [line for line in shown if line] == [line for line in screen_block if line]
    assert views["10.244.8.0/24"].lines(Page(80, 24)) == peer_block
