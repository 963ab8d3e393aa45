"""A connection to an etcd cluster that outlives its servers: endpoints, TLS, users, and what an error means.

One channel at a time, to one endpoint.  A call that finds it dead closes it, and the next call connects anew, from the
next endpoint on.  grpc could choose among several addresses itself, but not among host names, not with a certificate
for each, and it would stay with a member that answers but has lost its cluster.

The files of the certificates are read at each connect, so that renewed ones are used without a restart.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from udptun.config.flags import Endpoint, EtcdOptions
from udptun.core.errors import ConfigError, LeaseError, StoreUnavailableError
from udptun.stores.etcd import etcd_pb2 as pb

_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response", bound=Message)

CALL_S = 5.0
"""How long one call may take; etcd itself gives up after 7 s, or 5 s and twice its election timeout."""

CONNECT_S = 3.0
"""How long a round of connecting may take before it is reported as failed."""

_STAGGER_S = 0.4
"""An endpoint that does not take our connection by then gets company: the next one is tried beside it, or the same one
anew.  That bounds how long an endpoint that was cut off is back before we notice."""

_CHANNEL_OPTIONS = (
    # A list of 10,000 leases is 2.5 MB; grpc's limit is 4.
    ("grpc.max_receive_message_length", -1),
    # A server that is cut off is noticed after 9 s.  etcd refuses clients that ask more often than every 5 s.
    ("grpc.keepalive_time_ms", 6_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    # The one that ends the connection, in grpc 1.85; its default is a minute.
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Attempts at the same endpoint are to be attempts of their own.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
)

_HAS_LEADER = ("hasleader", "true")
"""etcd answers at once with "no leader", instead of waiting, when its member has lost the cluster."""


class RevisionGoneError(LeaseError):
    """The revision asked for was compacted away, or the store has not come to it yet: it was replaced."""


@dataclass(frozen=True, slots=True)
class Method(Generic[_Request, _Response]):
    """One unary call of etcd's.  `repeats`: a call that got no answer may be made again."""

    path: str
    request: type[_Request]
    response: type[_Response]
    repeats: bool


RANGE = Method("/etcdserverpb.KV/Range", pb.RangeRequest, pb.RangeResponse, True)
TXN = Method("/etcdserverpb.KV/Txn", pb.TxnRequest, pb.TxnResponse, False)
GRANT = Method("/etcdserverpb.Lease/LeaseGrant", pb.LeaseGrantRequest, pb.LeaseGrantResponse, True)
REVOKE = Method("/etcdserverpb.Lease/LeaseRevoke", pb.LeaseRevokeRequest, pb.LeaseRevokeResponse, False)
TIME_TO_LIVE = Method(
    "/etcdserverpb.Lease/LeaseTimeToLive", pb.LeaseTimeToLiveRequest, pb.LeaseTimeToLiveResponse, True
)
_AUTHENTICATE = Method("/etcdserverpb.Auth/Authenticate", pb.AuthenticateRequest, pb.AuthenticateResponse, True)
_WATCH_PATH = "/etcdserverpb.Watch/Watch"


@dataclass(slots=True)
class _Connection:
    endpoint: Endpoint
    channel: grpc.aio.Channel
    token: str = ""
    has_watched: bool = False
    n_users: int = 0
    is_given_up: bool = False

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (_HAS_LEADER, ("token", self.token)) if self.token else (_HAS_LEADER,)


