"""The fixture `datapath` runs a test over both implementations; `fast` is for what only the fast path has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.datapath.harness import Datapath, FastDatapath, ReferenceDatapath, skip_unless_built


@pytest.fixture
def fast() -> Iterator[FastDatapath]:
    """The fast path alone."""
    skip_unless_built()
    with FastDatapath() as datapath:
        yield datapath


@pytest.fixture(params=["reference", "fastpath"])
def datapath(request: pytest.FixtureRequest) -> Iterator[Datapath]:
    """Either implementation, fresh, with the overlay of tests/packets.py and SourceCheck peer."""
    if request.param == "reference":
        yield ReferenceDatapath()
        return
    skip_unless_built()
    with FastDatapath() as fast:
        yield fast
