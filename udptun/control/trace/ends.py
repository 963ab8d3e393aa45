"""The parts of the document of docs/trace.md that say where a packet ends, and whose it is.  Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from udptun.control.trace.kernel import Way
from udptun.core.counter_words import COUNTERS, PAGE
from udptun.core.lease import LeasePart
from udptun.core.network_state import socket_address

if TYPE_CHECKING:
    from udptun.datapath.slot import PublishedPeer

Document = dict[str, Any]


def end_before(way: Way, device: str | None) -> Document | None:
    """Where a packet ends that does not come into the tunnel; None: it does."""
    if way.refusal:
        return {"verdict": verdict("kernel", f"the kernel drops it: {way.refusal}", is_delivered=False)}
    if way.is_local:
        return end_here("its destination is this host itself")
    return None if device is not None and way.device == device else end_here(f"it leaves by {way.device}")


def end_behind(way: Way, device: str | None, counter: str | None) -> Document:
    """Where a packet ends that has come out of the tunnel, in which `counter` has counted it."""
    if way.refusal:
        words = f"the kernel drops it behind the tunnel: {way.refusal}"
        return {"verdict": {**verdict("kernel", words, is_delivered=False), "counter": counter}}
    if device is not None and way.device == device and not way.is_local:
        words = f"no device leads to the destination: its route leads back into {device}"
        return {"verdict": {**verdict("kernel", words, is_delivered=False), "counter": counter}}
    to = "this host itself" if way.is_local else way.device
    if counter is None:
        return {"verdict": verdict("kernel", f"the kernel delivers it to {to}", is_delivered=True)}
    return {"verdict": {**counted(counter), "words": f"{COUNTERS[counter].words}, by {to}"}}


def end_here(why: str) -> Document:
    return {"verdict": verdict("kernel", f"not the tunnel's: {why}", is_delivered=False)}


def counted(counter: str) -> Document:
    words = COUNTERS[counter]
    return {
        "delivered": counter in ("encap_sent", "decap_delivered", "decap_punted"),
        "where": "datapath",
        "counter": counter,
        "words": words.words,
        "docs": f"{PAGE}#{words.section}",
    }


def verdict(where: str, words: str, *, is_delivered: bool) -> Document:
    return {"delivered": is_delivered, "where": where, "counter": None, "words": words, "docs": None}


def whose(peer: PublishedPeer) -> str:
    return f"{peer.subnet} of {socket_address(peer.address, peer.port)}"


def published_peer(peer: PublishedPeer | None) -> Document | None:
    if peer is None:
        return None
    return {
        "subnet": str(peer.subnet),
        "public_ip": str(peer.address),
        "port": peer.port,
        "mtu": peer.mtu,
        "dead": peer.is_dead,
    }


def leased_peer(part: LeasePart | None) -> Document | None:
    if part is None:
        return None
    return {"subnet": str(part.subnet), "public_ip": str(part.public_ip), "port": None, "mtu": None, "dead": None}
