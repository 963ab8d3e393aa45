"""`udptun lease list|show|reserve|release`, over every store."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
from etcd_harness import NEEDS, ON_SHARED_SERVERS, EtcdAuthHarness, EtcdHarness
from store_harness import SUBNETS, FileHarness, LocalHarness, exactly, host

from udptun.commands import cli
from udptun.core.lease import LeaseAttrs

NET_CONF = '{"Network": "10.0.0.0/8", "SubnetLen": 24, "SubnetMin": "10.0.0.0", "Backend": {"Type": "udp"}}'


class Lease:
    """`udptun lease` with the flags of one store."""

    def __init__(self, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        self._flags = flags
        self._capsys = capsys

    def __call__(self, *words: str, status: int = 0) -> str:
        """What it prints; with a status other than 0 its one line of error."""
        with pytest.raises(SystemExit) as caught:
            cli.main(["lease", *words, *self._flags])
        out, err = self._capsys.readouterr()
        assert caught.value.code == status, err
        if status == 0:
            return out
        assert out == ""
        assert err.count("\n") == 1
        return err.removeprefix("udptun: error: ").rstrip("\n")


def flags_of(harness: LocalHarness | FileHarness | EtcdHarness) -> list[str]:
    if isinstance(harness, EtcdHarness):
        harness.etcdctl("put", f"{harness.prefix}/config", NET_CONF)
        return harness.flags()
    harness.net_conf.write_text(NET_CONF)
    return [f"--store={harness.name}:{harness.path}", f"--net-config-path={harness.net_conf}"]


@pytest.fixture(
    params=[
        pytest.param(LocalHarness, id="local"),
        *(
            pytest.param(
                harness,
                id=harness.name,
                marks=[pytest.mark.skipif(bool(NEEDS), reason=f"needs {NEEDS}"), ON_SHARED_SERVERS],
            )
            for harness in (EtcdHarness, EtcdAuthHarness)
        ),
    ]
)
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> LocalHarness | EtcdHarness:
    """On a store with host 1's lease and host 2's reservation."""
    harness: LocalHarness | EtcdHarness = request.param(tmp_path)
    harness.write([(2, 2)])

    async def claim() -> None:
        store = harness.store()
        await store.claim(host(1), exactly(1))
        await store.aclose()

    asyncio.run(claim())
    return harness


@pytest.fixture
def lease(harness: LocalHarness | EtcdHarness, capsys: pytest.CaptureFixture[str]) -> Lease:
    return Lease(flags_of(harness), capsys)


def test_list_is_a_table_of_every_lease_and_what_is_none_goes_to_stderr(
    harness: LocalHarness | EtcdHarness, lease: Lease, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = lease("list").splitlines()
    assert [line.split() for line in lines] == [
        ["SUBNET", "PUBLIC", "IP", "NODE", "BACKEND", "PORT", "EXPIRES"],
        ["10.0.1.0/24", "198.18.0.1", "00000000", "udp", "8285", "in", "23h59m"],
        ["10.0.2.0/24", "198.18.0.2", "00000000", "udp", "8285", "never"],
    ]
    harness.spoil(2)
    with pytest.raises(SystemExit):
        cli.main(["lease", "list", *flags_of(harness)])
    out, err = capsys.readouterr()
    assert "10.0.2.0" not in out
    assert err.startswith("skipped: lease '10.0.2.0-24': ")


def test_what_others_wrote_into_a_lease_commands_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The node and the type of its backend were printed as they are."""
    harness = LocalHarness(tmp_path)
    harness.write([(1, 1)])
    data = {"Port": 8285, "NodeID": "\x1b[2J\n"}
    value = replace(host(1), backend_type="\x1b]0;x\x07", backend_data=data).to_json()
    harness.sql("update leases set value = ?", rows=[(value,)])
    lease = Lease(flags_of(harness), capsys)
    _, line = lease("list").splitlines()
    assert line.split()[:4] == ["10.0.1.0/24", "198.18.0.1", "\\x1b[2J\\n", "\\x1b]0;x\\x07"]
    shown = lease("show", "10.0.1.0/24").splitlines()
    assert "node       \\x1b[2J\\n" in shown
    assert "backend    \\x1b]0;x\\x07" in shown
    assert "which node \\x1b[2J\\n holds" in lease("reserve", "10.0.1.0/24", "--public-ip=198.18.0.1")


