"""What `_kabi` took from this machine's headers, against numbers that are kernel ABI on every Linux."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import pytest

from udptun._kabi import ffi, lib


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("TUNSETIFF", 0x400454CA),
        ("TUNGETIFF", 0x800454D2),
        ("TUNSETOFFLOAD", 0x400454D0),
        ("TUNSETPERSIST", 0x400454CB),
        ("TUNSETVNETHDRSZ", 0x400454D8),
        ("TUNGETFEATURES", 0x800454CF),
        ("IFF_TUN", 0x0001),
        ("IFF_NO_PI", 0x1000),
        ("IFF_VNET_HDR", 0x4000),
        ("IFF_MULTI_QUEUE", 0x0100),
        ("UDP_SEGMENT", 103),
        ("UDP_GRO", 104),
        ("TUN_F_USO4", 0x20),
        ("VIRTIO_NET_HDR_F_NEEDS_CSUM", 1),
        ("VIRTIO_NET_HDR_GSO_TCPV4", 1),
        ("VIRTIO_NET_HDR_GSO_UDP_L4", 5),
        ("IP_MTU", 14),
        ("IP_MTU_DISCOVER", 10),
        ("IP_PMTUDISC_DO", 2),
        ("SO_RCVBUFFORCE", 33),
        ("CLONE_NEWNET", 0x40000000),
    ],
)
def test_constant_is_the_kernels(name: str, number: int) -> None:
    assert getattr(lib, name) == number


def test_constants_agree_with_the_standard_library_where_it_has_them() -> None:
    assert lib.SOL_UDP == socket.IPPROTO_UDP
    assert lib.IFNAMSIZ == 16


def test_virtio_net_header_has_the_layout_of_the_wire_format() -> None:
    assert ffi.sizeof("struct virtio_net_hdr") == 10
    fields = ("flags", "gso_type", "hdr_len", "gso_size", "csum_start", "csum_offset")
    assert [ffi.offsetof("struct virtio_net_hdr", field) for field in fields] == [0, 1, 2, 4, 6, 8]


def test_ifreq_has_the_size_that_ioctl_copies() -> None:
    assert ffi.sizeof("struct ifreq") == 16 + (24 if ffi.sizeof("void *") == 8 else 16)


def test_failing_call_returns_minus_one_and_leaves_errno() -> None:
    with Path("/dev/null").open("rb") as not_a_namespace:
        assert lib.setns(not_a_namespace.fileno(), lib.CLONE_NEWNET) == -1
    assert ffi.errno == errno.EINVAL
    assert lib.unshare(-1) == -1
    assert ffi.errno == errno.EINVAL


def test_parent_death_signal_can_be_set_and_taken_back() -> None:
    assert lib.prctl_pdeathsig(0) == 0
    assert lib.prctl_pdeathsig(9999) == -1
    assert ffi.errno == errno.EINVAL
