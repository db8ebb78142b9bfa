"""A run's metrics: one JSON object a line in a file; the same records in Weights & Biases or TensorBoard if wished."""

import contextlib
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from src.files import try_lock
from src.metrics.records import Record, Refusal, printable

logger = logging.getLogger(__name__)


def claim_run_directory(output_dir: str, run_id: str, role: str) -> Path:
    """``OUTPUT_DIR/RUN_ID/ROLE``, or ``ROLE-2``, ``ROLE-3`` ... if a running peer on this machine holds the former.

    The claim is a lock that the kernel drops when this process and its children have ended, however they end.
    """
    for number in range(1, 1000):
        directory = Path(output_dir).expanduser() / run_id / (role if number == 1 else f"{role}-{number}")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock = os.open(directory / ".lock", os.O_CREAT | os.O_RDWR)
        except OSError as error:
            reason = f"cannot write in {directory} ({error.strerror})"
            raise ValueError(f"--output_dir: {reason}; choose another directory") from error
        if try_lock(lock, directory):
            return directory
        os.close(lock)
    raise ValueError(f"--output_dir: a thousand peers run in {output_dir}; choose another directory")


def num_starts(path: Path) -> int:
    """How often the peer with this metrics file has been started: its "start" records."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        return sum(b'"event": "start"' in line[:40] for line in file)
    return 0


def report_refusals(refusals: list[tuple[str, str]], journal: "Journal", say: Callable[[str], None]) -> None:
    """Record and say what was not believed: (peer, reason)."""
    for peer, reason in (map(printable, refusal) for refusal in refusals):
        journal.record(Refusal(peer=peer, reason=reason))
        say(f"ignored what peer {peer} sent: {reason}")


class Follower(Protocol):
    """Takes records one by one, such as a `RunHistory`."""

    def add(self, record: dict) -> None: ...


class Journal:
    """Appends records to ``path``; each line is complete on disk before the next one is begun.

    What a line holds says `src.metrics.records`. The file is the one source of truth: ``listeners`` are called with the
    same records, as the file has them, and may be missing.
    """

    def __init__(
        self,
        path: Path,
        *,
        wandb_project: str | None = None,
        tensorboard_dir: str | None = None,
        run_name: str | None = None,
        config: dict | None = None,
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._torn = path.read_bytes()[-1:] not in (b"", b"\n")  # a crash or a full disk cut the last line off
        self._has_failed = False
        self._lock = threading.Lock()
        self.listeners: list[Callable[[dict], None]] = []
        self._sinks = []
        if wandb_project is not None:
            self._add_sink(WandbSink(wandb_project, run_name, config))
        if tensorboard_dir is not None:
            self._add_sink(TensorBoardSink(tensorboard_dir, run_name, config))

    def _add_sink(self, sink) -> None:
        self._sinks.append(sink)
        self.listeners.append(sink.write)

    def record(self, record: Record) -> dict:
        """Add what has happened; returns what the file then holds."""
        return self.write(record.event, **record.values())

    def write(self, event: str, **values) -> dict:
        """Add a line; numbers that are not finite become null, which JSON can hold."""
        record = without_infinities({"event": event, "time": round(time.time(), 3), **values})
        with self._lock:  # several threads of an auxiliary peer write
            self._append(json.dumps(record, ensure_ascii=False) + "\n")
            for listener in self.listeners:
                listener(record)
        return record

    def follow(self, read: Callable[[Path], "Follower"]) -> "Follower":
        """What ``read(path)`` makes of the records so far; it is told all that come, and misses none in between."""
        with self._lock:
            follower = read(self.path)
            self.listeners.append(follower.add)
        return follower

    def _append(self, line: str) -> None:
        """In one write. A full disk costs records, not the run."""
        data = (b"\n" if self._torn else b"") + line.encode()
        try:
            self._torn = self._file.write(data) != len(data)
        except OSError as error:
            if not self._has_failed:
                logger.warning("%s lacks records from now on: %s; make room, training goes on", self.path, error)
            self._has_failed = True

    def close(self) -> None:
        self._file.close()
        for sink in self._sinks:
            sink.close()


def without_infinities(value: object) -> object:
    """None for every NaN and infinity in nested lists and dictionaries: JSON has none, and other readers would fail."""
    if isinstance(value, dict):
        return {key: without_infinities(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_infinities(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def numbers_of(record: dict) -> dict[str, float]:
    """A record's figures under the names of what they describe: ``swarm_epoch/loss``, ``peer/3fa9c1d2/samples``."""
    prefix = f"{record['event']}/{record['peer']}" if "peer" in record else record["event"]
    return {f"{prefix}/{key}": value for key, value in record.items()
            if isinstance(value, (int, float)) and key not in ("time", "epoch")}  # fmt: skip


class WandbSink:
    """Sends a journal's figures to Weights & Biases. Raises ValueError if it does not start."""

    def __init__(self, project: str, run_name: str | None, config):
        import wandb  # takes a second and writes a folder: only when asked for

        try:
            self._run = wandb.init(project=project, name=run_name, config=config)
        except wandb.Error as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"--wandb_project {project}: {reason} Or set WANDB_MODE=offline.") from error

    def write(self, record: dict) -> None:
        epoch = {"epoch": record["epoch"]} if "epoch" in record else {}
        self._run.log({**epoch, **numbers_of(record)})

    def close(self) -> None:
        self._run.finish()


class TensorBoardSink:
    """Writes a journal's figures, by epoch, for TensorBoard. Raises ValueError if the package is not installed."""

    def __init__(self, directory: str, run_name: str | None, config: dict | None = None):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("--tensorboard_dir needs a package: pip install tensorboard==2.21.0") from error
        self._writer = SummaryWriter(str(Path(directory).expanduser() / (run_name or "run")))
        lines = [f"    {name}: {value}" for name, value in sorted((config or {}).items())]  # Markdown, as it stands
        self._writer.add_text("configuration", "\n".join(lines))

    def write(self, record: dict) -> None:
        for name, value in numbers_of(record).items():
            self._writer.add_scalar(name, value, global_step=record.get("epoch"), walltime=record["time"])

    def close(self) -> None:
        self._writer.close()


def append_record(path: Path, record: Record) -> None:
    """Add a record from another process of the same peer; a single write, so that lines of two processes never mix.

    A record that cannot be written is lost: what it tells of must go on.
    """
    values = without_infinities({"event": record.event, "time": round(time.time(), 3), **record.values()})
    line = json.dumps(values, ensure_ascii=False) + "\n"
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def records_in(path: Path) -> Iterator[dict]:
    """The complete records of a metrics file, one at a time; a last line cut off by a crash is left out."""
    with Path(path).open(encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):  # no JSON; a number of more than 4300 digits; nested too deeply
                continue


def read_journal(path: Path) -> list[dict]:
    """All complete records of a metrics file."""
    return list(records_in(path))
