"""What this host runs with, and how that changes while packets flow: at a SIGHUP, and when the underlay moves.

A change is checked wholly before anything is done, so one that cannot be made leaves everything as it was.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace

from udptun.backends.base import LiveSettings, check_underlay
from udptun.config import subnet_env
from udptun.config.flags import Options
from udptun.config.net_conf import NetConf, keys_that_need_a_restart, replace_live_keys
from udptun.control.forwarding import Forwarding
from udptun.control.mesh.port import MeshPort
from udptun.control.settings import lack, live_settings, set_log_level, underlay_options
from udptun.core.errors import UdptunError
from udptun.core.lease import LeaseAttrs
from udptun.firewall.reconciler import FirewallReconciler
from udptun.kernel.ip_forward import IpForwardWatch
from udptun.kernel.supervisor import Supervisor
from udptun.kernel.underlay import Underlay
from udptun.kernel.underlay_watch import UnderlayWatch
from udptun.membership.identity import Identity
from udptun.membership.membership import Membership

log = logging.getLogger(__name__)


class Running:
    """The values and the parts of one run.  `conf`, `underlay` and `me` are those in force now; for one event loop."""

    def __init__(
        self,
        options: Options,
        conf: NetConf,
        underlay: Underlay,
        me: Identity,
        membership: Membership,
        forwarding: Forwarding,
        firewall: FirewallReconciler,
        other_problems: Callable[[], Iterable[str]],
    ) -> None:
        self.options = options
        self.conf = conf
        self.underlay = underlay
        self.me = me
        self.membership = membership
        self.forwarding = forwarding
        self.firewall = firewall
        self._other_problems = other_problems
        self.underlay_watch = UnderlayWatch(
            underlay_options(options, conf),
            underlay,
            self.move,
            lambda: (membership.table.part(lease).public_ip for lease in membership.table.peers.values()),
        )
        self.ip_forward_watch = IpForwardWatch(lambda: forwarding.pod_paths)
        self.other_families = asyncio.Event()
        """Set when a family can be carried now and could not before, or the other way round, and when this host has
        addresses of other families than before: the daemon begins again."""
        self.mesh_port = MeshPort(self)
        self.supervisor = Supervisor()
        forwarding.shortcut_switched = self._say_shortcut
        self._changing = asyncio.Lock()
        """Held during a change: each one starts from what the one before has left."""

    @property
    def problems(self) -> list[str]:
        """One line for each thing that is wrong right now."""
        return [
            *self.supervisor.problems,
            *self.membership.problems,
            *self.forwarding.problems,
            *self.firewall.problems,
            *self.ip_forward_watch.problems,
            *self.mesh_port.problems,
            *self.lacks,
            *filter(None, [self.underlay_watch.problem]),
            *self._other_problems(),
        ]

    @property
    def lacks(self) -> list[str]:
        """A line for each family that is enabled and not carried."""
        how = (self.options, self.conf, self.underlay, self.forwarding.backend, self.membership.own.subnets)
        return [f"pods have no {it} to other hosts: {why}" for it in self.conf.families if (why := lack(*how, it))]

    async def reload(self, conf: NetConf) -> None:
        """Change what can change while packets flow; name what cannot.  Raises UdptunError: nothing changed.

        Where other families can be carried with the new MTU, the daemon begins again with all of `conf`.
        """
        async with self._changing:
            backend = self.forwarding.backend
            check_underlay(backend, conf, self.underlay.address)
            was = self._attrs()
            # A later change of the underlay starts from these keys.
            present = replace(self.conf, backend=replace_live_keys(self.conf.backend, conf.backend))
            live = live_settings(self.options, present, self.underlay, backend, self.membership.own.subnets)
            if live.families != self.forwarding.live.families:
                self.other_families.set()
                return
            for key in keys_that_need_a_restart(self.conf, conf):
                log.warning("config changed, takes effect with the next start key=%s", key)
            await self._apply(self.underlay, live)
            set_log_level(self.options, conf.backend.log_level)
            self.conf = present
            live = self.forwarding.live
            if self._attrs() != was:
                self.membership.move(self.me, self._attrs())
            log.info(
                "config reloaded mtu=%d workers=%d source_check=%s", live.mtu, live.workers, live.source_check.value
            )

    async def move(self, present: Underlay) -> None:
        """Go over to what the underlay is now.  Raises UdptunError: nothing changed."""
        async with self._changing:
            backend = self.forwarding.backend
            check_underlay(backend, self.conf, present.address)
            was = self._attrs()
            # Raises when this host cannot be a peer from there.
            backend.attrs(present, self.forwarding.live, self.me.node_id)
            live = live_settings(self.options, self.conf, present, backend, self.membership.own.subnets)
            if live.families != self.forwarding.live.families or present.families != self.underlay.families:
                self.other_families.set()
                return
            await self._apply(present, live)
            attrs = self._attrs()
        if attrs != was:
            self.me = replace(self.me, public_ip=present.public_ip, public_ipv6=present.public_ipv6)
            self.membership.move(self.me, attrs)
        else:
            # A lease whose subnet has our own address in it is no peer's.
            self.membership.reconsider()
        log_underlay("changed", present)

    def _attrs(self) -> LeaseAttrs:
        """What our lease has to say by the settings that are in force."""
        takes = self.forwarding.takes_shortcut
        # A daemon before us may have said it, and peers need not change what they do twice.
        live = replace(
            self.forwarding.live, takes_shortcut=self.membership.own.attrs.takes_shortcut if takes is None else takes
        )
        return self.forwarding.backend.attrs(self.underlay, live, self.me.node_id)

    def _say_shortcut(self) -> None:
        """Have our lease say whether our kernel takes what a peer's has encapsulated."""
        self.membership.move(self.me, self._attrs())

    async def _apply(self, present: Underlay, live: LiveSettings) -> None:
        """Carry packets over this underlay and with these settings from now on.  Raises UdptunError: unchanged."""
        before = self.forwarding.live
        await self.forwarding.apply(present, live)
        self.underlay = present
        if self.forwarding.live.pod_mtu != before.pod_mtu:
            try:
                subnet_env.rewrite(self.options.subnet_file, self._subnet_env())
            except UdptunError as exc:
                for problem in exc.problems:
                    log.error("pods do not learn of the new MTU: %s", problem)

    def write_subnet_env(self) -> None:
        """Tell the CNI plugin and others the subnet and the MTU.  Raises KernelError."""
        subnet_env.write(self.options.subnet_file, self._subnet_env())

    def _subnet_env(self) -> str:
        subnets = self.membership.own.subnets
        return subnet_env.render(self.conf, subnets, self.forwarding.live.pod_mtu, self.options.ip_masq)


def log_underlay(what: str, it: Underlay) -> None:
    """Of both families, where it has both, IPv4 first; `others` are of the family that has chosen it."""
    log.info(
        "underlay %s iface=%s address=%s public_ip=%s mtu=%d reason=%r others=%s",
        what,
        it.link_name,
        ",".join(map(str, filter(None, (it.address, it.ipv6)))),
        ",".join(map(str, filter(None, (it.public_ip, it.public_ipv6)))),
        it.mtu,
        it.reason,
        ",".join(map(str, it.others)) or "none",
    )
