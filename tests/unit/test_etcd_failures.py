"""What failed calls to etcd mean: texts of etcd and grpc in, one of our errors in one line out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from udptun.config.flags import parse_daemon_flags
from udptun.config.store_flags import Endpoint, EtcdOptions
from udptun.core.errors import ConfigError, StoreUnavailableError
from udptun.stores.etcd.failures import Failure, RevisionGoneError, explain, is_about_the_token, why_not_connected

SETTINGS: EtcdOptions = replace(parse_daemon_flags([], {}).etcd, username="flannel")
ENDPOINT: Endpoint = SETTINGS.endpoints[0]


@pytest.mark.parametrize(
    ("failure", "kind", "line"),
    [
        (
            Failure("INVALID_ARGUMENT", "etcdserver: authentication failed, invalid user ID or password"),
            ConfigError,
            f"cannot list in etcd at {ENDPOINT}: authentication failed, invalid user ID or password; "
            "mend --etcd-username and --etcd-password",
        ),
        (
            Failure("PERMISSION_DENIED", "rpc error: code = PermissionDenied desc = etcdserver: permission denied"),
            ConfigError,
            f"cannot list in etcd at {ENDPOINT}: permission denied; "
            "the user flannel needs a role with readwrite on the prefix (etcdctl role grant-permission)",
        ),
        (
            Failure("UNAVAILABLE", "etcdserver: no leader"),
            StoreUnavailableError,
            f"cannot list in etcd at {ENDPOINT}: no leader; most of its members are down or cut off; trying again",
        ),
        (
            Failure("UNAVAILABLE", "etcdserver: something that is new to us"),
            StoreUnavailableError,
            f"cannot list in etcd at {ENDPOINT}: something that is new to us",
        ),
        (
            Failure("OUT_OF_RANGE", "etcdserver: mvcc: required revision has been compacted"),
            RevisionGoneError,
            "mvcc: required revision has been compacted",
        ),
        (
            Failure("UNAVAILABLE", "failed to connect: ipv4:127.0.0.1:2379: Connection refused (111)"),
            StoreUnavailableError,
            f"cannot list in etcd: {ENDPOINT}: connection refused",
        ),
        (
            Failure("DEADLINE_EXCEEDED", "Deadline Exceeded"),
            StoreUnavailableError,
            f"cannot list in etcd: {ENDPOINT}: no answer within 5 s",
        ),
        (
            Failure("UNAVAILABLE", "Socket closed"),
            StoreUnavailableError,
            f"cannot list in etcd: {ENDPOINT}: the connection was closed",
        ),
        (Failure("UNKNOWN", "a\n  b"), StoreUnavailableError, f"cannot list in etcd: {ENDPOINT}: a b"),
        (Failure("INTERNAL", ""), StoreUnavailableError, f"cannot list in etcd: {ENDPOINT}: INTERNAL"),
    ],
)
def test_failed_call_is_one_line_that_says_who_has_to_act(failure: Failure, kind: type[Exception], line: str) -> None:
    error = explain(failure, ENDPOINT, SETTINGS, "list")
    assert type(error) is kind
    assert str(error) == line


def test_attempt_to_connect_says_what_it_met() -> None:
    closed = Failure("UNAVAILABLE", "Socket closed")
    assert why_not_connected(None, ENDPOINT) == "no answer within 3 s"
    assert why_not_connected(closed, ENDPOINT) == "the connection was closed; if it speaks TLS, write https://"
    assert why_not_connected(closed, replace(ENDPOINT, is_tls=True)) == "the connection was closed"


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (Failure("UNAUTHENTICATED", "etcdserver: invalid auth token"), True),
        (Failure("INVALID_ARGUMENT", "etcdserver: revision of auth store is old"), True),
        (Failure("INVALID_ARGUMENT", "etcdserver: user name is empty"), True),
        (Failure("PERMISSION_DENIED", "etcdserver: permission denied"), False),
    ],
)
def test_new_token_is_asked_for_when_one_would_help(failure: Failure, expected: bool) -> None:
    assert is_about_the_token(failure) is expected
