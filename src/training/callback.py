"""What a trainer does beside computing gradients: step with the swarm, report, back up, stop."""

import logging
import re
import threading
import time
from functools import partial
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import torch
from transformers import TrainerCallback

from arguments import HFTrainerArguments, TrainerPeerArguments
from src.training.backup import held, restore_backup, save_backup, save_last_backup
from src.training.console import Progress
from src.training.dht import MAX_REASON_LENGTH, TrainerMetrics, fetch_checkpoint_epochs, store_metrics
from src.training.hf_trainer import LossMeter, LossScaler
from src.training.journal import Journal, report_refusals
from src.training.rounds import GIVEN_UP
from src.training.schedules import sequence_length
from src.training.swarm import Swarm
from src.training.sync import LocalWorkers

logger = logging.getLogger(__name__)

WAIT_FOR_PENDING_SECONDS = 15.0
# After a stop, a batch is waited for so long, and a round or the update after it so long; STOP_SECONDS are for all.
LAST_BATCH_SECONDS, LAST_ROUND_SECONDS = 8.0, 15.0
LAST_SAVE_SECONDS = 10.0  # for a backup that is being written when another one is wanted at once
LAST_UPDATE_SECONDS = 300.0  # the same at the end of a run, whose last update is part of the result; rounds end before
# At the end of a run its state is handed over to the auxiliary peers that store it: so long, and three downloads more.
HAND_OVER_SECONDS = 60.0
USUAL_BANDWIDTH = 100.0  # Mbit/s, of a peer that does not say it
ANNOUNCE_SECONDS = 5.0  # between two reports that this trainer is there, at the last epoch
LOOKS_BEFORE_LEAVING = 3  # a look into the DHT may find nothing although something is there


