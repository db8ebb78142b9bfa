"""What an auxiliary peer does for the swarm: help to average, store, score and upload checkpoints."""

import logging
import os
import shutil
import threading
from pathlib import Path

import torch
from safetensors import SafetensorError

from src.training.console import Progress
from src.training.journal import Journal
from src.training.optimizer import LeanOptimizer

logger = logging.getLogger(__name__)

RETRY_SECONDS = 60.0


class AveragingAssistant(threading.Thread):
    """Joins the trainers' averaging rounds as a reducer without tensors of its own."""

    def __init__(self, optimizer: LeanOptimizer, journal: Journal, *, period: float, stop):
        super().__init__(name="averaging assistant", daemon=True)
        self.optimizer, self.journal, self.period, self.stop = optimizer, journal, period, stop

    def run(self) -> None:
        while not self.stop.wait(self.period):
            try:
                self.assist()
            except Exception as error:
                logger.warning("could not assist in averaging: %r", error)

    def assist(self) -> None:
        """Be ready for the next rounds, and record those that are over."""
        tracker = self.optimizer.tracker
        if tracker.global_progress.num_peers > 1:
            self.optimizer.assist()
        for averaging_round in self.optimizer.finished_rounds():
            self.journal.write("round", epoch=tracker.global_epoch, complete=averaging_round.complete,
                               **vars(averaging_round))  # fmt: skip


# What the files of a checkpoint begin with, in whatever version of transformers it was written.
CHECKPOINT_FILES = ("config", "model", "tokenizer", "special_tokens", "spiece", "added_tokens", "vocab", "merges")


def refuse_foreign_directory(path: Path) -> None:
    """Raises ValueError if something is at ``path`` that is not a checkpoint: it would be lost."""
    if path.is_file():
        raise ValueError(f"--local_path: {path} is a file; name a directory for checkpoints alone")
    foreign = [entry.name for entry in path.glob("*") if not entry.name.startswith(CHECKPOINT_FILES)]
    if foreign:
        raise ValueError(f"--local_path: {path} holds {min(foreign)}; name a directory for checkpoints alone")


class CheckpointStore:
    """Keeps the newest state of the swarm as a directory that ``from_pretrained`` opens.

    ``swarm_lock`` is held while the optimizer's parameters change, ``self.lock`` while the directory does.
    """

    def __init__(self, path: Path, model, tokenizer, optimizer: LeanOptimizer, *, swarm_lock, every_epochs: int):
        refuse_foreign_directory(path)  # it will be replaced as a whole
        self.path, self.model, self.tokenizer, self.optimizer = path, model, tokenizer, optimizer
        self.swarm_lock, self.every_epochs, self.last_epoch = swarm_lock, every_epochs, 0
        self.lock = threading.Lock()

    def is_due(self, epoch: int) -> bool:
        return epoch >= self.last_epoch + self.every_epochs

    def update(self, *, timeout: float) -> int:
        """Fetch the state from a trainer and save it; returns its epoch.

        Raises ValueError if no trainer could give it or if it is damaged, OSError if it cannot be written.
        """
        with self.swarm_lock:
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
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters()):
            raise ValueError("the downloaded parameters are not finite")
        return epoch

    def _save(self, epoch: int) -> None:
        """Write aside, then swap: at any moment one complete checkpoint exists."""
        aside, old = (self.path.with_name(f".{self.path.name}.{suffix}") for suffix in ("part", "old"))
        shutil.rmtree(aside, ignore_errors=True)
        try:
            self._write(aside)
        except BaseException as error:
            shutil.rmtree(aside, ignore_errors=True)
            if isinstance(error, SafetensorError):  # no OSError, although it means a full disk
                raise OSError(f"cannot write {self.path}: {error}") from error
            raise
        with self.lock:
            shutil.rmtree(old, ignore_errors=True)
            if self.path.exists():
                self.path.rename(old)
            aside.rename(self.path)
            self.last_epoch = epoch
        shutil.rmtree(old, ignore_errors=True)

    def _write(self, folder: Path) -> None:
        self.model.config.sparse_prediction = False  # a training option; users want logits everywhere
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        for file in folder.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())

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


class Evaluator(threading.Thread):
    """Scores each stored checkpoint on held-out text, in the background and with low priority.

    ``evaluate(folder)`` gives the scores by name. When checkpoints come faster than scores, some are passed over.
    """

    def __init__(self, store: CheckpointStore, evaluate, *, journal: Journal, progress: Progress, stop):
        super().__init__(name="evaluator", daemon=True)
        self.store, self.evaluate = store, evaluate
        self.journal, self.progress, self.stop = journal, progress, stop
        self.scored_epoch = 0

    def run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)  # this thread's: averaging comes first
        while not self.stop.wait(0.5):
            if self.store.last_epoch > self.scored_epoch:
                self.score()

    def score(self) -> None:
        """Score the newest checkpoint; a failure is reported and the next checkpoint gets its turn."""
        folder = self.store.path.with_name(f".{self.store.path.name}.held_out")
        try:
            self.scored_epoch = self.store.snapshot(folder)
            scores = self.evaluate(folder)
        except Exception as error:  # whatever the data or the disk do, the peer goes on
            self.scored_epoch = self.store.last_epoch
            self.progress.say(f"no held-out scores for epoch {self.scored_epoch}: {error or repr(error)}")
            return
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.journal.write("held_out", epoch=self.scored_epoch, **scores)
        self.progress.say(
            f"epoch {self.scored_epoch} on held-out text: loss {scores['loss']:.3f}, "
            f"{scores['accuracy']:.1%} of the words, {scores['order_accuracy']:.1%} of the orders right"
        )


class Uploader(threading.Thread):
    """Uploads the newest checkpoint every ``interval`` seconds; a failed upload is reported and tried again."""

    def __init__(self, store: CheckpointStore, repo_id: str, api, *, interval: float, progress: Progress, stop):
        super().__init__(name="uploader", daemon=True)
        self.store, self.repo_id, self.api = store, repo_id, api
        self.interval, self.progress, self.stop = interval, progress, stop
        self.uploaded_epoch = 0

    def run(self) -> None:
        wait = self.interval
        while not self.stop.wait(wait):
            wait = self.interval if self.upload() else min(self.interval, RETRY_SECONDS)

    def upload(self) -> bool:
        """One upload of the newest checkpoint, if there is a new one; False if it failed."""
        epoch = self.store.last_epoch
        if epoch <= self.uploaded_epoch:
            return True
        folder = self.store.path.with_name(f".{self.store.path.name}.upload")
        try:
            if not self.store.snapshot(folder):
                return True
            self.api.create_repo(self.repo_id, exist_ok=True)
            self.api.upload_folder(repo_id=self.repo_id, folder_path=str(folder), commit_message=f"Epoch {epoch}")
        except Exception as error:  # whatever the network does, the peer goes on
            reason = (str(error).splitlines() or [repr(error)])[0]
            self.progress.say(f"upload to {self.repo_id} failed, will try again: {reason}")
            return False
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.uploaded_epoch = epoch
        self.progress.say(f"uploaded epoch {epoch} to {self.repo_id}")
        return True
