"""`udptun status`: ask the live daemon, and show what it says once, or again and again.

The document is docs/status.md's, schema 1: keys are only ever added.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from udptun.commands.hosts import Look, matching, restrict
from udptun.commands.screen import Page
from udptun.commands.terminal import LiveTerminal, live_terminal, size_of
from udptun.commands.views import Views, says_that_nobody_is
from udptun.control.run_dir import check_run_dir
from udptun.core.daemon_socket import SOCKET_NAME
from udptun.core.errors import UdptunError

_TIMEOUT_S = 5.0
_SECOND_LOOK_S = 0.5
"""What happens a second is seen by looking twice, so far apart."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a user asks for.  `watch_s`: how often to show it anew, None: once.  `peer`: of this one alone.

    `is_dumb`: the terminal knows no control sequences, so it gets what a pipe gets.
    """

    run_dir: Path
    as_json: bool = False
    watch_s: float | None = None
    peer: str | None = None
    has_colours: bool = True
    is_dumb: bool = False


def show(request: Request) -> int:
    """Print the status of the daemon that uses the run directory.  Raises UdptunError when there is none."""
    try:
        if request.as_json:
            _print_json(request)
        elif request.watch_s is None:
            _print(request)
        elif sys.stdout.isatty() and not request.is_dumb:
            with live_terminal() as terminal:
                _watch(request, request.watch_s, terminal)
        else:
            _print_again_and_again(request, request.watch_s)
    except KeyboardInterrupt:
        if request.watch_s is None:
            raise
        # That is how one ends it.
    return 0


def _print(request: Request) -> None:
    views = Views(request.peer)
    views.note(look(request.run_dir))
    if views.has_rates:
        time.sleep(_SECOND_LOOK_S)
        views.note(look(request.run_dir))
    if request.peer is not None and not views.is_anybody_shown:
        raise UdptunError(says_that_nobody_is(request.peer))
    if sys.stdout.isatty() and not request.is_dumb:
        page = Page(*size_of(sys.stdout.fileno()), request.has_colours)
        # The prompt comes below.
        page = Page(page.width, page.height and page.height - 1, page.has_colours)
    else:
        page = Page()
    print("\n".join(views.lines(page)))


def _watch(request: Request, interval_s: float, terminal: LiveTerminal) -> None:
    """Until somebody presses q."""
    views = Views(request.peer)

    def draw() -> None:
        corner = f"{time.strftime('%H:%M:%S')}, every {interval_s:g} s, q quits"
        terminal.show(views.lines(Page(*terminal.size, request.has_colours), corner))

    while True:
        due_s = _look_again(request.run_dir, views, interval_s)
        draw()
        while (left_s := due_s - time.monotonic()) > 0:
            if not terminal.wait(left_s):
                return
            draw()


def _print_again_and_again(request: Request, interval_s: float) -> None:
    """Screens one below the other, for a pipe or a file."""
    views = Views(request.peer)
    while True:
        due_s = _look_again(request.run_dir, views, interval_s)
        print("\n".join(views.lines(Page())), end="\n\n", flush=True)
        time.sleep(max(0.0, due_s - time.monotonic()))


def _look_again(run_dir: Path, views: Views, interval_s: float) -> float:
    """Show `views` what the daemon says, or that it does not answer, and return when to do so again."""
    began_s, is_first = time.monotonic(), not views.has_looked
    try:
        views.note(look(run_dir))
    except UdptunError as exc:
        views.note_failure(str(exc), time.monotonic())
    now_s = time.monotonic()
    if is_first and views.has_rates:
        interval_s = min(interval_s, _SECOND_LOOK_S)
    # A daemon of many thousands of peers has something else to do for at least half of the time.
    return max(began_s + interval_s, 2 * now_s - began_s)


def _print_json(request: Request) -> None:
    """The document as the daemon wrote it, or with one peer alone; to watch it, a line for each look."""
    said = ""
    while True:
        began_s = time.monotonic()
        try:
            text = fetch(request.run_dir)
            if request.peer is not None:
                text = _restricted(text, request.peer)
            print(text, end="", flush=True)
            said = ""
        except UdptunError as exc:
            if request.watch_s is None:
                raise
            if str(exc) != said:
                said = str(exc)
                print(f"udptun: {said}", file=sys.stderr)
        if request.watch_s is None:
            return
        time.sleep(max(0.0, began_s + request.watch_s - time.monotonic()))


def _restricted(text: str, peer: str) -> str:
    document = json.loads(text)
    subnets = matching(document, peer)
    if not subnets:
        raise UdptunError(says_that_nobody_is(peer))
    return json.dumps(restrict(document, subnets)) + "\n"


def fetch(run_dir: Path, document: str = "/status") -> str:
    """The text of the status document, or of another one, from the daemon's socket.  Raises UdptunError."""
    path = run_dir / SOCKET_NAME
    answer = b"".join(receive(run_dir, document))
    head, _, body = answer.decode(errors="replace").partition("\r\n\r\n")
    status_line = head.partition("\r\n")[0]
    if " 200 " not in status_line:
        raise UdptunError(body.strip() or f"the daemon at {path} answered {status_line!r}")
    if not body.endswith("\n"):
        # The daemon ended while it answered.
        raise UdptunError(f"the daemon at {path} answered with half a document")
    return body


def receive(run_dir: Path, document: str, more_s: float = 0.0) -> Generator[bytes]:
    """The daemon's answer as it comes; `more_s`: how much longer a piece of it may take.  Raises UdptunError."""
    check_run_dir(run_dir)
    path = run_dir / SOCKET_NAME
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        # connect() waits for room in a full queue of a Unix socket, as long as this says, if the socket blocks.
        whole_s = int(_TIMEOUT_S)
        wait = struct.pack("ll", whole_s, int((_TIMEOUT_S - whole_s) * 1e6))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)
        try:
            connection.connect(str(path))
            connection.settimeout(_TIMEOUT_S + more_s)
            connection.sendall(f"GET {document} HTTP/1.1\r\nHost: udptun\r\n\r\n".encode())
            while piece := connection.recv(1 << 16):
                yield piece
        except (TimeoutError, BlockingIOError):
            raise UdptunError(f"the daemon at {path} does not answer within {_TIMEOUT_S + more_s:.0f} s") from None
        except OSError as exc:
            raise UdptunError(
                f"no udptun daemon answers at {path}: {exc.strerror or exc}; is it running, and with this --run-dir?"
            ) from exc


def look(run_dir: Path) -> Look:
    """What the daemon says now.  Raises UdptunError."""
    document = json.loads(fetch(run_dir))
    return Look(document, time.monotonic(), time.time())
