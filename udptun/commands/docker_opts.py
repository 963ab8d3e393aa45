"""`udptun docker-opts`, also installed as `mk-docker-opts.sh`: Docker's options from subnet.env (flannel dist/).

The text is flannel's byte for byte.  Three things differ.  `-d` may name subnet.env itself: flannel's script leaves no
subnet in it.  A value that Docker would refuse is refused here.  The file is replaced in one step.

A start of Docker waits for this command, so it imports nothing that it can do without.
"""

from __future__ import annotations

import getopt
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from udptun.config import env_file
from udptun.core import atomic_file
from udptun.core.errors import KernelError, UdptunError, UsageError

USAGE = """\
usage: udptun docker-opts [-f FLANNEL-ENV-FILE] [-d DOCKER-ENV-FILE] [-i] [-c] [-m] [-k COMBINED-KEY]

Write Docker's options, made from flannel's subnet.env, to a file for Docker's unit; installed as mk-docker-opts.sh too.

  -f FILE  read flannel's values from FILE (default /run/flannel/subnet.env)
  -d FILE  write Docker's options to FILE (default /run/docker_opts.env); subnet.env itself keeps its own lines
  -i       write each option to a variable of its own, as DOCKER_OPT_MTU="--mtu=1472"
  -c       write all options to one variable, DOCKER_OPTS; without -i and -c, do both
  -k KEY   call that variable KEY
  -m       leave out --ip-masq, which Docker before 1.2 does not know
"""

_PREFIX = "DOCKER_OPT_"
_MASQUERADE = {"true": "--ip-masq=false", "false": "--ip-masq=true"}
"""FLANNEL_IPMASQ -> Docker's option: one of the two masquerades."""
_GATEWAY_FLAG = 0x2
"""RTF_GATEWAY (linux/route.h)."""


@dataclass(frozen=True, slots=True)
class _Request:
    """What the flags say."""

    source: Path = Path("/run/flannel/subnet.env")
    target: Path = Path("/run/docker_opts.env")
    is_individual: bool = True
    is_combined: bool = True
    has_masq: bool = True
    key: str = "DOCKER_OPTS"


