"""What flannel's manifest asks Kubernetes for, as its chart of version 0.28.9 renders it with its own values.

Facts, to compare ours with; in the nested form that `fields` makes flat.  `as_of_0_20` and `as_of_0_12` are what older
manifests ask of an image.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

_NAMES = {"name": "kube-flannel-cfg", "namespace": "kube-flannel", "labels": {"tier": "node", "app": "flannel"}}
_OF_ROLE = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "flannel"}
_CNI_CONF = (
    '{"name": "cbr0", "cniVersion": "0.3.1", "plugins": [{"type": "flannel", "delegate": {"hairpinMode": true, '
    '"isDefaultGateway": true}}, {"type": "portmap", "capabilities": {"portMappings": true}}]}'
)
_IMAGE, _PLUGIN_IMAGE = "ghcr.io/flannel-io/flannel:v0.28.9", "ghcr.io/flannel-io/flannel-cni-plugin:v1.9.1-flannel2"


def _mounts(**paths: str) -> list[dict[str, object]]:
    return [{"name": name.replace("_", "-"), "mountPath": path} for name, path in paths.items()]


def _from_field(name: str, path: str) -> dict[str, object]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


_POD_SPEC: Mapping[str, object] = {
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [
                    {"matchExpressions": [{"key": "kubernetes.io/os", "operator": "In", "values": ["linux"]}]}
                ]
            }
        }
    },
    "hostNetwork": True,
    "priorityClassName": "system-node-critical",
    "tolerations": [{"effect": "NoExecute", "operator": "Exists"}, {"effect": "NoSchedule", "operator": "Exists"}],
    "serviceAccountName": "flannel",
    "initContainers": [
        {
            "name": "install-cni-plugin",
            "image": _PLUGIN_IMAGE,
            "command": ["cp"],
            "args": ["-f", "/flannel", "/opt/cni/bin/flannel"],
            "volumeMounts": _mounts(cni_plugin="/opt/cni/bin"),
        },
        {
            "name": "install-cni",
            "image": _IMAGE,
            "command": ["/opt/bin/install-conf"],
            "args": ["/etc/kube-flannel/cni-conf.json", "/etc/cni/net.d/10-flannel.conflist"],
            "volumeMounts": _mounts(cni="/etc/cni/net.d", flannel_cfg="/etc/kube-flannel/"),
        },
    ],
    "containers": [
        {
            "name": "kube-flannel",
            "image": _IMAGE,
            "command": ["/opt/bin/flanneld", "--ip-masq", "--kube-subnet-mgr", "--healthz-port=8081"],
            "ports": [{"name": "healthz", "containerPort": 8081, "protocol": "TCP"}],
            "livenessProbe": {
                "httpGet": {"path": "/healthz", "port": "healthz"},
                "initialDelaySeconds": 10,
                "periodSeconds": 30,
            },
            "readinessProbe": {
                "httpGet": {"path": "/readyz", "port": "healthz"},
                "initialDelaySeconds": 5,
                "periodSeconds": 10,
            },
            "resources": {"requests": {"cpu": "100m", "memory": "50Mi"}},
            "securityContext": {"privileged": False, "capabilities": {"add": ["NET_ADMIN", "NET_RAW"]}},
            "env": [
                _from_field("POD_NAME", "metadata.name"),
                _from_field("POD_NAMESPACE", "metadata.namespace"),
                {"name": "EVENT_QUEUE_DEPTH", "value": "5000"},
                {"name": "CONT_WHEN_CACHE_NOT_READY", "value": "false"},
            ],
            "volumeMounts": _mounts(
                run="/run/flannel", flannel_cfg="/etc/kube-flannel/", xtables_lock="/run/xtables.lock"
            ),
        }
    ],
    "volumes": [
        {"name": "run", "hostPath": {"path": "/run/flannel"}},
        {"name": "cni-plugin", "hostPath": {"path": "/opt/cni/bin"}},
        {"name": "cni", "hostPath": {"path": "/etc/cni/net.d"}},
        {"name": "flannel-cfg", "configMap": {"name": "kube-flannel-cfg"}},
        {"name": "xtables-lock", "hostPath": {"path": "/run/xtables.lock", "type": "FileOrCreate"}},
    ],
}

OBJECTS: tuple[Mapping[str, object], ...] = (
    {
        "kind": "Namespace",
        "apiVersion": "v1",
        "metadata": {"name": "kube-flannel", "labels": {"pod-security.kubernetes.io/enforce": "privileged"}},
    },
    {
        "kind": "ServiceAccount",
        "apiVersion": "v1",
        "metadata": {"name": "flannel", "namespace": "kube-flannel"},
    },
    {
        "kind": "ClusterRole",
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "metadata": {"name": "flannel"},
        "rules": [
            {"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]},
            {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"]},
            {"apiGroups": [""], "resources": ["nodes/status"], "verbs": ["patch"]},
        ],
    },
    {
        "kind": "ClusterRoleBinding",
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "metadata": {"name": "flannel"},
        "roleRef": _OF_ROLE,
        "subjects": [{"kind": "ServiceAccount", "name": "flannel", "namespace": "kube-flannel"}],
    },
    {
        "kind": "ConfigMap",
        "apiVersion": "v1",
        "metadata": _NAMES,
        "data": {
            "cni-conf.json": _CNI_CONF,
            "net-conf.json": '{"Network": "10.244.0.0/16", "EnableNFTables": false, "Backend": {"Type": "vxlan"}}',
        },
    },
    {
        "kind": "DaemonSet",
        "apiVersion": "apps/v1",
        "metadata": {**_NAMES, "name": "kube-flannel-ds"},
        "spec": {
            "selector": {"matchLabels": {"app": "flannel"}},
            "template": {"metadata": {"labels": {"tier": "node", "app": "flannel"}}, "spec": _POD_SPEC},
        },
    },
)


def _changed() -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """A copy of all objects, and in it the spec of the pods and that of the daemon's container."""
    objects: list[dict[str, Any]] = copy.deepcopy(list(OBJECTS))  # type: ignore[arg-type]
    pod = objects[-1]["spec"]["template"]["spec"]
    (daemon,) = pod["containers"]
    install = pod["initContainers"][-1]
    install["command"], install["args"] = ["cp"], ["-f", *install["args"]]
    for name in ("ports", "livenessProbe", "readinessProbe"):
        del daemon[name]
    daemon["command"], daemon["args"] = ["/opt/bin/flanneld"], ["--ip-masq", "--kube-subnet-mgr"]
    return objects, pod, daemon


