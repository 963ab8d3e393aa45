"""Which store --store names.  Each store is imported only when it is used, because its library is memory and time."""

from __future__ import annotations

from udptun.config.flags import Options
from udptun.config.store_flags import StoreKind
from udptun.core.errors import ConfigError
from udptun.stores.base import Store


def open_store(options: Options) -> Store:
    """The store that --store names; nothing is read or written yet.

    Raises ConfigError when the libraries of the store are not installed.
    """
    path = options.store.path
    match options.store.kind:
        case StoreKind.LOCAL:
            from udptun.stores.local.store import LocalStore

            return LocalStore(path, options.net_config_path)
        case StoreKind.FILE:
            from udptun.stores.file import FileStore

            return FileStore(path, options.net_config_path, options.node or None)
        case StoreKind.ETCD:
            try:
                from udptun.stores.etcd.store import EtcdStore
            except ImportError as exc:
                raise ConfigError(
                    f"cannot use etcd: {exc}; install the extra: pip install 'udptun[etcd]', or name another --store"
                ) from exc
            return EtcdStore(options.etcd)
        case StoreKind.KUBE:
            try:
                from udptun.stores.kube.store import KubeStore
            except ImportError as exc:
                raise ConfigError(
                    f"cannot use Kubernetes: {exc}; install the extra: pip install 'udptun[kube]', or name another "
                    "--store"
                ) from exc
            return KubeStore(options.kube, options.net_config_path)
