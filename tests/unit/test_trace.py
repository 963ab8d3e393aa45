"""What `udptun trace` asks, and how it says the answer; tests/netns/test_trace_hosts.py asks a daemon."""

from __future__ import annotations

import asyncio
import re
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from tests.packets import icmp_message, internet_sum, ipv4, ipv6, tcp_segment, udp_segment
from udptun.commands.trace import render
from udptun.control.trace.checks import DECAP, ENCAP, SEND, Check, outcomes
from udptun.control.trace.kernel import KernelView
from udptun.core.counter_words import COUNTERS
from udptun.core.errors import KernelError, UsageError
from udptun.core.trace_request import TraceRequest
from udptun.kernel.netlink import Netlink

WIRE_FORMAT = Path(__file__).parents[2] / "docs/wire-format.md"
POD, THEIRS, POD6, THEIRS6 = "10.244.1.2", "10.244.2.2", "fd00:244:0:1::2", "fd00:244:0:2::2"


def test_words_that_are_not_given_are_filled_in() -> None:
    assert TraceRequest.from_words(POD, THEIRS) == TraceRequest(ip_address(POD), ip_address(THEIRS), 1, None, 84)
    assert TraceRequest.from_words(POD6, THEIRS6).protocol == 58
    tcp = TraceRequest.from_words(POD, THEIRS, "tcp")
    assert (tcp.protocol, tcp.port, tcp.length, tcp.ttl) == (6, 80, 96, 64)
    assert TraceRequest.from_words(POD, THEIRS, "47").length == 76


@pytest.mark.parametrize(
    ("outer", "address", "port"),
    [
        ("192.0.2.1", "192.0.2.1", None),
        ("192.0.2.1:8285", "192.0.2.1", 8285),
        ("2001:db8::1", "2001:db8::1", None),
        ("[2001:db8::1]", "2001:db8::1", None),
        ("[2001:db8::1]:8285", "2001:db8::1", 8285),
    ],
)
def test_sender_of_the_datagram_may_have_a_port(outer: str, address: str, port: int | None) -> None:
    request = TraceRequest.from_words(POD, THEIRS, outer=outer)
    assert (request.outer, request.outer_port) == (ip_address(address), port)


@pytest.mark.parametrize(
    "request_",
    [
        TraceRequest.from_words(POD, THEIRS),
        TraceRequest.from_words(POD6, THEIRS6, "udp", "53", size="1280", ttl="2"),
        TraceRequest.from_words(POD, THEIRS, "tcp", "443", has_df=True, outer="192.0.2.1:8285"),
        TraceRequest.from_words(POD, THEIRS, "4", outer="[2001:db8::1]:0"),
    ],
)
def test_daemon_understands_the_query_of_every_request(request_: TraceRequest) -> None:
    assert TraceRequest.from_query(request_.query()) == request_


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("pod-7", THEIRS), "SRC 'pod-7' is no IP address"),
        ((POD, THEIRS6), f"SRC {POD} and DST {THEIRS6} are of different families"),
        ((POD, "fe80::1%eth0"), "DST 'fe80::1%eth0' is no IP address"),
        ((POD, THEIRS, "sctp"), "PROTO 'sctp' is no number from 0 to 255 or tcp, udp, icmp"),
        ((POD, THEIRS, "udp", "0"), "PORT '0' is no number from 1 to 65535"),
        ((POD, THEIRS, "icmp", "53"), "PORT 53: only tcp and udp have ports"),
    ],
)
def test_wrong_word_is_named(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        TraceRequest.from_words(*words)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"size": "27"}, "--size '27' is no number from 28 to 65535"),
        ({"size": "65536"}, "--size '65536' is no number from 28 to 65535"),
        ({"ttl": "256"}, "--ttl '256' is no number from 0 to 255"),
        ({"outer": "h2"}, "--from 'h2' is no IP address"),
        ({"outer": "192.0.2.1:x"}, "--from port 'x' is no number from 0 to 65535"),
    ],
)
def test_wrong_flag_is_named(flags: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        TraceRequest.from_words(POD, THEIRS, **flags)  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["size", "ttl"])
def test_a_number_of_thousands_of_digits_is_refused_as_any_other(what: str) -> None:
    """int() raised ValueError for it: the command ended with a traceback, the daemon answered 500."""
    with pytest.raises(UsageError, match="is no number"):
        TraceRequest.from_query(f"src={POD}&dst={THEIRS}&{what}={'1' * 5000}")


