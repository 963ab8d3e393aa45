"""The program `udptun-cni`, which runtimes know as `flannel`: reads environment and stdin, answers on stdout.

    ADD      subnet.env and the network's configuration make a delegate's configuration; it is stored, then the delegate
             runs and its result is ours
    DEL      the delegate's DEL with what was stored
    CHECK    the delegate's CHECK with what was stored
    STATUS   whether an ADD could succeed now: in the daemon's own words if not
    GC       frees what no container has any more
    VERSION  the versions of the specification that we know

It imports little and late, as a runtime starts it for each pod: no typing, pathlib or subprocess.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping

from udptun.cni import go_json
from udptun.cni.errors import (
    BAD_CONFIG,
    BAD_ENVIRONMENT,
    INCOMPATIBLE_VERSION,
    INTERNAL,
    IO_FAILURE,
    NOT_AVAILABLE,
    UNKNOWN_CONTAINER,
    CniError,
)
from udptun.cni.netconf import VERSIONS

# Only for type checkers.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from udptun.cni.delegates import Delegates
    from udptun.cni.netconf import NetConf
    from udptun.cni.state import StateDir
    from udptun.cni.subnet_env import SubnetEnv

_COMMANDS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "ADD": ("0.1.0", ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH")),
    "DEL": ("0.1.0", ("CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH")),
    "CHECK": ("0.4.0", ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH")),
    "STATUS": ("1.1.0", ("CNI_PATH",)),
    "GC": ("1.1.0", ("CNI_PATH",)),
}
"""Command -> the version of the specification that it came with, and the variables that it needs."""

_CONTAINER_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")
_LONGEST_IFNAME = 15
"""IFNAMSIZ without the zero at the end."""
_LARGEST_CONF = 16 << 20
"""Bytes.  A configuration has some hundreds; GC's has a line for each container."""
_POOL_IS_EMPTY = "no IP addresses available in range set"
"""host-local's words (plugins/ipam/host-local/backend/allocator/allocator.go)."""


def main() -> None:
    """Answer one request, and exit: 0 when it is done, 1 with an error on stdout when it failed."""
    environ = os.environ
    command = environ.get("CNI_COMMAND", "")
    if not command:
        known = ", ".join(VERSIONS)
        print(f"udptun-cni: the CNI plugin flannel; run by container runtimes. CNI versions {known}", file=sys.stderr)
        sys.exit(0)
    if command == "VERSION":
        _print(go_json.dumps({"cniVersion": VERSIONS[-1], "supportedVersions": list(VERSIONS)}).encode())
        sys.exit(0)
    request = _Request(command, environ)
    try:
        answer = request.answer()
    except Exception as exc:
        _print(go_json.dumps(_as_error(exc, command).document(request.cni_version)).encode())
        sys.exit(1)
    _print(answer)
    sys.exit(0)


def _as_error(exc: Exception, command: str) -> CniError:
    """What the runtime is told.  Of a fault of ours the traceback goes to stderr."""
    if isinstance(exc, CniError):
        return exc
    if isinstance(exc, OSError):
        return CniError(IO_FAILURE, f"{command} failed: {exc}")
    sys.excepthook(type(exc), exc, exc.__traceback__)
    return CniError(INTERNAL, f"{command} failed, a fault of udptun-cni: {exc!r}", "its stderr says where")


def _print(text: bytes) -> None:
    # Whatever the locale: JSON is UTF-8.
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()


