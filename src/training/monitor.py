"""What the auxiliary peer sees of the swarm: one summary an epoch, one row a trainer, all of it in the metrics file."""

from dataclasses import dataclass
from statistics import median_low

from src.training.console import Progress
from src.training.dht import TrainerMetrics, fetch_metrics, fetch_progress, short_peer_name
from src.training.journal import Journal, printable, report_refusals
from src.training.swarm import Swarm

MAX_LEAD = 50  # epochs by which a report may be ahead of those before it


@dataclass
class EpochSummary:
    """Metrics of all trainers for one epoch; losses are means over forward passes."""

    epoch: int
    loss: float
    mlm_loss: float
    sop_loss: float
    samples: int
    samples_per_second: float
    alive_peers: int
    failed_rounds: int


class MetricsMonitor:
    """Turns what trainers publish into one summary an epoch.

    A trainer's record holds its newest epoch only. An epoch is summed up when every trainer has reported it, or one
    look later: some never will, and when epochs are shorter than looks it is then the newest one.
    """

    def __init__(self):
        self.last_epoch, self.seen_before = 0, -1
        self._seen: dict[bytes, TrainerMetrics] = {}

    def new_reports(self, metrics: dict[bytes, TrainerMetrics]) -> list[tuple[str, TrainerMetrics]]:
        """Names and records of the trainers that have reported something since the last look."""
        changed = {key: record for key, record in metrics.items() if self._seen.get(key) != record}
        self._seen.update(changed)
        return [(short_peer_name(key), record) for key, record in changed.items()]

    def summarise(self, metrics: dict[bytes, TrainerMetrics]) -> EpochSummary | None:
        """The summary of a new epoch, or None if there is nothing new."""
        if not metrics:
            return None
        # whoever claims to be far ahead of most, and of all that was seen, would hide the others
        known = max(self.last_epoch, median_low(record.epoch for record in metrics.values()))
        metrics = {key: record for key, record in metrics.items() if record.epoch <= known + MAX_LEAD}
        epoch = max(record.epoch for record in metrics.values())
        if epoch <= self.last_epoch:
            return None
        reports = [record for record in metrics.values() if record.epoch == epoch]
        if len(reports) < len(metrics) and self.seen_before <= self.last_epoch:
            self.seen_before = epoch
            return None
        self.last_epoch = self.seen_before = epoch
        mini_steps = max(1, sum(record.mini_steps for record in reports))
        return EpochSummary(
            epoch=epoch,
            loss=sum(record.loss for record in reports) / mini_steps,
            mlm_loss=sum(record.mlm_loss for record in reports) / mini_steps,
            sop_loss=sum(record.sop_loss for record in reports) / mini_steps,
            samples=sum(record.samples for record in reports),
            samples_per_second=sum(record.samples_per_second for record in reports),
            alive_peers=len(reports),
            failed_rounds=sum(record.failed_rounds for record in reports),
        )


def watch(swarm: Swarm, run_id: str, *, period: float, journal: Journal, store, progress: Progress, stop) -> None:
    """Report the trainers' metrics and keep the checkpoint fresh until ``stop`` is set."""
    monitor = MetricsMonitor()
    while not stop.wait(period):
        metrics = fetch_metrics(swarm.dht, run_id)
        progress.peers_seen(fetch_progress(swarm.dht, run_id))
        for name, record in monitor.new_reports(metrics):
            journal.write(
                "peer", peer=name, epoch=record.epoch, samples=record.samples, total_samples=record.total_samples,
                samples_per_second=round(record.samples_per_second, 3), failed_rounds=record.failed_rounds,
                lone_epochs=record.lone_epochs, failure=printable(record.failure),
            )  # fmt: skip
        report_refusals(swarm.optimizer.take_refusals(), journal, progress.say)
        summary = monitor.summarise(metrics)
        if summary is not None:
            journal.write("swarm_epoch", **vars(summary))
            progress.routine(describe(summary))
        if store is not None and monitor.last_epoch > 0 and store.is_due(monitor.last_epoch):
            try:
                epoch = store.update(timeout=600.0)
            except (ValueError, OSError) as error:
                progress.say(f"no checkpoint stored, will try again: {error}")
            else:
                journal.write("checkpoint", epoch=epoch, path=str(store.path))
                progress.say(f"stored the state of epoch {epoch} in {store.path}")


def describe(summary: EpochSummary) -> str:
    """One line on an epoch of the whole swarm."""
    failed = f", {summary.failed_rounds} rounds of averaging not complete" if summary.failed_rounds else ""
    return (
        f"epoch {summary.epoch}  loss {summary.loss:.3f} (words {summary.mlm_loss:.3f}, order {summary.sop_loss:.3f})  "
        f"{summary.alive_peers} trainers, {summary.samples} samples, {summary.samples_per_second:.1f}/s{failed}"
    )
