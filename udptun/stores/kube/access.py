"""Where the API server is and who we are, as lightkube reads it: a pod's service account, or a kubeconfig.

Of lightkube the configuration, TLS and credentials are used, without the models of every Kubernetes object and without
the HTTP client (httpx2) that it has them for: 8 MB and a quarter second at each start.  How that goes on to work with
other releases of lightkube: docs/decisions/0008-how-the-kube-store-speaks-http.md.
"""

from __future__ import annotations

import base64
import importlib
import ssl
import sys
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from udptun.config.store_flags import KubeOptions
from udptun.kernel.lean_import import import_without_init, stand_ins
from udptun.stores.kube.http import Answer, Auth, Request, needs_proxy

if TYPE_CHECKING:
    from lightkube.config.kubeconfig import SingleConfig


class _Auth:
    """What lightkube's classes of credentials derive from; `auth_flow` is theirs."""

    def auth_flow(self, request: Request) -> Generator[Request, Answer, None]:
        yield request

    async def async_auth_flow(self, request: Request) -> AsyncGenerator[Request, Answer]:
        flow = self.auth_flow(request)
        sent = next(flow)
        while True:
            answer = yield sent
            try:
                sent = flow.send(answer)
            except StopIteration:
                return


class _BasicAuth(_Auth):
    def __init__(self, username: str, password: str) -> None:
        self._value = f"Basic {base64.b64encode(f'{username}:{password}'.encode()).decode()}"

    def auth_flow(self, request: Request) -> Generator[Request, Answer, None]:
        request.headers["Authorization"] = self._value
        yield request


def _tls_context(*, verify: bool = True, trust_env: bool = True) -> ssl.SSLContext:
    """For a server whose CA the kubeconfig does not name: one that this system trusts, or none."""
    context = ssl.create_default_context()
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


_MENTIONED = ("AsyncClient", "BaseTransport", "Client", "HTTPStatusError", "Request", "Response", "Timeout")
"""Names of httpx2 that lightkube only mentions, in annotations and as a base of exceptions."""


class _Httpx2(ModuleType):
    """In the place of httpx2.  Other names than these are no attributes, so what needs them cannot be imported."""

    Auth = _Auth
    BasicAuth = _BasicAuth
    create_ssl_context = staticmethod(_tls_context)

    def __init__(self) -> None:
        super().__init__("httpx2")
        self.__dict__.update({name: type(name, (Exception,), {}) for name in _MENTIONED})


class _Yaml(ModuleType):
    """In the place of yaml, which a pod has no use for."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module("yaml"), name)


def _import_lightkube() -> None:
    models = ModuleType("lightkube.core.internal_models")
    models.__dict__["meta_v1"] = None
    try:
        with stand_ins(models, _Httpx2(), _Yaml("yaml")):
            import_without_init("lightkube", "config.client_adapter")
    except Exception:
        # A release of lightkube that needs more than that.  With the real ones all works and is larger.
        for name in [name for name in sys.modules if f"{name}.".startswith("lightkube.")]:
            del sys.modules[name]
        import_without_init("lightkube", "config.client_adapter")


_import_lightkube()
from lightkube.config import client_adapter  # noqa: E402
from lightkube.config.kubeconfig import KubeConfig  # noqa: E402
from lightkube.config.models import User  # noqa: E402
from lightkube.core import exceptions  # noqa: E402

CredentialsError = exceptions.ConfigError
"""What the credentials raise when they are asked for, as where the token's file is gone."""


@dataclass(frozen=True, slots=True)
class Access:
    """The server's URL, how to trust it, how to say who we are, and the proxy's URL; empty without one."""

    url: str
    tls: ssl.SSLContext | None
    auth: Auth | None
    proxy: str


def find_access(options: KubeOptions) -> Access:
    """As the flags say.  Raises whatever YAML, msgspec, ssl and lightkube say of a file that somebody wrote."""
    config = _config(options)
    url = config.cluster.server
    is_tls = url.startswith("https:")
    user: Any = config.user
    tls = client_adapter.verify_cluster(config.cluster, user, config.abs_file) if is_tls else None
    auth: Any = client_adapter.user_auth(user)
    proxy = options.https_proxy if is_tls else options.http_proxy
    return Access(url, tls, auth, proxy if needs_proxy(url, options.no_proxy) else "")


def _config(options: KubeOptions) -> SingleConfig:
    """As client-go finds it: the flags, else the pod's service account, else the user's own kubeconfig."""
    if options.kubeconfig_file:
        found = KubeConfig.from_file(options.kubeconfig_file).get()
    elif options.kube_api_url:
        found = KubeConfig.from_server(options.kube_api_url).get()
    else:
        found = KubeConfig.from_env().get()
    assert found is not None
    if options.kube_api_url:
        found.cluster.server = options.kube_api_url
    return found._replace(user=found.user or User())