class _Request:
    """One run.  `cni_version` is the configuration's once that has been read."""

    def __init__(self, command: str, environ: Mapping[str, str]) -> None:
        self.cni_version = VERSIONS[-1]
        self._command = command
        self._environ = environ
        self._conf: NetConf
        self._state: StateDir
        self._delegates: Delegates

    def answer(self) -> bytes:
        """What to print.  Raises CniError."""
        if self._command not in _COMMANDS:
            raise CniError(BAD_ENVIRONMENT, f"unknown CNI_COMMAND: {self._command}")
        since, needed = _COMMANDS[self._command]
        self._check_environment(needed)

        from udptun.cni import netconf
        from udptun.cni.delegates import Delegates
        from udptun.cni.state import StateDir

        text = sys.stdin.buffer.read(_LARGEST_CONF + 1)
        if len(text) > _LARGEST_CONF:
            raise CniError(BAD_CONFIG, f"the configuration on stdin has more than {_LARGEST_CONF} bytes")
        self._conf = netconf.parse(text)
        self.cni_version = self._conf.cni_version or self.cni_version
        if not self._conf.has_at_least(since):
            details = f"{self._command} came with {since}"
            message = f"config version does not allow {self._command}"
            raise CniError(INCOMPATIBLE_VERSION, message, details)
        self._state = StateDir(self._conf.data_dir)
        self._delegates = Delegates(self._environ["CNI_PATH"], self._environ)
        answers = {
            "ADD": self._add,
            "DEL": self._delete,
            "CHECK": self._check,
            "STATUS": self._status,
            "GC": self._collect,
        }
        return answers[self._command]()

    def _check_environment(self, needed: tuple[str, ...]) -> None:
        missing = [name for name in needed if not self._environ.get(name)]
        if missing:
            raise CniError(BAD_ENVIRONMENT, f"required env variables [{','.join(missing)}] missing")
        if "CNI_CONTAINERID" in needed and not _CONTAINER_ID.fullmatch(self._container_id):
            raise CniError(BAD_ENVIRONMENT, "invalid characters in containerID", self._container_id)
        ifname = self._ifname
        is_good = 0 < len(ifname) <= _LONGEST_IFNAME and ifname not in (".", "..")
        if "CNI_IFNAME" in needed and not (is_good and not re.search(r"[/:\s]", ifname)):
            raise CniError(BAD_ENVIRONMENT, "invalid interface name", ifname)

    @property
    def _container_id(self) -> str:
        return self._environ["CNI_CONTAINERID"]

    @property
    def _ifname(self) -> str:
        return self._environ.get("CNI_IFNAME", "")

    def _add(self) -> bytes:
        from udptun.cni import bridge, netconf, subnet_env
        from udptun.cni.state import Extras

        subnet = subnet_env.read(self._conf.subnet_file, subnet_env.WAIT_S)
        conf = netconf.delegate_conf(self._conf, subnet)
        self._delegates.find(str(conf["type"]))
        self._refuse_second_network()
        text = go_json.dumps(conf)
        if repaired := bridge.make_way(conf, subnet.subnets):
            print(f"udptun-cni: {repaired}", file=sys.stderr)
        # Before the delegate runs: what it makes can then be deleted whatever happens to us.
        self._state.save(self._container_id, text, Extras.now(self._ifname, self._environ["CNI_NETNS"]))
        print(f"delegateAdd: netconf sent to delegate plugin:\n{text}", file=sys.stderr, flush=True)
        try:
            return self._delegates.run("ADD", conf, text.encode())
        except CniError as exc:
            self._undo_add(conf, text)
            if _POOL_IS_EMPTY not in f"{exc.message} {exc.details}":
                raise
            return self._add_once_more(conf, text, exc)

    def _refuse_second_network(self) -> None:
        """State is kept by container alone, so that flannel's plugin finds it: a second network needs other files."""
        known = self._state.extras(self._container_id)
        is_other = self._state.has(self._container_id) and known.ifname not in ("", self._ifname)
        if is_other and not known.is_dead:
            message = f"container {self._container_id} is attached already, by {known.ifname}, with the same dataDir"
            raise CniError(BAD_CONFIG, message, "give each network of type flannel a dataDir of its own")

    def _undo_add(self, conf: dict[str, object], text: str) -> None:
        """The specification asks for a DEL after a delegate's ADD that failed.  If it fails too, the state stays."""
        try:
            self._delegates.run("DEL", conf, text.encode())
            self._state.remove(self._container_id)
        except CniError as exc:
            print(f"udptun-cni: after the failed ADD: {exc.message}", file=sys.stderr, flush=True)

    def _add_once_more(self, conf: dict[str, object], text: str, failure: CniError) -> bytes:
        """The subnet has no address left: give it back those that dead containers have."""
        from udptun.cni.leftovers import free_dead
        from udptun.cni.reservations import Reservations
        from udptun.cni.state import Extras

        freed = free_dead(conf, self._state, self._delegates)
        for line in freed.lines:
            print(f"udptun-cni: {line}", file=sys.stderr, flush=True)
        if not freed.lines:
            given = len(Reservations(conf).all())
            details = f"{given} addresses are given out, none of them to a container that is known to be gone"
            raise CniError(failure.code, failure.message, f"{details}; a larger subnet per node (SubnetLen) helps")
        self._state.save(self._container_id, text, Extras.now(self._ifname, self._environ["CNI_NETNS"]))
        try:
            return self._delegates.run("ADD", conf, text.encode())
        except CniError:
            self._undo_add(conf, text)
            raise

    def _delete(self) -> bytes:
        from udptun.cni.state import UnreadableStateError

        try:
            attachment = self._state.load(self._container_id)
        except UnreadableStateError as exc:
            # As flannel's: the runtime could do nothing about it, and would keep the pod for ever.
            print(f"udptun-cni: nothing deleted, the state cannot be read: {exc}", file=sys.stderr)
            return b""
        if attachment is not None:
            self._delegates.run("DEL", attachment.conf, attachment.text)
            self._state.remove(self._container_id)
        return b""

    def _check(self) -> bytes:
        from udptun.cni import netconf
        from udptun.cni.state import UnreadableStateError

        try:
            attachment = self._state.load(self._container_id)
        except UnreadableStateError as exc:
            raise CniError(UNKNOWN_CONTAINER, f"cannot read what the ADD has stored: {exc}") from exc
        if attachment is None:
            message = f"nothing is stored of container {self._container_id} in {self._state.path}"
            raise CniError(UNKNOWN_CONTAINER, message, "remove the container and make it again")
        conf = dict(attachment.conf)
        if "prevResult" in self._conf.members:
            conf["prevResult"] = netconf.with_gateways(self._conf.members["prevResult"])
        self._delegates.run("CHECK", conf, go_json.dumps(conf).encode())
        return b""

    def _status(self) -> bytes:
        from udptun.cni import netconf, subnet_env
        from udptun.cni.reservations import Reservations

        try:
            subnet = subnet_env.read(self._conf.subnet_file)
        except CniError as exc:
            raise CniError(NOT_AVAILABLE, exc.message, exc.details) from exc
        conf = netconf.delegate_conf(self._conf, subnet)
        self._delegates.run("STATUS", conf, go_json.dumps(conf).encode())
        if Reservations(conf).is_full(subnet.subnets):
            message = f"no address is left in {' or '.join(subnet.subnets)}"
            raise CniError(NOT_AVAILABLE, message, "`udptun cni gc` frees those of containers that are gone")
        return b""

    def _collect(self) -> bytes:
        from udptun.cni.leftovers import ValidAttachments, collect

        members = self._conf.members
        conf = self._delegate_conf()
        freed = collect(conf, self._state, self._delegates, ValidAttachments(members))
        for line in freed.lines:
            print(f"udptun-cni: {line}", file=sys.stderr, flush=True)
        lists = {key: value for key, value in members.items() if key.startswith("cni.dev/")}
        try:
            self._delegates.run("GC", conf, go_json.dumps({**conf, **lists}).encode())
        except CniError as exc:
            freed.failures.append(exc)
        if freed.failures:
            first = freed.failures[0]
            details = "; ".join(f"{it.message} {it.details}".strip() for it in freed.failures)
            raise CniError(first.code, f"GC of {self._conf.name}: {len(freed.failures)} failed", details)
        return b""

    def _delegate_conf(self) -> dict[str, object]:
        """The delegate's configuration; without a subnet.env one that says where its files are, and no addresses."""
        from udptun.cni import netconf, subnet_env

        subnet: SubnetEnv
        try:
            subnet = subnet_env.read(self._conf.subnet_file)
        except CniError:
            subnet = subnet_env.SubnetEnv([], [], 0, ip_masq=True)
        return netconf.delegate_conf(self._conf, subnet)


if __name__ == "__main__":
    main()
