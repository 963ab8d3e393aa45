"""The bench's arithmetic: what it makes of raw output, of rounds, and of two results."""

from __future__ import annotations

import json
import sqlite3
import xml.etree.ElementTree as ET
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from pathlib import Path as File
from typing import Any

import pytest

from bench import bulk_leases, compare, plot, report, results
from bench.__main__ import main
from bench.compare import Verdict, judge
from bench.cpu import CpuTimes, Usage
from bench.errors import BenchError
from bench.figures import (
    FIGURES,
    LEASE_PATHS,
    LEASES_OF,
    MODES,
    N_LEASES,
    NAIVE,
    PATHS,
    TITLES,
    TUNNEL,
    VTEP,
    VXLAN,
    WORKLOADS,
    by_ipv6,
    lease_path,
    paths_of,
)
from bench.goals import GOALS
from bench.goals import judge as judge_goals
from bench.measure import parse_flood, parse_ping, parse_round_trips, parse_tcp
from bench.paths import KINDS, Path, Process, interleave
from bench.peers.pytun_loop import step_ttl
from bench.run import FULL, QUICK, Options, plan
from bench.summary import Cell, Runs, Spread, percentile, ratios, table
from bench.workloads import RUN

RESULTS = sorted((File(__file__).parents[2] / "bench" / "results").glob("*.json"))
USAGE = Usage(wall_s=2.0, system_s=3.0, tunnel_s=1.0, foreign_cores=0.0)


def one(round: int, path: str, figures: dict[str, float], mode: str = "A", workload: str = "tcp_1") -> dict[str, Any]:
    return {
        "round": round,
        "mode": mode,
        "workload": workload,
        "path": path,
        "figures": figures,
        "usage": {"foreign_cores": 0.0},
    }


def document(*runs: dict[str, Any]) -> dict[str, Any]:
    """A result file's content, as bench.run makes it."""
    return {
        "schema": results.SCHEMA,
        "started": "2024-05-06T07:08:09Z",
        "command": ["python", "-m", "bench"],
        "machine": {
            "commit": "c0ffee",
            "uncommitted_changes": False,
            "kernel": "Linux 6.1",
            "cpu": "a <fast> & small one",
            "cores": 2,
            "python": "3.11.2",
            "iperf3": "iperf 3.12",
            "tcp_congestion_control": "cubic",
        },
        "options": {"modes": ["A"], "paths": ["udptun"], "workloads": ["tcp_1"], "repeats": 3, "seconds": 2},
        "idle_busy_cores": 0.02,
        "paths": [],
        "missing": {"flanneld": "give its program with --flanneld"},
        "runs": list(runs),
    }


def three_rounds(factor: float = 1.0) -> dict[str, Any]:
    """The tunnel at 4, 6 and 5 times the naive loop, which gets faster from round to round."""
    return document(
        *(
            run
            for i, (naive, times) in enumerate(((1.0, 4.0), (2.0, 6.0), (4.0, 5.0)))
            for run in (
                one(i, TUNNEL, {"gbit_per_s": naive * times * factor, "tunnel_cpu_s_per_gb": 1.0}),
                one(i, NAIVE, {"gbit_per_s": naive, "tunnel_cpu_s_per_gb": 10.0}),
                one(i, VXLAN, {"gbit_per_s": 10.0, "system_cpu_s_per_gb": 0.5}),
            )
        )
    )


# --- rounds


def test_ratio_is_taken_within_each_round() -> None:
    runs = Runs(three_rounds()["runs"])
    assert runs.ratio(Cell("A", "tcp_1", TUNNEL, "gbit_per_s"), NAIVE) == Spread(5.0, 4.0, 6.0)
    assert runs.spread(Cell("A", "tcp_1", TUNNEL, "gbit_per_s")) == Spread(12.0, 4.0, 20.0)
    assert runs.ratio(Cell("A", "tcp_1", TUNNEL, "gbit_per_s"), "fastd") is None
    assert runs.spread(Cell("B", "tcp_1", TUNNEL, "gbit_per_s")) is None


def test_ratio_leaves_out_rounds_that_lack_one_of_the_two() -> None:
    assert ratios({0: 2.0, 1: 3.0, 3: 8.0}, {1: 1.5, 2: 1.0, 3: 0.0}) == {1: 2.0}