class Client:
    """Calls and watches.  Every failure is a StoreUnavailableError or ConfigError of one line, as `stores.base` says.

    Nothing is opened before the first call.  May be used by several tasks of one event loop.
    """

    def __init__(self, settings: EtcdOptions) -> None:
        self._settings = settings
        self._connection: _Connection | None = None
        self._connecting = asyncio.Lock()
        self._first = 0
        """The endpoint to begin with, next time."""
        self._is_closed = False

    async def call(self, method: Method[_Request, _Response], request: _Request, operation: str) -> _Response:
        """One call; `operation` completes "cannot ..." in the message of a failure."""
        is_last_try = not method.repeats
        while True:
            connection = await self._connect(operation)
            try:
                async with _used(connection):
                    return await self._call_with_token(connection, method, request)
            except grpc.aio.AioRpcError as exc:
                error = explain(exc, connection.endpoint, self._settings, operation)
                if not isinstance(error, StoreUnavailableError):
                    raise error from exc
                if exc.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    await self._give_up(connection)
                    if not is_last_try:
                        is_last_try = True
                        continue
                raise error from exc

    async def watch(self, request: pb.WatchCreateRequest, operation: str) -> Watch:
        """A watch whose first response says that it is there; the caller closes it."""
        connection = await self._connect(operation)
        if connection.token and connection.has_watched:
            # The token may have ended meanwhile, and a watch tells that too late.
            await self._renew_token(connection, operation)
        connection.has_watched = True
        connection.n_users += 1
        open_stream = connection.channel.stream_stream(
            _WATCH_PATH,
            request_serializer=pb.WatchRequest.SerializeToString,
            response_deserializer=pb.WatchResponse.FromString,
        )
        call = open_stream(metadata=connection.metadata)
        return Watch(self, connection, call, pb.WatchRequest(create_request=request), operation)

    async def aclose(self) -> None:
        self._is_closed = True
        if self._connection is not None:
            await self._connection.channel.close()
            self._connection = None

    async def failed(
        self, connection: _Connection, exc: grpc.aio.AioRpcError, operation: str
    ) -> LeaseError | ConfigError:
        """What the end of a watch means; the connection is not used again."""
        await self._give_up(connection)
        return explain(exc, connection.endpoint, self._settings, operation)

    async def refused(self, connection: _Connection, reason: str, operation: str) -> LeaseError | ConfigError:
        """What it means that a watch ended for `reason`; the connection is not used again."""
        await self._give_up(connection)
        return _meaning(reason, f"cannot {operation} in etcd at {connection.endpoint}", self._settings)

    async def _call_with_token(
        self, connection: _Connection, method: Method[_Request, _Response], request: _Request
    ) -> _Response:
        token = connection.token
        try:
            return await _send(connection, method, request)
        except grpc.aio.AioRpcError as exc:
            # Tokens end after five minutes without a call, with a restart of etcd, and with a change of any user; there
            # was none if authentication was enabled since.
            if not self._settings.username or not _is_about_the_token(exc):
                raise
        if connection.token == token:
            await self._authenticate(connection)
        return await _send(connection, method, request)

    async def _renew_token(self, connection: _Connection, operation: str) -> None:
        try:
            await self._authenticate(connection)
        except grpc.aio.AioRpcError as exc:
            raise await self.failed(connection, exc, operation) from exc

    async def _authenticate(self, connection: _Connection) -> None:
        request = pb.AuthenticateRequest(name=self._settings.username, password=self._settings.password)
        try:
            # Without a token: etcd would look at it first.
            connection.token = (await _send(replace(connection, token=""), _AUTHENTICATE, request)).token
        except grpc.aio.AioRpcError as exc:
            if "authentication is not enabled" not in (exc.details() or ""):
                raise
            connection.token = ""

    async def _connect(self, operation: str) -> _Connection:
        async with self._connecting:
            if self._is_closed:
                raise StoreUnavailableError(f"cannot {operation} in etcd: the store was closed")
            if self._connection is None:
                self._connection = await self._race(operation)
            return self._connection

    async def _race(self, operation: str) -> _Connection:
        """The first connection that works.  One attempt is started after the other, see _STAGGER_S."""
        endpoints = self._settings.endpoints
        credentials = _read_credentials(self._settings)
        deadline_s = asyncio.get_running_loop().time() + CONNECT_S
        attempts: dict[asyncio.Task[None], _Connection] = {}
        failures: dict[Endpoint, str] = {}
        order = itertools.cycle((*endpoints[self._first :], *endpoints[: self._first]))
        try:
            while len(failures) < len(endpoints):
                left_s = deadline_s - asyncio.get_running_loop().time()
                # One that is connected and slow to answer has enough to do.
                is_answered = any(_is_ready(connection) for connection in attempts.values())
                if left_s <= 0 and not is_answered:
                    break
                if not is_answered:
                    endpoint = next(order)
                    if endpoint in failures:
                        continue
                    connection = _make_connection(endpoint, credentials)
                    attempts[asyncio.create_task(self._greet(connection))] = connection
                done, _ = await asyncio.wait(attempts, timeout=_STAGGER_S, return_when=asyncio.FIRST_COMPLETED)
                for attempt in done:
                    connection = attempts[attempt]
                    endpoint = connection.endpoint
                    try:
                        attempt.result()
                    except grpc.aio.AioRpcError as exc:
                        del attempts[attempt]
                        await connection.channel.close()
                        error = explain(exc, endpoint, self._settings, operation)
                        if isinstance(error, ConfigError):
                            raise error from exc
                        failures[endpoint] = _reason(exc)
                        if failures[endpoint] == _CLOSED and not endpoint.is_tls:
                            failures[endpoint] += "; if it speaks TLS, write https://"
                    else:
                        del attempts[attempt]
                        self._first = endpoints.index(endpoint)
                        return connection
        finally:
            for attempt in attempts:
                attempt.cancel()
            await asyncio.gather(*attempts, return_exceptions=True)
            for connection in attempts.values():
                await connection.channel.close()
        said = [f"{it}: {failures.get(it, _NO_ANSWER)}" for it in endpoints]
        raise StoreUnavailableError(f"cannot {operation} in etcd: {'; '.join(said)}")

    async def _greet(self, connection: _Connection) -> None:
        """Ask something that every member answers which is part of its cluster."""
        if self._settings.username:
            await self._authenticate(connection)
            return
        request = pb.RangeRequest(key=b"\0", count_only=True, serializable=True)
        try:
            await _send(connection, RANGE, request)
        except grpc.aio.AioRpcError as exc:
            if exc.code() is not grpc.StatusCode.PERMISSION_DENIED:
                raise

    async def _give_up(self, connection: _Connection) -> None:
        """Let nobody use it from now on.  Who does already goes on: closing it would cancel their tasks, to grpc."""
        if self._connection is connection:
            self._connection = None
            self._first = (self._first + 1) % len(self._settings.endpoints)
        connection.is_given_up = True
        await _close_if_unused(connection)


