"""What an operator reads when the daemon cannot start: one clear line for each problem, the documented status, and
nothing left behind.

The rules of the single parsers are tested beside them (tests/unit/test_config.py, test_options.py, tests/stores);
here the whole program runs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from traffic import datapath_pids, kill, lock_database

from udptun.lab.host import SUBNET_ENV, Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import LEASES, NET_CONF, Lab

UDPTUN = [sys.executable, "-m", "udptun"]
AS_FLANNELD = "import sys; sys.argv[0] = '/opt/flanneld'; from udptun.commands.cli import main; main()"
FLANNELD = [sys.executable, "-c", AS_FLANNELD]
CONF = {"Network": "10.244.0.0/16", "Backend": {"Type": "udp"}}


def errors(text: str) -> list[str]:
    """The messages of level error; nothing may be printed but log lines."""
    lines = text.splitlines()
    for line in lines:
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [DIWE] udptun\.[a-z_.]+: .", line), line
    return [line.split(": ", 1)[1] for line in lines if line.split(" ", 3)[2] == "E"]


# --- the command line: no log yet, one line


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--subnet-fiel=/x"], "unknown flag --subnet-fiel; did you mean --subnet-file?"),
        (["ip-masq"], "unexpected argument 'ip-masq'; the daemon takes flags only"),
        (["--iface"], "--iface needs a value: IFACE"),
        (
            ["--iface-regex=[[:smile:]]"],
            "--iface-regex=[[:smile:]]: must be a regular expression (no character class [:smile:])",
        ),
        (["--workers=0"], "--workers=0: must be 1..16"),
        (["--mtu", "10"], "--mtu=10: must be 96..65535"),
        (["--source-check=all"], "--source-check=all: must be off, peer or strict"),
        (["--public-ip=fd00::1"], "--public-ip=fd00::1: must be an IPv4 address"),
        (["--healthz-port=65536"], "--healthz-port=65536: must be 0..65535"),
        (
            ["--subnet-lease-renew-margin=1440"],
            "Invalid subnet-lease-renew-margin option, out of acceptable range: 1440 is not in 1..1439",
        ),
        (["--store=kube:/x"], "--store=kube:/x: takes no path; see --kubeconfig-file and --kube-api-url"),
        (["--store=sql:/x"], "--store=sql:/x: must be local[:PATH], file:PATH, etcd or kube"),
        (["--store=file"], "--store=file: needs a path: file:PATH"),
        (
            ["--kube-subnet-mgr"],
            "env variables POD_NAME and POD_NAMESPACE must be set, or NODE_NAME: which node of Kubernetes is this "
            "host?",
        ),
        (["--iptables-resync=0"], "--iptables-resync=0: must be 1..86400"),
    ],
)
def test_a_bad_flag_has_one_line_and_status_2(argv: list[str], line: str) -> None:
    done = subprocess.run([*UDPTUN, "daemon", *argv], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"udptun: error: {line}\n")


# --- the configuration: read before anything of the system is touched, so no root is needed


def start_with_config(directory: Path, conf: str | None) -> subprocess.CompletedProcess[str]:
    path = directory / "net-conf.json"
    if conf is not None:
        path.write_text(conf)
    argv = [
        *("--store", f"local:{directory}/leases.db", "--net-config-path", str(path)),
        *("--run-dir", f"{directory}/run", "--state-dir", f"{directory}/state", "--subnet-file", f"{directory}/env"),
    ]
    return subprocess.run([*UDPTUN, "daemon", *argv], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("conf", "lines"),
    [
        (
            None,
            [
                r'no network config at {path}: write it, for example {{"Network": "10.244.0.0/16", '
                r'"Backend": {{"Type": "udp"}}}}, or name another file with --net-config-path'
            ],
        ),
        ('{"Network": "10.244.0.0/16",}', ["{path}: not JSON: line 1 column 29: "]),
        ("[]", ["{path}: not a configuration: a JSON object is needed, not an array"]),
        ("{}", ["{path}: Network: please define a correct Network parameter in the flannel config"]),
        (
            '{"Network": "10.244.0.0/16", "Backend": {"Type": "wireguard"}}',
            ["{path}: Backend.Type: backend type wireguard is flannel's alone; built: udp, vxlan, host-gw, alloc"],
        ),
        (
            '{"Network": "10.244.0.0/16", "Backend": {"Type": "upd"}}',
            ["{path}: Backend.Type: unknown backend type: upd; did you mean udp?"],
        ),
        (
            '{"Network": "127.0.0.0/8", "SubnetLen": 31, "EnableIPv4": "yes",'
            ' "Backend": {"Type": "udp", "Port": 0, "MTU": 1, "Workers": 99, "SourceCheck": "", "LogLevel": 3}}',
            [
                "{path}: EnableIPv4: must be true or false, not ",
                '{path}: Backend.SourceCheck: must be "off", "peer" or "strict", not ""',
                "{path}: Backend.Port: must be 1..65535, not 0",
                "{path}: Backend.MTU: must be 96..65535, not 1",
                "{path}: Backend.Workers: must be 1..16, not 99",
                '{path}: Backend.LogLevel: must be "debug", "info", "warning" or "error", not 3',
                "{path}: SubnetLen: SubnetLen must be less than /31, not /31",
                "{path}: Network: 127.0.0.0/8 overlaps 127.0.0.0/8 (loopback addresses), which no host can route",
            ],
        ),
        (
            '{"Network": "10.244.0.0/16", "network": "10.245.0.0/16"}',
            ["{path}: Network: given twice (as Network and network); keep one"],
        ),
    ],
)
def test_each_problem_of_the_config_has_one_line_and_the_status_is_2(
    tmp_path: Path, conf: str | None, lines: list[str]
) -> None:
    done = start_with_config(tmp_path, conf)
    found = errors(done.stderr)
    assert (done.returncode, done.stdout, len(found)) == (2, "", len(lines)), done.stderr
    for line in lines:
        wanted = line.format(path=tmp_path / "net-conf.json")
        assert any(one.startswith(wanted) for one in found), wanted
    assert not (tmp_path / "leases.db").exists()
    assert not (tmp_path / "env").exists()


def test_a_config_that_cannot_be_read_has_one_line_and_status_2(tmp_path: Path) -> None:
    (tmp_path / "net-conf.json").mkdir()
    done = start_with_config(tmp_path, None)
    assert done.returncode == 2
    assert errors(done.stderr) == [f"cannot read the network config {tmp_path}/net-conf.json: Is a directory"]


# --- the host: in a lab


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(f"e{os.getpid()}", n_hosts=1) as lab:
        yield lab


@pytest.fixture
def host(lab: Lab) -> Iterator[Host]:
    """A host as it was installed; whatever the test leaves behind is taken away."""
    yield lab.host(1)
    if left := datapath_pids(lab.host(1)):
        kill(lab.host(1), *left)
    script = (
        "ip link delete flannel0; umount /dev/net; umount /run/small;"
        f"rm -rf /run/udptun /run/flannel /run/small /run/leases.json /var/lib/udptun/* {LEASES}*"
    )
    lab.host(1).run(["sh", "-c", script], check=False)


def start(host: Host, argv: Sequence[str] = (), conf: Mapping[str, object] = CONF) -> tuple[int, list[str]]:
    """Run the daemon to its end; the status and its lines of level error."""
    host.path(NET_CONF).write_text(json.dumps(conf))
    argv = [*UDPTUN, "daemon", "--store", f"local:{LEASES}", "--net-config-path", str(NET_CONF), *argv]
    done = host.run(argv, check=False)
    assert done.stdout == ""
    return done.returncode, errors(done.stderr)


def left_behind(host: Host, path: Path = LEASES) -> list[str]:
    """Everything that a start can leave: link, routes, processes, lease, subnet.env."""
    left = [name for name in ("flannel0",) if host.path(f"/sys/class/net/{name}").exists()]
    left += host.run(["ip", "route", "show", "proto", "158"]).stdout.splitlines()
    left += [f"process {pid}" for pid in datapath_pids(host)]
    left += [name for name in (SUBNET_ENV,) if host.path(name).exists()]
    if host.path(path).is_file():
        left += sql(host, path, "select key from leases", check=False).split()
    return left


def sql(host: Host, path: Path, statement: str, check: bool = True) -> str:
    """What the statement gives, run inside: SQLite resolves the links by which we see the host's files."""
    script = (
        "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]);"
        "[print(*row) for row in db.execute(sys.argv[2])]; db.commit(); db.close()"
    )
    return host.run([sys.executable, "-c", script, str(path), statement], check=check).stdout


