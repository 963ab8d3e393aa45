"""Where the leases live: whether the store answers, the network config, our own lease and those that are not used."""

from __future__ import annotations

from udptun.core.ip_text import ip_address, ip_network
from udptun.core.network_state import IPNetwork
from udptun.doctor.endpoints import SLOW_S
from udptun.doctor.facts import Facts
from udptun.doctor.finding import Finding, NotHereError, Severity

_SHOWN = 5
"""Leases that are named one by one."""


async def store(facts: Facts) -> list[Finding]:
    view = facts.store
    if not view.error:
        return []
    remedy = (
        "is the server up, is it the right one (the --store, --etcd-* and --kube-* flags of the daemon), does a "
        "firewall let this host through? docs/operations.md has each message under its store"
    )
    named = Finding.of_line(Severity.ERROR, view.error, view.name)
    return [named if "; " in view.error else Finding(Severity.ERROR, view.name, view.error, remedy)]


async def store_endpoints(facts: Facts) -> list[Finding]:
    """A store goes on with another of its servers, and says nothing while one answers."""
    if not facts.endpoints:
        raise NotHereError("the store has no server")
    if all(it.latency_s is None for it in facts.endpoints):
        raise NotHereError("none answers, which the check `store` says")
    found = []
    for it in facts.endpoints:
        if it.latency_s is None:
            remedy = "is it up, does a firewall let this host through? If it is gone for good, take it out of the flags"
            cause = f"it does not answer this host, and others do: {it.error}"
            found.append(Finding(Severity.WARNING, it.name, cause, remedy))
        elif it.latency_s > SLOW_S:
            took_ms, slow_ms = 1000 * it.latency_s, 1000 * SLOW_S
            cause = f"it takes {took_ms:.0f} ms for a small answer, and more than {slow_ms:.0f} is slow"
            remedy = "look at its load and disk, and at the way to it; starts, and news of other hosts, take long too"
            found.append(Finding(Severity.WARNING, it.name, cause, remedy))
    return found


async def network_config(facts: Facts) -> list[Finding]:
    if facts.conf_problems:
        remedy = "mend it; `docs/configuration.md` has every key. A running daemon goes on with what it has read"
        return [
            Finding.of_line(Severity.ERROR, line, facts.store.config_name)
            if "; " in line
            else Finding(Severity.ERROR, facts.store.config_name, line, remedy)
            for line in facts.conf_problems
        ]
    if facts.conf is None:
        raise NotHereError("the store does not say it")
    where = facts.store.config_name
    found = [Finding.of_line(Severity.WARNING, note, where) for note in facts.conf.notes]
    if facts.document is None:
        return found
    asked = [facts.conf.pool(family).network for family in facts.conf.families]
    running = [it for it in facts.networks if it in asked]
    if len(running) < len(asked):
        lacks = ", ".join(str(it) for it in asked if it not in running)
        has = ", ".join(map(str, facts.networks))
        cause = f"it has the Network {lacks}, and the daemon runs with {has}"
        found.append(
            Finding(Severity.WARNING, where, cause, "restart the daemons of all hosts, or take the change back")
        )
    wanted = facts.conf.backend.type
    if wanted != facts.backend_type and not (wanted == "vxlan" and facts.document["datapath"] is not None):
        cause = f"it asks for Backend.Type {wanted}, and the daemon runs {facts.backend_type}"
        found.append(
            Finding(Severity.WARNING, where, cause, "restart the daemons of all hosts, or take the change back")
        )
    return found


async def own_lease(facts: Facts) -> list[Finding]:
    if facts.document is None or facts.store.snapshot is None:
        raise NotHereError("it takes what the daemon and the store say to compare them")
    if facts.store.lack:
        raise NotHereError("our node has none to give, which the check `pod-cidr` says")
    lease = facts.document["lease"]
    subnet: IPNetwork = ip_network(lease["subnet"])
    there = next((it for it in facts.store.snapshot.leases if subnet in (it.subnets.ipv4, it.subnets.ipv6)), None)
    if there is None:
        cause = f"{facts.store.name} has no lease for {subnet}, which the pods here use: another host may take it"
        remedy = "the daemon writes it again within seconds; if it does not, its log says why"
        return [Finding(Severity.ERROR, str(subnet), cause, remedy)]
    if there.attrs.host_address != ip_address(lease["public_ip"]):
        cause = f"{facts.store.name} says that {there.attrs.host_address} has {subnet}, which the pods here use"
        remedy = "two hosts with one identity? look at --state-dir of both, and `udptun lease list`; then restart one"
        return [Finding(Severity.ERROR, str(subnet), cause, remedy)]
    return []


async def pod_cidr(facts: Facts) -> list[Finding]:
    if not facts.is_kube:
        raise NotHereError("only Kubernetes gives podCIDRs")
    if facts.store.error:
        raise NotHereError("the API server does not answer")
    node = facts.store.node_name
    if facts.store.lack:
        return [Finding.of_line(Severity.ERROR, facts.store.lack, node)]
    if facts.document is None or facts.store.snapshot is None:
        return []
    lease = next((it for it in facts.store.snapshot.leases if it.node_name == node), None)
    subnet = ip_network(facts.document["lease"]["subnet"])
    if lease is None:
        cause = f"node {node} has a podCIDR, and not the annotations of a lease, so no other host sends to pods here"
        return [Finding(Severity.ERROR, node, cause, "the daemon writes them again; if it does not, its log says why")]
    if subnet not in (lease.subnets.ipv4, lease.subnets.ipv6):
        cause = f"the podCIDR of node {node} is {lease.subnet}, and the daemon runs with {subnet}"
        return [Finding(Severity.ERROR, node, cause, "drain the node and restart the daemon and its pods")]
    return []


async def unused_leases(facts: Facts) -> list[Finding]:
    if facts.document is not None:
        lines = [str(it) for it in facts.document["skipped"]]
    elif facts.store.snapshot is not None:
        lines = list(facts.store.snapshot.skipped)
    else:
        raise NotHereError("neither the daemon nor the store can be asked")
    remedy = "pods of that host are not reached: mend the lease, or delete it (`udptun lease release`)"
    found = [Finding(Severity.WARNING, "", f"a lease is not used: {line}", remedy) for line in lines[:_SHOWN]]
    if (more := len(lines) - _SHOWN) > 0:
        cause = f"{more} more leases are not used"
        found.append(Finding(Severity.WARNING, "", cause, "`udptun status --json` has them all under `skipped`"))
    return found
