"""`udptun status`: ask the live daemon, show what it says.

The document is docs/status.md's, schema 1: keys are only ever added.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from udptun.control.run_dir import SOCKET_NAME, check_run_dir
from udptun.core.errors import UdptunError
from udptun.core.network_state import socket_address

_TIMEOUT_S = 5.0
_SHOWN_SKIPPED, _SHOWN_CHARS = 100, 300

Document = Mapping[str, Any]


def show(run_dir: Path, as_json: bool) -> int:
    """Print the status of the daemon that uses `run_dir`.  Raises UdptunError when there is none."""
    text = fetch(run_dir)
    sys.stdout.write(text if as_json else render(json.loads(text), time.time()))
    return 0


def fetch(run_dir: Path, document: str = "/status") -> str:
    """The text of the status document, or of another one, from the daemon's socket.  Raises UdptunError."""
    check_run_dir(run_dir)
    path = run_dir / SOCKET_NAME
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        # connect() waits for room in a full queue of a Unix socket, as long as this says, if the socket blocks.
        whole_s = int(_TIMEOUT_S)
        wait = struct.pack("ll", whole_s, int((_TIMEOUT_S - whole_s) * 1e6))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)
        try:
            connection.connect(str(path))
            connection.settimeout(_TIMEOUT_S)
            connection.sendall(f"GET {document} HTTP/1.1\r\nHost: udptun\r\n\r\n".encode())
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        except (TimeoutError, BlockingIOError):
            raise UdptunError(f"the daemon at {path} does not answer within {_TIMEOUT_S:.0f} s") from None
        except OSError as exc:
            raise UdptunError(
                f"no udptun daemon answers at {path}: {exc.strerror or exc}; is it running, and with this --run-dir?"
            ) from exc
    head, _, body = answer.decode(errors="replace").partition("\r\n\r\n")
    status_line = head.partition("\r\n")[0]
    if " 200 " not in status_line:
        raise UdptunError(body.strip() or f"the daemon at {path} answered {status_line!r}")
    if not body.endswith("\n"):
        # The daemon ended while it answered.
        raise UdptunError(f"the daemon at {path} answered with half a document")
    return body


def render(document: Document, now_s: float) -> str:
    """The document for people.  `now_s` (Unix seconds) is for the time that is left until a lease expires."""
    lease, underlay, backend, datapath = (document[key] for key in ("lease", "underlay", "backend", "datapath"))
    public_ip = lease["public_ip"]
    if lease["port"] is not None:
        public_ip = socket_address(public_ip, lease["port"])
    source_check = f", source check {backend['source_check']}" if "source_check" in backend else ""
    lines = [
        f"lease      {lease['subnet']} of {document['network']}, {_left(lease['expires_at'], now_s)}",
        f"store      {document['store']}",
        f"underlay   {underlay['interface']} {underlay['address']} mtu {underlay['mtu']}, "
        f"public {public_ip}",
        f"backend    {backend['type']} {backend['device'] or 'no device'} mtu {backend['mtu']}{source_check} "
        f"({backend['reason']})",
    ]
    # A daemon of an earlier version does not say it.
    if (probes := backend.get("probes", "on")) != "on":
        lines.append(f"probes     {probes}")
    if ipv6 := document.get("ipv6"):
        lines.append(_ipv6(ipv6))
    if datapath is not None:
        lines.append(_datapath(datapath))
    # Where each family has its own.  A daemon of an earlier version does not say it.
    own = ipv6 if ipv6 and ipv6.get("datapath") else None
    if own:
        lines.append(f"{_datapath(own['datapath'])}, for IPv6")
    firewall = document["firewall"]
    rules = " and ".join(kind for kind in ("masquerade", "forward") if firewall[kind])
    lines += [
        f"firewall   {firewall['form']}: {rules}" if rules else "firewall   no rules",
        f"daemon     pid {document['pid']}, up {duration(document['uptime_s'])}, version {document['version']}",
        "",
    ]
    lines += table(
        [
            *("PEER SUBNET", "PUBLIC IP", "PORT", "UDPTUN", "HOST", "RTT MS", "MTU"),
            *("SENT", "BYTES", "RECEIVED", "BYTES"),
        ],
        [
            [
                peer["subnet"],
                peer["public_ip"],
                str(peer["port"] or "-"),
                "yes" if peer.get("udptun", True) else "no",
                peer.get("liveness", "-"),
                _number(peer.get("rtt_ms"), ".2f"),
                _number(peer.get("path_mtu"), "d"),
                *(str(peer.get(key, "-")) for key in ("encap_packets", "encap_bytes", "decap_packets", "decap_bytes")),
            ]
            for peer in (*document["peers"], *_peers_by_ipv6(document))
        ],
    )
    lines += _learned([*document["peers"], *(_peers_by_ipv6(document) if own else ())])
    lines += ["", f"drops      {_drops(document['counters'])}"]
    if own:
        lines.append(f"drops      {_drops(own['counters'])}, for IPv6")
    lines += _skipped(document["skipped"])
    lines += [f"problem    {line}" for line in document["problems"]]
    return "\n".join(lines) + "\n"