def nothing(host: Host) -> None:
    """The host is as it was installed."""


def shell(script: str) -> Callable[[Host], object]:
    return lambda host: host.run(["sh", "-ec", script])


def write(path: str | Path, content: str) -> Callable[[Host], object]:
    return lambda host: host.path(path).write_text(content)


def leases(*entries: Mapping[str, object]) -> Callable[[Host], object]:
    return write("/run/leases.json", json.dumps(entries))


def database(*statements: str) -> Callable[[Host], object]:
    def prepare(host: Host) -> None:
        for statement in statements:
            sql(host, LEASES, statement)

    return prepare


def used_database(*statements: str) -> Callable[[Host], object]:
    """A database that our daemon has made, then changed by hand."""

    def prepare(host: Host) -> None:
        start(host, ["--subnet-file", "/proc/none/subnet.env"])
        database(*statements)(host)

    return prepare


def truncated_database(host: Host) -> None:
    used_database("vacuum")(host)
    os.truncate(host.path(LEASES), 5000)


def listener(kind: str, port: int) -> Callable[[Host], object]:
    """A stranger who holds the port."""
    script = (
        f"import socket, time; s = socket.socket(type=socket.{kind}); s.bind(('0.0.0.0', {port}));"
        "getattr(s, 'listen', int)() if s.type == socket.SOCK_STREAM else 0;"
        "print('bound', flush=True); time.sleep(600)"
    )

    def prepare(host: Host) -> subprocess.Popen[str]:
        process = host.popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == "bound\n"
        return process

    return prepare


