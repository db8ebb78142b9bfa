"""Scores of stored checkpoints on held-out text."""

import logging
import os
import shutil
import threading

from src.auxiliary.checkpoints import CheckpointStore
from src.metrics.console import Progress
from src.metrics.journal import Journal
from src.metrics.records import HeldOut

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5


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
                f"epoch {epoch} on held-out text: masked-token loss {scores['loss']:.3f}, accuracy "
                f"{scores['accuracy']:.1%}; sentence-order accuracy {scores['order_accuracy']:.1%}"
            )
        except Exception as error:  # whatever the data or the disk do, the peer goes on
            self.progress.say(f"no held-out scores for epoch {epoch}: {error or repr(error)}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            self.scored_epoch = epoch  # last: who waits for the scores may read them now
