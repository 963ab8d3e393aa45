"""The CNI plugin with a delegate that only remembers: what it stores, passes on and answers."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import udptun
from tests.any_text import TEXT
from tests.cni_plugin import (
    DUAL_ENV,
    IPV4_ENV,
    IPV6_ENV,
    MULTIPLE_ENV,
    NAME,
    FakeDelegate,
    Plugin,
    installed,
    python_at_its_barest,
)
from tests.namespace import seconds_until
from udptun.cni import go_json, netconf, subnet_env
from udptun.cni.delegates import Delegates
from udptun.cni.errors import CniError
from udptun.cni.leftovers import Freed, ValidAttachments, free_dead
from udptun.cni.plugin import main
from udptun.cni.reservations import Reservations
from udptun.cni.state import Extras, StateDir, boot_id, identity_of

ROUTE = '{"dst":"10.1.0.0/16"}'
ROUTES6 = '{"dst":"fc00::/48"}'
RANGE = '[{"subnet":"10.1.17.0/24"}]'
RANGE6 = '[{"subnet":"fc00::/64"}]'


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(tmp_path_factory.mktemp("cni"))


@pytest.fixture
def plugin(tmp_path: Path, program: Path) -> Plugin:
    """With flannel's subnet.env for IPv4."""
    made = Plugin(tmp_path, program)
    made.subnet_file.write_text(IPV4_ENV)
    return made


@pytest.fixture
def delegate(plugin: Plugin) -> FakeDelegate:
    return FakeDelegate(plugin)


def stored_conf(ranges: str, routes: str) -> str:
    """The state file of flannel's tests, to the byte."""
    text = (
        '{"ipMasq":false,"ipam":{"ranges":[%s],"routes":[%s],"type":"host-local"},'
        '"isGateway":true,"mtu":1472,"name":"cni-flannel","type":"bridge"}'
    )
    return text % (ranges, routes)


# --- flannel's own scenarios


@pytest.mark.parametrize(
    ("container_id", "text", "ranges", "routes"),
    [
        ("some-container-id-ipv4", IPV4_ENV, RANGE, ROUTE),
        ("some-container-id-ipv4-multiple", MULTIPLE_ENV, RANGE, ROUTE + ',{"dst":"192.168.0.0/16"}'),
        ("some-container-id-ipv6", IPV6_ENV, RANGE6, ROUTES6),
        ("some-container-id-dual-stack", DUAL_ENV, f"{RANGE},{RANGE6}", f"{ROUTE},{ROUTES6}"),
    ],
    ids=["ipv4", "multiple", "ipv6", "dual"],
)
def test_life_of_a_container_stores_exactly_what_flannels_plugin_does(
    plugin: Plugin, delegate: FakeDelegate, container_id: str, text: str, ranges: str, routes: str
) -> None:
    plugin.subnet_file.write_text(text)
    assert plugin.run("ADD", container_id).result() == {"cniVersion": "0.3.1", "ips": []}
    assert plugin.stored(container_id) == stored_conf(ranges, routes) == delegate.stdin(0)
    assert stat.S_IMODE((plugin.data_dir / container_id).stat().st_mode) == 0o600
    assert stat.S_IMODE(plugin.data_dir.stat().st_mode) == 0o700
    assert plugin.run("DEL", container_id).result() == {}
    assert delegate.stdin(1) == delegate.stdin(0)
    assert plugin.stored(container_id) is None
    assert list((plugin.data_dir / ".udptun").iterdir()) == []
    assert plugin.run("DEL", container_id).result() == {}
    assert delegate.calls == ["ADD", "DEL"]


@pytest.mark.parametrize("name", ["cni-flannel", "cni-flannel-ipv6", "cni-flannel-dual"])
def test_network_configuration_is_read_as_it_was_given(name: str) -> None:
    given = {"name": name, "type": "flannel", "subnetFile": "/a/subnet.env", "dataDir": "/b"}
    conf = netconf.parse(json.dumps(given).encode())
    assert (conf.name, conf.members["type"], conf.subnet_file, conf.data_dir) == (
        name,
        "flannel",
        "/a/subnet.env",
        "/b",
    )


@pytest.mark.parametrize("members", [{}, {"subnetFile": ""}, {"dataDir": None}])
def test_network_configuration_has_flannels_defaults(members: dict[str, Any]) -> None:
    conf = netconf.parse(json.dumps({"name": "cni-flannel", "type": "flannel", **members}).encode())
    assert (conf.subnet_file, conf.data_dir) == ("/run/flannel/subnet.env", "/var/lib/cni/flannel")


@pytest.mark.parametrize(
    ("text", "networks", "subnets"),
    [
        (IPV4_ENV, ["10.1.0.0/16"], ["10.1.17.0/24"]),
        (IPV6_ENV, ["fc00::/48"], ["fc00::/64"]),
        (DUAL_ENV, ["10.1.0.0/16", "fc00::/48"], ["10.1.17.0/24", "fc00::/64"]),
    ],
)
def test_subnet_env_is_read(text: str, networks: list[str], subnets: list[str]) -> None:
    read = subnet_env.parse(text, "subnet.env")
    assert (read.networks, read.subnets, read.mtu, read.ip_masq) == (networks, subnets, 1472, True)


