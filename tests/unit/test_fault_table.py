"""What an operator reads of the faults that are no rows of tests/netns/test_problem_lines.py, and how each one ends."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import udptun

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Fault:
    """`said` is the text of `udptun status`, of the log or of a command, as the source has it; … stands for values.

    `tests` are files below tests/ with the name of a test.
    """

    name: str
    said: str
    recovers: str
    tests: tuple[tuple[str, str], ...]


FAULTS = [
    # Firewall tools.
    Fault(
        "a firewall tool hangs at the start, as while another program holds the lock of iptables",
        "firewall rules: …",
        "tried again every --iptables-resync seconds until the rules stand",
        (("netns/test_firewall_tools.py", "test_what_fails_once_at_the_start_is_named_and_tried_again"),),
    ),
    Fault(
        "rules of another form or iptables cannot be read in time, or not be removed",
        "leftover firewall rules may stay: …",
        "tried again every --iptables-resync seconds until they are gone",
        (("netns/test_firewall_tools.py", "test_what_fails_once_at_the_start_is_named_and_tried_again"),),
    ),
    Fault(
        "one table of the packet filters cannot be read",
        "firewall rules: …",
        "the others are repaired all the same, and this one when it can be read",
        (
            (
                "netns/test_firewall_tools.py",
                "test_a_table_that_cannot_be_read_is_named_and_keeps_no_other_from_its_repair",
            ),
            ("netns/test_firewall_tools.py", "test_masquerading_is_set_up_beside_a_filter_table_that_cannot_be_read"),
        ),
    ),
    Fault(
        "`udptun cleanup` cannot read a table or remove rules",
        "cannot remove firewall rules: …",
        "all else is removed; run it again",
        (("netns/test_firewall_tools.py", "test_cleanup_removes_what_it_can_and_names_what_it_cannot"),),
    ),
    # The kernel's state.
    Fault(
        "a move to a new underlay address fails",
        "the underlay has changed and cannot be followed, going on as before error=…",
        "tried again after 1 s, and each time later, up to 30 s",
        (
            ("unit/test_underlay_watch.py", "test_a_move_that_failed_is_tried_again_by_a_timer"),
            ("unit/test_underlay_watch.py", "test_a_move_that_raises_what_nobody_expects_is_a_problem_and_tried_again"),
        ),
    ),
    Fault(
        "a setting below /proc/sys cannot be set, and packets flow without it",
        "sysctl … cannot be set to … (…), so …; ",
        "tried again at each look",
        (
            (
                "netns/test_reconcile_kernel.py",
                "test_a_setting_that_is_refused_does_not_keep_the_rest_from_being_set",
            ),
        ),
    ),
    Fault(
        "a DHCP client takes our device for one of its own",
        "another program, a DHCP client perhaps, puts … on … again and again; ",
        "what it sets is removed, after pauses up to 60 s while it goes on",
        (
            ("unit/test_contest.py", "test_what_comes_back_at_once_goes_ever_more_slowly"),
            ("unit/test_contest.py", "test_a_quarrel_is_over_when_nothing_has_come_back_for_two_pauses"),
        ),
    ),
    Fault(
        "another program changes back what we set",
        "another program undoes …; ",
        "looked at again soon, and then every 30 s",
        (("netns/test_reconcile_kernel.py", "test_a_program_that_undoes_our_changes_is_named_with_what_it_undoes"),),
    ),
    # Leases.
    Fault(
        "a host has a lease and a reservation for another subnet",
        "… is reserved for this host and is not taken: …",
        "taken at the first start after `udptun cleanup`; `udptun lease reserve` says so; nothing else deletes it",
        (
            (
                "netns/test_daemon.py",
                "test_a_reservation_for_a_host_with_another_lease_outlives_its_restart_and_is_taken_after_cleanup",
            ),
            ("stores/test_lease_command.py", "test_reserve_says_when_it_takes_effect"),
            ("stores/test_contract.py", "test_no_claim_deletes_a_reservation"),
        ),
    ),
    Fault(
        "a lease or an item of the store that cannot be used",
        "lease no longer skipped …",
        "its line is gone with its cause, in `udptun status` too",
        (
            (
                "unit/test_membership_decisions.py",
                "test_skipped_lines_that_no_longer_hold_are_gone_from_status_and_said_to_be",
            ),
            ("stores/test_etcd.py", "test_lines_about_junk_go_one_by_one_and_a_batch_tells_its_end_alone"),
        ),
    ),
    Fault(
        "more leases than the peer table holds",
        "the peer table holds … peers at most, so … more are not reached, as …; ",
        "they are reached as others go",
        (
            ("datapath/test_table.py", "test_peers_for_which_the_table_has_no_room_are_named_and_added_when_others_go"),
            ("datapath/test_table.py", "test_table_refuses_more_peers_than_it_holds_and_keeps_the_others"),
        ),
    ),
    Fault(
        "a peer that cannot be added",
        "peer … at … is not …: …; it is tried again, the log has more",
        "tried again with growing pauses, while the others are reached",
        (
            (
                "unit/test_membership_tasks.py",
                "test_a_peer_that_cannot_be_added_is_named_and_tried_again_and_the_others_are_reached",
            ),
        ),
    ),
    Fault(
        "a race for a subnet is lost ten times",
        "cannot claim a subnet in etcd: other nodes were faster … times; trying again may help",
        "waited out like a store that is away",
        (("stores/test_etcd.py", "test_ten_lost_races_are_one_clear_error_and_nothing_is_left_of_them"),),
    ),
    Fault(
        "the store of 10,000 hosts comes back",
        "lease store answers again store=… after_s=…",
        "each host waits by chance, the longer the more hosts there are",
        (
            (
                "unit/test_membership_tasks.py",
                "test_ten_thousand_hosts_come_back_spread_over_seconds_and_one_alone_within_one",
            ),
        ),
    ),
    Fault(
        "leases with texts of any length",
        "",
        "their texts are remembered within a bound of bytes",
        (
            ("unit/test_text_cache.py", "test_texts_are_remembered_within_a_bound_of_bytes_whatever_their_length"),
            ("unit/test_text_cache.py", "test_leases_of_ten_thousand_hosts_are_remembered_and_a_huge_one_is_not"),
        ),
    ),
    # The daemon.
    Fault(
        "a mistake of ours in one task",
        "…: …; it is tried again, the log has more",
        "that task runs again after a pause, the daemon lives",
        (
            (
                "unit/test_supervisor.py",
                "test_a_task_that_fails_is_run_again_with_growing_pauses_and_one_traceback",
            ),
            (
                "unit/test_membership_tasks.py",
                "test_an_unexpected_error_of_the_store_costs_one_task_a_pause_and_not_the_daemon",
            ),
            ("netns/test_reconcile_kernel.py", "test_a_mistake_in_one_look_is_a_problem_and_the_next_look_repairs"),
        ),
    ),
    Fault(
        "clients that connect to the health port or the status socket and say nothing",
        "too many http clients, turning out those that are idle the longest n_clients=…",
        "the client that is idle the longest makes room for the next one",
        (
            ("netns/test_daemon.py", "test_idle_clients_never_take_health_and_status_away"),
            ("unit/test_http.py", "test_a_flood_of_new_idle_clients_never_takes_healthz_away"),
        ),
    ),
    Fault(
        "no descriptor for one more client",
        "cannot let an http client in error=…",
        "the next client is served as soon as there is one",
        (("unit/test_http.py", "test_a_client_that_cannot_be_let_in_is_said_once_and_the_next_one_is_served"),),
    ),
    Fault(
        "a run directory that others can write",
        "--run-dir: … is not used: …",
        "the start ends with status 2; the line says what to do",
        (("unit/test_run_dir.py", "test_a_run_directory_that_others_can_write_is_used_by_nobody"),),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "_"))
def test_every_fault_has_its_tests_and_says_what_the_table_says(fault: Fault, texts: set[str]) -> None:
    for file, name in fault.tests:
        module = ast.parse((ROOT / "tests" / file).read_text())
        functions = [node.name for node in module.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        assert name in functions, f"{file} has no such test"
    assert any(text.startswith(fault.said) for text in texts), "no such text in udptun/"


@pytest.fixture(scope="module")
def texts() -> set[str]:
    """Every text in the package, with … for the values in it."""
    sources = Path(udptun.__file__).parent.rglob("*.py")
    return {text for source in sources for text in texts_of(ast.parse(source.read_text()))}


def texts_of(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(it.value) if isinstance(it, ast.Constant) else "…" for it in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"%(?:\.\d)?[a-z]", "…", node.value)
