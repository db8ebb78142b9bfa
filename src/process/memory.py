"""Give memory back that is used no more, and measure it: a peer runs for weeks, and its processes allocate in threads.

What grew in two demo trainers and an auxiliary peer (`python -m benchmarks.soak`), and what was done:

- Averagers, by 50 to 260 MB an hour. Rounds end in reference cycles that hold their tensors, which Python looks for in
  all objects only when a quarter has been added since the last time. A million objects come from imports, so that took
  hours. They are left out of it from the first fork on, and each round is followed by a look, see `rounds`.
- Main processes of trainers, by 480 MB an hour, slowly less. oneDNN keeps code for each shape that it multiplies, up to
  0.4 MB for each, and the last rows of a batch's masked tokens had another number each time: `linear_cross_entropy`.
- That of an auxiliary peer, by 14 to 16 MB an hour: a report read the whole file of metrics at once, see `history`.
- All: glibc gives each thread an arena of its own, up to eight a core, and returns only the top of each. Buffers that
  one thread allocates and another frees, as in averaging, leave holes in all of them: two arenas, trimmed all the time.
"""

import ctypes
import gc
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

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


def memory_of(processes: Mapping[str, int]) -> tuple[str, dict[str, float]]:
    """What is measured, and MB of each process by the same names: PSS, in which memory that several processes share
    counts in parts for each; or, where the kernel does not tell that, RSS, which counts it for each in full.

    ``processes``: their ids. One that has ended is left out.
    """
    for measure, file, field in (("PSS", "smaps_rollup", "Pss:"), ("RSS", "status", "VmRSS:")):
        try:
            return measure, {name: size for name, pid in processes.items() if (size := _read(pid, file, field))}
        except OSError:
            continue
    return "", {}


def _read(pid: int, file: str, field: str) -> float | None:
    """None if there is no such process. Raises OSError if there is, but not this file of it."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text(encoding="utf-8").splitlines()
    except ProcessLookupError:  # it is dead, though its parent may not have taken note of that
        return None
    except FileNotFoundError:
        if Path(f"/proc/{pid}/stat").exists():
            raise
        return None
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field)), None)


def leave_to_owner(tensors: Callable[[], Iterable]) -> None:
    """Processes that are forked from now on do without the values of these tensors, and read zeros there.

    They would keep each page as it was when its owner writes to it: a whole copy of what this process trains.
    ``tensors()`` is called after each fork, in the new process; tensors on other devices and shared ones are left.
    """
    libc = ctypes.CDLL(None)
    madvise = libc.madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def forget() -> None:
        for tensor in tensors():
            if tensor.device.type != "cpu" or tensor.is_shared():
                continue
            begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            size = (tensor.data_ptr() + tensor.nbytes - begin) // mmap.PAGESIZE * mmap.PAGESIZE
            if size > 0:  # other data may lie in the first and the last page
                madvise(begin, size, mmap.MADV_DONTNEED)

    os.register_at_fork(after_in_child=forget)


def available_memory() -> float:
    """Bytes that this machine, or the container this program runs in, can still give."""
    available = next(int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines()
                     if line.startswith("MemAvailable"))  # fmt: skip
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available
