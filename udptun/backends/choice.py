"""Which backend a configuration gets on this host, and why.  Pure."""

from __future__ import annotations

from udptun.backends.base import Backend
from udptun.backends.udp import Udp
from udptun.config import BackendConf, UdpBackend
from udptun.errors import ConfigError


def choose(conf: BackendConf) -> Backend:
    """The backend for `conf`."""
    match conf:
        case UdpBackend():
            return Udp(conf.port)
        case _:
            raise ConfigError(f"Backend.Type: {conf.type} is not built yet")
