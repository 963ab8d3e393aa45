"""What is remembered of each attachment between ADD and DEL.

    <dataDir>/<containerID>             the delegate's configuration, byte for byte as flannel's plugin writes it
    <dataDir>/.udptun/<containerID>     what else we want to know; flannel's plugin never looks there

So a host can change from one plugin to the other while containers run.  A container ID never begins with a dot.
"""

from __future__ import annotations

import os
import time

from udptun.cni import go_json
from udptun.cni.errors import IO_FAILURE, CniError
from udptun.cni.netconf import members_of

_OURS = ".udptun"
_BOOT_ID_FILE = "/proc/sys/kernel/random/boot_id"


class Extras:
    """What we know of an attachment beyond flannel's file.  Every field is empty where that is not known."""

    def __init__(self, values: dict[str, object]) -> None:
        self.ifname = _name(values, "ifname")
        self.netns = _name(values, "netns")
        self.netns_identity = _name(values, "netnsIdentity")
        """Device and inode: a path such as /proc/PID/ns/net may be another namespace's by now."""
        self.mount_ns = _name(values, "mountNs")
        """In which the path of `netns` meant something."""
        self.boot_id = _name(values, "bootId")

    @classmethod
    def now(cls, ifname: str, netns: str) -> Extras:
        """Those of an attachment that is made at this moment."""
        return cls(
            {
                "ifname": ifname,
                "netns": netns,
                "netnsIdentity": identity_of(netns),
                "mountNs": identity_of("/proc/self/ns/mnt"),
                "bootId": boot_id(),
            }
        )

    def as_json(self) -> str:
        return go_json.dumps(
            {
                "ifname": self.ifname,
                "netns": self.netns,
                "netnsIdentity": self.netns_identity,
                "mountNs": self.mount_ns,
                "bootId": self.boot_id,
            }
        )

    @property
    def netns_if_alive(self) -> str:
        """The path of the namespace if it is still the one that it was, else nothing."""
        is_same = self.boot_id == boot_id() and self.netns_identity and identity_of(self.netns) == self.netns_identity
        return self.netns if is_same else ""

    @property
    def is_dead(self) -> bool:
        """Whether the container is certainly gone.  False also when that cannot be told from here."""
        if not self.boot_id:
            return False
        if self.boot_id != boot_id():
            return True
        can_see = self.mount_ns == identity_of("/proc/self/ns/mnt") and self.netns_identity
        return bool(can_see and not self.netns_if_alive)


def _name(values: dict[str, object], key: str) -> str:
    """The text; empty where a damaged file has what is none, or what the system would not take."""
    value = values.get(key)
    return value if isinstance(value, str) and go_json.is_name(value) else ""


class Attachment:
    """One state file.  `conf` is the delegate's configuration, and `text` the same as it stands in the file.

    `is_older_than_boot`: by its time, the file was written before this boot.
    """

    def __init__(
        self, container_id: str, text: bytes, conf: dict[str, object], extras: Extras, is_older_than_boot: bool
    ) -> None:
        self.container_id = container_id
        self._is_older_than_boot = is_older_than_boot
        self.text = text
        self.conf = conf
        self.extras = extras

    @property
    def network(self) -> str:
        return str(self.conf.get("name", ""))

    @property
    def is_dead(self) -> bool:
        """Whether the container is certainly gone.  Of flannel's plugin's only the time of the file is known."""
        return self.extras.is_dead if self.extras.boot_id else self._is_older_than_boot


class UnreadableStateError(Exception):
    """A state file that is there and says nothing that can be used."""


class StateDir:
    """The files of one `dataDir`.  Its methods raise CniError when the system refuses."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._ours = os.path.join(path, _OURS)

    def save(self, container_id: str, text: str, extras: Extras) -> None:
        """Write both files; they are on disk when this returns, flannel's last."""
        try:
            os.makedirs(self.path, mode=0o700, exist_ok=True)
            os.makedirs(self._ours, mode=0o700, exist_ok=True)
            self._write(os.path.join(self._ours, container_id), extras.as_json())
            self._write(self._file(container_id), text)
        except OSError as exc:
            raise self._refused("write the state of a container in", exc) from exc

    def _write(self, path: str, text: str) -> None:
        temporary = os.path.join(self._ours, f".{os.path.basename(path)}.{os.getpid()}")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            try:
                # On a disk that is nearly full a part is written, and only the rest is refused.
                rest = text.encode()
                while rest:
                    rest = rest[os.write(fd, rest) :]
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise

    def load(self, container_id: str) -> Attachment | None:
        """What an ADD has saved; None when there is nothing.  Raises UnreadableStateError too."""
        try:
            with open(self._file(container_id), "rb") as file:
                text, is_older = file.read(), is_older_than_boot(file.fileno())
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise self._refused("read the state of a container in", exc) from exc
        try:
            conf = go_json.loads(text)
        except ValueError as exc:
            raise UnreadableStateError(f"{self._file(container_id)}: {exc}") from exc
        if not isinstance(conf, dict):
            raise UnreadableStateError(f"{self._file(container_id)}: not a JSON object")
        return Attachment(container_id, text, conf, self.extras(container_id), is_older)

    def extras(self, container_id: str) -> Extras:
        """Empty ones when the file is not there or damaged: the container may be flannel's plugin's."""
        try:
            with open(os.path.join(self._ours, container_id), "rb") as file:
                return Extras(members_of(go_json.loads(file.read())))
        except (OSError, ValueError):
            return Extras({})

    def has(self, container_id: str) -> bool:
        """Whether there is a file of the container, readable or not."""
        return bool(container_id) and os.path.lexists(self._file(container_id))

    def remove(self, container_id: str) -> None:
        """Forget the container.  Files that are not there are no error."""
        for path in (self._file(container_id), os.path.join(self._ours, container_id)):
            try:
                os.unlink(path)
            except FileNotFoundError:
                continue
            except OSError as exc:
                raise self._refused("forget a container in", exc) from exc

    def all(self, network: str) -> list[Attachment]:
        """Every attachment to `network`, by container ID; files that cannot be read are left out."""
        found = []
        for container_id in sorted(self._names()):
            try:
                attachment = self.load(container_id)
            except (UnreadableStateError, CniError):
                continue
            if attachment is not None and attachment.network == network:
                found.append(attachment)
        return found

    def _names(self) -> list[str]:
        try:
            with os.scandir(self.path) as entries:
                return [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file()]
        except FileNotFoundError:
            return []
        except OSError as exc:
            raise self._refused("list the containers in", exc) from exc

    def _file(self, container_id: str) -> str:
        return os.path.join(self.path, container_id)

    def _refused(self, what: str, exc: OSError) -> CniError:
        hint = "root must be able to write there, and there must be room; or give the network another dataDir"
        return CniError(IO_FAILURE, f"cannot {what} {self.path}: {exc.strerror}", hint)


def boot_id() -> str:
    """Another one after each boot; empty without /proc."""
    try:
        with open(_BOOT_ID_FILE) as file:
            return file.read().strip()
    except OSError:
        return ""


def is_older_than_boot(fd: int) -> bool:
    """Whether the file was written before this boot, by its time and the clock."""
    return os.fstat(fd).st_mtime < time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def identity_of(path: str) -> str:
    """Device and inode of the file; empty when there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return ""
    return f"{found.st_dev}:{found.st_ino}"