def test_list_and_show_for_programs_have_times_and_values(lease: Lease) -> None:
    listed = json.loads(lease("list", "--json"))
    assert (listed["schema"], listed["skipped"]) == (1, [])
    first, second = listed["leases"]
    assert (first["key"], first["subnet"]) == (SUBNETS[1].key, "10.0.1.0/24")
    assert (first["port"], first["udptun"]) == (8285, True)
    assert first["value"] == json.loads(host(1).to_json())
    assert first["expires_at"] > 1e9
    assert second["expires_at"] is None
    shown = json.loads(lease("show", "10.0.1.0/24", "--json"))
    assert shown | {"expires_at": 0} == {"schema": 1, "store": listed["store"]} | first | {"expires_at": 0}


def test_show_takes_a_subnet_or_a_key(lease: Lease) -> None:
    assert lease("show", "10.0.1.0/24") == lease("show", "10.0.1.0-24")
    shown = lease("show", "10.0.1.0-24")
    assert "public IP  198.18.0.1\n" in shown
    assert "node       00000000000000000000000000000001\n" in shown
    assert f"value      {host(1).to_json()}\n" in shown
    assert lease("show", "10.0.9.0/24", status=1).startswith("there is no lease 10.0.9.0/24 in ")


def test_a_store_of_ipv6_alone_is_listed_reserved_and_released(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harness = LocalHarness(tmp_path)
    lease = Lease(flags_of(harness), capsys)
    harness.write([])
    harness.net_conf.write_text('{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:1::/48"}')
    missing = "lease reserve: --public-ip or --public-ipv6 is missing: for which host is the subnet?"
    assert lease("reserve", "fd00:1:0:7::/64", status=2) == missing
    wrong = lease("reserve", "fd00:2::/64", "--public-ipv6=fd99::7", status=1)
    assert "the subnets of fd00:1::/48 are those of length /64 from fd00:1:0:1:: to fd00:1:0:ffff::" in wrong
    assert lease("reserve", "fd00:1:0:7::/64", "--public-ipv6=fd99::7").startswith(
        "reserved fd00:1:0:7::/64 for fd99::7 in "
    )
    assert [line.split()[:2] for line in lease("list").splitlines()[1:]] == [["fd00:1:0:7::/64", "fd99::7"]]
    shown = json.loads(lease("show", "fd00:1:0:7::/64", "--json"))
    assert (shown["key"], shown["public_ip"], shown["public_ipv6"]) == ("fd00:1:0:7::-64", None, "fd99::7")
    assert lease("release", "fd00:1:0:7::/64").startswith("released the reservation fd00:1:0:7::/64 of fd99::7 in ")


def test_an_ipv4_subnet_is_reserved_for_a_host_without_ipv4(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before, --public-ip was asked for, which such a host does not have."""
    harness = LocalHarness(tmp_path)
    lease = Lease(flags_of(harness), capsys)
    harness.write([])
    said = lease("reserve", "10.0.7.0/24", "--public-ipv6=fd99::7")
    assert said.startswith("reserved 10.0.7.0/24 for fd99::7 in ")
    again = lease("reserve", "10.0.8.0/24", "--public-ip=192.0.2.7", "--public-ipv6=fd99::7", status=1)
    assert again.startswith("cannot reserve 10.0.8.0/24: 10.0.7.0/24 is reserved for 192.0.2.7 already; ")


@pytest.mark.skipif(bool(NEEDS), reason=f"needs {NEEDS}")
@ON_SHARED_SERVERS
def test_etcd_refuses_a_reservation_of_ipv6_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before, it got a key that every host refuses, flannel's too."""
    harness = EtcdHarness(tmp_path)
    lease = Lease(flags_of(harness), capsys)
    config = '{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:1::/48"}'
    harness.etcdctl("put", f"{harness.prefix}/config", config)
    said = lease("reserve", "fd00:1:0:7::/64", "--public-ipv6=fd99::7", status=1)
    assert said.startswith("cannot reserve fd00:1:0:7::/64 in etcd: its leases begin with an IPv4 subnet; ")
    assert json.loads(lease("list", "--json"))["leases"] == []


def test_reserve_and_release_say_what_they_did(lease: Lease) -> None:
    line = lease("reserve", "10.0.7.0/24", "--public-ip=192.0.2.7")
    assert line.startswith("reserved 10.0.7.0/24 for 192.0.2.7 in ")
    shown = json.loads(lease("show", "10.0.7.0/24", "--json"))
    assert (shown["value"], shown["expires_at"]) == ({"PublicIP": "192.0.2.7", "PublicIPv6": None}, None)
    assert lease("release", "10.0.7.0-24").startswith("released the reservation 10.0.7.0/24 of 192.0.2.7 in ")
    assert lease("release", "10.0.1.0/24").startswith("released the lease 10.0.1.0/24 of 198.18.0.1 in ")
    assert [entry["subnet"] for entry in json.loads(lease("list", "--json"))["leases"]] == ["10.0.2.0/24"]
    lease("release", "10.0.1.0/24", status=1)


def test_reserve_can_name_the_port_of_one_of_several_nodes_behind_an_address(lease: Lease) -> None:
    lease("reserve", "10.0.7.0/24", "--public-ip=192.0.2.7", "--port=9001")
    lease("reserve", "10.0.8.0/24", "--public-ip=192.0.2.7", "--port=9002")
    assert json.loads(lease("show", "10.0.8.0/24", "--json"))["port"] == 9002


def test_reserve_keeps_a_lease_of_that_host_for_good(lease: Lease) -> None:
    line = lease("reserve", "10.0.1.0/24", "--public-ip=198.18.0.1")
    assert "which node 00000000000000000000000000000001 holds; it does not expire" in line
    assert line.endswith(", and takes effect now: the host has it\n")
    assert json.loads(lease("show", "10.0.1.0/24", "--json"))["value"] == json.loads(host(1).to_json())


@pytest.mark.parametrize(
    ("public_ip", "when"),
    [
        ("192.0.2.7", "takes effect when the daemon there starts"),
        (
            "198.18.0.1",
            "takes effect at the first start of the daemon there after a reboot or `udptun cleanup`: until then the "
            "host goes on with 10.0.1.0/24, of which its pods may have addresses",
        ),
        (
            "198.18.0.3",
            "takes effect when 10.0.3.0/24, which flanneld has there, is released while flanneld is stopped",
        ),
    ],
)
def test_reserve_says_when_it_takes_effect(
    harness: LocalHarness | EtcdHarness, lease: Lease, public_ip: str, when: str
) -> None:
    """It said nothing of it: the host went on with another lease, and its next start deleted the reservation."""

    async def flanneld() -> None:
        store = harness.store()
        await store.claim(LeaseAttrs(host(3).public_ip, backend_type="udp"), exactly(3))
        await store.aclose()

    asyncio.run(flanneld())
    assert lease("reserve", "10.0.7.0/24", f"--public-ip={public_ip}").endswith(f"; it does not expire, and {when}\n")


def test_reserve_refuses_what_is_anothers_and_what_no_host_would_take(lease: Lease) -> None:
    said = lease("reserve", "10.0.1.0/24", "--public-ip=192.0.2.7", status=1)
    assert said == "cannot reserve 10.0.1.0/24: 10.0.1.0/24 is leased to 198.18.0.1"
    said = lease("reserve", "10.0.7.0/25", "--public-ip=192.0.2.7", status=1)
    assert said.startswith("cannot reserve 10.0.7.0/25: no host would take it; the subnets of 10.0.0.0/8 are those of")
    said = lease("reserve", "192.168.7.0/24", "--public-ip=192.0.2.7", status=1)
    assert said.startswith("cannot reserve 192.168.7.0/24: no host would take it")


def test_a_leases_file_is_listed_and_shown_and_otherwise_edited_by_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harness = FileHarness(tmp_path)
    harness.write([(1, 1)])
    lease = Lease(flags_of(harness), capsys)
    assert "10.0.1.0/24" in lease("list")
    assert "198.18.0.1" in lease("show", "10.0.1.0/24")
    said = lease("reserve", "10.0.7.0/24", "--public-ip=192.0.2.7", status=2)
    assert said.endswith('is edited by hand; add {"Subnet": "10.0.7.0/24", "PublicIP": "192.0.2.7"} on every host')
    assert lease("release", "10.0.1.0/24", status=2).endswith("take the entry out on every host")


def test_a_local_store_that_is_not_there_is_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "leases.db"
    lease = Lease([f"--store=local:{path}"], capsys)
    assert lease("list", status=1).startswith(f"there is no lease store local:{path}; name another with --store")
    assert not path.exists()


@pytest.mark.skipif(bool(NEEDS), reason=f"needs {NEEDS}")
def test_a_password_is_in_no_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harness = EtcdAuthHarness(tmp_path)
    flags = [flag for flag in harness.flags() if not flag.startswith("--etcd-password")]
    lease = Lease([*flags, "--etcd-password=hunter2", "-v=1"], capsys)
    assert "hunter2" not in lease("list", status=2)
