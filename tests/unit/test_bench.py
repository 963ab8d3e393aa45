"""The bench's arithmetic: what it makes of raw output."""

from __future__ import annotations

import pytest

from bench.measure import BenchError, CpuTimes, parse_ping, parse_tcp, parse_udp_flood
from bench.summary import Spread, ratio, spread, table


def test_ratio_is_taken_within_each_round() -> None:
    rounds = [{"a": 1.1, "b": 1.0}, {"a": 4.4, "b": 4.0}, {"a": 2.2, "b": 2.0}]
    found = ratio(rounds, "a", "b")
    assert [found.median, found.low, found.high] == pytest.approx([1.1] * 3)
    assert spread(rounds, "b") == Spread(2.0, 1.0, 4.0)


def test_table_aligns_the_first_column_left_and_figures_right() -> None:
    assert table(["", "MTU"], [["a", "1472"], ["long", "9"]]) == ["       MTU", "a     1472", "long     9"]


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
    assert (after.busy - before.busy, after.total - before.total) == (45, 100)


def test_tcp_figure_is_what_arrived_not_what_was_sent() -> None:
    end = {"sum_sent": {"bits_per_second": 3e9, "retransmits": 7}, "sum_received": {"bits_per_second": 2e9}}
    result = parse_tcp(["iperf3"], {"end": end}, 1.5)
    assert (result.gbit_per_s, result.retransmits, result.busy_cores) == (2.0, 7, 1.5)


def test_udp_losses_include_what_was_sent_after_the_last_arrival() -> None:
    received = {"bytes": 64 * 250, "bits_per_second": 64 * 8 * 250, "lost_packets": 600, "packets": 850}
    result = parse_udp_flood(["iperf3"], {"end": {"sum": {"packets": 1000}, "sum_received": received}}, 0.0)
    assert (result.packets_per_s, result.lost) == (250.0, 0.75)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ({"end": {}, "error": "unable to connect"}, "iperf3 failed: unable to connect"),
        ({"end": {"sum_sent": {}}}, "iperf3's result lacks sum_received and sum_sent; version 3.7"),
    ],
)
def test_iperf3_output_that_is_no_result_is_refused_with_the_reason(output: dict[str, object], reason: str) -> None:
    with pytest.raises(BenchError, match=reason):
        parse_tcp(["iperf3"], output, 0.0)
