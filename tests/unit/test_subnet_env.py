"""subnet.env: byte for byte flannel's, read leniently, replaced in one step."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import pytest
from any_text import TEXT
from hypothesis import given

from udptun.backends.choice import parse_net_conf
from udptun.config import subnet_env
from udptun.core.errors import KernelError
from udptun.core.lease import Subnets

V4 = Subnets(IPv4Network("10.244.30.0/24"))
V6 = Subnets(None, IPv6Network("fd00::/64"))
DUAL = Subnets(IPv4Network("10.244.30.0/24"), IPv6Network("fd00:244:0:55::/64"))


def test_render_is_byte_for_byte_flannels() -> None:
    conf = parse_net_conf('{"Network":"10.244.0.0/16"}', "test")
    assert subnet_env.render(conf, V4, 1472, ip_masq=True) == (
        "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.30.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n"
    )


def test_render_has_the_ipv6_lines_when_ipv6_is_on() -> None:
    text = '{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:244::/48"}'
    assert subnet_env.render(parse_net_conf(text, "test"), DUAL, 1472, ip_masq=False) == (
        "FLANNEL_NETWORK=10.244.0.0/16\n"
        "FLANNEL_SUBNET=10.244.30.1/24\n"
        "FLANNEL_IPV6_NETWORK=fd00:244::/48\n"
        "FLANNEL_IPV6_SUBNET=fd00:244:0:55::1/64\n"
        "FLANNEL_MTU=1472\n"
        "FLANNEL_IPMASQ=false\n"
    )


def test_render_has_no_ipv4_lines_when_ipv6_is_alone() -> None:
    text = '{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:244::/48"}'
    assert subnet_env.render(parse_net_conf(text, "test"), Subnets(None, DUAL.ipv6), 1430, ip_masq=True) == (
        "FLANNEL_IPV6_NETWORK=fd00:244::/48\n"
        "FLANNEL_IPV6_SUBNET=fd00:244:0:55::1/64\n"
        "FLANNEL_MTU=1430\n"
        "FLANNEL_IPMASQ=true\n"
    )


@pytest.mark.parametrize(
    ("text", "subnets"),
    [
        ("FLANNEL_IPV6_SUBNET=fd00::1/64\n", V6),
        ("FLANNEL_SUBNET=10.244.30.1/24\n", V4),
        ("FLANNEL_SUBNET=10.244.30.1/24\nFLANNEL_IPV6_SUBNET=fd00:244:0:55::1/64\n", DUAL),
        ("# comment\n\nexport FLANNEL_SUBNET = '10.244.30.1/24'\r\n", V4),
        ('FLANNEL_SUBNET="10.244.30.1/24" \nwhat is this\n', V4),
        ("FLANNEL_SUBNET=10.244.30.1/24 # ours\n", V4),
        ("FLANNEL_SUBNET=10.1.2.1/24\nFLANNEL_SUBNET=10.244.30.1/24\n", V4),
    ],
)
def test_parse_reads_what_flannel_reads(text: str, subnets: Subnets) -> None:
    assert subnet_env.parse(text) == (subnets, "")


@pytest.mark.parametrize(
    ("text", "subnets", "reason"),
    [
        ("FLANNEL_SUBNET=nope,10.244.30.1/24\n", V4, "FLANNEL_SUBNET: 'nope' is not a subnet"),
        (
            "FLANNEL_SUBNET=10.244.30.1/24\nFLANNEL_IPV6_SUBNET=10.1.2.3/24\n",
            V4,
            "FLANNEL_IPV6_SUBNET: '10.1.2.3/24' is not a subnet",
        ),
        (
            "FLANNEL_SUBNET=10.244.30.1/24\nFLANNEL_IPV6_SUBNET=x,fd00:244:0:55::1/64\n",
            DUAL,
            "FLANNEL_IPV6_SUBNET: 'x' is not a subnet",
        ),
        ("", None, "no FLANNEL_SUBNET or FLANNEL_IPV6_SUBNET in it"),
        ("\0\0\0", None, "no FLANNEL_SUBNET or FLANNEL_IPV6_SUBNET in it"),
        ("FLANNEL_SUBNET=\n", None, "no FLANNEL_SUBNET or FLANNEL_IPV6_SUBNET in it"),
        ("FLANNEL_SUBNET=x\nFLANNEL_IPV6_SUBNET=fd00::1/64\n", V6, "FLANNEL_SUBNET: 'x' is not a subnet"),
        ("FLANNEL_SUBNET=fd00::1/64\n", None, "FLANNEL_SUBNET: 'fd00::1/64' is not a subnet"),
        ("FLANNEL_SUBNET=10.244.30.1\n", None, "FLANNEL_SUBNET: '10.244.30.1' is not a subnet"),
        ("FLANNEL_SUBNET=10.244.30.1/33\n", None, "FLANNEL_SUBNET: '10.244.30.1/33' is not a subnet"),
        ("FLANNEL_SUBNET=10.244.30.1/٣\n", None, "FLANNEL_SUBNET: '10.244.30.1/٣' is not a subnet"),
        ("FLANNEL_SUBNET=300.1.1.1/24,\n", None, "FLANNEL_SUBNET: '300.1.1.1/24' is not a subnet"),
        (
            "FLANNEL_SUBNET=10.1.1.1/24,10.1.2.1/24\n",
            None,
            "FLANNEL_SUBNET: 2 subnets where one is expected",
        ),
    ],
)
def test_parse_says_why_when_content_is_bad(text: str, subnets: Subnets | None, reason: str) -> None:
    assert subnet_env.parse(text) == (subnets, reason)


@given(TEXT | TEXT.map(lambda text: f"FLANNEL_SUBNET={text}"))
def test_parse_never_raises(text: str) -> None:
    subnets, reason = subnet_env.parse(text)
    assert subnets is not None or reason


def test_parse_reads_back_what_render_wrote() -> None:
    text = '{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:244::/48"}'
    rendered = subnet_env.render(parse_net_conf(text, "test"), DUAL, 1472, ip_masq=False)
    assert subnet_env.parse(rendered) == (DUAL, "")


@pytest.mark.parametrize(
    ("text", "networks"),
    [
        (
            "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.9.1/24\n",
            (IPv4Network("10.5.0.0/16"), IPv4Network("10.5.9.0/24")),
        ),
        ("FLANNEL_SUBNET=10.5.9.1/24\n", None),
        ("FLANNEL_NETWORK=10.5.0.0/16,10.6.0.0/16\nFLANNEL_SUBNET=10.5.9.1/24\n", None),
        ("FLANNEL_NETWORK=10.5.0.0/33\nFLANNEL_SUBNET=10.5.9.1/24\n", None),
        ("", None),
    ],
)
def test_parse_networks_gives_both_or_nothing(text: str, networks: tuple[IPv4Network, IPv4Network] | None) -> None:
    assert subnet_env.parse_networks(text) == networks


def test_read_networks_gives_nothing_when_there_is_no_file(tmp_path: Path) -> None:
    assert subnet_env.read_networks(tmp_path / "none") is None


def test_read_previous_is_silent_when_there_is_no_file(tmp_path: Path) -> None:
    assert subnet_env.read_previous(tmp_path / "no" / "subnet.env") == (None, "")


def test_read_previous_names_the_file_when_it_is_no_use(tmp_path: Path) -> None:
    path = tmp_path / "subnet.env"
    path.write_bytes(b"\xff\xfe")
    assert subnet_env.read_previous(path) == (None, f"{path}: no FLANNEL_SUBNET or FLANNEL_IPV6_SUBNET in it")
    assert subnet_env.read_previous(tmp_path) == (None, f"cannot read {tmp_path}: Is a directory")


def test_read_previous_returns_the_subnets(tmp_path: Path) -> None:
    path = tmp_path / "subnet.env"
    subnet_env.write(path, "FLANNEL_SUBNET=10.244.30.1/24\n")
    assert subnet_env.read_previous(path) == (V4, "")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_write_sets_modes_whatever_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "subnet.env"
    before = os.umask(0o077)
    try:
        subnet_env.write(path, "x\n")
    finally:
        os.umask(before)
    assert (mode(path), mode(path.parent), mode(path.parent.parent)) == (0o644, 0o755, 0o755)
    assert path.read_bytes() == b"x\n"


def test_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "subnet.env"
    (tmp_path / ".subnet.env.new").write_text("left by a crash, and longer than what follows")
    subnet_env.write(path, "one\n")
    old = path.open()
    subnet_env.write(path, "two\n")
    with old:
        assert old.read() == "one\n"
    assert path.read_text() == "two\n"
    assert list(tmp_path.iterdir()) == [path]


def test_write_syncs_the_text_before_the_rename_and_the_directory_after(tmp_path: Path) -> None:
    """The order is what makes it survive a power failure; an audit hook sees the rename, fsync is wrapped."""
    script = """
