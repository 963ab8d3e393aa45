"""What systemd says in the environment."""

from __future__ import annotations

import pytest

from udptun.config.service_manager import ServiceManager, service_manager

PID = 4711
NONE = ServiceManager()


@pytest.mark.parametrize(
    ("environ", "understood"),
    [
        ({}, NONE),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "4711"}, ServiceManager(watchdog_s=30)),
        ({"WATCHDOG_USEC": "30000000"}, ServiceManager(watchdog_s=30)),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, NONE),
        ({"WATCHDOG_USEC": "soon"}, NONE),
        ({"WATCHDOG_USEC": "0"}, NONE),
        ({"FDSTORE": "128", "NOTIFY_SOCKET": "/n"}, ServiceManager(keeps_descriptors=True)),
        ({"FDSTORE": "0", "NOTIFY_SOCKET": "/n"}, NONE),
        ({"FDSTORE": "128"}, NONE),
        (
            {"LISTEN_PID": "4711", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "one:two"},
            ServiceManager(passed=(("one", 3), ("two", 4))),
        ),
        ({"LISTEN_PID": "4711", "LISTEN_FDS": "2"}, ServiceManager(passed=(("", 3), ("", 4)))),
        ({"LISTEN_PID": "4712", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "one:two"}, NONE),
        ({"LISTEN_FDS": "2", "LISTEN_FDNAMES": "one:two"}, NONE),
        ({"LISTEN_PID": "4711", "LISTEN_FDS": "-1"}, NONE),
    ],
)
def test_environment_is_understood_or_counts_as_not_there(environ: dict[str, str], understood: ServiceManager) -> None:
    assert service_manager(environ, PID) == understood
