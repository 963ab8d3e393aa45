"""Programs as filters of traffic control: beside those of others, which stay as they are."""

from __future__ import annotations

import errno
import os
import re
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from namespace import Namespace, linked_namespace, requires_netns

from udptun.core.errors import KernelError
from udptun.datapath.shortcut.programs import find_lack
from udptun.kernel import filters
from udptun.kernel.bpf import Hook, load_program
from udptun.kernel.filters import attach_filter, find_filters, remove_filters
from udptun.kernel.rtnetlink import Request

pytestmark = [
    pytest.mark.netns,
    requires_netns,
    pytest.mark.skipif(os.geteuid() == 0 and bool(find_lack()), reason=find_lack()),
]

OURS, OTHERS = "udptun 10.244.0.0/16", "udptun 10.24.0.0/16"
"""`OURS` begins with neither."""
_PASSES_ON = struct.pack("=BBhiBBhi", 0xB7, 0, 0, -1, 0x95, 0, 0, 0)
"""r0 = TC_ACT_UNSPEC; exit"""
_FOREIGN = "bpf da bytecode 1,6 0 0 4294967295,"
"""A filter of somebody else: classic BPF that answers the same."""


@pytest.fixture
def linked() -> Iterator[Namespace]:
    with linked_namespace() as namespace:
        yield namespace


@pytest.fixture
def program() -> Iterator[int]:
    fd = load_program("ut_test", _PASSES_ON)
    yield fd
    os.close(fd)


@pytest.fixture
def attached(linked: Namespace, program: int) -> Callable[..., None]:
    def attach(alias: str, name: str, hook: Hook = Hook.INGRESS, device: str = "v0") -> None:
        linked.call_async(lambda: attach_filter(alias, name, program, socket.if_nametoindex(device), hook))

    return attach


def tc(namespace: Namespace, command: str) -> str:
    head, _, program = command.partition(" bytecode ")
    argv = ["tc", "-n", namespace.name, *head.split(), *(["bytecode", program] if program else [])]
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=30).stdout


def shown(namespace: Namespace, hook: str = "ingress", device: str = "v0") -> list[tuple[int, str]]:
    """Priority of each filter, and its name or what it is."""
    lines = tc(namespace, f"filter show dev {device} {hook}")
    found = re.findall(r"pref (\d+) bpf chain \d+ handle \w+ (.*?)(?: direct-action|$)", lines, re.MULTILINE)
    return [(int(priority), name) for priority, name in found]


def holders(namespace: Namespace) -> list[str]:
    return re.findall(r"^qdisc (?:clsact|ingress) .*dev (\S+)", tc(namespace, "qdisc show"), re.MULTILINE)


def remove(namespace: Namespace, alias: str, *, with_clsact: bool = True) -> list[str]:
    """The names of those that are gone."""
    gone = namespace.call_async(lambda: remove_filters([alias], with_clsact=with_clsact))
    return sorted(it.name for it in gone)


def test_our_clsact_goes_with_everything_of_ours(linked: Namespace, attached: Callable[..., None]) -> None:
    attached(OURS, "decap")
    attached(OURS, "encap", Hook.EGRESS)
    attached(OURS, "deliver", device="v1")
    assert sorted(holders(linked)) == ["v0", "v1"]
    assert [name for _, name in shown(linked, "egress")] == [f"{OURS} encap"]
    # While it is switched off and on, the devices go on sending.
    assert remove(linked, OURS, with_clsact=False) == [f"{OURS} {name}" for name in ("decap", "deliver", "encap")]
    assert sorted(holders(linked)) == ["v0", "v1"]
    attached(OURS, "decap")
    assert remove(linked, OURS) == [f"{OURS} {name}" for name in ("clsact", "clsact", "decap")]
    assert holders(linked) == []
    assert remove(linked, OURS) == []


