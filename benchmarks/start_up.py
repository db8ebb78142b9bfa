"""How long one waits: for `python run_trainer.py --help`, and for the first global step of the demo.

    python -m benchmarks.start_up

The first is compared with the bare import of transformers' TrainingArguments, in CPU seconds of programs started by
turns; the second is wall time from the command to the first finished epoch. Less than a minute.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Row, interleave, options, ratio, report
from src.metrics.journal import read_journal
from src.process.local_swarm import LocalSwarm

REPOSITORY = Path(__file__).resolve().parent.parent
HELP, BARE = "python run_trainer.py --help", "import TrainingArguments"
FIRST_STEP_LIMIT = 75.0  # seconds after which we stop waiting, and say so


def main() -> int:
    flags = options(__doc__).parse_args()
    rows = measure_help(rounds=1 if flags.quick else 3)
    seconds = first_step_seconds()
    rows.append(Row("start-up", "to the first global step of the demo", "ours", seconds, "s", target="<= 30"))
    notes = ["--help: CPU seconds of the program; first step: wall time."]
    if seconds >= FIRST_STEP_LIMIT:
        notes.append(f"After {FIRST_STEP_LIMIT:.0f} s there was no global step yet, and the trainer was ended.")
    report("start_up", "Start-up", rows, notes, flags.results)
    return 0


def measure_help(*, rounds: int) -> list[Row]:
    sides = {
        HELP: lambda: run([sys.executable, "run_trainer.py", "--help"]),
        BARE: lambda: run([sys.executable, "-c", "from transformers import TrainingArguments"]),
    }
    timings = interleave(sides, rounds=rounds, clock=children_seconds, seconds=30)
    case = "--help"
    return [
        Row(
            "start-up", case, HELP, timings[HELP].median, "s", ratio(timings[HELP], timings[BARE]), "<= 1.2", peer=BARE
        ),
        Row("start-up", case, BARE, timings[BARE].median, "s"),
    ]


def run(command: list[str]) -> None:
    subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, check=True, timeout=120)


def children_seconds() -> float:
    """CPU seconds of all programs that this one has started and that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def first_step_seconds() -> float:
    """From the start of a lone trainer on the demo until its first epoch is in its metrics file, or the limit."""
    with tempfile.TemporaryDirectory() as folder, LocalSwarm(echo=False) as swarm:
        started = time.monotonic()
        arguments = ["@demo/trainer.args", "--output_dir", folder, "--total_steps", "1", "--warmup_steps", "0"]
        trainer = swarm.start("trainer", "run_trainer.py", arguments)
        metrics = Path(folder) / "demo" / "trainer" / "metrics.jsonl"
        while not (metrics.exists() and any(record["event"] == "epoch" for record in read_journal(metrics))):
            if trainer.process.poll() is not None:
                raise RuntimeError(f"no epoch was finished:\n{trainer.output()}")
            if time.monotonic() - started > FIRST_STEP_LIMIT:
                break
            time.sleep(0.05)
        return time.monotonic() - started


if __name__ == "__main__":
    sys.exit(main())
