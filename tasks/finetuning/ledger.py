"""The ledger of fine-tuning runs: one JSON line for each finished seed, so that nothing is ever run twice."""

import hashlib
import json
from pathlib import Path

from src.files import append_lines

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
        append_lines(self.path, row)

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
