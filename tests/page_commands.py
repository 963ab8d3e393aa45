"""The commands that README.md, CONTRIBUTING.md and the pages below docs/ and bench/ show, as a reader would copy them.

A command stands in an indented block, alone on its line: behind a prompt (`$ `, `# `), or beginning with a program of
PROGRAMS or with a path.  Lines below it, up to the next one, are what the page says that it prints.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

PROGRAMS = {
    *("apt-get", "cat", "cp", "ctr", "curl", "echo", "etcdctl", "helm", "ip", "iptables", "kubectl", "ls", "mkdir"),
    *("modprobe", "nft", "ping", "pip", "podman", "printf", "promtool", "python", "python3", "source", "sysctl"),
    *("ln", "systemctl", "tshark", "udptun", "flanneld", "udptun-cni"),
}

NO_PROGRAMS = {"host"}
"""Words that begin lines of diagrams and output, and are programs on some machines."""

_ASSIGNMENT = re.compile(r"[A-Z][A-Z_]*=('[^']*'|\S*)")
_UNIT = re.compile(r"Exec\w+=")
"""A line of a systemd unit that has a command."""


@dataclass(frozen=True, slots=True)
class Command:
    """`text` is one line without prompt and comment.  `page` is relative to the repository."""

    page: str
    text: str
    shown: tuple[str, ...]
    has_prompt: bool


def pages() -> list[Path]:
    """Those for people; decisions, results and the changelog tell of the past."""
    return [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
        ROOT / "bench/README.md",
    ]


def blocks(page: Path) -> Iterator[list[str]]:
    """The lines of each indented block, without the indent; empty lines between two lines of it belong to it."""
    block: list[str] = []
    is_before_empty = True
    for line in [*page.read_text().splitlines(), "the end"]:
        if line.startswith("    ") and (block or is_before_empty):
            block.append(line)
        elif block and line:
            margin = min(len(it) - len(it.lstrip()) for it in block)
            yield [it[margin:] for it in block]
            block = []
        is_before_empty = not line
    assert not block


def is_command(line: str) -> bool:
    words = _words(line)
    if not words or line.startswith(" ") or re.match(r"\S+ {2,}(?!#)", line):
        return False
    return line.startswith(("$ ", "# ")) or words[0] in PROGRAMS or bool(re.match(r"\.{0,2}/\w|\.venv/|/", words[0]))


def _words(line: str) -> list[str]:
    """The program's name and what follows it, without prompt and variables."""
    words = _UNIT.sub("", re.sub(r"^[$#] ", "", line), count=1).split()
    while len(words) > 1 and _ASSIGNMENT.fullmatch(words[0]):
        words.pop(0)
    return words


def commands(page: Path) -> list[Command]:
    """In their order.  A line that only sets a variable belongs to the command below it."""
    return [command for block in blocks(page) for command in _commands_of(block, str(page.relative_to(ROOT)))]


def _commands_of(block: list[str], page: str) -> Iterator[Command]:
    parts: list[tuple[str, list[str]]] = []
    """The first line of each command, and all lines below it up to the next one."""
    for line in block:
        if is_command(line) or _ASSIGNMENT.fullmatch(line):
            parts.append((line, []))
        elif parts:
            parts[-1][1].append(line)
    setting = ""
    for first, below in parts:
        text = re.sub(r"^[$#] |\s+# .*$", "", first)
        while text.endswith("\\"):
            text = f"{text[:-1].rstrip()} {below.pop(0).strip()}"
        if _ASSIGNMENT.fullmatch(first):
            setting = f"{first}; "
        else:
            yield Command(page, setting + text, tuple(below), first.startswith(("$ ", "# ")))
            setting = ""


def all_commands() -> list[Command]:
    return [command for page in pages() for command in commands(page)]


