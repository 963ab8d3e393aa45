"""What is measured, as data: paths, workloads, figures, and how tables name and print them.  Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TUNNEL = "udptun"
PLAIN = "plain routing"
VXLAN = "kernel vxlan"
VTEP = "userspace VTEP"
SHORTCUT = "shortcut"
NAIVE = "naive loop"
PYTUN = "pytun loop"
UNDERLAY_ONLY = "underlay"
FLANNELD = "flanneld"
FASTD = "fastd"
OPENVPN = "openvpn"

_BY_IPV4 = {
    "udptun": TUNNEL,
    "host-gw": PLAIN,
    "vxlan": VXLAN,
    "vtep": VTEP,
    "shortcut": SHORTCUT,
    "naive": NAIVE,
    "pytun": PYTUN,
    "underlay": UNDERLAY_ONLY,
    "flanneld": FLANNELD,
    "fastd": FASTD,
    "openvpn": OPENVPN,
}

IPV6_OF = {word: f"{word}-ipv6" for word in ("udptun", "host-gw", "vxlan", "vtep", "underlay")}
"""The paths that can be measured by IPv6: word on the command line -> that of the same by IPv6, which is none there."""


def by_ipv6(name: str) -> str:
    """The name in tables of what `name` is, by IPv6."""
    return f"{name}, IPv6"


def _with_ipv6(word: str, name: str) -> Mapping[str, str]:
    return {word: name, IPV6_OF[word]: by_ipv6(name)} if word in IPV6_OF else {word: name}


PATHS: Mapping[str, str] = {
    each: its_name for word, name in _BY_IPV4.items() for each, its_name in _with_ipv6(word, name).items()
}
"""Word -> name in tables, in the order of tables."""


def paths_of(words: Sequence[str], families: Sequence[str]) -> tuple[str, ...]:
    """The words of PATHS for these paths by these families, `4` and `6`; a path that has no IPv6 is left out there.

    A path stands next to itself by the other family, so that both are measured seconds apart.
    """
    by_family = {"4": {word: word for word in words}, "6": IPV6_OF}
    return tuple(by_family[family][word] for word in words for family in families if word in by_family[family])


@dataclass(frozen=True, slots=True)
class Figure:
    """`form` is a format specification; `is_more_better` None: neither is."""

    title: str
    form: str
    is_more_better: bool | None


FIGURES: Mapping[str, Figure] = {
    "kpackets_per_s": Figure("kpackets/s", ".1f", True),
    "gbit_per_s": Figure("Gbit/s", ".2f", True),
    "lost": Figure("lost", ".0%", False),
    "p50_us": Figure("RTT p50 µs", ".0f", False),
    "p99_us": Figure("RTT p99 µs", ".0f", False),
    "p99_9_us": Figure("RTT p99.9 µs", ".0f", False),
    "tunnel_cpu_s_per_gb": Figure("tunnel CPU s/GB", ".2f", False),
    "system_cpu_s_per_gb": Figure("system CPU s/GB", ".2f", False),
    "tunnel_cpu_us_per_packet": Figure("tunnel CPU µs/packet", ".2f", False),
    "system_cpu_us_per_packet": Figure("system CPU µs/packet", ".2f", False),
    "memory_mib": Figure("MiB", ".1f", False),
    "daemon_mib": Figure("daemon MiB", ".1f", False),
    "datapath_mib": Figure("datapath MiB", ".1f", False),
    "retransmits": Figure("retransmits", ".0f", None),
    "reordered": Figure("reordered", ".0f", None),
    "round_trips": Figure("round trips", ".0f", None),
    "lost_round_trips": Figure("round trips lost", ".0f", None),
    "program_mib": Figure("program MiB", ".1f", None),
}
"""Every figure that a run can have."""

WORKLOADS: Mapping[str, str] = {
    "tcp_1": "TCP, 1 stream",
    "tcp_8": "TCP, 8 streams",
    "tcp_both": "TCP, 1 stream each way at once",
    "udp_64": "UDP, 64 bytes",
    "udp_512": "UDP, 512 bytes",
    "udp_1400": "UDP, 1400 bytes",
    "rtt": "ping-pong, UDP, 64 bytes",
    "memory": "memory",
    "leases": "leases",
}
"""Word on the command line -> name in tables, in the order of tables.

`leases` is a series of its own: its runs have the workloads of LEASES_OF, on the paths that `lease_path` names.
"""

LEASES_OF: Mapping[str, str] = {
    "leases_tcp_1": "tcp_1",
    "leases_udp_64": "udp_64",
    "leases_memory": "memory",
}

N_LEASES = (1, 1_000, 65_534)

TITLES: Mapping[str, str] = {
    **WORKLOADS,
    **{name: f"{WORKLOADS[workload]}, by leases" for name, workload in LEASES_OF.items()},
}

MODES: Mapping[str, str] = {
    "A": "the underlay as veth is made: large segments cross it whole",
    "B": "the underlay's segmentation and merging off: one frame per packet, as a plain NIC",
    "C": "as B, and the receiving host merges (GRO)",
}


TUNNELS = (TUNNEL, by_ipv6(TUNNEL))
"""The paths that are measured with many leases."""


def lease_path(n: int, tunnel: str = TUNNEL) -> str:
    """`tunnel` with `n` leases of other hosts, as a path in tables."""
    name = f"{n:,} lease{'s' * (n != 1)}"
    return name if tunnel == TUNNEL else by_ipv6(name)


LEASE_PATHS: Mapping[str, str] = {lease_path(n, tunnel): tunnel for tunnel in TUNNELS for n in N_LEASES}
"""All paths with that name -> the tunnel, in the order of tables."""
