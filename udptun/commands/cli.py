"""The commands.  The only file that reads argv and the environment, or exits.

The exit status is 0 when the command is done or was stopped as asked, 1 when it failed, 2 when a person has to mend a
flag or the configuration, 130 when it was interrupted and 141 when the reader of its output went away.

Installed as `flanneld`, the program is `udptun daemon`, and as `mk-docker-opts.sh` it is `udptun docker-opts`.  Each
command imports what it needs when it runs, so that `udptun status` does not wait for the daemon's libraries.
"""

from __future__ import annotations

import gc
import os
import select
import sys

from udptun import __version__
from udptun.core.errors import UdptunError, UsageError

TYPE_CHECKING = False
"""As typing's.  A probe runs every few seconds: what only annotations and other commands need is not loaded here."""
if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Callable, Mapping, Sequence
    from typing import NoReturn

    _Command = Callable[[list[str], Mapping[str, str]], int]

_STDOUT_FD = 1


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command that `argv` (default: the process's, without the program's name) says, and exit."""
    # grpc would print its errors, which we report ourselves.  It reads this when it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    program = sys.argv[0].rpartition("/")[2]
    words = sys.argv[1:] if argv is None else argv
    sys.exit(_run(program if program in _FLANNELS else "udptun", list(words), os.environ))


def _run(program: str, argv: list[str], environ: Mapping[str, str]) -> int:
    try:
        status = _FLANNELS.get(program, _udptun)(argv, environ)
        print(end="", flush=True)
    except UdptunError as exc:
        for line in exc.problems:
            print(f"{program}: error: {_one_line(line)}", file=sys.stderr)
        return exc.exit_status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 141
    return status


def _reader_is_gone() -> bool:
    """Whether the broken pipe is stdout's.  If it is, what is still written there goes nowhere."""
    stdout = select.poll()
    stdout.register(_STDOUT_FD, 0)
    if not stdout.poll(0):
        return False
    # The interpreter flushes stdout once more when it exits.
    os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT_FD)
    return True


def _one_line(text: str) -> str:
    """A message may quote what somebody typed."""
    return text.replace("\n", "\\n").replace("\r", "\\r")


def _udptun(argv: list[str], environ: Mapping[str, str]) -> int:
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    if name in ("-h", "--help", "-help", "help"):
        print(_overview())
        return 0
    if name in ("--version", "-version"):
        name = "version"
    if not name:
        print(_overview(), file=sys.stderr)
        return UsageError.exit_status
    if name not in _COMMANDS:
        from udptun.core.errors import did_you_mean

        what = "unknown flag" if name.startswith("-") else "unknown command"
        raise UsageError(f"{what} {name}{did_you_mean(name, _COMMANDS)} (udptun --help lists the commands)")
    return _COMMANDS[name][1](rest, environ)


def _overview() -> str:
    lines = [f"  {name:<12} {summary}" for name, (summary, _) in _COMMANDS.items()]
    return "\n".join(
        [
            "usage: udptun COMMAND [ARGUMENT...]",
            "",
            "A flannel-compatible overlay daemon with a userspace UDP tunnel.",
            "",
            *lines,
            "",
            "udptun COMMAND --help says more.",
        ]
    )


def _flanneld(argv: list[str], environ: Mapping[str, str]) -> int:
    return _start_daemon("flanneld", argv, environ)


def _daemon(argv: list[str], environ: Mapping[str, str]) -> int:
    return _start_daemon("udptun daemon", argv, environ)


def _start_daemon(name: str, argv: list[str], environ: Mapping[str, str]) -> int:
    import signal

    # These do nothing to a Go program that does not ask for them, and so to flanneld (sigtab_linux_generic.go). Their
    # default is the end of the process, and log rotation, for one, sends some of them.  The datapath inherits that they
    # are ignored.
    for number in (
        *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF),
        *(signal.SIGIO, signal.SIGPWR, signal.SIGXCPU, signal.SIGXFSZ),
        *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
    ):
        signal.signal(number, signal.SIG_IGN)
    # What modules make stays. To look for garbage among it would be a twentieth of the start.
    gc.disable()

    from udptun.config import flags
    from udptun.config.store_flags import StoreKind

    options = flags.parse_daemon_flags(argv, environ, as_flanneld=name == "flanneld")
    if options.help:
        print(f"usage: {name} [FLAG...]\n\nJoin this host to the overlay network.\n{flags.daemon_help()}")
        return 0
    if options.version:
        print(f"udptun {__version__}", file=sys.stderr)  # to stderr, as flanneld does
        return 0

    # The imports below take a while, and until the daemon handles signals itself there is nothing to undo.  So a signal
    # ends the process at once.  SystemExit would not do: raised in a callback of the import machinery it is printed
    # and forgotten.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: os._exit(0))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    if options.store.kind is not StoreKind.KUBE:
        _import_asyncio_without_ssl()
    from udptun.config.service_manager import service_manager
    from udptun.control import daemon

    gc.freeze()
    gc.enable()
    return daemon.run(options, service_manager(environ, os.getpid()))


