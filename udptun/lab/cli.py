"""`udptun lab up | exec | status | doctor | mesh | down`."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from udptun._kabi import lib
from udptun.core.errors import UdptunError
from udptun.lab import owner
from udptun.lab.errors import LabError
from udptun.lab.machine import SOURCE_ROOT, Place
from udptun.lab.podman import PROGRAMS
from udptun.lab.topology import DEFAULT_NET_CONF, DUAL_STACK_NET_CONF, SWITCH, Lab

_MESH_PORT = 8286


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `lab` and its commands; `run` then obeys what they parse."""
    lab = subparsers.add_parser("lab", help="hosts, pods and daemons in namespaces on this machine")
    commands = lab.add_subparsers(dest="lab_command", required=True, metavar="COMMAND")

    def command(name: str, act: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        parser = commands.add_parser(name, help=text, description=text)
        parser.add_argument("--name", default="lab", help="which lab (default: %(default)s)")
        parser.set_defaults(lab_act=act)
        return parser

    up = command("up", _up, "make hosts, start a daemon in each, add pods")
    up.add_argument("--hosts", type=int, default=2, metavar="N")
    up.add_argument("--pods", type=int, default=1, metavar="N", help="pods on each host (default: %(default)s)")
    up.add_argument("--net-conf", type=Path, metavar="FILE", help="net-conf.json (default: 10.244.0.0/16, Type udp)")
    up.add_argument(
        "--store",
        default="local",
        help="the daemons' --store (default: %(default)s, shared by all hosts; kube: an API server runs in the lab)",
    )
    up.add_argument(
        "--cni",
        action="store_true",
        help="pods are containers of podman, made through CNI with flannel's configuration; daemons run with --ip-masq",
    )
    up.add_argument(
        "--ipv6",
        action="store_true",
        help="the underlay has IPv6 too; without --net-conf pods have both families",
    )
    up.add_argument("--underlay-mtu", type=int, default=1500, metavar="BYTES")
    up.add_argument(
        "--daemon",
        metavar="COMMAND",
        help="run this in each host instead of `udptun daemon`; it must say READY=1 on NOTIFY_SOCKET, as flanneld does",
    )
    execute = command("exec", _exec, "run a command in a host (h1), a pod (h1/p1) or at the switch (underlay)")
    execute.add_argument("place", metavar="PLACE")
    execute.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    status = command("status", _status, "what runs where")
    status.add_argument("--json", action="store_true")
    doctor = command("doctor", _doctor, "udptun doctor in every host, or in those that are named")
    doctor.add_argument("hosts", nargs="*", metavar="HOST")
    doctor.add_argument("--json", action="store_true")
    doctor.add_argument("--all", action="store_true", help="also what is fine")
    mesh = command("mesh", _mesh, "udptun mesh in a host: which host reaches which")
    mesh.add_argument("host", nargs="?", metavar="HOST", help="(default: the first one that is up)")
    mesh.add_argument("--json", action="store_true")
    mesh.add_argument("--html", type=Path, metavar="FILE", help="write the page as well")
    command("down", _down, "remove the lab and everything that runs in it")


def run(namespace: argparse.Namespace) -> int:
    """Obey what `add_parser` parsed and return the exit status.  Raises UdptunError."""
    # A script's shell starts a background job with SIGINT ignored, and Python leaves it so. Interrupting `up` must work
    # there as well, and the commands of `exec` are to start with the default.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    act: Callable[[argparse.Namespace], int] = namespace.lab_act
    return act(namespace)


# --- up


def _up(options: argparse.Namespace) -> int:
    """Start the owner, show its progress, and leave it in the background once the lab is up.

    Until then the owner ends with us, whatever ends us.
    """
    ours, owners = socket.socketpair()
    sys.stdout.flush()
    starter = os.getpid()
    child = os.fork()
    if child == 0:
        ours.close()
        _own(options, owners, starter)
    owners.close()
    try:
        if ours.recv(1):
            ours.sendall(b"\n")
            # Our end would still end the owner before it says that it goes on by itself.
            ours.recv(1)
            return 0
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except KeyboardInterrupt:
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        print("interrupted; the lab is removed", file=sys.stderr)
        return 128 + signal.SIGINT


def _own(options: argparse.Namespace, starter: socket.socket, starter_pid: int) -> NoReturn:
    """The owner's whole life; never returns."""
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
        lib.prctl_pdeathsig(signal.SIGTERM)
        if os.getppid() == starter_pid:
            _build_and_serve(options, starter)
    except SystemExit:
        status = 0
    except UdptunError as exc:
        print(f"udptun lab up: {exc}", file=sys.stderr, flush=True)
        status = exc.exit_status
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        # Not the interpreter's normal end: it would run exit handlers that belong to our starter.
        os._exit(status)


def _build_and_serve(options: argparse.Namespace, starter: socket.socket) -> None:
    progress = logging.StreamHandler(sys.stdout)
    progress.setFormatter(logging.Formatter("lab: %(message)s"))
    # Not lab/machine.py, which logs each command.
    loggers = [logging.getLogger(f"udptun.lab.{module}") for module in ("topology", "host")]
    for logger in loggers:
        logger.addHandler(progress)
        logger.setLevel(logging.INFO)
    with (
        owner.reserve(options.name) as listener,
        Lab(
            name=options.name,
            n_hosts=options.hosts,
            n_pods=options.pods,
            net_conf=options.net_conf or (DUAL_STACK_NET_CONF if options.ipv6 else DEFAULT_NET_CONF),
            store=options.store,
            underlay_mtu=options.underlay_mtu,
            daemon_command=shlex.split(options.daemon) if options.daemon else None,
            cni=options.cni,
            ipv6=options.ipv6,
        ) as lab,
    ):
        if not options.daemon:
            lab.daemon_command.append(f"--mesh-port={_MESH_PORT}")
        lab.start()
        print(f"lab: {options.name} is up; `udptun lab exec --name {options.name} h1 -- COMMAND` runs a command in it")
        sys.stdout.flush()
        starter.sendall(b"\n")
        # The starter must have seen that we are ready before it may end without us.
        if not starter.recv(1):
            return
        lib.prctl_pdeathsig(0)
        with contextlib.suppress(BrokenPipeError):
            starter.sendall(b"\n")
        starter.close()
        for logger in loggers:
            logger.removeHandler(progress)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        owner.serve(listener, lab)


# --- the others


def _exec(options: argparse.Namespace) -> int:
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        raise LabError("nothing to run: `udptun lab exec PLACE -- COMMAND`")
    lab = owner.RunningLab.find(options.name)
    with lab.connection:
        # The command may run, and a signal for it may come, before Popen returns: such signals are kept for it.
        early: list[int] = []
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, frame: early.append(number))
        child = _place(lab.status(), options.place).popen(command)
        # ^C and ^\ on the terminal are for the command.  We stay, to pass its status on.
        for number in (signal.SIGINT, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, frame: child.send_signal(number))
        for late in early:
            child.send_signal(late)
        status = child.wait()
    return status if status >= 0 else 128 - status


