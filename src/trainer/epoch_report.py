"""What a trainer tells of its epochs and rounds: to its metrics file, to its person, and to the swarm."""

import re
import time
from dataclasses import replace

from src.metrics.console import Progress
from src.metrics.journal import Journal, report_refusals
from src.metrics.records import LoneEpoch, Round, TrainerEpoch, share_computing
from src.swarm.dht import MAX_REASON_LENGTH, TrainerMetrics, store_metrics
from src.swarm.join import Swarm
from src.swarm.memory_watch import MemoryWatch
from src.swarm.rounds import GIVEN_UP
from src.trainer.hf_trainer import LossMeter


class EpochReport:
    """Counts between one epoch and the next; `finish` reports them.

    ``expiration``: seconds for which what is published stays. ``total_steps``: epochs of the run.
    """

    def __init__(
        self,
        swarm: Swarm,
        meter: LossMeter,
        *,
        run_id: str,
        total_steps: int,
        expiration: float,
        journal: Journal,
        progress: Progress,
    ):
        self.swarm, self.optimizer, self.meter = swarm, swarm.optimizer, meter
        self.run_id, self.total_steps, self.expiration = run_id, total_steps, expiration
        self.journal, self.progress = journal, progress
        self.memory = MemoryWatch(journal, say=progress.say)
        self.rounds: list[Round] = []
        self.waits: list[float] = []  # seconds inside the swarm's optimizer, by local step
        self.total_samples = self.lone_epochs = 0  # since the start
        self.total_seconds = self.total_waited = 0.0
        self.total_sent = self.total_received = 0  # bytes
        self.last_inner_steps = 0
        self.num_downloads, self.epoch_started = 0, time.monotonic()
        self.joined_at = 0  # the epoch at which this trainer last had the state of others

    def start_clock(self) -> None:
        self.epoch_started = time.monotonic()

    def record_downloads(self, *, batch: int) -> None:
        """States that were taken from others; with each, the samples of this epoch and of this ``batch`` are lost."""
        for download in self.optimizer.finished_downloads():
            lost = download.lost_samples + batch
            self.meter.lose(lost)
            self.num_downloads += 1
            self.journal.record(replace(download, lost_samples=lost))
            if download.was_apart:
                self.progress.say(
                    f"two swarms of this run have met: took the state of epoch {download.to_epoch} of the one that is "
                    f"ahead, and gave up this one's epoch {download.from_epoch}, with what it had learned apart "
                    f"(epochs: {download.from_epoch - self.joined_at} at most; samples since: {lost})"
                )
            elif lost:
                self.progress.say(
                    f"fell behind the swarm: took its state of epoch {download.to_epoch} in {download.seconds:.0f} s "
                    f"and gave up {lost} samples of epoch {download.from_epoch + 1}; if this happens often, shorten "
                    "local steps (--gradient_accumulation_steps) or look at the network"
                )
            self.joined_at = download.to_epoch

    def record_rounds(self) -> None:
        """Rounds that have ended, and what was not believed."""
        for averaging_round in self.optimizer.finished_rounds():
            self.journal.record(replace(averaging_round, epoch=self.optimizer.local_epoch))
            if averaging_round.error == GIVEN_UP:
                continue  # nothing has failed, nor was stepped
            self.rounds.append(averaging_round)
            if averaging_round.kind == "gradients" and averaging_round.error:
                self._stepped_alone(averaging_round)
            elif not averaging_round.complete:
                self.progress.say(describe_incomplete(averaging_round))
            elif averaging_round.num_refused:
                self.progress.say(f"averaging {averaging_round.kind}: {'; '.join(averaging_round.reasons)}")
        report_refusals(self.optimizer.take_refusals(), self.journal, self.progress.say)

    def _stepped_alone(self, failed: Round) -> None:
        """hivemind begins a round only when another trainer is there, and steps without one when it fails.

        With local steps the swarm's step is left out, and nothing is lost.
        """
        self.lone_epochs += 1
        epoch = self.optimizer.local_epoch
        self.journal.record(LoneEpoch(epoch, failed.error))
        if self.optimizer.makes_local_steps:
            what = "was not averaged, what this trainer has learned in it goes into the next round"
        else:
            what = "was stepped with this trainer's own gradients alone"
        self.progress.say(f"epoch {epoch} {what}: {failed.error}")

    def finish(self, *, sequence_length: int) -> None:
        """Report the epoch that has just ended, and begin to count for the next one."""
        self.total_samples += self.meter.samples
        record = self._record(sequence_length)
        self.total_seconds += record.seconds
        self.total_waited += record.waited_seconds
        self.total_sent += record.bytes_sent
        self.total_received += record.bytes_received
        self._publish()
        self.journal.record(record)
        self.progress.epoch_finished(record, self.total_steps, self.rounds)
        self.memory.note(record.epoch)
        self.rounds.clear()
        self.waits.clear()
        self.num_downloads, self.last_inner_steps = 0, self.optimizer.inner_steps
        self.meter.start_epoch()
        self.start_clock()

    def _publish(self) -> None:
        meter, failed = self.meter, [one for one in self.rounds if not one.complete]
        metrics = TrainerMetrics(
            epoch=self.optimizer.local_epoch,
            samples_per_second=self._samples_per_second(),
            samples=meter.samples,
            loss=float(meter.loss),
            mlm_loss=float(meter.mlm_loss),
            sop_loss=float(meter.sop_loss),
            mini_steps=meter.mini_steps,
            failed_rounds=len(failed),
            total_samples=self.total_samples,
            lone_epochs=self.lone_epochs,
            computing=share_computing(self.total_seconds, self.total_waited),
            bytes_sent=self.total_sent,
            bytes_received=self.total_received,
            failure=describe_incomplete(failed[-1])[:MAX_REASON_LENGTH] if failed else "",
        )
        store_metrics(self.swarm.dht, self.run_id, self.swarm.public_key, metrics, expiration=self.expiration)

    def _record(self, sequence_length: int) -> TrainerEpoch:
        meter, mini_steps = self.meter, max(1, self.meter.mini_steps)
        return TrainerEpoch(
            epoch=self.optimizer.local_epoch,
            loss=meter.loss / mini_steps,
            mlm_loss=meter.mlm_loss / mini_steps,
            sop_loss=meter.sop_loss / mini_steps or None,
            samples=meter.samples,
            dropped_samples=meter.dropped,
            samples_per_second=float(f"{self._samples_per_second():.4g}"),
            num_peers=self.optimizer.tracker.global_progress.num_peers,
            seconds=round(time.monotonic() - self.epoch_started, 3),
            local_steps=len(self.waits),
            inner_steps=self.optimizer.inner_steps - self.last_inner_steps,
            waited_seconds=round(sum(self.waits), 3),
            longest_wait=round(max(self.waits, default=0.0), 3),
            failed_rounds=sum(bool(one.error) for one in self.rounds),
            partial_rounds=sum(not one.complete and not one.error for one in self.rounds),
            lone_epochs=self.lone_epochs,
            state_downloads=self.num_downloads,
            bytes_sent=sum(one.bytes_sent for one in self.rounds),
            bytes_received=sum(one.bytes_received for one in self.rounds),
            learning_rate=self.optimizer.state_averager.optimizer.param_groups[0]["lr"],
            sequence_length=sequence_length,
        )

    def _samples_per_second(self) -> float:
        return float(self.optimizer.tracker.performance_ema.samples_per_second)


