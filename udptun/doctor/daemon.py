"""The daemon of this host: whether it answers, its datapath, and what it says is wrong."""

from __future__ import annotations

import re
import socket
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from udptun.core.daemon_socket import SOCKET_NAME
from udptun.doctor.facts import Facts
from udptun.doctor.finding import Finding, NotHereError, Severity
from udptun.kernel.peer import peer_of

_WAIT_S = 5.0


def find_pid(run_dir: Path) -> int | None:
    """Of the daemon that listens in `run_dir`; None when there is none, or it cannot be seen from here."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(_WAIT_S)
        try:
            asking.connect(str(run_dir / SOCKET_NAME))
            return peer_of(asking)[0] or None
        except OSError:
            return None


async def daemon(facts: Facts) -> list[Finding]:
    if facts.document is not None:
        return []
    remedy = (
        "`systemctl status udptun`, or the pod's log; give the daemon's --run-dir if it has another one"
        if facts.daemon_pid is None
        else "its log says more; what it waits for may be another finding"
    )
    cause, _, more = facts.silence.partition("; ")
    return [Finding(Severity.ERROR, str(facts.options.run_dir), cause, f"{more}; {remedy}" if more else remedy)]


async def datapath(facts: Facts) -> list[Finding]:
    if facts.document is None:
        raise NotHereError("no daemon says how its datapath is")
    first, ipv6 = facts.document["datapath"], (facts.document.get("ipv6") or {}).get("datapath")
    if first is None:
        raise NotHereError(f"Backend.Type {facts.backend_type} has none")
    # Where each family has its own.
    return [*_of_datapath(facts, first, ""), *(_of_datapath(facts, ipv6, " of IPv6") if ipv6 else ())]


def _of_datapath(facts: Facts, it: Mapping[str, Any], which: str) -> list[Finding]:
    found = []
    if it["pid"] is None:
        cause = f"no datapath process{which} runs, so no packet passes the tunnel"
        found.append(Finding(Severity.ERROR, "", cause, "the daemon starts one; if it does not, its log says why"))
    for number, state in enumerate(it["workers"]):
        if it["pid"] is not None and state != "running":
            cause = f"worker {number} of the datapath{which} is {state.replace('_', ' ')}"
            remedy = "the daemon brings it back; if it does not, `udptun status` and its log say why"
            found.append(Finding(Severity.ERROR, f"worker {number}", cause, remedy))
    if it["pid"] is not None and not it["standby_pids"]:
        cause = f"no datapath process{which} is on standby, so packets are lost when the active one dies"
        found.append(Finding(Severity.WARNING, "", cause, "the daemon starts one; if it does not, its log says why"))
    wanted = facts.options.datapath_confinement.value
    if it.get("confinement") not in (None, wanted) and facts.daemon_pid is not None:
        cause = f"the datapath{which} has given up {it['confinement']}, and --datapath-confinement asks for {wanted}"
        found.append(
            Finding(Severity.WARNING, "", cause, "`problems` in `udptun status` says why; restart it to try again")
        )
    return found


_SAME_THING = (
    (r"^the host of (\S+) .*has answered and does not any more", "reachability"),
    (r"^the path to the host of (\S+) ", "path-mtu"),
    (r"^pods have no IPv6 to other hosts: this kernel has no IPv6", "ipv6-in-kernel"),
)
"""What a line of the daemon says, of which subnet if of one, and the check that says the same in other words."""

_SEVERITIES = (
    (r"has answered and does not any more", Severity.ERROR),
    (r"forwarding is 0|ip_forward is 0", Severity.ERROR),
    (r" (drops|rejects) .* unless (this host has|they have) just sent", Severity.WARNING),
    (r" (drops|rejects) (some )?(IPv6 )?packets ", Severity.ERROR),
    (r"^peer .* leases .* for ", Severity.ERROR),
    (r"^pods have no ", Severity.ERROR),
    (r"^cannot bind ", Severity.ERROR),
)
"""How bad a line is; a warning where nothing here fits."""


def severity_of(line: str) -> Severity:
    """How bad it is what that problem line says."""
    return next((severity for text, severity in _SEVERITIES if re.search(text, line)), Severity.WARNING)


def problem_lines(facts: Facts, found: Collection[tuple[str, Finding]]) -> list[Finding]:
    """What the daemon says is wrong and no check has found.  `found` comes with the names of the checks."""
    if facts.document is None:
        raise NotHereError("no daemon says what is wrong")
    said = {(it.cause, it.remedy) for _, it in found}
    # The subject of what is found about a peer has its subnets; `None` stands for whatever subject.
    subjects = {(check, word) for check, it in found for word in (*it.subject.split(), None)}
    lines = []
    for line in facts.document["problems"]:
        is_found = any(
            (it := re.search(text, line)) and (check, it[1] if it.re.groups else None) in subjects
            for text, check in _SAME_THING
        )
        finding = Finding.of_line(severity_of(line), line)
        if not is_found and (finding.cause, finding.remedy) not in said:
            lines.append(finding)
    return lines
