"""Echo requests as scapy reads them, and replies as it makes them."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import ICMPv6EchoReply, ICMPv6EchoRequest, IPv6

from udptun.core.echo import (
    MIN_LENGTH,
    Echo,
    echo_message,
    echo_reply,
    echo_request,
    min_length,
    parse_echo_reply,
    parse_echo_reply_message,
    parse_echo_request,
)

HERE, THERE = IPv4Address("10.244.1.0"), IPv4Address("10.244.2.0")
NONCE = bytes(range(200, 208))
REPLY = bytes(IP(src=str(THERE), dst=str(HERE)) / ICMP(type=0, id=0xFFFE, seq=9) / (NONCE + bytes(100)))


@pytest.mark.parametrize("length", [MIN_LENGTH, MIN_LENGTH + 1, 1472, 65_507])
def test_request_with_the_zeros_after_it_is_an_echo_with_right_checksums(length: int) -> None:
    head = echo_request(HERE, THERE, 0xFFFE, 9, NONCE, length)
    whole = IP(head + bytes(length - len(head)))
    expected = IP(src=str(HERE), dst=str(THERE), id=0, flags="DF", ttl=64) / ICMP(id=0xFFFE, seq=9)
    assert bytes(whole) == bytes(expected / (NONCE + bytes(length - MIN_LENGTH)))


@pytest.mark.parametrize("kept", [MIN_LENGTH, 100, len(REPLY)])
def test_reply_is_known_from_what_it_begins_with(kept: int) -> None:
    assert parse_echo_reply(REPLY[:kept]) == Echo(THERE, HERE, 0xFFFE, 9, NONCE)


def test_reply_may_have_options() -> None:
    packet = bytes(IP(src=str(THERE), dst=str(HERE), options=b"\1" * 8) / ICMP(type=0, id=3, seq=4) / NONCE)
    assert parse_echo_reply(packet) == Echo(THERE, HERE, 3, 4, NONCE)
    assert parse_echo_reply(packet[:-1]) is None


def test_reply_to_a_request_is_the_one_that_a_kernel_gives() -> None:
    request = parse_echo_request(echo_request(HERE, THERE, 0xFFFE, 9, NONCE))
    assert request == Echo(HERE, THERE, 0xFFFE, 9, NONCE)
    expected = IP(src=str(THERE), dst=str(HERE), id=0, flags="DF", ttl=64) / ICMP(type=0, id=0xFFFE, seq=9) / NONCE
    assert echo_reply(request) == bytes(expected)
    assert parse_echo_request(echo_reply(request)) is None


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(REPLY[: MIN_LENGTH - 1], id="cut"),
        pytest.param(b"", id="empty"),
        pytest.param(b"\x65" + REPLY[1:], id="of version 6"),
        pytest.param(echo_request(HERE, THERE, 1, 2, NONCE), id="a request"),
        pytest.param(bytes(IP() / ICMP(type=3, code=1) / NONCE), id="an error"),
        pytest.param(bytes(IP() / UDP() / NONCE), id="no ICMP"),
    ],
)
def test_anything_else_is_no_reply(packet: bytes) -> None:
    assert parse_echo_reply(packet) is None


@pytest.mark.parametrize("length", [MIN_LENGTH, 1472])
def test_message_is_what_the_request_has_after_its_header_but_for_checksum_and_id(length: int) -> None:
    expected = bytes(ICMP(id=0, seq=0, chksum=0) / (NONCE + bytes(length - MIN_LENGTH)))
    assert echo_message(NONCE, length, 4) == expected
    in_ipv6 = echo_message(NONCE, length + 20, 6)
    assert (in_ipv6[:2], in_ipv6[2:]) == (b"\x80\0", expected[2:])


def test_reply_message_is_known_from_what_it_begins_with() -> None:
    message = REPLY[20:]
    assert parse_echo_reply_message(message[:16], 4) == parse_echo_reply_message(message, 4) == NONCE
    assert parse_echo_reply_message(message[:15], 4) is None
    assert parse_echo_reply_message(echo_message(NONCE, MIN_LENGTH, 4), 4) is None
    assert parse_echo_reply_message(b"\x81" + message[1:], 6) == NONCE
    assert parse_echo_reply_message(b"\x81" + message[1:], 4) is None
    assert parse_echo_reply_message(message, 6) is None


# --- IPv6

HERE_V6, THERE_V6 = IPv6Address("fd00:244:0:1::"), IPv6Address("fd00:244:0:2::")
REPLY_V6 = bytes(IPv6(src=str(THERE_V6), dst=str(HERE_V6)) / ICMPv6EchoReply(id=0xFFFE, seq=9, data=NONCE + bytes(99)))


@pytest.mark.parametrize("length", [0, 57, 1472, 65_535])
def test_request_of_ipv6_is_an_echo_with_the_right_checksum(length: int) -> None:
    head = echo_request(HERE_V6, THERE_V6, 0xFFFE, 9, NONCE, length)
    n_zeros = (length or min_length(HERE_V6)) - len(head)
    message = ICMPv6EchoRequest(id=0xFFFE, seq=9, data=NONCE + bytes(n_zeros))
    assert head + bytes(n_zeros) == bytes(IPv6(src=str(HERE_V6), dst=str(THERE_V6)) / message)


def test_reply_of_ipv6_is_known_from_what_it_begins_with_and_is_made_as_a_kernel_makes_it() -> None:
    assert parse_echo_reply(REPLY_V6) == parse_echo_reply(REPLY_V6[:56]) == Echo(THERE_V6, HERE_V6, 0xFFFE, 9, NONCE)
    request = parse_echo_request(echo_request(HERE_V6, THERE_V6, 3, 4, NONCE))
    assert request == Echo(HERE_V6, THERE_V6, 3, 4, NONCE)
    message = ICMPv6EchoReply(id=3, seq=4, data=NONCE)
    assert echo_reply(request) == bytes(IPv6(src=str(THERE_V6), dst=str(HERE_V6)) / message)


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(REPLY_V6[:55], id="cut"),
        pytest.param(echo_request(HERE_V6, THERE_V6, 1, 2, NONCE), id="a request"),
        pytest.param(bytes(IPv6() / UDP() / NONCE), id="no ICMPv6"),
        pytest.param(b"\x45" + REPLY_V6[1:], id="of version 4"),
        pytest.param(bytes(IPv6(nh=1)) + bytes(ICMP(type=0) / NONCE), id="ICMP of IPv4"),
    ],
)
def test_anything_else_of_ipv6_is_no_reply(packet: bytes) -> None:
    assert parse_echo_reply(packet) is None
