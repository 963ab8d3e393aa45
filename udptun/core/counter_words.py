"""Each counter in plain words, and the place in docs/wire-format.md that says exactly when a packet ends in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PAGE = "docs/wire-format.md"


@dataclass(frozen=True, slots=True)
class CounterWords:
    """What became of a packet, or what was counted, to stand behind a number; and an anchor in PAGE."""

    words: str
    section: str


_BY_SECTION = {
    "encap-tun-to-udp": {
        "encap_packets": "packets of this host's pods for other hosts",
        "encap_sent": "sent to the host of the destination",
        "encap_drop_short": "shorter than an IP header",
        "encap_drop_ipv6": "IPv6, which is not carried here",
        "encap_drop_malformed": "header does not fit the packet",
        "encap_drop_no_route": "no host leases the destination",
        "encap_drop_ttl": "TTL or hop limit used up",
        "encap_drop_too_big": "too long for the path",
        "encap_drop_send": "the kernel refused the datagram",
        "encap_drop_in_flight": "in flight when processes died",
    },
    "decap-udp-to-tun": {
        "decap_packets": "datagrams received",
        "decap_delivered": "delivered to this host's pods",
        "decap_drop_vxlan_short": "shorter than the VXLAN header",
        "decap_drop_vxlan_flags": "VXLAN without a valid VNI",
        "decap_drop_vxlan_vni": "VXLAN with another VNI",
        "decap_drop_vxlan_ethertype": "VXLAN of a protocol not carried",
        "decap_drop_vxlan_mac": "VXLAN frame to another MAC",
        "decap_drop_empty": "empty datagram",
        "decap_drop_short": "shorter than an IP header",
        "decap_drop_ipv6": "IPv6, which is not carried here",
        "decap_drop_version": "neither IPv4 nor IPv6",
        "decap_drop_ihl": "impossible header length",
        "decap_drop_length": "shorter than its header says",
        "decap_drop_checksum": "wrong header checksum",
        "decap_drop_options": "bad options, or a source route",
        "decap_drop_fragment": "impossible fragment",
        "decap_drop_unknown_peer": "sender is no host's PublicIP",
        "decap_drop_source_martian": "source that nobody can have",
        "decap_drop_source_own": "source is this host's own",
        "decap_drop_source_spoofed": "source is not the sender's",
        "decap_drop_source_outside": "source is outside Network",
        "decap_drop_foreign_destination": "not for this host's pods",
        "decap_drop_ttl": "TTL or hop limit used up",
        "decap_drop_oversize": "longer than the MTU",
        "decap_drop_tun": "the device refused the packet",
        "decap_drop_in_flight": "in flight when processes died",
        "decap_punted": "answers to probes, for the daemon",
        "decap_drop_punt_full": "probe's answer, daemon too slow",
    },
    "packets-of-the-control-plane": {
        "inject_packets": "probes and answers of the daemon",
        "inject_sent": "probes sent to other hosts",
        "inject_delivered": "packets of the daemon written to the device",
        "inject_drop_malformed": "probe is no whole IP packet",
        "inject_drop_no_route": "probe to what no host leases",
        "inject_drop_refused": "probe, refused by the kernel",
        "inject_drop_in_flight": "probe, its process was killed",
        "inject_drop_full": "probe, too many are waiting",
    },
    "dead-peers": {"encap_drop_dead": "the destination's host is dead"},
    "marks-of-congestion": {"decap_drop_ce": "congestion, packet without ECN"},
    "system-calls": {
        "tun_reads": "reads of packets of this host's pods",
        "udp_send_calls": "calls that sent packets of pods",
        "udp_send_messages": "their datagrams, or trains of them",
        "udp_sent_bytes": "bytes of pods' packets sent to other hosts",
        "udp_receive_calls": "calls that received datagrams",
        "udp_receive_messages": "datagrams received, or trains of them",
        "tun_writes": "writes of packets to this host's pods",
        "tun_written_bytes": "bytes delivered to this host's pods",
    },
    "loops": {
        "encap_drop_loop": "the tunnel routed into itself",
        "decap_drop_loop": "the tunnel routed into itself",
    },
    "floods-of-strangers": {"drop_stranger": "flood of strangers, kept out"},
    "icmp-that-we-send": {
        "icmp_sent": "ICMP errors sent about dropped packets",
        "icmp_suppressed": "ICMP errors not sent, by rule or rate limit",
    },
}

COUNTERS: Mapping[str, CounterWords] = {
    name: CounterWords(words, section) for section, counters in _BY_SECTION.items() for name, words in counters.items()
}
"""All keys of `counters` in the status document."""


def is_drop(counter: str) -> bool:
    """Whether it counts packets that were dropped."""
    return "drop_" in counter
