"""The newest state of the swarm as a directory, and the notice by which trainers know that it is stored."""

import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError

from src.files import replaced_directory, settle
from src.models.checkpoint import give_usual_mode
from src.swarm.dht import store_checkpoint_epoch
from src.swarm.optimizer import LeanOptimizer
from src.swarm.state_check import is_finite
from src.version import VERSION

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
# The record by which trainers know that somebody stores checkpoints: who has died is waited for no longer than that.
NOTICE_SECONDS, NOTICE_EXPIRES_SECONDS = 5.0, 20.0


ORIGIN_FILE = "checkpoint.json"  # {"run_id": ..., "epoch": ..., "version": of this software}
# What the files of a checkpoint begin with, in whatever version of transformers it was written.
CHECKPOINT_FILES = (ORIGIN_FILE, "config", "model", "tokenizer", "special_tokens", "spiece", "added_tokens", "vocab",
                    "merges")  # fmt: skip


def refuse_foreign_directory(path: Path) -> None:
    """Raises ValueError if something is at ``path`` that is not a checkpoint: it would be lost."""
    if path.is_file():
        raise ValueError(f"--local_path: {path} is a file; name a directory for checkpoints alone")
    foreign = [entry.name for entry in path.glob("*") if not entry.name.startswith(CHECKPOINT_FILES)]
    if foreign:
        raise ValueError(f"--local_path: {path} holds {min(foreign)}; name a directory for checkpoints alone")


def stored_epoch(path: Path, run_id: str) -> int:
    """The epoch of the checkpoint in a directory; 0 if there is none, or one that does not say it.

    Raises ValueError if it belongs to another run, or if what it says makes no sense.
    """
    origin = path / ORIGIN_FILE
    if not origin.exists():
        return 0
    away = f"choose another directory, or move {path} away"
    try:
        content = json.loads(origin.read_text(encoding="utf-8"))
        epoch, of_run = content["epoch"], content["run_id"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"--local_path: cannot read {origin}; {away}") from error
    if type(epoch) is not int or epoch < 0:
        raise ValueError(f"--local_path: {origin} names the epoch {epoch!r}; {away}")
    if of_run != run_id:
        raise ValueError(f"--local_path: {path} holds the model of run {of_run!r}, epoch {epoch}; {away}")
    return epoch


def epoch_name(epoch: int) -> str:
    """Of a checkpoint that is kept: its directory, and its tag on the hub."""
    return f"epoch-{epoch}"


def thinned(epochs: Iterable[int], keep: int) -> list[int]:
    """The ``keep`` epochs that stay: the newest, then the first, and others as evenly between them as may be.

    Called after each new one. What goes is the one whose neighbours are nearest to each other, the oldest of several.
    """
    left = sorted(epochs)
    while len(left) > keep:
        inner = range(1, len(left) - 1) if keep > 1 else [0]
        left.pop(min(inner, key=lambda place: left[place + 1] - left[place - 1]))
    return left