def describe_incomplete(averaging_round) -> str:
    """One line on what went wrong in a round of averaging."""
    if averaging_round.error:
        return f"averaging {averaging_round.kind} failed after {averaging_round.seconds:.0f} s: {averaging_round.error}"
    reasons = dict.fromkeys(map(explain, averaging_round.reasons))  # several parts may fail for the same reason
    return (
        f"averaging {averaging_round.kind} was partial: {averaging_round.received:.1%} of the values came back from "
        f"{averaging_round.num_peers} peers, {averaging_round.num_lost} failed while sending"
        + "".join(f"; {reason}" for reason in list(reasons)[:3])
    )


# in the errors of a call whose other end is gone
LOST = ("ControlFailure", "P2PHandlerError", "P2PDaemonError", "Connection", "BrokenPipe", "Incomplete")


def explain(reason: str) -> str:
    """What an error between this peer and another one means, and what its owner can do; unknown ones stay as they are.

    ``reason`` is what `hivemind.averaging.allreduce` logs: "Caught ERROR when communicating to (or: with) PEER".
    """
    match = re.fullmatch(r"Caught (.*) when communicating (to|with) (\S+)", reason, flags=re.DOTALL)
    if match is None:
        return reason
    error, direction, peer = match.groups()
    name = f"peer ...{peer[-6:]}"
    if "TimeoutError" in error:
        what = "returned no averages" if direction == "to" else "sent nothing"
        return f"{name} {what} in time: it is overloaded or stopped, or the network is slow (--next_chunk_timeout)"
    if "BAD_GROUP_ID" in error:
        return f"{name} had left the round: this peer came too late; if this happens often, shorten local steps"
    if "CANCELLED" in error or "INTERNAL_ERROR" in error:
        return f"{name} gave the round up"
    if "parts, but we expected" in error:
        return f"{name} ended in the middle of the round"
    if any(known in error for known in LOST):
        return f"lost the connection to {name}; it ended, or the network failed"
    return reason
