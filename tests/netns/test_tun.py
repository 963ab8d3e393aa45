"""tun.py against the kernel; `ip -d -j tuntap` and fcntl are the second opinion."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from namespace import Namespace, namespace, open_fds, requires_netns

from udptun.backends.udp import TUN_NAME
from udptun.core.errors import KernelError
from udptun.kernel.tun import VNET_HDR_LEN, Tun, open_queues

pytestmark = [pytest.mark.netns, requires_netns]


@pytest.fixture
def ns() -> Iterator[Namespace]:
    with namespace() as ns:
        yield ns


@pytest.fixture
def tun(ns: Namespace) -> Iterator[Tun]:
    tun = ns.call(lambda: open_queues(TUN_NAME, 2))
    yield tun
    tun.close()


def info(ns: Namespace) -> dict[str, object]:
    (link,) = ns.show(f"link show {TUN_NAME}")
    data: dict[str, object] = link["linkinfo"]["info_data"]
    return data


def test_the_device_has_every_property_the_datapath_relies_on(ns: Namespace, tun: Tun) -> None:
    data = info(ns)
    assert (data["type"], data["pi"], data["vnet_hdr"]) == ("tun", False, True)
    assert (data["multi_queue"], data["numqueues"], data["persist"]) == (True, 2, True)
    assert len(set(tun.fds)) == 2
    for fd in tun.fds:
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK


def test_a_packet_sent_into_the_device_is_read_whole_after_its_virtio_header(ns: Namespace, tun: Tun) -> None:
    ns.ip(f"link set {TUN_NAME} up")
    ns.ip(f"route add 10.244.0.0/16 dev {TUN_NAME}")
    ns.ip("address add 192.0.2.1/32 dev lo")

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(("192.0.2.1", 0))
            sock.sendto(b"payload", ("10.244.9.9", 9))

    ns.call(send)
    packets = []
    for fd in tun.fds:
        while True:
            try:
                packets.append(os.read(fd, 2048))
            except BlockingIOError:
                break
    ipv4 = [p for p in packets if p[VNET_HDR_LEN] >> 4 == 4]
    assert len(ipv4) == 1
    assert ipv4[0][:VNET_HDR_LEN] == bytes(VNET_HDR_LEN)
    assert len(ipv4[0]) == VNET_HDR_LEN + 20 + 8 + 7
    assert ipv4[0].endswith(b"payload")


def test_the_device_stays_when_all_queues_are_closed_and_is_attached_again(ns: Namespace) -> None:
    ns.call(lambda: open_queues(TUN_NAME, 1)).close()
    index = ns.show(f"link show {TUN_NAME}")[0]["ifindex"]
    again = ns.call(lambda: open_queues(TUN_NAME, 3))
    assert ns.show(f"link show {TUN_NAME}")[0]["ifindex"] == index
    assert info(ns)["numqueues"] == 3
    again.close()


def test_queues_are_attached_beside_those_another_holder_has(ns: Namespace, tun: Tun) -> None:
    other = ns.call(lambda: open_queues(TUN_NAME, 1))
    assert info(ns)["numqueues"] == 3
    assert tun.is_attached()
    assert other.is_attached()
    other.close()
    assert info(ns)["numqueues"] == 2


def test_closing_twice_closes_once(ns: Namespace) -> None:
    tun = ns.call(lambda: open_queues(TUN_NAME, 1))
    (fd,) = tun.fds
    tun.close()
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, fd)
    tun.close()
    os.fstat(fd)
    os.close(fd)
    if null != fd:
        os.close(null)


def test_reattach_brings_a_deleted_device_back_for_every_holder(ns: Namespace, tun: Tun) -> None:
    held = os.dup(tun.fds[0])
    ns.ip(f"link delete {TUN_NAME}")
    assert not tun.is_attached()
    with pytest.raises(OSError, match="descriptor") as gone:
        os.read(held, 100)
    assert gone.value.errno == errno.EBADFD

    tun.reattach()
    assert tun.is_attached()
    data = info(ns)
    assert (data["numqueues"], data["persist"], data["vnet_hdr"]) == (2, True, True)
    with pytest.raises(BlockingIOError):
        os.read(held, 2048)
    os.close(held)


def test_reattach_leaves_a_healthy_device_alone(ns: Namespace, tun: Tun) -> None:
    index = ns.show(f"link show {TUN_NAME}")[0]["ifindex"]
    tun.reattach()
    assert ns.show(f"link show {TUN_NAME}")[0]["ifindex"] == index
    assert info(ns)["numqueues"] == 2


def test_reattach_says_so_when_the_device_was_renamed(ns: Namespace, tun: Tun) -> None:
    ns.ip(f"link set {TUN_NAME} name other0")
    assert not tun.is_attached()
    with pytest.raises(KernelError, match=r"is called other0 now.*ip link set other0 name flannel0"):
        tun.reattach()


def test_reattach_refuses_a_foreign_device_that_took_the_name(ns: Namespace, tun: Tun) -> None:
    ns.ip(f"link delete {TUN_NAME}")
    ns.ip(f"tuntap add {TUN_NAME} mode tun")
    with pytest.raises(KernelError, match=r"EINVAL; flannel0 is there already and is not ours"):
        ns.call(tun.reattach)


@pytest.mark.parametrize(
    ("command", "what"),
    [
        (f"tuntap add {TUN_NAME} mode tun", "a TUN device with other flags, such as a single queue"),
        (f"tuntap add {TUN_NAME} mode tap multi_queue", "a TAP device"),
        (f"link add {TUN_NAME} type veth peer name v1", "a veth device"),
        (f"link add {TUN_NAME} type bridge", "a bridge device"),
    ],
)
def test_a_foreign_device_of_the_name_is_refused_by_name(ns: Namespace, command: str, what: str) -> None:
    ns.ip(command)
    before = open_fds()
    with pytest.raises(KernelError) as refused:
        ns.call(lambda: open_queues(TUN_NAME, 1))
    assert str(refused.value) == (
        "cannot attach to TUN device flannel0 through /dev/net/tun: EINVAL; flannel0 is there already and is not ours"
        f" (it is {what}); stop flanneld or whatever made it, then `ip link delete flannel0`"
    )
    assert ns.show(f"link show {TUN_NAME}")
    assert open_fds() == before


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.EPERM, "the container's list of devices refuses /dev/net/tun, as that of crun and of runc 1.2.0 to "),
        (errno.EACCES, "run as root; in a container the mount that has /dev/net/tun must not be nodev"),
        (0, "run as root or with CAP_NET_ADMIN"),
    ],
)
def test_what_does_not_permit_the_device_is_told_apart(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch, number: int, hint: str
) -> None:
    """`run as root` was no help in a container that ran as root, with CAP_NET_ADMIN."""
    attached = OSError(number or errno.EPERM, "not permitted")
    opened = os.open

    def open_(path: object, *args: int) -> int:
        if number and path == "/dev/net/tun":
            raise attached
        return opened(path, *args)  # type: ignore[call-overload]  # as it came

    def attach(**_: object) -> None:
        raise attached

    monkeypatch.setattr("udptun.kernel.tun.pytun.TunTapDevice", attach)
    monkeypatch.setattr(os, "open", open_)
    with pytest.raises(KernelError) as refused:
        ns.call(lambda: open_queues(TUN_NAME, 1))
    name = errno.errorcode[number or errno.EPERM]
    assert str(refused.value).startswith(f"cannot attach to TUN device flannel0 through /dev/net/tun: {name}; {hint}")


def test_a_device_without_cap_net_admin_is_refused_with_the_capability(ns: Namespace) -> None:
    code = "from udptun.kernel.tun import open_queues; open_queues('flannel0', 1)"
    without = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", sys.executable, "-c", code]
    refused = subprocess.run(["ip", "netns", "exec", ns.name, *without], capture_output=True, text=True)
    assert "/dev/net/tun: EPERM; run as root or with CAP_NET_ADMIN" in refused.stderr


def test_a_device_held_by_a_single_queue_program_is_refused(ns: Namespace) -> None:
    """What flanneld does: a TUN device without IFF_MULTI_QUEUE, held open."""
    code = (
        "import pytun, sys; d = pytun.TunTapDevice(name='flannel0', flags=pytun.IFF_TUN | pytun.IFF_NO_PI);"
        "print(flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        ["ip", "netns", "exec", ns.name, sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"\n"
        with pytest.raises(KernelError, match="is not ours"):
            ns.call(lambda: open_queues(TUN_NAME, 1))
    finally:
        holder.communicate(timeout=30)
    assert ns.show(f"link show {TUN_NAME}") == []


def test_a_missing_tun_device_file_is_named_with_the_remedy(ns: Namespace) -> None:
    code = (
        "from udptun.kernel.tun import open_queues\n"
        "from udptun.core.errors import KernelError\n"
        "try: open_queues('flannel0', 1)\n"
        "except KernelError as exc: print(exc)\n"
    )
    script = 'mount -t tmpfs none /dev/net && exec "$0" -c "$1"'
    hidden = ["unshare", "--mount", "sh", "-c", script, sys.executable, code]
    out = subprocess.run(["ip", "netns", "exec", ns.name, *hidden], capture_output=True, text=True, check=True).stdout
    assert "ENOENT" in out
    assert "`modprobe tun`, or mount the device into the container" in out


def test_a_missing_capability_is_named(ns: Namespace) -> None:
    code = (
        "from udptun.kernel.tun import open_queues\n"
        "from udptun.core.errors import KernelError\n"
        "try: open_queues('flannel0', 1)\n"
        "except KernelError as exc: print(exc)\n"
    )
    weak = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", sys.executable, "-c", code]
    out = subprocess.run(["ip", "netns", "exec", ns.name, *weak], capture_output=True, text=True, check=True).stdout
    assert "EPERM" in out
    assert "CAP_NET_ADMIN" in out
