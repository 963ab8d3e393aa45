"""deploy/: Kubernetes takes the manifests, and they fit our code, each other, and what docs/kubernetes.md says."""

from __future__ import annotations

import copy
import functools
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from deploy import render
from tests import flannel_manifest
from udptun.backends.choice import parse_net_conf
from udptun.cni import install
from udptun.commands import cni, health
from udptun.config import command_flags, flags
from udptun.config.flags import Options
from udptun.config.store_flags import StoreKind
from udptun.core.errors import UdptunError

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
Object = dict[str, Any]

VALUES: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "cleanup": {"cleanup": True},
    "cleanup-elsewhere": {"cleanup": True, "flannel": {"tolerations": [], "nodeSelector": {"a": "b"}}},
    "no-namespace": {"createNamespace": False},
    "image": {
        "flannel": {"image": {"repository": "registry.example/udptun", "tag": "1"}},
        "global": {"imagePullSecrets": [{"name": "secret"}]},
    },
    "nodes": {"flannel": {"nodeSelector": {"a": "b"}, "tolerations": [{"effect": "NoSchedule", "operator": "Exists"}]}},
    "directories": {"flannel": {"cniBinDir": "/usr/libexec/cni", "cniConfDir": "/etc/rancher/cni"}},
    "skip-conf": {"flannel": {"skipCNIConfigInstallation": True}},
    "no-port": {"flannel": {"healthz": {"port": 0}}},
    "flannels-probes": {
        "flannel": {
            "healthz": {
                "port": 8081,
                "livenessProbe": {"initialDelaySeconds": 10, "periodSeconds": 30},
                "readinessProbe": {"initialDelaySeconds": 5, "periodSeconds": 10},
            }
        }
    },
    "args": {"flannel": {"args": ["--kube-subnet-mgr", "--iface=eth1", "--v=1"], "resources": None}},
    "vxlan": {
        "flannel": {
            "backendPort": 4789,
            "vni": 16777215,
            "mtu": 1400,
            "GBP": True,
            "directRouting": True,
            "enableNFTables": True,
        }
    },
    "udp": {"flannel": {"backend": "udp", "backendPort": 8286, "vni": 3, "directRouting": True}},
    "udp-plain": {"flannel": {"backend": "udp"}},
    "host-gw": {"flannel": {"backend": "host-gw", "backendPort": 1}},
    "alloc": {"flannel": {"backend": "alloc"}},
    "ipv6-too": {"podCidrv6": "fd00:244::/48"},
}
"""Every value of the chart, in some rendering."""

NAMES = ("kube-flannel.yml", "cleanup.yml", *VALUES)


@functools.cache
def loaded(name: str) -> list[Object]:
    text = (DEPLOY / name).read_text() if name.endswith(".yml") else render.render(VALUES[name])
    return [found for found in yaml.safe_load_all(text) if found is not None]


def objects(name: str) -> list[Object]:
    """Those of a file in deploy/, or of a rendering."""
    return copy.deepcopy(loaded(name))


def the(kind: str, name: str = "default") -> Object:
    (found,) = (it for it in objects(name) if it["kind"] == kind)
    return found


def pod_spec(name: str) -> Object:
    return the("DaemonSet", name)["spec"]["template"]["spec"]


def containers(name: str) -> list[Object]:
    return [*pod_spec(name)["initContainers"], *pod_spec(name)["containers"]]


def section_of_page(heading: str) -> str:
    """What follows the heading in docs/kubernetes.md, up to the next one."""
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    assert f"\n{heading}\n" in page
    return re.split(r"\n#+ ", page.partition(f"\n{heading}\n")[2])[0]


every_rendering = pytest.mark.parametrize("name", NAMES)


# ----------------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("name", render.FILES)
def test_file_is_what_the_chart_renders(name: str) -> None:
    assert (DEPLOY / name).read_text() == render.written(name), "run deploy/render.py"


def test_version_of_chart_and_image_is_that_of_the_project() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((DEPLOY / "chart" / "Chart.yaml").read_text())
    values = yaml.safe_load((DEPLOY / "chart" / "values.yaml").read_text())
    assert (chart["version"], chart["appVersion"], values["flannel"]["image"]["tag"]) == (version,) * 3


