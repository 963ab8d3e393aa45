"""Servers that the tests here share."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest
from etcd_harness import ON_SHARED_SERVERS, SHARED_ETCD
from kube_server import SHARED


@pytest.fixture(scope="session", autouse=True)
def _shared_etcd() -> Iterator[None]:
    yield
    SHARED_ETCD.close()
    SHARED.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, None, None]:
    """End etcd behind the last test of its group: each idle server costs a two-hundredth of a processor.

    In one process alone tests that need it may follow.
    """
    yield
    if hasattr(item.config, "workerinput") and not (nextitem is not None and _is_on_shared_etcd(nextitem)):
        SHARED_ETCD.close()


def _is_on_shared_etcd(item: pytest.Item) -> bool:
    return ON_SHARED_SERVERS.mark in item.iter_markers()
