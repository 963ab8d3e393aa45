"""How `./dev test` shares the tests among its processes: see tests/conftest.py."""

from __future__ import annotations

import pytest


@pytest.mark.xdist_group("grouped")
def test_tests_of_a_group_run_in_one_process(request: pytest.FixtureRequest) -> None:
    """pytest 9.2 had pytest-xdist ignore the groups: each of three processes made every shared lab and etcd server.

    pytest-xdist sees the group at the end of the test's name.
    """
    is_grouping = getattr(request.config.option, "loadgroup", False)
    assert request.node.nodeid.endswith("@grouped") == is_grouping
