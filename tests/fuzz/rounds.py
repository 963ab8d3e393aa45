"""Random flows through the fast path until some processor time is used up, or until the first difference.

    python -m tests.fuzz.rounds --cpu-seconds 600

There are five kinds of rounds, over all that is CARRIED or what is named of it.  Three compare the fast path with the
reference: on all that the TUN may give, on all that peers may send, and on all that anybody may send.  One has flows to
merge, also against the reference.  In the last one worker cuts super-packets up and another puts them together again;
some are corrupted on the way.

`python -m tests.fuzz` runs it with AddressSanitizer and UndefinedBehaviorSanitizer in the fast path.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from ipaddress import IPv6Network
from itertools import product
from typing import Any

from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st

from tests.datapath import test_equivalence as ipv4_batches
from tests.datapath import test_ipv6_equivalence as dual_batches
from tests.datapath.harness import Batch, FastDatapath, Message, ReferenceDatapath, assert_same_packets, trains
from tests.datapath.test_equivalence import ECN, QUICK
from tests.datapath.test_super_packets import Super
from tests.datapath.test_tracing import ends, ends_shown, watching
from tests.packets import (
    DESTINATION_OPTIONS,
    MTU,
    NEAR,
    NEAR_POD,
    NEAR_POD6,
    NO_VNET_HDR,
    options_header,
    stepped,
)
from tests.reference import Table
from tests.reference_ip import IPV4, IPV6, read_header
from udptun.datapath.tracing import Tracer

CHUNK = settings(QUICK, max_examples=25, derandomize=False, phases=(Phase.generate,))
PROGRESS_S = 15.0
CARRIED = {
    "udp": "IPv4 in udp",
    "dual": "IPv4 and IPv6 in udp",
    "vxlan": "IPv4 over VXLAN",
    "vxlan6": "IPv6 over VXLAN",
}
KINDS = ("encap", "decap", "wire", "flows", "round trips")


@dataclass
class Rounds:
    """Workers, their references, and how much they have done."""

    carried: Sequence[str] = tuple(CARRIED)
    n: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    n_merged: int = 0

    def __post_init__(self) -> None:
        self._undo = ExitStack()
        self._pairs = []
        kinds = [{"is_vxlan": "vxlan" in kind, "has_ipv6": kind in ("dual", "vxlan6")} for kind in self.carried]
        for kind, has_gro, has_vnet_hdr in product(kinds, (True, False), (True, False)):
            how = {"has_gro": has_gro, "is_in_trains": True, "has_vnet_hdr": has_vnet_hdr, **kind}
            fast, model = self._undo.enter_context(FastDatapath(**how)), ReferenceDatapath(**how)
            model.table = fast.table
            # Half of them are watched, each by a filter that everything passes.
            self._pairs.append((fast, model, watching(fast) if has_gro == has_vnet_hdr else None))
        # Near and far: the subnet that packets go to is the far end's, and they come from the near end's.
        self._ends = []
        for kind in kinds:
            far = self._undo.enter_context(FastDatapath(**kind))
            near = next(peer for peer in far.table.peers if str(peer.remote[0]) == NEAR)
            has_ipv4 = not (kind["is_vxlan"] and kind["has_ipv6"])
            network, own_subnet = ("10.244.0.0/16", "10.244.2.0/24") if has_ipv4 else ("0.0.0.0/32", "0.0.0.0/32")
            far.set_overlay(network, own_subnet, [("10.244.1.0/24", near)] * has_ipv4)
            if kind["has_ipv6"]:
                own, peers = IPv6Network("fd00:244:0:2::/64"), far.table.peers
                lease = replace(near, index=2, subnet=IPv6Network("fd00:244:0:1::/64"))
                tunnel_address = own.network_address
                far.configure(own_subnet_ipv6=own, tunnel_address_ipv6=tunnel_address, peers=(*peers, lease))
            self._ends.append((self._undo.enter_context(FastDatapath(**kind)), far))

    def close(self) -> None:
        self._undo.close()

    def chunk(self, number: int) -> None:
        """Some rounds of each kind; another `number` makes other rounds."""
        fast, model, tracer = self._pairs[number % len(self._pairs)]
        near, far = self._ends[number % len(self._ends)]
        batches = ipv4_batches if fast.table.network_ipv6 is None else dual_batches

        @seed(number)
        @CHUNK
        @given(raws=batches.ENCAP_BATCHES)
        def encap(raws: list[bytes]) -> None:
            if not fast.has_vnet_hdr:
                raws = [NO_VNET_HDR + raw[len(NO_VNET_HDR) :] for raw in raws]
            self._compare("encap", fast.encap_batch(raws), model.encap_batch(raws), tracer)

        @seed(number)
        @CHUNK
        @given(datagrams=batches.DECAP_BATCHES, ecn=ECN)
        def decap(datagrams: list[tuple[bytes, str]], ecn: int) -> None:
            self._compare("decap", fast.decap_batch(datagrams, ecn), model.decap_batch(datagrams, ecn), tracer)

        @seed(number)
        @CHUNK
        @given(messages=batches.WIRE_BATCHES)
        def wire(messages: list[Message]) -> None:
            self._compare("wire", fast.decap_wire(messages), model.decap_wire(messages), tracer)

        @seed(number)
        @CHUNK
        @given(messages=batches.STREAM_BATCHES)
        def flows(messages: list[Message]) -> None:
            self._compare("flows", fast.decap_messages(messages), model.decap_messages(messages), tracer)

        @seed(number)
        @CHUNK
        @given(supers=super_packets(near.table), data=st.data())
        def round_trip(supers: list[Super], data: st.DataObject) -> None:
            self._there_and_back(near, far, supers, data)

        for kind in (encap, decap, wire, flows, round_trip):
            kind()

    def _compare(self, kind: str, got: Batch, expected: Batch, tracer: Tracer | None) -> None:
        assert got.counts == expected.counts
        if tracer is not None:
            assert ends_shown(tracer) == ends(got.counts)
            assert tracer.n_lost == 0
        assert got.sends == expected.sends
        self.n_merged += assert_same_packets(got.writes, expected.writes)
        self.n[kind] += 1

    def _there_and_back(self, near: FastDatapath, far: FastDatapath, supers: list[Super], data: st.DataObject) -> None:
        packets = [stepped(packet) for one in supers for packet in one.packets]
        (sent,) = near.encap_batch([one.raw for one in supers]).sends.values()
        assert sent == packets
        for _ in range(data.draw(st.sampled_from((0, 0, 1, 3)))):
            spoilt = data.draw(st.integers(0, len(sent) - 1))
            # Behind the IP header: a packet with a spoilt IP header is dropped.
            at = data.draw(st.integers(read_header(sent[spoilt]).header_len, len(sent[spoilt]) - 1))
            flipped = sent[spoilt][at] ^ (1 << data.draw(st.integers(0, 7)))
            sent[spoilt] = sent[spoilt][:at] + bytes([flipped]) + sent[spoilt][at + 1 :]
        got = far.decap_messages(trains([(payload, NEAR) for payload in sent]))
        assert got.counts == {"decap_packets": len(sent), "decap_delivered": len(sent)}, got.counts
        # The spoilt checksum may happen to be a partial one.  Everything else is written as it is.
        plain = [write for write in got.writes if write[1] or not write[0]]
        expected = [NO_VNET_HDR + stepped(packet) for packet in sent]
        if len(plain) == len(got.writes):
            self.n_merged += assert_same_packets(got.writes, expected)
        self.n["round trips"] += 1


@st.composite
def super_packets(draw: st.DrawFn, table: Table) -> list[Super]:
    """Towards one host, of segments that fit; of the families that the table has."""
    is_ipv6 = st.sampled_from([family is IPV6 for family in (IPV4, IPV6) if table.space(family)])
    return [draw(one_super(is_ipv6=draw(is_ipv6))) for _ in range(draw(st.integers(1, 4)))]


@st.composite
def one_super(draw: st.DrawFn, *, is_ipv6: bool) -> Super:
    protocol = draw(st.sampled_from((6, 6, 17)))
    options = draw(st.sampled_from((b"", bytes.fromhex("0101080a0000000100000002"), b"\1" * 40)))
    ip: list[tuple[str, Any]] = [
        ("tos", draw(st.sampled_from((0, 2, 0xB8)))),
        ("ttl", draw(st.integers(3, 255))),
    ]
    if is_ipv6:
        headers = draw(st.sampled_from(((), (), (options_header(DESTINATION_OPTIONS),))))
        ip += [("headers", headers), ("flow_label", draw(st.sampled_from((0, 0xFFFFF))))]
        header = 40 + 8 * len(headers)
    else:
        ip_options = draw(st.sampled_from((b"", b"", b"\1" * 4)))
        ip += [("flags", draw(st.sampled_from(("", "DF")))), ("options", ip_options)]
        header = 20 + len(ip_options)
    header += 20 + len(options) if protocol == 6 else 8
    size = draw(st.sampled_from((1, 7, 100, 536, MTU - header)))
    n_bytes = draw(st.integers(1, min(60_000, 200 * size)) | st.integers(1, 3 * size))
    return Super(
        n_bytes,
        size,
        protocol=protocol,
        destination=NEAR_POD6 if is_ipv6 else NEAR_POD,
        flags=draw(st.sampled_from((0x10, 0x18, 0x19, 0x90, 0x50)) | st.integers(0, 255)),
        sequence=draw(st.sampled_from((0, 1000, 0xFFFFFF00))),
        tcp_options=options,
        ident=draw(st.integers(0, 0xFFFF)),
        ip=tuple(ip),
        seed=draw(st.integers(0, 255)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.rounds", description=__doc__)
    parser.add_argument("--cpu-seconds", type=float, default=60.0, metavar="S", help="default: %(default)g")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000, metavar="N", help="of the first round")
    parser.add_argument("--carried", choices=CARRIED, help="default: all, in turn")
    given_arguments = parser.parse_args()
    one = given_arguments.carried
    rounds = Rounds((one,) if one else tuple(CARRIED))
    number, said_s = given_arguments.seed, 0.0
    print(f"{' and '.join(CARRIED[name] for name in rounds.carried)}, first seed {number}", flush=True)
    try:
        while (used_s := time.process_time()) < given_arguments.cpu_seconds:
            rounds.chunk(number)
            number += 1
            if used_s - said_s > PROGRESS_S:
                said_s = used_s
                print(f"{used_s:.0f} s: {rounds.n}", flush=True)
    except BaseException:
        print(f"failed in the chunk of seed {number}: --seed {number}", flush=True)
        raise
    rounds.close()
    print(f"{time.process_time():.0f} CPU seconds, nothing found: {rounds.n}, {rounds.n_merged} merged writes")


if __name__ == "__main__":
    main()
