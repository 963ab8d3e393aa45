"""Free what containers have left that nobody deletes any more: their delegates' DEL, then addresses of host-local."""

from __future__ import annotations

from collections.abc import Callable

from udptun.cni import go_json
from udptun.cni.delegates import Delegates
from udptun.cni.errors import BAD_CONFIG, CniError
from udptun.cni.reservations import Reservation, Reservations
from udptun.cni.state import Attachment, StateDir

_UNKNOWN_IFNAME = "eth0"
"""For a container of which nobody has noted its interface; so runtimes call it."""


class Freed:
    """What was freed, a line each, and what could not be."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.failures: list[CniError] = []


class ValidAttachments:
    """The list that a runtime gives to GC: whatever is not in it has no container any more."""

    def __init__(self, conf: dict[str, object]) -> None:
        """Raises CniError for a `conf` without a list: no list is not an empty one."""
        key = next((key for key in ("cni.dev/valid-attachments", "cni.dev/attachments") if key in conf), "")
        listed = conf.get(key)
        if not key or not isinstance(listed, list | None):
            message = "GC needs the list cni.dev/valid-attachments"
            raise CniError(BAD_CONFIG, message, "an empty list frees everything, so a missing one is not taken for it")
        self._valid: set[tuple[str, str]] = set()
        for item in listed or []:
            if not isinstance(item, dict) or not all(isinstance(item.get(it), str) for it in ("containerID", "ifname")):
                message = f"cni.dev/valid-attachments has an entry {go_json.dumps(item)[:100]}"
                raise CniError(BAD_CONFIG, message, "containerID and ifname are expected")
            self._valid.add((item["containerID"], item["ifname"]))
        self._ids = {container_id for container_id, _ in self._valid}

    def has(self, container_id: str, ifname: str) -> bool:
        """An interface that is not known counts as any."""
        return (container_id, ifname) in self._valid if ifname else container_id in self._ids


def collect(conf: dict[str, object], state: StateDir, delegates: Delegates, valid: ValidAttachments) -> Freed:
    """GC of the specification: free what is not `valid`.  `conf` is the delegate's configuration."""
    freed = Freed()
    network = str(conf.get("name", ""))
    _free_attachments(freed, network, state, delegates, lambda it: not valid.has(it.container_id, it.extras.ifname))
    _free_addresses(freed, conf, lambda it: not valid.has(it.container_id, it.ifname))
    return freed


def free_dead(conf: dict[str, object], state: StateDir, delegates: Delegates, *, with_unknown: bool = False) -> Freed:
    """Free what certainly has no container: it is of an earlier boot, or its network namespace is gone.

    `with_unknown`: also the addresses of this boot that belong to a container of which nothing is stored.  State is
    written before an address is given out and deleted after it was given back, so nobody has such an address, unless
    another plugin, or this one with another dataDir, serves the same network.
    """
    freed = Freed()
    network = str(conf.get("name", ""))
    _free_attachments(freed, network, state, delegates, lambda it: it.is_dead)
    _free_addresses(freed, conf, lambda it: not state.has(it.container_id) and (with_unknown or it.is_older_than_boot))
    return freed


def _free_attachments(
    freed: Freed, network: str, state: StateDir, delegates: Delegates, is_leftover: Callable[[Attachment], bool]
) -> None:
    for attachment in state.all(network):
        if is_leftover(attachment):
            try:
                delete(attachment, delegates)
                state.remove(attachment.container_id)
            except CniError as exc:
                freed.failures.append(exc)
            else:
                freed.lines.append(f"deleted the attachment of container {attachment.container_id}")


def delete(attachment: Attachment, delegates: Delegates) -> None:
    """The delegate's DEL for a container that its runtime has forgotten.  Raises CniError."""
    ifname = attachment.extras.ifname or next(
        (it.ifname for it in Reservations(attachment.conf).all() if it.container_id == attachment.container_id), ""
    )
    changes = {
        "CNI_CONTAINERID": attachment.container_id,
        "CNI_IFNAME": ifname or _UNKNOWN_IFNAME,
        "CNI_NETNS": attachment.extras.netns_if_alive,
        "CNI_ARGS": "",
    }
    delegates.run("DEL", attachment.conf, attachment.text, changes)


def _free_addresses(freed: Freed, conf: dict[str, object], is_leftover: Callable[[Reservation], bool]) -> None:
    try:
        addresses = Reservations(conf).free(is_leftover)
    except CniError as exc:
        freed.failures.append(exc)
    else:
        freed.lines += [f"freed the address {it.address} of container {it.container_id}" for it in addresses]
