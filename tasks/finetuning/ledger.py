"""The ledger of fine-tuning runs: one JSON line for each finished seed, so that nothing is ever run twice."""

import fcntl
import hashlib
import json
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

LEDGER = "runs.jsonl"


def settings_key(**settings) -> str:
    """A short name for everything that decides the result of a seed; equal settings give equal keys."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


class Ledger:
    """Rows are dictionaries with at least task, model, key and seed. A row is on disk, whole, when `append` returns."""

    def __init__(self, path: Path):
        self.path = Path(path)

    def rows(self) -> list[dict]:
        """All rows, oldest first. A last line without a line break was cut off by a crash and does not count."""
        if not self.path.is_file():
            return []
        rows = []
        for number, line in enumerate(self.path.read_text(encoding="utf-8").split("\n")[:-1], 1):
            try:
                row = json.loads(line)
                rows.append({**row, "seed": row["seed"], "key": row["key"]})
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise ValueError(
                    f"{self.path}:{number}: not a row of the ledger; remove the line, and its seed runs again"
                ) from error
        return rows

    def append(self, row: dict) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            self._lock(file)
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _lock(self, file) -> None:
        """Another task may be running with the same ledger. Some network file systems have no locks."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.info("%s cannot be locked (%s): write to it with one program at a time", self.path, error.strerror)

    def finished(self, key: str) -> dict[int, dict]:
        """The rows of all finished seeds of these settings, by seed."""
        return {row["seed"]: row for row in self.rows() if row["key"] == key}

    def newest(self, task: str, model: str | None = None) -> list[dict]:
        """All seeds of the settings that a task was last run with, of one model (its name or source) or of any."""
        rows = [row for row in self.rows() if row["task"] == task and model in (None, row["model"], row["source"])]
        return [row for row in rows if row["key"] == rows[-1]["key"]]


def best_row(rows: list[dict], metric: str) -> dict:
    """The seed that is best on dev, the first of equals."""
    return max(rows, key=lambda row: (row["dev"][metric], -row["seed"]))
