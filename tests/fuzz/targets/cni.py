"""What a runtime, flannel's plugin and accidents leave to the CNI plugin: stdin, subnet.env, state files.

An input has parts with SPLIT between them: the configuration on stdin, subnet.env, what the daemon says beside it, a
state file, what we keep beside that, and what a delegate prints.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from random import Random
from unittest import mock

from tests.fuzz.mutate import json_mutator, words_mutator
from udptun.cni import bridge, go_json, leftovers, netconf, subnet_env
from udptun.cni.delegates import Delegates, _failure
from udptun.cni.errors import INTERNAL, CniError
from udptun.cni.leftovers import ValidAttachments
from udptun.cni.plugin import _as_error
from udptun.cni.state import Extras, StateDir, UnreadableStateError, boot_id

SPLIT = b"\n--\n"
_ENV = b"FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.3.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
_STATUS = b'{"state": "waiting", "reason": "waiting for etcd", "since": 1700000000.5}'
_STATE = b'{"cniVersion":"0.3.1","name":"cbr0","type":"bridge","ipam":{"type":"host-local"}}'
_EXTRAS = b'{"ifname":"eth0","netns":"/proc/1/ns/net","netnsIdentity":"4:5","mountNs":"4:6","bootId":"x"}'
_FAILED = b'{"code": 7, "msg": "no", "details": "d"}'
_CONFS = (
    b'{"name":"cbr0","type":"flannel","cniVersion":"0.3.1","delegate":{"hairpinMode":true,"isDefaultGateway":true}}',
    b'{"name":"cbr0","cniVersion":"1.1.0","type":"flannel","ipam":{"routes":[{"dst":"10.0.0.0/8"}]},"runtimeConfig":{},'
    b'"prevResult":{"ips":[{"address":"10.244.3.5/24","gateway":"10.244.3.1"}],"routes":[{"dst":"0.0.0.0/0"}]},'
    b'"cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}],"dataDir":"/x","subnetFile":"/y"}',
)


def _input(
    conf: bytes = b"{}", env: bytes = b"", said: bytes = b"", state: bytes = b"{}", extras: bytes = b"{}"
) -> bytes:
    return SPLIT.join((conf, env, said, state, extras, b""))


FOUND = {
    "half a surrogate pair": _input(b'{"name": "a", "delegate": {"x": "\\ud800"}}', _ENV),
    "a number that is Infinity": _input(b'{"name": "a", "delegate": {"x": 1e999}}', _ENV),
    "a path with a zero in it": _input(b'{"name": "a", "dataDir": "a\\u0000b"}', _ENV),
    "an MTU of thousands of digits": _input(_CONFS[0], _ENV.replace(b"1450", b"9" * 4400)),
    "the daemon's words are nested too deep": _input(said=b"[" * 1500),
    "the daemon has said so since 10^400": _input(said=b'{"reason": "x", "since": 1%s}' % (b"0" * 400)),
    "a network namespace with a zero in it": _input(
        extras=b'{"netns": "a\\u0000b", "netnsIdentity": "1:2", "bootId": "%s"}' % boot_id().encode()
    ),
    "an interface with a zero in it": _input(extras=b'{"ifname": "a\\u0000b"}'),
    "addresses in a directory with a zero in it": _input(
        state=b'{"ipam": {"type": "host-local", "dataDir": "a\\u0000b"}}', extras=b"{}"
    ),
}
SEEDS = (
    *(SPLIT.join((conf, _ENV, _STATUS, _STATE, _EXTRAS, _FAILED)) for conf in _CONFS),
    SPLIT.join((b"[]", b"", b"", b"", b"", b"")),
)

_JSON = json_mutator(
    (
        *("name", "type", "cniVersion", "delegate", "ipam", "routes", "dst", "gw", "runtimeConfig", "prevResult"),
        *("address", "gateway", "cni.dev/valid-attachments", "containerID", "ifname", "dataDir", "subnetFile", "msg"),
        *("code", "details", "state", "reason", "since", "bootId", "netns", "netnsIdentity", "mountNs", "isGateway"),
        *("bridge", "mtu", "ranges", "ips"),
    ),
    ("bridge", "host-local", "1.0.0", "0.4.0", "9.9.9", "cbr0", "../x", {"dst": "0.0.0.0/0"}, [{}], "ready", 1.5, 1e9),
)
_TEXT = words_mutator(
    (b"FLANNEL_NETWORK=", b"FLANNEL_SUBNET=", b"FLANNEL_MTU=", b"9" * 4400, b"10.0.0.1/8", b"export ", b"\xd9\xa1")
)


def mutate(data: bytes, random: Random) -> bytes:
    parts = data.split(SPLIT)
    at = random.randrange(len(parts))
    parts[at] = (_TEXT if at == 1 else _JSON)(parts[at], random)
    return SPLIT.join(parts)


def check(data: bytes) -> None:
    conf, env, status, state, extras, printed = (data.split(SPLIT) + [b""] * 6)[:6]
    global _directory
    if _directory is None:
        _directory = tempfile.TemporaryDirectory(prefix="udptun-fuzz-cni-", dir=_MEMORY if _MEMORY.is_dir() else None)
    path = Path(_directory.name)
    try:
        _expect(lambda: _configure(conf, env, path))
        (path / "subnet.env.status").write_bytes(status)
        _expect(lambda: subnet_env.read(str(path / "subnet.env")))
        _keep_state(state, extras, path)
        said = _failure("bridge", "ADD", 256, printed)
        _check_error(said)
    finally:
        for left in path.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()


_MEMORY = Path("/dev/shm")
_directory: tempfile.TemporaryDirectory[str] | None = None


def _expect(what: object) -> None:
    """A refusal that the runtime can read, and no fault of ours."""
    try:
        what()  # type: ignore[operator]
    except Exception as exc:
        with mock.patch("sys.excepthook", _raise):
            _check_error(_as_error(exc, "ADD"))


def _raise(kind: object, exc: BaseException, trace: object) -> None:
    raise exc


def _check_error(error: CniError) -> None:
    assert error.code != INTERNAL or "delegate" in error.message
    document = json.loads(go_json.dumps(error.document("1.0.0")).encode(), parse_constant=_refuse)
    assert document["msg"]


def _refuse(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def _configure(text: bytes, env: bytes, path: Path) -> None:
    conf = netconf.parse(text)
    assert "\0" not in conf.data_dir + conf.subnet_file
    subnet = subnet_env.parse(env.decode(errors="replace"), "subnet.env")
    delegate = netconf.delegate_conf(conf, subnet)
    written = go_json.dumps(delegate).encode()
    again = json.loads(written, parse_constant=_refuse)
    assert again["name"] == conf.name
    assert go_json.dumps(go_json.loads(written)).encode() == written
    ipam = again["ipam"]
    assert [it[0]["subnet"] for it in ipam["ranges"]] == subnet.subnets
    go_json.dumps(netconf.with_gateways(conf.members.get("prevResult"))).encode()
    with mock.patch.object(bridge, "_make_way", return_value=""):
        bridge.make_way(delegate, subnet.subnets)
    # A file of that name is there, or may be.
    Delegates(str(path), {}).find(str(delegate["type"]))


def _keep_state(text: bytes, extras: bytes, path: Path) -> None:
    state = StateDir(str(path / "state"))
    state.save("other", '{"name":"cbr0"}', Extras({"ifname": "eth0"}))
    (path / "state/mine").write_bytes(text)
    (path / "state/.udptun/mine").write_bytes(extras)
    try:
        attachment = state.load("mine")
    except UnreadableStateError:
        pass
    else:
        assert attachment is not None
        assert attachment.network is not None
        assert attachment.is_dead in (True, False)
        assert attachment.extras.netns_if_alive in ("", attachment.extras.netns)
        json.loads(attachment.extras.as_json().encode(), parse_constant=_refuse)
        go_json.dumps(attachment.conf).encode()
        ran: list[str] = []

        def run(self: object, command: str, conf: object, text: bytes, changes: dict[str, str] | None = None) -> bytes:
            ran.append(command)
            for name, value in (changes or {}).items():
                os.fsencode(f"{name}={value}")
                assert "\0" not in value
            return b""

        with mock.patch.object(Delegates, "run", run):
            _expect(lambda: leftovers.delete(attachment, Delegates("", {})))
        assert ran in (["DEL"], [])
    assert [it.container_id for it in state.all("cbr0")][-1:] == ["other"]
    try:
        valid = ValidAttachments(netconf.members_of(go_json.loads(text)))
    except (CniError, ValueError, RecursionError):
        return
    assert valid.has("a", "eth0") in (True, False)
