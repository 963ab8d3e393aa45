"""`udptun docker-opts` and `mk-docker-opts.sh`: flannel's text, and what its script does badly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from udptun.commands import cli
from udptun.config import subnet_env

SUBNET_ENV = "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.74.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
BIP, MASQ, MTU = (
    'DOCKER_OPT_BIP="--bip=10.1.74.1/24"',
    'DOCKER_OPT_IPMASQ="--ip-masq=true"',
    'DOCKER_OPT_MTU="--mtu=1472"',
)
COMBINED = 'DOCKER_OPTS=" --bip=10.1.74.1/24 --ip-masq=true --mtu=1472"'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A subnet.env; the process has none of the variables that count."""
    for name in [name for name in os.environ if name.startswith(("FLANNEL_", "DOCKER_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/mk-docker-opts.sh"])
    path = tmp_path / "subnet.env"
    path.write_text(SUBNET_ENV)
    return path


def status_of(*argv: object) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(word) for word in argv])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def made(source: Path, *flags: str) -> list[str]:
    """The lines that the command writes to a file of its own."""
    target = source.with_name("docker.env")
    assert status_of("-f", source, "-d", target, *flags) == 0
    return target.read_text().splitlines()


@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        ([], [BIP, MASQ, MTU, COMBINED]),
        (["-i"], [BIP, MASQ, MTU]),
        (["-c"], [COMBINED]),
        (["-ic"], [BIP, MASQ, MTU, COMBINED]),
        (["-k", "CUSTOM_KEY"], [BIP, MASQ, MTU, COMBINED.replace("DOCKER_OPTS", "CUSTOM_KEY")]),
        (["-kCUSTOM_KEY", "-c"], [COMBINED.replace("DOCKER_OPTS", "CUSTOM_KEY")]),
        (["-m"], [BIP, MTU, COMBINED.replace(" --ip-masq=true", "")]),
        (["-c", "word", "-i"], [COMBINED]),
        (["-c", "--", "-i"], [COMBINED]),
    ],
)
def test_options_are_flannels_byte_for_byte(source: Path, flags: list[str], lines: list[str]) -> None:
    """`mk-docker-opts.sh` was missing: Docker's unit ended with "not found", or Docker started on its own subnet.

    Nine combinations of flags with what flannel's script makes of them; getopts' rules are among them.
    """
    assert made(source, *flags) == lines


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (SUBNET_ENV.replace("false", "true"), [BIP, MASQ.replace("true", "false"), MTU]),
        ("FLANNEL_SUBNET=10.1.74.1/24\n", [BIP]),
        ("export FLANNEL_MTU='1472' # bytes\n\nwhat is this\n", [MTU]),
        (
            "DOCKER_OPT_ZZ=--zz\nDOCKER_OPT_AA=--aa\nFLANNEL_MTU=1472\n",
            ['DOCKER_OPT_AA="--aa"', MTU, 'DOCKER_OPT_ZZ="--zz"'],
        ),
        ("", []),
    ],
)
def test_each_value_of_subnet_env_is_an_option(source: Path, text: str, lines: list[str]) -> None:
    source.write_text(text)
    assert made(source, "-i") == lines


