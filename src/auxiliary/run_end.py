"""What an auxiliary peer does when the run has reached its last epoch: keep, score, upload and name its model."""

import shlex
import threading
import time

from src.auxiliary.checkpoints import CheckpointStore
from src.auxiliary.evaluator import Evaluator
from src.auxiliary.uploader import Uploader
from src.metrics.console import Progress
from src.metrics.report import Reporter

POLL_SECONDS = 0.2


class RunEnd:
    """Brings a run to its end once the state of its last epoch is stored; afterwards the peer only stays.

    All parts but ``reporter`` may be missing: a peer that stores nothing only says that the run is complete.
    """

    def __init__(
        self,
        run_id: str,
        total_steps: int,
        *,
        store: CheckpointStore | None,
        evaluator: Evaluator | None = None,
        uploader: Uploader | None = None,
        reporter: Reporter,
        progress: Progress,
        stop,
    ):
        self.run_id, self.total_steps, self.store = run_id, total_steps, store
        self.evaluator, self.uploader, self.reporter = evaluator, uploader, reporter
        self.progress, self.stop = progress, stop

    def complete(self) -> None:
        """Score and upload what is stored, write the report, say where the model is; a stop ends it at any point."""
        if self.store is not None:
            self._wait_for_scores_and_upload(self.store.last_epoch)
        if self.stop.is_set():
            return
        self.reporter.write()
        self.progress.say(
            f"run {self.run_id} is complete: its trainers have reached the last epoch, {self.total_steps} "
            "(this peer stays until Ctrl+C)"
        )
        if self.store is not None:
            self.progress.say(f"its model is in {self.store.path}{self._where_else()}")
            command = ["python", "finetune_mlm.py", "-t", "RuCoLA", "-c", str(self.store.path)]
            self.progress.say(f"evaluate it with  {shlex.join(command)}")

    def _wait_for_scores_and_upload(self, epoch: int) -> None:
        waited_for = []
        if self.evaluator is not None:
            waited_for.append((self.evaluator, lambda: self.evaluator.scored_epoch >= epoch))
        if self.uploader is not None:
            self.uploader.hurry()
            waited_for.append((self.uploader, lambda: self.uploader.tried_epoch >= epoch))
        for thread, is_done in waited_for:
            while thread.is_alive() and not is_done() and not self.stop.wait(POLL_SECONDS):
                pass

    def wait_for(self, threads: list[threading.Thread], *, seconds: float) -> None:
        """After a stop: a round that is under way may end, and so may an upload; what is not uploaded then is named."""
        give_up_at = time.monotonic() + seconds
        for thread in threads:
            thread.join(max(0.0, give_up_at - time.monotonic()))
        if self.uploader is not None:
            self.uploader.say_what_is_missing()

    def _where_else(self) -> str:
        uploader = self.uploader
        if uploader is None:
            return ""
        if uploader.is_behind:
            return f"; not uploaded to {uploader.repo_id} yet: tried again every {uploader.retry_seconds:.0f} s"
        return f" and uploaded to {uploader.repo_id}"