def test_rounds_begin_with_another_one_each_time() -> None:
    assert [list(order) for _, order in interleave(("a", "b", "c"), 4)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]


@pytest.mark.parametrize(("percent", "value"), [(50, 500), (99, 990), (99.9, 999), (100, 1000), (0, 1)])
def test_percentile_is_the_least_value_that_so_many_are_not_above(percent: float, value: float) -> None:
    assert percentile(range(1, 1001), percent) == value


def test_percentile_of_one_value_is_that_value() -> None:
    assert [percentile([7.0], percent) for percent in (0, 50, 99.9)] == [7.0, 7.0, 7.0]


def test_table_aligns_the_first_column_left_and_figures_right() -> None:
    assert table(["", "MTU"], [["a", "1472"], ["long", "9"]]) == ["       MTU", "a     1472", "long     9"]


# --- plan and names


def a_path(name: str, *processes: Process) -> Path:
    return Path(name, 1472, None, None, IPv4Address("192.0.2.1"), processes)  # type: ignore[arg-type]


def test_plan_puts_paths_next_to_each_other_and_measures_each_once_a_round() -> None:
    options = Options(("A", "B"), ("udptun", "vxlan"), ("tcp_1", "memory", "rtt"), 2, 1)
    paths = [a_path(TUNNEL, Process("h1", "daemon", 1)), a_path(VXLAN)]
    steps = plan(options, paths)
    assert [(step.mode, step.workload, step.path) for step in steps if step.round == 1] == [
        (mode, workload, path)
        for mode in "AB"
        for workload, measured in (("tcp_1", (VXLAN, TUNNEL)), ("memory", (TUNNEL,)), ("rtt", (VXLAN, TUNNEL)))
        for path in measured
    ]
    assert len(set(steps)) == len(steps) == 2 * 2 * 5


def test_plan_measures_leases_with_the_tunnel_only_and_in_the_first_mode() -> None:
    options = Options(("C", "A"), ("udptun", "vxlan"), ("leases",), 2, 1)
    steps = plan(options, [a_path(VXLAN), a_path(TUNNEL)])
    assert {(step.mode, step.path) for step in steps} == {("C", lease_path(n)) for n in N_LEASES}
    assert len(steps) == 2 * len(N_LEASES) * len(LEASES_OF)
    assert [step.n_leases for step in steps if step.round == 1][:: len(LEASES_OF)] == [1_000, 65_534, 1]
    assert plan(options, [a_path(VXLAN)]) == []


def test_plan_measures_leases_by_each_family_next_to_the_other() -> None:
    options = Options(("A",), ("udptun", "udptun-ipv6"), ("leases",), 1, 1, ("4", "6"))
    steps = plan(options, [a_path(TUNNEL), a_path(by_ipv6(TUNNEL))])
    assert [step.path for step in steps[:2]] == ["1 lease", "1 lease, IPv6"]
    assert {step.path for step in steps} == set(LEASE_PATHS)
    by_six = plan(options, [a_path(by_ipv6(TUNNEL))])
    assert {step.path for step in by_six} == {by_ipv6(lease_path(n)) for n in N_LEASES}


def test_every_word_of_the_command_line_has_something_behind_it() -> None:
    assert {*RUN, "leases"} == set(WORKLOADS)
    assert set(LEASES_OF.values()) <= set(RUN)
    assert list(KINDS) == list(PATHS)
    for options in (FULL, QUICK):
        assert set(options.modes) <= set(MODES)
        assert set(options.paths) <= set(PATHS)
        assert set(options.workloads) <= set(WORKLOADS)


def test_family_chooses_the_paths_that_have_ipv6() -> None:
    """Before, only the tunnel and the underlay had one, so nobody knew how fast the VTEP is by IPv6."""
    assert paths_of(("naive", "udptun"), ("6",)) == ("udptun-ipv6",)
    assert paths_of(("vtep", "naive", "vxlan", "host-gw"), ("6",)) == ("vtep-ipv6", "vxlan-ipv6", "host-gw-ipv6")
    assert paths_of(("naive", "udptun", "vtep"), ("4", "6")) == (
        *("naive", "udptun", "udptun-ipv6", "vtep", "vtep-ipv6"),
    )
    assert paths_of(("naive",), ("6",)) == ()
    for options in (FULL, QUICK):
        assert paths_of(options.paths, options.families) == options.paths


