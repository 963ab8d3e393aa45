"""The samples of one moment, out of the status document.  Pure.

The status document is all that they are made from, so that `udptun status` and `/metrics` never say two things.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from udptun.control.metrics import table as t
from udptun.control.metrics.table import Metric
from udptun.control.metrics.text import Sample
from udptun.core.offload import ALL, names
from udptun.kernel.process_usage import Usage
from udptun.probing.liveness import Liveness

Document = Mapping[str, Any]
"""As docs/status.md describes it."""

COUNTERS: Mapping[str, Metric] = {
    "encap_packets": t.ENCAP_PACKETS,
    "encap_sent": t.ENCAP_SENT,
    "decap_packets": t.DECAP_PACKETS,
    "decap_delivered": t.DECAP_DELIVERED,
    "decap_punted": t.DECAP_PUNTED,
    "inject_packets": t.INJECT_PACKETS,
    "inject_sent": t.INJECT_SENT,
    "inject_delivered": t.INJECT_DELIVERED,
    "tun_reads": t.TUN_READS,
    "udp_send_calls": t.UDP_SEND_CALLS,
    "udp_send_messages": t.UDP_SEND_MESSAGES,
    "udp_sent_bytes": t.UDP_SENT_BYTES,
    "udp_receive_calls": t.UDP_RECEIVE_CALLS,
    "udp_receive_messages": t.UDP_RECEIVE_MESSAGES,
    "tun_writes": t.TUN_WRITES,
    "tun_written_bytes": t.TUN_WRITTEN_BYTES,
    "icmp_sent": t.ICMP_SENT,
    "icmp_suppressed": t.ICMP_SUPPRESSED,
    "drop_stranger": t.STRANGER_DROPS,
}
"""The datapath's counters that are metrics of their own.  The others are drops."""
_DROP = re.compile(r"(encap|decap|inject)_drop_(.+)")

_PEER_COUNTERS: Mapping[str, Metric] = {
    "encap_packets": t.PEER_ENCAP_PACKETS,
    "encap_bytes": t.PEER_ENCAP_BYTES,
    "decap_packets": t.PEER_DECAP_PACKETS,
    "decap_bytes": t.PEER_DECAP_BYTES,
}
_DEVICE_COUNTERS: Mapping[str, Metric] = {
    "rx_packets": t.DEVICE_RECEIVE_PACKETS,
    "rx_bytes": t.DEVICE_RECEIVE_BYTES,
    "rx_dropped": t.DEVICE_RECEIVE_DROPS,
    "rx_errors": t.DEVICE_RECEIVE_ERRORS,
    "tx_packets": t.DEVICE_TRANSMIT_PACKETS,
    "tx_bytes": t.DEVICE_TRANSMIT_BYTES,
    "tx_dropped": t.DEVICE_TRANSMIT_DROPS,
    "tx_errors": t.DEVICE_TRANSMIT_ERRORS,
}


def daemon_samples(version: str, started_s: float, usage: Usage | None, *, is_ready: bool) -> Iterator[Sample]:
    """Those that there are from the daemon's very start on.  `started_s`: Unix time."""
    yield Sample(t.BUILD, (version,), 1)
    yield Sample(t.READY, (), int(is_ready))
    if usage is not None:
        yield Sample(t.CPU, (), usage.cpu_s)
        yield Sample(t.MEMORY, (), usage.memory_bytes)
    yield Sample(t.START_TIME, (), round(started_s, 3))


def samples(document: Document, liveness: Mapping[Liveness, int]) -> Iterator[Sample]:
    """The others.  `document` may have some of the peers alone; `liveness` counts them all."""
    yield from _host(document)
    yield from _leases(document, liveness)
    yield from _changes(document)
    for device in document["devices"]:
        for key, metric in _DEVICE_COUNTERS.items():
            yield Sample(metric, (device["name"],), device[key])
    if document["datapath"] is not None:
        yield from _datapaths(document)
    yield from _peers(document)


def counter_sample(name: str, n: int) -> Sample:
    """One of the datapath's counters, which docs/wire-format.md has by its name."""
    if (metric := COUNTERS.get(name)) is not None:
        return Sample(metric, (), n)
    found = _DROP.fullmatch(name)
    assert found is not None, name
    return Sample(t.DROPS, (found[1], found[2]), n)


def _host(document: Document) -> Iterator[Sample]:
    lease, backend, ipv6 = document["lease"], document["backend"], document["ipv6"]
    said = document["network"], lease["subnet"], lease["public_ip"], backend["type"], backend["device"] or ""
    yield Sample(t.HOST, (*said, document["store"]), 1)
    yield Sample(t.PROBLEMS, (), len(document["problems"]))
    is_ipv6_alone = ":" in lease["subnet"]
    if not is_ipv6_alone:
        yield Sample(t.MTU, ("ipv4",), backend["mtu"])
    if ipv6 is not None and ipv6["mtu"] is not None:
        yield Sample(t.MTU, ("ipv6",), ipv6["mtu"])
    yield Sample(t.UNDERLAY_MTU, (), document["underlay"]["mtu"])


def _leases(document: Document, liveness: Mapping[Liveness, int]) -> Iterator[Sample]:
    if (expires_s := document["lease"]["expires_at"]) is not None:
        yield Sample(t.LEASE_EXPIRY, (), expires_s)
    yield Sample(t.STORE_UP, (), int(document["store_answers"]))
    if (answered_s := document["store_answered_at"]) is not None:
        yield Sample(t.STORE_ANSWERED, (), answered_s)
    for state in Liveness:
        yield Sample(t.PEERS, (state.value,), liveness.get(state, 0))
    yield Sample(t.SKIPPED, (), len(document["skipped"]))
    yield Sample(t.OTHER_TYPES, (), len(document["other_types"]))