def _ipv6(ipv6: Document) -> str:
    carried = "not carried" if ipv6["mtu"] is None else f"{ipv6['device'] or 'no device'} mtu {ipv6['mtu']}"
    # In Type udp a host needs none.
    public = "" if ipv6["public_ip"] is None and ipv6["mtu"] is not None else f"public {ipv6['public_ip'] or 'none'}, "
    return f"IPv6       {ipv6['subnet']} of {ipv6['network']}, {public}{carried}, {len(ipv6['peers'])} peers"


def _peers_by_ipv6(document: Document) -> list[Document]:
    """Rows for IPv6 peers that `peers` does not show.

    There are none where the kernel carries the packets: it counts them by device.
    """
    shown = {peer["subnet"] for peer in document["peers"]}
    peers = (document.get("ipv6") or {}).get("peers", ())
    return [peer for peer in peers if "encap_packets" in peer and peer["subnet"] not in shown]


def _datapath(datapath: Document) -> str:
    # A daemon of an earlier version does not say it.
    given_up = datapath.get("confinement")
    confinement = f", confinement {given_up}" if given_up else ""
    return (
        f"datapath   pid {datapath['pid'] or 'none'}, up {duration(datapath['uptime_s'] or 0)}, standby "
        f"{', '.join(map(str, datapath['standby_pids'])) or 'none'}, workers {', '.join(datapath['workers'])}"
        f"{confinement}"
    )


def _drops(counters: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counters.items() if "drop_" in name and n) or "none"


def _learned(peers: list[Document]) -> list[str]:
    """A line for each address that a peer sends from beside its PublicIP.  Earlier daemons do not say it."""
    lines = [
        f"learned    {peer['subnet']} sends from {it['address']}{':' + str(it['port']) if it['port'] else ''} too"
        for peer in peers
        for it in peer.get("learned", ())
    ]
    return ["", *lines] if lines else []


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _skipped(lines: list[str]) -> list[str]:
    """How many leases are not used, and the first of them by name."""
    if not lines:
        return []
    more = len(lines) - _SHOWN_SKIPPED
    return [
        f"skipped    {len(lines)} of the leases in the store",
        *(f"           {line[:_SHOWN_CHARS]}" for line in lines[:_SHOWN_SKIPPED]),
        *([f"           ... and {more} more: --json has them all"] if more > 0 else []),
    ]


def table(head: list[str], rows: list[list[str]], left: int = 2) -> list[str]:
    """Lines with columns as wide as their widest cell.  The first `left` columns are words, the others numbers."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    ]


def _left(expires_at: float | None, now_s: float) -> str:
    if expires_at is None:
        return "never expires"
    return f"expires in {duration(expires_at - now_s)}" if expires_at > now_s else "expired"


def duration(seconds: float) -> str:
    """`3h02m`, `2m05s` or `7s`."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02}m" if hours else f"{m}m{s:02}s" if m else f"{s}s"