@pytest.mark.parametrize("query", ["", "src=10.0.0.1", "src=x&dst=y", "src=10.0.0.1&dst=10.0.0.2&size=1", "=&&=="])
def test_wrong_query_is_refused(query: str) -> None:
    with pytest.raises(UsageError):
        TraceRequest.from_query(query)


def test_packet_is_the_one_that_was_asked_about() -> None:
    def packet(*words: str, **flags: Any) -> bytes:
        return TraceRequest.from_words(*words, **flags).packet()

    ports = (49152, 53)
    udp = udp_segment(POD, THEIRS, bytes(72), ports=ports, check=0)
    assert packet(POD, THEIRS, "udp", "53", size="100") == ipv4(POD, THEIRS, udp, ident=0)
    assert packet(POD, THEIRS, "udp", "53", size="100", ttl="1", has_df=True) == ipv4(
        POD, THEIRS, udp, ident=0, flags="DF", ttl=1
    )
    udp = udp_segment(POD6, THEIRS6, bytes(52), ports=ports, check=0)
    assert packet(POD6, THEIRS6, "udp", "53", size="100") == ipv6(POD6, THEIRS6, udp, flow_label=0)
    tcp = tcp_segment(POD, THEIRS, ports=ports, sequence=0, acknowledgement=0, flags=2, window=0, check=0)
    assert packet(POD, THEIRS, "tcp", "53", size="40") == ipv4(POD, THEIRS, tcp, ident=0, protocol=6)
    echo = packet(POD, THEIRS)
    assert (len(echo), echo[9], echo[20], internet_sum(echo[:20])) == (84, 1, icmp_message(8, 0)[0], 0xFFFF)
    assert packet(POD6, THEIRS6)[40] == 128


def counters_of(section: str) -> list[str]:
    """The counters of a section's tables, from top to bottom."""
    body = WIRE_FORMAT.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\|.*\| `(\w+)` \|", body, re.MULTILINE)


@pytest.mark.parametrize(
    ("checks", "section"), [([*ENCAP, SEND], "Encap: TUN to UDP"), (list(DECAP), "Decap: UDP to TUN")]
)
def test_checks_stand_in_the_order_of_the_tables(checks: list[Check], section: str) -> None:
    """Loops and dead peers have tables of their own, which say between which rows they stand."""
    apart = ("_loop", "_dead")
    ours = [it.counters[0] for it in checks if not it.counters[0].endswith(apart)]
    assert ours == [it for it in dict.fromkeys(counters_of(section)) if it in ours]
    names = [it.counters[0] for it in checks]
    if "encap_drop_loop" in names:
        # "before row 4", "after row 4".
        at = names.index("encap_drop_no_route")
        assert names[at - 1 : at + 2] == ["encap_drop_loop", "encap_drop_no_route", "encap_drop_dead"]
    else:
        # "before row 16".
        assert names[names.index("decap_drop_ttl") - 1] == "decap_drop_loop"


def test_every_counter_of_a_check_is_one_of_the_datapaths() -> None:
    assert {counter for check in (*ENCAP, SEND, *DECAP) for counter in check.counters} <= set(COUNTERS)


