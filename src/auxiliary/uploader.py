"""Stored checkpoints on their way to the Hugging Face hub."""

import logging
import queue
import shutil
import threading
import time
from pathlib import Path

from huggingface_hub import close_session

from src.auxiliary.checkpoints import CheckpointStore, epoch_name
from src.console import format_seconds
from src.export.export import complete, what_stays
from src.export.model_card import CURVE_FILE, draw_curve, held_out_curve, learning_curve, model_card
from src.metrics.console import Progress
from src.metrics.journal import read_journal
from src.models.hub import LOOK_AT_THE_NETWORK, SLOW_UPLINK, explain_hub_error

logger = logging.getLogger(__name__)

RETRY_SECONDS = 60.0
ANSWER_SECONDS = 600.0  # of an attempt to upload, for all that is not sending; SLOW_UPLINK limits that
POLL_SECONDS = 0.5


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
        commit = self.api.upload_folder(repo_id=self.repo_id, folder_path=str(folder), commit_message=f"Epoch {epoch}")
        if self.store.keep:
            self._tag(epoch, commit.oid)

    def _tag(self, epoch: int, revision: str) -> None:
        """Give a revision a name under which `from_pretrained` finds it; without one it is there all the same."""
        try:
            self.api.create_tag(self.repo_id, tag=epoch_name(epoch), revision=revision, exist_ok=True)
        except Exception as error:  # as in `upload`
            reason, _ = explain_hub_error(error)
            self.progress.say(f"epoch {epoch} is uploaded as revision {revision}, but could not be tagged: {reason}")

    def say_what_is_missing(self) -> None:
        """To be called when the peer leaves: an upload that was begun may have got no further."""
        if self.is_alive() and self.is_behind:
            self.progress.say(
                f"no time left: epoch {self.store.last_epoch} is not uploaded to {self.repo_id}; it is in "
                f"{self.store.path}, and is uploaded when this peer runs again"
            )