def programs_missed(page: Path) -> list[str]:
    """Lines that are no commands to this module, and begin with a program of this machine."""
    return [
        f"{page.name}: {line}"
        for block in blocks(page)
        for line in block
        if (words := _words(line)) and not is_command(line) and not re.match(r"\S+ {2,}", line)
        if re.fullmatch(r"[a-z][\w.-]*", words[0]) and words[0] not in NO_PROGRAMS | PROGRAMS and shutil.which(words[0])
    ]


@dataclass(frozen=True, slots=True)
class Example:
    """How tests/netns/test_page_commands.py runs a command on a host of a lab.

    `real` says what stands there for words of the page, such as {peer}, the address of the other host's pod.  `before`
    prepares the host, and `after` undoes it.  The command and `then`, which looks at what has become of it, print
    `prints`, a regular expression; or what the page shows, where it `is_shown`.  A look at a host that has just been
    changed `settles` after a moment.
    """

    prints: str = ""
    real: tuple[tuple[str, str], ...] = ()
    before: str = ""
    then: str = ":"
    after: str = ""
    status: int = 0
    is_shown: bool = False
    settles: bool = False


_NETWORK = '{"Network": "10.244.0.0/16", "Backend": '
_CONF = _NETWORK + '{"Type": "udp"}}'
_TRACE = Example(real=(("10.244.1.2", "{own}"), ("10.244.2.2", "{peer}")), is_shown=True, settles=True)