@dataclass(frozen=True)
class Case:
    name: str
    status: int
    line: str
    """Regular expression for the whole line."""
    prepare: Callable[[Host], object] = nothing
    argv: tuple[str, ...] = ()
    conf: Mapping[str, object] | None = None
    stays: tuple[str, ...] = ()
    """What was there before and stays there."""


FILE = ("--store", "file:/run/leases.json")
MINE = {"Subnet": "10.244.1.0/24", "PublicIP": "192.168.77.11"}
FOREIGN_LEASE = "insert into leases (key, value) values ('10.244.5.0-24', '{\"PublicIP\":\"192.0.2.7\"}')"

CASES = [
    # the underlay
    Case(
        "no such interface",
        1,
        r"Failed to find interface to use that matches the interfaces and/or regexes provided "
        r"\(--iface=eth7: error looking up interface eth7: no such interface; there are: eth0 192\.168\.77\.11\)",
        argv=("--iface=eth7",),
    ),
    Case(
        "no default route",
        1,
        r"Failed to find any valid interface to use: .*unable to find default route; use --iface .*",
        shell("ip route delete default"),
    ),
    Case(
        "no interface with the public IP",
        1,
        r"Failed to find any valid interface to use: No interface with given IP found: 192\.0\.2\.1 .*",
        argv=("--public-ip=192.0.2.1",),
    ),
    Case(
        "Network contains the underlay",
        2,
        r"Network: 192\.168\.0\.0/16 contains this host's underlay address 192\.168\.77\.11; choose a Network .*",
        conf={"Network": "192.168.0.0/16"},
    ),
    Case(
        "the public IP lies inside Network",
        2,
        r"our lease in local:.* cannot be used: PublicIP 10\.244\.7\.7 lies inside Network 10\.244\.0\.0/16",
        argv=("--iface=eth0", "--public-ip=10.244.7.7"),
    ),
    Case(
        "the public IP is no host's",
        2,
        r"our lease in local:.* cannot be used: PublicIP 127\.0\.0\.1 is not a unicast address",
        argv=("--iface=eth0", "--public-ip=127.0.0.1"),
    ),
    # directories, sockets, the device
    Case(
        "no run directory",
        1,
        r"cannot make the directory /proc/run: ENOENT; run as root\?",
        argv=("--run-dir=/proc/run",),
    ),
    Case(
        "a run directory that others can write",
        2,
        r"--run-dir: /run/open is not used: others may write to /run/open \(mode 0777\); `chmod go-w /run/open`, or .*",
        shell("mkdir -m 777 /run/open"),
        argv=("--run-dir=/run/open",),
    ),
    Case(
        "no state directory",
        1,
        r"cannot make the directory /proc/state: ENOENT; run as root\?",
        argv=("--state-dir=/proc/state",),
    ),
    Case(
        "a run directory too long for a socket",
        1,
        r"cannot listen on /run/udptun/x{100}/udptun\.sock: no reason given; AF_UNIX path too long",
        argv=(f"--run-dir=/run/udptun/{'x' * 100}",),
    ),
    Case(
        "a run directory too long for the datapath's socket",
        1,
        r"cannot start a datapath process at /run/udptun/x{82}/datapath-[0-9a-f]{8}\.sock: AF_UNIX path too long",
        argv=(f"--run-dir=/run/udptun/{'x' * 82}",),
    ),
    Case(
        "node id damaged",
        2,
        r"/var/lib/udptun/node-id holds 'me', not the 32 hexadecimal digits of a node id; restore it, or delete .*",
        write("/var/lib/udptun/node-id", "me\n"),
    ),
    Case(
        "tunnel port taken",
        1,
        r"cannot bind the tunnel's socket to 192\.168\.77\.11 UDP port 8285: EADDRINUSE; `ss -ulpn` shows who has .*",
        listener("SOCK_DGRAM", 8285),
    ),
    Case(
        "no TUN",
        1,
        r"cannot attach to TUN device flannel0 through /dev/net/tun: ENOENT; /dev/net/tun is missing: run .*",
        shell("mount -t tmpfs none /dev/net"),
    ),
    Case(
        "flanneld's flannel0",
        1,
        r"cannot attach to TUN device flannel0 through /dev/net/tun: EINVAL; flannel0 is there already and is not "
        r"ours \(it is a TUN device with other flags, such as a single queue\); stop flanneld .*",
        shell("ip tuntap add flannel0 mode tun"),
        stays=("flannel0",),
    ),
    Case(
        "a bridge called flannel0",
        1,
        r"cannot attach to TUN device flannel0 through /dev/net/tun: EINVAL; .* \(it is a bridge device\); .*",
        shell("ip link add flannel0 type bridge"),
        stays=("flannel0",),
    ),
    Case(
        "subnet.env cannot be written",
        1,
        r"cannot write /proc/none/subnet\.env: ENOENT; make room and let root write there, or choose .*",
        argv=("--subnet-file=/proc/none/subnet.env",),
    ),
    Case(
        "subnet.env's directory is a file",
        1,
        r"cannot write /run/udptun-lab/net-conf\.json/subnet\.env: ENOTDIR; .*",
        argv=(f"--subnet-file={NET_CONF}/subnet.env",),
    ),
    # the local store
    Case(
        "a database that is a text",
        2,
        r"cannot claim a subnet in /run/udptun-lab/leases\.db: file is not a database \(SQLITE_NOTADB\); stop .*",
        write(LEASES, "not a database\n" * 100),
    ),
    Case(
        "another program's database",
        2,
        r"cannot open the lease store /run/udptun-lab/leases\.db: it is the SQLite database of another program .*",
        database("pragma application_id = 7", "create table t (x)"),
    ),
    Case(
        "a newer database",
        2,
        r"cannot open the lease store /run/udptun-lab/leases\.db: it has schema 9, not 1; run the udptun that .*",
        used_database("pragma user_version = 9"),
    ),
    Case(
        "a database without its tables",
        2,
        r"cannot claim a subnet in /run/udptun-lab/leases\.db: the schema lacks events.*; stop the daemons .*",
        used_database("drop table events"),
    ),
    Case(
        "a truncated database",
        2,
        r"cannot claim a subnet in /run/udptun-lab/leases\.db: .+ \(SQLITE_[A-Z_]+\); stop the daemons .*",
        truncated_database,
    ),
    Case(
        "a directory for a database",
        2,
        r"cannot open the lease store /run: it is not a regular file; name a file in --store local:PATH",
        argv=("--store=local:/run",),
    ),
    Case(
        "no directory for the database",
        2,
        r"cannot open the lease store /run/none/leases\.db: there is no directory /run/none; create it",
        argv=("--store=local:/run/none/leases.db",),
    ),
    Case(
        "no free subnet",
        1,
        r"out of subnets: 1 leases take all 1 subnets between 10\.244\.5\.0 and 10\.244\.5\.0 \(/24\); release .*",
        used_database(FOREIGN_LEASE),
        conf={"Network": "10.244.0.0/16", "SubnetMin": "10.244.5.0", "SubnetMax": "10.244.5.0"},
        stays=("10.244.5.0-24",),
    ),
    # the leases file
    Case(
        "no leases file",
        2,
        r"there is no leases file /run/none\.json; write a starter with: udptun lease init /run/none\.json",
        argv=("--store=file:/run/none.json",),
    ),
    Case(
        "a leases file that is no JSON",
        2,
        r"cannot use the leases file /run/leases\.json: line 1 column 2: .+",
        write("/run/leases.json", "[,]"),
        FILE,
    ),
    Case(
        "a leases file that is no list",
        2,
        r"cannot use the leases file /run/leases\.json: not a JSON list; write .*",
        write("/run/leases.json", "{}"),
        FILE,
    ),
    Case(
        "a leases file without us",
        2,
        r'/run/leases\.json has no usable entry with PublicIP 192\.168\.77\.11: add one with "PublicIP": .*',
        leases({"Subnet": "10.244.2.0/24", "PublicIP": "192.168.77.12"}),
        FILE,
    ),
    Case(
        "a leases file whose entry of ours is bad",
        2,
        r"/run/leases\.json has no usable entry with PublicIP 192\.168\.77\.11 "
        r"\(entry 1: unknown key 'Prot'; known are Subnet, PublicIP, IPv6Subnet, PublicIPv6, Port, Node\): add one .*",
        leases({**MINE, "Prot": 8285}),
        FILE,
    ),
    Case(
        "a leases file without the node named",
        2,
        r"/run/leases\.json has no usable entry with Node 'alpha': add one with \"Node\": \"alpha\" for this host",
        leases(MINE),
        (*FILE, "--node=alpha"),
    ),
    Case(
        "a leases file with us twice",
        2,
        r"/run/leases\.json entries 1, 2 all have PublicIP 192\.168\.77\.11 and Port 8285: which is this host's\? .*",
        leases(MINE, {**MINE, "Subnet": "10.244.2.0/24"}),
        FILE,
    ),
    Case(
        "a leases file with another port for us",
        2,
        r"/run/leases\.json entry 1 says Port 9000 for 192\.168\.77\.11 and this daemon listens on 8285: .*",
        leases({**MINE, "Port": 9000}),
        FILE,
    ),
    Case(
        "a leases file with our subnet outside Network",
        2,
        r"our lease in file:/run/leases\.json cannot be used: subnet 10\.9\.1\.0/24 is outside Network 10\.244\..*",
        leases({**MINE, "Subnet": "10.9.1.0/24"}),
        FILE,
    ),
    Case(
        "a leases file with too small a subnet for us",
        2,
        r"our lease in file:/run/leases\.json cannot be used: prefix length 31 is outside 16\.\.30",
        leases({**MINE, "Subnet": "10.244.1.0/31"}),
        FILE,
    ),
    Case(
        "a leases file with too large a subnet for us",
        2,
        r"our lease in file:/run/leases\.json cannot be used: prefix length 14 is outside 16\.\.30",
        leases({**MINE, "Subnet": "10.4.0.0/14"}),
        FILE,
        {"Network": "10.0.0.0/8"},
    ),
]


