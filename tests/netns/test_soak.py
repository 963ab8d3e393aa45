"""A few steps of the soak: it passes where all is well, and says what is wrong, where, and how to repeat it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.netns

ROOT = Path(__file__).parents[2]
NOTHING_IS_LEFT = "nothing is left: no process, network namespace, link, mount or file of the lab"
LITTLE_LOAD = ("--packets", "100", "--mbit", "2")


def soak(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )


SOAK = "import sys; from bench.soak.run import main; sys.exit(main(sys.argv[1:]))"


def test_a_short_soak_passes_and_leaves_nothing(
    tmp_path: Path, processes_with: Callable[[str, str], dict[int, str]]
) -> None:
    mark = str(time.time_ns())
    faults = "daemon killed,store away,device deleted"
    file = tmp_path / "soak.json"
    done = soak(
        SOAK,
        "--seed",
        "4",
        "--faults",
        faults,
        "--steps",
        "3",
        "--json",
        str(file),
        *LITTLE_LOAD,
        UDPTUN_TEST_SOAK=mark,
    )
    print(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].endswith(NOTHING_IS_LEFT)
    report = file.with_suffix(".txt").read_text()
    assert "; 0 things were wrong\n" in report
    for name in faults.split(","):
        (row,) = [line for line in report.splitlines() if line.startswith(f"{name} ")]
        assert row.split()[-1] == "0"
    assert not processes_with("UDPTUN_TEST_SOAK", mark)


@pytest.mark.full
def test_a_loss_that_is_not_allowed_is_named_with_the_command_that_repeats_it(tmp_path: Path) -> None:
    """All processes are killed, and the table is made to say that this costs nothing."""
    script = (
        "from bench.soak import faults\n"
        "faults.FAULTS['all killed'] = faults.Fault('all killed', faults.all_killed, ends_processes=True,"
        " counters_begin_anew=True)\n" + SOAK
    )
    done = soak(script, "--seed", "4", "--faults", "all killed", "--steps", "1", *LITTLE_LOAD)
    print(done.stdout)
    assert done.returncode == 1
    assert "WRONG at step 1, all killed on h" in done.stdout
    assert " packets, sent " in done.stdout
    assert "to repeat it: python -m bench soak --seed 4 " in done.stdout
    assert "--faults 'all killed' --first 1 --steps 1\n" in done.stdout
    assert "error: seed 4: " in done.stderr


def test_a_fault_that_is_none_is_refused_with_the_names_of_all() -> None:
    done = soak(SOAK, "--faults", "earthquake")
    assert done.returncode == 2
    assert "'earthquake' is no fault; they are daemon killed, " in done.stderr
