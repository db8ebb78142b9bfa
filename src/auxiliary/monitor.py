"""What the auxiliary peer sees of the swarm: one summary an epoch, one row a trainer, all of it in the metrics file."""

import math
import time
from collections.abc import Callable
from statistics import median_high, median_low

from src.auxiliary.checkpoints import CheckpointStore
from src.console import counted, rate
from src.metrics.console import Progress, describe_loss
from src.metrics.journal import Journal, report_refusals
from src.metrics.records import Checkpoint, PeerReport, SwarmEpoch, printable
from src.swarm.dht import TrainerMetrics, fetch_metrics, fetch_progress, short_peer_name
from src.swarm.join import Swarm
from src.swarm.memory_watch import MemoryWatch

MAX_LEAD = 20  # epochs by which one half of the trainers may be ahead of the other half
LOOKS_UNTIL_GONE, LOOKS_UNTIL_REWOUND = 5, 3
NOTICE_END_SECONDS = 0.5
LOOKS_FOR_LAST_REPORTS = 3  # a second apart: a trainer's report may come later than its state
KEPT_EPOCHS = 5  # by which the state for whoever joins a swarm of clients may be behind before it is taken anew
LONGEST_PAUSE_SECONDS = 60.0  # between two attempts to get the last state


class MetricsMonitor:
    """Turns what trainers publish into one summary an epoch.

    A trainer's record holds its newest epoch only. An epoch is summed up when every trainer has reported it, or one
    look later: some never will, and when epochs are shorter than looks it is then the newest one.

    Whoever claims an epoch that fewer than half of the trainers have reached is left out; those who report nothing new
    while others do are gone, and not counted for that. If most go on from an earlier epoch, so does this monitor.
    """

    def __init__(self):
        self.last_epoch, self._waited_after = 0, -1  # a look was waited for the others after that summary
        self._num_looks = self._num_behind = 0  # looks in all; in a row at which most were far behind the last summary
        self._seen: dict[bytes, TrainerMetrics] = {}
        self._looked: dict[bytes, tuple[TrainerMetrics, int]] = {}  # the newest record, and at which look it was new

    def new_reports(self, metrics: dict[bytes, TrainerMetrics]) -> list[tuple[str, TrainerMetrics]]:
        """Names and records of the trainers that have reported something since the last look."""
        changed = {key: record for key, record in metrics.items() if self._seen.get(key) != record}
        self._seen = {key: self._seen.get(key) for key in metrics} | changed  # those that are gone are forgotten
        return [(short_peer_name(key), record) for key, record in changed.items()]

    def summarise(self, metrics: dict[bytes, TrainerMetrics], *, at_most: float = math.inf) -> SwarmEpoch | None:
        """The summary of a new epoch, or None if there is nothing new. No epoch is believed above ``at_most``."""
        metrics = {key: record for key, record in metrics.items() if record.epoch <= at_most}
        if not metrics:
            return None
        reached = self._epoch_of_most(metrics)
        metrics = {key: record for key, record in metrics.items() if record.epoch <= reached}
        epoch = max(record.epoch for record in metrics.values())
        self._num_behind = self._num_behind + 1 if epoch < self.last_epoch - 1 and self._has_news else 0
        if self._num_behind >= LOOKS_UNTIL_REWOUND:
            self.last_epoch = epoch - 1
        if epoch <= self.last_epoch:
            return None
        reports = [record for record in metrics.values() if record.epoch == epoch]
        if len(reports) < len(metrics) and self._waited_after != self.last_epoch:
            self._waited_after = self.last_epoch
            return None
        self.last_epoch = epoch
        mini_steps = max(1, sum(record.mini_steps for record in reports))
        return SwarmEpoch(
            epoch=epoch,
            loss=sum(record.loss for record in reports) / mini_steps,
            mlm_loss=sum(record.mlm_loss for record in reports) / mini_steps,
            sop_loss=sum(record.sop_loss for record in reports) / mini_steps or None,
            samples=sum(record.samples for record in reports),
            samples_per_second=sum(record.samples_per_second for record in reports),
            alive_peers=len(reports),
            failed_rounds=sum(record.failed_rounds for record in reports),
        )

    def _epoch_of_most(self, metrics: dict[bytes, TrainerMetrics]) -> int:
        """The newest epoch that more than half of those who report have reached, or half if the others are near."""
        self._num_looks += 1
        self._looked = {
            key: old if (old := self._looked.get(key)) is not None and old[0] == record else (record, self._num_looks)
            for key, record in metrics.items()
        }
        newest_look = max(look for _, look in self._looked.values())
        self._has_news = newest_look == self._num_looks
        epochs = [record.epoch for record, look in self._looked.values() if look > newest_look - LOOKS_UNTIL_GONE]
        low, high = median_low(epochs), median_high(epochs)
        return high if high <= low + MAX_LEAD else low


