"""Faults that come from inside a Python program. `benchmarks.fault_swarm` causes them.

Python imports this module by its name at the start of each program that has this directory in PYTHONPATH.

- The clock is off by as many seconds as the file LEANALBERT_CLOCK_ERROR says at the moment. Like a real clock that is
  set, it concerns the time of day only, of all processes that share the file; `time.monotonic`, sleeps and timeouts go
  on. What is not Python (p2pd) and files' dates keep the right time.
- SIGUSR1 lets a process hang: its main thread sleeps for good, as in a deadlock.
"""

import mmap
import os
import signal
import time

if path := os.environ.get("LEANALBERT_CLOCK_ERROR"):
    with open(path, "rb") as file:
        _error = memoryview(mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)).cast("d")
    _true_time = time.time
    time.time = lambda: _true_time() + _error[0]
    time.time_ns = lambda: round(time.time() * 1e9)

signal.signal(signal.SIGUSR1, lambda number, frame: time.sleep(1e6))
