"""Offloads by name, and kernels that must not be asked for some."""

from __future__ import annotations

import pytest

from udptun.backends.choice import parse_net_conf
from udptun.backends.udp import UdpKeys
from udptun.core.errors import ConfigError
from udptun.core.offload import ALL, Offload, corrupted_by, names, parse, tells_marks


def test_every_offload_is_found_by_the_name_it_is_shown_with() -> None:
    assert parse(names(ALL)) == ALL
    assert parse(["TSO", "udp_Gro"]) == Offload.TSO | Offload.UDP_GRO
    assert parse([]) == Offload(0)


def test_unknown_name_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="'tsoo' is not one of vnet_hdr, tso, uso, udp_segment"):
        parse(["tsoo"])


@pytest.mark.parametrize(
    ("release", "bad"),
    [
        ("6.18.44-generic", Offload(0)),
        ("7.0.0-rc1", Offload.UDP_SEGMENT),
        ("7.1.4", Offload.UDP_SEGMENT),
        ("7.1.5-1-amd64", Offload(0)),
        ("7.1", Offload.UDP_SEGMENT),
        ("some kernel", Offload(0)),
    ],
)
def test_kernel_that_corrupts_segmented_sends_is_not_asked_for_them(release: str, bad: Offload) -> None:
    assert corrupted_by(release) == bad


@pytest.mark.parametrize(
    ("release", "told"),
    [
        ("5.10.217", False),
        ("5.15.158-generic", False),
        ("5.15.159", True),
        ("6.1.90", False),
        ("6.1.91-1-amd64", True),
        ("6.2.0", False),
        ("6.6.30", False),
        ("6.8.10", True),
        ("6.9.0-rc7", True),
        ("6.18.44", True),
        ("some kernel", False),
    ],
)
def test_marks_are_told_where_datagrams_that_differ_in_them_are_not_merged(release: str, told: bool) -> None:
    """Elsewhere they are without UDP_GRO."""
    assert tells_marks(ALL, release) is told
    assert tells_marks(ALL & ~Offload.UDP_GRO, release) is (release != "some kernel")
    assert not tells_marks(ALL & ~Offload.ECN, release)


def test_configuration_switches_offloads_off_one_by_one() -> None:
    text = '{"Network": "10.244.0.0/16", "Backend": {"Type": "udp", "OffloadDisabled": ["uso", "write_udp"]}}'
    backend = parse_net_conf(text, "it").backend
    assert isinstance(backend, UdpKeys)
    assert backend.offload == ALL & ~Offload.USO & ~Offload.WRITE_UDP


@pytest.mark.parametrize("value", ['"tso"', "[1]", '["gso"]', "true", '{"tso": false}'])
def test_configuration_refuses_what_is_no_list_of_offloads(value: str) -> None:
    text = '{"Network": "10.244.0.0/16", "Backend": {"Type": "udp", "OffloadDisabled": ' + value + "}}"
    with pytest.raises(ConfigError, match=r"Backend\.OffloadDisabled"):
        parse_net_conf(text, "it")