@pytest.mark.parametrize("text", ["foo=bar", "\nfoo=bar\n", "# FLANNEL_MTU=1\nfoo=bar"])
def test_subnet_env_without_its_keys_is_an_error_that_names_them(plugin: Plugin, text: str) -> None:
    plugin.subnet_file.write_text(text)
    error = plugin.run("ADD").error()
    assert (
        "missing FLANNEL_NETWORK, FLANNEL_IPV6_NETWORK, FLANNEL_SUBNET, FLANNEL_IPV6_SUBNET, FLANNEL_MTU, "
        "FLANNEL_IPMASQ" in error["msg"]
    )
    assert error["code"] == 100


OWN_ROUTES = [{"dst": "10.96.0.0/12"}, {"dst": "192.168.244.0/24", "gw": "10.1.17.20"}]


@pytest.mark.parametrize(
    ("text", "ipam", "expected"),
    [
        *(
            (
                text,
                {"type": "my-ipam", "unknown-param": "unknown-value", "routes": OWN_ROUTES},
                {
                    "type": "my-ipam",
                    "unknown-param": "unknown-value",
                    "ranges": json.loads(f"[{ranges}]"),
                    "routes": OWN_ROUTES + json.loads(f"[{routes}]"),
                },
            )
            for text, ranges, routes in (
                (IPV4_ENV, RANGE, ROUTE),
                (IPV6_ENV, RANGE6, ROUTES6),
                (DUAL_ENV, f"{RANGE},{RANGE6}", f"{ROUTE},{ROUTES6}"),
            )
        ),
        (
            MULTIPLE_ENV,
            None,
            {
                "type": "host-local",
                "ranges": json.loads(f"[{RANGE}]"),
                "routes": [{"dst": "10.1.0.0/16"}, {"dst": "192.168.0.0/16"}],
            },
        ),
        *(
            (
                text,
                {"unknown-param": "unknown-value"},
                {
                    "type": "host-local",
                    "unknown-param": "unknown-value",
                    "ranges": json.loads(f"[{ranges}]"),
                    "routes": json.loads(f"[{routes}]"),
                },
            )
            for text, ranges, routes in (
                (IPV4_ENV, RANGE, ROUTE),
                (IPV6_ENV, RANGE6, ROUTES6),
                (DUAL_ENV, f"{RANGE},{RANGE6}", f"{ROUTE},{ROUTES6}"),
            )
        ),
    ],
)
def test_ipam_of_the_configuration_gets_ranges_and_routes(
    text: str, ipam: dict[str, Any] | None, expected: dict[str, Any]
) -> None:
    conf = netconf.NetConf({"name": NAME, "ipam": ipam})
    assert netconf.delegate_conf(conf, subnet_env.parse(text, ""))["ipam"] == expected


# --- what flannel's tests do not cover


@pytest.mark.parametrize(
    ("members", "text", "expected"),
    [
        (
            {"delegate": {"hairpinMode": True, "isDefaultGateway": True}},
            IPV4_ENV,
            {"hairpinMode": True, "isGateway": True},
        ),
        ({"delegate": {"isGateway": False, "mtu": 1400, "ipMasq": True}}, IPV4_ENV, {"isGateway": False, "mtu": 1400}),
        ({"delegate": {"type": "ptp"}}, IPV4_ENV, {"type": "ptp", "isGateway": None, "mtu": 1472}),
        ({}, IPV4_ENV.replace("IPMASQ=true", "IPMASQ=false"), {"ipMasq": True}),
        ({}, IPV4_ENV.replace("IPMASQ=true", "IPMASQ=True"), {"ipMasq": True}),
        ({"runtimeConfig": {"mac": "2:0"}}, IPV4_ENV, {"runtimeConfig": {"mac": "2:0"}}),
        ({"cniVersion": "0.3.1"}, IPV4_ENV, {"cniVersion": "0.3.1"}),
        ({"CNIVERSION": "1.0.0"}, IPV4_ENV, {"cniVersion": "1.0.0"}),
        ({"delegate": {"vlan": 100.0}}, IPV4_ENV, {"vlan": 100}),
        ({}, IPV4_ENV.replace("10.1.0.0/16", "10.1.0.0/16,10.1.0.0/16"), {"type": "bridge"}),
        ({}, IPV4_ENV.replace("MTU=1472", 'MTU="1472"').replace("FLANNEL_MTU", "export FLANNEL_MTU"), {"mtu": 1472}),
    ],
)
def test_delegates_configuration(members: dict[str, Any], text: str, expected: dict[str, Any]) -> None:
    made = netconf.delegate_conf(netconf.NetConf({"name": NAME, **members}), subnet_env.parse(text, ""))
    assert {key: made.get(key) for key in expected} == expected
    assert made["ipam"]["routes"] == [{"dst": "10.1.0.0/16"}]  # type: ignore[index]


def test_state_is_written_as_go_writes_it(plugin: Plugin, delegate: FakeDelegate) -> None:
    plugin.run("ADD", conf={"delegate": {"x": "<&>\u2028é", "f": 2.0, "g": 1.5}}).result()
    assert (plugin.stored() or "").startswith('{"f":2,"g":1.5,"ipMasq":false,')
    assert '"x":"\\u003c\\u0026\\u003e\\u2028é"}' in (plugin.stored() or "")