RUN: Mapping[str, Mapping[str, Example]] = {
    "docs/cni.md": {
        "udptun cni install /opt/cni/bin --conflist 10-flannel.conflist": Example(
            r"installed|replaced",
            before="mkdir -p /opt/cni/bin /etc/cni/net.d && cp /usr/lib/cni/* /opt/cni/bin/",
            then="cat /etc/cni/net.d/10-flannel.conflist && CNI_COMMAND=VERSION /opt/cni/bin/flannel",
        ),
        "udptun cni gc [--unknown]": Example(r"^network cbr0: 0 freed, 0 containers and 0 addresses stay$"),
    },
    "docs/configuration.md": {
        f"""echo '{_NETWORK}{{"Type": "udp", "VNI": 2}}}}' | udptun config check -""": Example(status=1, is_shown=True),
        "source <(udptun completion bash)": Example(r"^complete .* udptun$", then="complete -p udptun flanneld"),
    },
    "docs/doctor.md": {
        "udptun doctor": Example(
            before="sysctl -qw net.ipv4.ip_forward=0",
            after="sysctl -qw net.ipv4.ip_forward=1",
            status=2,
            is_shown=True,
            settles=True,
        )
    },
    "docs/metrics.md": {
        "curl -s --unix-socket /run/udptun/udptun.sock http://udptun/metrics": Example(r"^udptun_ready 1(\.0)?$")
    },
    "docs/operations.md": {
        "udptun lease list [--json]": Example(r"^{subnet} +192\.168\.77\.11 "),
        "udptun lease show 10.244.3.0/24 [--json]": Example(
            r"^public IP +192\.168\.77\.11$", real=(("10.244.3.0/24", "{subnet}"),)
        ),
        "udptun lease reserve 10.244.7.0/24 --public-ip 192.0.2.7": Example(
            r"^reserved 10\.244\.207\.0/24 for 192\.0\.2\.7 in .*; it does not expire, and takes effect ",
            real=(("10.244.7.0", "10.244.207.0"),),
        ),
        "udptun lease release 10.244.7.0/24": Example(
            r"^released the reservation 10\.244\.207\.0/24 ", real=(("10.244.7.0", "10.244.207.0"),)
        ),
        "cp deploy/systemd/udptun.service /etc/systemd/system/": Example(
            before="mkdir -p /etc/systemd/system",
            then="cmp deploy/systemd/udptun.service /etc/systemd/system/udptun.service",
        ),
        # What else is in these directories is not the network's, so it would be set in the whole machine.
        "cp deploy/systemd/90-udptun.conf /etc/sysctl.d/ && sysctl --system": Example(
            r"^net\.ipv4\.ip_forward = 1$",
            before="for it in /etc/sysctl.d /run/sysctl.d /usr/lib/sysctl.d /usr/local/lib/sysctl.d; do "
            "[ ! -d $it ] || mount -t tmpfs none $it; done; mkdir -p /etc/sysctl.d; rm -f /etc/sysctl.conf; "
            "sysctl -qw net.ipv4.ip_forward=0",
            then="sysctl net.ipv4.ip_forward",
        ),
        "echo FLANNELD_STORE=file:/etc/udptun-leases.json >/etc/default/udptun": Example(
            r"^ +--store +file:/etc/udptun-leases\.json +FLANNELD_STORE in ",
            then="env -u FLANNELD_STORE udptun config show --env-file /etc/default/udptun",
        ),
        "ExecStartPost=/opt/udptun/bin/mk-docker-opts.sh -k DOCKER_NETWORK_OPTIONS -d /run/flannel/docker": Example(
            r'^DOCKER_NETWORK_OPTIONS=" --bip={gateway} --ip-masq=\w+ --mtu=1472"$',
            real=(("ExecStartPost=", ""),),
            then="cat /run/flannel/docker",
        ),
        "JUMP='FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD'; "
        'printf \'*filter\\n-D %s\\n-I %s\\nCOMMIT\\n\' "$JUMP" "$JUMP" | iptables-restore --noflush -w': Example(
            r"FLANNEL-FWD\n-A FORWARD -d 192\.0\.2\.0/24 -j REJECT",
            before="iptables -w -I FORWARD -d 192.0.2.0/24 -j REJECT",
            then="iptables -S FORWARD",
            after="iptables -w -D FORWARD -d 192.0.2.0/24 -j REJECT",
        ),
    },
    "docs/trace.md": {"udptun trace 10.244.1.2 10.244.2.2 tcp 443": _TRACE},
    "docs/troubleshooting.md": {
        "udptun doctor": Example(r"^\d+ checks, 1 peer asked: nothing wrong", settles=True),
        "udptun status": Example(r"\Audptun     all is well$", settles=True),
        "udptun trace 10.244.1.2 10.244.2.2 tcp 443": Example(
            r"^delivered: sent to the host of the destination", _TRACE.real, settles=True
        ),
        "udptun config check /etc/kube-flannel/net-conf.json": Example(
            r"^/etc/kube-flannel/net-conf\.json: good: 10\.244\.0\.0/16 "
        ),
        "udptun status --backends": Example(r"^udp +"),
    },
}
"""Page -> command -> how it is run there, in this order."""


_TO_PEER = (("ADDRESS", "{peer}"), ("SRC", "{own}"), ("DST", "{peer}"))

IN_SENTENCES: Mapping[str, Mapping[str, Example]] = {
    "docs/doctor.md": {"sysctl -w net.ipv4.ip_forward=1": Example(r"^net\.ipv4\.ip_forward = 1$")},
    "docs/operations.md": {
        "ip route show proto 158": Example(r"^10\.244\.0\.0/16 dev flannel0 "),
        "ip -d link show flannel0": Example(r" numqueues \d+ "),
        "ss -ulpn": Example(r":8285 "),
        "sysctl -w net.ipv4.ping_group_range='0 2147483647'": Example("2147483647"),
        "udptun status | cat": Example(r"^BY$|  BY\b"),
    },
    "docs/reliability.md": {"ip -s link show flannel0": Example(r"^    TX: +bytes")},
    "docs/status.md": {
        "udptun status | grep 10.244.3.": Example(
            r"^{peers_subnet} +192\.168\.77\.12:8285 ", real=(("10.244.3.", "{peers_subnet}"),)
        ),
    },
    "docs/troubleshooting.md": {
        "ping -M do -s 1444 ADDRESS": Example(r"^1452 bytes from ", real=(*_TO_PEER, ("ping ", "ping -c 1 "))),
        "udptun trace --size 1472 --df SRC DST": Example("^delivered: sent", real=_TO_PEER),
        "udptun trace SRC DST udp 53": Example("^delivered: sent", real=_TO_PEER),
        "udptun status --peer ADDRESS": Example(r"^peer +{peers_subnet}$", real=_TO_PEER),
        "udptun health --ready": Example(),
        "sysctl -w net.ipv6.conf.all.forwarding=1": Example(r"forwarding = 1$"),
    },
}
"""The same for code in sentences, as far as it is a command that looks, or sets what a host of the lab has anyway."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A command that cannot be run as it stands, and the tests of what it does: files below tests/ and functions."""

    why: str
    tests: tuple[str, ...]