def _place(status: dict[str, Any], text: str) -> Place:
    machine, slash, pod = text.partition("/")
    if text == SWITCH:
        return Place(SWITCH, status["switch"]["holder_pid"])
    for host in status["hosts"]:
        if host["name"] == machine and not slash:
            return Place(machine, host["holder_pid"])
        if host["name"] == machine and any(one["name"] == pod for one in host["pods"]):
            return Place(machine, host["holder_pid"], pod)
    places = [SWITCH]
    for host in status["hosts"]:
        places += [host["name"], *(f"{host['name']}/{pod['name']}" for pod in host["pods"])]
    raise LabError(f"the lab {status['name']} has no {text}; it has {', '.join(places)}")


def _status(options: argparse.Namespace) -> int:
    lab = owner.RunningLab.find(options.name)
    with lab.connection:
        status = lab.status()
    if options.json:
        print(json.dumps(status, indent=2))
        return 0
    print(f"lab {status['name']}, owner pid {status['owner_pid']}")
    for host in status["hosts"]:
        if host["daemon_pid"] is not None:
            daemon = f"daemon pid {host['daemon_pid']}"
        elif host["daemon_exit_status"] is not None:
            daemon = f"daemon ended with status {host['daemon_exit_status']}"
        else:
            daemon = "no daemon"
        state = daemon if host["up"] else "down"
        subnets = _words(host["subnet"], host["ipv6_subnet"])
        underlay = _words(host["underlay_address"], host["underlay_ipv6"])
        print(f"  {host['name']:<6} {underlay:<15} subnet {subnets or '-'}, {state}")
        for pod in host["pods"]:
            print(f"    {host['name']}/{pod['name']:<6} {_words(pod['address'], pod['ipv6_address'])}")
    return 0


def _words(*values: str | None) -> str:
    return " ".join(dict.fromkeys(filter(None, values)))


def _doctor(options: argparse.Namespace) -> int:
    """At the same time in all of them; the exit status is the worst of theirs, 2 where one has said nothing."""
    status, up = _hosts_up(options.name)
    names = options.hosts or up
    flags = [f"--cni-bin-dir={PROGRAMS}", *(["--json"] * options.json), *(["--all"] * options.all)]
    command = [sys.executable, "-m", "udptun", "doctor", *flags]
    environ = {**os.environ, "PYTHONPATH": str(SOURCE_ROOT)}
    running = {it: _place(status, it).popen(command, stdout=subprocess.PIPE, env=environ) for it in names}
    said = {name: child.communicate()[0] for name, child in running.items()}
    silent = [name for name, text in said.items() if not text]
    if options.json:
        print(json.dumps({name: json.loads(text) if text else None for name, text in said.items()}))
    else:
        print("\n".join(f"{name}:\n{textwrap.indent(text, '  ')}" for name, text in said.items()), end="")
    for name in silent:
        ended = f"ended with status {running[name].returncode} and has said nothing"
        print(f"udptun lab doctor: the one on {name} {ended}", file=sys.stderr)
    return max(*(child.returncode for child in running.values()), 2 * bool(silent))


def _mesh(options: argparse.Namespace) -> int:
    """As one host sees it, which asks the others; the exit status is its own."""
    status, up = _hosts_up(options.name)
    flags = [*(["--json"] * options.json), *([] if options.html is None else ["--html", str(options.html.absolute())])]
    command = [sys.executable, "-m", "udptun", "mesh", *flags]
    environ = {**os.environ, "PYTHONPATH": str(SOURCE_ROOT)}
    return _place(status, options.host or up[0]).popen(command, env=environ).wait()


def _hosts_up(name: str) -> tuple[dict[str, Any], list[str]]:
    """The status of a lab and the names of its hosts that are up.  Raises LabError when none is."""
    lab = owner.RunningLab.find(name)
    with lab.connection:
        status = lab.status()
    names = [host["name"] for host in status["hosts"] if host["up"]]
    if not names:
        raise LabError(f"no host of the lab {name} is up")
    return status, names


def _down(options: argparse.Namespace) -> int:
    lab = owner.RunningLab.find(options.name)
    with lab.connection:
        lab.down()
    print(f"lab: {options.name} is down")
    return 0