def _changes(document: Document) -> Iterator[Sample]:
    for change in document["changes"]:
        for cause, key in (("desired", "desired"), ("repair", "repairs")):
            yield Sample(t.CHANGES, (change["family"], change["object"], cause), change[key])
    yield Sample(t.FIREWALL_REPAIRS, (), document["firewall"]["repairs"])


def _datapaths(document: Document) -> Iterator[Sample]:
    """A VTEP has one for each family.

    What ends with a process has a series for each, as a sum would fall when one of them is replaced.  The counters
    survive their process and are summed.  The workers of IPv6's are called `ipv6-0` and so on.
    """
    backend, ipv6 = document["backend"], document["ipv6"]
    parts, counters = [("", backend["device"] or "", document["datapath"])], Counter[str](document["counters"])
    if ipv6 is not None and ipv6.get("datapath") is not None:
        parts.append(("ipv6-", ipv6["device"] or "", ipv6["datapath"]))
        counters.update(ipv6["counters"])
    for _, device, datapath in parts:
        yield from _processes(device, datapath)
    for name in names(ALL):
        yield Sample(t.OFFLOAD, (name,), int(name in backend["offloads"]))
    yield Sample(t.STRANGER_FILTER, (), int(any(it["stranger_filter"] == "on" for _, _, it in parts)))
    yield Sample(t.SHORTCUT, (), int(any(it["shortcut"] == "on" for _, _, it in parts)))
    detours = [it["shortcut_detour"] for _, _, it in parts]
    yield Sample(t.SHORTCUT_DETOUR, (), int(any(it is not None and it["state"] == "on" for it in detours)))
    for name, n in counters.items():
        yield counter_sample(name, n)
    for prefix, _, datapath in parts:
        yield from _workers(datapath, prefix)


def _processes(device: str, datapath: Document) -> Iterator[Sample]:
    yield Sample(t.DATAPATH_PROCESSES, (device, "active"), int(datapath["pid"] is not None))
    yield Sample(t.DATAPATH_PROCESSES, (device, "standby"), len(datapath["standby_pids"]))
    if datapath["cpu_s"] is not None:
        yield Sample(t.DATAPATH_CPU, (device,), datapath["cpu_s"])
        yield Sample(t.DATAPATH_MEMORY, (device,), datapath["memory_bytes"])
    if datapath["started_at"] is not None:
        yield Sample(t.DATAPATH_START_TIME, (device,), datapath["started_at"])


def _workers(datapath: Document, prefix: str) -> Iterator[Sample]:
    for queue in datapath["receive_queues"]:
        labels = f"{prefix}{queue['worker']}", queue["family"]
        yield Sample(t.RECEIVE_QUEUE_DROPS, labels, queue["drops"])
        yield Sample(t.RECEIVE_QUEUE_BYTES, labels, queue["waiting_bytes"])
        yield Sample(t.RECEIVE_QUEUE_LIMIT, labels, queue["limit_bytes"])
    for i, (state, counters) in enumerate(zip(datapath["workers"], datapath["worker_counters"], strict=True)):
        worker = (f"{prefix}{i}",)
        yield Sample(t.WORKER_RUNNING, worker, int(state == "running"))
        yield Sample(t.WORKER_ENCAP, worker, counters.get("encap_packets", 0))
        yield Sample(t.WORKER_DECAP, worker, counters.get("decap_packets", 0))
        yield Sample(t.WORKER_DROPS, worker, sum(n for name, n in counters.items() if _DROP.fullmatch(name)))


def _peers(document: Document) -> Iterator[Sample]:
    """Each subnet once: where IPv6 is alone, its peers stand in the document twice."""
    leases = {peer["subnet"]: peer for peer in document["peers"]}
    ipv6: Sequence[Document] = [] if document["ipv6"] is None else document["ipv6"]["peers"]
    for subnet, peer in leases.items():
        port = "" if peer["port"] is None else str(peer["port"])
        wrote = "udptun" if peer["udptun"] else "flannel"
        yield Sample(t.PEER, (subnet, peer["public_ip"], port, wrote), 1)
        yield from _peer(peer)
    for peer in ipv6:
        if peer["subnet"] not in leases:
            port = str(peer.get("port") or "")
            yield Sample(t.PEER, (peer["subnet"], peer["public_ip"], port, ""), 1)
            yield from _peer(peer)


def _peer(peer: Document) -> Iterator[Sample]:
    subnet = (peer["subnet"],)
    if (liveness := peer.get("liveness", Liveness.UNKNOWN)) != Liveness.UNKNOWN:
        yield Sample(t.PEER_ALIVE, subnet, int(liveness == Liveness.ALIVE))
    if (rtt_ms := peer.get("rtt_ms")) is not None:
        yield Sample(t.PEER_RTT, subnet, round(rtt_ms / 1000, 6))
    if (path_mtu := peer.get("path_mtu")) is not None:
        yield Sample(t.PEER_PATH_MTU, subnet, path_mtu)
    for key, metric in _PEER_COUNTERS.items():
        if key in peer:
            yield Sample(metric, subnet, peer[key])