def test_checks_behind_the_one_that_fails_are_not_reached() -> None:
    found = outcomes(ENCAP, "encap_drop_dead", {"encap_drop_no_route": "10.244.2.0/24", "encap_drop_ttl": "64"})
    assert [it["passed"] for it in found] == [True, True, True, False, None, None]
    assert [it["fact"] for it in found] == ["", "", "10.244.2.0/24", "", "", ""]
    assert all(it["passed"] for it in outcomes(ENCAP, "encap_sent", {}))
    (last,) = outcomes((SEND,), "encap_drop_too_big", {})
    assert (last["passed"], last["counter"]) == (False, "encap_drop_too_big")
    assert outcomes((SEND,), "encap_drop_ttl", {}, is_reached=False)[0]["passed"] is None


def test_family_that_is_not_carried_has_the_counter_of_its_version() -> None:
    assert outcomes(ENCAP, "encap_drop_malformed", {})[0]["counter"] == "encap_drop_malformed"
    assert outcomes(ENCAP, "encap_drop_ipv6", {})[0]["passed"] is False


def test_person_reads_what_the_kernel_does_with_vxlan() -> None:
    document = {
        "packet": {
            "source": POD,
            "destination": THEIRS,
            "protocol": 132,
            "port": None,
            "bytes": 3000,
            "ttl": 64,
            "df": False,
        },
        "direction": "outgoing",
        "backend": "vxlan",
        "kernel": {"from_device": None, "route": "r", "refusal": None, "mtu": 1450, "bytes": 1444},
        "peer": {"subnet": "10.244.2.0/24", "public_ip": "192.0.2.2", "port": None, "mtu": None, "dead": None},
        "checks": [],
        "outer": None,
        "longer": None,
        "senders": [],
        "neighbour": {"ip": "10.244.2.0", "mac": "aa:bb:cc:dd:ee:ff", "vtep": "192.0.2.2"},
        "verdict": {"delivered": True, "where": "kernel", "counter": None, "words": "it goes", "docs": None},
    }
    assert render(document) == (
        f"{POD} -> {THEIRS} protocol 132, 3000 bytes, TTL 64\n"
        "  kernel   of this host: r, MTU 1450\n"
        "           in fragments of 1444 bytes\n"
        "           neighbour 10.244.2.0 mac aa:bb:cc:dd:ee:ff vtep 192.0.2.2\n"
        "  peer     10.244.2.0/24 of 192.0.2.2\n"
        "delivered: it goes\n"
    )


def test_colours_on_a_terminal_are_for_marks_and_the_end_and_change_no_text() -> None:
    check = {"check": "it fits", "fact": "", "counter": "encap_drop_too_big"}
    document = {
        "packet": {
            "source": "fd00::1",
            "destination": "fd00::2",
            "protocol": 6,
            "port": 80,
            "bytes": 60,
            "ttl": 64,
            "df": False,
        },
        "direction": "outgoing",
        "kernel": None,
        "peer": None,
        "checks": [{**check, "passed": True}, {**check, "passed": False}, {**check, "passed": None}],
        "outer": None,
        "longer": None,
        "senders": [],
        "verdict": {"delivered": False, "counter": None, "words": "too long", "docs": "docs/wire-format.md#x"},
    }
    coloured = render(document, has_colour=True)
    assert coloured.splitlines() == [
        "fd00::1 -> fd00::2 tcp 80, 60 bytes, TTL 64",
        "\x1b[2m  checks   \x1b[0m\x1b[32mok  \x1b[0m it fits",
        "\x1b[2m           \x1b[0m\x1b[1;31mFAIL\x1b[0m it fits (encap_drop_too_big)",
        "\x1b[2m           \x1b[0m\x1b[2m-   \x1b[0m it fits",
        "\x1b[1;31mdropped\x1b[0m: too long",
        "\x1b[2m  see docs/wire-format.md#x\x1b[0m",
    ]
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == render(document)


def test_a_device_that_has_gone_meanwhile_is_an_error_of_the_kernel() -> None:
    """The request failed with a RuntimeError, and nobody was told why."""
    view = KernelView(Netlink(), {})
    for question in (view.mac_of("gone0", ip_address(POD)), view.vtep_of("gone0", "0e:00:00:00:00:01")):
        with pytest.raises(KernelError, match="cannot find the device gone0: ENODEV"):
            asyncio.run(question)
