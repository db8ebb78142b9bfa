"""Run every benchmark in a process of its own, then write benchmarks/RESULTS.md and two bar charts.

    python -m benchmarks.run_all                    # everything (`make bench`), at most 15 minutes on two cores
    python -m benchmarks.run_all --only lamb_step   # one script; the others' results stay as they are
    python -m benchmarks.run_all --quick            # small sizes, to outputs/bench: shows that the scripts run

A script that fails, hangs or is missing is named in RESULTS.md.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.measure import RESULTS, Row, number, write_atomically
from src.process.supervisor import adopt_orphans, kill_descendants

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
# Seconds after which a script is ended, in the order in which they run: the short ones cannot be starved by the long.
LIMITS = {
    "start_up": 120,
    "collator": 70,
    "mlm_head": 120,
    "data_pipeline": 150,
    "butterfly": 60,
    "lamb_step": 130,
    "attention": 60,
    "encoder": 330,
    "whole_trainer": 230,
    "averaging_wait": 220,
}
# Tables too long for `make bench`; what an earlier run of theirs wrote to the same folder is shown with its date.
EXTRAS = {
    "averaging_growth": "averaging_wait --growth",
    "revisions": "revisions",
    "revisions_bf16": "revisions --precision bf16",
    "tried_designs": "tried_designs",
}
TOTAL_SECONDS = 14.5 * 60
# Where NOTES.md says which designs were tried for the claims of a script.
SECTIONS = {
    "start_up": "Start-up",
    "collator": "Data: instances, masks, padding",
    "data_pipeline": "Data: instances, masks, padding",
    "mlm_head": "Masked-LM head",
    "lamb_step": "8-bit LAMB step",
    "encoder": "Encoder",
    "attention": "Attention and the last layer",
    "whole_trainer": "Whole trainer",
    "revisions": "Whole trainer",
    "revisions_bf16": "Whole trainer",
    "averaging_wait": "Averaging",
}
GRACE_SECONDS = 20.0  # for a script that is told to end, and ends its own programs first
MEMORY_UNITS = {"MB", "bytes", "bytes/parameter", "units"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=LIMITS, metavar="NAME", help=f"one of {', '.join(LIMITS)}")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds, to outputs/bench")
    flags = parser.parse_args()
    adopt_orphans()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    directory = REPOSITORY / "outputs" / "bench" if flags.quick else HERE
    results = directory / RESULTS.name
    deadline = time.monotonic() + TOTAL_SECONDS
    failures = {}
    for name in [flags.only] if flags.only else LIMITS:
        failure = run_script(name, results, quick=flags.quick, deadline=deadline)
        if failure:
            failures[name] = failure
    write_results(directory, read_results(results), failures)
    print(f"\nwrote {directory / 'RESULTS.md'}")
    for name, failure in failures.items():
        print(f"{name}: {failure}", file=sys.stderr)
    return 1 if failures else 0


def run_script(name: str, results: Path, *, quick: bool, deadline: float) -> str:
    """Run one benchmark with all that it starts; returns what went wrong, or nothing."""
    if not (HERE / f"{name}.py").exists():
        return "there is no such script"
    seconds = min(LIMITS[name], deadline - time.monotonic() - GRACE_SECONDS)
    if seconds < 10:
        return "not run: the time for all benchmarks was up"
    print(f"\n===== {name} (at most {seconds:.0f} s) =====", flush=True)
    (results / f"{name}.json").unlink(missing_ok=True)  # an old result must not pass for a new one
    command = [sys.executable, "-m", f"benchmarks.{name}", "--results", str(results), *(["--quick"] if quick else [])]
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, stdin=subprocess.DEVNULL)
    failure = ""
    try:
        code = process.wait(seconds)
        failure = f"ended with code {code}" if code else ""
    except subprocess.TimeoutExpired:
        failure = f"took longer than {seconds:.0f} s and was ended"
    finally:
        end(process)
    if not failure and not (results / f"{name}.json").exists():
        failure = "wrote no result"
    print(f"===== {name}: {failure or 'done'}, {time.monotonic() - started:.0f} s =====", flush=True)
    return failure


def end(process: subprocess.Popen) -> None:
    """Ask a script that still runs to end, then kill it and everything it has started."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    kill_descendants()


def read_results(results: Path) -> dict[str, dict]:
    """The records that the scripts wrote, by name, in the order of LIMITS and EXTRAS."""
    paths = {name: results / f"{name}.json" for name in (*LIMITS, *EXTRAS)}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


