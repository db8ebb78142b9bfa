"""Does the memory of a peer's processes grow as long as it runs? Two demo trainers and an auxiliary peer, for hours.

    python -m benchmarks.soak --minutes 120 --work_dir outputs/soak --results benchmarks/soak.json

It notes the anonymous memory (RssAnon) of each process of each peer, by what it does: the least of each half minute,
as what a batch or a round takes for a moment is no growth. It fits a line over all but the first quarter, in which
caches fill. Promise: no process grows by more than 5 MB an hour; it is judged in runs of 120 minutes or more. Ends with
code 0 if it is kept, or the run was too short to tell, and with 1 if not.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import torch

from benchmarks.fault_swarm import parts_of
from src.metrics.journal import read_journal
from src.process.local_swarm import LocalPeer, LocalSwarm

REPOSITORY = Path(__file__).resolve().parent.parent
MAX_GROWTH = 5.0  # MB an hour
ENOUGH_MINUTES, WARMUP_SHARE = 120.0, 0.25  # so that 90 minutes are fitted
SAMPLE_SECONDS, READINGS = 30.0, 15  # of each sample


def anonymous_megabytes(pid: int) -> float:
    """Memory of a process that belongs to no file and is not shared memory; what it shares by fork counts, too."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise ProcessLookupError(pid)


def processes_of(peer: LocalPeer) -> dict[str, psutil.Process]:
    """Each process of a peer by peer and role."""
    (program,) = psutil.Process(peer.process.pid).children()
    return {f"{peer.name}: {role}": process for role, process in {"main": program, **parts_of(program)}.items()}


def growth(moments: list[float], megabytes: list[float]) -> float:
    """Slope of the line of least squares, in MB an hour; ``moments`` in seconds."""
    return float(np.polyfit(moments, megabytes, 1)[0]) * 3600 if len(moments) > 1 else float("nan")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120.0, help="how long (below 120: too short for the promise)")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/soak"), help="the peers' files")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "soak.json", help="figures")
    parser.add_argument("--peer_flags", nargs=argparse.REMAINDER, default=[], help="further flags of all peers, last")
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    folder = options.work_dir / time.strftime("run-%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    shared = ["--output_dir", str(folder), "--run_id", "soak", "--total_steps", "1000000", *options.peer_flags]
    with LocalSwarm(echo=False, environment={"OMP_NUM_THREADS": "1"}) as swarm:
        peers = [swarm.start("aux", "run_aux_peer.py", ["@demo/aux.args", *shared])]
        arguments = ["@demo/trainer.args", *shared, "--wait_for_peers", "2"]
        peers += [swarm.start(f"trainer-{number}", "run_trainer.py", arguments) for number in (1, 2)]
        moments, memory = watch(peers, seconds=60 * options.minutes)
    results = summarise(moments, memory, folder, minutes=options.minutes)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table(results) + f"\nwritten to {options.results}")
    return 1 if results["kept"] is False else 0


def watch(peers: list[LocalPeer], *, seconds: float) -> tuple[list[float], dict[str, list[float]]]:
    """Moments and the memory of each process then. Raises RuntimeError if a process was lost."""
    processes = {name: process for peer in peers for name, process in processes_of(peer).items()}
    began, moments, memory = time.monotonic(), [], {name: [] for name in processes}
    print(f"watching {len(processes)} processes for {seconds / 60:g} minutes", flush=True)
    pause = min(SAMPLE_SECONDS, seconds / 20)
    while (now := time.monotonic() - began) < seconds:
        moments.append(now)
        least = dict.fromkeys(processes, math.inf)
        for _ in range(READINGS):
            for name, process in processes.items():
                try:
                    least[name] = min(least[name], anonymous_megabytes(process.pid))
                except OSError as error:
                    tail = "\n".join(line for peer in peers for line in peer.lines[-5:])
                    raise RuntimeError(f"{name} has ended after {now:.0f} s:\n{tail}") from error
            time.sleep(pause / READINGS)
        for name, megabytes in least.items():
            memory[name].append(megabytes)
    return moments, memory


def summarise(moments: list[float], memory: dict[str, list[float]], folder: Path, *, minutes: float) -> dict:
    """Figures by process, and whether the promise was kept: None if the run was too short to tell."""
    settled = [number for number, moment in enumerate(moments) if moment >= 60 * minutes * WARMUP_SHARE]
    fitted = [moments[number] for number in settled]
    processes = {
        name: {
            "first_megabytes": round(values[0], 1),
            "last_megabytes": round(values[-1], 1),
            "megabytes_an_hour": round(growth(fitted, [values[number] for number in settled]), 2),
            "samples": [round(value, 1) for value in values],
        }
        for name, values in memory.items()
    }
    records = read_journal(folder / "soak" / "trainer" / "metrics.jsonl")
    epochs = [record for record in records if record["event"] == "epoch"]
    worst = max(processes.values(), key=lambda process: process["megabytes_an_hour"])["megabytes_an_hour"]
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
        "minutes": minutes,
        "fitted_minutes": round(minutes * (1 - WARMUP_SHARE), 1),
        "epochs_an_hour": round(len(epochs) / minutes * 60),
        "limit_megabytes_an_hour": MAX_GROWTH,
        "worst_megabytes_an_hour": worst,
        "kept": worst <= MAX_GROWTH if minutes >= ENOUGH_MINUTES else None,
        "moments": [round(moment) for moment in moments],
        "processes": processes,
    }


def table(results: dict) -> str:
    lines = ["| process | at first, MB | at last, MB | growth, MB an hour |", "| --- | --- | --- | --- |"]
    for name, process in results["processes"].items():
        first, last, hourly = (process[key] for key in ("first_megabytes", "last_megabytes", "megabytes_an_hour"))
        lines.append(f"| {name} | {first:.0f} | {last:.0f} | {hourly:.1f} |")
    verdict = {
        True: "kept",
        False: "NOT kept",
        None: f"not judged: caches and arenas fill for longer than {results['minutes']:g} minutes, run 120 or more",
    }
    return "\n".join([
        *lines, "",
        f"{results['minutes']:g} minutes, the last {results['fitted_minutes']:g} fitted, {results['epochs_an_hour']} "
        f"epochs an hour, {results['machine']}.",
        f"No process grows by more than {results['limit_megabytes_an_hour']:g} MB an hour: {verdict[results['kept']]}.",
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