def test_goals_name_workloads_and_figures_that_there_are() -> None:
    for goal in GOALS:
        assert goal.workload in TITLES
        assert goal.figure in FIGURES
        assert goal.is_at_most == (FIGURES[goal.figure].is_more_better is False)
        assert set(goal.limits) == set(MODES)


# --- reading programs


def test_ping_times_are_read_and_duplicates_are_not_counted() -> None:
    text = """PING 10.0.0.2 (10.0.0.2) 56(84) bytes of data.
64 bytes from 10.0.0.2: icmp_seq=1 ttl=60 time=0.761 ms
64 bytes from 10.0.0.2: icmp_seq=1 ttl=60 time=0.790 ms (DUP!)
64 bytes from 10.0.0.2: icmp_seq=3 ttl=60 time=12 ms
rtt min/avg/max/mdev = 0.432/0.542/0.761/0.154 ms"""
    assert parse_ping(text) == (0.761, 12.0)


def test_cpu_times_count_steal_and_not_guests_twice_nor_waiting() -> None:
    before = CpuTimes.parse("cpu  0 0 0 0 0 0 0 0 0 0\ncpu0 9 9 9 9\n")
    after = CpuTimes.parse("cpu  10 10 10 50 5 5 5 5 10 10\n")
    assert (after.busy - before.busy, after.total - before.total, after.stolen) == (45, 100, 5)


def test_tcp_figures_are_of_what_arrived_not_of_what_was_sent() -> None:
    received = {"bits_per_second": 2e9, "bytes": 500_000_000}
    end = {"sum_sent": {"bits_per_second": 3e9, "retransmits": 7}, "sum_received": received}
    assert parse_tcp({"end": end}, USAGE) == {
        "gbit_per_s": 2.0,
        "retransmits": 7,
        "tunnel_cpu_s_per_gb": 2.0,
        "system_cpu_s_per_gb": 6.0,
    }


def test_tcp_both_ways_adds_the_directions() -> None:
    end = {
        "sum_sent": {"retransmits": 7},
        "sum_received": {"bits_per_second": 2e9, "bytes": 750_000_000},
        "sum_sent_bidir_reverse": {"retransmits": 1},
        "sum_received_bidir_reverse": {"bits_per_second": 1e9, "bytes": 250_000_000},
    }
    figures = parse_tcp({"end": end}, USAGE)
    assert (figures["gbit_per_s"], figures["retransmits"], figures["tunnel_cpu_s_per_gb"]) == (3.0, 8, 1.0)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ({"end": {}, "error": "unable to connect"}, "iperf3 failed: unable to connect"),
        ({"end": {"sum_sent": {"bytes": 1}}}, "iperf3's result lacks sum_received; version 3.7"),
        (
            {"end": {"sum_sent": {"bytes": 1}, "sum_received": {"bytes": 0, "bits_per_second": 0}}},
            "iperf3 moved nothing",
        ),
    ],
)
def test_iperf3_output_that_is_no_result_is_refused_with_the_reason(output: dict[str, object], reason: str) -> None:
    with pytest.raises(BenchError, match=reason):
        parse_tcp(output, USAGE)


def test_flood_counts_as_lost_all_that_was_sent_and_did_not_arrive() -> None:
    sink = "ready\nreceived 251 reordered 3 first-to-last 500000000\n"
    figures = parse_flood("sent 1004\n", sink, 100, USAGE)
    assert figures["kpackets_per_s"] == pytest.approx(0.5)
    assert figures["gbit_per_s"] == pytest.approx(500 * 800 / 1e9)
    assert (figures["lost"], figures["reordered"]) == (0.75, 3)
    assert figures["tunnel_cpu_us_per_packet"] == pytest.approx(1e6 / 251)


def test_flood_of_which_nothing_arrives_is_an_error() -> None:
    with pytest.raises(BenchError, match="0 of 1004 datagrams of 64 bytes arrived"):
        parse_flood("sent 1004\n", "received 0 reordered 0 first-to-last 0\n", 64, USAGE)


