"""Give memory back that is used no more: a peer runs for weeks, and its processes allocate in many threads.

Of what grew in the demo, by `python -m benchmarks.soak`:

- glibc gives each thread an arena of its own, up to eight a core, and returns only the top of each. Buffers that one
  thread allocates and another frees, as in averaging, leave holes in all of them: two arenas, trimmed all the time.
- Rounds of averaging end in reference cycles that hold their tensors. Python looks for those in all objects only when
  a quarter has been added since the last time; a million come from imports, so that it took hours, and averagers grew
  by 50 to 260 MB an hour. Those of before a fork are now left out, which makes a look cheap, and comes every minute.
- oneDNN keeps code for each shape that it multiplies, see `src.models.linear_cross_entropy`: the main processes grew
  by 480 MB an hour.
"""

import ctypes
import gc
import os
import threading
import time

M_ARENA_MAX = -8  # <malloc.h>
MAX_ARENAS = 2
TRIM_SECONDS = 10.0


def limit_memory() -> None:
    """In this process and all that it forks from now on; to be called before libraries start threads."""
    os.register_at_fork(before=leave_out_of_collections)
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):  # not glibc
        return
    libc.mallopt(M_ARENA_MAX, MAX_ARENAS)

    def trim() -> None:
        while True:
            time.sleep(TRIM_SECONDS)
            libc.malloc_trim(0)  # without Python's global lock, so that no other thread waits

    def start() -> None:
        threading.Thread(target=trim, name="trim memory", daemon=True).start()

    start()
    os.register_at_fork(after_in_child=start)  # threads are not inherited


def leave_out_of_collections() -> None:
    """Take what exists for lasting: from now on only what comes later is searched for garbage."""
    gc.collect()
    gc.freeze()
    gc.collect()  # of nothing: it counts what is left, of which a quarter must be added before the next one
