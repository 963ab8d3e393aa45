"""Files of this host: subnet.env, the CNI configuration and its plugins, the directories of the daemon.

In a container only those are looked at that are mounted.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

from udptun.cni.errors import CniError
from udptun.cni.go_json import loads
from udptun.cni.install import TYPES, check_conflist
from udptun.config import env_file, subnet_env
from udptun.control.run_dir import fault_of_directory
from udptun.doctor.facts import Facts
from udptun.doctor.finding import Finding, NotHereError, Severity

_ROOM = 1 << 20
"""Bytes that the daemon's directories should have free."""


async def subnet_env_file(facts: Facts) -> list[Finding]:
    path = facts.options.subnet_file
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        if facts.document is None:
            raise NotHereError(f"no daemon has written {path}") from None
        cause = f"{path} is missing, so no pod can start"
        return [Finding(Severity.ERROR, str(path), cause, "restart the daemon, which writes it; look who deletes it")]
    except OSError as exc:
        cause = f"{path} cannot be read ({exc.strerror})"
        return [Finding(Severity.ERROR, str(path), cause, "let everybody read it: `chmod 0644`")]
    subnets, wrong = subnet_env.parse(text)
    if subnets is None or wrong:
        cause = f"{path} cannot be used: {wrong}"
        return [Finding(Severity.ERROR, str(path), cause, "restart the daemon, which writes it anew")]
    return list(_differences(facts, env_file.parse(text)))


def _differences(facts: Facts, written: dict[str, str]) -> Iterator[Finding]:
    """Where subnet.env is not what the daemon runs with."""
    if facts.document is None:
        return
    lease, ipv6 = facts.document["lease"], facts.document.get("ipv6") or {}
    path = str(facts.options.subnet_file)
    subnets = {str(lease["subnet"]): facts.document["network"]}
    if ipv6.get("subnet"):
        subnets[str(ipv6["subnet"])] = ipv6["network"]
    for subnet, network in subnets.items():
        prefix = "FLANNEL_IPV6_" if ":" in subnet else "FLANNEL_"
        for key, true in ((f"{prefix}NETWORK", network), (f"{prefix}SUBNET", subnet)):
            if not _is_same_subnet(written.get(key, ""), true):
                cause = (
                    f"{key} is {written.get(key, 'missing')}, and the daemon runs with {true}: new pods get no way out"
                )
                yield Finding(
                    Severity.ERROR, path, cause, "restart the daemon, which writes it; look who else writes it"
                )
    mtu = min(filter(None, (facts.mtu, ipv6.get("mtu"))), default=0)
    if (said := written.get("FLANNEL_MTU", "")) != str(mtu):
        cause = f"FLANNEL_MTU is {said or 'missing'}, and the daemon carries {mtu} bytes"
        yield Finding(Severity.WARNING, path, cause, "restart the daemon, which writes it; look who else writes it")


def _is_same_subnet(written: str, true: str) -> bool:
    """Whether `written`, the gateway's address with the length, or a network, is in `true` as a whole."""
    found, _ = subnet_env.parse(f"FLANNEL_{'IPV6_' if ':' in true else ''}SUBNET={written}\n")
    return found is not None and str(found.first) == true


async def cni_configuration(facts: Facts) -> list[Finding]:
    files = _cni_files(facts)
    ours = [path for path in files if _is_flannels(path)]
    # In the manifest's container this directory is the image's own and empty: the node's is not there.
    if not ours and not (facts.is_kube and files):
        raise NotHereError(f"no configuration in {facts.cni_conf_dir} names the plugin flannel")
    if not ours:
        cause = f"no configuration in {facts.cni_conf_dir} names the plugin flannel, so pods are not in the overlay"
        remedy = (
            "the init container install-cni writes 10-flannel.conflist there: `kubectl -n kube-flannel logs POD -c "
            "install-cni`; or `udptun cni install DIR --conflist FILE`"
        )
        return [Finding(Severity.ERROR, str(facts.cni_conf_dir), cause, remedy)]
    found = []
    if files[0] != ours[0]:
        cause = f"{files[0].name} comes before {ours[0].name}, so pods are not given addresses of the overlay"
        remedy = f"delete {files[0]}, which another network plugin has left, and start the pods again"
        found.append(Finding(Severity.ERROR, str(files[0]), cause, remedy))
    if (named := _subnet_file(ours[0])) and Path(named) != facts.options.subnet_file:
        cause = f"{ours[0].name} reads {named}, and the daemon writes {facts.options.subnet_file}"
        found.append(Finding(Severity.ERROR, str(ours[0]), cause, "give both one path (subnetFile, --subnet-file)"))
    return found