def run(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Write the file that `argv` asks for; `environ` counts where subnet.env sets nothing, as in a shell."""
    flags, words = _split(argv)
    if "-h" in flags:
        print(USAGE, end="")
        return 0
    if words:
        print(f"docker-opts: warning: ignored, as flannel's script does: {' '.join(words)}", file=sys.stderr)
    request = _request(flags)
    lines = _read(request.source)
    # What an earlier run wrote to subnet.env is this run's result, and not what it begins from.
    is_own_result = request.source.resolve() == request.target.resolve()
    kept = [line for line in lines if not (is_own_result and _is_written(env_file.name_of(line), request.key))]
    values = {**environ, **env_file.parse("\n".join(kept))}
    text = _render(values, request)
    _write(request.target, "".join(f"{line}\n" for line in kept) + text if is_own_result else text)
    _check_route(values.get("FLANNEL_SUBNET", ""))
    return 0


def _split(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Flags and other words by the rules of a shell's getopts, which ends at the first word that is no flag."""
    try:
        pairs, words = getopt.getopt(list(argv), "f:d:icmk:h", ["help"])
    except getopt.GetoptError as exc:
        raise UsageError(f"docker-opts: {exc.msg} (udptun docker-opts -h lists the options)") from exc
    return {"-h" if name == "--help" else name: value for name, value in pairs}, words


def _request(flags: Mapping[str, str]) -> _Request:
    default = _Request()
    key = flags.get("-k", default.key)
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", key) or key.startswith("FLANNEL_"):
        raise UsageError(f"docker-opts: -k {key!r} is not a name for a variable of Docker's, as DOCKER_OPTS is")
    is_both = ("-i" in flags) == ("-c" in flags)
    return _Request(
        Path(flags.get("-f", default.source)),
        Path(flags.get("-d", default.target)),
        is_individual=is_both or "-i" in flags,
        is_combined=is_both or "-c" in flags,
        has_masq="-m" not in flags,
        key=key,
    )


def _read(source: Path) -> list[str]:
    """The lines of subnet.env.  When there is none there are no options, as with flannel's script, and a warning."""
    try:
        if not source.is_file():
            print(f"docker-opts: warning: there is no file {source}: has the daemon started?", file=sys.stderr)
            return []
        return source.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as exc:
        raise KernelError(f"cannot read {source}", exc.errno or 0, "name flannel's subnet.env with -f") from exc


def _is_written(name: str, key: str) -> bool:
    return name.startswith(_PREFIX) or name == key


def _render(values: Mapping[str, str], request: _Request) -> str:
    """The options' lines.  Those that `values` has already stay, and stand before ours in the combined one."""
    options = {name: value for name, value in values.items() if name.startswith(_PREFIX)} | _options(values, request)
    ordered = [f'{name}="{options[name]}"\n' for name in sorted(options)]
    before = f"{values[request.key]} " if values.get(request.key) else ""
    combined = before + "".join(f" {options[name]}" for name in sorted(options))
    return ("".join(ordered) if request.is_individual else "") + (
        f'{request.key}="{combined}"\n' if request.is_combined else ""
    )


def _options(values: Mapping[str, str], request: _Request) -> dict[str, str]:
    """What the values of subnet.env mean to Docker.  Raises UdptunError for one that means nothing."""
    subnet, mtu, masq = (values.get(f"FLANNEL_{name}", "") for name in ("SUBNET", "MTU", "IPMASQ"))
    options = {}
    if subnet:
        _network_of(subnet)
        options["DOCKER_OPT_BIP"] = f"--bip={subnet}"
    if mtu:
        if not (mtu.isascii() and mtu.isdecimal()):
            raise UdptunError(f"FLANNEL_MTU is {mtu!r}, not a number of bytes; start the daemon to write it anew")
        options["DOCKER_OPT_MTU"] = f"--mtu={mtu}"
    if masq and request.has_masq:
        if masq not in _MASQUERADE:
            raise UdptunError(f"FLANNEL_IPMASQ is {masq!r}, neither true nor false; start the daemon to write it anew")
        options["DOCKER_OPT_IPMASQ"] = _MASQUERADE[masq]
    return options


def _network_of(subnet: str) -> tuple[bytes, int]:
    """Network address (network byte order) and length of FLANNEL_SUBNET, which is an address and a length."""
    match = re.fullmatch(r"([0-9]{1,3})\.([0-9]{1,3})\.([0-9]{1,3})\.([0-9]{1,3})/([0-9]{1,2})", subnet)
    *octets, length = (int(number) for number in match.groups()) if match else (256, 0)
    if max(octets) > 255 or length > 32:
        raise UdptunError(
            f"FLANNEL_SUBNET is {subnet!r}, not one address with a length, as 10.244.3.1/24; "
            "start the daemon to write it anew"
        )
    mask = (0xFFFFFFFF << (32 - length) & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(octet & part for octet, part in zip(octets, mask, strict=True)), length


def _check_route(subnet: str) -> None:
    """Raise UdptunError when packets to `subnet` leave through a gateway: Docker's bridge would get none of them.

    /proc/net/route is the main table, and has addresses as the processor stores them.
    """
    if not subnet:
        return
    network, length = _network_of(subnet)
    for line in Path("/proc/net/route").read_text(encoding="ascii").splitlines()[1:]:
        device, destination, gateway, flags, _, _, _, mask, *_ = line.split()
        is_subnets = _address(destination) == network and int(mask, 16).bit_count() == length
        if is_subnets and int(flags, 16) & _GATEWAY_FLAG:
            name, via = (".".join(map(str, address)) for address in (network, _address(gateway)))
            raise UdptunError(
                f"there is a route to {name}/{length} via {via} dev {device}, so Docker's containers would get no "
                f"packets; remove it: ip route del {name}/{length} via {via}"
            )


def _address(text: str) -> bytes:
    """Network byte order."""
    return int(text, 16).to_bytes(4, sys.byteorder)


def _write(target: Path, text: str) -> None:
    # The environment may hold any bytes.
    text = text.encode(errors="replace").decode()
    try:
        if target.is_relative_to("/dev") or (target.exists() and not target.is_file()):
            # A pipe, or /dev/stdout, which may be a file that others write to as well.
            target.write_text(text, encoding="utf-8")
            return
        target = target.resolve()
        mode = target.stat().st_mode & 0o7777 if target.exists() else 0o644
        atomic_file.replace(target, text, mode)
    except OSError as exc:
        raise KernelError(f"cannot write {target}", exc.errno or 0, "name another file with -d") from exc