def test_round_trips_become_percentiles_in_microseconds() -> None:
    text = "\n".join(str(i * 1000) for i in range(1000, 0, -1)) + "\nlost 2\n"
    assert parse_round_trips(text) == {
        "p50_us": 500.0,
        "p99_us": 990.0,
        "p99_9_us": 999.0,
        "round_trips": 1000,
        "lost_round_trips": 2,
    }
    with pytest.raises(BenchError, match="9 ping-pong datagrams were sent, and none came back"):
        parse_round_trips("lost 9\n")


# --- verdicts


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ([1.0, 1.1, 1.2], [1.3, 1.4, 1.5], Verdict.FASTER),
        ([1.3, 1.4, 1.5], [1.0, 1.1, 1.2], Verdict.SLOWER),
        ([1.0, 1.1, 1.2], [1.15, 1.4, 1.5], Verdict.SAME),
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], Verdict.SAME),
        ([1.0, 1.1], [9.0, 9.1, 9.2], Verdict.TOO_FEW),
        # One outlier among five is not enough to hide what the other pairs say.
        ([1.0, 1.0, 1.0, 1.0, 1.6], [1.5, 1.5, 1.5, 1.5, 1.7], Verdict.SAME),
        ([1.0, 1.0, 1.0, 1.0, 1.6], [1.5, 1.5, 1.7, 1.7, 1.7], Verdict.FASTER),
    ],
)
def test_compare_says_faster_only_when_nine_pairs_in_ten_do(
    old: list[float], new: list[float], verdict: Verdict
) -> None:
    assert judge(old, new, is_more_better=True) is verdict
    mirrored = {Verdict.FASTER: Verdict.SLOWER, Verdict.SLOWER: Verdict.FASTER}.get(verdict, verdict)
    assert judge(old, new, is_more_better=False) is mirrored


def test_compare_relative_to_a_path_sees_through_a_machine_that_became_slower() -> None:
    old, slower = three_rounds(), three_rounds()
    for run in slower["runs"]:
        run["figures"] = {name: value / 10 for name, value in run["figures"].items()}
    cell = Cell("A", "tcp_1", TUNNEL, "gbit_per_s")

    def verdict(new: dict[str, Any], base: str | None) -> Verdict:
        found = compare.changes(Runs(old["runs"]), Runs(new["runs"]), base)
        return next(change.verdict for change in found if change.cell == cell)

    assert verdict(slower, None) is Verdict.SLOWER
    assert verdict(slower, NAIVE) is Verdict.SAME
    assert verdict(three_rounds(10.0), NAIVE) is Verdict.FASTER


def test_compare_prints_both_spreads_the_verdict_and_what_else_differs(
    tmp_path: File, capsys: pytest.CaptureFixture[str]
) -> None:
    new = three_rounds(10.0)
    new["machine"]["kernel"] = "Linux 6.2"
    results.save(three_rounds(), tmp_path / "old.json")
    results.save(new, tmp_path / "new.json")
    compare.main([str(tmp_path / "old.json"), str(tmp_path / "new.json")])
    printed = capsys.readouterr().out
    assert "not the same: kernel: Linux 6.1 then, Linux 6.2 now\n" in printed
    row = next(line for line in printed.splitlines() if "Gbit/s" in line and " udptun " in line)
    assert " ".join(row.split()) == "A tcp_1 Gbit/s udptun 12.00 (4.00–20.00) 120.00 (40.00–200.00) +900.0% faster"
    assert "no difference" in next(line for line in printed.splitlines() if "Gbit/s" in line and VXLAN in line)


def test_goal_is_judged_by_the_median_ratio_and_its_direction() -> None:
    verdicts = {(v.goal.figure, v.goal.base, v.mode): v for v in judge_goals(Runs(three_rounds()["runs"]))}
    assert not verdicts["gbit_per_s", NAIVE, "A"].is_met
    assert verdicts["tunnel_cpu_s_per_gb", NAIVE, "A"].is_met
    assert verdicts["gbit_per_s", NAIVE, "A"].ratio == Spread(5.0, 4.0, 6.0)
    # Not measured with both: no verdict, rather than a wrong one.
    assert ("system_cpu_s_per_gb", VXLAN, "A") not in verdicts
    assert {mode for _, _, mode in verdicts} == {"A"}
    faster = {(v.goal.figure, v.goal.base): v.is_met for v in judge_goals(Runs(three_rounds(1.1)["runs"]))}
    assert faster["gbit_per_s", NAIVE]