def test_delegate_gets_the_runtimes_environment_and_no_prev_result(plugin: Plugin, delegate: FakeDelegate) -> None:
    changes = {"CNI_ARGS": "IgnoreUnknown=1;IP=10.1.17.77", "FOO": "bar"}
    plugin.run(
        "ADD", conf={"prevResult": {"ips": []}, "args": {"x": 1}, "capabilities": {"ips": True}}, **changes
    ).result()
    assert {key: delegate.environ(0)[key] for key in changes} == changes
    assert delegate.environ(0)["CNI_NETNS"] == "/proc/self/ns/net"
    assert not {"prevResult", "args", "capabilities"} & set(json.loads(delegate.stdin(0)))


def test_state_is_on_disk_before_the_delegate_runs(plugin: Plugin, delegate: FakeDelegate) -> None:
    delegate.answer("ADD", f"cat {plugin.data_dir}/c1 >{plugin.directory}/seen\n")
    plugin.run("ADD").result()
    assert (plugin.directory / "seen").read_text() == stored_conf(RANGE, ROUTE)


def test_what_a_killed_add_has_made_can_be_deleted(plugin: Plugin, delegate: FakeDelegate) -> None:
    """As a runtime does whose patience is over."""
    delegate.answer("ADD", f"echo >{plugin.directory}/begun; exec sleep 1\n")
    adding = plugin.start("ADD")
    seconds_until((plugin.directory / "begun").exists, 30)
    adding.kill()
    adding.communicate()
    plugin.run("DEL").result()
    assert delegate.calls == ["ADD", "DEL"]
    assert delegate.stdin(1) == delegate.stdin(0)


def test_delegates_stderr_reaches_the_runtime_and_its_stdout_is_the_answer(
    plugin: Plugin, delegate: FakeDelegate
) -> None:
    delegate.answer("ADD", "echo words >&2; echo '{\"x\": 1}'; exit 0\n")
    answer = plugin.run("ADD")
    assert answer.stdout == '{"x": 1}\n'
    assert "words\n" in answer.stderr
    assert f"delegateAdd: netconf sent to delegate plugin:\n{stored_conf(RANGE, ROUTE)}\n" in answer.stderr


def test_answer_longer_than_a_pipe_holds(plugin: Plugin, delegate: FakeDelegate) -> None:
    delegate.answer("ADD", "head -c 300000 /dev/zero | tr '\\0' 'x'; exit 0\n")
    big = {"delegate": {"note": "y" * 200_000}}
    assert len(plugin.run("ADD", conf=big).stdout) == 300_000
    assert json.loads(delegate.stdin(0))["note"] == "y" * 200_000


def test_state_is_whole_or_refused_on_a_disk_that_is_nearly_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The half of it that there was room for was taken for all, and the container could never be deleted."""
    state, text = StateDir(str(tmp_path)), '{"name":"cbr0","type":"bridge"}'
    write, room = os.write, [7] * 200

    def write_a_part(fd: int, data: bytes) -> int:
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data[: room.pop()])

    monkeypatch.setattr(os, "write", write_a_part)
    state.save("c1", text, Extras.now("eth0", "/proc/self/ns/net"))
    assert (tmp_path / "c1").read_text() == text
    room[:] = [7]
    with pytest.raises(CniError, match="No space left on device"):
        state.save("c2", text, Extras.now("eth0", "/proc/self/ns/net"))
    assert sorted(it.name for it in tmp_path.rglob("*") if it.is_file()) == ["c1", "c1"]


def test_add_that_fails_is_followed_by_a_del_and_leaves_no_state(plugin: Plugin, delegate: FakeDelegate) -> None:
    """Flannel's plugin returned at once: address, veth and state stayed."""
    delegate.fail("ADD", 11, "no luck", "try later")
    error = plugin.run("ADD", conf={"cniVersion": "0.4.0"}).error()
    assert error == {
        "cniVersion": "0.4.0",
        "code": 11,
        "msg": "failed to delegate add: no luck",
        "details": "try later",
    }
    assert delegate.calls == ["ADD", "DEL"]
    assert plugin.stored() is None


def test_state_stays_when_the_del_after_a_failed_add_fails_too(plugin: Plugin, delegate: FakeDelegate) -> None:
    delegate.fail("ADD")
    delegate.fail("DEL", message="still no luck")
    answer = plugin.run("ADD")
    assert answer.error()["msg"] == "failed to delegate add: no luck"
    assert "failed to delegate del: still no luck" in answer.stderr
    assert plugin.stored() is not None


def test_del_that_fails_can_be_repeated(plugin: Plugin, delegate: FakeDelegate) -> None:
    """Flannel's plugin deleted the state all the same, so the next DEL did nothing and the address leaked."""
    plugin.run("ADD").result()
    delegate.fail("DEL", code=5)
    assert plugin.run("DEL").error()["code"] == 5
    assert plugin.stored() is not None
    delegate.answer("DEL", "exit 0\n")
    plugin.run("DEL", netns="").result()
    assert plugin.stored() is None
    assert delegate.calls == ["ADD", "DEL", "DEL"]
    assert delegate.environ(2)["CNI_NETNS"] == ""