@pytest.mark.netns
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_a_start_that_fails_has_one_line_its_status_and_leaves_nothing_behind(
    host: Host, figure: Callable[..., None], case: Case
) -> None:
    prepared = case.prepare(host)
    began_s = time.monotonic()
    try:
        status, lines = start(host, case.argv, case.conf or CONF)
        figure("the start has failed after", time.monotonic() - began_s, "s")
    finally:
        if isinstance(prepared, subprocess.Popen):
            prepared.kill()
            prepared.communicate()
        host.run(["ip", "route", "replace", "default", "via", "192.168.77.1"])
    assert len(lines) == 1, lines
    assert re.fullmatch(case.line, lines[0]), lines[0]
    assert status == case.status
    assert left_behind(host) == list(case.stays)


@pytest.mark.netns
def test_directories_are_the_daemons_alone_whatever_the_umask(host: Host) -> None:
    """With a umask of 0 everybody could replace the run directory; a state directory of others costs a warning."""
    host.path(NET_CONF).write_text(json.dumps(CONF))
    argv = ["--run-dir=/run/a/b/run", "--state-dir=/run/a/state", f"--store=local:{LEASES}"]
    daemon = [*UDPTUN, "daemon", "--net-config-path", str(NET_CONF), *argv]
    before = len(host.daemon_log())
    for warnings in (
        [],
        [
            "what the next start finds in --state-dir may be a stranger's: others may write to /run/a/state "
            "(mode 0757); `chmod go-w /run/a/state`, or give another directory"
        ],
    ):
        host.start_daemon(command=["sh", "-c", 'umask 0; exec "$@"', "sh", *daemon])
        host.wait_ready()
        try:
            said = [line for line in host.daemon_log()[before:].splitlines() if "--state-dir" in line]
            assert [line.split(": ", 1)[1] for line in said] == warnings
            assert [oct(host.path(f"/run/{it}").stat().st_mode & 0o777) for it in ("a", "a/b", "a/b/run")] == [
                "0o755",
                "0o755",
                "0o700",
            ]
            assert host.stop_daemon() == 0
        finally:
            host.run([*UDPTUN, "cleanup", "--release", *argv])
        host.path("/run/a/state").mkdir(exist_ok=True)
        host.path("/run/a/state").chmod(0o757)