_README = "netns/test_readme.py::"
_BY_HAND = Elsewhere("that test reads the page", (f"{_README}test_two_hosts_of_the_readme_connect_by_hand",))
_LAB = Elsewhere("that test reads the page", (f"{_README}test_lab_of_the_readme_comes_up_answers_and_goes",))
_INSTALLS = "it installs Debian packages, and Python packages from a server"
_WHEEL = ("unit/test_packaging.py::test_commands_of_the_wheel_say_the_version",)
_PIP = Elsewhere(_INSTALLS, (*_WHEEL, "unit/test_packaging.py::test_sdist_builds_and_passes_the_unit_tests_on"))
_TESTS = Elsewhere("it is what runs the tests", ("lint/test_lint.py::test_source_passes_lint_and_type_checks",))
_DEMO = Elsewhere(
    _INSTALLS, ("netns/test_demo.py::test_demo_shows_leases_routes_pings_and_the_table_and_leaves_nothing",)
)
_ETCD = (
    f"{_README}test_etcd_commands_of_the_readme_are_those_that_the_etcd_tests_run",
    "netns/test_etcd_hosts.py::test_keys_and_values_in_etcd_are_flannels_and_pods_reach_each_other",
)
_KUBE = ("netns/test_kube_hosts.py::test_pods_of_three_nodes_reach_each_other_and_the_nodes_say_what_flannels_do",)
_MANIFESTS = Elsewhere(
    "it needs a cluster; with --full it is run on a real API server",
    ("netns/test_page_commands.py::test_kubectl_does_on_a_real_api_server_what_the_page_says",),
)
_NETWORKS = Elsewhere(
    "the page leaves out flags that the network needs",
    ("netns/test_networks.py::test_all_networks_carry_packets_each_its_own_way",),
)
_IMAGE = ("netns/test_image.py::test_archive_is_one_layer_of_root_s_files_with_the_entry_point_of_flannels_image",)

_LIVE = Elsewhere(
    "packets have to come while it runs",
    (
        "netns/test_trace_hosts.py::test_echoes_of_pods_are_shown_as_they_come",
        "netns/test_trace_hosts.py::test_only_drops_are_shown_when_asked_for",
    ),
)

