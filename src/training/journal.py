"""A run's metrics: one JSON object a line in a file, and the same records in Weights & Biases when asked for."""

import fcntl
import json
import os
import time
from pathlib import Path


def claim_run_directory(output_dir: str, run_id: str, role: str) -> Path:
    """``OUTPUT_DIR/RUN_ID/ROLE``, or ``ROLE-2``, ``ROLE-3`` ... if a running peer on this machine holds the former.

    The claim is a lock that the kernel drops when this process and its children have ended, however they end.
    """
    for number in range(1, 1000):
        directory = Path(output_dir).expanduser() / run_id / (role if number == 1 else f"{role}-{number}")
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / ".lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return directory
        except BlockingIOError:
            os.close(lock)
    raise ValueError(f"--output_dir: a thousand peers run in {output_dir}; choose another directory")


class Journal:
    """Appends records to ``path``; each line is complete on disk before the next one is begun.

    A record is ``{"event": ..., "time": seconds since 1970, ...}``. The file is the one source of truth: Weights &
    Biases receives the same records and may be missing.
    """

    def __init__(self, path: Path, *, wandb_project: str | None = None, run_name: str | None = None, config=None):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("a", encoding="utf-8")
        if path.read_bytes()[-1:] not in (b"", b"\n"):  # a crash cut the last line off: begin a new one
            self._file.write("\n")
        self._wandb = None
        if wandb_project is not None:
            import wandb  # takes a second and writes a folder: only when asked for

            try:
                self._wandb = wandb.init(project=wandb_project, name=run_name, config=config)
            except wandb.Error as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"--wandb_project {wandb_project}: {reason} Or set WANDB_MODE=offline.") from error

    def write(self, event: str, **values) -> dict:
        """Add a record; numbers that are not finite become null, which JSON can hold."""
        record = {"event": event, "time": round(time.time(), 3), **values}
        record = {key: None if value != value or value in (float("inf"), -float("inf")) else value
                  for key, value in record.items()}  # fmt: skip
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log({key: value for key, value in values.items() if isinstance(value, (int, float))})
        return record

    def close(self) -> None:
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_journal(path: Path) -> list[dict]:
    """All complete records of a metrics file; a last line cut off by a crash is left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
