"""The control plane: its stages, signals and end.  The only owner of lifecycle.

    lock the run directory -> config -> claim Network -> underlay interface -> backend
    -> what forwards (adopted, or device and socket) -> lease -> peers, datapath, kernel state -> subnet.env -> ready
    -> follow leases, repair, serve status

At the end one AsyncExitStack undoes the stages in reverse.  Some things are not undone: the datapath, its device and
routes, and the lease.  They are left for the next daemon, and `udptun cleanup` removes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import random
import signal
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from ipaddress import IPv4Address

from udptun.backends import probe
from udptun.backends.base import LiveSettings, check_underlay, claimed, device_of
from udptun.backends.choice import BackendChoice, parse_net_conf
from udptun.backends.udp import UdpKeys
from udptun.config import subnet_env
from udptun.config.flags import Options
from udptun.config.net_conf import NetConf
from udptun.config.service_manager import ServiceManager
from udptun.control import notify
from udptun.control.answers import Answers
from udptun.control.config_document import config_document
from udptun.control.forwarding import Forwarding
from udptun.control.hand_over import HandOver
from udptun.control.health_port import HealthPort
from udptun.control.http import Request, Response, serve
from udptun.control.instance import (
    claim_files,
    claim_network,
    former_networks,
    remember,
    remove_former,
    starting,
)
from udptun.control.kept_descriptors import KeptDescriptors
from udptun.control.log_format import start_logging
from udptun.control.node_status import NodeStatus
from udptun.control.routing import Routing
from udptun.control.run_dir import fault_of_directory
from udptun.control.running import Running, log_underlay
from udptun.control.settings import (
    check_store,
    firewall_settings,
    live_settings,
    read_config,
    set_log_level,
    underlay_options,
)
from udptun.core.clock import Clock
from udptun.core.daemon_socket import SOCKET_NAME
from udptun.core.errors import BeginAgainError, KernelError, UdptunError
from udptun.core.family import Family
from udptun.core.lease import LeaseAttrs
from udptun.core.ownership import Ownership
from udptun.core.tunnel import ShortcutMode
from udptun.firewall.obstacles.watch import Obstacles
from udptun.firewall.reconciler import FirewallReconciler
from udptun.kernel import cgroup
from udptun.kernel.arp import is_in_use
from udptun.kernel.claims import Claims
from udptun.kernel.netlink import Netlink
from udptun.kernel.supervisor import first_failure
from udptun.kernel.underlay import Underlay
from udptun.kernel.underlay_watch import find_underlay
from udptun.membership import identity, saved
from udptun.membership.allocate import chooser
from udptun.membership.former import FormerLease
from udptun.membership.identity import Identity
from udptun.membership.membership import Membership
from udptun.membership.start import Start, find_public_addresses, find_start
from udptun.stores.base import Store
from udptun.stores.open import open_store

log = logging.getLogger(__name__)

_ENDING = (signal.SIGTERM, signal.SIGINT)
"""Signals of which the first ends the daemon in order, and the second at once."""


def run(options: Options, manager: ServiceManager) -> int:
    """Run the daemon until SIGTERM or SIGINT; return its exit status (0: stopped as asked)."""
    start_logging(options.log_format)
    set_log_level(options, None)
    # Thousands of leases are hundreds of thousands of objects that stay.  To look through them for cycles every 700
    # objects (Python's default) takes as long as to make them.
    gc.set_threshold(50_000)
    for warning in options.warnings:
        log.warning("%s", warning)
    if options.store_warning:
        log.warning("%s", options.store_warning)
    try:
        asyncio.run(Daemon(options, manager).run())
    except UdptunError as exc:
        for problem in exc.problems:
            log.error("%s", problem)
        return exc.exit_status
    return 0


class Daemon:
    """One run of the control plane."""

    def __init__(self, options: Options, manager: ServiceManager) -> None:
        self._options = options
        self._watchdog_s = manager.watchdog_s
        self._kept = KeptDescriptors(manager, partial(notify.notify, options.notify_socket))
        self._node_status = NodeStatus(options.subnet_file)
        self._answers = Answers(lambda: self._node_status.waiting)
        shown = self._answers.health(with_metrics=options.metrics)
        self._health_port = HealthPort(shown, options.healthz_ip, options.healthz_port)
        self._claims = Claims()
        self._hand_over = HandOver(options.run_dir, self._step_back, take_over=options.take_over)
        self._is_stepping_back = False
        self._config = ""
        """The text of the network config in force."""
        self._config_source = ""
        """Where it was read."""
        self._hangup = asyncio.Event()
        """Set by SIGHUP."""

    async def run(self) -> None:
        """Serve until a signal says stop.  Raises what ended it otherwise."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def end() -> None:
            stop.set()
            # The next one is the kernel's to obey: it ends us whatever we wait for.
            for number in _ENDING:
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_DFL)

        for number in _ENDING:
            loop.add_signal_handler(number, end)
        loop.add_signal_handler(signal.SIGHUP, self._hangup.set)
        serving = self._serving = asyncio.create_task(self._serve_in_turns())
        stopping = asyncio.create_task(stop.wait())
        watchdog = asyncio.create_task(self._feed_watchdog())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        watchdog.cancel()
        if not serving.done():
            self._notify(notify.STOPPING)
            serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            try:
                await serving
            except BaseExceptionGroup as group:
                # A task group wraps the one failure that ended it.
                raise first_failure(group) from group
        if self._answers.running is not None:
            log.info("stopped; packets are carried on without the daemon, `udptun cleanup` ends and removes it all")

    async def _feed_watchdog(self) -> None:
        """Tell the service manager that we live, while this loop runs and the datapath works.  Else it kills us."""
        while self._watchdog_s is not None:
            running = self._answers.running
            if running is None or running.forwarding.is_well:
                self._notify(notify.ALIVE)
            await asyncio.sleep(self._watchdog_s / 3)

    async def _serve_on(self) -> None:
        """Serve, and once more each time the store gives this host another subnet.  Packets are carried meanwhile."""
        while True:
            try:
                await self._serve()
            except BaseExceptionGroup as group:
                exc = first_failure(group)
                if not isinstance(exc, BeginAgainError):
                    raise
                log.warning("beginning again: %s", exc)
                self._answers.running = None

    async def _serve_in_turns(self) -> None:
        """Serve; when another daemon takes over, be in reserve, and serve again after it."""
        while True:
            try:
                return await self._serve_on()
            except asyncio.CancelledError:
                if not self._is_stepping_back or self._serving.uncancel():
                    raise
            self._is_stepping_back = False
            self._answers.running = None

    def _step_back(self) -> None:
        """End this turn as the run ends: all is undone, and the datapath forwards on."""
        self._is_stepping_back = True
        self._serving.cancel()

    async def _serve(self) -> None:
        options = self._options
        async with AsyncExitStack() as undo:
            self._make_directories()
            undo.callback(os.close, await self._hand_over.lock())
            await self._kept.bring_back(options.run_dir, options.datapath_confinement)
            undo.callback(self._claims.close)
            claim_files(self._claims, options)
            undo.enter_context(self._node_status)
            # It has made the directory of subnet.env where there was none.
            claim_files(self._claims, options)
            await self._serve_http(undo)
            store = open_store(options)
            self._config_source = store.config_name
            undo.push_async_callback(store.aclose)
            running = await self._start(store, undo)
            self._answers.running = running
            for line in self._harmful_limits():
                log.warning("%s", line)
            self._node_status.is_ready()
            await store.note_ready(running.lacks)
            await self._notify_ready()
            log.info(
                "ready subnet=%s mtu=%d n_peers=%d",
                running.membership.own.subnet,
                running.forwarding.live.mtu,
                len(running.membership.table.peers),
            )
            keep = running.supervisor.keep
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(keep("membership", running.membership.run))
                tasks.create_task(keep("forwarding", running.forwarding.run))
                tasks.create_task(keep("firewall", running.firewall.run))
                tasks.create_task(keep("underlay", running.underlay_watch.run))
                tasks.create_task(keep("ip_forward", running.ip_forward_watch.run))
                tasks.create_task(keep("mesh port", running.mesh_port.run))
                tasks.create_task(_end_with_subnet(running))
                tasks.create_task(_end_with_families(running))
                tasks.create_task(keep("reload", lambda: self._reload_on_hangup(running, store)))

    def _problems(self) -> list[str]:
        """A line for each thing that is wrong beside what `Running` has."""
        return [*filter(None, [self._health_port.problem]), *self._harmful_limits()]

    def _harmful_limits(self) -> list[str]:
        running = self._answers.running
        has_datapath = running is not None and running.forwarding.backend.encapsulations
        workers = running.forwarding.live.workers if running is not None and has_datapath else None
        return cgroup.harm(cgroup.read_limits(), workers)

    def _make_directories(self) -> None:
        for directory in (self._options.run_dir, self._options.state_dir):
            try:
                # With a umask that lets a group write, others could replace the directory.
                for missing in [it for it in reversed(directory.parents) if not it.exists()]:
                    missing.mkdir(mode=0o755, exist_ok=True)
                directory.mkdir(mode=0o700, exist_ok=True)
            except OSError as exc:
                raise KernelError(f"cannot make the directory {directory}", exc.errno or 0, "run as root?") from exc
        if fault := fault_of_directory(self._options.state_dir):
            log.warning("what the next start finds in --state-dir may be a stranger's: %s", fault)

    async def _serve_http(self, undo: AsyncExitStack) -> None:
        options = self._options
        routes = {**self._answers.all, **self._hand_over.routes, "/config": self._show_config}
        server = await serve(routes, options.run_dir / SOCKET_NAME)
        undo.callback(server.close)
        if options.healthz_port:
            undo.callback(self._health_port.close)
            await self._health_port.open()

    def _show_config(self, request: Request) -> Response:
        document = config_document(
            *(self._options, self._answers.running, self._config, self._config_source, self._node_status.waiting)
        )
        return Response(HTTPStatus.OK, json.dumps(document) + "\n", "application/json")

    async def _start(self, store: Store, undo: AsyncExitStack) -> Running:
        """All stages from the configuration to subnet.env.  Raises UdptunError; `undo` then undoes what was made."""
        options, clock = self._options, Clock()
        start = Start(self._config)
        if not (self._hand_over.goes_on and self._config):
            self._node_status.starts(f"waits for the network config in {store.config_name}")
            start = await find_start(store, options.state_dir, clock, parse_net_conf)
            self._config = start.config
        conf = read_config(start.config, store.config_name, options)
        self._node_status.starts("makes the device")
        ownerships = {it: await claim_network(self._claims, conf.pool(it).network, options) for it in conf.families}
        # Of a family that is enabled no longer.  Its device may be the one that the other goes on with.
        former = former_networks(options, conf.families)
        ownerships[conf.families[0]] = ownerships[conf.families[0]].with_leftovers(former)
        public = await find_public_addresses(store)
        options = replace(
            options, public_ip=public.ipv4 or options.public_ip, public_ipv6=public.ipv6 or options.public_ipv6
        )
        underlay = await find_underlay(underlay_options(options, conf))
        log_underlay("chosen", underlay)
        set_log_level(options, conf.backend.log_level)

        async with starting():
            choice = await probe.choose_backend(
                conf.backend,
                ownerships,
                options.state_dir,
                underlay.families,
                pretend_no_vxlan=options.pretend_no_vxlan,
            )
            backend = choice.backend
            check_store(store, conf, backend)
            check_underlay(backend, conf, underlay.address)
            live = live_settings(options, conf, underlay, backend, None)
            device = device_of(backend, underlay, live, live.families[0])
            log.info("backend chosen backend=%s device=%s reason=%r", backend.type, device, choice.reason)
            node_id = identity.node_id(options.state_dir)
            takes_shortcut = live.shortcut is not ShortcutMode.OFF and self._said_shortcut(node_id)
            attrs = backend.attrs(underlay, replace(live, takes_shortcut=takes_shortcut), node_id)
            remember(options.state_dir, [network for it in ownerships.values() for network in it.networks])
            forwarding = await self._open_forwarding(choice, conf, ownerships, underlay, live)
        undo.callback(forwarding.detach)
        default_port = conf.backend.port if isinstance(conf.backend, UdpKeys) else None
        me = Identity(
            underlay.public_ip,
            attrs.port(0) or None,
            node_id,
            default_port,
            store.node_name,
            underlay.public_ipv6,
        )
        membership = self._membership(store, start, conf, me, forwarding, clock)
        obstacles = Obstacles(lambda: forwarding.pod_paths, lambda: forwarding.tunnel_paths)
        firewall = FirewallReconciler(firewall_settings(options, conf), [*ownerships.values()], obstacles)
        running = Running(options, conf, underlay, me, membership, forwarding, firewall, self._problems)
        undo.push_async_callback(self._undo_failed_start, running)
        self._node_status.starts(f"waits for its lease in {store.name}")
        await self._join(running, attrs)
        self._node_status.starts("sets up routes and rules")
        own = membership.own.subnets
        await forwarding.start(own, live_settings(options, conf, underlay, backend, own), membership.tables)
        # The subnet.env of the run before is still there.
        await firewall.set_up(own, subnet_env.read_networks(options.subnet_file))
        if former:
            await remove_former(former, forwarding.device(live.families[0]) or "")
        running.write_subnet_env()
        remember(options.state_dir, [conf.pool(it).network for it in conf.families])
        return running

    async def _open_forwarding(
        self,
        choice: BackendChoice,
        conf: NetConf,
        ownerships: Mapping[Family, Ownership],
        underlay: Underlay,
        live: LiveSettings,
    ) -> Forwarding:
        """`Forwarding.open` with a routing of each family that is enabled."""
        options = self._options
        routings = [
            Routing(
                *(choice.backend, it, ownerships[it], conf.pool(it).leasable),
                is_carried=it in live.families,
                with_blackhole=options.ip_blackhole_route,
            )
            for it in conf.families
        ]
        return await Forwarding.open(
            choice, routings, underlay, live, options.run_dir, options.datapath_confinement, self._kept
        )

    def _membership(
        self, store: Store, start: Start, conf: NetConf, me: Identity, forwarding: Forwarding, clock: Clock
    ) -> Membership:
        return Membership(
            store,
            start,
            conf,
            me,
            self._options.state_dir,
            60.0 * self._options.subnet_lease_renew_margin,
            {it: claimed(forwarding.backend, conf, it) for it in forwarding.families},
            forwarding.refusal,
            forwarding.peers_changed,
            parse_net_conf,
            clock,
            forwarding.backend.peer_types,
            outer=forwarding.backend.outer,
        )

    def _said_shortcut(self, node_id: str) -> bool:
        """Whether our lease says it now.  It goes on saying so until it is known whether the shortcut is on again.

        Otherwise each restart would have all peers change twice what they do.
        """
        own = saved.load_own(self._options.state_dir, Clock().unix_s())
        return own is not None and own.attrs.node_id == node_id and own.attrs.takes_shortcut

    async def _join(self, running: Running, attrs: LeaseAttrs) -> None:
        """Get our lease, now that device and socket are sure, and know the peers."""
        previous, wrong = subnet_env.read_previous(self._options.subnet_file)
        if wrong:
            log.warning("previous subnet ignored: %s", wrong)
        former = None
        if previous is not None:
            async with Netlink() as kernel:
                addresses = {it.ip for it in await kernel.addresses() if isinstance(it.ip, IPv4Address)}
            former = FormerLease(previous, attrs, addresses, is_in_use)
        choose = chooser(running.conf, running.me, previous, random.SystemRandom(), former)
        await running.membership.join(attrs, choose, former)
        await running.membership.catch_up()

    async def _undo_failed_start(self, running: Running) -> None:
        """A start that failed leaves nothing behind that it made."""
        if self._answers.running is not None:
            return
        try:
            await running.forwarding.undo_failed_start()
            if not running.forwarding.is_adopted:
                await running.firewall.undo_failed_start()
                await running.membership.leave_if_new()
        except UdptunError as exc:
            log.error("the failed start is not undone, `udptun cleanup --release` does it error=%r", str(exc))

    async def _reload_on_hangup(self, running: Running, store: Store) -> None:
        while True:
            await self._hangup.wait()
            self._hangup.clear()
            self._notify(notify.reloading())
            try:
                text = await store.network_config()
                await running.reload(read_config(text, store.config_name, self._options))
                self._config = text
            except UdptunError as exc:
                for problem in exc.problems:
                    log.error("nothing reloaded: %s", problem)
            except Exception:
                # The reload is over for the service manager, too.
                await self._notify_ready()
                raise
            await self._notify_ready()

    def _notify(self, message: str) -> None:
        try:
            notify.notify(self._options.notify_socket, message)
        except OSError as exc:
            _not_told(message, exc)

    async def _notify_ready(self) -> None:
        """It waits for a daemon that does not say it, and ends it in the end."""
        try:
            await notify.patiently(partial(notify.notify, self._options.notify_socket, notify.READY))
        except OSError as exc:
            _not_told(notify.READY, exc)


def _not_told(message: str, exc: OSError) -> None:
    log.warning("cannot tell the service manager state=%s error=%s", message.split("\n")[0], exc)


async def _end_with_families(running: Running) -> None:
    """Raise BeginAgainError when this host carries other families than before, or has addresses of other families."""
    await running.other_families.wait()
    raise BeginAgainError("this host carries other families than before, or has addresses of other families")


async def _end_with_subnet(running: Running) -> None:
    """Raise BeginAgainError when our subnet is no longer the one that we run with."""
    await running.membership.given_instead()
    raise BeginAgainError(f"{running.membership.own.subnet} is no longer the subnet of this host")