def _import_asyncio_without_ssl() -> None:
    """Do without OpenSSL: 7 ms, and 4 MB where no other program on the machine uses it.

    asyncio works without ssl, as in a Python that was built without it.  Only the kube store needs TLS from asyncio:
    grpc, for etcd, has a TLS library of its own.
    """
    if "asyncio" in sys.modules or "ssl" in sys.modules:
        return
    sys.modules["ssl"] = None  # type: ignore[assignment]  # None makes the import fail
    try:
        import asyncio  # noqa: F401 - for its side effect
    finally:
        # A later import by others succeeds.
        del sys.modules["ssl"]


def _cleanup(argv: list[str], environ: Mapping[str, str]) -> int:
    from udptun.config import command_flags
    from udptun.config.store_flags import StoreKind

    options, release = command_flags.parse_cleanup_flags(argv, environ)
    if options.help:
        print(
            "usage: udptun cleanup [--release] [FLAG...]\n\n"
            "Stop the datapath and remove device, routes and files.  Takes the daemon's flags, so that it finds\n"
            "what a daemon with the same flags left.\n\n"
            f"{command_flags.cleanup_help()}"
        )
        return 0
    if options.version:
        return _version([], environ)

    # As in `_start_daemon`; and it ends before there is garbage worth looking for.
    gc.disable()
    if options.store.kind is not StoreKind.KUBE:
        _import_asyncio_without_ssl()
    from udptun.commands import cleanup

    return cleanup.cleanup(options, release)


def _status(argv: list[str], environ: Mapping[str, str]) -> int:
    from udptun.commands.parser import Parser, seconds_up_to, subnet_or_address

    parser = Parser(prog="udptun status", description="Say what the daemon of this host is doing.")
    parser.add_argument("--json", action="store_true", help="for programs; see docs/status.md")
    parser.add_argument(
        "--watch",
        nargs="?",
        const=1.0,
        type=seconds_up_to(86400),
        metavar="SECONDS",
        help="show it again and again, every second or so often; q ends it",
    )
    parser.add_argument(
        "--peer",
        type=subnet_or_address,
        metavar="SUBNET|ADDRESS",
        help="all about one: its subnet, its address, or that of one of its pods",
    )
    parser.add_run_dir(environ)
    parser.add_argument(
        "--backends", action="store_true", help="say what each Backend.Type would get on this host; needs no daemon"
    )
    given = parser.parse_args(argv)
    if given.backends:
        from udptun.commands import probe

        return probe.show(pretend_no_vxlan=bool(environ.get("UDPTUN_PRETEND_NO_VXLAN")), as_json=given.json)

    from udptun.commands import status
    from udptun.commands.terminal import has_colours, is_dumb

    of_terminal = has_colours(environ), is_dumb(environ)
    return status.show(status.Request(given.run_dir, given.json, given.watch, given.peer, *of_terminal))


def _doctor(argv: list[str], environ: Mapping[str, str]) -> int:
    from udptun.commands import doctor

    return doctor.run(argv, environ)


def _config(argv: list[str], environ: Mapping[str, str]) -> int:
    from udptun.commands import config

    return config.run(argv, environ)


def _trace(argv: list[str], environ: Mapping[str, str]) -> int:
    from udptun.commands import trace

    return trace.run(argv, environ)


def _mesh(argv: list[str], environ: Mapping[str, str]) -> int:
    from udptun.commands.mesh import command

    return command.run(argv, environ)


def _health(argv: list[str], environ: Mapping[str, str]) -> int:
    from udptun.commands import health

    return health.run(argv, environ)


_LEASE_USAGE = """\
usage: udptun lease list [--json] [FLAG...]
       udptun lease show SUBNET|KEY [--json] [FLAG...]
       udptun lease reserve SUBNET|KEY --public-ip IP|--public-ipv6 IP [--port N] [FLAG...]
       udptun lease release SUBNET|KEY [FLAG...]
       udptun lease init [--force] PATH

list      the leases in the store that the flags name, as those of the daemon do
show      all of one
reserve   keep a subnet for the host with that address: a lease that does not expire
release   delete a lease or a reservation
init      write a leases file to start from, for --store file:PATH
"""


