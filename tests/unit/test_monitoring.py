"""deploy/monitoring: the alerts fire when they should, and no query names a series that nobody exports."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from udptun.control.metrics.table import METRICS

MONITORING = Path(__file__).parents[2] / "deploy" / "monitoring"
RULES, RULES_TEST = MONITORING / "udptun.rules.yml", MONITORING / "udptun.rules.test.yml"
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
ALERTS = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
LABELS = {metric.name: {*metric.labels, "job", "instance"} for metric in METRICS} | {"up": {"job", "instance"}}
"""Of each series; Prometheus adds two, and one of its own."""

with_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool (Debian's prometheus) is not installed"
)


def panels() -> Iterator[dict[str, Any]]:
    for panel in DASHBOARD["panels"]:
        yield panel
        yield from panel.get("panels", [])


def queries() -> dict[str, str]:
    """Where -> PromQL, of all alerts and of the dashboard."""
    found = {f"alert {rule['alert']}": str(rule["expr"]) for rule in ALERTS}
    for panel in panels():
        found |= {f"panel {panel['title']} {it['refId']}": it["expr"] for it in panel.get("targets", [])}
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            found[f"variable {variable['name']}"] = variable["query"]["query"]
    return found


@pytest.mark.parametrize(("where", "query"), queries().items(), ids=queries())
def test_query_names_series_and_labels_that_are_exported(where: str, query: str) -> None:
    names = re.findall(r"\b(?:udptun|process)_\w+|\bup\b", query)
    assert names, where
    assert [name for name in names if name not in LABELS] == []
    labels = set().union(*(LABELS[name] for name in names))
    for name, selector in re.findall(r"(\w+)\{([^}]*)\}", query):
        assert set(re.findall(r"(\w+)(?:=~|!~|!=|=)", selector)) <= LABELS[name], selector
    for listed in re.findall(r"\b(?:by|without|on|ignoring|group_left|group_right) *\(([^)]*)\)", query):
        assert set(re.findall(r"\w+", listed)) <= labels, listed


def test_counters_are_never_asked_for_without_their_growth() -> None:
    counters = "|".join(metric.name for metric in METRICS if metric.name.endswith("_total"))
    for where, query in queries().items():
        for before in re.findall(rf"(.{{0,30}})\b(?:{counters})\b", query):
            assert re.search(r"(?:rate|increase|resets)\($", before), where


# --- alerts


def test_the_query_for_narrow_paths_is_the_same_wherever_it_stands() -> None:
    (rule,) = [it["expr"] for it in ALERTS if it["alert"] == "UdptunNarrowPath"]
    query = "".join(rule.split())
    assert query in "".join((MONITORING.parents[1] / "docs" / "metrics.md").read_text().split())
    (shown,) = [it for where, it in queries().items() if where.startswith("panel Narrow paths")]
    assert "".join(shown.replace(',instance=~"$instance"', "").split()) == query


@with_promtool
def test_promtool_takes_the_rules_and_each_fires_as_its_test_says() -> None:
    for command in (["check", "rules", RULES.name], ["test", "rules", RULES_TEST.name]):
        done = subprocess.run(["promtool", *command], cwd=MONITORING, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test_in_which_it_fires_and_series_for_which_it_does_not() -> None:
    tested = {}
    for test in yaml.safe_load(RULES_TEST.read_text())["tests"]:
        (expression,) = test["promql_expr_test"]
        (name,) = re.findall(r'alertname="(\w+)"', expression["expr"])
        assert name not in tested
        tested[name] = len(expression["exp_samples"]), len(test["input_series"])
    assert tested.keys() == {rule["alert"] for rule in ALERTS}
    assert all(1 <= n_firing < n_series for n_firing, n_series in tested.values())


@pytest.mark.parametrize("rule", ALERTS, ids=[rule["alert"] for rule in ALERTS])
def test_alert_says_how_bad_it_is_where_and_what_to_do(rule: dict[str, Any]) -> None:
    assert re.fullmatch(r"Udptun([A-Z][a-z]+)+", rule["alert"])
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert rule["annotations"].keys() == {"summary", "description"}
    assert "{{ $labels." in rule["annotations"]["summary"]
    # Growth over a while needs none.
    assert "for" in rule or re.search(r"\[(15m|1h)\]", rule["expr"])


# --- dashboard


def test_panels_have_places_of_their_own_and_words() -> None:
    places: list[tuple[int, int, int, int]] = []
    for panel in panels():
        at = panel["gridPos"]
        places.append((at["x"], at["y"], at["x"] + at["w"], at["y"] + at["h"]))
        assert places[-1][2] <= 24
        assert panel["title"]
        assert panel["type"] == "row" or (panel["description"] and panel["targets"]), panel["title"]
    for one, other in combinations(places, 2):
        is_apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert is_apart, (one, other)
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids) > 20


def test_dashboard_asks_the_chosen_prometheus_about_the_chosen_hosts() -> None:
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource", "job", "instance"}
    for panel in panels():
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == "${datasource}"
            assert 'instance=~"$instance"' in target["expr"]
            used = set(re.findall(r"\$(\w+)", target["expr"]))
            assert used <= variables | {"__rate_interval"}
