"""An auxiliary peer lends its bandwidth to the trainers' rounds of averaging."""

import logging
import threading
from dataclasses import replace

from src.metrics.journal import Journal
from src.swarm.optimizer import LeanOptimizer

logger = logging.getLogger(__name__)


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
