"""A run's metrics: one JSON object a line in a file; the same records in Weights & Biases or TensorBoard if wished."""

import contextlib
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

logger = logging.getLogger(__name__)

MAX_TEXT_LENGTH = 200


def try_lock(descriptor: int, what: Path) -> bool:
    """Lock an open file for this process and its children; False if another process has locked it.

    True, with a notice, on a file system that has no locks (Lustre, some NFS and FUSE mounts): work matters more.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning("%s cannot be locked (%s): make sure that no other process uses it", what, error.strerror)
    return True


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


def printable(text: object, limit: int = MAX_TEXT_LENGTH) -> str:
    """Text of a stranger on one line, without characters that steer a terminal or turn the writing direction."""
    shown = "".join(letter if letter.isprintable() else " " for letter in str(text)[: 4 * limit])
    shown = " ".join(shown.split())
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def report_refusals(refusals: list[tuple[str, str]], journal: "Journal", say: Callable[[str], None]) -> None:
    """Record and say what was not believed: (peer, reason)."""
    for peer, reason in (map(printable, refusal) for refusal in refusals):
        journal.write("refusal", peer=peer, reason=reason)
        say(f"ignored what peer {peer} sent: {reason}")


class Follower(Protocol):
    """Takes records one by one, such as a `RunHistory`."""

    def add(self, record: dict) -> None: ...


class Journal:
    """Appends records to ``path``; each line is complete on disk before the next one is begun.

    A record is ``{"event": ..., "time": seconds since 1970, ...}``. The file is the one source of truth:
    ``listeners`` are called with the same records and may be missing.
    """

    def __init__(
        self,
        path: Path,
        *,
        wandb_project: str | None = None,
        tensorboard_dir: str | None = None,
        run_name: str | None = None,
        config=None,
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
            self._add_sink(TensorBoardSink(tensorboard_dir, run_name))

    def _add_sink(self, sink) -> None:
        self._sinks.append(sink)
        self.listeners.append(sink.write)

    def write(self, event: str, **values) -> dict:
        """Add a record; numbers that are not finite become null, which JSON can hold."""
        record = {"event": event, "time": round(time.time(), 3), **values}
        record = {key: None if value != value or value in (float("inf"), -float("inf")) else value
                  for key, value in record.items()}  # fmt: skip
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

    def __init__(self, directory: str, run_name: str | None):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("--tensorboard_dir needs a package: pip install tensorboard==2.21.0") from error
        self._writer = SummaryWriter(str(Path(directory).expanduser() / (run_name or "run")))

    def write(self, record: dict) -> None:
        for name, value in numbers_of(record).items():
            self._writer.add_scalar(name, value, global_step=record.get("epoch"), walltime=record["time"])

    def close(self) -> None:
        self._writer.close()


def append_record(path: Path, event: str, **values) -> None:
    """Add a record from another process of the same peer; a single write, so that lines of two processes never mix.

    A record that cannot be written is lost: what it tells of must go on.
    """
    line = json.dumps({"event": event, "time": round(time.time(), 3), **values}, ensure_ascii=False) + "\n"
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