class Watch:
    """Reports the trainers' metrics and keeps the checkpoint fresh, to the run's end and beyond, until ``stop`` is set.

    Whatever ``--save_checkpoint_epoch_interval`` says, the state of the last epoch, ``total_steps``, is stored as soon
    as trainers have reached it: they wait for that before they leave.
    """

    def __init__(
        self,
        swarm: Swarm,
        run_id: str,
        *,
        total_steps: int,
        journal: Journal,
        store: CheckpointStore | None,
        progress: Progress,
        stop,
    ):
        self.swarm, self.run_id, self.total_steps = swarm, run_id, total_steps
        self.journal, self.store, self.progress, self.stop = journal, store, progress, stop
        self.monitor = MetricsMonitor()
        self.memory = MemoryWatch(journal, say=progress.say)
        self._has_looked = self._said_kept = False
        self._said_troubles: set[str] = set()

    def run(self, *, period: float, when_over: Callable[[], None] = lambda: None) -> None:
        """Look every ``period`` seconds; call ``when_over`` once, when the run is over and its last state stored."""
        completed = False
        while not self._is_stopped_within(period, until_over=not completed):
            self.look()
            if completed or not self.is_over():
                self._store_if_due()
            elif self._store_last_state():
                self._look_for_last_reports()
                when_over()
                completed = True

    def is_over(self) -> bool:
        """Whether the run has reached its last epoch, as far as this peer knows."""
        stored = self.store.last_epoch if self.store is not None else 0
        return max(self.swarm.optimizer.tracker.global_epoch, self.monitor.last_epoch, stored) >= self.total_steps

    def _is_stopped_within(self, seconds: float, *, until_over: bool) -> bool:
        """Wait for the next look; the end of the run is noticed before it is due."""
        wake_up_at = time.monotonic() + seconds
        while (left := wake_up_at - time.monotonic()) > 0 and not (until_over and self.is_over()):
            if self.stop.wait(min(left, NOTICE_END_SECONDS)):
                return True
        return self.stop.is_set()

    def look(self) -> None:
        """Pass on what trainers have published since the last look."""
        metrics = fetch_metrics(self.swarm.dht, self.run_id)
        self.progress.peers_seen(fetch_progress(self.swarm.dht, self.run_id))
        reports = self.monitor.new_reports(metrics)
        for name, record in reports:
            self.journal.record(PeerReport(
                peer=name, epoch=record.epoch, samples=record.samples, total_samples=record.total_samples,
                samples_per_second=round(record.samples_per_second, 3), failed_rounds=record.failed_rounds,
                lone_epochs=record.lone_epochs, computing=record.computing, bytes_sent=record.bytes_sent,
                bytes_received=record.bytes_received, failure=printable(record.failure),
            ))  # fmt: skip
        report_refusals(self.swarm.optimizer.take_refusals(), self.journal, self.progress.say)
        possible = self.swarm.optimizer.tracker.highest_plausible_epoch()
        summary = self.monitor.summarise(metrics, at_most=possible)
        if summary is not None:
            self.journal.record(summary)
            self.progress.routine(describe(summary))
            self.memory.note(summary.epoch)
        if self._has_looked:  # what is found at first may be years old, of trainers that are gone
            self._notice_rewound_run([record.epoch for _, record in reports], metrics)
        self._has_looked = True

    def _look_for_last_reports(self) -> None:
        for _ in range(LOOKS_FOR_LAST_REPORTS):
            self.look()
            if self.monitor.last_epoch >= self.total_steps or self.stop.wait(1.0):
                return

    def _notice_rewound_run(self, new_epochs: list[int], metrics: dict[bytes, TrainerMetrics]) -> None:
        """Say once that trainers have gone back behind the checkpoint: until they are past it, it is not replaced."""
        if self.store is None or self._said_kept:
            return
        behind = self.store.last_epoch - 1  # the slower trainers of a run may be an epoch behind
        newest = max(new_epochs, default=0)
        if 0 < newest < behind and all(record.epoch < behind for record in metrics.values()):
            self._say_kept(f"the trainers are at epoch {newest}")

    def _say_kept(self, what_is_older: str) -> None:
        self._said_kept = True
        self.progress.say(
            f"{what_is_older}, older than the checkpoint of epoch {self.store.last_epoch} in {self.store.path}: that "
            "one is kept until they are past it. To store what they have now, stop this peer, move the checkpoint "
            "away (or choose another --local_path), and start it again"
        )

    def _store_if_due(self) -> None:
        epoch = self.monitor.last_epoch
        if self.store is not None and epoch > 0 and (self.store.is_due(epoch) or self._is_wanted(epoch)):
            self._store()

    def _is_wanted(self, epoch: int) -> bool:
        """Whether whoever joins needs a newer state from this peer, since no trainer can be asked for one."""
        present = self.swarm.optimizer.tracker.present
        only_clients = bool(present) and all(present.values())
        return only_clients and (self.store.last_epoch == 0 or epoch >= self.store.last_epoch + KEPT_EPOCHS)

    def _store(self) -> None:
        before = self.store.last_epoch
        try:
            epoch = self.store.update(timeout=self.swarm.optimizer.load_state_timeout)
        except (ValueError, OSError) as error:
            if not self.stop.is_set():
                self._say_trouble(f"no checkpoint stored, will try again: {error}")
            return
        self._said_troubles.clear()
        if epoch > before:
            self.journal.record(Checkpoint(epoch, str(self.store.path)))
            self.progress.say(f"stored the state of epoch {epoch} in {self.store.path}")
        elif epoch < before and not self._said_kept:
            self._say_kept(f"a trainer sent the state of epoch {epoch}")

    def _say_trouble(self, trouble: str) -> None:
        """Once, however often it comes before the next checkpoint."""
        if trouble not in self._said_troubles:
            self.progress.say(trouble)
        self._said_troubles.add(trouble)

    def _store_last_state(self) -> bool:
        """Until the last state is on disk, with growing pauses; False if there is none, or the peer is stopped."""
        pause = 1.0
        while self.store is not None and self.store.last_epoch < self.total_steps:
            if self.stop.is_set() or not self.is_over():  # somebody had claimed an epoch that the run is not in
                return False
            self._store()
            if self.store.last_epoch >= self.total_steps:
                break
            if self.swarm.optimizer.tracker.global_progress.num_peers == 0:
                self._say_trouble(
                    f"the trainers have left before the state of the last epoch, {self.total_steps}, was stored; it is "
                    "in their backups: start one of them again with the same flags, and it hands it over"
                )
            self.stop.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            self.look()
        return not self.stop.is_set()


def describe(summary: SwarmEpoch) -> str:
    """One line on an epoch of the whole swarm."""
    failed = f", {counted(summary.failed_rounds, 'round')} of averaging not complete" if summary.failed_rounds else ""
    return (
        f"epoch {summary.epoch}  {describe_loss(summary)}  "
        f"{counted(summary.alive_peers, 'trainer')}, {summary.samples} samples, "
        f"{rate(summary.samples_per_second)}{failed}"
    )
