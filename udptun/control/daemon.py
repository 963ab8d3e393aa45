"""The control plane: its stages, signals and end.  The only owner of lifecycle.

    lock the run directory -> config -> underlay interface -> backend -> what forwards (adopted, or device and socket)
    -> lease -> peers, datapath, kernel state -> subnet.env -> ready -> follow leases, repair, serve status

What is undone at the end is undone in reverse by one AsyncExitStack.  The datapath, its device and routes and the
lease are not: they are left behind for the next daemon, and `udptun cleanup` removes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import json
import logging
import os
import platform
import random
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path

from udptun import __version__
from udptun.backends import probe
from udptun.backends.base import Backend, LiveSettings, TunnelKeys, mtu_for
from udptun.backends.choice import parse_net_conf
from udptun.backends.udp import UdpKeys
from udptun.config import subnet_env
from udptun.config.flags import Options
from udptun.config.net_conf import LogLevel, NetConf, check_underlay, keys_that_need_a_restart, replace_live_keys
from udptun.control import document, notify
from udptun.control.forwarding import Forwarding
from udptun.control.http import Response, Routes, serve
from udptun.core.clock import Clock
from udptun.core.errors import ConfigError, KernelError, UdptunError
from udptun.core.lease import LeaseAttrs, LeaseEvent
from udptun.core.offload import corrupted_by
from udptun.core.tunnel import default_workers
from udptun.firewall.reconciler import FirewallReconciler, FirewallSettings
from udptun.kernel.underlay import Underlay, UnderlayOptions
from udptun.kernel.underlay_watch import UnderlayWatch, find_underlay
from udptun.membership import identity
from udptun.membership.allocate import chooser
from udptun.membership.identity import Identity
from udptun.membership.membership import Membership
from udptun.membership.start import find_start
from udptun.stores.base import Store
from udptun.stores.open import open_store

log = logging.getLogger(__name__)

LOCK_FILE = "daemon.lock"
"""In the run directory; flock()ed by the daemon, whose pid it holds."""


def run(options: Options) -> int:
    """Run the daemon until SIGTERM or SIGINT; return its exit status (0: stopped as asked)."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname).1s %(name)s: %(message)s"
    )
    _set_log_level(options, None)
    # Thousands of leases are hundreds of thousands of objects that stay: looking through them for cycles every 700
    # (Python's default) takes as long as making them.
    gc.set_threshold(50_000)
    for warning in options.warnings:
        log.warning("%s", warning)
    if options.store_warning:
        log.warning("%s", options.store_warning)
    try:
        asyncio.run(Daemon(options).run())
    except UdptunError as exc:
        _log_problems("", exc)
        return exc.exit_status
    return 0


def _set_log_level(options: Options, configured: LogLevel | None) -> None:
    # Not the root logger's level: pyroute2 would print every netlink message.
    by_flag = LogLevel.DEBUG if options.v >= 1 else LogLevel.INFO
    logging.getLogger("udptun").setLevel((configured or by_flag).value)


def lock_run_dir(run_dir: Path) -> int:
    """Be the only daemon of this run directory.  The descriptor returned holds the lock; the caller owns it."""
    path = run_dir / LOCK_FILE
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise KernelError(f"cannot open {path}", exc.errno or 0, "run as root?") from exc
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.read(fd, 32).decode(errors="replace").strip()
        os.close(fd)
        raise UdptunError(
            f"another udptun daemon (pid {pid or 'unknown'}) uses {run_dir}; "
            "stop it, or give this one a --run-dir of its own"
        ) from None
    os.ftruncate(fd, 0)
    os.write(fd, f"{os.getpid()}\n".encode())
    return fd


