"""The TUN device: its queues, opened, kept and brought back.

python-pytun creates the device and attaches the queues; nothing else imports it.  Its objects open descriptors
without close-on-exec and close them when they are collected, so we duplicate each and let the object go.

A queue's descriptor outlives its device.  Once the device is deleted every read and write fails with EBADFD,
and TUNSETIFF on that same descriptor makes the device anew, for every process that holds a duplicate.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress

import pytun

from udptun._kabi import lib
from udptun.errors import KernelError
from udptun.offload import Offload

_FLAGS = lib.IFF_TUN | lib.IFF_NO_PI | lib.IFF_MULTI_QUEUE | lib.IFF_VNET_HDR
# include/uapi/linux/sockios.h and ethtool.h; the same on every architecture.
_SIOCETHTOOL = 0x8946
_ETHTOOL_GDRVINFO = 0x3

VNET_HDR_LEN = 10
"""struct virtio_net_hdr before every packet, bytes."""

_IFREQ = struct.Struct("16sH22x")


class Tun:
    """The attached queues of one device, as non-blocking, close-on-exec descriptors that this object owns.

    `fds` may be passed on (a duplicate or SCM_RIGHTS) and stay valid until close().  Closing leaves the
    persistent device where it is.
    """

    def __init__(self, name: str, fds: Sequence[int]) -> None:
        """Take over descriptors that another process opened with `open_queues`."""
        self.name = name
        self.fds = tuple(fds)
        self._offload = Offload(0)

    def device(self) -> str | None:
        """The name that the device of the first queue has now; None when it is gone."""
        return _device_of(self.fds[0])

    def is_attached(self) -> bool:
        """Whether every queue still belongs to the device of this name."""
        return all(_device_of(fd) == self.name for fd in self.fds)

    def reattach(self) -> None:
        """Bring every detached queue back, the device too when it is gone: new, down, and without addresses.

        Raises KernelError.  Queues that never lost their device stay as they are.
        """
        for fd in self.fds:
            device = _device_of(fd)
            if device is not None and device != self.name:
                hint = f"it was renamed; `ip link set {device} name {self.name}`"
                raise KernelError(f"TUN device {self.name} is called {device} now", 0, hint)
            if device is None:
                try:
                    fcntl.ioctl(fd, lib.TUNSETIFF, _IFREQ.pack(self.name.encode(), _FLAGS))
                except OSError as exc:
                    raise _refused(self.name, exc) from exc
        _configure(self.name, self.fds[0])
        self.set_offload(self._offload)

    def set_offload(self, wanted: Offload) -> Offload:
        """Have reads give super-packets of these kinds; return those that the kernel grants.

        The rest of `wanted` is none of the device's business.  Remembered for `reattach`.
        """
        self._offload = granted = wanted & (Offload.TSO | Offload.USO)
        while True:
            try:
                fcntl.ioctl(self.fds[0], lib.TUNSETOFFLOAD, _tun_features(granted))
            except OSError as exc:
                # EINVAL: the kernel knows no USO; it came last.
                if granted == Offload(0):
                    raise KernelError(f"cannot set offloads of TUN device {self.name}", exc.errno or 0) from exc
                granted = granted & ~Offload.USO if Offload.USO in granted else Offload(0)
            else:
                return granted

    def close(self) -> None:
        """Close the queues.  A second call does nothing."""
        fds, self.fds = self.fds, ()
        for fd in fds:
            os.close(fd)


def open_queues(name: str, n: int) -> Tun:
    """Attach `n` queues to the device `name`, creating it when it is missing.

    IFF_TUN | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE, persistent, offloads off (`Tun.set_offload`): reads
    give whole packets with complete checksums.  Queues that another process holds stay attached beside ours.
    Raises KernelError.
    """
    fds: list[int] = []
    try:
        for _ in range(n):
            fds.append(_open_queue(name))
        _configure(name, fds[0])
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return Tun(name, fds)


def detach_queues(fds: Sequence[int]) -> None:
    """Have the kernel give no more packets to these queues, for every process that holds one.

    What waits in them is lost; where the kernel refuses, the device being gone, there is nothing to do.
    """
    for fd in fds:
        with suppress(OSError):
            fcntl.ioctl(fd, lib.TUNSETQUEUE, _IFREQ.pack(b"", lib.IFF_DETACH_QUEUE))


def _open_queue(name: str) -> int:
    try:
        queue = pytun.TunTapDevice(name=name, flags=_FLAGS)
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
        features |= lib.TUN_F_CSUM | lib.TUN_F_TSO4
    if Offload.USO in offload:
        # Both families or none: the kernel refuses one alone.
        features |= lib.TUN_F_CSUM | lib.TUN_F_USO4 | lib.TUN_F_USO6
    return features


def _configure(name: str, fd: int) -> None:
    """Set what the device forgets when it is made anew; any of its queues will do."""
    try:
        fcntl.ioctl(fd, lib.TUNSETPERSIST, 1)
        fcntl.ioctl(fd, lib.TUNSETOFFLOAD, 0)
        fcntl.ioctl(fd, lib.TUNSETVNETHDRSZ, struct.pack("i", VNET_HDR_LEN))
    except OSError as exc:
        raise KernelError(f"cannot configure TUN device {name}", exc.errno or 0) from exc


def _device_of(fd: int) -> str | None:
    """The name of the device that the queue belongs to; None when that is gone."""
    try:
        answer = fcntl.ioctl(fd, lib.TUNGETIFF, bytes(_IFREQ.size))
    except OSError as exc:
        if exc.errno == errno.EBADFD:
            return None
        raise KernelError(f"cannot ask TUN queue {fd} for its device", exc.errno or 0) from exc
    name, _flags = _IFREQ.unpack(answer)
    return bytes(name).split(b"\0")[0].decode()


def _refused(name: str, exc: OSError) -> KernelError:
    """Say why the kernel would not attach a queue to `name`, and what to do."""
    # pytun puts a sentence of its own where it has no errno.
    code = exc.errno or 0
    hint = "" if code else str(exc)
    if code in (errno.ENOENT, errno.ENODEV):
        hint = "/dev/net/tun is missing: run `modprobe tun`, or mount the device into the container"
    elif code in (errno.EPERM, errno.EACCES):
        hint = "run as root or with CAP_NET_ADMIN; in a container /dev/net/tun must be allowed as well"
    elif code in (errno.EINVAL, errno.EBUSY) and (driver := _driver(name)) is not None:
        hint = (
            f"{name} is there already and is not ours (it is {driver});"
            f" stop flanneld or whatever made it, then `ip link delete {name}`"
        )
    return KernelError(f"cannot attach to TUN device {name} through /dev/net/tun", code, hint)


def _driver(name: str) -> str | None:
    """What kind of device `name` is, in words; None when there is none."""
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
