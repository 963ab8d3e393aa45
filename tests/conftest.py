"""What every test directory shares: which tests this run, machine and user can do, and by name why not."""

from __future__ import annotations

import pytest
from hypothesis import settings

# An example that takes long says that the machine is busy, and nothing else.
settings.register_profile("udptun", deadline=None)
settings.load_profile("udptun")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the tests marked `full` too")
    parser.addoption("--flanneld", metavar="PATH", help="flanneld's program, for the tests beside the real one")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        full = [item for item in items if item.get_closest_marker("full")]
        if full:
            config.hook.pytest_deselected(items=full)
            items[:] = [item for item in items if item not in full]
    needing_a_lab = [item for item in items if item.get_closest_marker("netns")]
    if not needing_a_lab:
        return
    # Here, because the lab needs the compiled modules and the unit tests are to run without them.
    from udptun.lab.topology import missing_requirements

    missing = missing_requirements(
        ("ip", "bridge", "nsenter", "ping", "ethtool", "tcpdump", "iperf3", "ps", "nft", "iptables")
    )
    if missing:
        skip = pytest.mark.skip(reason=f"needs {', '.join(missing)}")
        for item in needing_a_lab:
            item.add_marker(skip)