# --- report and plots


def test_report_has_goals_figures_ratios_and_what_was_left_out() -> None:
    lines = report.markdown(three_rounds()).splitlines()
    assert lines[lines.index("## Goals") :][2:8] == [
        "In each cell the goal, then the ratio that was measured. Bold: missed.",
        "",
        "| vs naive loop | mode A |",
        "| --- | ---: |",
        "| TCP, 1 stream | ≥ 5.5: **5.00** (4.00–6.00) |",
        "| tunnel CPU/GB, TCP 1 | ≤ 0.15: 0.10 (0.10–0.10) |",
    ]
    assert "| udptun | 12.00 (4.00–20.00) |" in lines
    assert "| udptun | 1.00 (1.00–1.00) | - |" in lines
    assert "| kernel vxlan | 10.00 (10.00–10.00) |" in lines
    assert "| kernel vxlan | - | 0.50 (0.50–0.50) |" in lines
    assert "* flanneld left out: give its program with --flanneld" in lines
    tables = [line for line in lines if line.startswith("|")]
    for head, n_columns in (("| Gbit/s |", 2), ("| CPU and memory |", 3)):
        first = next(i for i, line in enumerate(tables) if line.startswith(head))
        assert {line.count("|") - 1 for line in tables[first : first + 5]} == {n_columns}


def test_report_compares_each_path_by_ipv6_with_itself_by_ipv4_within_each_round() -> None:
    """Before, whoever wanted to know had to divide the medians, which hides a machine that changes its speed."""
    speeds = ((TUNNEL, (1.0, 4.0), 0.95), (VTEP, (2.0, 8.0), 0.8), (VXLAN, (3.0, 3.0), 1.0))
    runs = [
        one(i, name, {"gbit_per_s": rates[i] * factor})
        for path, rates, times in speeds
        for i in (0, 1)
        for name, factor in ((path, 1.0), (by_ipv6(path), times))
    ]
    lines = report.markdown(document(*runs, one(0, NAIVE, {"gbit_per_s": 1.0}))).splitlines()
    first = lines.index("| IPv6 / IPv4: Gbit/s | TCP, 1 stream |")
    assert lines[first + 2 :] == [
        "| udptun | 0.95 (0.95–0.95) |",
        "| kernel vxlan | 1.00 (1.00–1.00) |",
        "| userspace VTEP | 0.80 (0.80–0.80) |",
    ]
    assert "| TCP, 1 stream, IPv6 | ≥ 0.9: 0.95 (0.95–0.95) |" in lines
    assert "| TCP, 1 stream, IPv6 | ≥ 0.9: **0.80** (0.80–0.80) |" in lines


def test_report_is_not_wider_than_120_columns_whatever_it_has_to_say() -> None:
    """Every table with every column, wide figures, a long command line and a long reason for a failed run."""
    figures = dict.fromkeys(FIGURES, 1234.5)
    paths = [*PATHS.values(), *LEASE_PATHS]
    runs = [
        one(i, path, figures, mode, workload) for i in (0, 1) for mode in MODES for workload in TITLES for path in paths
    ]
    runs.append({**one(2, NAIVE, {}), "error": "it broke, " * 30})
    wide = {**document(*runs), "command": ["python", "-m", "bench", *(f"--option-{i}" for i in range(40))]}
    lines = report.markdown(wide).splitlines()
    assert [line for line in lines if len(line) > 120] == []
    command = [line for line in lines if line.startswith("    ")]
    assert " ".join(line.strip(" \\") for line in command) == " ".join(wide["command"])
    assert all(line.endswith(" \\") for line in command[:-1])
    assert not command[-1].endswith("\\")


def test_report_names_runs_that_failed() -> None:
    failed = {**one(1, NAIVE, {}), "error": "it broke"}
    assert "* failed: round 1, mode A, tcp_1, naive loop: it broke" in report.markdown(document(failed)).splitlines()