class Daemon:
    """One run of the control plane."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._started_s = time.time()
        self._is_ready = False
        self._reload = asyncio.Event()
        self._changing = asyncio.Lock()
        """Held while settings or underlay change: each of the two starts from what the other has left."""
        # Set by the stages of _serve, in this order.
        self._conf: NetConf
        self._underlay: Underlay
        self._underlay_watch: UnderlayWatch
        self._backend: Backend
        self._me: Identity
        self._membership: Membership
        self._forwarding: Forwarding
        self._firewall: FirewallReconciler

    async def run(self) -> None:
        """Serve until a signal says stop.  Raises what ended it otherwise."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload.set)
        serving = asyncio.create_task(self._serve())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not serving.done():
            self._notify(notify.STOPPING)
            serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            try:
                await serving
            except BaseExceptionGroup as group:
                # A task group wraps the one failure that ended it.
                raise _first(group) from group
        if self._is_ready:
            log.info("stopped; packets are carried on without the daemon, `udptun cleanup` ends and removes it all")

    # ------------------------------------------------------------------------------------------------- stages

    async def _serve(self) -> None:
        options = self._options
        async with AsyncExitStack() as undo:
            self._make_directories()
            undo.callback(os.close, lock_run_dir(options.run_dir))
            await self._serve_health(undo)
            store = open_store(options)
            undo.push_async_callback(store.aclose)
            clock = Clock()
            start = await find_start(store, options.state_dir, clock, parse_net_conf)
            self._conf = self._parse_config(start.config, store)
            self._underlay = await self._find_underlay()
            check_underlay(self._conf, self._underlay.address)
            _set_log_level(options, self._conf.backend.log_level)
            choice = await probe.choose_backend(
                self._conf.backend, options.state_dir, pretend_no_vxlan=options.pretend_no_vxlan
            )
            self._backend = choice.backend
            log.info(
                "backend chosen backend=%s device=%s reason=%r", self._backend.type, self._backend.device, choice.reason
            )
            live = self._live_settings(self._conf, self._underlay)
            node_id = identity.node_id(options.state_dir)
            attrs = self._backend.attrs(self._underlay, node_id)
            keys = self._conf.backend
            default_port = keys.port if isinstance(keys, UdpKeys) else None
            self._me = Identity(self._underlay.public_ip, attrs.port(0) or None, node_id, default_port)
            self._membership = Membership(
                store,
                start,
                self._conf,
                self._me,
                options.state_dir,
                60.0 * options.subnet_lease_renew_margin,
                self._backend.refusal,
                self._peers_changed,
                parse_net_conf,
                clock,
            )
            self._forwarding = await Forwarding.open(
                choice,
                self._conf.network,
                self._underlay,
                live,
                options.run_dir,
                with_blackhole=options.ip_blackhole_route,
            )
            undo.callback(self._forwarding.detach)
            self._firewall = self._make_firewall()
            undo.push_async_exit(self._undo_failed_start)
            await self._join(attrs)
            await self._forwarding.start(self._membership.own.subnet, self._membership.table.peers.values())
            # The subnet.env of the run before is still there.
            await self._firewall.set_up(self._membership.own.subnet, subnet_env.read_networks(options.subnet_file))
            self._write_subnet_env()
            self._is_ready = True
            self._notify(notify.READY)
            log.info(
                "ready subnet=%s mtu=%d n_peers=%d",
                self._membership.own.subnet,
                self._forwarding.live.mtu,
                len(self._membership.table.peers),
            )
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._membership.run(), name="membership")
                tasks.create_task(self._forwarding.run(), name="forwarding")
                tasks.create_task(self._firewall.run(), name="firewall")
                tasks.create_task(self._reload_on_signal(store), name="reload")
                tasks.create_task(self._underlay_watch.run(), name="follow underlay")

    def _make_directories(self) -> None:
        for directory in (self._options.run_dir, self._options.state_dir):
            try:
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as exc:
                raise KernelError(f"cannot make the directory {directory}", exc.errno or 0, "run as root?") from exc

    async def _serve_health(self, undo: AsyncExitStack) -> None:
        options = self._options
        routes: Routes = {"/healthz": self._healthz, "/readyz": self._readyz}
        servers = [await serve({**routes, "/status": self._status}, options.run_dir / document.SOCKET_NAME)]
        if options.healthz_port:
            servers.append(await serve(routes, (options.healthz_ip, options.healthz_port)))
        for server in servers:
            undo.callback(server.close)

    def _parse_config(self, text: str, store: Store) -> NetConf:
        conf = parse_net_conf(text, store.config_name)
        for note in conf.notes:
            log.warning("%s", note)
        if self._options.port is None:
            return conf
        if not isinstance(conf.backend, UdpKeys):
            log.warning("--port has no effect with Backend.Type %s", conf.backend.type)
            return conf
        return replace(conf, backend=replace(conf.backend, own_port=self._options.port))

    async def _find_underlay(self) -> Underlay:
        options = self._options
        wanted = UnderlayOptions(options.iface, options.iface_regex, options.iface_can_reach, options.public_ip)
        found = await find_underlay(wanted)
        self._underlay_watch = UnderlayWatch(wanted, found, self._move)
        _log_underlay("chosen", found)
        return found

    def _live_settings(self, conf: NetConf, present: Underlay) -> LiveSettings:
        """A flag says it for this host, the configuration for all, the interface when nobody does."""
        options = self._options
        keys = conf.backend if isinstance(conf.backend, TunnelKeys) else TunnelKeys()
        return LiveSettings(
            mtu_for(options.mtu or keys.mtu or present.mtu, self._backend.overhead),
            options.workers or keys.workers or default_workers(len(os.sched_getaffinity(0))),
            options.source_check or keys.source_check,
            keys.offload & ~corrupted_by(platform.release()),
        )

    async def _join(self, attrs: LeaseAttrs) -> None:
        """Get our lease, now that device and socket are sure, and know the peers."""
        previous, wrong = subnet_env.read_previous(self._options.subnet_file)
        if wrong:
            log.warning("previous subnet ignored: %s", wrong)
        await self._membership.join(attrs, chooser(self._conf, self._me, previous, random.SystemRandom()))
        await self._membership.catch_up()

    async def _undo_failed_start(self, *_exc: object) -> None:
        """A start that failed leaves nothing behind that it made."""
        if self._is_ready:
            return
        try:
            await self._forwarding.undo_failed_start()
            if not self._forwarding.is_adopted:
                await self._firewall.undo_failed_start()
                await self._membership.leave_if_new()
        except UdptunError as exc:
            log.error("the failed start is not undone, `udptun cleanup --release` does it error=%r", str(exc))

    # ---------------------------------------------------------------------------------------- while it runs

    async def _peers_changed(self, events: Sequence[LeaseEvent]) -> None:
        await self._forwarding.peers_changed(events)

    async def _reload_on_signal(self, store: Store) -> None:
        while True:
            await self._reload.wait()
            self._reload.clear()
            self._notify(notify.reloading())
            try:
                conf = self._parse_config(await store.network_config(), store)
                async with self._changing:
                    await self._apply_config(conf)
            except UdptunError as exc:
                _log_problems("nothing reloaded: ", exc)
            self._notify(notify.READY)

    async def _apply_config(self, conf: NetConf) -> None:
        """Change what can change while packets flow; name what cannot.  Raises UdptunError: nothing changed."""
        check_underlay(conf, self._underlay.address)
        live = self._live_settings(conf, self._underlay)
        for key in keys_that_need_a_restart(self._conf, conf):
            log.warning("config changed, takes effect with the next start key=%s", key)
        _set_log_level(self._options, conf.backend.log_level)
        await self._apply(self._underlay, live)
        # What the underlay brings later is seen in this light.
        self._conf = replace(self._conf, backend=replace_live_keys(self._conf.backend, conf.backend))
        live = self._forwarding.live
        log.info("config reloaded mtu=%d workers=%d source_check=%s", live.mtu, live.workers, live.source_check.value)

    async def _move(self, present: Underlay) -> None:
        """Go over to what the underlay is now.  Raises UdptunError: unchanged."""
        async with self._changing:
            check_underlay(self._conf, present.address)
            attrs = self._backend.attrs(present, self._me.node_id)
            await self._apply(present, self._live_settings(self._conf, present))
        if present.public_ip != self._me.public_ip:
            self._me = replace(self._me, public_ip=present.public_ip)
            self._membership.move(self._me, attrs)
        _log_underlay("changed", present)

    async def _apply(self, present: Underlay, live: LiveSettings) -> None:
        """Carry packets over this underlay and with these settings from now on.  Raises UdptunError: unchanged."""
        before = self._forwarding.live
        await self._forwarding.apply(present, live)
        self._underlay = present
        if self._forwarding.live.mtu != before.mtu:
            try:
                self._write_subnet_env()
            except UdptunError as exc:
                _log_problems("pods do not learn of the new MTU: ", exc)

    # ------------------------------------------------------------------------------------------------- values

    def _make_firewall(self) -> FirewallReconciler:
        options = self._options
        settings = FirewallSettings(
            masquerade=options.ip_masq,
            forward=options.iptables_forward_rules,
            random_fully=not options.ip_masq_fully_random_disable,
            nftables=self._conf.enable_nftables,
            resync_s=options.iptables_resync,
        )
        return FirewallReconciler(settings, self._conf.network)

    def _write_subnet_env(self) -> None:
        subnets = self._membership.own.subnets
        text = subnet_env.render(self._conf, subnets, self._forwarding.live.mtu, self._options.ip_masq)
        subnet_env.write(self._options.subnet_file, text)

    def _notify(self, message: str) -> None:
        try:
            notify.notify(self._options.notify_socket, message)
        except OSError as exc:
            log.warning("cannot tell the service manager state=%s error=%s", message.split("\n")[0], exc)

    # --------------------------------------------------------------------------------------------------- HTTP

    def _healthz(self) -> Response:
        return Response(HTTPStatus.OK, "flanneld is running")

    def _readyz(self) -> Response:
        if self._is_ready:
            return Response(HTTPStatus.OK, "flanneld is ready")
        return Response(HTTPStatus.SERVICE_UNAVAILABLE, "flanneld is not ready yet")

    async def _status(self) -> Response:
        if not self._is_ready:
            message = "the daemon is not ready yet; its log says what it waits for\n"
            return Response(HTTPStatus.SERVICE_UNAVAILABLE, message)
        # In a thread: with 65,000 peers it takes more than a second, and nobody else would get a turn.
        text = await asyncio.to_thread(lambda: json.dumps(self._document()) + "\n")
        return Response(HTTPStatus.OK, text, "application/json")

    def _document(self) -> dict[str, object]:
        """What docs/status.md describes.

        Runs beside the event loop: what that changes meanwhile is copied in one step, as by `list` of a view.
        """
        own = self._membership.own
        leases = sorted(self._membership.table.peers.values(), key=lambda lease: int(lease.subnet.network_address))
        return {
            "schema": document.SCHEMA,
            "version": __version__,
            "pid": os.getpid(),
            "uptime_s": round(time.time() - self._started_s, 1),
            "store": str(self._options.store),
            "network": str(self._conf.network),
            "lease": {
                "subnet": str(own.subnet),
                "public_ip": str(own.attrs.public_ip),
                "port": self._me.port,
                "node_id": self._me.node_id,
                "expires_at": own.expires_s,
            },
            "underlay": {
                "interface": self._underlay.link_name,
                "address": str(self._underlay.address),
                "mtu": self._underlay.mtu,
            },
            **self._forwarding.document(leases),
            "firewall": self._firewall.document(),
            "skipped": list(self._membership.skipped),
            "problems": [
                *self._membership.problems,
                *self._forwarding.problems(),
                *self._firewall.problems,
                *filter(None, [self._underlay_watch.problem]),
            ],
        }


def _log_underlay(what: str, it: Underlay) -> None:
    log.info(
        "underlay %s iface=%s address=%s public_ip=%s mtu=%d", what, it.link_name, it.address, it.public_ip, it.mtu
    )


def _log_problems(prefix: str, exc: UdptunError) -> None:
    """One line for each."""
    for problem in exc.problems if isinstance(exc, ConfigError) else (str(exc),):
        log.error("%s%s", prefix, problem)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first failure in a group, groups within it opened."""
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