class CheckpointStore:
    """Keeps the newest state of the swarm as a directory that ``from_pretrained`` opens.

    The directory says which epoch it holds, so that a peer that is started again goes on from there.
    ``self.lock`` is held while the directory changes. ``keep``: so many states of the whole run stay in a directory
    beside it, see `thinned`.
    """

    def __init__(
        self, path: Path, model, tokenizer, optimizer: LeanOptimizer, *, run_id: str, every_epochs: int, keep: int = 0
    ):
        settle(path)  # killed while it was replaced
        refuse_foreign_directory(path)  # it will be replaced as a whole
        self.path, self.model, self.tokenizer, self.optimizer, self.run_id = path, model, tokenizer, optimizer, run_id
        self.every_epochs, self.last_epoch = every_epochs, stored_epoch(path, run_id)
        self.keep, self.kept_path = keep, path.with_name(f"{path.name}-epochs")
        if keep:
            self._kept()  # says now if something else lies there
        self.lock = threading.Lock()

    def is_due(self, epoch: int) -> bool:
        return epoch >= self.last_epoch + self.every_epochs

    def update(self, *, timeout: float) -> int:
        """Fetch the state from a trainer and save it if it is newer than what is stored; returns its epoch.

        Raises ValueError if no trainer could give it or if it is damaged, OSError if it cannot be written.
        """
        epoch = self._download(timeout)
        if epoch > self.last_epoch:
            self._save(epoch)
        return epoch

    def _download(self, timeout: float) -> int:
        averager = self.optimizer.state_averager
        own_epoch, averager.local_epoch = averager.local_epoch, -1  # accept whatever epoch the trainer is in
        try:
            averager.load_state_from_peers(timeout=timeout)
        except TimeoutError as error:
            raise ValueError(f"no answer within {timeout:.0f} s") from error
        finally:
            epoch, averager.local_epoch = averager.local_epoch, max(own_epoch, averager.local_epoch)
        if epoch < 0:
            raise ValueError("no trainer shares its state yet")
        if not all(map(is_finite, self.model.parameters())):
            raise ValueError("the downloaded parameters are not finite")
        self.optimizer.keep_state(epoch)
        return epoch

    def _save(self, epoch: int) -> None:
        with self.lock:
            try:
                with replaced_directory(self.path) as folder:
                    self._write(folder, epoch)
            except SafetensorError as error:  # no OSError, although it means a full disk
                raise OSError(f"cannot write {self.path}: {error}") from error
            self.last_epoch = epoch
        if self.keep:
            try:
                self._keep(epoch)
            except OSError as error:  # such as a full disk; shutil's holds a list of them
                logger.warning("epoch %d is stored, but cannot be kept in %s: %s", epoch, self.kept_path, error)

    def _keep(self, epoch: int) -> None:
        """Its files have two names from now on, until the newest checkpoint is another one: that takes no space."""
        with replaced_directory(self.kept_path / epoch_name(epoch)) as folder:
            shutil.copytree(self.path, folder, copy_function=os.link, dirs_exist_ok=True)
        kept = self._kept()
        for old in kept.keys() - set(thinned(kept, self.keep)):
            shutil.rmtree(kept[old])

    def _kept(self) -> dict[int, Path]:
        """{epoch: its directory}. Raises ValueError if something else is there, which is nobody's to remove."""
        kept = {}
        for path in self.kept_path.glob("[!.]*"):
            match = re.fullmatch(r"epoch-(\d{1,15})", path.name)
            if match is None:
                raise ValueError(f"--keep_checkpoints: {self.kept_path} holds {path.name}; move it away")
            if stored_epoch(path, self.run_id) == int(match[1]):
                kept[int(match[1])] = path
        return kept

    def _write(self, folder: Path, epoch: int) -> None:
        self.model.config.sparse_prediction = False  # a training option; users want logits everywhere
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        origin = json.dumps({"run_id": self.run_id, "epoch": epoch, "version": VERSION}) + "\n"
        (folder / ORIGIN_FILE).write_text(origin, encoding="utf-8")
        give_usual_mode(folder)

    def snapshot(self, path: Path) -> int:
        """Hard-link the newest checkpoint to ``path``, so that its reader is not disturbed by the next one.

        Returns its epoch, or 0 if there is none.
        """
        shutil.rmtree(path, ignore_errors=True)
        with self.lock:
            if self.last_epoch == 0:
                return 0
            shutil.copytree(self.path, path, copy_function=os.link)
            return self.last_epoch


class CheckpointNotice(threading.Thread):
    """Tells the trainers which epoch is stored: those that reach the end of the run wait until their state is."""

    def __init__(self, store: CheckpointStore, dht, run_id: str, public_key: bytes, *, stop):
        super().__init__(name="checkpoint notice", daemon=True)
        self.store, self.dht, self.run_id, self.public_key, self.stop = store, dht, run_id, public_key, stop

    def run(self) -> None:
        published, publish_at = None, 0.0
        while True:
            epoch, now = self.store.last_epoch, time.monotonic()
            if epoch != published or now >= publish_at:
                try:
                    store_checkpoint_epoch(self.dht, self.run_id, self.public_key, epoch, NOTICE_EXPIRES_SECONDS)
                except Exception as error:  # the DHT may be about to end
                    logger.debug("could not publish what is stored: %r", error)
                published, publish_at = epoch, now + NOTICE_SECONDS
            if self.stop.wait(POLL_SECONDS):
                return
