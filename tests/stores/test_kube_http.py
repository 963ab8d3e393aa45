"""The kube store's HTTP client against servers that answer byte by byte what a test says."""

from __future__ import annotations

import asyncio
import gzip
import ssl
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from udptun.stores.kube import client as kube_client
from udptun.stores.kube import http
from udptun.stores.kube.http import Answer, Auth, Http, HttpError, HttpTimeoutError, Request, needs_proxy

OK = b"HTTP/1.1 200 OK\r\n"


@dataclass
class Script:
    """A server.  Of each list of `answers` it gives one connection an answer for each request, and ends it then."""

    answers: list[Sequence[bytes]]
    port: int = 0
    requests: list[str] = field(default_factory=list)
    n_connections: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.n_connections += 1
        try:
            for answer in self.answers.pop(0):
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next((it for it in head.split("\r\n") if it.startswith("Content-Length: ")), "0")
                body = await reader.readexactly(int(length.removeprefix("Content-Length: ")))
                self.requests.append(head + body.decode())
                writer.write(answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def serving(*answers: Sequence[bytes]) -> AsyncIterator[Script]:
    script = Script(list(answers))
    server = await asyncio.start_server(script.serve, "127.0.0.1", 0)
    script.port = server.sockets[0].getsockname()[1]
    async with server:
        yield script


def client(script: Script, auth: Auth | None = None, path: str = "") -> Http:
    return Http(f"http://127.0.0.1:{script.port}{path}", None, auth, "test/1")


async def get(asking: Http, target: str = "/a?b=c", *, seconds: float = 10) -> tuple[int, bytes]:
    request = Request("GET", target, {"Accept": "application/json"})
    async with asking.ask(request, seconds, seconds) as answer:
        return answer.status_code, b"".join([chunk async for chunk in answer.chunks])


CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (OK + b"Content-Length: 3\r\n\r\nabc", b"abc"),
        (OK + b"content-length:0\r\n\r\n", b""),
        (OK + b"\r\nuntil the end", b"until the end"),
        (OK + CHUNKED + b"3\r\nabc\r\nA;x=y\r\n0123456789\r\n0\r\n\r\n", b"abc0123456789"),
        (OK + CHUNKED + b"1\r\na\r\n0\r\nTrailer: x\r\n\r\n", b"a"),
        (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK + b"Content-Length: 1\r\n\r\na", b"a"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    ],
)
async def test_a_body_ends_where_its_head_says(answer: bytes, body: bytes) -> None:
    async with serving([answer]) as script:
        asking = client(script)
        assert (await get(asking))[1] == body
        asking.close()
    (request,) = script.requests
    assert request == (
        f"GET /a?b=c HTTP/1.1\r\nHost: 127.0.0.1:{script.port}\r\nUser-Agent: test/1\r\n"
        "Accept: application/json\r\n\r\n"
    )


async def test_what_is_zipped_is_unzipped_and_half_of_it_is_an_error() -> None:
    text = b"nodes " * 100_000
    zipped = gzip.compress(text)
    head = OK + b"Content-Encoding: gzip\r\nContent-Length: "
    whole = head + str(len(zipped)).encode() + b"\r\n\r\n" + zipped
    half = head + b"20\r\n\r\n" + zipped[:20]
    junk = head + b"4\r\n\r\njunk"
    async with serving([whole, half, junk], [junk], [junk]) as script:
        asking = client(script)
        assert (await get(asking))[1] == text
        with pytest.raises(HttpError, match="ends in the middle"):
            await get(asking)
        with pytest.raises(HttpError, match="no gzip"):
            await get(asking)
        asking.close()


