"""`udptun status` against sockets that answer well, badly or not at all."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from udptun.commands import status
from udptun.control.run_dir import SOCKET_NAME
from udptun.core.errors import UdptunError

NOW_S = 1_700_000_000.0

DOCUMENT: dict[str, Any] = {
    "schema": 1,
    "version": "0.1.0",
    "pid": 10,
    "uptime_s": 59.9,
    "store": "local:/var/lib/udptun/leases.db",
    "network": "10.244.0.0/16",
    "lease": {
        "subnet": "10.244.1.0/24",
        "public_ip": "192.0.2.1",
        "port": 8285,
        "node_id": "1" * 32,
        "expires_at": NOW_S + 7265,
    },
    "underlay": {"interface": "eth0", "address": "192.0.2.1", "mtu": 1500},
    "backend": {"type": "udp", "reason": "as configured", "device": "flannel0", "mtu": 1472, "source_check": "peer"},
    "datapath": {
        "pid": 11,
        "uptime_s": 3600.5,
        "standby_pids": [12, 13],
        "confinement": "full",
        "workers": ["running", "tun_lost"],
    },
    "peers": [
        {
            "subnet": "10.244.2.0/24",
            "public_ip": "192.0.2.2",
            "port": 9000,
            "udptun": False,
            "expires_at": None,
            "liveness": "alive",
            "rtt_ms": 0.25,
            "path_mtu": None,
            "encap_packets": 1234567,
            "encap_bytes": 2,
            "decap_packets": 3,
            "decap_bytes": 4,
        }
    ],
    "firewall": {"form": "iptables", "masquerade": True, "forward": True},
    "skipped": ["junk: not JSON"],
    "counters": {"encap_packets": 9, "encap_drop_ttl": 0, "decap_drop_unknown_peer": 7},
    "problems": ["route x is not ours"],
}


def test_document_is_shown_for_people() -> None:
    assert status.render(DOCUMENT, NOW_S) == (
        "lease      10.244.1.0/24 of 10.244.0.0/16, expires in 2h01m\n"
        "store      local:/var/lib/udptun/leases.db\n"
        "underlay   eth0 192.0.2.1 mtu 1500, public 192.0.2.1:8285\n"
        "backend    udp flannel0 mtu 1472, source check peer (as configured)\n"
        "datapath   pid 11, up 1h00m, standby 12, 13, workers running, tun_lost, confinement full\n"
        "firewall   iptables: masquerade and forward\n"
        "daemon     pid 10, up 59s, version 0.1.0\n"
        "\n"
        "PEER SUBNET    PUBLIC IP  PORT  UDPTUN   HOST  RTT MS  MTU     SENT  BYTES  RECEIVED  BYTES\n"
        "10.244.2.0/24  192.0.2.2  9000      no  alive    0.25    -  1234567      2         3      4\n"
        "\n"
        "drops      decap_drop_unknown_peer 7\n"
        "skipped    1 of the leases in the store\n"
        "           junk: not JSON\n"
        "problem    route x is not ours\n"
    )


def test_a_datapath_that_ipv6_has_beside_the_other_is_shown_for_people() -> None:
    learned = [{"address": "2001:db8::9", "port": None}]
    peer = {**DOCUMENT["peers"][0], "subnet": "fd00:244:0:2::/64", "public_ip": "2001:db8::2", "learned": learned}
    ipv6 = {
        "network": "fd00:244::/48", "subnet": "fd00:244:0:1::/64", "public_ip": "2001:db8::1",
        "device": "flannel-v6.1", "mtu": 1430, "peers": [peer],
        "datapath": {"pid": 21, "uptime_s": 3.0, "standby_pids": [22], "workers": ["running"]},
        "counters": {"encap_packets": 3, "decap_drop_vxlan_mac": 2},
    }
    lines = status.render({**DOCUMENT, "ipv6": ipv6}, NOW_S).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("datapath   pid 11"))
    assert lines[at + 1] == "datapath   pid 21, up 3s, standby 22, workers running, for IPv6"
    at = lines.index("drops      decap_drop_unknown_peer 7")
    assert lines[at + 1] == "drops      decap_drop_vxlan_mac 2, for IPv6"
    assert "learned    fd00:244:0:2::/64 sends from 2001:db8::9 too" in lines


def test_document_without_peers_drops_and_datapath_is_shown_for_people() -> None:
    quiet = DOCUMENT | {
        "lease": DOCUMENT["lease"] | {"expires_at": None},
        "datapath": {"pid": None, "uptime_s": None, "standby_pids": [], "workers": ["stopped"]},
        "peers": [],
        "firewall": {"form": None, "masquerade": False, "forward": False},
        "skipped": [],
        "counters": {},
        "problems": [],
    }
    lines = status.render(quiet, NOW_S).splitlines()
    assert lines[0] == "lease      10.244.1.0/24 of 10.244.0.0/16, never expires"
    assert lines[4] == "datapath   pid none, up 0s, standby none, workers stopped"
    assert lines[5] == "firewall   no rules"
    assert lines[-2:] == ["", "drops      none"]
    expired = DOCUMENT | {"lease": DOCUMENT["lease"] | {"expires_at": NOW_S - 1}}
    assert status.render(expired, NOW_S).splitlines()[0].endswith(", expired")


@contextmanager
def daemon(run_dir: Path, answer: bytes | None) -> Iterator[None]:
    """Someone who answers one request so, or with None takes it and stays silent."""
    done = threading.Event()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(4096).startswith(b"GET /status HTTP/1.1\r\n")
            if answer is None:
                done.wait(30)
            else:
                connection.sendall(answer)

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(run_dir / SOCKET_NAME))
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        yield
        done.set()
        thread.join()


def http(status_line: str, body: str) -> bytes:
    return f"HTTP/1.1 {status_line}\r\nContent-Type: x\r\n\r\n{body}".encode()


def test_json_is_passed_on_as_the_daemon_wrote_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = json.dumps(DOCUMENT) + "\n"
    with daemon(tmp_path, http("200 OK", text)):
        assert status.show(tmp_path, as_json=True) == 0
    assert capsys.readouterr().out == text
    (tmp_path / SOCKET_NAME).unlink()
    with daemon(tmp_path, http("200 OK", text)):
        assert status.show(tmp_path, as_json=False) == 0
    assert "10.244.2.0/24  192.0.2.2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (http("503 Service Unavailable", "not ready\n"), "not ready"),
        (http("500 Internal Server Error", ""), "the daemon at {path} answered 'HTTP/1.1 500 Internal Server Error'"),
        (b"", "the daemon at {path} answered ''"),
        (b"\xff\xfe", "the daemon at {path} answered '\ufffd\ufffd'"),
        (http("200 OK", '{"schema": 1, "versi'), "the daemon at {path} answered with half a document"),
        (None, "the daemon at {path} does not answer within 0 s"),
    ],
)
def test_daemon_that_answers_badly_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes | None, line: str
) -> None:
    monkeypatch.setattr(status, "_TIMEOUT_S", 0.2 if answer is None else 10.0)
    with daemon(tmp_path, answer), pytest.raises(UdptunError) as caught:
        status.show(tmp_path, as_json=False)
    assert str(caught.value) == line.format(path=tmp_path / SOCKET_NAME)
    assert caught.value.exit_status == 1


@pytest.mark.parametrize("makes_room", [True, False])
def test_a_daemon_with_a_full_queue_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, makes_room: bool
) -> None:
    """While many clients came at once, `no udptun daemon answers: Resource temporarily unavailable; is it running`."""
    monkeypatch.setattr(status, "_TIMEOUT_S", 10.0 if makes_room else 0.2)
    text = json.dumps(DOCUMENT) + "\n"
    path = tmp_path / SOCKET_NAME
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as other:
        listener.bind(str(path))
        listener.listen(0)
        other.connect(str(path))  # the one that the queue has room for

        def answer() -> None:
            listener.accept()[0].close()
            with listener.accept()[0] as connection:
                connection.recv(4096)
                connection.sendall(http("200 OK", text))

        if not makes_room:
            with pytest.raises(UdptunError, match=f"the daemon at {path} does not answer within 0 s"):
                status.fetch(tmp_path)
            return
        late = threading.Timer(0.2, answer)
        late.start()
        assert status.fetch(tmp_path) == text
        late.join()


def test_daemon_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / SOCKET_NAME
    with pytest.raises(UdptunError) as caught:
        status.fetch(tmp_path)
    said = f"no udptun daemon answers at {path}: No such file or directory; is it running, and with this --run-dir?"
    assert str(caught.value) == said
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    with pytest.raises(UdptunError, match=r"Connection refused; is it running"):
        status.fetch(tmp_path)
    with pytest.raises(UdptunError, match=r"AF_UNIX path too long; is it running"):
        status.fetch(tmp_path / ("x" * 100))


def test_many_skipped_leases_are_counted_and_the_first_of_them_shown() -> None:
    lines = status.render({**DOCUMENT, "skipped": [f"key-{n}: {'x' * 1000}" for n in range(150)]}, NOW_S).splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith("skipped")]
    assert lines[at] == "skipped    150 of the leases in the store"
    shown = [line for line in lines if "key-" in line]
    assert len(shown) == 100
    assert max(map(len, shown)) < 320
    assert lines[at + 101] == "           ... and 50 more: --json has them all"


def test_addresses_that_peers_send_from_are_shown() -> None:
    learned = [{"address": "192.0.2.9", "port": 40_000}, {"address": "192.0.2.10", "port": None}]
    (peer,) = DOCUMENT["peers"]
    lines = status.render({**DOCUMENT, "peers": [{**peer, "learned": learned}]}, NOW_S).splitlines()
    assert [line for line in lines if line.startswith("learned")] == [
        "learned    10.244.2.0/24 sends from 192.0.2.9:40000 too",
        "learned    10.244.2.0/24 sends from 192.0.2.10 too",
    ]