@pytest.mark.netns
@pytest.mark.parametrize("trouble", ["no room", "locked"])
def test_a_start_waits_for_a_store_that_does_not_answer_and_leaves_nothing_behind_when_told_to_end(
    host: Host, trouble: str
) -> None:
    host.path(NET_CONF).write_text(json.dumps(CONF))
    if trouble == "no room":
        shell("mkdir /run/small; mount -t tmpfs -o size=8k none /run/small")(host)
        said = r"cannot claim a subnet in /run/small/leases\.db: .* \(SQLITE_(FULL|IOERR_SHMSIZE)\); make room on its"
    else:
        used_database()(host)
        holder = lock_database(host, "immediate")
        said = r"local:/run/udptun-lab/leases\.db has not answered within 2 s"
    argv = [f"--store=local:{'/run/small/leases.db' if trouble == 'no room' else LEASES}"]
    before = len(host.daemon_log())

    def waits() -> list[str]:
        lines = [line for line in host.daemon_log()[before:].splitlines() if "no lease, waiting for it" in line]
        assert len(lines) <= 1
        return lines

    for ends in (True, False):
        before = len(host.daemon_log())
        host.start_daemon(argv)
        wait_until("the daemon to say that it waits", lambda: bool(waits()), 10)
        assert re.search(said, waits()[0]), waits()
        if ends:
            assert host.stop_daemon() == 0
            assert left_behind(host, Path("/run/none")) == []
    if trouble == "no room":
        host.run(["mount", "-o", "remount,size=10M", "/run/small"])
    else:
        holder.kill()
        holder.communicate()
    host.wait_ready()
    assert host.stop_daemon() == 0
    host.run([*UDPTUN, "cleanup", *argv])


