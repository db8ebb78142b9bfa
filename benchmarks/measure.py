"""Timing sides by turns, and writing down what came of it: what every script of this folder has in common."""

import argparse
import dataclasses
import gc
import importlib.metadata
import json
import math
import operator
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "numba", "bitsandbytes", "hivemind")
RELATIONS = {"<=": operator.le, ">=": operator.ge}


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one side, one sample for each round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def low(self) -> float:
        return min(self.samples)

    @property
    def high(self) -> float:
        return max(self.samples)


def ratio(ours: Timing, peer: Timing) -> float:
    """Median over the rounds of ours / peer: a burst of other work hits both sides of a round alike."""
    return statistics.median(a / b for a, b in zip(ours.samples, peer.samples, strict=True))


def clock_of(device: str, num_threads: int) -> Callable[[], float]:
    """CPU seconds for one thread; wall time for several, because threads spin while they wait for each other."""
    return time.process_time if device == "cpu" and num_threads == 1 else time.perf_counter


def interleave(
    sides: dict[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.process_time,
    seconds: float = float("inf"),
) -> dict[str, Timing]:
    """Run the sides by turns, A B A B; garbage is collected between runs, not during them.

    On a slow machine there are fewer ``rounds``, but at least one: none is begun that would not end within ``seconds``
    (wall time, warm-up included) if it took as long as the last one.

    The default clock counts CPU seconds of all threads of this process, without those of its children;
    ``time.perf_counter`` is wall time. The first ``warmup`` rounds are not counted.
    """
    samples: dict[str, list[float]] = {name: [] for name in sides}
    began = turned = time.monotonic()
    for number in range(warmup + rounds):
        last_round, turned = time.monotonic() - turned, time.monotonic()
        if number > warmup and turned + last_round > began + seconds:
            break
        for name, run in sides.items():
            gc.collect()
            gc.disable()
            try:
                started = clock()
                run()
                took = clock() - started
            finally:
                gc.enable()
            if number >= warmup:
                samples[name].append(took)
    return {name: Timing(tuple(values)) for name, values in samples.items()}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a result: the ``value`` of one ``side`` in one ``case`` of a ``claim``.

    ``ratio`` is this side over the side called ``peer`` in the same case. ``target``, such as "<= 0.9" or ">= 3",
    is for the ratio if there is one, for the value otherwise; ``met`` follows from it. A claim about a ratio and
    about a value (time and megabytes) takes two rows. A target may have a way out that `met` alone knows.
    """

    claim: str
    case: str
    side: str
    value: float
    unit: str  # of the value: "s", "ns/parameter", "MB", "bytes/parameter", "tokens/s", "share" ...
    ratio: float | None = None
    target: str | None = None
    met: bool | None = None
    peer: str = ""
    floor: float | None = None  # of the value: what cannot be done without, measured in the same run

    def __post_init__(self):
        if self.target is not None and self.met is None:
            relation, limit = self._limit()
            object.__setattr__(self, "met", RELATIONS[relation](self.measured, limit))

    def _limit(self) -> tuple[str, float]:
        relation, _, limit = (self.target or "").partition(" ")
        if relation not in RELATIONS:
            raise ValueError(f'a target looks like "<= 0.9" or ">= 3", got {self.target!r}')
        return relation, float(limit)

    @property
    def measured(self) -> float:
        """What the target is for."""
        return self.value if self.ratio is None else self.ratio

    @property
    def missed_by(self) -> float:
        """Share of the target by which it is missed; 0 where it is met or there is none."""
        if self.met in (True, None):
            return 0.0
        limit = self._limit()[1]
        return abs(self.measured - limit) / abs(limit) if limit else abs(self.measured)

    @property
    def missed(self) -> str:
        return f"missed by {self.missed_by:.{0 if self.missed_by >= 0.01 else 1}%}"


def growth_rows(claim: str, points: Iterable[tuple[str, int, float, float]], side: str = "ours") -> list[Row]:
    """Of points (case, size, seconds, expected work): the seconds, and the exponents of both from point to point."""
    rows: list[Row] = []
    previous = None
    for case, size, seconds, work in points:
        rows.append(Row(claim, case, side, seconds, "s"))
        if previous is not None:
            step = math.log(size / previous[0])
            rows.append(Row(claim, case, "exponent, measured", math.log(seconds / previous[1]) / step, ""))
            rows.append(Row(claim, case, "exponent, expected", math.log(work / previous[2]) / step, ""))
        previous = size, seconds, work
    return rows


def options(description: str) -> argparse.ArgumentParser:
    """A parser with the flags all scripts share: ``quick`` (for trying the script out) and ``results``, a folder."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: shows that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder that the JSON is written to")
    return parser


def machine() -> dict[str, object]:
    """What the figures depend on beside the code."""
    return {
        "cpu": _cpu_name(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: installed_version(name) for name in PACKAGES},
    }


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def report(name: str, title: str, rows: Iterable[Row], notes: Iterable[str] = (), results: Path = RESULTS) -> Path:
    """Print a table and write ``results/NAME.json``, whole or not at all; returns its path."""
    rows, notes = list(rows), list(notes)
    print(f"\n{title}\n{format_table(rows)}", *notes, sep="\n", flush=True)
    record = {
        "name": name,
        "title": title,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": machine(),
        "rows": [dataclasses.asdict(row) for row in rows],
        "notes": notes,
    }
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{name}.json"
    write_atomically(path, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
    return path


def write_atomically(path: Path, content: bytes) -> None:
    """Readers see the old file or the new one, never a part."""
    beside = path.with_name(path.name + ".new")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def format_table(rows: list[Row]) -> str:
    """Aligned columns for a terminal."""
    cells = [("case", "side", "value", "ratio", "target", "")]
    for row in rows:
        relative = "" if row.ratio is None else f"{row.ratio:.3g}"
        verdict = {None: "", True: "met", False: row.missed}[row.met]
        cells.append((row.case, row.side, f"{number(row.value)} {row.unit}", relative, row.target or "", verdict))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join(lines)


def number(value: float) -> str:
    """Three significant digits, without an exponent where people read numbers."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