async def cni_plugins(facts: Facts) -> list[Finding]:
    ours = [path for path in _cni_files(facts) if _is_flannels(path)]
    directories = [str(it) for it in facts.cni_bin_dirs if it.is_dir()]
    if not ours or not directories:
        raise NotHereError(f"no configuration names the plugin flannel, or {facts.cni_bin_dirs[0]} is not there")
    if ours[0].suffix != ".conflist":
        raise NotHereError(f"{ours[0]} is no list of plugins")
    try:
        # Each plugin is run, to say its versions.
        await asyncio.to_thread(check_conflist, ours[0].read_bytes(), directories)
    except CniError as exc:
        line = f"{exc.message}; {exc.details}" if exc.details else exc.message
        return [Finding.of_line(Severity.ERROR, line, str(ours[0]))]
    return []


def _cni_files(facts: Facts) -> list[Path]:
    """In the order in which runtimes take them.  A directory or a dangling link is none, whatever its name."""
    suffixes = (".conf", ".conflist", ".json")
    try:
        files = sorted(it for it in facts.cni_conf_dir.iterdir() if it.suffix in suffixes and it.is_file())
    except OSError:
        raise NotHereError(f"{facts.cni_conf_dir} cannot be seen from here, or there is none") from None
    if not files and not facts.is_kube:
        raise NotHereError(f"{facts.cni_conf_dir} is empty")
    return files


def _plugins(path: Path) -> list[dict[str, object]]:
    try:
        conf = loads(path.read_bytes())
    except (OSError, ValueError):
        return []
    if not isinstance(conf, dict):
        return []
    listed = conf.get("plugins", [conf])
    return [it for it in listed if isinstance(it, dict)] if isinstance(listed, list) else []


def _is_flannels(path: Path) -> bool:
    return any(it.get("type") in TYPES for it in _plugins(path))


def _subnet_file(path: Path) -> str:
    return next(
        (str(it["subnetFile"]) for it in _plugins(path) if it.get("type") in TYPES and it.get("subnetFile")), ""
    )


async def directories(facts: Facts) -> list[Finding]:
    options = facts.options
    found = []
    for flag, path in (("--run-dir", options.run_dir), ("--state-dir", options.state_dir)):
        if fault := fault_of_directory(path):
            found.append(Finding.of_line(Severity.ERROR, fault, f"{flag} {path}"))
    for flag, path in (
        ("--run-dir", options.run_dir),
        ("--state-dir", options.state_dir),
        ("--subnet-file", options.subnet_file.parent),
    ):
        found += _room(flag, path)
    return found


def _room(flag: str, path: Path) -> Iterator[Finding]:
    try:
        room = os.statvfs(path)
    except FileNotFoundError:
        return
    except OSError as exc:
        yield Finding(Severity.WARNING, f"{flag} {path}", f"it cannot be looked at ({exc.strerror})", "run as root")
        return
    if room.f_flag & os.ST_RDONLY:
        cause = f"{path} is read-only, so nothing can be saved there"
        yield Finding(Severity.ERROR, f"{flag} {path}", cause, "mount it writable, or give another directory")
    elif room.f_blocks and (room.f_bavail * room.f_frsize < _ROOM or (room.f_files and not room.f_favail)):
        cause = f"the file system of {path} is full, so nothing can be saved there"
        yield Finding(Severity.ERROR, f"{flag} {path}", cause, f"make room: `df -h {path}`, `df -i {path}`")