class Watch:
    """An open watch: `read` until it raises."""

    def __init__(
        self,
        client: Client,
        connection: _Connection,
        call: grpc.aio.StreamStreamCall[Message, pb.WatchResponse],
        request: pb.WatchRequest,
        operation: str,
    ) -> None:
        self._client = client
        self._connection = connection
        self._call = call
        self._request: pb.WatchRequest | None = request
        self._operation = operation

    async def read(self) -> pb.WatchResponse:
        """The next response; the first, which says that the watch is there, is waited for no longer than for a call.

        RevisionGoneError when the history that was asked for is gone.
        """
        try:
            async with asyncio.timeout(CALL_S if self._request is not None else None):
                if self._request is not None:
                    await self._call.write(self._request)
                response = await self._call.read()
                self._request = None
        except grpc.aio.AioRpcError as exc:
            raise await self._client.failed(self._connection, exc, self._operation) from exc
        except TimeoutError:
            raise await self._client.refused(
                self._connection, f"no answer within {CALL_S:.0f} s", self._operation
            ) from None
        if not isinstance(response, pb.WatchResponse):  # grpc's EOF
            raise await self._client.refused(self._connection, "etcd ended the watch", self._operation)
        if response.compact_revision:
            raise RevisionGoneError(f"compacted up to {response.compact_revision}")
        if response.canceled:
            raise await self._client.refused(self._connection, response.cancel_reason, self._operation)
        return response

    async def close(self) -> None:
        """End it, and wait for the end: grpc's thread would tell a loop that is no more."""
        self._call.cancel()
        await self._call.code()
        self._connection.n_users -= 1
        await _close_if_unused(self._connection)


def _make_connection(endpoint: Endpoint, credentials: grpc.ChannelCredentials | None) -> _Connection:
    if credentials is None:
        channel = grpc.aio.insecure_channel(endpoint.address, options=_CHANNEL_OPTIONS)
    else:
        channel = grpc.aio.secure_channel(endpoint.address, credentials, options=_CHANNEL_OPTIONS)
    return _Connection(endpoint, channel)


def _is_ready(connection: _Connection) -> bool:
    """Whether the server has answered on the level of HTTP/2."""
    return connection.channel.get_state() is grpc.ChannelConnectivity.READY


@asynccontextmanager
async def _used(connection: _Connection) -> AsyncIterator[None]:
    """Whoever uses a connection that is given up meanwhile closes it."""
    connection.n_users += 1
    try:
        yield
    finally:
        connection.n_users -= 1
        await _close_if_unused(connection)