def test_report_is_written_beside_the_result(tmp_path: File) -> None:
    results.save(three_rounds(), tmp_path / "run.json")
    written = report.write(tmp_path / "run.json")
    assert [file.name for file in written] == ["run.md", "run-tcp.svg", "run-cpu.svg"]
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "run.json", *written])


def test_report_and_compare_are_commands_that_say_what_is_wrong_in_one_line(
    tmp_path: File, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    results.save(three_rounds(), file)
    assert main(["report", str(file)]) == 0
    assert f"{tmp_path / 'run.md'}\n" in capsys.readouterr().out
    assert main(["compare", str(file), str(file)]) == 0
    assert "no difference" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "none.json")]) == 1
    assert capsys.readouterr().err == f"error: cannot read {tmp_path / 'none.json'}: No such file or directory\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not JSON"),
        ("[]", r"`schema` is none of \(2, 3\)"),
        ('{"schema": 1}', r"`schema` is none of \(2, 3\)"),
        ('{"schema": 4}', r"`schema` is none of \(2, 3\)"),
    ],
)
def test_file_that_is_no_result_is_refused(content: str, reason: str, tmp_path: File) -> None:
    file = tmp_path / "old.json"
    file.write_text(content)
    with pytest.raises(BenchError, match=reason):
        results.load(file)


def test_result_file_has_a_line_for_each_run_and_every_digit_of_its_figures(tmp_path: File) -> None:
    """Before, a run took some 130 lines, most of them what iperf3 had said."""
    figures = {"gbit_per_s": 7.117398913192701, "retransmits": 332, "tunnel_cpu_s_per_gb": 0.1 + 0.2}
    before = document(one(0, TUNNEL, figures), {**one(1, NAIVE, {}), "error": 'it said "no"\n'})
    results.save(before, tmp_path / "run.json")
    assert results.load(tmp_path / "run.json") == before
    lines = (tmp_path / "run.json").read_text().splitlines()
    assert len(lines) == len(before) + 2 + 2 + 1
    (run,) = (line for line in lines if "7.117398913192701" in line)
    assert json.loads(run.rstrip(",")) == before["runs"][0]
    results.save(document(), tmp_path / "none.json")
    assert results.load(tmp_path / "none.json") == document()


def test_report_of_a_result_of_schema_2_is_the_same(tmp_path: File) -> None:
    old = three_rounds()
    old["schema"] = 2
    for run in old["runs"]:
        run |= {"command": ["iperf3"], "raw": {"end": {}}, "error": None}
    old["runs"].append({**one(1, NAIVE, {}), "command": [], "raw": {}, "error": "it broke"})
    (tmp_path / "run.json").write_text(json.dumps(old, indent=1))
    new = three_rounds()
    new["runs"].append({**one(1, NAIVE, {}), "error": "it broke"})
    assert report.markdown(results.load(tmp_path / "run.json")) == report.markdown(new)


