"""The run directory: used only when nobody but root can put a file there, by the daemon and by its clients."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from udptun.commands import status
from udptun.control.run_dir import LOCK_FILE, check_run_dir, fault_of_directory, lock_run_dir
from udptun.core.daemon_socket import SOCKET_NAME
from udptun.core.errors import ConfigError, UdptunError

STRANGER = 4711

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files away")


def writable(parent: Path, run_dir: Path) -> None:
    run_dir.chmod(0o722)


def sticky(parent: Path, run_dir: Path) -> None:
    run_dir.chmod(0o1777)


def for_a_group(parent: Path, run_dir: Path) -> None:
    run_dir.chmod(0o770)


def foreign(parent: Path, run_dir: Path) -> None:
    os.chown(run_dir, STRANGER, -1)


def writable_parent(parent: Path, run_dir: Path) -> None:
    parent.chmod(0o777)


def foreign_parent(parent: Path, run_dir: Path) -> None:
    os.chown(parent, STRANGER, -1)


def foreign_link(parent: Path, run_dir: Path) -> None:
    """Of a stranger, who can make it lead elsewhere."""
    run_dir.rmdir()
    (parent / "real").mkdir(0o700)
    run_dir.symlink_to("real")
    os.chown(run_dir, STRANGER, -1, follow_symlinks=False)


def link_into_a_writable_directory(parent: Path, run_dir: Path) -> None:
    run_dir.rmdir()
    (parent / "open" / "run").mkdir(parents=True)
    (parent / "open").chmod(0o777)
    run_dir.symlink_to(parent / "open" / "run")


def foreign_socket(parent: Path, run_dir: Path) -> None:
    """Left from a time when others could write."""
    with socket.socket(socket.AF_UNIX) as planted:
        planted.bind(str(run_dir / "datapath-0.sock"))
    os.chown(run_dir / "datapath-0.sock", STRANGER, -1)


def foreign_lock(parent: Path, run_dir: Path) -> None:
    """A link to a file whose content the daemon would have replaced by its pid."""
    (run_dir / LOCK_FILE).symlink_to(parent / "precious")
    os.chown(run_dir / LOCK_FILE, STRANGER, -1, follow_symlinks=False)


OWNER = "belongs to uid 4711"
REFUSED = [
    (writable, "others may write to {run} (mode 0722); `chmod go-w {run}`, or give another directory"),
    (sticky, "others may write to {run} (mode 1777); `chmod go-w {run}`, or give another directory"),
    (for_a_group, "others may write to {run} (mode 0770); `chmod go-w {run}`, or give another directory"),
    (foreign, "the directory {run} " + OWNER + "; `chown -h root {run}`, or give another directory"),
    (writable_parent, "others may write to {parent} (mode 0777); `chmod go-w {parent}`, or give another directory"),
    (foreign_parent, "the directory {parent} " + OWNER + "; `chown -h root {parent}`, or give another directory"),
    (foreign_link, "the symbolic link {run} " + OWNER + "; `chown -h root {run}`, or give another directory"),
    (
        link_into_a_writable_directory,
        "others may write to {parent}/open (mode 0777); `chmod go-w {parent}/open`, or give another directory",
    ),
    (foreign_socket, "{run}/datapath-0.sock " + OWNER + "; delete it"),
    (foreign_lock, "{run}/daemon.lock " + OWNER + "; delete it"),
]


@as_root
@pytest.mark.parametrize(("spoil", "fault"), REFUSED, ids=[spoil.__name__ for spoil, _ in REFUSED])
def test_a_run_directory_that_others_can_write_is_used_by_nobody(
    tmp_path: Path, spoil: Callable[[Path, Path], None], fault: str
) -> None:
    """Whoever could put a socket there made the daemon go on with descriptors of his."""
    parent, run_dir = tmp_path / "parent", tmp_path / "parent" / "run"
    run_dir.mkdir(parents=True)
    run_dir.chmod(0o700)
    (parent / "precious").write_text("stays")
    spoil(parent, run_dir)
    line = f"--run-dir: {run_dir} is not used: {fault.format(run=run_dir, parent=parent)}"
    for use in (check_run_dir, lock_run_dir, status.fetch):
        with pytest.raises(ConfigError) as caught:
            use(run_dir)
        assert caught.value.problems == (line,)
    assert (parent / "precious").read_text() == "stays"


def test_a_run_directory_of_ours_alone_is_used(tmp_path: Path) -> None:
    """Also one that others may look into, below a sticky directory, and behind a link of ours."""
    (tmp_path / "tmp" / "run").mkdir(parents=True)
    (tmp_path / "tmp").chmod(0o1777)
    (tmp_path / "tmp" / "run").chmod(0o755)
    link = tmp_path / "link"
    link.symlink_to("tmp/run")
    for run_dir in (tmp_path / "tmp" / "run", link, tmp_path / "tmp" / ".." / "link"):
        check_run_dir(run_dir)
    os.close(lock_run_dir(link))
    assert (tmp_path / "tmp" / "run" / LOCK_FILE).read_text() == f"{os.getpid()}\n"


@as_root
def test_a_run_directory_in_another_mount_namespace_is_judged_by_what_is_there(tmp_path: Path) -> None:
    """/proc/PID/root reads as `/`, and leads elsewhere."""
    script = f"mount -t tmpfs -o mode=1777 x {tmp_path} && echo && cat"
    argv = ["unshare", "-m", "sh", "-c", script]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "\n"
        there = Path(f"/proc/{other.pid}/root{tmp_path}")
        assert fault_of_directory(there).startswith(f"others may write to {there} (mode 1777)")
        assert fault_of_directory(tmp_path) == ""
        other.communicate("")


def test_a_relative_run_directory_is_judged_by_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir(0o700)
    check_run_dir(Path("run"))
    tmp_path.chmod(0o777)
    assert fault_of_directory(Path("run")).startswith(f"others may write to {tmp_path} (mode 0777)")


def test_a_run_directory_that_is_missing_is_told_by_who_needs_it(tmp_path: Path) -> None:
    check_run_dir(tmp_path / "none")
    with pytest.raises(UdptunError, match=f"no udptun daemon answers at {tmp_path}/none/{SOCKET_NAME}: No such file"):
        status.fetch(tmp_path / "none")


@pytest.mark.parametrize(
    ("names", "mode"),
    [
        ([], 0o700),
        ([SOCKET_NAME, LOCK_FILE, "datapath-0a1b2c3d.sock"], 0o700),
        # Others need what is in there.
        ([SOCKET_NAME, "subnet.env"], 0o755),
        (["another.sock"], 0o755),
    ],
)
def test_directory_that_is_for_the_daemon_alone_is_shut_to_others(names: list[str], mode: int, tmp_path: Path) -> None:
    """Before, what systemd and kubelet make stayed 0755."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    run_dir.chmod(0o755)
    for name in names:
        (run_dir / name).touch()
    os.close(lock_run_dir(run_dir))
    assert run_dir.stat().st_mode & 0o777 == mode