import os, sys
from pathlib import Path
from udptun.config import subnet_env
fsync = os.fsync
def spy(fd):
    print("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
    fsync(fd)
os.fsync = spy
sys.addaudithook(lambda event, args: event == "os.rename" and print("rename", os.path.basename(args[1])))
subnet_env.write(Path(sys.argv[1]), "x")
"""
    path = tmp_path / "subnet.env"
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["fsync .subnet.env.new", "rename subnet.env", f"fsync {tmp_path.name}"]


def test_write_names_path_and_errno_when_the_directory_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KernelError) as caught:
        subnet_env.write(tmp_path / "file" / "subnet.env", "x")
    assert caught.value.errno == errno.ENOTDIR
    assert str(caught.value).startswith(f"cannot write {tmp_path}/file/subnet.env: ENOTDIR;")


def test_write_leaves_the_old_file_and_no_temporary_one_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "subnet.env"
    path.mkdir()
    with pytest.raises(KernelError) as caught:
        subnet_env.write(path, "x")
    assert caught.value.errno == errno.EISDIR
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_write_follows_no_symbolic_link_left_in_its_way(tmp_path: Path) -> None:
    (tmp_path / ".subnet.env.new").symlink_to("/dev/full")
    with pytest.raises(KernelError) as caught:
        subnet_env.write(tmp_path / "subnet.env", "x")
    assert caught.value.errno == errno.ELOOP