@pytest.mark.skipif(not RESULTS, reason="the results are in the repository alone")
def test_committed_results_are_compact_and_their_reports_are_what_report_writes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before, they took 3.8 MB and 91,000 lines."""
    assert sum(path.stat().st_size for path in RESULTS[0].parent.iterdir()) < 150_000 * len(RESULTS)
    for file in RESULTS:
        result = results.load(file)
        assert result["schema"] == results.SCHEMA
        assert file.read_text().count("\n") < len(result["runs"]) + 20
        beside = {".md": report.markdown(result), **plot.files(result)}
        for suffix, content in beside.items():
            assert file.with_name(file.stem + suffix).read_text() == content
        compare.main([str(file), str(file)])
        assert "no difference" in capsys.readouterr().out
    expected = {file.with_name(file.stem + end) for file in RESULTS for end in (".md", ".json")}
    assert {path for path in RESULTS[0].parent.iterdir() if path.suffix != ".svg"} == expected


def test_plot_is_well_formed_and_bars_are_as_long_as_their_figures() -> None:
    drawing = plot.draw(Runs(three_rounds()["runs"]), [("tcp_1", "gbit_per_s")])
    assert drawing is not None
    root = ET.fromstring(plot.svg(drawing))
    space = "{http://www.w3.org/2000/svg}"
    first = ["mode A", "large segments cross whole", "TCP, 1 stream: Gbit/s, more is better"]
    assert [text.text for text in root.iter(f"{space}text")][: len(first)] == first
    bars = [float(bar.get("width", 0)) for bar in root.iter(f"{space}rect") if bar.get("height") == "12"]
    # Medians 12, 10 and 2.
    assert sorted(width / max(bars) for width in bars) == pytest.approx([2 / 12, 10 / 12, 1], abs=0.01)
    for shape in drawing.shapes:
        assert 0 <= shape.x <= drawing.width
        assert 0 <= shape.y <= drawing.height
        if isinstance(shape, plot.Box):
            assert shape.x + shape.width <= drawing.width
            assert shape.width >= 0


def test_plot_has_room_for_the_longest_name_of_a_path() -> None:
    """The names by IPv6 are longer than those before, and would begin left of the drawing."""
    for workload, names in (("tcp_1", PATHS.values()), ("leases_tcp_1", LEASE_PATHS)):
        runs = [one(0, name, {"gbit_per_s": 1.0}, workload=workload) for name in names]
        drawing = plot.draw(Runs(runs), [(workload, "gbit_per_s")])
        assert drawing is not None
        labels = [shape for shape in drawing.shapes if isinstance(shape, plot.Text) and shape.anchor == "end"]
        assert [label.text for label in labels] == list(names)
        assert all(label.x >= 6.5 * len(label.text) for label in labels)


def test_plot_escapes_what_xml_would_misread() -> None:
    svg = plot.svg(plot.Drawing(10, 10, (plot.Text(0, 5, "a < b & c"),)))
    assert next(ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")).text == "a < b & c"


def test_plot_of_nothing_is_none() -> None:
    assert plot.draw(Runs([]), [("tcp_1", "gbit_per_s")]) is None


# --- helpers that run elsewhere


def test_bulk_leases_replaces_its_own_and_leaves_the_daemons_alone() -> None:
    database = sqlite3.connect(":memory:")
    database.execute("create table leases (key text primary key, value text, expires real)")
    database.execute("""insert into leases values ('10.0.1.0-24', '{"PublicIP": "192.168.77.11"}', 1)""")
    # One that is gone, and the last one that is there.
    told = {300: (None, "10.1.44.0-24"), 65_533: (None, "10.255.253.0-24"), 2: ("10.255.253.0-24", "10.0.2.0-24")}
    for n in (300, 65_533, 2, 0):
        said = bulk_leases.put(database, IPv4Network("10.0.0.0/8"), n)
        assert said == told.get(n, ("10.0.2.0-24", None))
        keys = [key for (key,) in database.execute("select key from leases order by rowid")]
        assert keys[0] == "10.0.1.0-24"
        assert len(keys) == n + 1
    assert database.execute("select value from leases").fetchall() == [('{"PublicIP": "192.168.77.11"}',)]


def test_bulk_leases_of_both_families_take_no_subnet_that_a_daemon_has() -> None:
    database = sqlite3.connect(":memory:")
    database.execute("create table leases (key text primary key, value text, expires real)")
    database.execute("insert into leases values ('10.0.1.0-24&fd00:244:0:2::-64', '{}', 1)")
    bulk_leases.put(database, IPv4Network("10.0.0.0/8"), 65_534, IPv6Network("fd00:244::/48"))
    keys = [key for (key,) in database.execute("select key from leases order by rowid")]
    assert keys[:4] == [
        *("10.0.1.0-24&fd00:244:0:2::-64", "10.0.0.0-24&fd00:244::-64", "10.0.2.0-24&fd00:244:0:1::-64"),
        "10.0.3.0-24&fd00:244:0:3::-64",
    ]
    for halves in zip(*(key.split("&") for key in keys), strict=True):
        assert len(set(halves)) == len(keys) == 65_535


def test_pytun_loop_takes_one_from_the_ttl_and_keeps_the_checksum_right() -> None:
    header = bytearray.fromhex("45000073000040004011b861c0a80001c0a800c7")
    assert step_ttl(header)
    assert header[8] == 63
    assert sum(int.from_bytes(header[i : i + 2]) for i in range(0, 20, 2)) % 0xFFFF == 0
    header[8] = 1
    assert not step_ttl(header)
    assert not step_ttl(bytearray(19))
