"""What a small model's trainer gained since another revision: samples per CPU second of both, by turns.

    python -m benchmarks.revisions --against af1e787 [--precision bf16]

The other revision is checked out beside this one and runs in a process of its own, with its own
`benchmarks.whole_trainer` (text in, updated parameters out, one thread), the same text and the packages of this
environment; while one side computes, the other waits. The first round is not counted. Needs git and the history.
"""

import contextlib
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.measure import Row, Timing, options, ratio, report

REPOSITORY = Path(__file__).resolve().parent.parent
SIZES = {
    "vocab_size": 8000,
    "embedding_size": 128,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "max_position_embeddings": 128,
}
LENGTH, MICRO_BATCH, MICRO_STEPS = 128, 16, 2
BEFORE, NOW = "before", "now"


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--against", default="af1e787", metavar="REVISION", help="default: %(default)s")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: under autocast")
    parser.add_argument("--side", action="store_true", help="be one of the two processes (for this script itself)")
    flags = parser.parse_args()
    if flags.side:
        return serve_steps(flags.precision)
    rounds, steps = (2, 2) if flags.quick else (9, 12)
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(worktree(flags.against))
        sides = {name: stack.enter_context(side(root, flags.precision))
                 for name, root in ((BEFORE, other), (NOW, REPOSITORY))}  # fmt: skip
        samples: dict[str, list[float]] = {name: [] for name in sides}
        for number, (name, run) in itertools.product(range(rounds + 1), sides.items()):
            seconds = run(steps)
            if number > 0:
                samples[name].append(seconds / (steps * MICRO_BATCH * MICRO_STEPS))
    timings = {name: Timing(tuple(values)) for name, values in samples.items()}
    gain = ratio(timings[BEFORE], timings[NOW])
    claim, unit = "small model's trainer: samples per CPU second", "samples/s"
    case = f"hidden 256, 4 layers, {LENGTH} tokens, {flags.precision}, 1 thread"
    rows = [
        Row(claim, case, NOW, 1 / timings[NOW].median, unit, gain, ">= 1.3", None, BEFORE),
        Row(claim, case, BEFORE, 1 / timings[BEFORE].median, unit),
    ]
    notes = [f"Before: revision {flags.against}. {MICRO_BATCH * MICRO_STEPS} sequences a step."]
    name = "revisions" if flags.precision == "fp32" else f"revisions_{flags.precision}"
    report(name, "A small model's trainer since another revision", rows, notes, flags.results)
    return 0


@contextlib.contextmanager
def worktree(revision: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "revision"
        git = ("git", "-C", str(REPOSITORY), "worktree")
        subprocess.run([*git, "add", "--quiet", "--detach", str(root), revision], check=True)
        try:
            yield root
        finally:
            subprocess.run([*git, "remove", "--force", str(root)], check=True)


@contextlib.contextmanager
def side(root: Path, precision: str) -> Iterator[Callable[[int], float]]:
    """A process that runs the trainer of the revision in `root`: a function from steps to CPU seconds."""
    # this file whatever the revision; everything that it imports of the project comes from `root`
    options = ["--side", "--precision", precision]
    program = f"import runpy, sys; sys.argv[1:] = {options}; runpy.run_path({__file__!r}, run_name='__main__')"
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def run(steps: int) -> float:
        print(steps, file=process.stdin, flush=True)
        while line := process.stdout.readline():
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise SystemExit(f"the trainer of {root} ended: see above")

    try:
        yield run
    finally:
        process.stdin.close()
        process.wait(60)


def serve_steps(precision: str) -> int:
    """For each line of standard input, a number of steps: make them, and print the CPU seconds that they took."""
    import torch

    from benchmarks import whole_trainer
    from src.models import load_tokenizer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = whole_trainer.trainer_arguments(folder, "cpu") | {
            "per_device_train_batch_size": MICRO_BATCH,
            "gradient_accumulation_steps": MICRO_STEPS,
            "bf16": precision == "bf16",
        }
        files = sorted(map(str, (REPOSITORY / "demo" / "corpus").glob("*.txt")))
        tokenizer = load_tokenizer(str(whole_trainer.DEMO / "tokenizer"))
        step, _ = whole_trainer.ours(SIZES, tokenizer, files, LENGTH, arguments)
        for line in sys.stdin:
            started = time.process_time()
            for _ in range(int(line)):
                step()
            print("seconds", time.process_time() - started, flush=True)
        step.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
