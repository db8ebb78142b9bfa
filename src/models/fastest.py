"""Which of several ways to compute the same is the fastest on this machine: measured once, then read from a file.

Processors differ in it by tens of per cent in both directions, and their flags do not tell. What is chosen changes
results within rounding only, so peers and local processes may choose differently.
"""

import contextlib
import hashlib
import json
import logging
import os
import platform
import tempfile
import time
from pathlib import Path

import torch
from torch.utils._python_dispatch import _disable_current_modes

logger = logging.getLogger(__name__)

# The last two: torch's own kernels; the products of oneDNN and our attention, in blocks of queries.
MEASURE, TORCH, ONEDNN = CHOICES = ("measure", "torch", "onednn")
VARIABLE = "LEANALBERT_CPU_KERNELS"  # for programs without a flag for it
ROUNDS = 3
MARGIN = 1.05  # so many times faster than the first one must be what is taken instead
_choice = None  # of `use_cpu_kernels`
_known: dict[str, str] | None = None  # what the file holds, and what has been measured since


def use_cpu_kernels(choice):
    """In this process from now on, see CHOICES; None: as the environment says, which is "measure" otherwise."""
    global _choice
    if choice not in (None, *CHOICES):
        raise ValueError(f"{choice!r} must be one of {', '.join(CHOICES)}")
    _choice = choice


def chosen_kernels():
    choice = _choice or os.environ.get(VARIABLE, MEASURE)
    if choice not in CHOICES:
        raise ValueError(f"{VARIABLE}={choice!r} must be one of {', '.join(CHOICES)}")
    return choice


def fastest(key, names, candidates):
    """Of `names` that of the fastest one for what `key` describes, from the file or measured: a fraction of a second.

    names: the preferred one first. candidates: makes {name: function without arguments}; it is called only to measure.
    """
    global _known
    _known = read() if _known is None else _known
    if _known.get(key) not in names:
        _known[key] = measure(candidates)  # which may ask for what it needs itself
        write(_known)
    return _known[key]


def measure(candidates):
    """Autocast, hooks and modes of the caller do not reach what is measured.

    Not in a thread of its own, which would have OpenMP threads of its own: while there are more of them than
    processors, they go to sleep between small products (GOMP throttles its spinning) and take twice as long.
    """
    with contextlib.ExitStack() as stack:
        for context in (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autograd.graph.saved_tensors_hooks(_same, _same),  # the innermost ones are those that count
            _disable_current_modes(),
        ):
            stack.enter_context(context)
        return pick(candidates(), time.thread_time if torch.get_num_threads() == 1 else time.perf_counter)


def _same(tensor):
    return tensor


def pick(functions, clock):
    """The name of the one with the shortest run, or of the first that is nearly as fast. All of them run by turns,
    after a first time that does not count."""
    shortest = dict.fromkeys(functions, float("inf"))
    for number in range(1 + ROUNDS):
        for name, function in functions.items():
            began = clock()
            function()
            if number:
                shortest[name] = min(shortest[name], clock() - began)
    limit = MARGIN * min(shortest.values())
    return next(name for name, seconds in shortest.items() if seconds <= limit)


def cache_file():
    """In the user's cache folder, named after processor and torch's version."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    what = f"{processor()} {torch.backends.cpu.get_cpu_capability()} torch {torch.__version__}, measured in way 2"
    return folder / "leanalbert" / f"fastest-{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"


def processor():
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def read():
    try:
        known = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, RuntimeError, ValueError):  # not there yet, no home, not JSON: it is measured again
        return {}
    return {key: name for key, name in known.items() if isinstance(name, str)} if isinstance(known, dict) else {}


def write(known):
    """Aside and renamed: other processes read the old file or the new one, whole. Two that measure at once may lose a
    line, which is then measured once more."""
    try:
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".new", delete=False, encoding="utf-8") as file:
            json.dump({**read(), **known}, file, indent=1)
        os.replace(file.name, path)
    except (OSError, RuntimeError) as error:
        logger.info("which CPU kernels are fastest cannot be kept and is measured at each start: %s", error)
