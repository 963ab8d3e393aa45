"""How the kube store finds the API server and says who it is: kubeconfigs of every kind, over real TLS."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kube_server import MISSING, TOKEN

from udptun.config.flags import parse_daemon_flags
from udptun.core.errors import ConfigError, StoreUnavailableError

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}"),
    pytest.mark.xdist_group("kube"),
]


@dataclass
class Server:
    """An API server that takes a token, or basic authentication as one, and asks for a client's certificate."""

    api: Any
    authority: Any
    directory: Path

    def kubeconfig(self, user: Mapping[str, object], cluster: Mapping[str, object] | None = None) -> Path:
        path = self.directory / "kubeconfig"
        there = {"certificate-authority": "ca.pem"} if cluster is None else cluster
        value = {
            "clusters": [{"name": "c", "cluster": {"server": self.api.url, **there}}],
            "users": [{"name": "u", "user": user}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }
        path.write_text(json.dumps(value))
        return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from etcd_server import Authority

    from udptun.lab.kube_api.server import ApiServer

    directory = tmp_path_factory.mktemp("access")
    authority = Authority(directory / "tls")
    pair = authority.issue("apiserver")
    (directory / "ca.pem").write_bytes(authority.certificate.read_bytes())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    context.load_verify_locations(authority.certificate)
    context.verify_mode = ssl.CERT_OPTIONAL
    with ExitStack() as undo:
        api = undo.enter_context(ApiServer(tls=context, tokens={TOKEN: None}))
        api.do(lambda it: it.add_node("n1", "10.0.1.0/24"))
        yield Server(api, authority, directory)


async def read_nodes(kubeconfig: Path, *flags: str) -> bytes:
    from udptun.stores.kube.client import Client

    argv = ["--kube-subnet-mgr", f"--kubeconfig-file={kubeconfig}", *flags]
    client = Client(parse_daemon_flags(argv, {"NODE_NAME": "n1"}).kube)
    try:
        return bytes(await client.ask("GET", "/api/v1/nodes", "list the nodes"))
    finally:
        await client.aclose()


async def test_a_token_and_a_ca_beside_the_kubeconfig(server: Server) -> None:
    assert b'"n1"' in await read_nodes(server.kubeconfig({"token": TOKEN}))


async def test_a_name_and_a_password(server: Server) -> None:
    server.api.tokens["Basic bmFtZTpw"] = None
    assert b'"n1"' in await read_nodes(server.kubeconfig({"username": "name", "password": "p"}))


async def test_a_program_that_prints_a_token_and_another_one_when_that_is_refused(server: Server) -> None:
    program = server.directory / "login"
    program.write_text(
        "#!/bin/sh\necho run >>$0.runs\n"
        f'echo "{{\\"status\\": {{\\"token\\": \\"$([ -e $0.wrong ] && echo wrong || echo {TOKEN})\\"}}}}"\n'
    )
    program.chmod(0o755)
    said = {"apiVersion": "client.authentication.k8s.io/v1beta1", "command": str(program)}
    assert b'"n1"' in await read_nodes(server.kubeconfig({"exec": said}))
    assert Path(f"{program}.runs").read_text() == "run\n"
    Path(f"{program}.wrong").touch()
    with pytest.raises(StoreUnavailableError, match="answers 401 Unauthorized"):
        await read_nodes(server.kubeconfig({"exec": said}))
    program.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(StoreUnavailableError, match=r"Exec .*login returned 3"):
        await read_nodes(server.kubeconfig({"exec": said}))


async def test_a_clients_certificate(server: Server) -> None:
    pair = server.authority.issue("client")
    user = {"client-certificate": str(pair.certificate), "client-key": str(pair.key), "token": TOKEN}
    seen: list[object] = []
    converse = server.api._converse

    async def look(connection: Any) -> None:
        seen.append(connection._writer.get_extra_info("peercert"))
        await converse(connection)

    server.api._converse = look
    try:
        await read_nodes(server.kubeconfig(user))
        await read_nodes(server.kubeconfig({"token": TOKEN}))
    finally:
        server.api._converse = converse
    assert [bool(each) for each in seen] == [True, False]


async def test_a_server_that_no_ca_of_ours_vouches_for_is_refused_unless_told(server: Server) -> None:
    with pytest.raises(StoreUnavailableError, match="certificate verify failed"):
        await read_nodes(server.kubeconfig({"token": TOKEN}, {}))
    assert b'"n1"' in await read_nodes(server.kubeconfig({"token": TOKEN}, {"insecure-skip-tls-verify": True}))


async def test_the_url_of_the_flag_goes_before_that_of_the_kubeconfig(server: Server) -> None:
    elsewhere = server.kubeconfig({"token": TOKEN}, {"certificate-authority": "ca.pem", "server": "https://192.0.2.1"})
    assert b'"n1"' in await read_nodes(elsewhere, f"--kube-api-url={server.api.url}")


async def test_a_url_that_cannot_be_asked_is_one_line(server: Server) -> None:
    with pytest.raises(ConfigError, match="is no use: 'somewhere' is no URL of a server"):
        await read_nodes(server.kubeconfig({"token": TOKEN}), "--kube-api-url=somewhere")


async def test_a_token_file_that_is_gone_is_one_line_and_tried_again(server: Server) -> None:
    from udptun.stores.kube.client import Client

    token = server.directory / "token"
    token.write_text("old")
    kubeconfig = server.kubeconfig({"tokenFile": str(token)})
    argv = ["--kube-subnet-mgr", f"--kubeconfig-file={kubeconfig}"]
    client = Client(parse_daemon_flags(argv, {"NODE_NAME": "n1"}).kube)
    with pytest.raises(StoreUnavailableError, match="answers 401"):
        await client.ask("GET", "/api/v1/nodes", "list the nodes")
    token.unlink()
    with pytest.raises(StoreUnavailableError, match=r"Token file .* not found"):
        await client.ask("GET", "/api/v1/nodes", "list the nodes")
    token.write_text(f"{TOKEN}\n")
    assert b'"n1"' in bytes(await client.ask("GET", "/api/v1/nodes", "list the nodes"))
    await client.aclose()


@asynccontextmanager
async def _proxy(asked: list[str]) -> Any:
    """One that connects to whatever it is asked for."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        asked.append(head.split("\r\n")[0])
        theirs = await asyncio.open_connection("127.0.0.1", int(head.split()[1].rpartition(":")[2]))
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await asyncio.gather(carry(reader, theirs[1]), carry(theirs[0], writer), return_exceptions=True)

    proxy = await asyncio.start_server(connect, "127.0.0.1", 0)
    async with proxy:
        yield proxy.sockets[0].getsockname()[1]


async def test_tls_goes_through_the_proxy_of_the_environment_unless_it_excepts_the_server(server: Server) -> None:
    from udptun.stores.kube.client import Client

    asked: list[str] = []
    port_of_server = server.api.url.rpartition(":")[2]
    # What is on this host needs no proxy.  The proxy itself is this host.
    kubeconfig = server.kubeconfig(
        {"token": TOKEN}, {"server": f"https://192.0.2.1:{port_of_server}", "insecure-skip-tls-verify": True}
    )
    async with _proxy(asked) as port:
        environ = {"NODE_NAME": "n1", "HTTPS_PROXY": f"127.0.0.1:{port}", "no_proxy": "10.0.0.0/8"}
        argv = ["--kube-subnet-mgr", f"--kubeconfig-file={kubeconfig}"]
        client = Client(parse_daemon_flags(argv, environ).kube)
        assert b'"n1"' in bytes(await client.ask("GET", "/api/v1/nodes", "list the nodes"))
        await client.aclose()
        assert b'"n1"' in await read_nodes(server.kubeconfig({"token": TOKEN}))
    assert asked == [f"CONNECT 192.0.2.1:{port_of_server} HTTP/1.1"]
