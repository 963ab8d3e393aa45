"""Put the plugin where runtimes look for it, and a configuration that all plugins of the host can follow.

A file is replaced in one step: a runtime runs the old one or the new one, and never finds half of one.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence

from udptun.cni import go_json
from udptun.cni.errors import BAD_CONFIG, DELEGATE_MISSING, IO_FAILURE, CniError
from udptun.cni.netconf import VERSIONS, as_object, members_of

TYPES = ("flannel", "udptun-cni")
"""The names that the plugin goes by in configurations."""

_ANSWER_S = 10
"""How long a plugin may take to say its versions."""


def launcher() -> bytes:
    """A program for hosts that have this package: it starts the interpreter without what the plugin does not need."""
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return (
        f"#!{sys.executable} -IS\n"
        "# Written by `udptun cni install`.\n"
        "import sys\n"
        f"sys.path.append({package!r})\n"
        "from udptun.cni.plugin import main\n"
        "main()\n"
    ).encode()


def install(directory: str, name: str, program: bytes) -> str:
    """Make `program` the plugin `name` in `directory`, and try it; return what was done.

    A file that is the same already stays.  Raises CniError, and then the old file, if there was one, is still there.
    """
    path = os.path.join(directory, name)
    try:
        if _content(path) == program and os.stat(path).st_mode & 0o777 == 0o755:
            versions_of(path)
            return f"{path} is there already"
        replace(path, program, 0o755, check=versions_of)
    except OSError as exc:
        raise CniError(IO_FAILURE, f"cannot install {path}: {exc.strerror}") from exc
    return f"installed {path}"


def replace(path: str, content: bytes, mode: int, check: Callable[[str], object] | None = None) -> None:
    """Replace the file in one step, once `check` has accepted the new one.  Raises OSError and what `check` raises."""
    # In the same directory: rename works within one file system only.
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(fd)
            os.fchmod(fd, mode)
        if check is not None:
            check(temporary)
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    directory_fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory_fd)
    finally:
        os.close(directory_fd)


def _content(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def versions_of(program: str) -> list[str]:
    """The versions of the specification that the plugin knows, as it says itself.  Raises CniError."""
    environ = {"CNI_COMMAND": "VERSION", "PATH": os.defpath}
    # Some libraries want all of them even here.
    environ |= dict.fromkeys(("CNI_PATH", "CNI_NETNS", "CNI_IFNAME", "CNI_CONTAINERID"), "dummy")
    hint = f"install the package that {program} comes from once more"
    try:
        done = subprocess.run(
            [program], input=b'{"cniVersion":"1.0.0"}', env=environ, capture_output=True, timeout=_ANSWER_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise CniError(DELEGATE_MISSING, f"cannot run {program}: {exc}", hint) from exc
    try:
        versions = members_of(go_json.loads(done.stdout)).get("supportedVersions")
    except ValueError:
        versions = None
    if done.returncode != 0 or not isinstance(versions, list) or not all(isinstance(it, str) for it in versions):
        said = (done.stdout + done.stderr).decode(errors="replace").strip()[:200]
        message = f"{program} does not say its CNI versions: status {done.returncode}, {said!r}"
        raise CniError(DELEGATE_MISSING, message, hint)
    return versions


def check_conflist(text: bytes, directories: Sequence[str]) -> dict[str, object]:
    """The configuration with the versions that every plugin it names knows, each looked for in `directories`.

    `cniVersion` stays as it is where all plugins know it.  `cniVersions` lists all that they have in common: a runtime
    takes the highest of both that it knows itself, and one that is too old for the list takes `cniVersion`.
    Raises CniError naming every plugin that is missing.
    """
    conf = as_object(text, "the configuration")
    programs, missing = {}, []
    for kind in _plugins(conf):
        found = next((path for it in directories if os.access(path := os.path.join(it, kind), os.X_OK)), None)
        if found is None:
            missing.append(kind)
        else:
            programs[kind] = found
    if missing:
        ways = [f"`udptun cni install {directories[0]}` for ours"] if set(missing) & set(TYPES) else []
        if not set(missing) <= set(TYPES):
            ways.append("install the CNI plugins, such as Debian's containernetworking-plugins (in /usr/lib/cni)")
        what = f"plugin {missing[0]} is" if len(missing) == 1 else f"plugins {', '.join(missing)} are"
        raise CniError(DELEGATE_MISSING, f"the {what} in none of {', '.join(directories)}", "; ".join(ways))
    known = {kind: versions_of(path) for kind, path in programs.items()}
    common = [version for version in VERSIONS if all(version in versions for versions in known.values())]
    if not common:
        each = "; ".join(f"{kind}: {', '.join(versions)}" for kind, versions in known.items())
        raise CniError(BAD_CONFIG, f"no CNI version is common to all plugins: {each}", "install plugins of one release")
    if conf.get("cniVersion") not in common:
        conf["cniVersion"] = common[-1]
    conf["cniVersions"] = common
    return conf


def _plugins(conf: dict[str, object]) -> Iterable[str]:
    """Every plugin that the configuration names or implies, once."""
    listed = conf.get("plugins")
    if not isinstance(listed, list) or not listed:
        raise CniError(BAD_CONFIG, "the configuration has no plugins", "it must be a .conflist with a list of plugins")
    kinds: list[str] = []
    for member in map(members_of, listed):
        kinds.append(str(member.get("type") or ""))
        if kinds[-1] in TYPES:
            kinds.append(str(members_of(member.get("delegate")).get("type") or "bridge"))
            kinds.append(str(members_of(member.get("ipam")).get("type") or "host-local"))
    if not all(kinds):
        raise CniError(BAD_CONFIG, "a plugin of the configuration has no type")
    return dict.fromkeys(kinds)


def install_conflist(path: str, conf: dict[str, object]) -> str:
    """Write the configuration; return what was done.  Raises CniError."""
    content = (json.dumps(conf, indent=2) + "\n").encode()
    try:
        if _content(path) == content and stat.S_ISREG(os.lstat(path).st_mode):
            return f"{path} is there already"
        replace(path, content, 0o644)
    except OSError as exc:
        raise CniError(IO_FAILURE, f"cannot write {path}: {exc.strerror}") from exc
    return f"wrote {path}"
