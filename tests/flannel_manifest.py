"""What flannel's manifest asks Kubernetes for, as its chart of version 0.28.9 renders it with its own values.

Facts, to compare ours with; in the nested form that `fields` makes flat.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

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