async def test_what_is_zipped_comes_in_pieces_however_much_it_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of 32 KiB became 32 MiB at once, and a body had no end."""
    zipped = gzip.compress(bytes(50 << 20))
    head = OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(zipped)
    async with serving([head + zipped], [head + zipped]) as script:
        asking = client(script)
        async with asking.ask(Request("GET", "/a", {}), 10, 10) as answer:
            sizes = [len(chunk) async for chunk in answer.chunks]
        assert sum(sizes) == 50 << 20
        assert max(sizes) <= http._UNZIPPED
        monkeypatch.setattr(kube_client, "_LARGEST_BODY", 20 << 20)
        with pytest.raises(HttpError, match="the answer has more than 20 MiB"):
            async with asking.ask(Request("GET", "/a", {}), 10, 10) as answer:
                await kube_client._body_of(answer)
        asking.close()


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (b"", "ended in the middle"),
        (b"HTTP/1.1 200", "ended in the middle"),
        (OK + b"Content-Length: 9\r\n\r\nabc", "ended in the middle"),
        (OK + CHUNKED + b"5\r\nabc", "ended in the middle"),
        (OK + CHUNKED + b"3\r\nabc\r\n", "ended in the middle"),
        (OK + CHUNKED + b"3\r\nabcdef\r\n0\r\n\r\n", "malformed chunk footer"),
        (OK + CHUNKED + b"many\r\nabc\r\n", r"illegal chunk header: bytearray\(b'many"),
        (OK + b"Content-Length: -1\r\n\r\n", "bad Content-Length"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", r"does not speak HTTP: illegal status line: bytearray\(b'SSH-2\.0"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000 + b"\r\n\r\n", "Receive buffer too long"),
    ],
)
async def test_half_an_answer_and_what_is_none_are_errors(answer: bytes, line: str) -> None:
    async with serving([answer]) as script:
        asking = client(script)
        with pytest.raises(HttpError, match=line):
            await get(asking)
        asking.close()
    assert script.n_connections == 1


@pytest.mark.parametrize("answer", [b"", OK, OK + b"Content-Length: 9\r\n\r\nabc"], ids=["head", "half", "body"])
async def test_a_server_that_says_nothing_more_is_not_waited_for(answer: bytes) -> None:
    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await reader.read()
        writer.close()

    async with await asyncio.start_server(hang, "127.0.0.1", 0) as server:
        asking = Http(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", None, None, "test/1")
        with pytest.raises(HttpTimeoutError, match=r"nothing has come for 0\.1 s"):
            await get(asking, seconds=0.1)


async def test_a_connection_is_kept_for_the_next_request_until_the_server_has_ended_it() -> None:
    one = OK + b"Content-Length: 1\r\n\r\na"
    last = OK + b"Content-Length: 1\r\nConnection: close\r\n\r\na"
    async with serving([one, one, one], [last], [one]) as script:
        asking = client(script)
        for n_connections in (1, 1, 1):
            assert await get(asking) == (200, b"a")
            assert script.n_connections == n_connections
        # The server ends it after the third.
        for n_connections in (2, 3):
            assert await get(asking) == (200, b"a")
            assert script.n_connections == n_connections
        asking.close()


async def test_a_request_on_a_kept_connection_that_ends_at_that_moment_is_sent_again() -> None:
    one = OK + b"Content-Length: 1\r\n\r\na"
    async with serving([one, b""], [one]) as script:
        asking = client(script)
        assert await get(asking) == (200, b"a")
        assert await get(asking) == (200, b"a")
        asking.close()
    assert (script.n_connections, len(script.requests)) == (2, 3)


async def test_a_connection_that_nobody_needs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_IDLE_S", 0.05)
    one = OK + b"Content-Length: 1\r\n\r\na"
    async with serving([one, one], [one]) as script:
        asking = client(script)
        await get(asking)
        async with asyncio.timeout(10):
            while asking._idle:
                await asyncio.sleep(0.01)
        await get(asking)
        asking.close()
    assert script.n_connections == 2


async def test_an_answer_that_is_left_in_the_middle_ends_its_connection() -> None:
    one = OK + b"Content-Length: 100000\r\n\r\n" + bytes(100_000)
    async with serving([one], [one]) as script:
        asking = client(script)
        for _ in range(2):
            async with asking.ask(Request("GET", "/", {}), 10, 10):
                pass
        asking.close()
    assert script.n_connections == 2


class Credentials:
    """As lightkube's of a token in a file."""

    def __init__(self, *tokens: str) -> None:
        self.tokens = tokens

    async def async_auth_flow(self, request: Request) -> AsyncGenerator[Request, Answer]:
        for token in self.tokens:
            request.headers["Authorization"] = f"Bearer {token}"
            answer = yield request
            if answer.status_code != 401:
                return