def test_filters_of_others_before_and_behind_ours_stay_and_so_does_their_clsact(
    linked: Namespace, attached: Callable[..., None]
) -> None:
    tc(linked, "qdisc add dev v0 clsact")
    # One has none of its own: the kernel chooses.
    for priority in ("", "prio 1", "prio 60000"):
        tc(linked, f"filter add dev v0 ingress {priority} protocol all {_FOREIGN}")
    before = shown(linked)
    attached(OURS, "decap")
    ((ours, name),) = set(shown(linked)) - set(before)
    assert name == f"{OURS} decap"
    assert sorted(priority < ours for priority, _ in before) == [False, True, True]
    assert remove(linked, OURS) == [f"{OURS} decap"]
    assert shown(linked) == before
    for priority, _ in before:
        tc(linked, f"filter delete dev v0 ingress prio {priority}")
    attached(OURS, "decap")
    remove(linked, OURS)
    assert holders(linked) == ["v0"]


def test_our_clsact_stays_while_somebody_uses_it(linked: Namespace, attached: Callable[..., None]) -> None:
    attached(OURS, "decap")
    tc(linked, f"filter add dev v0 egress prio 7 protocol ip {_FOREIGN}")
    remove(linked, OURS)
    assert [priority for priority, _ in shown(linked, "egress")] == [7]


def test_each_network_has_its_own_filter_and_the_last_one_takes_the_clsact_along(
    linked: Namespace, attached: Callable[..., None]
) -> None:
    attached(OURS, "decap")
    attached(OTHERS, "decap")
    assert remove(linked, OURS) == [f"{OURS} clsact", f"{OURS} decap"]
    assert {name for _, name in shown(linked)} == {f"{OTHERS} clsact", f"{OTHERS} decap"}
    assert remove(linked, OURS) == []
    index = linked.show("link show v0")[0]["ifindex"]
    found = linked.call_async(lambda: find_filters([OTHERS], [index, 999]))
    assert {it.name for it in found} == {f"{OTHERS} clsact", f"{OTHERS} decap"}
    remove(linked, OTHERS)
    assert holders(linked) == []


def test_where_others_have_ingress_only_what_comes_in_can_be_taken(
    linked: Namespace, attached: Callable[..., None]
) -> None:
    """At `ingress` the kernel would take a filter of the way out for one of the way in."""
    tc(linked, "qdisc add dev v0 ingress")
    attached(OURS, "decap")
    assert len(shown(linked)) == 1
    with pytest.raises(KernelError, match="qdisc ingress of somebody else") as raised:
        attached(OURS, "encap", Hook.EGRESS)
    assert raised.value.errno == errno.EEXIST
    assert remove(linked, OURS) == [f"{OURS} decap"]
    assert (shown(linked), holders(linked)) == ([], ["v0"])


def test_what_cannot_be_attached_is_said(linked: Namespace) -> None:
    with pytest.raises(KernelError, match="cannot attach a BPF program to link"):
        linked.call_async(lambda: attach_filter(OURS, "decap", 0, socket.if_nametoindex("v0"), Hook.INGRESS))
    assert remove(linked, OURS) == [f"{OURS} clsact"]
    assert holders(linked) == []
    with pytest.raises(KernelError) as raised:
        linked.call_async(lambda: attach_filter(OURS, "decap", 0, 999, Hook.INGRESS))
    assert raised.value.errno == errno.ENODEV


def test_where_the_sign_cannot_be_made_no_clsact_stays(
    linked: Namespace, attached: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a kernel without CONFIG_NET_CLS_BPF.  It stayed for ever, as nobody could know that it was ours."""
    new_filter = filters._new_filter

    def of_an_unknown_kind(*args: object) -> Request:
        request = new_filter(*args)  # type: ignore[arg-type]
        return replace(request, body=request.body.replace(b"bpf\0", b"b?f\0"))

    monkeypatch.setattr(filters, "_new_filter", of_an_unknown_kind)
    with pytest.raises(KernelError, match="CONFIG_NET_CLS_BPF"):
        attached(OURS, "decap")
    assert holders(linked) == []

    def refuse(*_args: object) -> int:
        raise KernelError("cannot load ut_sign", errno.EPERM)

    monkeypatch.setattr(filters, "load_program", refuse)
    with pytest.raises(KernelError, match="cannot load ut_sign"):
        attached(OURS, "decap")
    assert holders(linked) == []