ELSEWHERE: Mapping[str, Mapping[str, Elsewhere]] = {
    "bench/README.md": {
        "./dev bench --family 4,6 --paths udptun,vtep,vxlan,host-gw --json FILE.json": Elsewhere(
            "it takes an hour",
            (
                "netns/test_demo.py::test_bench_of_all_that_we_ship_writes_every_run_and_a_report",
                "unit/test_bench.py::test_family_chooses_the_paths_that_have_ipv6",
            ),
        )
    },
    "README.md": {
        "./dev demo": _DEMO,
        ".venv/bin/udptun lab up --hosts 3 --pods 2": _LAB,
        ".venv/bin/udptun lab status": _LAB,
        ".venv/bin/udptun lab exec h1/p1 -- ping -c 3 10.244.7.2": _LAB,
        ".venv/bin/udptun lab exec h1 -- $PWD/.venv/bin/udptun status": _LAB,
        ".venv/bin/udptun lab down": _LAB,
        "apt-get install gcc python3-dev python3-venv iptables": _PIP,
        "python3 -m venv /opt/udptun && /opt/udptun/bin/pip install .": _PIP,
        "ln -s /opt/udptun/bin/udptun /usr/local/bin/": _BY_HAND,
        "mkdir -p /etc/kube-flannel": _BY_HAND,
        f"echo '{_CONF}' >/etc/kube-flannel/net-conf.json": _BY_HAND,
        "udptun lease init /etc/udptun-leases.json": _BY_HAND,
        "sysctl -w net.ipv4.ip_forward=1": _BY_HAND,
        "udptun daemon --store file:/etc/udptun-leases.json": _BY_HAND,
        "ping -c 3 10.244.2.0": _BY_HAND,
        "udptun doctor": _BY_HAND,
        "udptun status": _BY_HAND,
        "/opt/udptun/bin/pip install '.[etcd]'": _PIP,
        f"etcdctl put /coreos.com/network/config '{_CONF}'": Elsewhere("the etcd is the tests'", _ETCD),
        "/opt/udptun/bin/flanneld --etcd-endpoints https://10.0.0.1:2379,https://10.0.0.2:2379 "
        "--etcd-cafile /etc/etcd/ca.pem": Elsewhere("the etcd is the tests'", _ETCD),
        "/opt/udptun/bin/pip install '.[kube]'": _PIP,
        "NODE_NAME=node-1 /opt/udptun/bin/flanneld --kube-subnet-mgr --kubeconfig-file "
        "/etc/kubernetes/flannel.conf": Elsewhere("the API server is the tests'", _KUBE),
    },
    "docs/trace.md": {
        "udptun trace 10.244.1.2 any tcp 443 --live 3": _LIVE,
        "udptun trace 10.244.1.2 any --drops --live 100 --write drops.pcapng": _LIVE,
        "tshark -r drops.pcapng -T fields -e frame.comment": _LIVE,
    },
    "CONTRIBUTING.md": {
        "./dev test": _TESTS,
        "./dev test tests/unit": _TESTS,
        "./dev test --full": _TESTS,
        "./dev test --shortcut": _TESTS,
        "./dev test tests/netns/test_etcd_hosts.py --flanneld PATH": Elsewhere(
            "flanneld's program is not the tests'",
            ("netns/test_etcd_hosts.py::test_pods_of_flannel_and_of_udptun_reach_each_other",),
        ),
        "./dev lint": _TESTS,
        "./dev bytecode": Elsewhere(
            "it would write into the source",
            ("unit/test_shortcut_parts.py::test_the_bytecode_is_made_of_the_source_beside_it",),
        ),
        "./dev demo": _DEMO,
        ".venv/bin/python -m tests.fuzz --minutes 10": Elsewhere(
            "it takes ten minutes of each target",
            ("fuzz/test_fuzz.py::test_random_flows_find_nothing_with_address_sanitizer",),
        ),
        ".venv/bin/python -m tests.fuzz --target lease --minutes 10": Elsewhere(
            "it takes ten minutes", ("fuzz/test_fuzz.py::test_inputs_that_coverage_leads_to_find_nothing",)
        ),
    },
    "docs/guide.md": {
        "apt-get install podman containernetworking-plugins busybox-static": Elsewhere(
            _INSTALLS, ("netns/test_guide.py::test_containers_of_one_host_are_wired_as_flannels_configuration_says",)
        )
    },
    "docs/image.md": {
        "./dev image OUT": Elsewhere("it installs what is missing; the build is in the test", _IMAGE),
        "./dev image OUT --arch arm64": Elsewhere(
            "the same", ("netns/test_image.py::test_image_for_arm64_has_programs_that_run_there",)
        ),
        "ctr -n k8s.io images import udptun-0.1.0-amd64.tar": Elsewhere(
            "the store of images is the machine's",
            ("netns/test_cni_runtimes.py::test_containerd_makes_and_removes_pods_four_at_a_time",),
        ),
    },
    "docs/kubernetes.md": {
        "kubectl create namespace kube-flannel": _MANIFESTS,
        "kubectl label namespace kube-flannel pod-security.kubernetes.io/enforce=privileged": _MANIFESTS,
        "helm install udptun deploy/chart --namespace kube-flannel --set createNamespace=false "
        "--set podCidr=10.244.0.0/16": Elsewhere(
            "Debian has no Helm",
            ("unit/test_documented_commands.py::test_values_of_the_helm_command_make_the_chart_that_the_page_says",),
        ),
        "kubectl -n kube-flannel delete daemonset kube-flannel-ds": _MANIFESTS,
        "kubectl apply -f deploy/kube-flannel.yml": _MANIFESTS,
        "kubectl -n kube-flannel rollout status daemonset/kube-flannel-ds": _MANIFESTS,
        "kubectl -n kube-flannel edit configmap kube-flannel-cfg": _MANIFESTS,
        "kubectl -n kube-flannel patch daemonset kube-flannel-ds "
        """-p '{"spec": {"updateStrategy": {"rollingUpdate": {"maxSurge": "100%"}}}}'""": _MANIFESTS,
        "kubectl -n kube-flannel rollout restart daemonset/kube-flannel-ds": _MANIFESTS,
        "kubectl delete -f deploy/kube-flannel.yml": _MANIFESTS,
        "kubectl apply -f deploy/cleanup.yml": _MANIFESTS,
        "kubectl -n kube-flannel rollout status daemonset/udptun-cleanup": _MANIFESTS,
        "kubectl delete -f deploy/cleanup.yml": _MANIFESTS,
        "NODE_NAME=node-1 udptun daemon --kube-subnet-mgr --kubeconfig-file /etc/kubernetes/flannel.conf": Elsewhere(
            "the API server is the tests'", _KUBE
        ),
    },
    "docs/mesh.md": {
        "udptun mesh": Elsewhere(
            "it needs three hosts, and what is between two of them broken",
            ("netns/test_mesh_hosts.py::test_a_host_that_is_cut_off_one_way_is_named_with_the_direction",),
        ),
        "udptun daemon … --mesh-port=8286": Elsewhere(
            "the page leaves out the other flags",
            ("netns/test_mesh_hosts.py::test_all_ways_are_alive_and_a_host_without_a_port_is_seen_from_the_others_side",),
        ),
    },
    "docs/operations.md": {
        "etcdctl role grant-permission flannel --prefix=true readwrite /coreos.com/network": Elsewhere(
            "the etcd is the tests'",
            ("stores/test_etcd.py::test_a_prefix_that_the_user_may_not_touch_is_named",),
        ),
        "udptun daemon --iface eth0 --public-ip 203.0.113.5 --port 8286 …": Elsewhere(
            "it needs a NAT",
            ("netns/test_shared_address.py::test_hosts_behind_one_address_reach_each_other_and_those_outside",),
        ),
        "systemctl daemon-reload && systemctl enable --now udptun": Elsewhere(
            "it needs a systemd of its own",
            ("netns/test_systemd.py::test_the_page_enables_and_starts_the_unit",),
        ),
        "udptun daemon --etcd-prefix /red …": _NETWORKS,
        "udptun daemon --etcd-prefix /blue --run-dir /run/udptun-blue --state-dir /var/lib/udptun-blue "
        "--subnet-file /run/flannel/blue.env …": _NETWORKS,
    },
    "docs/reliability.md": {"./dev test --full": _TESTS},
}
"""Page -> command.  What stands behind a prompt in docs/guide.md, tests/netns/test_guide.py reads and runs."""
