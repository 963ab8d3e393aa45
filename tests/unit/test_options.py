"""Flags in Go's forms, their environment variables, and one line for everything that cannot be obeyed."""

from __future__ import annotations

import dataclasses
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest

from udptun.config.command_flags import cleanup_help, lease_help, parse_cleanup_flags, parse_lease_flags
from udptun.config.flags import FLAGS, Options, daemon_help, parse_daemon_flags
from udptun.config.store_flags import Endpoint, EtcdOptions, KubeOptions, StoreKind, StoreSpec
from udptun.core.errors import UsageError
from udptun.core.offload import Offload
from udptun.core.tunnel import Confinement, SourceCheck

ALL_FLAGS = [flag for flags in FLAGS.values() for flag in flags]


def parse(*argv: str, **environ: str) -> Options:
    return parse_daemon_flags(argv, environ)


def refusal(*argv: str, **environ: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse(*argv, **environ)
    assert caught.value.exit_status == 2
    return str(caught.value)


def test_options_have_flannels_defaults_and_the_local_store_when_nothing_is_given() -> None:
    assert parse() == Options(
        iface=(),
        iface_regex=(),
        iface_can_reach=None,
        public_ip=None,
        public_ipv6=None,
        subnet_file=Path("/run/flannel/subnet.env"),
        subnet_lease_renew_margin=60,
        net_config_path=Path("/etc/kube-flannel/net-conf.json"),
        ip_masq=False,
        ip_masq_fully_random_disable=False,
        iptables_forward_rules=None,
        iptables_resync=5,
        ip_blackhole_route=False,
        healthz_ip="0.0.0.0",
        healthz_port=0,
        metrics=True,
        metrics_peers=100,
        mesh_port=0,
        take_over=False,
        v=0,
        store=StoreSpec(StoreKind.LOCAL, Path("/var/lib/udptun/leases.db")),
        mtu=None,
        port=None,
        workers=None,
        source_check=None,
        offload_disabled=None,
        datapath_confinement=Confinement.FULL,
        run_dir=Path("/run/udptun"),
        state_dir=Path("/var/lib/udptun"),
        node="",
        etcd=EtcdOptions(
            (Endpoint("127.0.0.1", 4001, False), Endpoint("127.0.0.1", 2379, False)),
            "/coreos.com/network",
            keyfile=None,
            certfile=None,
            cafile=None,
            username="",
            password="",
        ),
        kube=KubeOptions(),
        store_is_named=False,
        pretend_no_vxlan=False,
        notify_socket="",
        warnings=(),
        help=False,
        version=False,
    )


def test_flags_are_those_of_flannel_and_ours() -> None:
    flannel = """etcd-endpoints etcd-prefix etcd-keyfile etcd-certfile etcd-cafile etcd-username etcd-password
        iface iface-regex iface-can-reach subnet-file public-ip public-ipv6 subnet-lease-renew-margin ip-masq
        ip-masq-fully-random-disable kube-subnet-mgr kube-api-url kubeconfig-file kube-annotation-prefix
        net-config-path set-node-network-unavailable version healthz-ip healthz-port iptables-resync
        iptables-forward-rules ip-blackhole-route v vmodule log_backtrace_at
        logtostderr alsologtostderr stderrthreshold log_dir"""
    ours = "store mtu port workers source-ports source-check offload-disabled run-dir state-dir node take-over"
    ours += " datapath-confinement probe metrics metrics-peers mesh-port log-format shortcut"
    assert {flag.name for flag in ALL_FLAGS} == set((flannel + " " + ours).split())


def test_every_options_field_that_names_a_flag_has_that_flags_default() -> None:
    options = parse()
    by_field = {flag.name.replace("-", "_"): flag for flag in ALL_FLAGS}
    shared = [field.name for field in dataclasses.fields(Options) if field.name in by_field]
    assert len(shared) == 41
    for name in shared:
        if name != "store":
            assert getattr(options, name) == by_field[name].default


@pytest.mark.parametrize(
    "argv",
    [
        ["-healthz-port=8081"],
        ["--healthz-port=8081"],
        ["-healthz-port", "8081"],
        ["--healthz-port", "8081"],
        ["--healthz-port=1", "--healthz-port=8081"],
        ["--healthz-port=0x1f91"],
        ["--healthz-port=017621"],
        ["--healthz-port=8_081"],
        ["--healthz-port=8081", "--"],
    ],
)
def test_a_flag_is_read_in_each_of_gos_forms(argv: list[str]) -> None:
    assert parse(*argv).healthz_port == 8081


def test_a_list_flag_takes_one_element_each_time() -> None:
    options = parse("-iface=eth0", "--iface", "10.0.0.1", "--iface=", "--iface-regex", "eth[01]")
    assert options.iface == ("eth0", "10.0.0.1")
    assert options.iface_regex == ("eth[01]",)


def test_a_value_may_look_like_a_flag_when_it_is_the_next_word() -> None:
    assert parse("--node", "--mtu").node == "--mtu"


@pytest.mark.parametrize("text", ["1", "t", "T", "TRUE", "true", "True"])
def test_a_boolean_is_true_for_each_of_gos_spellings(text: str) -> None:
    assert parse(f"--version={text}").version


@pytest.mark.parametrize("text", ["0", "f", "F", "FALSE", "false", "False"])
def test_a_boolean_is_false_for_each_of_gos_spellings(text: str) -> None:
    assert not parse("--version", f"--version={text}").version


def test_options_take_addresses_and_paths() -> None:
    options = parse(
        "--public-ip=192.0.2.1",
        "--public-ipv6=2001:db8::1",
        "--iface-can-reach=192.0.2.9",
        "--subnet-file=/a/b",
        "--net-config-path=/c",
        "--run-dir=/d",
        "--source-check=strict",
        "--mtu=1400",
        "--workers=4",
        "-v=4",
    )
    assert options.public_ip == IPv4Address("192.0.2.1")
    assert options.public_ipv6 == IPv6Address("2001:db8::1")
    assert options.iface_can_reach == IPv4Address("192.0.2.9")
    assert (options.subnet_file, options.net_config_path, options.run_dir) == (Path("/a/b"), Path("/c"), Path("/d"))
    assert (options.source_check, options.mtu, options.workers, options.v) == (SourceCheck.STRICT, 1400, 4, 4)


def test_an_empty_address_counts_as_none_as_in_flannel() -> None:
    assert parse("--public-ip=", "--public-ipv6", "").public_ip is None


@pytest.mark.parametrize(
    ("text", "store"),
    [
        ("local", StoreSpec(StoreKind.LOCAL, Path("/s/leases.db"))),
        ("local:/x/y.db", StoreSpec(StoreKind.LOCAL, Path("/x/y.db"))),
        ("file:/etc/leases.json", StoreSpec(StoreKind.FILE, Path("/etc/leases.json"))),
        ("file:/with:colon", StoreSpec(StoreKind.FILE, Path("/with:colon"))),
    ],
)
def test_store_is_read_with_its_path(text: str, store: StoreSpec) -> None:
    options = parse("--store", text, "--state-dir=/s")
    assert options.store == store
    assert options.store_warning is None


def test_store_warning_says_that_it_serves_one_machine_when_no_store_is_named() -> None:
    assert parse().store_warning == (
        "no --store named: using local:/var/lib/udptun/leases.db, which serves this one machine only; "
        "other hosts will not be reached"
    )


def test_environment_stands_in_for_a_flag_that_is_not_given() -> None:
    environ = {"FLANNELD_SUBNET_FILE": "/x", "FLANNELD_STORE": "file:/l", "FLANNELD_V": "3", "FLANNELD_NODE": "n1"}
    options = parse("-v=1", **environ)
    assert (options.subnet_file, str(options.store), options.v, options.node) == (Path("/x"), "file:/l", 1, "n1")
    assert options.store_warning is None


def test_environment_gives_a_list_flag_one_element() -> None:
    assert parse(FLANNELD_IFACE="x,y").iface == ("x,y",)


def test_environment_is_ignored_when_empty() -> None:
    assert parse(FLANNELD_SUBNET_FILE="", FLANNELD_IP_MASQ="") == parse()


def test_environment_leaves_the_default_and_a_warning_when_it_is_bad() -> None:
    options = parse(FLANNELD_HEALTHZ_PORT="x", FLANNELD_IP_MASQ="maybe", FLANNELD_STORE="nfs:/x")
    assert options == dataclasses.replace(parse(), warnings=options.warnings)
    assert options.warnings == (
        "FLANNELD_STORE=nfs:/x: must be local[:PATH], file:PATH, etcd or kube; ignored, as flannel does",
        "FLANNELD_HEALTHZ_PORT=x: must be an integer; ignored, as flannel does",
        "FLANNELD_IP_MASQ=maybe: must be true or false; ignored, as flannel does",
    )


def test_options_keep_the_notify_socket_of_the_environment() -> None:
    assert parse(NOTIFY_SOCKET="@x").notify_socket == "@x"


REFUSED = [
    (["--ifcae=x"], "unknown flag --ifcae; did you mean --iface?"),
    (["-netconf"], "unknown flag --netconf; did you mean --net-config-path?"),
    (["--zzz=1"], "unknown flag --zzz"),
    (["---iface"], "bad flag syntax: ---iface"),
    (["--=x"], "bad flag syntax: --=x"),
    (["-=x"], "bad flag syntax: -=x"),
    (["status"], "unexpected argument 'status'; the daemon takes flags only"),
    ([""], "unexpected argument ''; the daemon takes flags only"),
    (["-"], "unexpected argument '-'; the daemon takes flags only"),
    (["--", "x"], "unexpected argument 'x'; the daemon takes flags only"),
    (["--", ""], "unexpected argument ''; the daemon takes flags only"),
    (
        ["-ip-masq", "false"],
        "unexpected argument 'false'; a boolean takes its value after =, as in --ip-masq=false",
    ),
    (["--mtu"], "--mtu needs a value: BYTES"),
    (["--mtu="], "--mtu=: must be an integer"),
    (["--mtu=95"], "--mtu=95: must be 96..65535"),
    (["--mtu=1e3"], "--mtu=1e3: must be an integer"),
    (["--healthz-port", "-1"], "--healthz-port=-1: must be 0..65535"),
    (["--healthz-port=08"], "--healthz-port=08: must be an integer"),
    (["--workers=0"], "--workers=0: must be 1..16"),
    (["--port=0"], "--port=0: must be 1..65535"),
    (["--source-ports=0"], "--source-ports=0: must be 1..16 or auto"),
    (["--source-ports=17"], "--source-ports=17: must be 1..16 or auto"),
    (["--source-ports=Auto"], "--source-ports=Auto: must be 1..16 or auto"),
    (["--source-ports="], "--source-ports=: must be 1..16 or auto"),
    (["--shortcut=on"], "--shortcut=on: must be off, auto or require"),
    (["--datapath-confinement=on"], "--datapath-confinement=on: must be off, capabilities or full"),
    (["--source-check=on"], "--source-check=on: must be off, peer or strict"),
    (
        ["--offload-disabled=tso,gso"],
        "--offload-disabled=tso,gso: 'gso' is not one of "
        "vnet_hdr, tso, uso, udp_segment, udp_gro, write_tcp, write_udp, spread, stranger_filter, ecn",
    ),
    (["--version=yes"], "--version=yes: must be true or false"),
    (["--version="], "--version=: must be true or false"),
    (["--public-ip=fe80::1"], "--public-ip=fe80::1: must be an IPv4 address"),
    (["--public-ipv6=1.2.3.4"], "--public-ipv6=1.2.3.4: must be an IPv6 address"),
    (["--subnet-file="], "--subnet-file=: must be a path"),
    (["--store=nfs"], "--store=nfs: must be local[:PATH], file:PATH, etcd or kube"),
    (["--store=file"], "--store=file: needs a path: file:PATH"),
    (["--store=local:"], "--store=local:: needs a path: local:PATH"),
    (
        ["--subnet-lease-renew-margin=1440"],
        "Invalid subnet-lease-renew-margin option, out of acceptable range: 1440 is not in 1..1439",
    ),
    (
        ["--subnet-lease-renew-margin=0"],
        "Invalid subnet-lease-renew-margin option, out of acceptable range: 0 is not in 1..1439",
    ),
]


@pytest.mark.parametrize(("argv", "line"), REFUSED, ids=[" ".join(argv) or "empty" for argv, _ in REFUSED])
def test_flags_are_refused_with_one_line_when_they_cannot_be_read(argv: list[str], line: str) -> None:
    assert refusal(*argv) == line


@pytest.mark.parametrize(
    ("text", "offload"),
    [("tso", Offload.TSO), ("udp_gro,USO", Offload.UDP_GRO | Offload.USO), ("none", Offload(0))],
)
def test_offloads_are_disabled_by_name_for_this_host(text: str, offload: Offload) -> None:
    assert parse(f"--offload-disabled={text}").offload_disabled == offload
    assert parse(FLANNELD_OFFLOAD_DISABLED=text).offload_disabled == offload


@pytest.mark.parametrize("confinement", list(Confinement))
def test_datapath_confinement_takes_its_three_words(confinement: Confinement) -> None:
    assert parse(f"--datapath-confinement={confinement}").datapath_confinement is confinement
    assert parse(FLANNELD_DATAPATH_CONFINEMENT=str(confinement)).datapath_confinement is confinement


def test_a_bad_regular_expression_is_refused_with_its_reason() -> None:
    assert refusal("--iface-regex=(").startswith("--iface-regex=(: must be a regular expression (missing )")


def test_renew_margin_out_of_range_is_fatal_also_from_the_environment() -> None:
    assert refusal(FLANNELD_SUBNET_LEASE_RENEW_MARGIN="2000").startswith("Invalid subnet-lease-renew-margin option")


def test_flags_that_are_accepted_and_do_nothing_change_nothing() -> None:
    options = parse(
        "--kube-subnet-mgr=false",
        "--kubeconfig-file=",
        "--vmodule=a=1",
        "--log_backtrace_at=a.go:1",
        "--logtostderr=false",
        "-alsologtostderr",
        "--stderrthreshold=INFO",
        "--log_dir=/var/log/flannel",
    )
    assert options == parse()


def test_the_kube_store_is_named_by_its_own_flag_or_by_store() -> None:
    for argv in (["--kube-subnet-mgr"], ["--store=kube"], ["--store=kube", "--kube-subnet-mgr"]):
        options = parse(*argv, "--kubeconfig-file=/x", "--kube-api-url=https://a:1", NODE_NAME="n1")
        assert (options.store.kind, str(options.store), options.store_is_named) == (StoreKind.KUBE, "kube", True)
        assert (options.kube.kubeconfig_file, options.kube.kube_api_url) == ("/x", "https://a:1")
        assert (options.kube.node_name, options.kube.set_node_network_unavailable) == ("n1", True)
        assert options.kube.kube_annotation_prefix == "flannel.alpha.coreos.com/"
    options = parse(FLANNELD_KUBE_SUBNET_MGR="true", POD_NAME="p", POD_NAMESPACE="ns")
    assert (options.kube.pod_name, options.kube.pod_namespace, options.kube.node_name) == ("p", "ns", "")


def test_the_kube_store_needs_to_know_which_node_this_is_and_no_other_store_beside_it() -> None:
    assert refusal("--kube-subnet-mgr").startswith("env variables POD_NAME and POD_NAMESPACE must be set, or NODE_NAME")
    assert refusal("--kube-subnet-mgr", POD_NAME="p").startswith("env variables POD_NAME and POD_NAMESPACE must be set")
    assert refusal("--kube-subnet-mgr", "--store=local", NODE_NAME="n").startswith(
        "--kube-subnet-mgr means kube, and --store names another store"
    )
    # Whoever lists leases or cleans up need not be a node.
    assert parse_lease_flags(["--store=kube"], {}, 0).options.store.kind is StoreKind.KUBE
    assert parse_cleanup_flags(["--kube-subnet-mgr"], {})[0].store.kind is StoreKind.KUBE
    assert parse("--kube-subnet-mgr", "--etcd-prefix=/x", NODE_NAME="n").warnings == (
        "--etcd-prefix not used: the leases are in Kubernetes",
    )


@pytest.mark.parametrize(
    ("text", "prefix"),
    [
        ("flannel.alpha.coreos.com", "flannel.alpha.coreos.com/"),
        ("flannel.alpha.coreos.com/", "flannel.alpha.coreos.com/"),
        ("flannel.alpha.coreos.com/prefix", "flannel.alpha.coreos.com/prefix-"),
        ("flannel.alpha.coreos.com/prefix-", "flannel.alpha.coreos.com/prefix-"),
        ("org.com/9", "org.com/9-"),
        ("org.com", "org.com/"),
        ("org.com/a_b", "org.com/a_b-"),
        ("org", ""),
        ("org/prefix", ""),
        ("org.COM", ""),
        ("org.com/PREFIX", ""),
        ("org.com/a/b", ""),
    ],
)
def test_annotation_prefix_is_completed_or_refused_by_flannels_table(text: str, prefix: str) -> None:
    if prefix:
        assert parse("--kube-annotation-prefix", text).kube.kube_annotation_prefix == prefix
    else:
        assert refusal("--kube-annotation-prefix", text).startswith(f"--kube-annotation-prefix={text}: ")


def test_forward_rules_tell_a_wish_from_the_default() -> None:
    assert parse("--iptables-forward-rules").iptables_forward_rules is True
    assert parse("--iptables-forward-rules=false").iptables_forward_rules is False
    assert parse(FLANNELD_IPTABLES_FORWARD_RULES="true").iptables_forward_rules is True
    assert parse().iptables_forward_rules is None


def test_firewall_flags_are_flannels() -> None:
    options = parse("-ip-masq", "-ip-masq-fully-random-disable", "-iptables-resync=9", "-ip-blackhole-route")
    assert options.ip_masq
    assert options.ip_masq_fully_random_disable
    assert options.iptables_resync == 9
    assert options.ip_blackhole_route
    assert refusal("--iptables-resync=0") == "--iptables-resync=0: must be 1..86400"


def test_flanneld_means_etcd_when_no_store_is_named() -> None:
    options = parse_daemon_flags([], {}, as_flanneld=True)
    assert (options.store.kind, str(options.store)) == (StoreKind.ETCD, "etcd")
    assert [str(endpoint) for endpoint in options.etcd.endpoints] == ["http://127.0.0.1:4001", "http://127.0.0.1:2379"]
    assert options.store_warning is None
    assert parse_daemon_flags(["--store=local"], {}, as_flanneld=True).store.kind is StoreKind.LOCAL


@pytest.mark.parametrize(
    "flag",
    [
        "--etcd-endpoints=http://etcd-1:2379",
        "--etcd-prefix=/coreos.com/network",
        "--etcd-cafile=/ca.pem",
        "--store=etcd",
    ],
)
def test_any_etcd_flag_names_the_etcd_store_and_so_does_its_variable(flag: str) -> None:
    assert parse(flag).store.kind is StoreKind.ETCD
    assert parse(flag).store_warning is None
    name, _, value = flag.removeprefix("--").partition("=")
    variable = f"FLANNELD_{name.upper().replace('-', '_')}"
    assert parse(**{variable: value}).store.kind is StoreKind.ETCD
    assert parse("--etcd-cafile=", "--etcd-username=").store.kind is StoreKind.LOCAL


def test_etcd_endpoints_are_urls_with_names_or_addresses_of_either_family() -> None:
    text = "https://etcd-1.example:2379, https://192.0.2.1:4001/,https://[2001:db8::1]:2379,https://[::1],https://x"
    endpoints = parse(f"--etcd-endpoints={text}").etcd.endpoints
    assert [endpoint.address for endpoint in endpoints] == [
        "etcd-1.example:2379",
        "192.0.2.1:4001",
        "[2001:db8::1]:2379",
        "[::1]:2379",
        "x:2379",
    ]
    assert all(endpoint.is_tls for endpoint in endpoints)
    assert str(endpoints[2]) == "https://[2001:db8::1]:2379"


def test_etcd_endpoints_without_a_scheme_are_encrypted_when_a_ca_or_a_certificate_is_given() -> None:
    assert not parse("--etcd-endpoints=h:2379").etcd.endpoints[0].is_tls
    assert parse("--etcd-endpoints=h:2379", "--etcd-cafile=/ca.pem").etcd.endpoints[0].is_tls
    options = parse("--etcd-endpoints=h:2379", "--etcd-certfile=/c.pem", "--etcd-keyfile=/k.pem")
    assert options.etcd.endpoints[0].is_tls
    assert not options.warnings


def test_etcd_files_for_an_endpoint_that_is_not_encrypted_are_a_warning_as_flannel_takes_them() -> None:
    options = parse("--etcd-endpoints=http://h:2379", "--etcd-cafile=/ca.pem")
    assert not options.etcd.endpoints[0].is_tls
    (warning,) = options.warnings
    assert "http://h:2379 is not encrypted; write https://" in warning


@pytest.mark.parametrize(
    ("text", "prefix"),
    [("/coreos.com/network/", "/coreos.com/network"), ("//a//b/../c/", "/a/c"), ("a/b", "a/b"), ("/", "")],
)
def test_etcd_prefix_is_cleaned_as_flannel_cleans_it(text: str, prefix: str) -> None:
    assert parse("--etcd-prefix", text).etcd.prefix == prefix


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--etcd-endpoints=http://a:1,https://b:2"], "--etcd-endpoints mixes http:// and https://"),
        (["--etcd-endpoints=unix:///run/etcd"], "--etcd-endpoints=unix:///run/etcd: 'unix:///run/etcd' is not http://"),
        (["--etcd-endpoints=http://a:99999"], "--etcd-endpoints=http://a:99999: 'http://a:99999' is not http://"),
        (["--etcd-endpoints=,"], "--etcd-endpoints=,: must be http://HOST:PORT"),
        (["--etcd-endpoints=https://u:secret@a:1"], "--etcd-endpoints takes no user and password"),
        (["--etcd-prefix="], "--etcd-prefix=: must be a path"),
        (["--etcd-certfile=/c"], "--etcd-certfile and --etcd-keyfile go together"),
        (["--etcd-keyfile=/k"], "--etcd-certfile and --etcd-keyfile go together"),
        (["--etcd-username=u"], "--etcd-username and --etcd-password go together"),
        (["--etcd-password=secret"], "--etcd-username and --etcd-password go together"),
        (["--store=etcd:/x"], "--store=etcd:/x: takes no path; see --etcd-endpoints"),
        (["--store=local", "--etcd-password=secret"], "--etcd-password means etcd, and --store names another store"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_etcd_flags_that_cannot_be_obeyed_are_one_line_without_a_secret(argv: list[str], line: str) -> None:
    said = refusal(*argv)
    assert said.startswith(line)
    assert "secret" not in said


def test_etcd_password_is_not_in_what_options_show() -> None:
    options = parse("--etcd-username=u", "--etcd-password=secret")
    assert options.etcd.password == "secret"
    assert "secret" not in repr(options)


@pytest.mark.parametrize("argv", [["-h"], ["--help"], ["-help"], ["--mtu=1400", "-h", "--no-such"]])
def test_help_is_asked_for_in_each_of_gos_forms_and_nothing_else_matters(argv: list[str]) -> None:
    assert parse_daemon_flags(argv, {"FLANNELD_STORE": "kube"}, as_flanneld=True).help


def test_version_can_be_asked_for_whatever_the_environment_says() -> None:
    environ = {"FLANNELD_STORE": "kube", "FLANNELD_SUBNET_LEASE_RENEW_MARGIN": "0"}
    assert parse_daemon_flags(["-version"], environ, as_flanneld=True).version
    assert parse(FLANNELD_VERSION="true").version


def test_help_names_every_flag_and_its_default() -> None:
    text = daemon_help()
    for flag in ALL_FLAGS:
        assert f"  --{flag.name}" in text
    assert "default /run/flannel/subnet.env" in text
    assert "leases are node annotations; as --store kube" in text
    assert "accept overlay traffic in FORWARD; default true, where the host can\n" in text
    assert max(map(len, text.splitlines())) <= 110
    assert "--release" not in text
    assert "--release" in cleanup_help()


def test_cleanup_takes_the_daemons_flags_and_release() -> None:
    options, release = parse_cleanup_flags(["--run-dir=/r", "--release", "--state-dir", "/s"], {})
    assert release
    assert (options.run_dir, options.store.path) == (Path("/r"), Path("/s/leases.db"))
    assert parse_cleanup_flags(["--node", "--release"], {})[1] is False


def test_lease_takes_words_and_the_daemons_flags_in_any_order() -> None:
    request = parse_lease_flags(["--json", "10.1.2.0/24", "--etcd-prefix=/p", "--public-ip", "192.0.2.1"], {}, 1)
    assert (request.words, request.json) == (("10.1.2.0/24",), True)
    assert (request.options.store.kind, request.options.etcd.prefix) == (StoreKind.ETCD, "/p")
    assert request.options.public_ip == IPv4Address("192.0.2.1")
    with pytest.raises(UsageError, match=r"unexpected argument 'b'"):
        parse_lease_flags(["a", "b"], {}, 1)
    assert "--etcd-prefix" in lease_help()
    assert "--json" in lease_help()
    assert "--mtu" not in lease_help()


def test_release_is_no_flag_of_the_daemon() -> None:
    assert refusal("--release") == "unknown flag --release"