def as_of_0_20() -> list[dict[str, Any]]:
    """`cp` instead of install-conf, and no probes."""
    objects, _, daemon = _changed()
    daemon["env"] = [it for it in daemon["env"] if it["name"] != "CONT_WHEN_CACHE_NOT_READY"]
    return objects


def as_of_0_12() -> list[dict[str, Any]]:
    """In kube-system, without a plugin, a lock of iptables and NET_RAW, and with limits."""
    objects, pod, daemon = _changed()
    del pod["initContainers"][0]
    daemon["env"] = daemon["env"][:2]
    daemon["securityContext"]["capabilities"]["add"] = ["NET_ADMIN"]
    daemon["resources"]["limits"] = {"cpu": "100m", "memory": "50Mi"}
    for volumes in (pod["volumes"], daemon["volumeMounts"]):
        volumes[:] = [it for it in volumes if it["name"] in ("run", "cni", "flannel-cfg")]
    for found in objects:
        if "namespace" in found["metadata"]:
            found["metadata"]["namespace"] = "kube-system"
    return objects


def fields(kind: str, content: object, at: str = "") -> Iterator[tuple[str, object]]:
    """Each leaf of an object with its path, such as `DaemonSet spec.updateStrategy.type`.

    In the path `pod` stands for `spec.template.spec`, and a member of a list for its name, if it has one.  A command
    and its arguments are one leaf, rules and tolerations a leaf each.
    """
    if isinstance(content, Mapping):
        if "command" in content and "exec" not in at:
            content = {**content, "command": [*content["command"], *content.get("args", ())]}
            content.pop("args", None)
        for name, value in content.items():
            yield from fields(kind, value, f"{at}.{name}" if at else name)
    elif isinstance(content, list) and content and all(isinstance(it, Mapping) and "name" in it for it in content):
        for member in content:
            yield from fields(kind, {k: v for k, v in member.items() if k != "name"}, f"{at}.{member['name']}")
    else:
        path = at.replace("spec.template.spec", "pod")
        yield f"{kind} {path}", content