def test_options_in_the_environment_stay_and_stand_first(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_OPTS", "--debug")
    monkeypatch.setenv("DOCKER_OPT_AA", "--aa")
    monkeypatch.setenv("FLANNEL_MTU", "9")
    combined = 'DOCKER_OPTS="--debug  --aa --bip=10.1.74.1/24 --ip-masq=true --mtu=1472"'
    assert made(source) == ['DOCKER_OPT_AA="--aa"', BIP, MASQ, MTU, combined]


def test_without_a_subnet_env_there_are_no_options_and_a_warning(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 0 as flannel's script, which is silent about it."""
    source.unlink()
    assert made(source) == ['DOCKER_OPTS=""']
    assert capsys.readouterr().err == f"docker-opts: warning: there is no file {source}: has the daemon started?\n"


@pytest.mark.parametrize("name", ["subnet.env", "../{}/subnet.env", "link"])
@pytest.mark.parametrize("flags", [[], ["-c"], ["-k", "DOCKER_NETWORK_OPTIONS"]])
def test_written_to_subnet_env_itself_the_subnet_is_not_lost(
    source: Path, name: str, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """flannel's script leaves Docker's lines alone in the file: a CNI plugin then fails, a restart forgets the subnet.

    Units of old have `-d /run/flannel/subnet.env`.  A second run begins from the same lines as the first, where
    flannel's script has nothing left to begin from, or finds its own result and repeats it.
    """
    monkeypatch.chdir(source.parent)
    Path("link").symlink_to("subnet.env")
    source.chmod(0o640)
    before, _ = subnet_env.read_previous(source)
    target = name.format(source.parent.name)
    separate = made(source, *flags)
    for run_flags in ([*flags, "-m"], flags, flags):
        assert status_of("-f", source, "-d", target, *run_flags) == 0
    assert source.read_text().splitlines() == [*SUBNET_ENV.splitlines(), *separate]
    assert subnet_env.read_previous(source) == (before, "")
    assert Path("link").is_symlink()
    assert source.stat().st_mode & 0o777 == 0o640


def test_dockers_options_in_subnet_env_outlive_a_new_mtu(source: Path) -> None:
    """A change of MTU wrote subnet.env anew: Docker's options went, and Docker's next start took its own subnet."""
    assert status_of("-f", source, "-d", source) == 0
    subnet_env.rewrite(source, SUBNET_ENV.replace("1472", "1400"))
    assert source.read_text() == SUBNET_ENV.replace("1472", "1400") + "\n".join([BIP, MASQ, MTU, COMBINED, ""])
    subnet_env.write(source, SUBNET_ENV)
    assert source.read_text() == SUBNET_ENV


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "FLANNEL_IPMASQ=maybe",
            "FLANNEL_IPMASQ is 'maybe', neither true nor false; start the daemon to write it anew",
        ),
        ("FLANNEL_MTU=big", "FLANNEL_MTU is 'big', not a number of bytes; start the daemon to write it anew"),
        ("FLANNEL_MTU=١", "FLANNEL_MTU is '١', not a number of bytes; start the daemon to write it anew"),
        *(
            (
                f"FLANNEL_SUBNET={value}",
                f"FLANNEL_SUBNET is '{value}', not one address with a length, as 10.244.3.1/24; "
                "start the daemon to write it anew",
            )
            for value in ("10.1.74.1", "10.1.74.1/33", "10.1.74.256/24", "10.1.74.1/24,10.1.75.1/24", "fd00::1/64", "x")
        ),
    ],
)
def test_a_value_that_docker_would_refuse_is_named_and_nothing_is_written(
    source: Path, line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source.write_text(f"{SUBNET_ENV}{line}\n")
    target = source.with_name("docker.env")
    target.write_text("as it was\n")
    assert status_of("-f", source, "-d", target) == 1
    assert capsys.readouterr().err == f"mk-docker-opts.sh: error: {message}\n"
    assert target.read_text() == "as it was\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-x"], "option -x not recognized (udptun docker-opts -h lists the options)"),
        (["-k"], "option -k requires argument (udptun docker-opts -h lists the options)"),
        *(
            (["-k", key], f"-k '{key}' is not a name for a variable of Docker's, as DOCKER_OPTS is")
            for key in ("A B", "", "1A", "FLANNEL_SUBNET")
        ),
    ],
)
def test_a_wrong_flag_is_one_line_and_status_2(
    source: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of("-f", source, "-d", source.with_name("docker.env"), *flags) == 2
    assert capsys.readouterr().err == f"mk-docker-opts.sh: error: docker-opts: {message}\n"
    assert not source.with_name("docker.env").exists()


def test_a_file_that_cannot_be_written_is_one_line_and_status_1(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of("-f", source, "-d", source.parent / "none" / "docker.env") == 1
    message = f"cannot write {source.parent}/none/docker.env: ENOENT; name another file with -d"
    assert capsys.readouterr().err == f"mk-docker-opts.sh: error: {message}\n"


def test_usage_lists_every_option_and_status_is_0(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["-h"], ["--help"]):
        assert status_of(*flags) == 0
        shown = capsys.readouterr().out
        assert shown.startswith("usage: udptun docker-opts ")
        assert [line[2:4] for line in shown.splitlines() if line.startswith("  -")] == [f"-{c}" for c in "fdickm"]


def test_options_can_go_to_a_pipe(source: Path) -> None:
    """And a start of Docker does not wait for libraries that the command does not need."""
    script = (
        "import sys; from udptun.commands.cli import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    )
    argv = [sys.executable, "-c", script, "docker-opts", "-f", source, "-d", "/dev/stdout"]
    answer = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines() == [BIP, MASQ, MTU, COMBINED]
    assert not {"asyncio", "socket", "logging", "udptun.config.net_conf"} & set(answer.stderr.split())


def test_unreadable_subnet_env_is_named(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object, **kwargs: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    assert status_of("-f", source, "-d", source.with_name("docker.env")) == 1
    assert capsys.readouterr().err == (
        f"mk-docker-opts.sh: error: cannot read {source}: EACCES; name flannel's subnet.env with -f\n"
    )
