"""Processes of this host, as far as /proc shows them: in a pod only those of the container."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Process:
    """`words` is the command line.  `is_here`: it is in our network namespace."""

    pid: int
    name: str
    words: tuple[str, ...]
    is_here: bool


def processes() -> Iterator[Process]:
    """All but this one.  One that ends meanwhile is left out."""
    here = _network_of("self")
    for entry in _PROC.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            name = (entry / "comm").read_text().strip()
        except OSError:
            continue
        pid = int(entry.name)
        yield Process(pid, name, words_of(pid), _network_of(entry.name) == here)


def words_of(pid: int) -> tuple[str, ...]:
    """The command line; empty when it may not be read."""
    try:
        return tuple((_PROC / f"{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1])
    except OSError:
        return ()


def _network_of(pid: str) -> str:
    try:
        return str(Path(f"/proc/{pid}/ns/net").readlink())
    except OSError:
        return ""


def flanneld_in(words: Sequence[str]) -> bool:
    """Whether the command line is that of flannel's own program: ours has an interpreter before its name."""
    return bool(words) and Path(words[0]).name == "flanneld"


def daemon_words(words: Sequence[str]) -> tuple[bool, list[str]] | None:
    """Whether our daemon runs as `flanneld`, and its flags, by its command line; None: it is no daemon of ours."""
    for i, word in enumerate(words[1:3], 1):
        name = Path(word).name
        if name == "flanneld":
            return True, list(words[i + 1 :])
        if name == "udptun" and list(words[i + 1 : i + 2]) == ["daemon"]:
            return False, list(words[i + 2 :])
    return None


def environment_of(pid: int) -> Mapping[str, str]:
    """What the process was started with; empty when it may not be read."""
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(pair.partition("=")[::2] for pair in pairs if "=" in pair)


def holder_of_udp_port(port: int) -> tuple[bool, Process | None]:
    """Whether a UDP socket of this host has the port, and whose it is, if that can be seen from here."""
    inodes = set()
    for table in ("udp", "udp6"):
        try:
            lines = (_PROC / "self/net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        rows = map(str.split, lines)
        inodes |= {row[9] for row in rows if int(row[1].rpartition(":")[2], 16) == port}
    if not inodes:
        return False, None
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for process in processes():
        if process.is_here and any(_target(it) in wanted for it in _descriptors(process.pid)):
            return True, process
    return True, None


def _descriptors(pid: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return []


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""