@pytest.mark.parametrize("text", ["", "not json", "[]", '{"type": "bridge"'])
def test_del_with_a_state_file_that_cannot_be_read_succeeds_and_keeps_it(
    plugin: Plugin, delegate: FakeDelegate, text: str
) -> None:
    plugin.data_dir.mkdir()
    (plugin.data_dir / "c1").write_text(text)
    answer = plugin.run("DEL")
    assert answer.result() == {}
    assert "the state cannot be read" in answer.stderr
    assert plugin.stored() == text
    assert delegate.calls == []


def test_state_of_flannels_plugin_is_deleted_by_ours(plugin: Plugin, delegate: FakeDelegate) -> None:
    plugin.data_dir.mkdir()
    (plugin.data_dir / "c1").write_text(stored_conf(RANGE, ROUTE))
    plugin.run("DEL").result()
    assert delegate.stdin(0) == stored_conf(RANGE, ROUTE)
    assert plugin.stored() is None


def test_del_goes_by_what_was_stored(plugin: Plugin, delegate: FakeDelegate) -> None:
    plugin.run("ADD", conf={"delegate": {"mtu": 1300}}).result()
    plugin.subnet_file.unlink()
    plugin.run("DEL", conf={"delegate": {"mtu": 9000}, "runtimeConfig": {"a": 1}}).result()
    assert delegate.stdin(1) == delegate.stdin(0)


def test_check_runs_the_delegates_with_the_result(plugin: Plugin, delegate: FakeDelegate) -> None:
    """Flannel's plugin answered that all is well, whatever had become of the container."""
    members = {"cniVersion": "1.0.0"}
    plugin.run("ADD", conf=members).result()
    result = {
        "cniVersion": "1.0.0",
        "ips": [{"address": "10.1.17.2/24", "gateway": "10.1.17.1"}, {"address": "fc00::2/64", "gateway": "fc00::1"}],
        "routes": [{"dst": "10.96.0.0/12", "gw": "10.1.17.20"}],
    }
    assert plugin.run("CHECK", conf={**members, "prevResult": result}).result() == {}
    assert json.loads(delegate.stdin(1)) == json.loads(delegate.stdin(0)) | {"prevResult": result}
    delegate.fail("CHECK", 100, "address is gone")
    assert plugin.run("CHECK", conf={**members, "prevResult": result}).error()["msg"].endswith("address is gone")


def test_route_without_a_gateway_is_looked_for_where_bridge_has_put_it() -> None:
    """bridge's own CHECK did not find the routes that its ADD had made."""
    ips = [{"address": "10.1.17.2/24", "gateway": "10.1.17.1"}, {"address": "fc00::2/64", "gateway": "fc00::1"}]
    routes = [{"dst": "10.1.0.0/16"}, {"dst": "fc00::/48"}, {"dst": "10.96.0.0/12", "gw": "10.1.17.20"}]
    completed = [routes[0] | {"gw": "10.1.17.1"}, routes[1] | {"gw": "fc00::1"}, routes[2]]
    assert netconf.with_gateways({"ips": ips, "routes": routes}) == {"ips": ips, "routes": completed}
    for odd in (None, {}, {"routes": 1}, {"routes": [1, {}]}, {"ips": 1, "routes": routes}, {"ips": [1], "routes": []}):
        assert netconf.with_gateways(odd) == odd


def test_check_of_a_container_that_is_not_known(plugin: Plugin, delegate: FakeDelegate) -> None:
    assert plugin.run("CHECK", conf={"cniVersion": "1.0.0"}).error()["code"] == 3


def test_second_network_of_a_container_needs_files_of_its_own(plugin: Plugin, delegate: FakeDelegate) -> None:
    """Flannel's plugin overwrote the state of the first one, which was then never deleted."""
    plugin.run("ADD").result()
    error = plugin.run("ADD", ifname="eth1").error()
    assert "attached already, by eth0" in error["msg"]
    assert "dataDir" in error["details"]
    assert plugin.stored() == delegate.stdin(0)
    plugin.run("ADD", ifname="eth1", conf={"dataDir": str(plugin.directory / "other")}).result()


def test_add_again_in_the_same_namespace_is_done(plugin: Plugin, delegate: FakeDelegate) -> None:
    """As `podman network reload` does when its DEL was lost."""
    plugin.run("ADD").result()
    plugin.run("ADD").result()
    assert delegate.calls == ["ADD", "ADD"]


# --- bad input: one clear error, and nothing done

TOO_NEW = 'config is "9.9.9", plugin supports ["0.1.0","0.2.0","0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]'


