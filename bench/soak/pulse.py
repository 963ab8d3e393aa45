"""How long a process of the datapath's priority waits for a processor: `chrt --rr 1 python -I -S pulse.py`.

It wakes every 5 ms.  Each time that it is late by LATE_NS or more it prints when it should have woken, and when it has
(CLOCK_MONOTONIC, nanoseconds).  What is lost meanwhile the machine has lost, for want of a processor.
"""

import time

PERIOD_NS = 5_000_000
LATE_NS = 50_000_000

if __name__ == "__main__":
    while True:
        due_ns = time.monotonic_ns() + PERIOD_NS
        time.sleep(PERIOD_NS / 1e9)
        now_ns = time.monotonic_ns()
        if now_ns - due_ns >= LATE_NS:
            print(due_ns, now_ns, flush=True)
