"""`udptun cni`: install the CNI plugin on this host, and free by hand what its containers have left."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from udptun.cni import install, leftovers, netconf, subnet_env
from udptun.cni.delegates import Delegates
from udptun.cni.errors import CniError
from udptun.cni.reservations import Reservations
from udptun.cni.state import StateDir
from udptun.commands.parser import Parser
from udptun.core.errors import ConfigError, UdptunError

_CONF_DIR = Path("/etc/cni/net.d")
_PLUGIN_DIRS = "/opt/cni/bin:/usr/lib/cni"


def run(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Do what the arguments say.  Raises UdptunError."""
    given = _parser().parse_args(argv)
    try:
        return _install(given) if given.action == "install" else _collect(given, environ)
    except CniError as exc:
        raise UdptunError(exc.message + (f"; {exc.details}" if exc.details else "")) from exc


def _parser() -> Parser:
    parser = Parser(prog="udptun cni", description="The CNI plugin: see docs/cni.md.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="install|gc")
    add = actions.add_parser("install", help="install the plugin, and a configuration", prog="udptun cni install")
    add.add_argument("directory", metavar="DIR", help="where runtimes look for plugins, such as /opt/cni/bin")
    add.add_argument("--name", default=install.TYPES[0], help="the plugin's type in configurations (%(default)s)")
    add.add_argument("--file", type=Path, help="the program to install (one that starts this package's)")
    add.add_argument("--conflist", type=Path, metavar="FILE", help="check every plugin that FILE names, and install it")
    add.add_argument("--to", type=Path, metavar="PATH", help=f"where (with FILE's name in {_CONF_DIR})")
    gc = actions.add_parser("gc", help="free what containers that are gone have left", prog="udptun cni gc")
    gc.add_argument(
        "--conf", type=Path, metavar="FILE", help=f"the network's (the first of type flannel in {_CONF_DIR})"
    )
    gc.add_argument(
        "--unknown",
        action="store_true",
        help="also addresses of this boot of which nothing is stored: only if no other plugin serves the network",
    )
    gc.add_argument("--path", metavar="DIRS", help=f"where the plugins are (CNI_PATH, else {_PLUGIN_DIRS})")
    return parser


def _install(given: Namespace) -> int:
    program = install.launcher() if given.file is None else _read(given.file)
    print(install.install(given.directory, given.name, program))
    if given.conflist is not None:
        conf = install.check_conflist(_read(given.conflist), [given.directory])
        print(install.install_conflist(str(given.to or _CONF_DIR / given.conflist.name), conf))
    return 0


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise UdptunError(f"cannot read {path}: {exc.strerror}") from exc


def _collect(given: Namespace, environ: Mapping[str, str]) -> int:
    for conf in _networks(given.conf):
        state = StateDir(conf.data_dir)
        try:
            subnet = subnet_env.read(conf.subnet_file)
        except CniError:
            # The files are found without it.
            subnet = subnet_env.SubnetEnv([], [], 0, ip_masq=True)
        delegate = netconf.delegate_conf(conf, subnet)
        path = given.path or environ.get("CNI_PATH") or _PLUGIN_DIRS
        freed = leftovers.free_dead(delegate, state, Delegates(path, environ), with_unknown=given.unknown)
        for line in freed.lines:
            print(line)
        n_left = len(Reservations(delegate).all())
        print(
            f"network {conf.name}: {len(freed.lines)} freed, {len(state.all(conf.name))} containers and {n_left} "
            "addresses stay"
        )
        if freed.failures:
            raise UdptunError("; ".join(f"{it.message} {it.details}".strip() for it in freed.failures))
    return 0


def _networks(path: Path | None) -> list[netconf.NetConf]:
    """The networks of type flannel in the file, or in the first file that has any.  Raises UdptunError."""
    paths = [path] if path else sorted(it for it in _CONF_DIR.glob("*.conf*") if it.suffix in (".conf", ".conflist"))
    for each in paths:
        whole = netconf.as_object(_read(each), str(each))
        listed = whole.get("plugins")
        members = [whole] if not isinstance(listed, list) else list(map(netconf.members_of, listed))
        shared = {key: whole[key] for key in ("name", "cniVersion") if key in whole}
        if found := [netconf.NetConf(it | shared) for it in members if it.get("type") in install.TYPES]:
            return found
    where = path or f"any file of {_CONF_DIR}"
    raise ConfigError(f"no network of type flannel in {where}; --conf FILE names the one to use")
