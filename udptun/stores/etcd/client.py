"""A connection to an etcd cluster that outlives its servers: endpoints, users, calls and watches.

There is one channel at a time, to one endpoint.  A call that finds the channel dead closes it, and the next call
connects anew, beginning with the next endpoint.  grpc could choose among several addresses itself.  But it cannot
choose among host names, it has no certificate for each, and it stays with a member that answers after it has lost its
cluster.

The certificates' files are read at each connect, so that renewed ones are used without a restart.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from udptun.config.store_flags import Endpoint, EtcdOptions
from udptun.core.errors import ConfigError, LeaseError, StoreUnavailableError
from udptun.stores.base import reconnect_spread_s
from udptun.stores.etcd import etcd_pb2 as pb
from udptun.stores.etcd.failures import (
    CALL_S,
    CONNECT_S,
    Failure,
    RevisionGoneError,
    explain,
    is_about_the_token,
    refusal,
    why_not_connected,
)
from udptun.stores.etcd.tls import read_files

_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response", bound=Message)

_STAGGER_S = 0.4
"""How long an endpoint has to take our connection before the next one is tried beside it, or the same one anew.

This bounds how long we go on without an endpoint that was cut off and is back.  Where many hosts may be cut off, each
further attempt at the same one waits longer by chance, see `Client.n_hosts`."""

_CHANNEL_OPTIONS = (
    # A list of 10,000 leases is 2.5 MB; grpc's own limit is 4 MB.
    ("grpc.max_receive_message_length", -1),
    # So long an attempt to connect may take.  An attempt that was given up keeps its socket until then, because grpc
    # goes on waiting for the server's first frame after the channel was closed.  The default is 20 s.
    ("grpc.min_reconnect_backoff_ms", 4_000),
    # With these two a server that is cut off is noticed after 9 s.  etcd refuses clients that ping more often than
    # every 5 s.
    ("grpc.keepalive_time_ms", 6_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    # In grpc 1.85 this timeout ends the connection; its default is a minute.
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Without it, attempts at the same endpoint share one connection attempt.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
)

_HAS_LEADER = ("hasleader", "true")
"""etcd answers at once with "no leader", instead of waiting, when its member has lost the cluster."""


@dataclass(frozen=True, slots=True)
class Method(Generic[_Request, _Response]):
    """One unary call of etcd's.  `repeats`: it may be made again after it got no answer."""

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
    """A channel to one endpoint.  It is closed when it is given up and its last user has ended."""

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
        self.n_hosts = 0
        """How many hosts there are, as far as we know: those that lose a server lose it together."""

    async def call(self, method: Method[_Request, _Response], request: _Request, operation: str) -> _Response:
        """One call; `operation` completes "cannot ..." in the message of a failure."""
        is_last_try = not method.repeats
        while True:
            connection = await self._connect(operation)
            try:
                async with _used(connection):
                    return await self._call_with_token(connection, method, request)
            except grpc.aio.AioRpcError as exc:
                error = explain(_failure(exc), connection.endpoint, self._settings, operation)
                if not isinstance(error, StoreUnavailableError):
                    raise error from exc
                if exc.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    await self._give_up(connection)
                    if not is_last_try:
                        is_last_try = True
                        continue
                raise error from exc

    async def watch(self, request: pb.WatchCreateRequest, operation: str) -> Watch:
        """A watch, whose first response says that etcd has made it.  The caller closes it."""
        connection = await self._connect(operation)
        if connection.token and connection.has_watched:
            # The token may have ended meanwhile, and a watch reports that too late.
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
        return explain(_failure(exc), connection.endpoint, self._settings, operation)

    async def refused(self, connection: _Connection, reason: str, operation: str) -> LeaseError | ConfigError:
        """What it means that a watch ended for `reason`; the connection is not used again."""
        await self._give_up(connection)
        return refusal(reason, connection.endpoint, self._settings, operation)

    async def _call_with_token(
        self, connection: _Connection, method: Method[_Request, _Response], request: _Request
    ) -> _Response:
        token = connection.token
        try:
            return await _send(connection, method, request)
        except grpc.aio.AioRpcError as exc:
            # A token ends after five minutes without a call, with a restart of etcd, and with a change of any user.
            # There is none yet when authentication was enabled after we connected.
            if not self._settings.username or not is_about_the_token(_failure(exc)):
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
            # Without the old token, which etcd would check first.
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
        """The first connection that works.  Attempts are started one after the other, see _STAGGER_S."""
        endpoints = self._settings.endpoints
        credentials = _make_credentials(self._settings) if endpoints[0].is_tls else None
        deadline_s = asyncio.get_running_loop().time() + CONNECT_S
        attempts: dict[asyncio.Task[None], _Connection] = {}
        failures: dict[Endpoint, Failure] = {}
        n_attempts = 0
        order = itertools.cycle((*endpoints[self._first :], *endpoints[: self._first]))
        try:
            while len(failures) < len(endpoints):
                left_s = deadline_s - asyncio.get_running_loop().time()
                # No further attempts beside a server that is connected and slow to answer: it has enough to do.
                is_answered = any(_is_ready(connection) for connection in attempts.values())
                if left_s <= 0 and not is_answered:
                    break
                if not is_answered:
                    endpoint = next(order)
                    if endpoint in failures:
                        continue
                    connection = _make_connection(endpoint, credentials)
                    attempts[asyncio.create_task(self._greet(connection))] = connection
                    n_attempts += 1
                wait_s = _STAGGER_S
                if n_attempts >= len(endpoints):
                    # The next attempt is at an endpoint that has not taken an earlier one.
                    wait_s += min(random.uniform(0, reconnect_spread_s(self.n_hosts)), max(0.0, left_s))
                done, _ = await asyncio.wait(attempts, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
                for attempt in done:
                    connection = attempts[attempt]
                    endpoint = connection.endpoint
                    try:
                        attempt.result()
                    except grpc.aio.AioRpcError as exc:
                        del attempts[attempt]
                        await connection.channel.close()
                        failures[endpoint] = _failure(exc)
                        error = explain(failures[endpoint], endpoint, self._settings, operation)
                        if isinstance(error, ConfigError):
                            raise error from exc
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
        said = [f"{it}: {why_not_connected(failures.get(it), it)}" for it in endpoints]
        raise StoreUnavailableError(f"cannot {operation} in etcd: {'; '.join(said)}")

    async def _greet(self, connection: _Connection) -> None:
        """Ask something that every member answers that is part of its cluster."""
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
        """Let nobody use it from now on.  It stays open for the calls under way, which closing it would cancel."""
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
        """The next response.  The first one, which says that etcd has made the watch, has to come within CALL_S.

        Raises RevisionGoneError when the history that was asked for is gone.
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
        """End it, and wait for the end: without that grpc's thread reports to a loop that is already closed."""
        self._call.cancel()
        await self._call.code()
        self._connection.n_users -= 1
        await _close_if_unused(self._connection)


def _make_credentials(settings: EtcdOptions) -> grpc.ChannelCredentials:
    files = read_files(settings)
    return grpc.ssl_channel_credentials(files.ca, files.key, files.certificate)


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
    """The last user closes a connection that was given up meanwhile."""
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
    response = await call(request, timeout=CALL_S, metadata=connection.metadata)
    if not isinstance(response, method.response):
        # grpc's None, for bytes that are no such message.
        nothing = grpc.aio.Metadata()
        raise grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, nothing, nothing, "its answer is none that etcd gives")
    return response


def _failure(exc: grpc.aio.AioRpcError) -> Failure:
    return Failure(exc.code().name, exc.details() or "")