@pytest.mark.parametrize(
    ("conf", "code", "message"),
    [
        ("", 6, "cannot read the network configuration on stdin: "),
        ("{", 6, "cannot read the network configuration on stdin: "),
        ('{"mtu": NaN}', 6, "NaN is not JSON"),
        ("[" * 100_000, 6, "cannot read the network configuration on stdin: "),
        ("[]", 6, "a JSON object is expected, not a list"),
        ({"name": ""}, 7, "missing network name"),
        ({"name": "a/b"}, 7, "invalid characters found in network name"),
        ({"name": 7}, 7, "name of the network configuration is a number; a string is expected"),
        ({"cniVersion": "9.9.9"}, 1, "incompatible CNI versions"),
        ({"delegate": []}, 7, "delegate of the network configuration is a list; an object is expected"),
        ({"delegate": {"type": 1}}, 7, "'delegate' dictionary, if present, must have (string) 'type' field"),
        ({"delegate": {"name": "x"}}, 7, "'delegate' dictionary must not have 'name' field, it'll be set by flannel"),
        ({"delegate": {"ipam": {}}}, 7, "'delegate' dictionary must not have 'ipam' field, it'll be set by flannel"),
        ({"delegate": {"type": "nope"}}, 102, 'failed to find plugin "nope" in path ['),
        ({"delegate": {"type": "../bin/bridge"}}, 102, 'failed to find plugin "../bin/bridge" in path ['),
        ({"ipam": "host-local"}, 7, "ipam of the network configuration is a string; an object is expected"),
        ({"ipam": {"routes": {}}}, 7, "failed to parse ipam.routes"),
        ({"runtimeConfig": 1}, 7, "runtimeConfig of the network configuration is a number; an object is expected"),
        ({"dataDir": "/proc/nowhere"}, 5, "cannot write the state of a container in /proc/nowhere: "),
    ],
)
def test_bad_configuration_is_one_error(
    plugin: Plugin, delegate: FakeDelegate, conf: Any, code: int, message: str
) -> None:
    error = plugin.run("ADD", conf=conf).error()
    assert (error["code"], message in error["msg"]) == (code, True), error
    assert "ADD" not in delegate.calls
    assert plugin.stored() is None
    if code == 1:
        assert error["details"] == TOO_NEW


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT | st.sampled_from(["type", "routes", "dst"]), inner),
    max_leaves=8,
)
KEYS = ("name", "cniVersion", "subnetFile", "dataDir", "delegate", "ipam", "runtimeConfig", "cni.dev/valid-attachments")


@settings(max_examples=40)
@given(st.dictionaries(st.sampled_from(KEYS), JSON), st.sampled_from([{}, {"name": "a"}]))
def test_any_json_is_obeyed_or_is_one_error(members: dict[str, Any], good: dict[str, Any]) -> None:
    text = json.dumps({**members, **good}).encode()
    subnet = subnet_env.parse(DUAL_ENV, "")
    with contextlib.suppress(CniError):
        conf = netconf.parse(text)
        ValidAttachments(conf.members)
        go_json.dumps(netconf.delegate_conf(conf, subnet))
    with contextlib.suppress(CniError):
        Reservations(netconf.delegate_conf(netconf.parse(text), subnet))


@given(TEXT | st.lists(st.sampled_from([*IPV4_ENV.split(), *"=/,.\n", "FLANNEL_SUBNET=", "1"])).map("".join))
def test_any_subnet_env_is_read_or_is_one_error(text: str) -> None:
    with contextlib.suppress(CniError):
        subnet_env.parse(text, "subnet.env")


@pytest.mark.parametrize(
    ("command", "changes", "message"),
    [
        ("ADD", {"CNI_CONTAINERID": "", "CNI_NETNS": ""}, "required env variables [CNI_CONTAINERID,CNI_NETNS] missing"),
        ("DEL", {"CNI_PATH": ""}, "required env variables [CNI_PATH] missing"),
        ("ADD", {"CNI_CONTAINERID": "../../etc/x"}, "invalid characters in containerID"),
        ("DEL", {"CNI_CONTAINERID": ".udptun"}, "invalid characters in containerID"),
        ("ADD", {"CNI_IFNAME": "a/b"}, "invalid interface name"),
        ("ADD", {"CNI_IFNAME": "interface-too-long"}, "invalid interface name"),
        ("PLAY", {}, "unknown CNI_COMMAND: PLAY"),
    ],
)
def test_bad_environment_is_one_error(
    plugin: Plugin, delegate: FakeDelegate, command: str, changes: dict[str, str], message: str
) -> None:
    error = plugin.run(command, **changes).error()
    assert (error["code"], error["msg"]) == (4, message)
    assert delegate.calls == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("FLANNEL_MTU=abc", "FLANNEL_MTU=abc cannot be used"),
        ("FLANNEL_MTU", "is missing FLANNEL_MTU"),
        ("FLANNEL_SUBNET=10.1.17.300/24", "FLANNEL_SUBNET=10.1.17.300/24 cannot be used"),
        ("FLANNEL_SUBNET=10.1.17.1", "FLANNEL_SUBNET=10.1.17.1 cannot be used"),
        ("FLANNEL_NETWORK=", "is missing FLANNEL_NETWORK, FLANNEL_IPV6_NETWORK"),
    ],
)
def test_bad_line_in_subnet_env_is_one_error(plugin: Plugin, line: str, message: str) -> None:
    """Flannel's plugin ended with a traceback of Go at a key without a value."""
    key = line.split("=")[0]
    kept = [it for it in IPV4_ENV.splitlines() if not it.startswith(key)]
    plugin.subnet_file.write_text("\n".join([*kept, line]))
    error = plugin.run("ADD").error()
    assert (error["code"], message in error["msg"]) == (100, True), error