async def _close_if_unused(connection: _Connection) -> None:
    if connection.is_given_up and not connection.n_users:
        await connection.channel.close()


async def _send(connection: _Connection, method: Method[_Request, _Response], request: _Request) -> _Response:
    call = connection.channel.unary_unary(
        method.path,
        request_serializer=method.request.SerializeToString,
        response_deserializer=method.response.FromString,
    )
    return await call(request, timeout=CALL_S, metadata=connection.metadata)


def _read_credentials(settings: EtcdOptions) -> grpc.ChannelCredentials | None:
    """None: not encrypted.  Raises ConfigError for a file that cannot be used, which grpc would not name."""
    if not settings.endpoints[0].is_tls:
        return None
    ca, certificate, key = (
        _read(flag, path)
        for flag, path in (
            ("--etcd-cafile", settings.cafile),
            ("--etcd-certfile", settings.certfile),
            ("--etcd-keyfile", settings.keyfile),
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if settings.cafile is not None:
            context.load_verify_locations(settings.cafile)
    except (ssl.SSLError, ValueError) as exc:
        raise ConfigError(f"cannot use --etcd-cafile {settings.cafile}: {_openssl(exc)}; it must be PEM") from exc
    try:
        if settings.certfile is not None:
            # An empty password: without one OpenSSL would ask on the terminal.
            context.load_cert_chain(settings.certfile, settings.keyfile, password="")
    except (ssl.SSLError, ValueError) as exc:
        raise ConfigError(
            f"cannot use --etcd-certfile {settings.certfile} with --etcd-keyfile {settings.keyfile}: {_openssl(exc)}; "
            "they must be a certificate and its key without a password, in PEM"
        ) from exc
    return grpc.ssl_channel_credentials(ca, key, certificate)


def _read(flag: str, path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as exc:
        raise ConfigError(f"cannot read {flag} {path}: {exc.strerror or exc}") from exc


def _openssl(exc: ssl.SSLError | ValueError) -> str:
    return (exc.reason or str(exc)).lower().replace("_", " ") if isinstance(exc, ssl.SSLError) else str(exc)


def explain(
    exc: grpc.aio.AioRpcError, endpoint: Endpoint, settings: EtcdOptions, operation: str
) -> LeaseError | ConfigError:
    """What a failed call means to the caller (see `udptun.stores.base`), in one line."""
    details = exc.details() or ""
    if details.startswith("etcdserver: ") or exc.code() is grpc.StatusCode.PERMISSION_DENIED:
        return _meaning(details, f"cannot {operation} in etcd at {endpoint}", settings)
    return StoreUnavailableError(f"cannot {operation} in etcd: {endpoint}: {_reason(exc)}")


def _meaning(said: str, prefix: str, settings: EtcdOptions) -> LeaseError | ConfigError:
    """What etcd's own message means, with what to do about it."""
    text = re.sub(r"^(rpc error: code = \w+ desc = )?(etcdserver: )?", "", said)
    if "required revision" in text:
        return RevisionGoneError(text)
    for pattern, advice in _CONFIG_ADVICE.items():
        if pattern in text:
            return ConfigError(f"{prefix}: {text}; {advice.format(user=settings.username or 'without name')}")
    for pattern, advice in _ADVICE.items():
        if pattern in text:
            return StoreUnavailableError(f"{prefix}: {text}; {advice}")
    return StoreUnavailableError(f"{prefix}: {text}")


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


_CLOSED = "the connection was closed"


def _reason(exc: grpc.aio.AioRpcError) -> str:
    """What went wrong on the way to an endpoint, in words that stay the same while it stays wrong."""
    details = exc.details() or ""
    if details.startswith("etcdserver: "):
        return details.removeprefix("etcdserver: ")
    for pattern, words in _TRANSPORT:
        match = re.search(pattern, details)
        if match is not None:
            return match.expand(words)
    if exc.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"no answer within {CALL_S:.0f} s"
    if re.search(r"Socket closed|Stream removed|Connection reset|GOAWAY|Broken pipe|FD Shutdown", details):
        return _CLOSED
    return " ".join(details.split()) or exc.code().name


def _is_about_the_token(exc: grpc.aio.AioRpcError) -> bool:
    details = exc.details() or ""
    if exc.code() is grpc.StatusCode.UNAUTHENTICATED:
        return True
    return "revision of auth store is old" in details or "user name is empty" in details
