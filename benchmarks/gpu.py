"""Every figure that needs a GPU, by one command, for whoever has one for ten minutes.

    make gpu                                    # python -m benchmarks.gpu --minutes 9 --results benchmarks/gpu.json

Each part runs in a process of its own, within its share of the time that is left, and is in the file as soon as it has
ended. Nothing is installed: a part for which a package is missing, or is there in another version than the requirements
say, is skipped with the reason. Ends with code 0 if all parts that are for this machine ran, with 1 if some did not,
and with 2 without a GPU.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from src.files import write_atomically
from src.process.supervisor import adopt_orphans, kill_descendants

REPOSITORY = Path(__file__).resolve().parent.parent
GRACE_SECONDS = 5.0  # for a part that is told to end
LEAST_SECONDS = 10.0  # with less, a part is not begun
MODEL = ("torch", "transformers")
DATA = (*MODEL, "accelerate", "tokenizers", "numpy", "numba", "sentencex")
PROBE_SECONDS = 120.0
# In a process of its own: a program that has looked at a GPU keeps some of its memory.
PROBE = """import json, torch
from benchmarks.measure import machine
print(json.dumps({**machine(), "cuda": torch.version.cuda, "devices": torch.cuda.device_count()}))"""


@dataclass(frozen=True)
class Part:
    """``command``: words after the interpreter, with {device}, {folder} and {seconds}; ``share`` of the time, beside
    the others'; ``figures``: it writes tables as `measure.report` does to {folder}, and knows --quick."""

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = MODEL
    share: float = 1.0
    num_devices: int = 1
    figures: bool = True


def training_step(name: str, *flags: str, share: float) -> Part:
    command = ("-m", "benchmarks.training_step", *flags, "--seconds", "{seconds}")
    return Part(f"training step, {name}", command, share=share)


def gpu_tests(device: str) -> Part:
    """Only files that hold such tests are read: others need packages that these do not."""
    files = sorted(path for path in REPOSITORY.glob("tests/**/test_*.py") if "pytest.mark.gpu" in path.read_text())
    names = [path.relative_to(REPOSITORY).as_posix() for path in files]
    command = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *names]
    if device == "cpu":
        command.append("--collect-only")
    return Part("tests for a GPU", tuple(command), (*MODEL, "pytest"), figures=False)


# Twelve local steps of both ranks together: some epochs, nobody to average with.
TWO_PROCESSES = (
    "-m torch.distributed.run --standalone --nproc_per_node=2 run_trainer.py @demo/trainer.args --run_id gpu "
    "--output_dir {folder} --target_batch_size 64 --max_steps 12"
)


def all_parts(device: str) -> list[Part]:
    """What is wanted most comes first, what may hang or take long last."""
    return [
        training_step("bf16", "--precision", "bf16", share=3),
        training_step("fp16", "--precision", "fp16", share=3),
        Part("encoder", ("-m", "benchmarks.encoder", "--no-compile"), share=3),
        Part("masked-LM head", ("-m", "benchmarks.mlm_head"), share=1.5),
        Part("whole trainer", ("-m", "benchmarks.whole_trainer"), (*DATA, "bitsandbytes", "razdel"), share=3),
        gpu_tests(device),
        Part("two processes", tuple(TWO_PROCESSES.split()), (*DATA, "hivemind", "bitsandbytes"), 2, 2, figures=False),
        training_step("bf16, torch.compile", "--precision", "bf16", "--compile", share=4),
        training_step("fp16, torch.compile", "--precision", "fp16", "--compile", share=4),
    ]


