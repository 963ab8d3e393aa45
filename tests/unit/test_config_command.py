"""`udptun config`: what is said of a network config, and where each setting came from."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from udptun.backends.choice import parse_net_conf
from udptun.commands import config
from udptun.config.flags import FLAGS, parse_daemon_flags
from udptun.config.in_force import FLAGS_OVER_KEYS, FLAGS_OVER_KEYS_OF_UDP, flag_rows, key_rows
from udptun.core.errors import UsageError

NETWORK = '{"Network": "10.244.0.0/16", "Backend": {"Type": "udp", "mtu": 1400, "Workers": 3}}'


@pytest.fixture
def net_conf(tmp_path: Path) -> Path:
    path = tmp_path / "net-conf.json"
    path.write_text(NETWORK)
    return path


def check(text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[str]]:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    status = config.run(["check", "-"], {})
    return status, capsys.readouterr().out.splitlines()


# --- check


@pytest.mark.parametrize(
    ("text", "status", "lines"),
    [
        (
            '{"Network": "10.244.0.0/16"}',
            0,
            ["standard input: good: 10.244.0.0/16 in subnets of /24 from 10.244.1.0 to 10.244.255.0, Backend.Type udp"],
        ),
        (
            '{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan", "Prt": 1, "SourcePorts": 2}}',
            1,
            [
                "warning: standard input: Backend.SourcePorts: is for Type udp; Type vxlan ignores it",
                "warning: standard input: Backend.Prt: unknown key, ignored; did you mean Backend.Port?",
                "standard input: good: 10.244.0.0/16 in subnets of /24 from 10.244.1.0 to 10.244.255.0, "
                "Backend.Type vxlan",
            ],
        ),
        (
            '{"Network": "10.244.0.0/16", "SubnetLen": 17, "Zebra": 1, "Backend": {"Type": "vxlna"}}',
            2,
            [
                "error: standard input: Backend.Type: unknown backend type: vxlna; did you mean vxlan?",
                "error: standard input: SubnetLen: network must be able to accommodate at least four subnets: "
                "10.244.0.0/16 takes SubnetLen 18 or more, not 17",
                "warning: standard input: Zebra: unknown key, ignored",
            ],
        ),
        ("[]", 2, ["error: standard input: not a configuration: a JSON object is needed, not an array"]),
    ],
)
def test_check_has_a_line_for_each_problem_and_a_status_by_the_worst(
    text: str, status: int, lines: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check(text, capsys, monkeypatch) == (status, lines)


def test_check_prints_what_the_page_shows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    example = re.search(r"^    \$ echo '(.*)' \| udptun config check -\n((?:    .*\n)+)", page, re.MULTILINE)
    assert example is not None
    assert check(example[1], capsys, monkeypatch) == (1, [line.strip() for line in example[2].splitlines()])


def test_check_reads_a_file_and_tells_programs(net_conf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert config.run(["check", "--json", str(net_conf)], {}) == 0
    assert json.loads(capsys.readouterr().out) == {
        "schema": 1,
        "file": str(net_conf),
        "problems": [],
        "warnings": [],
    }


def test_check_of_what_cannot_be_read_is_a_problem_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert config.run(["check", str(tmp_path)], {}) == 2
    assert capsys.readouterr().out == f"error: cannot read the network config {tmp_path}: Is a directory\n"
    (tmp_path / "latin").write_bytes(b"\xff")
    assert config.run(["check", str(tmp_path / "latin")], {}) == 2


@pytest.mark.parametrize(
    "argv", [[], ["chek", "x"], ["check"], ["check", "a", "b"], ["show", "word"], ["show", "--no"]]
)
def test_what_is_not_a_command_is_a_usage_error(argv: list[str]) -> None:
    with pytest.raises(UsageError):
        config.run(argv, {})


# --- show


def show(capsys: pytest.CaptureFixture[str], *argv: str, status: int = 0, **environ: str) -> dict[str, Any]:
    assert config.run(["show", "--json", *argv], environ) == status
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def row(document: dict[str, Any], name: str) -> tuple[object, str]:
    (found,) = [it for it in document["keys"] + document["flags"] if it["name"] == name]
    return found["value"], found["source"]


def test_show_names_the_source_of_each_value(
    net_conf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_unit = tmp_path / "default"
    of_unit.write_text('# the unit\'s\nFLANNELD_IP_MASQ="true"\nFLANNELD_MTU=1300\nOTHER=1\n')
    document = show(
        capsys,
        *("--net-config-path", str(net_conf), "--env-file", str(of_unit), "--port=9000", "--v", "1"),
        FLANNELD_MTU="1200",
        FLANNELD_HEALTHZ_PORT="8081",
    )
    assert document["daemon"] is None
    assert row(document, "--net-config-path") == (str(net_conf), "--net-config-path")
    assert row(document, "--healthz-port") == (8081, "FLANNELD_HEALTHZ_PORT")
    assert row(document, "--ip-masq") == (True, f"FLANNELD_IP_MASQ in {of_unit}")
    assert row(document, "--subnet-file") == ("/run/flannel/subnet.env", "default")
    assert row(document, "--store") == ("local:/var/lib/udptun/leases.db", "default")
    assert row(document, "Network") == ("10.244.0.0/16", str(net_conf))
    assert row(document, "SubnetMax") == ("10.244.255.0", "default")
    assert row(document, "IPv6Network") == (None, "default")
    assert row(document, "Backend.Type") == ("udp", str(net_conf))
    assert row(document, "Backend.Workers") == (3, str(net_conf))
    assert row(document, "Backend.Port") == (9000, "--port")
    # The file wins over the environment, as for systemd, and the flag over the key.
    assert row(document, "Backend.MTU") == (1300, "FLANNELD_MTU")
    assert row(document, "Backend.LogLevel") == ("debug", "--v")
    assert row(document, "Backend.OffloadDisabled") == ([], "default")


def test_show_fills_defaults_in_and_says_what_they_depend_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "conf").write_text('{"Network": "10.0.0.0/8", "Backend": {"Type": "udp", "SourcePorts": "auto"}}')
    document = show(capsys, f"--net-config-path={tmp_path / 'conf'}", "--offload-disabled=tso,uso")
    n_cpus = len(os.sched_getaffinity(0))
    assert row(document, "Backend.MTU") == (None, "the interface's")
    assert row(document, "Backend.Workers")[1] == f"default for {n_cpus} processors"
    assert row(document, "Backend.SourcePorts") == ("auto", str(tmp_path / "conf"))
    assert row(document, "Backend.OffloadDisabled") == (["tso", "uso"], "--offload-disabled")
    assert row(document, "Backend.SourceCheck") == ("peer", "default")
    assert row(document, "SubnetLen") == (24, "default")


@pytest.mark.parametrize(
    ("argv", "store"),
    [
        (["--kube-subnet-mgr"], ("kube", "--kube-subnet-mgr")),
        (["--store=file:/x"], ("file:/x", "--store")),
    ],
)
def test_show_says_what_named_the_store(
    argv: list[str], store: tuple[str, str], net_conf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert row(show(capsys, f"--net-config-path={net_conf}", *argv), "--store") == store
    options = parse_daemon_flags(["--etcd-prefix=/p"], {})
    assert {"name": "--store", "value": "etcd", "source": "--etcd-prefix"} in flag_rows(options)


def test_show_tells_no_secret(net_conf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [f"--net-config-path={net_conf}", "--store=local", "--v=1"]
    options = parse_daemon_flags(["--etcd-username=u"], {"FLANNELD_ETCD_PASSWORD": "hunter2"})
    assert {"name": "--etcd-password", "value": "...", "source": "FLANNELD_ETCD_PASSWORD"} in flag_rows(options)
    assert row(show(capsys, *argv), "--etcd-password") == ("", "default")


def test_show_has_the_flags_and_status_2_where_the_network_config_is_no_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = show(capsys, f"--net-config-path={tmp_path / 'none'}", status=2)
    assert document["keys"] == []
    assert len(document["problems"]) == 1
    assert row(document, "--v") == (0, "default")


def test_show_as_text_has_a_line_for_each_setting(
    net_conf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert config.run(["show", f"--net-config-path={net_conf}", "--iface=eth0", "--iface=10.0.0.1"], {}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["What these flags and this environment bring:", "", f"Network config ({net_conf})"]
    assert re.fullmatch(r"  --iface +eth0,10\.0\.0\.1 +--iface", next(it for it in lines if "--iface " in it))
    assert re.fullmatch(r"  EnableIPv6 +false +default", next(it for it in lines if "EnableIPv6" in it))
    # Where no daemon answers, the reason stands first.
    assert config.run(["show"], {"FLANNELD_RUN_DIR": str(tmp_path), "FLANNELD_NET_CONFIG_PATH": str(net_conf)}) == 0
    assert capsys.readouterr().out.startswith(f"no udptun daemon answers at {tmp_path}")


def test_a_key_that_waits_for_a_restart_is_shown_as_it_is_in_force() -> None:
    conf = parse_net_conf('{"Network": "10.244.0.0/16", "Backend": {"Type": "udp"}}', "c")
    text = '{"Network": "10.244.0.0/16", "Backend": {"Type": "udp", "Port": 9000, "MTU": 1300}}'
    rows = {
        it["name"]: it for it in key_rows(parse_daemon_flags([], {}), conf, text, "c", 2, parse_net_conf(text, "c"))
    }
    assert rows["Backend.Port"]["value"] == 8285
    assert rows["Backend.Port"]["source"] == "c as it was at the start; a restart brings 9000"


def test_every_flag_that_wins_over_a_key_is_known_to_show() -> None:
    """The help of such a flag ends with "over Backend.KEY"."""
    said = {
        match[1]: flag.name
        for flags in FLAGS.values()
        for flag in flags
        if (match := re.search(r"over Backend\.(\w+)", flag.help))
    }
    assert said == {**FLAGS_OVER_KEYS, **FLAGS_OVER_KEYS_OF_UDP}
