"""Run one target on inputs that coverage leads to (atheris, which is libFuzzer), until some processor time is used up.

    python -m tests.fuzz.guided TARGET --cpu-seconds 600 [--keep] [--seed N]        SIGUSR1 ends it earlier

`python -m tests.fuzz` starts it.  It begins with the target's corpus and its seeds.  The first input that breaks a
promise ends the run and is printed; as an item of the target's FOUND it becomes a test.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from random import Random

import atheris

from tests.fuzz.corpus_cover import smallest_cover
from tests.fuzz.table import LONGEST_INPUT, TARGETS

LONGEST_S = 5.0
"""Processor time that one input may take.  Most take less than a millisecond."""
MEMORY_MB = 1500
FOUND = 77
"""Exit status when an input has broken a promise."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.guided", description=__doc__)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--cpu-seconds", type=float, default=60.0, metavar="S", help="default: %(default)g")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000 + 1, metavar="N")
    parser.add_argument("--keep", action="store_true", help="put what reaches new code into the corpus")
    given = parser.parse_args()
    target = TARGETS[given.target]
    with atheris.instrument_imports(include=list(target.instrumented)):
        module = target.load()

    until_s, n, is_over = time.process_time() + given.cpu_seconds, 0, False

    def one(data: bytes) -> None:
        nonlocal n, is_over
        n += 1
        began_s = time.process_time()
        try:
            module.check(data)
            took_s = time.process_time() - began_s
            assert took_s < LONGEST_S, f"it takes {took_s:.1f} s"
        except BaseException:
            traceback.print_exc()
            print(f"found by the seed {given.seed} after {n} inputs; for FOUND:")
            print(json.dumps(data.decode("latin-1")), flush=True)
            os._exit(FOUND)
        if began_s > until_s and not is_over:
            is_over = True
            # libFuzzer prints what it has done, and ends.
            os.kill(os.getpid(), signal.SIGUSR1)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        if random.random() < 0.3:
            return bytes(atheris.Mutate(data, max_size))
        return bytes(module.mutate(data, random)[:max_size])

    with tempfile.TemporaryDirectory(prefix="udptun-fuzz-") as directory:
        # libFuzzer ends its process without unwinding.
        pid = os.fork()
        if pid == 0:
            for i, data in enumerate((*target.corpus(), *module.SEEDS)):
                (Path(directory) / f"{i}").write_bytes(data)
            options = [
                f"-max_len={LONGEST_INPUT}", f"-rss_limit_mb={MEMORY_MB}", "-timeout=600", "-print_final_stats=1",
                f"-seed={given.seed}", "-handle_int=0", "-len_control=0", f"-artifact_prefix={directory}/crash-",
            ]  # fmt: skip
            atheris.Setup([sys.argv[0], *options, directory], one, custom_mutator=mutate, internal_libfuzzer=True)
            atheris.Fuzz()
            os._exit(1)

        def end_child(*_: object) -> None:
            # It may have got the signal, too, and have ended.
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)

        signal.signal(signal.SIGUSR1, end_child)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        said = "nothing found" if status == 0 else "FOUND SOMETHING"
        print(f"{target.name}: {used.ru_utime + used.ru_stime:.0f} CPU seconds, {said}", flush=True)
        for crash in Path(directory).glob("crash-*"):
            print(f"{crash.name}; for FOUND:\n{json.dumps(crash.read_bytes().decode('latin-1'))}")
            crash.unlink()
        if status == 0 and given.keep:
            found = [path.read_bytes() for path in Path(directory).iterdir()]
            target.keep(smallest_cover(module.check, [*target.corpus(), *found]))
            print(f"{len(target.corpus())} inputs kept")
        sys.exit(status)


if __name__ == "__main__":
    main()
