"""What units of old flannels give to `flanneld`: what it ignores, it names."""

from __future__ import annotations

import pytest

from udptun.config.flags import Options, parse_daemon_flags
from udptun.core.errors import UsageError


def flanneld(*argv: str, **environ: str) -> Options:
    return parse_daemon_flags(argv, environ, as_flanneld=True)


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        (
            [""],
            "'' and what follows it are ignored, as flannel does (an empty word, as of an empty variable in quotes)",
        ),
        (
            ["FLANNEL_OPTIONS"],
            "'FLANNEL_OPTIONS' and what follows it are ignored, as flannel does (the name of a variable without its $)",
        ),
        (
            ["false", "--ip-masq=1", "x", "-etcd-password", "secret"],
            "'false' and what follows it are ignored, as flannel does (a boolean takes its value after =, as in "
            "--ip-masq=false); so ignored are --ip-masq, --etcd-password",
        ),
        (["-"], "'-' and what follows it are ignored, as flannel does (flags end at the first word that is none)"),
        (
            ["start"],
            "'start' and what follows it are ignored, as flannel does (flags end at the first word that is none)",
        ),
        (
            ["--", "--mtu=1"],
            "'--mtu=1' and what follows it are ignored, as flannel does (flags end at the first word that is none)",
        ),
    ],
)
def test_flanneld_ignores_words_behind_its_flags_as_go_does(words: list[str], warning: str) -> None:
    """Before, flanneld ended with status 2 where a unit says "${FLANNEL_OPTIONS}" and the variable is empty."""
    options = flanneld("-iface=eth0", *words)
    assert options.warnings == (warning,)
    assert options.iface == ("eth0",)
    assert not options.ip_masq
    assert options.mtu is None
    with pytest.raises(UsageError, match=r"flags only|takes its value after =|bad flag syntax"):
        parse_daemon_flags(["-iface=eth0", *words], {})


def test_flanneld_says_nothing_about_flags_that_end_with_two_hyphens() -> None:
    assert flanneld("--").warnings == ()


@pytest.mark.parametrize("argv", [["---x"], ["-=x"], ["--zzz"], ["-mtu"], ["-mtu=x"]])
def test_flanneld_still_refuses_bad_flags(argv: list[str]) -> None:
    with pytest.raises(UsageError):
        flanneld(*argv)


@pytest.mark.parametrize(
    ("environ", "argv", "warnings"),
    [
        (
            {"FLANNEL_ETCD_ENDPOINTS": "http://secret@x"},
            [],
            ["FLANNEL_ETCD_ENDPOINTS is not read, as by flannel: give --etcd-endpoints, or FLANNELD_ETCD_ENDPOINTS"],
        ),
        (
            {"FLANNEL_ETCD": "http://x", "FLANNEL_ETCD_KEY": "/atomic.io/network"},
            [],
            [
                "FLANNEL_ETCD is not read, as by flannel: give --etcd-endpoints, or FLANNELD_ETCD_ENDPOINTS",
                "FLANNEL_ETCD_KEY is not read, as by flannel: give --etcd-prefix, or FLANNELD_ETCD_PREFIX",
            ],
        ),
        (
            {"FLANNEL_ETCD_CAFILE": "/ca"},
            [],
            ["FLANNEL_ETCD_CAFILE is not read, as by flannel: give --etcd-cafile, or FLANNELD_ETCD_CAFILE"],
        ),
        (
            {"FLANNEL_OPTIONS": "-iface=eth1 --ip-masq"},
            ["-iface=eth1"],
            ["FLANNEL_OPTIONS is not read, as by flannel: put $FLANNEL_OPTIONS on the command line"],
        ),
        # A start script has made flags of them.
        ({"FLANNEL_ETCD_PREFIX": "/x"}, ["--etcd-prefix=/x"], []),
        ({"FLANNEL_ETCD_PREFIX": "/x", "FLANNELD_ETCD_PREFIX": "/x"}, [], []),
        ({"FLANNEL_OPTIONS": "-iface=eth1  --ip-masq"}, ["-iface=eth1", "--ip-masq"], []),
        # Nothing is said with them, or they are somebody else's: subnet.env's, or of a Kubernetes service.
        ({"FLANNEL_OPTIONS": " ", "FLANNEL_ETCD": ""}, [], []),
        ({"FLANNEL_MTU": "1472", "FLANNEL_SUBNET": "10.1.2.1/24", "FLANNEL_ETCD_PORT": "tcp://10.0.0.1:80"}, [], []),
    ],
)
def test_variables_of_old_units_that_nobody_reads_are_named(
    environ: dict[str, str], argv: list[str], warnings: list[str]
) -> None:
    """Before, a host whose unit lost its start script looked for etcd on itself, and nothing said why."""
    assert list(flanneld(*argv, **environ).warnings) == warnings