def test_fault_of_the_plugin_is_one_error_too(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(request: object) -> bytes:
        raise TypeError("no luck")

    monkeypatch.setattr("udptun.cni.plugin._Request.answer", fail)
    monkeypatch.setenv("CNI_COMMAND", "ADD")
    with pytest.raises(SystemExit):
        main()
    said = capfd.readouterr()
    assert json.loads(said.out)["msg"] == "ADD failed, a fault of udptun-cni: TypeError('no luck')"
    assert 'raise TypeError("no luck")' in said.err


def test_half_a_surrogate_pair_reaches_the_delegate_as_go_reads_it(plugin: Plugin, delegate: FakeDelegate) -> None:
    """It was a fault of ours (UnicodeEncodeError): JSON can say it, and UTF-8 cannot."""
    assert plugin.run("ADD", conf={"ipam": {"routes": [{"x": "\ud800"}]}}).status == 0
    stored = plugin.stored()
    assert stored is not None
    assert json.loads(stored)["ipam"]["routes"][0] == {"x": "\ufffd"}


def test_delegate_that_dies_or_says_nonsense_is_one_error(plugin: Plugin, delegate: FakeDelegate) -> None:
    delegate.answer("ADD", "echo nonsense; exit 3\n")
    error = plugin.run("ADD").error()
    assert error["msg"] == "failed to delegate add: the plugin bridge ended with status 3"
    assert (error["code"], error["details"]) == (999, "it printed 'nonsense'")
    delegate.answer("ADD", "kill -9 $$\n")
    assert plugin.run("ADD").error()["msg"] == "failed to delegate add: the plugin bridge was killed by signal 9"
    (plugin.directory / "bin" / "bridge").write_text("#!/nowhere\n")
    error = plugin.run("ADD").error()
    assert (error["code"], "cannot run " in error["msg"]) == (102, True)


# --- VERSION and who may call what


def test_version_needs_nothing_but_the_command(plugin: Plugin) -> None:
    done = subprocess.run([plugin.program], env={"CNI_COMMAND": "VERSION"}, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {
        "cniVersion": "1.1.0",
        "supportedVersions": ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"],
    }


def test_plugin_run_by_a_person_says_what_it_is(plugin: Plugin) -> None:
    done = subprocess.run([plugin.program], env={}, capture_output=True, text=True, check=True)
    assert (done.stdout, "run by container runtimes" in done.stderr) == ("", True)


@pytest.mark.parametrize(("command", "version"), [("CHECK", "0.3.1"), ("STATUS", "1.0.0"), ("GC", "1.0.0")])
def test_command_that_the_configurations_version_does_not_have(plugin: Plugin, command: str, version: str) -> None:
    error = plugin.run(command, conf={"cniVersion": version}).error()
    assert (error["code"], error["msg"]) == (1, f"config version does not allow {command}")


def test_plugin_loads_little() -> None:
    """Each of these costs milliseconds at every ADD."""
    root = Path(udptun.__file__).resolve().parents[1]
    script = (
        f"import sys; sys.path.append({str(root)!r})\n"
        "from udptun.cni import bridge, plugin, state, subnet_env, delegates; print(*sys.modules)"
    )
    done = subprocess.run([*python_at_its_barest(), "-c", script], capture_output=True, text=True, check=True)
    heavy = {"argparse", "asyncio", "contextlib", "dataclasses", "logging", "pathlib", "subprocess", "typing"}
    assert not heavy & set(done.stdout.split())


# --- while there is no subnet.env


def test_add_waits_for_subnet_env(plugin: Plugin, delegate: FakeDelegate) -> None:
    plugin.subnet_file.unlink()
    timer = threading.Timer(0.4, lambda: plugin.subnet_file.write_text(IPV4_ENV))
    timer.start()
    plugin.run("ADD").result()
    timer.join()


def test_add_without_subnet_env_says_what_the_daemon_waits_for(plugin: Plugin, delegate: FakeDelegate) -> None:
    """Flannel's plugin said that a file is not there; people wrote it by hand."""
    plugin.subnet_file.unlink()
    said = {"state": "starting", "reason": "waits for the network config in etcd", "since": time.time() - 12}
    Path(f"{plugin.subnet_file}.status").write_text(json.dumps(said))
    started_s = time.monotonic()
    error = plugin.run("ADD").error()
    assert time.monotonic() - started_s > 2.9
    waiting = [f"udptun on this node is not ready: {said['reason']} (since {age} s)" for age in range(14, 70)]
    assert (error["code"], error["msg"] in waiting) == (11, True), error
    assert f"open {plugin.subnet_file}: no such file or directory. `udptun status` and" in error["details"]
    assert delegate.calls == []


def test_node_whose_daemon_has_never_run(plugin: Plugin) -> None:
    plugin.subnet_file.unlink()
    with pytest.raises(CniError, match="is not ready: its daemon has not said anything yet") as error:
        subnet_env.read(str(plugin.subnet_file))
    assert f"open {plugin.subnet_file}: no such file or directory. Is the daemon running?" in error.value.details


@pytest.mark.parametrize("text", ["", "{", "[]", '{"reason": 3}', '{"reason": "x", "since": "y"}'])
def test_damaged_status_file_harms_nothing(plugin: Plugin, text: str) -> None:
    plugin.subnet_file.unlink()
    Path(f"{plugin.subnet_file}.status").write_text(text)
    with pytest.raises(CniError, match="not ready"):
        subnet_env.read(str(plugin.subnet_file))


def test_status_is_50_with_the_daemons_words(plugin: Plugin, delegate: FakeDelegate) -> None:
    members = {"cniVersion": "1.1.0"}
    assert plugin.run("STATUS", conf=members).result() == {}
    assert delegate.calls == ["STATUS"]
    delegate.fail("STATUS", 50, "ipam is away")
    assert plugin.run("STATUS", conf=members).error()["code"] == 50
    plugin.subnet_file.unlink()
    said = {"state": "starting", "reason": "no lease", "since": time.time()}
    Path(f"{plugin.subnet_file}.status").write_text(json.dumps(said))
    error = plugin.run("STATUS", conf=members).error()
    assert error["code"] == 50
    assert error["msg"].startswith("udptun on this node is not ready: no lease (since ")


# --- GC, and addresses that nobody gave back


def reserve(plugin: Plugin, address: str, container_id: str, ifname: str = "eth0", age_s: float = 0) -> Path:
    """As host-local does, and so long ago."""
    path = plugin.directory / "networks" / NAME / address
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{container_id}\r\n{ifname}")
    os.utime(path, (time.time() - age_s,) * 2)
    return path


@pytest.fixture
def gc_conf(plugin: Plugin) -> dict[str, Any]:
    return {"cniVersion": "1.1.0", "ipam": {"dataDir": str(plugin.directory / "networks")}}


def attachments(*names: tuple[str, str]) -> list[dict[str, str]]:
    return [{"containerID": container_id, "ifname": ifname} for container_id, ifname in names]


def test_gc_frees_what_is_not_valid(plugin: Plugin, delegate: FakeDelegate, gc_conf: dict[str, Any]) -> None:
    for container_id in ("keep", "lost"):
        plugin.run("ADD", container_id, conf=gc_conf).result()
    plugin.run("ADD", "stranger", conf={**gc_conf, "name": "another"}).result()
    reserved = {name: reserve(plugin, f"10.1.17.{n}", name) for n, name in enumerate(("keep", "lost", "unheard-of"), 2)}
    (reserved["keep"].parent / "last_reserved_ip.0").write_text("10.1.17.4")
    gc = {"cni.dev/valid-attachments": attachments(("keep", "eth0")), "cni.dev/attachments": []}
    answer = plugin.run("GC", conf={**gc_conf, **gc})
    assert (answer.result(), answer.stdout) == ({}, "")
    assert delegate.calls == ["ADD", "ADD", "ADD", "DEL", "GC"]
    environ = delegate.environ(3)
    assert (environ["CNI_CONTAINERID"], environ["CNI_IFNAME"]) == ("lost", "eth0")
    assert environ["CNI_NETNS"] == "/proc/self/ns/net"
    assert json.loads(delegate.stdin(4))["cni.dev/valid-attachments"] == gc["cni.dev/valid-attachments"]
    assert [plugin.stored(name) is None for name in ("keep", "lost", "stranger")] == [False, True, False]
    assert sorted(path.name for path in reserved["keep"].parent.iterdir()) == [
        "10.1.17.2",
        "last_reserved_ip.0",
        "lock",
    ]


def test_gc_of_another_interface_of_the_same_container(
    plugin: Plugin, delegate: FakeDelegate, gc_conf: dict[str, Any]
) -> None:
    plugin.run("ADD", conf=gc_conf).result()
    plugin.run("GC", conf={**gc_conf, "cni.dev/valid-attachments": attachments(("c1", "eth1"))}).result()
    assert plugin.stored() is None


def test_gc_keeps_the_valid_container_of_flannels_plugin(
    plugin: Plugin, delegate: FakeDelegate, gc_conf: dict[str, Any]
) -> None:
    plugin.data_dir.mkdir()
    (plugin.data_dir / "c1").write_text(stored_conf(RANGE, ROUTE))
    plugin.run("GC", conf={**gc_conf, "cni.dev/valid-attachments": attachments(("c1", "net1"))}).result()
    assert plugin.stored() is not None
    plugin.run("GC", conf={**gc_conf, "cni.dev/valid-attachments": None}).result()
    assert plugin.stored() is None


def test_gc_goes_on_after_a_failure_and_reports_it(
    plugin: Plugin, delegate: FakeDelegate, gc_conf: dict[str, Any]
) -> None:
    for container_id in ("a", "b"):
        plugin.run("ADD", container_id, conf=gc_conf).result()
    delegate.answer("DEL", 'if [ $CNI_CONTAINERID = a ]; then echo \'{"code":5,"msg":"disk"}\'; exit 1; fi\n')
    error = plugin.run("GC", conf={**gc_conf, "cni.dev/valid-attachments": []}).error()
    assert (error["code"], error["msg"]) == (5, f"GC of {NAME}: 1 failed")
    assert error["details"] == "failed to delegate del: disk"
    assert [plugin.stored(name) is None for name in ("a", "b")] == [False, True]
    assert delegate.calls[-1] == "GC"


@pytest.mark.parametrize(
    "lists",
    [
        {},
        {"cni.dev/valid-attachments": "all"},
        {"cni.dev/valid-attachments": [{"containerID": "c1"}]},
        {"cni.dev/valid-attachments": ["c1"]},
    ],
)
def test_gc_without_a_proper_list_frees_nothing(
    plugin: Plugin, delegate: FakeDelegate, gc_conf: dict[str, Any], lists: dict[str, Any]
) -> None:
    plugin.run("ADD", conf=gc_conf).result()
    assert plugin.run("GC", conf={**gc_conf, **lists}).error()["code"] == 7
    assert plugin.stored() is not None


def make_older(plugin: Plugin, container_id: str) -> None:
    """As if the host had booted since."""
    path = plugin.data_dir / ".udptun" / container_id
    path.write_text(path.read_text().replace(boot_id(), "11111111-2222-3333-4444-555555555555"))


def test_del_of_an_earlier_boots_container_does_not_enter_a_namespace_of_today(
    plugin: Plugin, delegate: FakeDelegate, gc_conf: dict[str, Any]
) -> None:
    """The path may be /proc/PID/ns/net, and that pid another process now."""
    plugin.run("ADD", conf=gc_conf).result()
    make_older(plugin, "c1")
    plugin.run("GC", conf={**gc_conf, "cni.dev/valid-attachments": []}).result()
    assert delegate.environ(1)["CNI_NETNS"] == ""


def test_add_takes_addresses_back_when_none_is_left(
    plugin: Plugin, delegate: FakeDelegate, gc_conf: dict[str, Any]
) -> None:
    """After a reboot flannel's nodes had no address for new pods: the files of the old ones were still there."""
    plugin.run("ADD", "old", conf=gc_conf).result()
    make_older(plugin, "old")
    plugin.run("ADD", "living", conf=gc_conf).result()
    years_s = 1e8
    leaked = reserve(plugin, "10.1.17.9", "nobody", age_s=years_s)
    kept = [reserve(plugin, "10.1.17.10", "living", age_s=years_s), reserve(plugin, "10.1.17.11", "of-another-plugin")]
    # Of flannel's plugin, of which the time of the file is all that is known.
    for name, age_s in (("flannels-old", years_s), ("flannels-new", 0)):
        (plugin.data_dir / name).write_text(plugin.stored("living") or "")
        os.utime(plugin.data_dir / name, (time.time() - age_s,) * 2)
    full = json.dumps({"code": 999, "msg": "failed to allocate for range 0: no IP addresses available in range set: x"})
    delegate.answer("ADD", f"if [ -e {leaked} ]; then echo '{full}'; exit 1; fi\n")
    answer = plugin.run("ADD", "new", conf=gc_conf)
    answer.result()
    assert "freed the address 10.1.17.9 of container nobody" in answer.stderr
    assert delegate.calls == ["ADD", "ADD", "ADD", "DEL", "DEL", "DEL", "ADD"]
    assert {path.name for path in plugin.data_dir.iterdir()} == {".udptun", "living", "new", "flannels-new"}
    assert (leaked.exists(), *(path.exists() for path in kept)) == (False, True, True)


def test_add_without_an_address_left_says_how_many_are_given(
    plugin: Plugin, delegate: FakeDelegate, gc_conf: dict[str, Any]
) -> None:
    plugin.run("ADD", "living", conf=gc_conf).result()
    reserve(plugin, "10.1.17.10", "living")
    delegate.fail("ADD", 999, "no IP addresses available in range set: 10.1.17.1-10.1.17.254", "")
    error = plugin.run("ADD", "new", conf=gc_conf).error()
    assert "1 addresses are given out, none of them to a container that is known to be gone" in error["details"]
    assert delegate.calls == ["ADD", "ADD", "DEL"]


def test_status_is_50_when_no_address_is_left(plugin: Plugin, delegate: FakeDelegate, gc_conf: dict[str, Any]) -> None:
    plugin.subnet_file.write_text(IPV4_ENV.replace("10.1.17.1/24", "10.1.17.1/29"))
    for n in range(2, 6):
        reserve(plugin, f"10.1.17.{n}", f"c{n}")
    assert plugin.run("STATUS", conf=gc_conf).result() == {}
    reserve(plugin, "10.1.17.6", "c6")
    error = plugin.run("STATUS", conf=gc_conf).error()
    assert (error["code"], error["msg"]) == (50, "no address is left in 10.1.17.0/29")


def test_path_in_another_mount_namespace_is_not_taken_for_a_dead_container(
    plugin: Plugin, delegate: FakeDelegate, gc_conf: dict[str, Any]
) -> None:
    """`udptun cni gc` may run in a container, where no path of the runtime's exists."""
    plugin.run("ADD", conf=gc_conf, netns="/run/netns/nowhere").result()
    path = plugin.data_dir / ".udptun" / "c1"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mountNs": "0:1", "netnsIdentity": "0:2"}))
    conf = json.loads(plugin.stored() or "")

    def free() -> Freed:
        delegates = Delegates(str(plugin.directory / "bin"), os.environ)
        return free_dead(conf, StateDir(str(plugin.data_dir)), delegates)

    assert free().lines == []
    path.write_text(path.read_text().replace("0:1", identity_of("/proc/self/ns/mnt")))
    assert free().lines == ["deleted the attachment of container c1"]