@dataclass
class Outcome:
    """What came of a part: ``state`` is "ran", "failed" or "skipped", the latter two with the ``reason``.

    A part for several devices is "not for this machine" where there is one.
    """

    part: str
    state: str
    reason: str = ""
    seconds: float = 0.0
    rows: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    output: list[str] = field(default_factory=list)  # the last lines of a part that failed


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all parts together")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "gpu.json", help="file of figures")
    parser.add_argument("--only", metavar="PART", help="one part; the file then holds no others")
    parser.add_argument("--any_version", action="store_true", help="run with other versions than requirements.txt says")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the command out")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: shows that it runs")
    options = parser.parse_args(argv)
    if not options.minutes > 0:
        parser.error(f"--minutes {options.minutes}: must be above zero")
    names = [part.name for part in all_parts(options.device)]
    if options.only not in (None, *names):
        parser.error(f"--only {options.only!r}: there is no such part, only {', '.join(map(repr, names))}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    machine, problem = look_at_machine(options.device)
    if problem:
        print(f"benchmarks.gpu: {problem}; nothing was run", file=sys.stderr)
        return 2
    adopt_orphans()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    give_up_at = time.monotonic() + 60 * options.minutes
    parts = [part for part in all_parts(options.device) if options.only in (None, part.name)]
    outcomes: list[Outcome] = []
    for number, part in enumerate(parts):
        left = give_up_at - time.monotonic() - GRACE_SECONDS
        seconds = left * part.share / sum(other.share for other in parts[number:])
        outcomes.append(try_part(part, options, seconds=seconds, num_devices=machine["devices"]))
        results = {
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "machine": machine,
            "is_complete": len(outcomes) == len(parts),
            "parts": [asdict(outcome) for outcome in outcomes],
        }
        write_atomically(options.results, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print(table(outcomes) + f"\nwritten to {options.results}")
    return 1 if any(outcome.state in ("failed", "skipped") for outcome in outcomes) else 0


def look_at_machine(device: str) -> tuple[dict, str]:
    """What figures depend on beside the code, and why nothing can be measured here."""
    try:
        done = subprocess.run([sys.executable, "-c", PROBE], cwd=REPOSITORY, capture_output=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return {}, f"torch did not find out in {PROBE_SECONDS:.0f} s which devices there are"
    if done.returncode:
        return {}, f"torch cannot be used: {last_line(done.stderr)}"
    machine = json.loads(last_line(done.stdout))
    if device == "cpu":
        return {**machine, "devices": 2}, ""  # as many processes as one likes
    build = f"built for CUDA {machine['cuda']}" if machine["cuda"] else "built without CUDA"
    return machine, "" if machine["gpu"] else f"no GPU: torch {machine['torch']}, {build}, finds no CUDA device"


def last_line(output: bytes) -> str:
    return (output.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1].strip()


def try_part(part: Part, options: argparse.Namespace, *, seconds: float, num_devices: int) -> Outcome:
    """Run a part if it can be run here; says so before and after."""
    outcome = Outcome(part.name, "skipped")
    if num_devices < part.num_devices:
        outcome.state, outcome.reason = (
            "not for this machine",
            f"needs {part.num_devices} devices, there are {num_devices}",
        )
    elif unmet := unmet_needs(part.needs, any_version=options.any_version):
        outcome.reason = "; ".join(unmet)
    elif seconds < LEAST_SECONDS:
        outcome.reason = "the time for all parts was up"
    else:
        print(f"{part.name}: at most {seconds:.0f} s", flush=True)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            outcome = run_part(part, options, Path(folder), seconds=seconds)
    print(f"{part.name}: {describe(outcome)}", flush=True)
    if outcome.output:
        print(*(f"  | {line}" for line in outcome.output), sep="\n", flush=True)
    return outcome


def unmet_needs(packages: tuple[str, ...], *, any_version: bool) -> list[str]:
    """What is missing or of another version, each with what the requirements say."""
    wanted = required_versions()
    unmet = []
    for name in packages:
        try:
            installed = importlib.metadata.version(name).partition("+")[0]  # without the build, as in 2.13.0+cu130
        except importlib.metadata.PackageNotFoundError:
            unmet.append(f"{name} {wanted[name]} is not installed")
            continue
        if installed != wanted[name] and not any_version:
            unmet.append(f"{name} is {installed}, not {wanted[name]} (--any_version runs it all the same)")
    return unmet


def required_versions() -> dict[str, str]:
    """{package: version} of the files of requirements."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(REPOSITORY.glob("requirements*.txt")))
    return dict(re.findall(r"^([\w-]+)==([\w.]+)", text, flags=re.MULTILINE))


def run_part(part: Part, options: argparse.Namespace, folder: Path, *, seconds: float) -> Outcome:
    """Run a part with all that it starts, and end them when its time is up."""
    words = {
        "{device}": options.device,
        "{folder}": str(folder),
        "{seconds}": f"{0.8 * seconds:.0f}",
    }  # after its imports
    command = [words.get(word, word) for word in part.command]
    if part.figures:
        command += ["--device", options.device, "--results", str(folder), *(["--quick"] if options.quick else [])]
    log, began, reason = folder / "output.log", time.monotonic(), ""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=REPOSITORY,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment(part.num_devices)},
        )
        try:
            code = process.wait(seconds)
            reason = f"ended with code {code}" if code else ""
        except subprocess.TimeoutExpired:
            reason = f"took longer than {seconds:.0f} s and was ended"
        finally:
            end(process)
    tables = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    if not reason and part.figures and not tables:
        reason = "wrote no figures"
    said = log.read_bytes()
    if reason:
        reason += f": {last_line(said)[:300]}"
    return Outcome(
        part.name,
        "failed" if reason else "ran",
        reason,
        round(time.monotonic() - began, 1),
        rows=[row for each in tables for row in each["rows"]],
        notes=[note for each in tables for note in each["notes"]] or ([] if reason else [last_line(said)]),
        output=said.decode(errors="replace").splitlines()[-20:] if reason else [],
    )


def environment(num_devices: int) -> dict[str, str]:
    """Of a part: transformers' Trainer would share a batch among all devices that it sees. No part needs the hub."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(num_devices)))).split(",")[:num_devices]
    return {"CUDA_VISIBLE_DEVICES": ",".join(visible), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip


def end(process: subprocess.Popen) -> None:
    """Ask a part and its group to end, then kill them, and what has left the group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):  # all of them have ended
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    kill_descendants()


def describe(outcome: Outcome) -> str:
    return outcome.state + (f", {outcome.reason}" if outcome.reason else "") + (
        f" ({outcome.seconds:.0f} s)" if outcome.seconds else ""
    )  # fmt: skip


def table(outcomes: list[Outcome]) -> str:
    """All figures, then what became of each part."""
    from benchmarks.measure import number  # not above: that imports torch, which may be missing

    cells = [("claim", "case", "side", "value", "ratio")]
    for row in (row for outcome in outcomes for row in outcome.rows):
        relative = "" if row["ratio"] is None else f"{row['ratio']:.3g} x {row['peer']}"
        cells.append((row["claim"], row["case"], row["side"], f"{number(row['value'])} {row['unit']}", relative))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    notes = [f"{outcome.part}: {note}" for outcome in outcomes for note in outcome.notes]
    parts = [f"{outcome.part}: {describe(outcome)}" for outcome in outcomes]
    return "\n".join(["", *lines, "", *notes, "", *parts])


if __name__ == "__main__":
    sys.exit(main())
