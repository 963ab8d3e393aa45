"""Other plugins, run as the CNI specification says: found in CNI_PATH, configuration on stdin, result on stdout."""

from __future__ import annotations

import os
from collections.abc import Mapping

from udptun.cni import go_json
from udptun.cni.errors import DELEGATE_MISSING, INTERNAL, CniError

_QUOTED = 300
"""So much of what a plugin has printed is quoted when it is no JSON, in characters."""


class Delegates:
    """The plugins in the directories `path`, run with `environ` and what a call changes in it."""

    def __init__(self, path: str, environ: Mapping[str, str]) -> None:
        self._directories = [directory for directory in path.split(":") if directory]
        # bridge looks for host-local there.
        self._environ = {**environ, "CNI_PATH": path}

    def find(self, kind: str) -> str:
        """The program for plugins of type `kind`.  Raises CniError."""
        if kind and "/" not in kind:
            for directory in self._directories:
                program = os.path.join(directory, kind)
                if os.path.isfile(program) and os.access(program, os.X_OK):
                    return program
        raise CniError(
            DELEGATE_MISSING,
            f'failed to find plugin "{kind}" in path [{" ".join(self._directories)}]',
            "install the CNI plugins there, such as Debian's containernetworking-plugins (in /usr/lib/cni)",
        )

    def run(
        self, command: str, conf: dict[str, object], text: bytes, changes: Mapping[str, str] | None = None
    ) -> bytes:
        """Run the plugin that `conf` names with `text` on stdin; return what it printed.

        What it prints on stderr goes to ours.  Raises CniError, with the plugin's code and words.
        """
        kind = str(conf.get("type", ""))
        program = self.find(kind)
        environ = {**self._environ, **(changes or {}), "CNI_COMMAND": command}
        status, printed = _run(program, text, environ)
        if status != 0:
            raise _failure(kind, command, status, printed)
        return printed


def _run(program: str, text: bytes, environ: Mapping[str, str]) -> tuple[int, bytes]:
    """Wait status and stdout.  Files in memory instead of pipes: nobody waits for a reader, however long the text."""
    stdin, stdout = (os.memfd_create(name, os.MFD_CLOEXEC) for name in ("stdin", "stdout"))
    try:
        os.write(stdin, text)
        os.lseek(stdin, 0, os.SEEK_SET)
        actions = [(os.POSIX_SPAWN_DUP2, stdin, 0), (os.POSIX_SPAWN_DUP2, stdout, 1)]
        try:
            pid = os.posix_spawn(program, [program], environ, file_actions=actions)
        except OSError as exc:
            message = f"cannot run {program}: {exc.strerror}"
            raise CniError(DELEGATE_MISSING, message, "reinstall the CNI plugins of this host") from exc
        _, status = os.waitpid(pid, 0)
        os.lseek(stdout, 0, os.SEEK_SET)
        with open(stdout, "rb", closefd=False) as file:
            return status, file.read()
    finally:
        os.close(stdin)
        os.close(stdout)


def _failure(kind: str, command: str, status: int, printed: bytes) -> CniError:
    """The plugin's own words where it has any."""
    what = f"failed to delegate {command.lower()}"
    try:
        said = go_json.loads(printed)
    except ValueError:
        said = None
    if isinstance(said, dict) and isinstance(said.get("msg"), str):
        code = said.get("code")
        known = code if isinstance(code, int) and code > 0 else INTERNAL
        return CniError(known, f"{what}: {said['msg']}", str(said.get("details") or ""))
    code = os.waitstatus_to_exitcode(status)
    ended = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
    text = printed.decode(errors="replace").strip()[:_QUOTED]
    return CniError(INTERNAL, f"{what}: the plugin {kind} {ended}", f"it printed {text!r}" if text else "")
