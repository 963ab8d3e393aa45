"""Command line and environment of the daemon: options, or one line that says what is wrong.

An input has a word of the command line in each line; one that has `=` and begins with no dash is a variable.
"""

from __future__ import annotations

from contextlib import suppress
from random import Random

from tests.fuzz.mutate import MANY_DIGITS, bytes_mutator
from tests.fuzz.oracles import check_line, check_lines
from udptun.config.command_flags import parse_cleanup_flags, parse_lease_flags
from udptun.config.flags import ENVIRONMENT_PREFIX, FLAGS, Options, parse_daemon_flags
from udptun.config.go_regex import compile_go
from udptun.config.store_flags import StoreKind
from udptun.core.errors import UsageError
from udptun.stores.kube.http import needs_proxy

_NAMES = [flag.name for flags in FLAGS.values() for flag in flags]
_VALUES = (
    *("", "true", "false", "0", "-1", "0x10", "017", "08", "1_0", "1440", "65536", MANY_DIGITS, "eth0", "192.0.2.1"),
    *("::1", "fe80::1%a", "local:/x", "file:/x", "file:", "etcd", "kube", "local", "http://a:1,https://b:2", "u:p@h"),
    *("[::1]:2379", "/a//b/../c", "^eth[0-9]+$", "(?i)e(?U)x", r"\Qa.b\E", "[[:alpha:]]", "(" * 300, "(?P<n>x){2,1}"),
    *("a{99999999999}", r"\x{110000}", "[z-a]", "(?<n>x)", "(?<n>x)(?<n>y)", "tso,uso", "none", "auto", "strict"),
    *("example.com/x-", "a\nb", "\x1b[31m", "\udcff", "\u0661", "=", "--", "-", "a=b"),
)
FOUND = {
    "a variable begins a line of the log": b"FLANNELD_DATAPATH_CONFINEMENT=\x1b[31m",
    "a word is 5,000 characters long": b"--iface-regex=" + b"(" * 5000,
    "an unknown flag commands a terminal": b"--\x1b[31m=1",
}
SEEDS = (
    b"--iface=eth0\n--ip-masq\n--store=file:/x\n--workers=2",
    b"-etcd-endpoints=http://192.0.2.1:2379,http://192.0.2.2\n-etcd-prefix=/a/b\nFLANNELD_IFACE=eth1\n-v=10",
    b"--kube-subnet-mgr\nNODE_NAME=a\nHTTPS_PROXY=http://p:1\nNO_PROXY=10.0.0.0/8,.svc,*\n--kube-annotation-prefix=a.b/c-",
    b"--iface-regex\n^eth[[:digit:]]{1,2}$\n--iface-can-reach\n192.0.2.1\n--public-ip=192.0.2.1\n--port=8286",
    b"--help", b"--version", b"--ip-masq\ntrue", b"--unknown=1", b"FLANNEL_OPTIONS=-x y\nFLANNEL_ETCD=z",
)  # fmt: skip


def mutate(data: bytes, random: Random) -> bytes:
    words = data.split(b"\n")
    at = random.randrange(len(words) + 1)
    what = random.random()
    if what < 0.5:
        name, value = random.choice(_NAMES), random.choice(_VALUES)
        word = random.choice(
            (
                f"--{name}={value}", f"-{name}={value}", f"--{name}\n{value}", f"--{name}", f"-{name[:-1]}={value}",
                f"{ENVIRONMENT_PREFIX}{name.upper().replace('-', '_')}={value}",
            )
        )  # fmt: skip
        words.insert(at, word.encode("utf-8", "surrogatepass"))
    elif what < 0.65 and len(words) > 1:
        del words[at - 1]
    else:
        return bytes_mutator(data, random)
    return b"\n".join(words)


def check(data: bytes) -> None:
    words = data.decode("utf-8", "surrogateescape").split("\n")
    argv = [word for word in words if word.startswith("-") or "=" not in word]
    environ = dict(word.split("=", 1) for word in words if not word.startswith("-") and "=" in word)
    for as_flanneld in (False, True):
        try:
            options = parse_daemon_flags(argv, environ, as_flanneld=as_flanneld)
        except UsageError as exc:
            check_line(str(exc))
        else:
            _check_options(options)
    for parse in (parse_cleanup_flags, lambda *it: parse_lease_flags(*it, 1)):
        try:
            parse(argv, environ)
        except UsageError as exc:
            check_line(str(exc))
    for word in words[:3]:
        with suppress(ValueError):
            compile_go(word)


def _check_options(options: Options) -> None:
    check_lines(options.warnings)
    if options.help or options.version:
        return
    assert options.store.kind in StoreKind
    assert 1 <= options.subnet_lease_renew_margin < 1440
    assert options.port is None or 0 < options.port < 65536
    assert 0 <= options.healthz_port < 65536
    if options.store.kind is StoreKind.ETCD:
        assert options.etcd.endpoints
        assert len({it.is_tls for it in options.etcd.endpoints}) == 1
        assert not options.etcd.prefix.endswith("/")
    assert options.etcd.password not in repr(options) or len(options.etcd.password) < 8
    needs_proxy("https://192.0.2.1:6443", options.kube.no_proxy)
    for text in options.iface_regex:
        compile_go(text)
