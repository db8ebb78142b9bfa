"""One step of 8-bit LAMB: time, memory, distance to float32 statistics, and whether other threads can go on meanwhile.

    python -m benchmarks.lamb_step

Ours (numba kernel, update written into the gradient) against the original's arithmetic (whole tensors through
bitsandbytes, restated in reference/whole_tensor_lamb.py), bitsandbytes' own LAMB8bit (which has no trust ratio on CPU),
torch's fused AdamW in float32, and a plain copy into a buffer that exists already. About two minutes.
"""

import dataclasses
import gc
import logging
import os
import re
import sys
import threading
import time
from pathlib import Path

import torch

from benchmarks.measure import Row, interleave, options, ratio, report
from src.optim.lamb import CPULAMB8Bit

MILLION = 10**6
SETTINGS = {"betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.01, "max_grad_norm": 1.0}
NEVER = 10**12  # more values than any parameter has: all statistics stay 32-bit
CLAIM_TIME, CLAIM_MEMORY = "8-bit LAMB step: time", "8-bit LAMB step: memory"
CLAIM_DISTANCE, CLAIM_PAUSE = "8-bit LAMB step: nearness to fp32 LAMB", "8-bit LAMB step: other threads go on"


def main() -> int:
    flags = options(__doc__).parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    sizes = ((2, 2),) if flags.quick else ((33, 5), (100, 2))
    rows = []
    for millions, rounds in sizes:
        for threads in sorted({1, min(2, len(os.sched_getaffinity(0)))}):
            torch.set_num_threads(threads)
            rows += time_steps(millions * MILLION, threads=threads, rounds=rounds)
    torch.set_num_threads(1)
    rows += time_own_lamb_of_bitsandbytes()
    rows += measure_memory(sizes[0][0] * MILLION)
    rows += measure_pause(sizes[0][0] * MILLION)
    for spread in (1.0, 1.5, 2.0):
        rows += measure_distance(spread, num_values=2**16 if flags.quick else 2**18)
    notes = [
        "One thread: CPU seconds; two threads: wall time. Lower is better, except for cosines.",
        "bitsandbytes' own LAMB8bit is timed at one million parameters; on CPU it computes Adam.",
    ]
    report("lamb_step", "8-bit LAMB on the CPU", rows, notes, flags.results)
    return 0


def make_parameter(num_values: int) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(num_values, generator=generator) * 0.02)
    parameter.grad = torch.randn(num_values, generator=generator) * 1e-3
    return parameter


def make_sides(parameter: torch.nn.Parameter) -> dict[str, torch.optim.Optimizer]:
    """Optimizers over the same parameter and gradient; the learning rate is too small to change the numbers."""
    from benchmarks.reference.whole_tensor_lamb import WholeTensorLAMB8Bit

    return {
        "ours": CPULAMB8Bit([parameter], lr=1e-9, kernel="numba", reuse_grad_buffers=True, **SETTINGS),
        "original": WholeTensorLAMB8Bit([parameter], lr=1e-9, **SETTINGS),
        "AdamW fp32, fused": torch.optim.AdamW([parameter], lr=1e-9, fused=True),
    }


def time_steps(num_values: int, *, threads: int, rounds: int) -> list[Row]:
    parameter = make_parameter(num_values)
    buffer = torch.zeros(num_values)
    sides = {name: optimizer.step for name, optimizer in make_sides(parameter).items()}
    sides["copy, 8 bytes"] = lambda: buffer.copy_(parameter.detach())
    clock = time.process_time if threads == 1 else time.perf_counter
    timings = interleave(sides, rounds=rounds, clock=clock, seconds=12)
    case = f"{num_values // MILLION} M parameters, {threads} thread{'s' if threads > 1 else ''}"
    return [
        Row(
            CLAIM_TIME,
            case,
            name,
            timing.median / num_values * 1e9,
            "ns/parameter",
            ratio=None if name == "original" else ratio(timing, timings["original"]),
            target="<= 0.1667" if name == "ours" else None,
            peer="" if name == "original" else "original",
        )
        for name, timing in timings.items()
    ]


def time_own_lamb_of_bitsandbytes() -> list[Row]:
    from bitsandbytes.optim import LAMB8bit

    parameter = make_parameter(MILLION)
    sides = {
        "ours": CPULAMB8Bit([parameter], lr=1e-9, kernel="numba", reuse_grad_buffers=True, **SETTINGS).step,
        "bitsandbytes LAMB8bit": LAMB8bit([parameter], lr=1e-9, betas=SETTINGS["betas"]).step,
    }
    timings = interleave(sides, rounds=3)
    ours, peer = timings.values()
    case = "1 M parameters, 1 thread"
    return [
        Row(CLAIM_TIME, case, "ours", ours.median * 1e3, "ns/parameter", ratio(ours, peer), None, None, list(sides)[1]),
        Row(CLAIM_TIME, case, "bitsandbytes LAMB8bit", peer.median * 1e3, "ns/parameter"),
    ]


