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


@pytest.fixture(params=["reference", "fastpath", "fastpath-trains"])
def datapath(request: pytest.FixtureRequest) -> Iterator[Datapath]:
    """Either implementation, fresh, with the overlay of tests/packets.py and SourceCheck peer.

    The fast path twice: without UDP_GRO, and with trains wherever a batch allows them.
    """
    if request.param == "reference":
        yield ReferenceDatapath()
        return
    skip_unless_built()
    is_in_trains = request.param == "fastpath-trains"
    with FastDatapath(has_gro=is_in_trains, is_in_trains=is_in_trains) as fast:
        yield fast