def write_results(directory: Path, records: dict[str, dict], failures: dict[str, str]) -> None:
    """RESULTS.md, bench_time.png and bench_memory.png in ``directory``."""
    for name in LIMITS:
        if name not in records and name not in failures:
            failures[name] = "not run yet"
    directory.mkdir(parents=True, exist_ok=True)
    rows = [(Row(**row), record) for record in records.values() for row in record["rows"]]
    charts = {
        "bench_time.png": draw(directory / "bench_time.png", "time", rows, memory=False),
        "bench_memory.png": draw(directory / "bench_memory.png", "memory", rows, memory=True),
    }
    lines = [f"# Benchmarks on {processors(records)}", ""]
    lines += ["Written by `make bench` (`python -m benchmarks.run_all`).", ""]
    lines += describe_machine(records)
    lines += [f"- **no result from `{name}`**: {failure}" for name, failure in failures.items()]
    missed = [(row, record["name"]) for row, record in rows if row.met is False]
    judged = sum(row.met is not None for row, _ in rows)
    lines += ["", f"{judged - len(missed)} of {judged} targets are met." if judged else "No target was measured.", ""]
    lines += claims_table([row for row, _ in rows])
    if missed:
        lines += ["", "Missed, with the section of [NOTES.md](NOTES.md) that says which designs were tried:", ""]
        lines += [f"- {row.claim}, {row.case}, {row.side}: {row.missed}; {SECTIONS[name]}" for row, name in missed]
    lines += [f"\n![{chart}]({chart})" for chart, drawn in charts.items() if drawn]
    for name, record in records.items():
        lines += [
            "",
            f"## {record['title']}",
            "",
            f"`python -m benchmarks.{EXTRAS.get(name, name)}`, {record['date']}",
            "",
        ]
        lines += all_figures([Row(**row) for row in record["rows"]])
        lines += ["", *(f"- {note}" for note in record["notes"])]
    write_atomically(directory / "RESULTS.md", ("\n".join(lines) + "\n").encode())


def processors(records: dict[str, dict]) -> str:
    names = {f"{record['machine']['cpu']} ({record['machine'].get('simd', '?')})" for record in records.values()}
    return ", ".join(sorted(names)) or "no machine yet"


def describe_machine(records: dict[str, dict]) -> list[str]:
    """One line for each machine and set of versions, with the scripts it ran."""
    lines: dict[str, list[str]] = {}
    for name, record in records.items():
        machine = record["machine"]
        versions = ", ".join(f"{key} {machine[key]}" for key in ("python", "torch", "transformers", "tokenizers"))
        gpu = machine.get("gpu") or "no GPU"
        processor = f"{machine['cpu']}, {machine.get('simd', '?')}, {machine['cpus']} cores, {gpu}"
        line = f"{record['date'].partition(' ')[0]}: {processor}; {versions}"
        lines.setdefault(line, []).append(f"{name} (load {machine.get('load', '?')})")
    return [f"- {line}: {', '.join(names)}" for line, names in lines.items()]


def claims_table(rows: list[Row]) -> list[str]:
    """What has a target: ours beside the peer."""
    lines = ["| claim | case | ours | peer | floor | ratio | target | |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        if row.target is None:
            continue
        other = peer_of(row, rows)
        peer = f"{other.side}: {number(other.value)} {other.unit}" if other else ""
        relative = "" if row.ratio is None else f"{row.ratio:.3g}"
        floor = "" if row.floor is None else f"{number(row.floor)} {row.unit}"
        verdict = "met" if row.met else f"**{row.missed}**"
        ours = f"{row.side}: {number(row.value)} {row.unit}"
        cells = row.claim, row.case, ours, peer, floor, relative, row.target, verdict
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def peer_of(row: Row, rows: list[Row]) -> Row | None:
    same_case = (other for other in rows if (other.claim, other.case) == (row.claim, row.case))
    return next((other for other in same_case if row.peer and other.side == row.peer), None)


def all_figures(rows: list[Row]) -> list[str]:
    lines = ["| claim | case | side | value | ratio |", "|---|---|---|---|---|"]
    for row in rows:
        relative = "" if row.ratio is None else f"{row.ratio:.3g} x {row.peer}"
        lines.append(f"| {row.claim} | {row.case} | {row.side} | {number(row.value)} {row.unit} | {relative} |")
    return lines


def draw(picture: Path, what: str, rows: list[tuple[Row, dict]], *, memory: bool) -> bool:
    """A bar for each claim with a target and a peer: our share of its time or memory, in the worst case of the claim.
    Returns whether there was any."""
    cases: dict[tuple, list[tuple[float, Row]]] = {}
    plain_rows = [row for row, _ in rows]
    for row, record in rows:
        other = peer_of(row, plain_rows)
        share = row.ratio if row.ratio is not None else row.value / other.value if other and other.value else None
        if row.target is None or share is None or share <= 0 or (row.unit.split(" ")[0] in MEMORY_UNITS) != memory:
            continue
        share = 1 / share if row.target.startswith(">=") else share  # where higher is better
        cases.setdefault((record["name"], row.claim, row.side, row.peer), []).append((share, row))
    bars = []
    for (name, claim, side, _), found in cases.items():
        share, row = max(found, key=lambda each: each[0])
        which = row.case if len(found) == 1 else f"{row.case} (worst of {len(found)} cases)"
        bars.append((f"{name}: {claim}, {side}\n{which}", share, row))
    if not bars:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.45 * len(bars)), layout="constrained")
    positions = range(len(bars))
    axes.barh(positions, [share for _, share, _ in bars], color="tab:blue")
    for position, (_, share, row) in zip(positions, bars, strict=True):
        axes.text(share, position, f" {share:.2f} of {row.peer or 'the peer'}", va="center", fontsize=7)
    axes.axvline(1.0, color="gray", linestyle="--")
    axes.set_yticks(positions, [label for label, _, _ in bars], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, max(1.3, *(share * 1.45 for _, share, _ in bars)))
    axes.set_xlabel(f"{what}, as a share of the peer's (dashed: equal; shorter is better)")
    figure.savefig(picture, dpi=120)
    plt.close(figure)
    return True


if __name__ == "__main__":
    sys.exit(main())
