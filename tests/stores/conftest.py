"""Servers that the tests here share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from etcd_harness import SHARED_ETCD
from kube_server import SHARED


@pytest.fixture(scope="session", autouse=True)
def _shared_etcd() -> Iterator[None]:
    yield
    SHARED_ETCD.close()
    SHARED.close()
