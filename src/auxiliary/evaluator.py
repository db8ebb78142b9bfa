"""Scores of stored checkpoints on held-out text, and on pairs of sentences of which one is grammatical."""

import contextlib
import logging
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from src.auxiliary.checkpoints import CheckpointStore, refuse_foreign_directory
from src.files import replaced_directory
from src.metrics.console import Progress
from src.metrics.journal import Journal, records_in
from src.metrics.records import HeldOut, MinimalPairs, read_record

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
Scorer = Callable[[Path], dict[str, float]]  # of a checkpoint's directory


class Evaluator(threading.Thread):
    """Scores each stored checkpoint, in the background and with low priority.

    ``evaluate(folder)`` gives the scores on held-out text by name, ``judge_pairs(folder)`` those on minimal pairs; one
    of them may be None. When checkpoints come faster than scores, some are passed over. The one with the best held-out
    loss is kept next to the newest; one whose loss is more than ``margin`` nats above the best is named.
    """

    def __init__(
        self,
        store: CheckpointStore,
        evaluate: Scorer | None,
        judge_pairs: Scorer | None = None,
        *,
        margin: float,
        journal: Journal,
        progress: Progress,
        stop,
    ):
        super().__init__(name="evaluator", daemon=True)
        self.best_path, self.margin = store.path.with_name(f"{store.path.name}-best"), margin
        refuse_foreign_directory(self.best_path)  # it will be replaced as a whole
        self.best_loss, self.best_epoch = best_score(journal)  # of an earlier start, too
        self.store, self.evaluate, self.judge_pairs = store, evaluate, judge_pairs
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
        with self._going_on("scores", epoch):
            epoch = self.store.snapshot(folder)
            if self.evaluate is not None:
                with self._going_on("held-out scores", epoch):
                    self._take_held_out(folder, epoch, self.evaluate(folder))
            if self.judge_pairs is not None:
                with self._going_on("scores on minimal pairs", epoch):
                    self._take_pairs(epoch, self.judge_pairs(folder))
        shutil.rmtree(folder, ignore_errors=True)
        self.scored_epoch = epoch  # last: who waits for the scores may read them now

    @contextlib.contextmanager
    def _going_on(self, what: str, epoch: int) -> Iterator[None]:
        """Whatever the data or the disk do, the peer goes on."""
        try:
            yield
        except Exception as error:
            self.progress.say(f"no {what} for epoch {epoch}: {error or repr(error)}")

    def _take_held_out(self, folder: Path, epoch: int, scores: dict[str, float]) -> None:
        self.journal.record(HeldOut(epoch=epoch, **scores))
        of_order = scores["order_accuracy"]
        order = "" if of_order is None else f"; sentence-order accuracy {of_order:.1%}"
        self.progress.say(
            f"epoch {epoch} on held-out text: masked-token loss {scores['loss']:.3f}, accuracy "
            f"{scores['accuracy']:.1%}{order}"
        )
        self._compare(folder, epoch, scores["loss"])

    def _take_pairs(self, epoch: int, scores: dict[str, float]) -> None:
        record = MinimalPairs(epoch=epoch, **scores)
        self.journal.record(record)
        self.progress.say(
            f"epoch {epoch} on minimal pairs: {record.accuracy:.1%} of {record.num_pairs} right "
            f"(95 % interval {record.low:.1%} to {record.high:.1%}; chance 50 %)"
        )

    def _compare(self, folder: Path, epoch: int, loss: float) -> None:
        if loss < self.best_loss:
            try:
                with replaced_directory(self.best_path) as kept:
                    shutil.copytree(folder, kept, copy_function=os.link, dirs_exist_ok=True)
                self.best_loss, self.best_epoch = loss, epoch
            except OSError as error:  # such as a full disk; shutil's holds a list of them
                self.progress.say(f"epoch {epoch} is the best so far, but cannot be kept in {self.best_path}: {error}")
        elif not loss <= self.best_loss + self.margin:  # NaN, too
            kept = f", kept in {self.best_path}" if self.best_path.is_dir() else ""
            self.progress.say(
                f"WORSE: the held-out loss of epoch {epoch} is {loss - self.best_loss:.3f} above the best, "
                f"{self.best_loss:.3f} at epoch {self.best_epoch}{kept} (--eval_margin {self.margin:g}); what to do: "
                "docs/operate.md"
            )


def best_score(journal: Journal) -> tuple[float, int]:
    """The least held-out loss that a metrics file tells of, and its epoch; (inf, 0) without one."""
    found = filter(None, map(read_record, records_in(journal.path)))
    scores = (record for _, record in found if isinstance(record, HeldOut) and record.loss is not None)
    return min(((score.loss, score.epoch) for score in scores), default=(math.inf, 0))