@pytest.mark.netns
@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("", "previous subnet ignored: /run/flannel/subnet.env: no FLANNEL_SUBNET or FLANNEL_IPV6_SUBNET in it"),
        (
            "FLANNEL_SUBNET=10.244.1.1/24,10.244.2.1/24\n",
            "previous subnet ignored: /run/flannel/subnet.env: FLANNEL_SUBNET: 2 subnets where one is expected",
        ),
        (
            "FLANNEL_SUBNET=fd00::1/64\n",
            "previous subnet ignored: /run/flannel/subnet.env: FLANNEL_SUBNET: 'fd00::1/64' is not a subnet",
        ),
    ],
)
def test_a_bad_subnet_env_costs_one_line_and_the_daemon_starts(host: Host, text: str, warning: str) -> None:
    host.path("/run/flannel").mkdir()
    host.path(SUBNET_ENV).write_text(text)
    host.path(NET_CONF).write_text(json.dumps(CONF))
    before = len(host.daemon_log())
    host.start_daemon()
    host.wait_ready()
    try:
        assert host.stop_daemon() == 0
        lines = [line for line in host.daemon_log()[before:].splitlines() if line.split(" ", 3)[2] in "WE"]
        assert [line.split(": ", 1)[1] for line in lines] == [warning]
    finally:
        host.run([*UDPTUN, "cleanup", "--release", "--store", f"local:{LEASES}"])