async def test_a_request_that_is_refused_is_sent_again_with_other_credentials() -> None:
    refused = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\nno"
    async with serving([refused], [OK + b"Content-Length: 1\r\n\r\na"], [refused], [refused]) as script:
        asking = client(script, Credentials("old", "new"))
        assert await get(asking) == (200, b"a")
        assert [it.split("Authorization: ")[1].split("\r\n")[0] for it in script.requests] == [
            "Bearer old",
            "Bearer new",
        ]
        asking.close()
        assert await get(asking) == (401, b"no")
        asking.close()


async def test_a_body_is_sent_and_a_server_may_have_a_path() -> None:
    async with serving([OK + b"Content-Length: 0\r\n\r\n"]) as script:
        asking = client(script, path="/k8s/clusters/c-1/")
        async with asking.ask(Request("PATCH", "/api", {"Content-Type": "x"}, b"{}"), 10, 10) as answer:
            assert answer.status_code == 200
        asking.close()
    (request,) = script.requests
    assert request.startswith("PATCH /k8s/clusters/c-1/api HTTP/1.1\r\n")
    assert request.endswith("Content-Type: x\r\nContent-Length: 2\r\n\r\n{}")


async def test_a_token_of_two_lines_is_named_and_not_sent() -> None:
    async with serving([OK]) as script:
        asking = client(script, Credentials("a\nsecret"))
        with pytest.raises(HttpError, match="does the token's file have several lines") as raised:
            await get(asking)
    assert script.requests == []
    assert "secret" not in "".join(traceback.format_exception(raised.value, limit=0))


@pytest.mark.parametrize("url", ["", "host", "ftp://host", "https://", "http://host:0", "http://host:port"])
def test_what_is_no_url_of_a_server_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"no URL of a server|[Pp]ort"):
        Http(url, None, None, "test/1")


# --- proxies


async def test_a_proxy_is_asked_for_a_server_without_tls() -> None:
    async with serving([OK + b"Content-Length: 1\r\n\r\np"]) as proxy:
        asking = Http("http://api.example.org:8080", None, None, "test/1", f"127.0.0.1:{proxy.port}")
        assert await get(asking) == (200, b"p")
        asking.close()
    assert proxy.requests[0].startswith(
        "GET http://api.example.org:8080/a?b=c HTTP/1.1\r\nHost: api.example.org:8080\r\n"
    )


async def test_a_proxy_is_asked_to_connect_to_a_server_with_tls() -> None:
    """That TLS works over it, tests/stores/test_kube_access.py shows."""
    async with serving([b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n"]) as proxy:
        tls = ssl.create_default_context()
        asking = Http("https://api.example.org", tls, None, "test/1", f"http://a:b%2F@127.0.0.1:{proxy.port}")
        with pytest.raises(HttpError, match=r"the proxy 127\.0\.0\.1 answers 407"):
            await get(asking)
    (request,) = proxy.requests
    assert request == (
        "CONNECT api.example.org:443 HTTP/1.1\r\nHost: api.example.org:443\r\n"
        "Proxy-Authorization: Basic YTpiLw==\r\n\r\n"
    )


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1080", "https://127.0.0.1", "http://"])
def test_a_proxy_of_another_kind_is_named(proxy: str) -> None:
    with pytest.raises(ValueError, match=rf"the proxy {proxy} cannot be used"):
        Http("http://api.example.org", None, None, "test/1", proxy)


@pytest.mark.parametrize(
    ("host", "exceptions", "is_needed"),
    [
        ("api.example.org", "", True),
        ("api.example.org", "example.org", False),
        ("api.example.org", ".example.org", False),
        ("api.example.org", "*.example.org", False),
        ("api.example.org", "ample.org,10.0.0.0/8", True),
        ("api.example.org", "localhost, api.example.org", False),
        ("api.example.org", "*", False),
        ("10.96.0.1", "10.96.0.0/12", False),
        ("10.96.0.1", "10.96.0.1", False),
        ("10.96.0.1", "192.168.0.0/16,.svc,many/more", True),
        ("[fd00::1]", "fd00::/8", False),
        ("127.0.0.1", "", False),
        ("localhost", "", False),
    ],
)
def test_servers_without_proxy_are_named_by_domain_address_or_subnet(
    host: str, exceptions: str, is_needed: bool
) -> None:
    """client-go's rules.  Clusters write the subnets of their services there."""
    assert needs_proxy(f"https://{host}:6443", exceptions) is is_needed