class CollaborativeCallback(TrainerCallback):
    """Steps hivemind's optimizer where Trainer would step its own.

    Gradients that are not finite are never given to the averager. Parameters that are not finite are replaced by the
    last backup or, without one, by another peer's state.
    """

    def __init__(
        self,
        swarm: Swarm,
        model: torch.nn.Module,
        *,
        peer: TrainerPeerArguments,
        training: HFTrainerArguments,
        meter: LossMeter,
        scaler: LossScaler | None,
        current_length: Synchronized,
        state_path: Path,
        journal: Journal,
        progress: Progress,
        stop: threading.Event,
        workers: LocalWorkers | None = None,
    ):
        self.workers = workers or LocalWorkers()
        self.swarm, self.dht, self.public_key, self.optimizer = swarm, swarm.dht, swarm.public_key, swarm.optimizer
        self.model, self.parameters = model, [p for p in model.parameters() if p.requires_grad]
        self.peer, self.training, self.meter, self.scaler = peer, training, meter, scaler
        self.current_length, self.state_path = current_length, state_path
        self.journal, self.progress, self.stop = journal, progress, stop
        self.reuse_grad_buffers = swarm.optimizer.grad_averager.reuse_grad_buffers
        self.stashed_gradients: list[torch.Tensor | None] = []
        self.last_epoch = self.last_backup_epoch = -1
        self.epoch_started = time.monotonic()
        self.rounds: list = []
        self.total_samples = self.lone_epochs = 0  # since the start
        self.joined_at = 0  # the epoch at which this trainer last had the state of others
        self.waits: list[float] = []  # seconds inside the swarm's optimizer, by local step
        self.num_downloads = 0
        self.has_weights = True  # those of the run
        self.optimizer.state_averager.final_epoch = training.total_steps
        self._saving = threading.Lock()
        self._has_begun = self._is_with_swarm = self._has_saved_last = False

    @property
    def run_is_over(self) -> bool:
        """Whether this trainer has reached the last epoch of the run."""
        return self.optimizer.local_epoch >= self.training.total_steps

    def resume(self) -> None:
        """Load the backup, if there is one. Raises ValueError if it is damaged or of another model."""
        if self.state_path.exists():
            epoch = restore_backup(self.state_path, self.model, self.optimizer)
            self.progress.say(f"resumed from {self.state_path} at epoch {epoch}")
            if self.run_is_over:
                self.progress.say("the run is at its end, --total_steps; raise it, or choose another --run_id")

    def on_train_begin(self, args, state, control, **kwargs):
        """Take the state of peers if it is newer than the backup, then wait for partners if asked to."""
        newest, saved = self.optimizer.tracker.global_epoch, self.optimizer.local_epoch
        if self.peer.initial_peers and newest >= self.optimizer.local_epoch:
            self.has_weights = self.swarm.take_state(
                has_backup=self.state_path.exists(),
                has_checkpoint=self.peer.init_checkpoint is not None and not self.state_path.exists(),
                say=self.progress.say,
                stop=self.stop,
            )
            if self.has_weights:
                behind = self.optimizer.local_epoch - saved
                replaced = (
                    f"; its state replaces the backup's of epoch {saved}, {behind} behind" if behind > 0 < saved else ""
                )
                self.progress.say(f"joined at epoch {self.optimizer.local_epoch}{replaced}")
            self._record_downloads(batch=0)
        if self.has_weights:
            self.optimizer.share_state()
        else:
            self.stop.set()
        self.last_epoch = self.last_backup_epoch = self.joined_at = self.optimizer.local_epoch
        self.optimizer.before_epoch_ends = self._back_up_if_due
        self._follow_epoch()
        self._wait_for_peers()
        self.epoch_started, self._has_begun = time.monotonic(), True
        return self._lead_workers(control)

    def _lead_workers(self, control):
        """Let the other processes of this peer follow; stop when any of them, or the run's end, asks for it."""
        done = self.run_is_over or self.stop.is_set()
        epoch, stop, checksums = self.workers.agree(self.parameters, epoch=self.optimizer.local_epoch, stop=done)
        if checksums:
            self.journal.write("local_workers", epoch=epoch, checksums=checksums)
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
                self.progress.say(f"waiting for {self.peer.wait_for_peers} trainers")
                said = True
            self.stop.wait(0.5)

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Report the gradients in the model's buffers to hivemind, which may run a global step."""
        self.workers.collect(self.meter)
        samples, share = self.meter.take_samples(), self.meter.take_share()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.scaler is not None and gradients:
            torch._foreach_mul_(gradients, 1.0 / self.scaler.scale)
        finite = not gradients or bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all())
        if self.scaler is not None:
            self.scaler.update(finite)
        if not finite:
            self._discard_gradients(samples)
        elif samples > 0 and not self.stop.is_set() and not self.run_is_over:  # who leaves must begin no other round
            self._make_up_for_dropped_batches(gradients, share)
            started, self._is_with_swarm = time.monotonic(), True
            self.optimizer.step(batch_size=samples)
            self._is_with_swarm = False
            self.waits.append(time.monotonic() - started)
            self._record_downloads(batch=samples)

    def _make_up_for_dropped_batches(self, gradients: list[torch.Tensor], share: float) -> None:
        """Trainer has divided the sum of gradients by all batches, and only a ``share`` of them is in it."""
        if share == 1.0:
            return
        if self.reuse_grad_buffers:  # earlier steps lie in the same buffers: this one counts as a part of a step
            self.optimizer.grad_averager.local_times_accumulated += share - 1.0
        else:
            torch._foreach_mul_(gradients, 1.0 / share)

    def _record_downloads(self, *, batch: int) -> None:
        for download in self.optimizer.finished_downloads():
            lost = download.lost_samples + batch
            self._count_as_lost(lost)
            self.num_downloads += 1
            self.journal.write("state_download", **{**vars(download), "lost_samples": lost})
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

    def _count_as_lost(self, samples: int) -> None:
        self.meter.samples = max(0, self.meter.samples - samples)
        self.meter.dropped += samples

    def _discard_gradients(self, samples: int) -> None:
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()
        if self.reuse_grad_buffers:  # the buffers held this epoch's earlier batches, too
            samples += self.optimizer.grad_averager.local_samples_accumulated
            self.optimizer.grad_averager.reset_accumulated_grads_()
            self.optimizer.tracker.report_local_progress(self.optimizer.local_epoch, samples_accumulated=0)
        self._count_as_lost(samples)
        logger.warning("dropped %d samples: their gradients are not finite", samples)

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Hide the gradient buffers from Trainer, which would reset them after every local step."""
        if self.reuse_grad_buffers:
            self.stashed_gradients = [parameter.grad for parameter in self.parameters]
            for parameter in self.parameters:
                parameter.grad = None

    @torch.no_grad()
    def _restore_gradient_buffers(self) -> None:
        for parameter, gradient in zip(self.parameters, self.stashed_gradients, strict=False):
            parameter.grad = gradient
        kept = [gradient for gradient in self.stashed_gradients if gradient is not None]
        if self.scaler is not None and kept:  # the gradients that will be added to them are scaled
            torch._foreach_mul_(kept, self.scaler.scale)
        self.stashed_gradients = []

    def on_substep_end(self, args, state, control, **kwargs):
        """Stop after the batch at hand if asked to; several processes of a peer must stop together, after a step."""
        control.should_training_stop |= self.stop.is_set() and self.workers.size == 1
        return control

    def on_step_end(self, args, state, control, **kwargs):
        """Put the buffers back; at the end of an epoch report, check and back up."""
        self._restore_gradient_buffers()
        self._record_rounds()
        if self.optimizer.local_epoch != self.last_epoch:
            self._finish_epoch()
        self.progress.update(self.optimizer)
        self._back_up_if_due()
        return self._lead_workers(control)

    def on_train_end(self, args, state, control, **kwargs):
        """Let delayed updates finish, write the last backup, and at the end of the run hand its state over."""
        self._is_with_swarm = True
        self._finish_updates()
        self._record_rounds()
        self._save_backup()
        self._has_saved_last = True
        if self.run_is_over:
            self._hand_over()

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

    def _hand_over(self) -> None:
        """Share the state of the last epoch until each auxiliary peer that stores checkpoints has stored it.

        Waits for no other, not for ever, and not after a stop. Who only connects to others shares nothing.
        """
        limit, asked, looks_in_vain = self._hand_over_seconds(), False, 0
        give_up_at, announce_at = time.monotonic() + limit, 0.0
        while not self.stop.is_set() and not self.optimizer.client_mode and looks_in_vain < LOOKS_BEFORE_LEAVING:
            if time.monotonic() >= announce_at:
                self._announce()
                announce_at = time.monotonic() + ANNOUNCE_SECONDS
            stored = self._stored_epochs()
            if stored and min(stored) >= self.training.total_steps:
                self.progress.say(f"the state of epoch {self.training.total_steps} is stored")
                return
            looks_in_vain = 0 if stored else looks_in_vain + 1
            if asked and looks_in_vain == LOOKS_BEFORE_LEAVING:
                self.progress.say(f"nobody is left to store the state of the last epoch; it is in {self.state_path}")
            if time.monotonic() >= give_up_at:
                self.progress.say(
                    f"nobody has stored the state of the last epoch within {limit:.0f} s; it is in {self.state_path}. "
                    "With the same flags this trainer hands it over again"
                )
                return
            if stored and not asked:
                asked = True
                self.progress.say(
                    f"the run is over: waiting until its state is stored, at most {limit:.0f} s (Ctrl+C: leave now)"
                )
            self.stop.wait(0.5)

    def _announce(self) -> None:
        """That this trainer is in the last epoch; hivemind reports none that has computed nothing since its start."""
        try:
            self.optimizer.tracker.announce()
        except Exception as error:  # the DHT may have ended
            logger.debug("could not announce the last epoch: %r", error)

    def _stored_epochs(self) -> list[int]:
        try:
            return list(fetch_checkpoint_epochs(self.dht, self.peer.run_id).values())
        except Exception as error:  # the DHT may have ended
            logger.debug("could not look for checkpoints: %r", error)
            return []

    def _hand_over_seconds(self) -> float:
        optimizer = self.optimizer.state_averager.optimizer
        statistics = [value for state in optimizer.state.values() for value in state.values()]
        tensors = [*self.parameters, *(value for value in statistics if isinstance(value, torch.Tensor))]
        megabits = sum(tensor.numel() * tensor.element_size() for tensor in tensors) * 8 / 1e6
        return HAND_OVER_SECONDS + 3 * megabits / (self.peer.bandwidth or USUAL_BANDWIDTH)

    def _record_rounds(self) -> None:
        for averaging_round in self.optimizer.finished_rounds():
            self.journal.write("round", epoch=self.optimizer.local_epoch, complete=averaging_round.complete,
                               **vars(averaging_round))  # fmt: skip
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

    def _stepped_alone(self, failed) -> None:
        """hivemind begins a round only when another trainer is there, and steps without one when it fails."""
        self.lone_epochs += 1
        epoch = self.optimizer.local_epoch
        self.journal.write("lone_epoch", epoch=epoch, reason=failed.error)
        self.progress.say(f"epoch {epoch} was stepped with this trainer's own gradients alone: {failed.error}")

    def _finish_epoch(self) -> None:
        seconds = time.monotonic() - self.epoch_started
        meter, epoch = self.meter, self.optimizer.local_epoch
        self.total_samples += meter.samples
        failed = [averaging_round for averaging_round in self.rounds if not averaging_round.complete]
        metrics = TrainerMetrics(
            epoch=epoch,
            samples_per_second=float(self.optimizer.tracker.performance_ema.samples_per_second),
            samples=meter.samples,
            loss=float(meter.loss),
            mlm_loss=float(meter.mlm_loss),
            sop_loss=float(meter.sop_loss),
            mini_steps=meter.mini_steps,
            failed_rounds=len(failed),
            total_samples=self.total_samples,
            lone_epochs=self.lone_epochs,
            failure=describe_incomplete(failed[-1])[:MAX_REASON_LENGTH] if failed else "",
        )
        store_metrics(self.dht, self.peer.run_id, self.public_key, metrics, expiration=self.peer.statistics_expiration)
        mini_steps = max(1, meter.mini_steps)
        record = self.journal.write(
            "epoch",
            epoch=epoch,
            loss=meter.loss / mini_steps,
            mlm_loss=meter.mlm_loss / mini_steps,
            sop_loss=meter.sop_loss / mini_steps,
            samples=meter.samples,
            dropped_samples=meter.dropped,
            samples_per_second=round(metrics.samples_per_second, 2),
            num_peers=self.optimizer.tracker.global_progress.num_peers,
            seconds=round(seconds, 3),
            local_steps=len(self.waits),
            waited_seconds=round(sum(self.waits), 3),
            longest_wait=round(max(self.waits, default=0.0), 3),
            failed_rounds=sum(bool(r.error) for r in self.rounds),
            partial_rounds=sum(not r.complete and not r.error for r in self.rounds),
            lone_epochs=self.lone_epochs,
            state_downloads=self.num_downloads,
            learning_rate=self.optimizer.state_averager.optimizer.param_groups[0]["lr"],
            sequence_length=self.current_length.value,
        )
        self.progress.epoch_finished(record, self.training.total_steps, self.rounds)
        self.rounds.clear()
        self.waits.clear()
        self.num_downloads = 0
        meter.start_epoch()
        self.last_epoch, self.epoch_started = epoch, time.monotonic()
        self._follow_epoch()
        self._check_parameters()

    def _follow_epoch(self) -> None:
        self.current_length.value = sequence_length_at(self.optimizer.local_epoch, self.training)

    @torch.no_grad()
    def _check_parameters(self) -> None:
        if torch.isfinite(torch.stack(torch._foreach_norm(self.parameters))).all():
            return
        if self.state_path.exists():
            epoch = restore_backup(self.state_path, self.model, self.optimizer)
            self.progress.say(f"parameters were not finite: went back to the backup of epoch {epoch}")
        else:
            self.optimizer.load_state_from_peers()
            if torch.isfinite(torch.stack(torch._foreach_norm(self.parameters))).all():
                self.progress.say("parameters were not finite and there is no backup: took the state of another peer")
            else:
                self.progress.say("parameters are not finite and neither backup nor peer has better ones: stopping")
                self.stop.set()

    def _back_up_if_due(self) -> None:
        due = self.optimizer.local_epoch >= self.last_backup_epoch + self.peer.backup_every_epochs
        if due and not self.optimizer.state_averager.pending_updates:  # else parameters and epoch would not agree
            self._save_backup()

    def is_late(self, seconds: float) -> bool:
        """Whether nobody should wait for this trainer's batch or round any longer, so many seconds after a stop."""
        return not self._has_saved_last and seconds > (
            LAST_ROUND_SECONDS if self._is_with_swarm else LAST_BATCH_SECONDS
        )

    @torch.no_grad()
    def save_last(self, alone: bool) -> None:
        """On another thread, when the main one may be stuck: write a backup; see `backup.save_last_backup`."""
        if not self._has_begun:
            self.progress.say("no backup: training had not begun")
            return
        try:
            with held(self._saving, LAST_SAVE_SECONDS):
                self._write(partial(save_last_backup, alone=alone))
        except TimeoutError:
            self.progress.say("no further backup: one was just being written")

    @torch.no_grad()
    def _save_backup(self) -> None:
        with self._saving:
            self._write(save_backup)

    def _write(self, save) -> None:
        if not self.has_weights:  # the next start would go on from it
            return
        if not torch.isfinite(torch.stack(torch._foreach_norm(self.parameters))).all():
            logger.warning("no backup written: parameters are not finite")
            return
        try:
            save(self.state_path, self.model, self.optimizer)
            if save is not save_backup:
                self.progress.say(f"wrote the backup {self.state_path}")
        except OSError as error:
            self.progress.say(f"backup failed, the previous one is kept: {error}")
        self.last_backup_epoch = self.optimizer.local_epoch


def sequence_length_at(epoch: int, training: HFTrainerArguments) -> int:
    """The longest training sequence in an epoch, by the run's schedule."""
    return sequence_length(
        epoch,
        max_sequence_length=training.max_sequence_length,
        initial_sequence_length=training.initial_sequence_length,
        sequence_length_warmup_steps=training.sequence_length_warmup_steps,
        pad_to_multiple_of=training.pad_to_multiple_of,
    )


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
    if any(
        known in error for known in ("ControlFailure", "P2PHandlerError", "P2PDaemonError", "Connection", "Incomplete")
    ):
        return f"lost the connection to {name}; it ended, or the network failed"
    return reason