def measure_memory(num_values: int) -> list[Row]:
    """Bytes of state, and how far the memory of the process rises within a step."""
    parameter = make_parameter(num_values)
    sides, rows = make_sides(parameter), []
    case = f"{num_values // MILLION} M parameters"
    for name, target in (("ours", "<= 1"), ("original", None)):
        sides[name].step()
        growth = peak_growth(sides[name].step)
        peer = "original" if name == "ours" else ""
        rows.append(Row(CLAIM_MEMORY, f"{case}, temporaries", name, growth / MILLION, "MB", target=target, peer=peer))
    state = sum(value.nbytes for value in sides["ours"].state[parameter].values() if isinstance(value, torch.Tensor))
    ours = Row(CLAIM_MEMORY, f"{case}, state", "ours", state / num_values, "bytes/parameter", None, "<= 2.01")
    peer = Row(CLAIM_MEMORY, ours.case, "AdamW fp32", 8.0, ours.unit)
    return [*rows, dataclasses.replace(ours, peer=peer.side), peer]


def peak_growth(run) -> int:
    """Bytes by which resident memory exceeds, at its peak within ``run()``, what it was before."""
    gc.collect()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    run()
    return max(0, memory("VmHWM") - before)


def memory(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024


def measure_pause(num_values: int) -> list[Row]:
    """The longest time for which a main thread that does nothing but look at the clock is held up."""
    parameter = make_parameter(num_values)
    sides = {name: optimizer.step for name, optimizer in make_sides(parameter).items()}
    sides = {"ours": sides["ours"], "nothing runs": lambda: time.sleep(0.1), "original": sides["original"]}
    rows = []
    for name, step in sides.items():
        step()
        longest = sorted(longest_pause(step) for _ in range(5))[2]
        target = "<= 5" if name == "ours" else None
        rows.append(Row(CLAIM_PAUSE, "longest pause in a step", name, longest * 1e3, "ms", target=target))
    return rows


def longest_pause(step) -> float:
    thread = threading.Thread(target=step)
    longest, last = 0.0, time.perf_counter()
    thread.start()
    while thread.is_alive():
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    thread.join()
    return longest


def measure_distance(spread: float, *, num_values: int) -> list[Row]:
    """Directions of the last of 60 steps, for gradients whose scale differs lognormally between parameters."""
    moved = last_moves(spread, num_values=num_values)
    exact = moved.pop("fp32")
    rows = []
    cosines = {name: float(torch.cosine_similarity(move, exact, dim=0)) for name, move in moved.items()}
    for name, cosine in cosines.items():
        target = f">= {cosines['original']:.4f}" if name == "ours" else None
        case = f"spread {spread}, cosine after 60 steps"
        rows.append(Row(CLAIM_DISTANCE, case, name, cosine, "cosine", target=target))
    for name, move in moved.items():
        blow_up = float(move.abs().max() / exact.abs().max())
        case = f"spread {spread}, largest change over fp32's largest"
        rows.append(Row(CLAIM_DISTANCE, case, name, blow_up, "times", target="<= 4" if name == "ours" else None))
    return rows


def last_moves(spread: float, *, num_values: int, steps: int = 60, betas=(0.9, 0.999)) -> dict[str, torch.Tensor]:
    """The change of the parameters in the last step, by optimizer."""
    from benchmarks.reference.whole_tensor_lamb import WholeTensorLAMB8Bit

    settings = {**SETTINGS, "betas": betas, "lr": 0.01, "max_grad_norm": 1e9}
    make = {
        "fp32": lambda params: CPULAMB8Bit(params, min_8bit_size=NEVER, **settings),
        "ours": lambda params: CPULAMB8Bit(params, min_8bit_size=0, kernel="numba", **settings),
        "original": lambda params: WholeTensorLAMB8Bit(params, **settings),
    }
    parameters = {name: make_parameter(num_values) for name in make}
    optimizers = {name: make[name]([parameter]) for name, parameter in parameters.items()}
    generator = torch.Generator().manual_seed(1)
    scale = 1e-3 * torch.exp(spread * torch.randn(num_values, generator=generator))
    moves = {}
    for step in range(steps):
        gradient = scale * torch.randn(num_values, generator=generator)
        for name, parameter in parameters.items():
            before = parameter.detach().clone() if step == steps - 1 else None
            parameter.grad = gradient.clone()
            optimizers[name].step()
            if before is not None:
                moves[name] = parameter.detach() - before
    return moves


if __name__ == "__main__":
    sys.exit(main())
