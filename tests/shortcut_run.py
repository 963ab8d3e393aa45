"""`--shortcut`: every udp daemon that a lab starts has the shortcut, and the run says what the kernel has carried.

The daemons get it by FLANNELD_SHORTCUT=auto, so the network configs of the tests stay as they are.  A test goes on once
it is on at the hosts of its lab, or cannot be.  Daemons that inherit no environment, as those in containers and of
systemd, are without it.

What was carried is read from each daemon that still runs when its host ends, so it is the least.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest

SETTING = "FLANNELD_SHORTCUT"
"""Where it is set, the labs that a test starts have the shortcut."""

_LIMIT_S = 15.0
_NOT_TRIED = "off: it was not tried yet"
_EXPECTED_OFF = (
    _NOT_TRIED,
    "off: it carries IPv4 over IPv4 alone",
    "off: the firewall's rules cannot be read: there is neither nft nor an iptables that reads nf_tables",
)
"""How states begin that are no fault: of a host that ended a moment after the start, and of what tests ask for."""
_KIND = "shortcut"


class ShortcutRun:
    """The plugin that `--shortcut` registers, in the process that reports as in those that run tests."""

    def __init__(self) -> None:
        self._ended: list[dict[str, object]] = []
        """Hosts that have ended since the last report."""
        self._is_watching = False
        self._states: Counter[str] = Counter()
        self._carried: Counter[str] = Counter()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if item.get_closest_marker("netns"):
            os.environ[SETTING] = "auto"
            if not self._is_watching:
                self._is_watching = True
                self._watch()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self) -> Generator[None, None, None]:
        try:
            return (yield)
        finally:
            os.environ.pop(SETTING, None)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        ended, self._ended[:] = list(self._ended), []
        # These reach the process that reports, whichever process runs the test.
        report.user_properties = [*report.user_properties, *((_KIND, it) for it in ended)]
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for host in (it for kind, it in report.user_properties if kind == _KIND):
            self._states[str(host["state"])] += 1
            self._carried.update({name: host[name] for name in ("sent", "delivered")})

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        is_here = not hasattr(session.config, "workerinput")
        if is_here and self._wrong():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _wrong(self) -> list[str]:
        """What is not as it shall be.  `off` alone is what daemons of other types say."""
        wrong = [it for it in self._states if it not in ("on", "off") and not it.startswith(_EXPECTED_OFF)]
        if self._states and not all(self._carried[name] for name in ("sent", "delivered")):
            wrong.append("the kernel has carried nothing")
        return wrong

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("shortcut")
        sent, delivered = self._carried["sent"], self._carried["delivered"]
        terminalreporter.write_line(f"the kernel has sent {sent} packets and delivered {delivered}, of these daemons:")
        for state, n in self._states.most_common():
            terminalreporter.write_line(f"{n:6} {state}")
        for line in self._wrong():
            terminalreporter.write_line(f"failed: no test asks for this: {line}")

    def _watch(self) -> None:
        """Have each lab wait for the shortcut, and each host say what it has carried before it ends."""
        # Here, because the lab needs the compiled modules and the unit tests are to run without them.
        from udptun.lab.host import Host
        from udptun.lab.topology import Lab

        start, down = Lab.start, Host.down

        def start_with_it(lab: Lab, timeout: float = 20) -> None:
            start(lab, timeout)
            if SETTING in os.environ:
                _wait_until_settled(lab.hosts)

        def look_and_end(host: Host) -> None:
            document = _status(host)
            if document is not None and document.get("datapath"):
                datapath, counters = document["datapath"], document["counters"]
                rows = datapath["worker_counters"]
                sent, delivered = (
                    counters[name] - sum(row.get(name, 0) for row in rows) for name in ("encap_sent", "decap_delivered")
                )
                self._ended.append({"state": datapath["shortcut"], "sent": sent, "delivered": delivered})
            down(host)

        Lab.start, Host.down = start_with_it, look_and_end  # type: ignore[method-assign]


def _wait_until_settled(hosts: list[Any]) -> None:
    """Until all have it on and send to each other by it, or one says why it has not."""
    deadline_s = time.monotonic() + _LIMIT_S
    while time.monotonic() < deadline_s:
        documents = [_status(host) for host in hosts]
        if any(it is None or not it.get("datapath") for it in documents):
            return
        states = [it["datapath"]["shortcut"] for it in documents if it is not None]
        peers = [peer for it in documents if it is not None for peer in it["peers"]]
        if all(it == "on" for it in states):
            if all(it["shortcut"] for it in peers if ":" not in it["subnet"]):
                return
        elif any(it.startswith("off") and it != _NOT_TRIED for it in states):
            return
        time.sleep(0.02)


def _status(host: Any) -> Any:
    """What `udptun status --json` prints; None where no daemon says anything."""
    from udptun.commands import status
    from udptun.core.errors import UdptunError

    try:
        return json.loads(status.fetch(host.path("/run/udptun")))
    except (UdptunError, OSError, ValueError):
        return None
