"""When a call to etcd counts as failed, and what that means to the caller.  Pure: texts in, one of our errors out.

Each message is one line, and it stays the same while the failure does: whoever repeats a call logs it once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from udptun.config.store_flags import Endpoint, EtcdOptions
from udptun.core.errors import ConfigError, LeaseError, StoreUnavailableError

CALL_S = 5.0
"""How long one call may take.  etcd itself gives up after 7 s, or after 5 s and twice its election timeout."""

CONNECT_S = 3.0
"""How long a round of connecting may take before it is reported as failed."""


class RevisionGoneError(LeaseError):
    """etcd does not have the revision asked for: it was compacted away, or etcd was put back to an earlier state."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed call as grpc reports it: the name of the status code, and the text of etcd or of the transport."""

    code: str
    details: str


def explain(failure: Failure, endpoint: Endpoint, settings: EtcdOptions, operation: str) -> LeaseError | ConfigError:
    """What a failed call means (see `udptun.stores.base`); `operation` completes "cannot ..."."""
    if failure.details.startswith("etcdserver: ") or failure.code == "PERMISSION_DENIED":
        return refusal(failure.details, endpoint, settings, operation)
    return StoreUnavailableError(f"cannot {operation} in etcd: {endpoint}: {_reason(failure)}")


def refusal(said: str, endpoint: Endpoint, settings: EtcdOptions, operation: str) -> LeaseError | ConfigError:
    """What etcd's own message `said` means, with what to do about it."""
    text = re.sub(r"^(rpc error: code = \w+ desc = )?(etcdserver: )?", "", said)
    if "required revision" in text:
        return RevisionGoneError(text)
    message = f"cannot {operation} in etcd at {endpoint}: {text}"
    for pattern, advice in _CONFIG_ADVICE.items():
        if pattern in text:
            return ConfigError(f"{message}; {advice.format(user=settings.username or 'without name')}")
    for pattern, advice in _ADVICE.items():
        if pattern in text:
            return StoreUnavailableError(f"{message}; {advice}")
    return StoreUnavailableError(message)


def why_not_connected(failure: Failure | None, endpoint: Endpoint) -> str:
    """Why an attempt to connect to the endpoint failed; None: it was still waiting after CONNECT_S."""
    if failure is None:
        return _NO_ANSWER
    reason = _reason(failure)
    return f"{reason}; if it speaks TLS, write https://" if reason == _CLOSED and not endpoint.is_tls else reason


def is_about_the_token(failure: Failure) -> bool:
    """Whether a new token would help."""
    if failure.code == "UNAUTHENTICATED":
        return True
    return "revision of auth store is old" in failure.details or "user name is empty" in failure.details


_CONFIG_ADVICE: Mapping[str, str] = {
    "invalid user ID or password": "mend --etcd-username and --etcd-password",
    "user name is empty": "it wants a user: give --etcd-username and --etcd-password",
    "permission denied": "the user {user} needs a role with readwrite on the prefix (etcdctl role grant-permission)",
}

_ADVICE: Mapping[str, str] = {
    "no leader": "most of its members are down or cut off; trying again",
    "request timed out": "its members do not reach each other, or its disk is slow; trying again",
    "database space exceeded": "it takes nothing new until it is compacted and defragmented and the alarm is "
    "disarmed (etcdctl compact, defrag, alarm disarm); trying again",
    "invalid auth token": "trying again with a new one",
}

_NO_ANSWER = f"no answer within {CONNECT_S:.0f} s"

_CLOSED = "the connection was closed"

_TRANSPORT = (
    (r"Connection refused", "connection refused"),
    (r"Connection timed out", _NO_ANSWER),
    (r"CERTIFICATE_VERIFY_FAILED: certificate has expired", "its TLS certificate has expired"),
    (r"CERTIFICATE_VERIFY_FAILED: certificate is not yet valid", "its TLS certificate is not valid yet"),
    (
        r"CERTIFICATE_VERIFY_FAILED: (?:unable to get (?:local )?issuer certificate|self[- ]signed certificate)",
        "its TLS certificate is signed by none of the CAs in --etcd-cafile (without it: the system's)",
    ),
    (r"CERTIFICATE_VERIFY_FAILED: (.*?)(?:: OK)?$", r"its TLS certificate is refused: \1"),
    (r"Hostname Verification Check failed", "its TLS certificate is not for this name or address"),
    (r"Unwrap failed", "it refuses our TLS client certificate; see --etcd-certfile and --etcd-keyfile"),
    (r"Handshake read failed|WRONG_VERSION_NUMBER", "it does not speak TLS; is it an http:// endpoint?"),
    (r"hostname lookup error.*: ([^:\]]+)\]?$", r"the name cannot be resolved: \1"),
    (r"Network is unreachable|No route to host", "no route to it"),
    (r"(?:ping|keepalive watchdog) timeout", "no answer to keepalive pings"),
)
"""What grpc's texts (1.85) mean, in our words."""


def _reason(failure: Failure) -> str:
    """What went wrong on the way to an endpoint."""
    details = failure.details
    if details.startswith("etcdserver: "):
        return details.removeprefix("etcdserver: ")
    for pattern, words in _TRANSPORT:
        match = re.search(pattern, details)
        if match is not None:
            return match.expand(words)
    if failure.code == "DEADLINE_EXCEEDED":
        return f"no answer within {CALL_S:.0f} s"
    if re.search(r"Socket closed|Stream removed|Connection reset|GOAWAY|Broken pipe|FD Shutdown", details):
        return _CLOSED
    return " ".join(details.split()) or failure.code
