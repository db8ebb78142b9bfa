"""Let a Python program's clock be off by as many seconds as a file says: `benchmarks.fault_swarm` changes it meanwhile.

Python imports this module by its name at the start of each program that has this directory in PYTHONPATH. Like a real
clock that is set, it concerns the time of day only, of all processes that share the file; `time.monotonic`, sleeps and
timeouts go on. What is not Python (p2pd) and files' dates keep the right time.
"""

import mmap
import os
import time

if path := os.environ.get("LEANALBERT_CLOCK_ERROR"):
    with open(path, "rb") as file:
        _error = memoryview(mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)).cast("d")
    _true_time = time.time
    time.time = lambda: _true_time() + _error[0]
    time.time_ns = lambda: round(time.time() * 1e9)