def paths_of(values: Mapping[str, Any], at: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield from paths_of(value, f"{at}{name}.") if isinstance(value, dict) and value else (at + name,)


def test_every_value_of_the_chart_is_used_and_on_the_page() -> None:
    values = set(paths_of(yaml.safe_load((DEPLOY / "chart" / "values.yaml").read_text())))
    templates = "".join(it.read_text() for it in (DEPLOY / "chart" / "templates").iterdir())
    used = {it.removeprefix(".Values.") for it in re.findall(r"\.Values(?:\.\w+)+", templates)}
    assert {it for it in values if not any(f"{it}.".startswith(f"{path}.") for path in used)} == set()
    assert {it for it in used if not any(f"{path}.".startswith(f"{it}.") for path in values)} == set()
    named = set(re.findall(r"`([\w.]+)`", section_of_page("### The chart")))
    assert {
        it for it in used if not {it, it.split(".")[1] if "." in it else "", it.rpartition(".")[2]} & named
    } == set()


def test_script_prints_the_chart_with_values_of_a_file_or_one_line(tmp_path: Path) -> None:
    def run(values: Mapping[str, Any]) -> subprocess.CompletedProcess[str]:
        (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
        argv = [sys.executable, str(DEPLOY / "render.py"), str(tmp_path / "values.yaml")]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60)

    assert run(VALUES["udp"]).stdout == render.render(VALUES["udp"])
    for wrong in ({"flannel": {"backend": "udb"}}, {"flannel": {"backendPort": "x"}}):
        assert re.fullmatch(r"\S+/values.yaml: .*(backend must be|not known: int).*\n", run(wrong).stderr)


# ------------------------------------------------------------------------------------------------------ what is valid


@pytest.mark.parametrize("which", [0, -1], ids=["oldest", "newest"])
def test_kubernetes_takes_every_rendering(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the schemas of the oldest and the newest Kubernetes that there are some of."""
    schemas = functools.cache(kubernetes_validate.utils.schema_contents)
    monkeypatch.setattr(kubernetes_validate.utils, "schema_contents", schemas)
    version = kubernetes_validate.utils.all_versions()[which]
    different = {json.dumps(it, sort_keys=True): it for name in NAMES for it in objects(name)}
    assert len(different) > 20
    for found in different.values():
        kubernetes_validate.validate(found, version, strict=True)


def test_schemas_find_a_field_that_does_not_exist() -> None:
    wrong = the("DaemonSet")
    wrong["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


@every_rendering
def test_selector_finds_the_pods_and_no_others(name: str) -> None:
    spec = the("DaemonSet", name)["spec"]
    selected = spec["selector"]["matchLabels"]
    assert selected.items() <= spec["template"]["metadata"]["labels"].items()
    ours, cleanup = the("DaemonSet", "default"), the("DaemonSet", "cleanup")
    assert ours["spec"]["selector"] != cleanup["spec"]["selector"]
    assert ours["metadata"]["name"] != cleanup["metadata"]["name"]


@every_rendering
def test_old_and_new_pod_fit_on_a_node_and_the_old_one_goes_last(name: str) -> None:
    """Each port of a container is a port of the host under hostNetwork, and no two pods can have one."""
    assert pod_spec(name)["hostNetwork"] is True
    assert [it["name"] for it in containers(name) if "ports" in it] == []
    spec = the("DaemonSet", name)["spec"]
    if spec["template"]["spec"]["containers"][0]["name"] == "kube-flannel":
        # Kubernetes refuses a surge beside a number of unavailable pods other than 0.
        assert spec["updateStrategy"] == {
            "type": "RollingUpdate",
            "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
        }
        assert "--take-over" in containers(name)[-1]["args"]


@every_rendering
def test_volumes_are_those_that_are_mounted(name: str) -> None:
    mounted = [it for container in containers(name) for it in container.get("volumeMounts", ())]
    volumes = [it["name"] for it in pod_spec(name)["volumes"]]
    assert {it["name"] for it in mounted} == set(volumes)
    assert len(set(volumes)) == len(volumes)
    for container in containers(name):
        paths = [it["mountPath"] for it in container.get("volumeMounts", ())]
        assert len(set(paths)) == len(paths)


@every_rendering
def test_what_is_referred_to_is_there(name: str) -> None:
    found = objects(name)
    (namespace,) = {it["metadata"]["namespace"] for it in found if "namespace" in it["metadata"]}
    assert all(it["metadata"]["name"] == namespace for it in found if it["kind"] == "Namespace")
    there = {(it["kind"], it["metadata"]["name"]) for it in found}
    spec = pod_spec(name)
    if account := spec.get("serviceAccountName"):
        assert ("ServiceAccount", account) in there
    else:
        assert spec["automountServiceAccountToken"] is False
    for volume in spec["volumes"]:
        if "configMap" in volume:
            assert ("ConfigMap", volume["configMap"]["name"]) in there
    for binding in (it for it in found if it["kind"] == "ClusterRoleBinding"):
        assert ("ClusterRole", binding["roleRef"]["name"]) in there
        assert {(it["kind"], it["name"], it["namespace"]) for it in binding["subjects"]} == {
            ("ServiceAccount", "flannel", namespace)
        }


@every_rendering
def test_containers_have_the_least_rights(name: str) -> None:
    spec = pod_spec(name)
    assert spec["securityContext"] == {"seccompProfile": {"type": "RuntimeDefault"}}
    assert not {"hostPID", "hostIPC"} & spec.keys()
    added = {}
    for container in containers(name):
        context = container["securityContext"]
        capabilities = context.pop("capabilities")
        assert context == {"privileged": False, "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True}
        assert capabilities["drop"] == ["ALL"]
        added[container["name"]] = capabilities.get("add", [])
        assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"
    network = ["NET_ADMIN", "NET_RAW"]
    assert added in ({"install-cni": [], "kube-flannel": network}, {"cleanup": network, "done": []})


@every_rendering
def test_nothing_is_limited(name: str) -> None:
    assert [it["name"] for it in containers(name) if "limits" in it.get("resources", {})] == []


@every_rendering
def test_kubelet_waits_longer_for_a_probe_than_the_probe_for_the_daemon(name: str) -> None:
    probes = [it for container in containers(name) for key, it in container.items() if key.endswith("Probe")]
    assert len(probes) == (3 if containers(name)[-1]["name"] == "kube-flannel" else 0)
    for probe in probes:
        assert "httpGet" not in probe
        assert probe["timeoutSeconds"] > health._TIMEOUT_S


def test_old_pod_counts_as_ready_as_long_as_the_new_one_may_take_to_start() -> None:
    """Kubernetes deletes an old pod that is not ready at once, and with it the daemon in reserve."""
    daemon = containers("default")[-1]
    start, ready = (
        it["periodSeconds"] * it["failureThreshold"] for it in (daemon["startupProbe"], daemon["readinessProbe"])
    )
    assert ready >= start


def test_rights_are_those_of_the_page_less_that_to_read_pods() -> None:
    lines = section_of_page("## Rights").splitlines()
    rules = yaml.safe_load("\n".join(it for it in lines if it.startswith("    ")))["rules"]
    assert the("ClusterRole")["rules"] == [it for it in rules if it["resources"] != ["pods"]]


def test_change_of_the_config_makes_new_pods() -> None:
    def checksum(name: str) -> str:
        return the("DaemonSet", name)["spec"]["template"]["metadata"]["annotations"]["checksum/config"]

    assert checksum("default") == checksum("no-port") == checksum("kube-flannel.yml")
    assert checksum("default") != checksum("vxlan")
    assert len(checksum("default")) == 64


# ------------------------------------------------------------------------------------------------ what fits our code


def parsed(argv: list[str], environ: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What our parser of that command makes of it.  Raises UsageError, as it does."""
    program, command, *rest = argv
    assert program in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    match command:
        case "daemon":
            return flags.parse_daemon_flags(rest, environ)
        case "cleanup":
            return command_flags.parse_cleanup_flags(rest, environ)[0]
        case "cni":
            return cni._parser().parse_args(rest)
        case "health":
            asked: list[tuple[str, str]] = []
            with monkeypatch.context() as patch:
                patch.setattr(health, "_ask", lambda *where: asked.append(where))
                assert health.run(rest, environ) == 0
            return asked
    raise AssertionError(f"no such command: {argv}")


def words(container: Object) -> list[str]:
    return [*container["command"], *container.get("args", ())]


def environ_of(container: Object) -> dict[str, str]:
    return {it["name"]: "node-1" for it in container.get("env", ())}


@every_rendering
def test_every_command_and_path_is_one_that_our_code_knows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for container in containers(name):
        if container["name"] == "done":
            assert words(container) == ["sleep", "infinity"]
            continue
        given = parsed(words(container), environ_of(container), monkeypatch)
        paths = {it["mountPath"] for it in container["volumeMounts"]}
        if isinstance(given, Options):
            assert given.warnings == ()
            used = {str(it) for it in (given.run_dir, given.state_dir, given.subnet_file.parent)}
            if container["name"] == "kube-flannel":
                assert given.store.kind is StoreKind.KUBE
                assert given.kube.node_name == "node-1"
                used |= {str(given.net_config_path.parent), "/dev/net/tun"}
            assert paths == used | {"/run/xtables.lock"}
        else:
            files = [it for it in (given.conflist, given.to) if it is not None]
            assert paths == {given.directory, *(str(it.parent) for it in files)}
        for probe in (it for key, it in container.items() if key.endswith("Probe")):
            ((where, _),) = parsed(probe["exec"]["command"], environ_of(container), monkeypatch)
            assert where == "/run/udptun/udptun.sock"


def test_liveness_does_not_ask_for_readiness(monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = containers("default")[-1]
    asked = {
        key: parsed(daemon[key]["exec"]["command"], {}, monkeypatch)[0][1]
        for key in ("startupProbe", "livenessProbe", "readinessProbe")
    }
    assert asked == {"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}


def test_paths_of_the_host_are_those_of_the_container_but_for_the_directories_of_the_plugin() -> None:
    at = {it["name"]: it["mountPath"] for c in containers("directories") for it in c["volumeMounts"]}
    of_host = {it["name"]: it["hostPath"]["path"] for it in pod_spec("directories")["volumes"] if "hostPath" in it}
    different = {name: path for name, path in of_host.items() if at[name] != path}
    assert different == {"cni-plugin": "/usr/libexec/cni", "cni": "/etc/rancher/cni"}


def test_cleanup_has_the_directories_of_the_daemon() -> None:
    daemon = {it["name"]: it for it in pod_spec("default")["volumes"]}
    assert all(daemon[it["name"]] == it for it in pod_spec("cleanup")["volumes"])


@pytest.mark.parametrize("name", [it for it in NAMES if "cleanup" not in it])
def test_configuration_is_one_that_the_daemon_and_the_plugin_take(name: str) -> None:
    data = the("ConfigMap", name)["data"]
    assert list(install._plugins(json.loads(data["cni-conf.json"]))) == ["flannel", "bridge", "host-local", "portmap"]
    conf = parse_net_conf(data["net-conf.json"], name)
    assert not [it for it in conf.notes if "EnableIPv6" not in it]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("default", {"Type": "vxlan"}),
        (
            "vxlan",
            {"Port": 4789, "VNI": 16777215, "GBP": True, "DirectRouting": True, "MTU": 1400, "Type": "vxlan"},
        ),
        ("udp", {"Port": 8286, "Type": "udp"}),
        ("udp-plain", {"Type": "udp"}),
        ("host-gw", {"Type": "host-gw"}),
        ("alloc", {"Type": "alloc"}),
    ],
)
def test_backend_gets_its_own_keys_only(name: str, expected: Mapping[str, Any]) -> None:
    conf = json.loads(the("ConfigMap", name)["data"]["net-conf.json"])
    assert conf == {"Network": "10.244.0.0/16", "EnableNFTables": name == "vxlan", "Backend": expected}


def test_ipv6_alone_is_what_an_empty_pod_cidr_asks_for() -> None:
    found = list(yaml.safe_load_all(render.render({"podCidr": "", "podCidrv6": "fd00:244::/48"})))
    (text,) = (it["data"]["net-conf.json"] for it in found if it["kind"] == "ConfigMap")
    assert json.loads(text)["EnableIPv4"] is False
    assert str(parse_net_conf(text, "net-conf.json").network) == "fd00:244::/48"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"flannel": {"backend": "wireguard"}}, "flannel.backend must be vxlan, host-gw, udp or alloc"),
        ({"netpol": {"enabled": True}}, "netpol.enabled: install kube-network-policies"),
    ],
)
def test_what_is_not_built_is_refused_in_words(values: Mapping[str, Any], words: str) -> None:
    with pytest.raises(render.ChartError, match=words):
        render.render(values)


