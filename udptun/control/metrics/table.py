"""Every metric that `/metrics` has.  docs/metrics.md lists them in this order, and a test compares the two.

    metric      series of one name, type and meaning, one for each combination of labels
    sample      the value of one series now

Names follow Prometheus' rules: base units (seconds, bytes), the unit at the end, and `_total` behind it in counters.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    COUNTER = "counter"
    """It only grows, and begins at zero again when what counts begins anew."""
    GAUGE = "gauge"
    INFO = "info"
    """Its value is 1, and its labels are what it says."""


@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """`name` is that of the samples.  `help` is one line for people."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()

    @property
    def unit(self) -> str:
        """As OpenMetrics names it; empty for a plain number."""
        stem = self.name.removesuffix("_total")
        return next((unit for unit in ("seconds", "bytes") if stem.endswith(f"_{unit}")), "")


def _counter(name: str, text: str, *labels: str) -> Metric:
    return Metric(f"{name}_total", Kind.COUNTER, text, labels)


def _gauge(name: str, text: str, *labels: str) -> Metric:
    return Metric(name, Kind.GAUGE, text, labels)


def _info(name: str, text: str, *labels: str) -> Metric:
    return Metric(f"{name}_info", Kind.INFO, text, labels)


# The daemon, from its very start.
BUILD = _info("udptun_build", "The daemon's version.", "version")
READY = _gauge("udptun_ready", "1 once the network is ready, as /readyz says; 0 before. Until then most others lack.")
CPU = _counter("process_cpu_seconds", "Processor time that the daemon has used, without the datapath's.")
MEMORY = _gauge("process_resident_memory_bytes", "Memory of the daemon, without the datapath's.")
START_TIME = _gauge("process_start_time_seconds", "When the daemon began, Unix time.")

# This host.
HOST = _info(
    "udptun_host",
    "What this host runs with.",
    *("network", "subnet", "public_ip", "backend", "device", "store"),
)
PROBLEMS = _gauge("udptun_problems", "Things that are wrong right now; `udptun status` has a line for each.")
MTU = _gauge("udptun_mtu_bytes", "The largest packet of a pod to another host.", "family")
UNDERLAY_MTU = _gauge("udptun_underlay_mtu_bytes", "MTU of the interface to the other hosts.")

# Leases.
LEASE_EXPIRY = _gauge(
    "udptun_lease_expiry_timestamp_seconds", "When our lease expires unless it is renewed, Unix time; none: never."
)
STORE_UP = _gauge("udptun_store_up", "1 while the lease store answers, 0 while it is away.")
STORE_ANSWERED = _gauge(
    "udptun_store_answered_timestamp_seconds",
    "When the lease store last answered or told of a change, Unix time. A quiet store is old without being away.",
)
PEERS = _gauge("udptun_peers", "The other hosts whose leases are in use, by what the probes say of them.", "liveness")
SKIPPED = _gauge("udptun_leases_skipped", "Leases in the store that are not used.")
OTHER_TYPES = _gauge("udptun_hosts_of_other_type", "Hosts that are not reached: their Backend.Type is another one.")

# What the daemon has set in the kernel.
CHANGES = _counter(
    "udptun_reconcile_changes",
    "Changes that this daemon has made in the kernel. cause: desired, or repair of what others have changed.",
    *("family", "object", "cause"),
)
FIREWALL_REPAIRS = _counter("udptun_firewall_repairs", "Differences in its firewall rules that this daemon repaired.")

# The devices that pods' packets go through.  The kernel's own figures, for every backend that makes a device.
DEVICE_RECEIVE_PACKETS = _counter(
    "udptun_device_receive_packets", "Packets from other hosts; a super-packet counts as one.", "device"
)
DEVICE_RECEIVE_BYTES = _counter("udptun_device_receive_bytes", "Their bytes.", "device")
DEVICE_RECEIVE_DROPS = _counter("udptun_device_receive_drops", "Of them, what the kernel has dropped.", "device")
DEVICE_RECEIVE_ERRORS = _counter("udptun_device_receive_errors", "Of them, what the kernel has refused.", "device")
DEVICE_TRANSMIT_PACKETS = _counter(
    "udptun_device_transmit_packets", "Packets to other hosts; a super-packet counts as one.", "device"
)
DEVICE_TRANSMIT_BYTES = _counter("udptun_device_transmit_bytes", "Their bytes.", "device")
DEVICE_TRANSMIT_DROPS = _counter(
    "udptun_device_transmit_drops",
    "Packets to other hosts that the kernel has dropped; with a datapath: its queue was full.",
    "device",
)
DEVICE_TRANSMIT_ERRORS = _counter("udptun_device_transmit_errors", "Of them, what the kernel has refused.", "device")

