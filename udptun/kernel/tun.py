"""The TUN device: opening its queues, and bringing it back when it was deleted.

python-pytun creates the device and attaches the queues; no other module imports it.  Its objects open descriptors
without close-on-exec and close them when they are collected.  So we duplicate each descriptor and let the object go.

The descriptor of a queue outlives its device.  Once the device is deleted, every read and write fails with EBADFD.
TUNSETIFF on that same descriptor then creates the device anew, for every process that holds a duplicate.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Sequence

import pytun

from udptun._kabi import lib
from udptun.core.errors import KernelError
from udptun.core.offload import ALL, OF_DEVICE, Offload

_FLAGS = lib.IFF_TUN | lib.IFF_NO_PI | lib.IFF_MULTI_QUEUE
# include/uapi/linux/sockios.h, if.h and ethtool.h; the same on every architecture.
_SIOCETHTOOL, _SIOCGIFFLAGS, _IFF_UP = 0x8946, 0x8913, 1
_ETHTOOL_GDRVINFO = 0x3

_CLONE_DEVICE = "/dev/net/tun"
_NO_TUN_NEEDED = "Backend.Type vxlan (where the kernel has it) and host-gw do without"

VNET_HDR_LEN = 10
"""struct virtio_net_hdr before every packet, bytes."""

_NEEDS_CSUM, _GSO_TCPV4, _GSO_UDP_L4 = 1, 1, 5
"""include/uapi/linux/virtio_net.h"""

_IFREQ = struct.Struct("16sH22x")


class Tun:
    """The attached queues of one device, as non-blocking, close-on-exec descriptors that this object owns.

    `fds` may be passed on (a duplicate or SCM_RIGHTS) and stay valid until close().  close() leaves the persistent
    device in place.
    """

    def __init__(self, name: str, fds: Sequence[int]) -> None:
        """Take over descriptors that this or another process opened with `open_queues`."""
        self.name = name
        self.fds = tuple(fds)
        self.supported = ALL & ~_find_refused(name, fds[0])
        """All offloads but those that the device refuses."""
        self._offload = Offload(0)

    def is_attached(self) -> bool:
        """Whether every queue still belongs to the device of this name."""
        return all(device_of(fd) == self.name for fd in self.fds)

    def reattach(self) -> None:
        """Attach every detached queue again.  A device that is gone comes back new: down, and without addresses.

        Queues that still have their device stay as they are.  Raises KernelError.
        """
        for fd in self.fds:
            device = device_of(fd)
            if device is not None and device != self.name:
                hint = f"it was renamed; `ip link set {device} name {self.name}`"
                raise KernelError(f"TUN device {self.name} is called {device} now", 0, hint)
            if device is None:
                _attach(fd, self.name, self.supported)
        _configure(self.name, self.fds[0], self.supported)
        self.set_offload(self._offload)

    def set_offload(self, wanted: Offload) -> Offload:
        """Have reads give super-packets of these kinds; return what of `wanted` the device grants.

        A device with virtio headers always grants VNET_HDR.  `wanted` is kept for `reattach`.
        """
        granted = (wanted | Offload.VNET_HDR) & OF_DEVICE & self.supported
        while True:
            try:
                fcntl.ioctl(self.fds[0], lib.TUNSETOFFLOAD, _tun_features(granted))
            except OSError as exc:
                # EINVAL: the kernel knows no USO, the newest of the offloads.
                if not granted & (Offload.TSO | Offload.USO):
                    raise KernelError(f"cannot set offloads of TUN device {self.name}", exc.errno or 0) from exc
                granted &= ~Offload.USO if Offload.USO in granted else ~Offload.TSO
            else:
                self._offload = wanted
                return granted

    def attach_more(self, fds: Sequence[int]) -> None:
        """Attach queues of `new_queues` to the device beside those that it has.  Raises KernelError.

        From now on the kernel gives packets to them too.  They are not `fds` of this object yet.
        """
        for fd in fds:
            _attach(fd, self.name, self.supported)

    def close(self) -> None:
        """Close the queues.  A second call does nothing."""
        fds, self.fds = self.fds, ()
        for fd in fds:
            os.close(fd)


def open_queues(name: str, n: int, wanted: Offload = ALL) -> Tun:
    """Attach `n` queues to the device `name`, creating it when it is missing.

    The device is persistent, with IFF_TUN | IFF_NO_PI | IFF_MULTI_QUEUE, and IFF_VNET_HDR if `wanted` says so.  Its
    offloads are off until `Tun.set_offload`, so reads give whole packets with complete checksums.  Queues that another
    process holds stay attached beside ours.  All queues of a device have the same flags.  Raises KernelError.
    """
    fds: list[int] = []
    supported = ALL if Offload.VNET_HDR in wanted and _knows_vnet_hdr() else ALL & ~OF_DEVICE
    try:
        for _ in range(n):
            fds.append(_open_queue(name, _flags(supported)))
        _configure(name, fds[0], supported)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return Tun(name, fds)


def new_queues(n: int) -> list[int]:
    """`n` non-blocking, close-on-exec descriptors for queues that belong to no device yet (`Tun.attach_more`).

    The caller owns them.  Raises KernelError.
    """
    fds: list[int] = []
    try:
        for _ in range(n):
            fds.append(os.open(_CLONE_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as exc:
        for fd in fds:
            os.close(fd)
        raise KernelError(f"cannot open {_CLONE_DEVICE} for one more queue", exc.errno or 0) from exc
    return fds


def _attach(fd: int, name: str, supported: Offload) -> None:
    """Attach a queue without a device to `name`, which is made when it is missing.  Raises KernelError."""
    try:
        fcntl.ioctl(fd, lib.TUNSETIFF, _IFREQ.pack(name.encode(), _flags(supported)))
    except OSError as exc:
        raise _refused(name, exc) from exc


def _flags(supported: Offload) -> int:
    return _FLAGS | (lib.IFF_VNET_HDR if Offload.VNET_HDR in supported else 0)


def _knows_vnet_hdr() -> bool:
    """Whether the kernel can put virtio headers before packets; True when it cannot be asked."""
    try:
        fd = os.open(_CLONE_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        (features,) = struct.unpack("i", fcntl.ioctl(fd, lib.TUNGETFEATURES, bytes(4)))
    finally:
        os.close(fd)
    return bool(features & lib.IFF_VNET_HDR)


def _find_refused(name: str, fd: int) -> Offload:
    """The offloads that the device refuses, found by trying them on its queue `fd`.  None when the device is gone.

    Some kernels refuse super-packets with EINVAL (6.6.44 and others with e269d79c7d35, mended by 89add40066f9).  This
    is tried only on a device that is down, which delivers nothing.  On a device that is up the workers have found out.
    """
    try:
        _name, flags = _IFREQ.unpack(fcntl.ioctl(fd, lib.TUNGETIFF, bytes(_IFREQ.size)))
    except OSError:
        return Offload(0)
    if not flags & lib.IFF_VNET_HDR:
        return OF_DEVICE
    refused = Offload(0)
    if _is_up(name):
        return refused
    tcp = struct.pack("!HHIIBBHHH", 9, 9, 0, 0, 0x50, 0, 0, 0, 0)
    udp = struct.pack("!HHHH", 9, 9, 8 + 2, 0)
    for offload, protocol, gso_type, header, csum_offset in (
        (Offload.WRITE_TCP, socket.IPPROTO_TCP, _GSO_TCPV4, tcp, 16),
        (Offload.WRITE_UDP, socket.IPPROTO_UDP, _GSO_UDP_L4, udp, 6),
    ):
        # Two bytes of payload, one in each segment.
        vnet = struct.pack("=BBHHHH", _NEEDS_CSUM, gso_type, 20 + len(header), 1, 20, csum_offset)
        ip = struct.pack("!BBHHHBBHII", 0x45, 0, 20 + len(header) + 2, 0, 0, 0, protocol, 0, 0, 0)
        try:
            os.write(fd, vnet + ip + header + bytes(2))
        except OSError as exc:
            # A device that is down answers EIO to a super-packet that it can take.
            refused |= offload if exc.errno == errno.EINVAL else Offload(0)
    return refused


def _is_up(name: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            _name, flags = _IFREQ.unpack(fcntl.ioctl(sock, _SIOCGIFFLAGS, _IFREQ.pack(name.encode(), 0)))
        except OSError:
            return False
    return bool(flags & _IFF_UP)


def _open_queue(name: str, flags: int) -> int:
    try:
        queue = pytun.TunTapDevice(name=name, flags=flags)
    except OSError as exc:
        raise _refused(name, exc) from exc
    try:
        fd = os.dup(queue.fileno())
    finally:
        queue.close()
    os.set_blocking(fd, False)
    return fd


def _tun_features(offload: Offload) -> int:
    features = 0
    if Offload.TSO in offload:
        features |= lib.TUN_F_CSUM | lib.TUN_F_TSO4 | lib.TUN_F_TSO6
    if Offload.USO in offload:
        # The kernel takes both families or none.
        features |= lib.TUN_F_CSUM | lib.TUN_F_USO4 | lib.TUN_F_USO6
    return features


def _configure(name: str, fd: int, supported: Offload) -> None:
    """Set what a device that was created anew has lost.  `fd` is any of its queues."""
    try:
        fcntl.ioctl(fd, lib.TUNSETPERSIST, 1)
        fcntl.ioctl(fd, lib.TUNSETOFFLOAD, 0)
        if Offload.VNET_HDR in supported:
            fcntl.ioctl(fd, lib.TUNSETVNETHDRSZ, struct.pack("i", VNET_HDR_LEN))
    except OSError as exc:
        raise KernelError(f"cannot configure TUN device {name}", exc.errno or 0) from exc


def device_of(fd: int) -> str | None:
    """The present name of the device that the queue belongs to; None when the device is gone."""
    try:
        answer = fcntl.ioctl(fd, lib.TUNGETIFF, bytes(_IFREQ.size))
    except OSError as exc:
        if exc.errno == errno.EBADFD:
            return None
        raise KernelError(f"cannot ask TUN queue {fd} for its device", exc.errno or 0) from exc
    name, _flags = _IFREQ.unpack(answer)
    return bytes(name).split(b"\0")[0].decode()


def _refused(name: str, exc: OSError) -> KernelError:
    """The error that says why the kernel would not attach a queue to `name`, and what to do."""
    # An error of pytun without an errno has a sentence of pytun's own.
    code = exc.errno or 0
    hint = "" if code else str(exc)
    if code in (errno.ENOENT, errno.ENODEV):
        hint = (
            "/dev/net/tun is missing: run `modprobe tun`, or mount the device into the container (in a pod: a volume "
            f"hostPath /dev/net/tun of type CharDevice); {_NO_TUN_NEEDED}"
        )
    elif code in (errno.EPERM, errno.EACCES):
        hint = _why_not_permitted()
    elif code in (errno.EINVAL, errno.EBUSY) and (driver := _driver(name)) is not None:
        hint = (
            f"{name} is there already and is not ours (it is {driver});"
            f" stop flanneld or whatever made it, then `ip link delete {name}`"
        )
    return KernelError(f"cannot attach to TUN device {name} through /dev/net/tun", code, hint)


def _why_not_permitted() -> str:
    """To open the device needs the leave of the container's device list, and to attach a queue a capability."""
    try:
        os.close(os.open(_CLONE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        if exc.errno == errno.EPERM:
            return (
                "the container's list of devices refuses /dev/net/tun, as that of crun and of runc 1.2.0 to 1.2.3 "
                "does: have the runtime allow the device (c 10:200 rwm), take runc 1.2.4 or later, or run the "
                f"container privileged; {_NO_TUN_NEEDED}"
            )
        return "run as root; in a container the mount that has /dev/net/tun must not be nodev"
    return "run as root or with CAP_NET_ADMIN"


def _driver(name: str) -> str | None:
    """The kind of the device `name`, in words; None when there is none."""
    try:
        socket.if_nametoindex(name)
    except OSError:
        return None
    # struct ethtool_drvinfo: cmd, driver[32], version[32], fw_version[32], bus_info[32], …, 196 bytes.
    info = array.array("B", struct.pack("I192x", _ETHTOOL_GDRVINFO))
    request = struct.pack("16sP16x", name.encode(), info.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            fcntl.ioctl(sock, _SIOCETHTOOL, request)
        except OSError:
            return "a device of unknown kind"
    raw = info.tobytes()
    driver, bus = (raw[start : start + 32].split(b"\0")[0].decode() for start in (4, 100))
    if driver != "tun":
        return f"a {driver} device"
    return "a TAP device" if bus == "tap" else "a TUN device with other flags, such as a single queue"
