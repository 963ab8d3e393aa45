"""The files of TLS: read and checked before grpc gets them, because grpc does not name the file that it cannot use."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NamedTuple

from udptun.config.store_flags import EtcdOptions
from udptun.core.errors import ConfigError


class TlsFiles(NamedTuple):
    """The bytes of --etcd-cafile, --etcd-certfile and --etcd-keyfile; None where the flag is not given."""

    ca: bytes | None
    certificate: bytes | None
    key: bytes | None


def read_files(settings: EtcdOptions) -> TlsFiles:
    """Read and check what the flags name.  Raises ConfigError."""
    files = TlsFiles(
        _read("--etcd-cafile", settings.cafile),
        _read("--etcd-certfile", settings.certfile),
        _read("--etcd-keyfile", settings.keyfile),
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if settings.cafile is not None:
            context.load_verify_locations(settings.cafile)
    except (ssl.SSLError, ValueError) as exc:
        raise ConfigError(f"cannot use --etcd-cafile {settings.cafile}: {_openssl(exc)}; it must be PEM") from exc
    try:
        if settings.certfile is not None:
            # Without a password OpenSSL would ask for one on the terminal.
            context.load_cert_chain(settings.certfile, settings.keyfile, password="")
    except (ssl.SSLError, ValueError) as exc:
        raise ConfigError(
            f"cannot use --etcd-certfile {settings.certfile} with --etcd-keyfile {settings.keyfile}: {_openssl(exc)}; "
            "they must be a certificate and its key without a password, in PEM"
        ) from exc
    return files


def _read(flag: str, path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as exc:
        raise ConfigError(f"cannot read {flag} {path}: {exc.strerror or exc}") from exc


def _openssl(exc: ssl.SSLError | ValueError) -> str:
    return (exc.reason or str(exc)).lower().replace("_", " ") if isinstance(exc, ssl.SSLError) else str(exc)