# The datapath.  Without one, as with kernel VXLAN, there is none of these.
DATAPATH_PROCESSES = _gauge(
    "udptun_datapath_processes", "active: that carries packets. standby: waits.", "device", "role"
)
DATAPATH_CPU = _counter("udptun_datapath_cpu_seconds", "Processor time of the active process.", "device")
DATAPATH_MEMORY = _gauge("udptun_datapath_resident_memory_bytes", "Memory of the active process.", "device")
DATAPATH_START_TIME = _gauge(
    "udptun_datapath_start_time_seconds", "When the active process began, Unix time.", "device"
)
OFFLOAD = _gauge("udptun_offload_in_use", "1 where the kernel does this for the datapath.", "offload")
STRANGER_FILTER = _gauge("udptun_stranger_filter_active", "1 while the kernel keeps a flood of strangers out.")
SHORTCUT = _gauge("udptun_shortcut_active", "1 while the kernel carries the packets that need no thought.")
SHORTCUT_DETOUR = _gauge(
    "udptun_shortcut_detour_active", "1 while the kernel also carries super-packets that arrive whole."
)
ENCAP_PACKETS = _counter("udptun_encap_packets", "Packets from pods to other hosts that the datapath has read.")
ENCAP_SENT = _counter("udptun_encap_sent_packets", "Of them, those that were sent.")
DECAP_PACKETS = _counter("udptun_decap_packets", "Packets from other hosts that the datapath has received.")
DECAP_DELIVERED = _counter("udptun_decap_delivered_packets", "Of them, those that were written to the device.")
DECAP_PUNTED = _counter("udptun_decap_punted_packets", "Of them, answers to probes, which the daemon gets.")
INJECT_PACKETS = _counter("udptun_inject_packets", "Packets that the daemon has the datapath send: probes.")
INJECT_SENT = _counter("udptun_inject_sent_packets", "Of them, those that were sent to a peer.")
INJECT_DELIVERED = _counter("udptun_inject_delivered_packets", "Of them, those that were written to the device.")
DROPS = _counter(
    "udptun_drops", "Packets that were dropped; docs/metrics.md has each reason in words.", "direction", "reason"
)
STRANGER_DROPS = _counter(
    "udptun_stranger_drops", "Datagrams of strangers that the kernel has dropped, and the datapath never saw."
)
TUN_READS = _counter("udptun_tun_reads", "Reads of packets from the device; a super-packet is one.")
UDP_SEND_CALLS = _counter("udptun_udp_send_calls", "Calls that have sent packets of the device to other hosts.")
UDP_SEND_MESSAGES = _counter("udptun_udp_send_messages", "Their messages; one may carry many datagrams.")
UDP_SENT_BYTES = _counter("udptun_encap_sent_bytes", "Bytes of udptun_encap_sent_packets, without the outer headers.")
UDP_RECEIVE_CALLS = _counter("udptun_udp_receive_calls", "Calls that have received datagrams.")
UDP_RECEIVE_MESSAGES = _counter("udptun_udp_receive_messages", "Their messages; one may carry many datagrams.")
TUN_WRITES = _counter("udptun_tun_writes", "Writes of packets to the device; a super-packet is one.")
TUN_WRITTEN_BYTES = _counter(
    "udptun_decap_delivered_bytes", "Bytes of udptun_decap_delivered_packets, without the outer headers."
)
ICMP_SENT = _counter("udptun_icmp_sent", "ICMP errors that were sent about dropped packets.")
ICMP_SUPPRESSED = _counter("udptun_icmp_suppressed", "ICMP errors that were not: not due, or too many.")
RECEIVE_QUEUE_DROPS = _counter(
    "udptun_receive_queue_drops",
    "Datagrams that the kernel has dropped at a worker's socket: its queue was full.",
    *("worker", "family"),
)
RECEIVE_QUEUE_BYTES = _gauge(
    "udptun_receive_queue_bytes", "What waits in a worker's socket, as the kernel counts it.", "worker", "family"
)
RECEIVE_QUEUE_LIMIT = _gauge(
    "udptun_receive_queue_limit_bytes", "How much may wait there.", "worker", "family"
)
WORKER_RUNNING = _gauge("udptun_worker_running", "1 while the worker moves packets or waits for them.", "worker")
WORKER_ENCAP = _counter("udptun_worker_encap_packets", "What this worker has of udptun_encap_packets.", "worker")
WORKER_DECAP = _counter("udptun_worker_decap_packets", "What this worker has of udptun_decap_packets.", "worker")
WORKER_DROPS = _counter("udptun_worker_drops", "What this worker has of udptun_drops.", "worker")

# Some of the peers, see docs/metrics.md.
PEER = _info("udptun_peer", "One of the other hosts. lease: who wrote it.", "peer", "public_ip", "port", "lease")
PEER_ALIVE = _gauge("udptun_peer_alive", "1: it answers. 0: it is dead. None while that is not known.", "peer")
PEER_RTT = _gauge("udptun_peer_rtt_seconds", "How long its last answer to a probe took.", "peer")
PEER_PATH_MTU = _gauge("udptun_peer_path_mtu_bytes", "How long inner packets to it may be, as measured.", "peer")
PEER_ENCAP_PACKETS = _counter("udptun_peer_encap_packets", "Packets sent to it.", "peer")
PEER_ENCAP_BYTES = _counter("udptun_peer_encap_bytes", "Their bytes, without the outer headers.", "peer")
PEER_DECAP_PACKETS = _counter("udptun_peer_decap_packets", "Packets received from it and delivered.", "peer")
PEER_DECAP_BYTES = _counter("udptun_peer_decap_bytes", "Their bytes, without the outer headers.", "peer")

METRICS: tuple[Metric, ...] = tuple(it for it in globals().values() if isinstance(it, Metric))
"""In the order in which they are served."""
