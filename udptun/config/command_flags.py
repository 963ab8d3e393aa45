"""The flags of the commands that take those of the daemon too.  Pure, as flags.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from udptun.config.flags import ENVIRONMENT_PREFIX, FLAGS, LEASES, Options, given_flags, options_of
from udptun.config.go_flags import Flag, boolean, help_text, nonempty_path
from udptun.config.store_flags import ETCD_TOPIC, KUBE_TOPIC

_RELEASE = Flag("release", "", boolean, False, "", "give the lease back too; without it the host finds it again")
_ALL = Flag("all", "", boolean, False, "", "also what is fine, and what could not be looked at")
_CNI_CONF_DIR = Flag(
    "cni-conf-dir", "", nonempty_path, Path("/etc/cni/net.d"), "DIR", "where the CNI configurations are"
)
_CNI_BIN_DIR = Flag("cni-bin-dir", "", nonempty_path, Path("/opt/cni/bin"), "DIR", "where their plugins are")
_ENV_FILE = Flag("env-file", "", nonempty_path, None, "FILE", "lines of NAME=value, as of a unit's EnvironmentFile")
_JSON = Flag("json", "", boolean, False, "", "for programs")


def parse_cleanup_flags(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[Options, bool]:
    """The options of `udptun cleanup`, which takes every flag of the daemon, and whether --release is given."""
    given = given_flags(argv, environ, _RELEASE)
    return options_of(given, environ), given.values[_RELEASE.name]


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """The arguments of `udptun lease list`, `show`, `reserve` or `release`."""

    options: Options
    words: tuple[str, ...]
    json: bool


def parse_lease_flags(argv: Sequence[str], environ: Mapping[str, str], n_words: int) -> LeaseRequest:
    """What `udptun lease` takes: every flag of the daemon, --json, and up to `n_words` words."""
    given = given_flags(argv, environ, _JSON, n_words=n_words)
    return LeaseRequest(options_of(given, environ), tuple(given.words), given.values[_JSON.name])


@dataclass(frozen=True, slots=True)
class DoctorRequest:
    """The arguments of `udptun doctor`."""

    options: Options
    cni_conf_dir: Path
    cni_bin_dir: Path
    json: bool
    all: bool


def parse_doctor_flags(argv: Sequence[str], environ: Mapping[str, str], *, as_flanneld: bool = False) -> DoctorRequest:
    """What `udptun doctor` takes: every flag of the daemon, and its own."""
    own = (_CNI_CONF_DIR, _CNI_BIN_DIR, _JSON, _ALL)
    given = given_flags(argv, environ, *own)
    options = options_of(given, environ, as_flanneld=as_flanneld)
    return DoctorRequest(options, *(given.values[it.name] for it in own))


def flags_of_flanneld(words: Sequence[str]) -> list[str]:
    """Those of the arguments that a daemon run as `flanneld` has taken: all before the first that is no flag.

    Raises UsageError.
    """
    return [*words[: given_flags(words, {}, ends_at_word=True).n_flag_words]]


@dataclass(frozen=True, slots=True)
class ConfigRequest:
    """The arguments of `udptun config show`.  `env_file` None: no file of variables is named."""

    options: Options
    env_file: Path | None
    json: bool


def parse_config_flags(argv: Sequence[str], environ: Mapping[str, str]) -> ConfigRequest:
    """What `udptun config show` takes: every flag of the daemon, and its own."""
    given = given_flags(argv, environ, _JSON, _ENV_FILE)
    return ConfigRequest(options_of(given, environ), given.values[_ENV_FILE.name], given.values[_JSON.name])


def config_help() -> str:
    """What `udptun config --help` says about the flags."""
    return help_text({"": (_JSON, _ENV_FILE), **FLAGS}, ENVIRONMENT_PREFIX)


def lease_help() -> str:
    """What `udptun lease --help` says about the flags."""
    topics = (LEASES, ETCD_TOPIC, KUBE_TOPIC)
    return help_text({"": (_JSON,), **{topic: FLAGS[topic] for topic in topics}}, ENVIRONMENT_PREFIX)


def doctor_help() -> str:
    """What `udptun doctor --help` says about the flags."""
    return help_text({"": (_JSON, _ALL, _CNI_CONF_DIR, _CNI_BIN_DIR), **FLAGS}, ENVIRONMENT_PREFIX)


def cleanup_help() -> str:
    """What `udptun cleanup --help` says about the flags."""
    return help_text({"": (_RELEASE,), **FLAGS}, ENVIRONMENT_PREFIX)
