"""What a trainer does beside computing gradients: step with the swarm, report, back up, stop."""

import logging
import threading
import time

import torch
from transformers import TrainerCallback

from arguments import HFTrainerArguments, TrainerPeerArguments
from src.metrics.records import WorkerChecksums
from src.swarm.join import Swarm
from src.trainer.backup import Backups
from src.trainer.data_schedule import DataSchedule
from src.trainer.epoch_report import EpochReport
from src.trainer.gradient_buffers import GradientBuffers, all_finite
from src.trainer.hand_over import hand_over, hand_over_seconds
from src.trainer.local_workers import LocalWorkers

logger = logging.getLogger(__name__)

WAIT_FOR_PENDING_SECONDS = 15.0
# After a stop, a batch is waited for so long, and a round or the update after it so long; STOP_SECONDS are for all.
LAST_BATCH_SECONDS, LAST_ROUND_SECONDS = 8.0, 15.0
LAST_UPDATE_SECONDS = 300.0  # the same at the end of a run, whose last update is part of the result; rounds end before


class CollaborativeCallback(TrainerCallback):
    """Steps hivemind's optimizer where Trainer would step its own.

    Gradients that are not finite are never given to the averager. Parameters that are not finite are replaced by the
    last backup or, without one, by another peer's state. ``schedule``: which the data follow.
    """

    def __init__(  # noqa: PLR0913 (the trainer's parts)
        self,
        swarm: Swarm,
        buffers: GradientBuffers,
        report: EpochReport,
        backups: Backups,
        *,
        peer: TrainerPeerArguments,
        training: HFTrainerArguments,
        schedule: DataSchedule,
        stop: threading.Event,
        workers: LocalWorkers | None = None,
    ):
        self.swarm, self.optimizer, self.workers = swarm, swarm.optimizer, workers or LocalWorkers()
        self.buffers, self.parameters = buffers, buffers.parameters
        self.report, self.meter, self.say = report, report.meter, report.progress.say
        self.backups, self.peer, self.training = backups, peer, training
        self.schedule, self.stop = schedule, stop
        self.after_step = lambda samples, waited: None  # after a local step, with seconds inside the swarm's optimizer
        self.last_epoch = -1
        self.optimizer.state_averager.final_epoch = training.total_steps
        self._has_begun = self._is_with_swarm = self._has_saved_last = False

    @property
    def run_is_over(self) -> bool:
        """Whether this trainer has reached the last epoch of the run."""
        return self.optimizer.local_epoch >= self.training.total_steps

    def resume(self) -> None:
        """Load the backup, if there is one. Raises ValueError if it is damaged or of another model."""
        if self.backups.exists():
            epoch = self.backups.restore()
            self.say(f"resumed from {self.backups.path} at epoch {epoch}")
            if self.run_is_over:
                self.say("the run is at its end, --total_steps; raise it, or choose another --run_id")

    # -- the beginning

    def on_train_begin(self, args, state, control, **kwargs):
        """Take the state of peers if it is newer than the backup, then wait for partners if asked to."""
        newest = self.optimizer.tracker.global_epoch
        if self.peer.initial_peers and newest >= self.optimizer.local_epoch:
            self._take_state()
        if self.backups.has_weights:
            self.optimizer.share_state()
        else:
            self.stop.set()
        self.last_epoch = self.backups.last_epoch = self.report.joined_at = self.optimizer.local_epoch
        self.optimizer.before_epoch_ends = self.backups.save_if_due
        self._follow_epoch()
        self._wait_for_peers()
        self.report.start_clock()
        self._has_begun = True
        return self._lead_workers(control)

    def _take_state(self) -> None:
        saved = self.optimizer.local_epoch
        self.backups.has_weights = self.swarm.take_state(
            has_backup=self.backups.exists(),
            has_checkpoint=self.peer.init_checkpoint is not None and not self.backups.exists(),
            say=self.say,
            stop=self.stop,
        )
        if self.backups.has_weights:
            behind = self.optimizer.local_epoch - saved
            replaced = (
                f"; its state replaces the backup's of epoch {saved}, {behind} behind" if behind > 0 < saved else ""
            )
            self.say(f"joined at epoch {self.optimizer.local_epoch}{replaced}")
        self.report.record_downloads(batch=0)

    def _lead_workers(self, control):
        """Let the other processes of this peer follow; stop when any of them, or the run's end, asks for it."""
        done = self.run_is_over or self.stop.is_set()
        epoch, stop, checksums = self.workers.agree(self.parameters, epoch=self.optimizer.local_epoch, stop=done)
        if checksums:
            self.report.journal.record(WorkerChecksums(epoch, tuple(checksums)))
        control.should_training_stop = control.should_training_stop or stop
        return control

    def _wait_for_peers(self) -> None:
        """Announce this trainer and wait until ``wait_for_peers`` of them are there, or the run has begun."""
        if self.peer.wait_for_peers <= 1 or self.run_is_over:
            return
        said, tracker = False, self.optimizer.tracker
        while not self.stop.is_set() and tracker.global_epoch == self.optimizer.local_epoch:
            tracker.announce()
            if tracker.num_present() >= self.peer.wait_for_peers:
                return
            if not said:
                self.say(f"waiting for {self.peer.wait_for_peers} trainers")
                said = True
            self.stop.wait(0.5)

    # -- a local step

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Report the gradients in the model's buffers to hivemind, which may run a global step."""
        self.workers.collect(self.meter)
        samples, share = self.meter.take_samples(), self.meter.take_share()
        self.buffers.unscale()
        if not self.buffers.are_finite():
            self._discard_gradients(samples)
        elif samples > 0 and not self.stop.is_set() and not self.run_is_over:  # who leaves must begin no other round
            self._make_up_for_dropped_batches(share)
            started, self._is_with_swarm = time.monotonic(), True
            self.optimizer.step(batch_size=samples)
            self._is_with_swarm = False
            self.report.waits.append(time.monotonic() - started)
            self.report.record_downloads(batch=samples)
            self.after_step(samples, self.report.waits[-1])

    def _make_up_for_dropped_batches(self, share: float) -> None:
        """Trainer has divided the sum of gradients by all batches, and only a ``share`` of them is in it."""
        if share == 1.0:
            return
        if self.buffers.reused:  # earlier steps lie in the same buffers: this one counts as a part of a step
            self.optimizer.grad_averager.local_times_accumulated += share - 1.0
        else:
            self.buffers.multiply(1.0 / share)

    def _discard_gradients(self, samples: int) -> None:
        self.buffers.reset()
        samples += self.optimizer.discard_gradients()  # reused buffers held earlier batches, too
        self.meter.lose(samples)
        logger.warning("dropped %d samples: their gradients are not finite", samples)

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Hide the gradient buffers from Trainer, which would reset them after every local step."""
        self.buffers.hide()

    def on_substep_end(self, args, state, control, **kwargs):
        """Stop after the batch at hand if asked to; several processes of a peer must stop together, after a step."""
        control.should_training_stop |= self.stop.is_set() and self.workers.size == 1
        return control

    def on_step_end(self, args, state, control, **kwargs):
        """Put the buffers back; at the end of an epoch report, check and back up."""
        self.buffers.show()
        self.report.record_rounds()
        if self.optimizer.local_epoch != self.last_epoch:
            self._finish_epoch()
        self.backups.save_if_due()
        return self._lead_workers(control)

    def _finish_epoch(self) -> None:
        self.report.finish(sequence_length=self.schedule.length.value)
        self.last_epoch = self.optimizer.local_epoch
        self._follow_epoch()
        self._check_parameters()

    def _follow_epoch(self) -> None:
        self.schedule.follow(self.optimizer.local_epoch)

    @torch.no_grad()
    def _check_parameters(self) -> None:
        if all_finite(self.parameters):
            return
        if self.backups.exists():
            epoch = self.backups.restore()
            self.say(f"parameters were not finite: went back to the backup of epoch {epoch}")
            return
        self.optimizer.forget_local_work()
        self.optimizer.load_state_from_peers()
        if all_finite(self.parameters):
            self.say("parameters were not finite and there is no backup: took the state of another peer")
        else:
            self.say("parameters are not finite and neither backup nor peer has better ones: stopping")
            self.stop.set()

    # -- the end

    def on_train_end(self, args, state, control, **kwargs):
        """Let delayed updates finish, write the last backup, and at the end of the run hand its state over."""
        self._is_with_swarm = True
        self._finish_updates()
        self.report.record_rounds()
        self.backups.save()
        self._has_saved_last = True
        if self.run_is_over:
            limit = hand_over_seconds(self.swarm, self.parameters, self.peer.bandwidth)
            hand_over(self.swarm, self.peer.run_id, self.training.total_steps, limit=limit, kept_in=self.backups.path,
                      say=self.say, stop=self.stop)  # fmt: skip

    def _finish_updates(self) -> None:
        """After a stop, which may come while this waits, nobody is searched for any more."""
        averager, now = self.optimizer.state_averager, time.monotonic()
        give_up_at = now + (LAST_UPDATE_SECONDS if self.run_is_over else WAIT_FOR_PENDING_SECONDS)
        stopping = False
        while True:
            if self.stop.is_set() and not stopping:
                stopping = True
                self.optimizer.stop_waiting()
                give_up_at = min(give_up_at, time.monotonic() + WAIT_FOR_PENDING_SECONDS)
            if not averager.pending_updates or time.monotonic() >= give_up_at:
                return
            time.sleep(0.1)
            averager.step(apply_delayed_updates=True)

    def is_late(self, seconds: float) -> bool:
        """Whether nobody should wait for this trainer's batch or round any longer, so many seconds after a stop."""
        return not self._has_saved_last and seconds > (
            LAST_ROUND_SECONDS if self._is_with_swarm else LAST_BATCH_SECONDS
        )

    def save_last(self, alone: bool) -> None:
        """On another thread, when the main one may be stuck: write a backup; see `Backups.save_last`."""
        if not self._has_begun:
            self.say("no backup: training had not begun")
            return
        self.backups.save_last(alone)