def _lease(argv: list[str], environ: Mapping[str, str]) -> int:
    action, rest = (argv[0], argv[1:]) if argv else ("", [])
    if action == "init":
        return _lease_init(rest)

    from udptun.config import command_flags

    if action in ("-h", "--help", "-help"):
        print(_LEASE_USAGE + command_flags.lease_help())
        return 0
    if action not in ("list", "show", "reserve", "release"):
        what = f"unknown action {action}" if action else "what to do is missing"
        raise UsageError(f"lease: {what}: list, show, reserve, release or init")
    n_words = 0 if action == "list" else 1
    request = command_flags.parse_lease_flags(rest, environ, n_words)
    if request.options.help:
        print(_LEASE_USAGE + command_flags.lease_help())
        return 0
    if len(request.words) < n_words:
        raise UsageError(f"lease {action}: which one? give a SUBNET, as 10.244.3.0/24, or a KEY, as 10.244.3.0-24")

    from udptun.commands import lease as lease_command

    actions = {
        "list": lease_command.list_leases,
        "show": lease_command.show,
        "reserve": lease_command.reserve,
        "release": lease_command.release,
    }
    return actions[action](request)


def _lease_init(argv: list[str]) -> int:
    from pathlib import Path

    from udptun.commands.parser import Parser

    parser = Parser(prog="udptun lease init", description="Write a leases file to start from, for --store file:PATH.")
    parser.add_argument("path", type=Path, metavar="PATH")
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    given = parser.parse_args(argv)

    from udptun.stores import file

    file.write_starter(given.path, force=given.force)
    return 0


def _docker_opts(argv: list[str], environ: Mapping[str, str]) -> int:
    from udptun.commands import docker_opts

    return docker_opts.run(argv, environ)


def _cni(argv: list[str], environ: Mapping[str, str]) -> int:
    from udptun.commands import cni

    return cni.run(argv, environ)


def _lab(argv: list[str], environ: Mapping[str, str]) -> int:
    from udptun.commands.parser import Parser
    from udptun.lab import cli as lab

    parser: ArgumentParser = Parser(prog="udptun")
    lab.add_parser(parser.add_subparsers())
    return lab.run(parser.parse_args(["lab", *argv]))


def _completion(argv: list[str], environ: Mapping[str, str]) -> int:
    from udptun.commands import completion

    return completion.run(argv, _help_of)


def _man(argv: list[str], environ: Mapping[str, str]) -> int:
    from udptun.commands import man

    return man.run(argv, _help_of)


def _help_of(words: tuple[str, ...]) -> str:
    """What the command prints with --help, each sentence on one line."""
    import contextlib
    import io

    said = io.StringIO()
    # argparse wraps its lines at this width, and exits.
    os.environ["COLUMNS"] = "1000"
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        _udptun([*words, "--help"], {})
    return said.getvalue()


def _version(argv: list[str], environ: Mapping[str, str]) -> int:
    from udptun.commands.parser import Parser

    Parser(prog="udptun version", description="Print the version.").parse_args(argv)
    print(f"udptun {__version__}")
    return 0


_COMMANDS: Mapping[str, tuple[str, _Command]] = {
    "daemon": ("join this host to the overlay network; installed as flanneld too", _daemon),
    "status": ("say what the daemon of this host is doing", _status),
    "doctor": ("say what is wrong on this host and what to do about it", _doctor),
    "config": ("check a network config; show the settings in force and where each came from", _config),
    "trace": ("say what would happen to a packet on this host, and why", _trace),
    "mesh": ("say which host reaches which, as the hosts themselves see it; as a page too (--html)", _mesh),
    "health": ("say whether the daemon lives (--live) and is ready (--ready); for probes", _health),
    "cleanup": ("stop the datapath and remove what the daemon made", _cleanup),
    "lease": ("list, show, reserve and release leases; write a leases file", _lease),
    "docker-opts": ("write Docker's options from subnet.env; installed as mk-docker-opts.sh too", _docker_opts),
    "cni": ("install the CNI plugin; free what its containers have left", _cni),
    "lab": ("hosts, pods and daemons in namespaces on one machine", _lab),
    "completion": ("print a script that completes commands and flags in bash, zsh or fish", _completion),
    "man": ("print a manual page, or write all of them", _man),
    "version": ("print the version", _version),
}

_FLANNELS: Mapping[str, _Command] = {"flanneld": _flanneld, "mk-docker-opts.sh": _docker_opts}
"""flannel's programs that we are installed as, too."""
