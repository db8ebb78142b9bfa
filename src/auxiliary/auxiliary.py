"""What an auxiliary peer does for the swarm: help to average, store, score and upload checkpoints."""

import json
import logging
import os
import queue
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import close_session
from safetensors import SafetensorError

from src.export.export import complete, what_stays
from src.export.model_card import CURVE_FILE, draw_curve, held_out_curve, learning_curve, model_card
from src.metrics.console import Progress, format_seconds
from src.metrics.journal import Journal, read_journal
from src.metrics.records import HeldOut
from src.models.checkpoint import give_usual_mode
from src.models.hub import LOOK_AT_THE_NETWORK, SLOW_UPLINK, explain_hub_error
from src.swarm.dht import store_checkpoint_epoch
from src.swarm.optimizer import LeanOptimizer

logger = logging.getLogger(__name__)

RETRY_SECONDS = 60.0
ANSWER_SECONDS = 600.0  # of an attempt to upload, for all that is not sending; SLOW_UPLINK limits that
POLL_SECONDS = 0.5
# The record by which trainers know that somebody stores checkpoints: who has died is waited for no longer than that.
NOTICE_SECONDS, NOTICE_EXPIRES_SECONDS = 5.0, 20.0


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
            self.journal.record(replace(averaging_round, epoch=tracker.global_epoch))


ORIGIN_FILE = "checkpoint.json"  # {"run_id": ..., "epoch": ...}
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