def test_wrong_flag_in_a_manifest_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for argv in (["udptun", "daemon", "--takeover"], ["udptun", "health", "--alive"], ["udptun", "cni", "install"]):
        with pytest.raises(UdptunError):
            parsed(argv, {"NODE_NAME": "n"}, monkeypatch)


# ---------------------------------------------------------------------------------------------------- what is explained


def comparable(found: list[Any]) -> dict[str, Any]:
    """Each field by its path; JSON within is compared by what it says, and no slash at the end of a path counts."""
    fields = {}
    for each in found:
        for path, value in flannel_manifest.fields(each["kind"], {k: v for k, v in each.items() if k != "kind"}):
            if isinstance(value, str):
                value = json.loads(value) if path.endswith(".json") else value.rstrip("/")
            fields[path] = value
    return fields


def test_every_field_that_differs_from_flannels_has_its_row() -> None:
    section = section_of_page("### What differs from flannel's manifest")
    rows = [re.findall(r"`([^`]+)`", line.split("|")[1]) for line in section.splitlines() if line.startswith("| `")]
    explained = {prefix for row in rows for prefix in row}
    ours, flannels = comparable(objects("kube-flannel.yml")), comparable(list(flannel_manifest.OBJECTS))
    different = {path for path in ours.keys() | flannels.keys() if ours.get(path) != flannels.get(path)}
    assert len(different) > 20

    def is_below(path: str, prefix: str) -> bool:
        return path == prefix or path.startswith((f"{prefix}.", f"{prefix}/"))

    assert {it for it in different if not any(is_below(it, prefix) for prefix in explained)} == set()
    assert {it for it in explained if not any(is_below(path, it) for path in different)} == set()