class CheckpointStore:
    """Keeps the newest state of the swarm as a directory that ``from_pretrained`` opens.

    The directory says which epoch it holds, so that a peer that is started again goes on from there.
    ``self.lock`` is held while the directory changes.
    """

    def __init__(self, path: Path, model, tokenizer, optimizer: LeanOptimizer, *, run_id: str, every_epochs: int):
        old = self._neighbours(path)[1]
        if old.exists() and not path.exists():  # killed in the middle of a swap
            old.rename(path)
        refuse_foreign_directory(path)  # it will be replaced as a whole
        self.path, self.model, self.tokenizer, self.optimizer, self.run_id = path, model, tokenizer, optimizer, run_id
        self.every_epochs, self.last_epoch = every_epochs, stored_epoch(path, run_id)
        self.lock = threading.Lock()

    @staticmethod
    def _neighbours(path: Path) -> tuple[Path, Path]:
        """Where the next checkpoint is written, and where the last one goes while they change places."""
        return path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")

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
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters()):
            raise ValueError("the downloaded parameters are not finite")
        return epoch

    def _save(self, epoch: int) -> None:
        """Write aside, then swap: at any moment one complete checkpoint exists."""
        aside, old = self._neighbours(self.path)
        shutil.rmtree(aside, ignore_errors=True)
        try:
            self._write(aside, epoch)
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

    def _write(self, folder: Path, epoch: int) -> None:
        self.model.config.sparse_prediction = False  # a training option; users want logits everywhere
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        origin = json.dumps({"run_id": self.run_id, "epoch": epoch}) + "\n"
        (folder / ORIGIN_FILE).write_text(origin, encoding="utf-8")
        give_usual_mode(folder)
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
        while not self.stop.wait(POLL_SECONDS):
            if self.store.last_epoch > self.scored_epoch:
                self.score()

    def score(self) -> None:
        """Score the newest checkpoint; a failure is reported and the next checkpoint gets its turn."""
        folder, epoch = self.store.path.with_name(f".{self.store.path.name}.held_out"), self.store.last_epoch
        try:
            epoch = self.store.snapshot(folder)
            scores = self.evaluate(folder)
            self.journal.record(HeldOut(epoch=epoch, **scores))
            self.progress.say(
                f"epoch {epoch} on held-out text: loss {scores['loss']:.3f}, "
                f"{scores['accuracy']:.1%} of the words, {scores['order_accuracy']:.1%} of the orders right"
            )
        except Exception as error:  # whatever the data or the disk do, the peer goes on
            self.progress.say(f"no held-out scores for epoch {epoch}: {error or repr(error)}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            self.scored_epoch = epoch  # last: who waits for the scores may read them now


def make_public(folder: Path, epoch: int, *, store: CheckpointStore, name: str, metrics: Path) -> None:
    """Turn a copy of a checkpoint into what `src.export.export` makes: with a model card, opened by transformers."""
    records = [record for record in read_journal(metrics) if isinstance(record, dict)]
    origin = f"This is epoch {epoch} of the run `{store.run_id}`, as one of its auxiliary peers has uploaded it."
    card = model_card(name=name, model=store.model, tokenizer=store.tokenizer, license_name=None, data=None,
                      metrics=records, ledger=[], origin=origin)  # fmt: skip
    curve = learning_curve(records)
    picture = {CURVE_FILE: draw_curve(curve, held_out_curve(records))} if curve else {}
    complete(folder, store.tokenizer, {"README.md": card, **picture})


class Uploader(threading.Thread):
    """Uploads the newest checkpoint every ``interval`` seconds, at once after `hurry`, and when the peer is stopped.

    A failed upload is reported and tried again. ``tried_epoch``: of the last attempt, whether it succeeded or not.
    ``prepare(folder, epoch)`` makes of a copy of the checkpoint what is uploaded.
    """

    def __init__(
        self, store: CheckpointStore, repo_id: str, api, *, prepare, interval: float, progress: Progress, stop
    ):
        super().__init__(name="uploader", daemon=True)
        self.store, self.repo_id, self.api, self.prepare = store, repo_id, api, prepare
        self.interval, self.progress, self.stop = interval, progress, stop
        self.uploaded_epoch = self.tried_epoch = 0
        self.has_looked = False  # at what the repository held before
        self.is_wanted_now = threading.Event()

    def run(self) -> None:
        wait = self.interval
        while not self._is_stopped_within(wait):
            wait = self.interval if self.upload() else self.retry_seconds
        if self.is_behind:
            self.progress.say(f"uploading epoch {self.store.last_epoch} to {self.repo_id} before leaving")
            self.upload()

    @property
    def retry_seconds(self) -> float:
        return min(self.interval, RETRY_SECONDS)

    @property
    def is_behind(self) -> bool:
        """Whether something is stored that is not uploaded."""
        return self.store.last_epoch > self.uploaded_epoch

    def hurry(self) -> None:
        self.is_wanted_now.set()

    def _is_stopped_within(self, seconds: float) -> bool:
        wake_up_at = time.monotonic() + seconds
        while (left := wake_up_at - time.monotonic()) > 0 and not self.is_wanted_now.is_set():
            if self.stop.wait(min(left, POLL_SECONDS)):
                return True
        self.is_wanted_now.clear()
        return self.stop.is_set()

    def upload(self) -> bool:
        """One upload of the newest checkpoint, if there is a new one; False if it failed."""
        epoch = self.store.last_epoch
        if epoch <= self.uploaded_epoch:
            return True
        folder = self.store.path.with_name(f".{self.store.path.name}.upload")
        try:
            epoch = self.store.snapshot(folder)
            if epoch == 0:
                return True
            self.prepare(folder, epoch)
            self._send_within_limit(folder, epoch)
            self.uploaded_epoch = epoch
            self.progress.say(f"uploaded epoch {epoch} to {self.repo_id}")
            return True
        except Exception as error:  # whatever the network does, the peer goes on
            reason, advice = explain_hub_error(error)
            then = f"epoch {epoch} is in {self.store.path} only" if self.stop.is_set() else "will try again"
            advice = "" if advice == LOOK_AT_THE_NETWORK else f"; {advice}"  # it may also have been the disk
            self.progress.say(f"upload to {self.repo_id} failed, {then}: {reason}{advice}")
            return False
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            self.tried_epoch = epoch

    def _send_within_limit(self, folder: Path, epoch: int) -> None:
        """Raises TimeoutError when not even a slow line is a reason any more, whatever it is that the hub does."""
        outcome: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

        def send() -> None:
            try:
                self._send(folder, epoch)
                outcome.put(None)
            except Exception as error:
                outcome.put(error)

        seconds = ANSWER_SECONDS + sum(path.stat().st_size for path in folder.iterdir()) / SLOW_UPLINK
        threading.Thread(target=send, name="upload", daemon=True).start()
        try:
            error = outcome.get(timeout=seconds)
        except queue.Empty:
            close_session()  # which ends that attempt
            raise TimeoutError(f"not finished within {format_seconds(seconds)}") from None
        if error is not None:
            raise error

    def _send(self, folder: Path, epoch: int) -> None:
        self.api.create_repo(self.repo_id, exist_ok=True)
        if not self.has_looked:
            if stays := what_stays(self.api, self.repo_id, sorted(folder.iterdir())):
                self.progress.say(stays)
            self.has_looked = True
        self.api.upload_folder(repo_id=self.repo_id, folder_path=str(folder), commit_message=f"Epoch {epoch}")

    def say_what_is_missing(self) -> None:
        """To be called when the peer leaves: an upload that was begun may have got no further."""
        if self.is_alive() and self.is_behind:
            self.progress.say(
                f"no time left: epoch {self.store.last_epoch} is not uploaded to {self.repo_id}; it is in "
                f"{self.store.path}, and is uploaded when this peer runs again"
            )
