"""The swarm's optimizer: parameter groups, 8-bit LAMB with its schedule, and hivemind around it."""

import logging
import math
import multiprocessing
import time
from collections.abc import Iterable
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import hivemind
import torch
from hivemind.averaging.control import StepControl
from hivemind.compression import BlockwiseQuantization, Float16Compression, SizeAdaptiveCompression
from hivemind.p2p import PeerID
from torch.optim.lr_scheduler import LambdaLR

from arguments import CollaborationArguments, HFTrainerArguments, PeerArguments
from src.training.auth import Identity
from src.training.averagers import (
    LeanGradientAverager,
    LeanStateAverager,
    correct_step_cancellation,
    end_searches_without_waiting,
)
from src.training.dht import LEAVE_SECONDS
from src.training.lamb_8bit import CPULAMB8Bit
from src.training.matchmaking import Attendance
from src.training.probe import ask_epoch, reachable, tell_epoch
from src.training.progress import LeanProgressTracker
from src.training.record_limits import befriend
from src.training.records import MAX_LIFETIME
from src.training.rounds import SHORTEST_ROUND, Patience, Round
from src.training.schedules import learning_rate_factor

logger = logging.getLogger(__name__)

# Smaller tensors travel as float16: they cost little, and norms and biases are delicate.
EIGHT_BIT_THRESHOLD = 2**16 + 1
MAX_DOWNLOAD_PAUSE_SECONDS = 2.0
# At the end of an epoch a trainer waits for its rounds so much longer than --next_chunk_timeout. When that time is used
# up, a second round whose group waits already still gets the shortest time: with 8 s, 12.7 s in all.
PATIENCE_ALLOWANCE = 2.0
ASSISTANTS_AHEAD = 10.0  # times --matchmaking_time, see `RoundReporting.assist`
SEARCH_ALLOWANCE = 5.0  # a search lasts --matchmaking_time, and so much longer if the network is slow


def patience_seconds(*, matchmaking_time: float, next_chunk_timeout: float) -> float:
    """How long a trainer waits at the end of an epoch for all its searches and rounds together."""
    return max(
        next_chunk_timeout + PATIENCE_ALLOWANCE,
        matchmaking_time + SEARCH_ALLOWANCE + SHORTEST_ROUND * next_chunk_timeout,
    )


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Parameters that need a gradient, in two groups: weight decay applies to all but biases and norms."""
    decayed, exempt = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (exempt if name.endswith("bias") or "norm" in name else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]


def make_lamb(params, args: HFTrainerArguments) -> CPULAMB8Bit:
    """8-bit LAMB with the run's hyperparameters; it may use up the gradients, which nobody reads after the step."""
    return CPULAMB8Bit(
        params,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
        clamp_value=args.clamp_value,
        min_8bit_size=args.min_8bit_size,
        max_grad_norm=args.max_grad_norm or None,
        reuse_grad_buffers=True,
        kernel="auto",
    )


def make_learning_rate(args: HFTrainerArguments):
    """The share of the peak learning rate as a function of the epoch. Raises ValueError for options that contradict."""
    min_lr_ratio = 0.02 if args.min_learning_rate is None else args.min_learning_rate / args.learning_rate
    factor = partial(
        learning_rate_factor,
        total_steps=args.total_steps,
        warmup_steps=args.warmup_steps,
        num_zero_steps=args.num_zero_lr_steps,
        min_lr_ratio=min_lr_ratio,
    )
    factor(0)  # checks the options
    return factor


@dataclass(frozen=True)
class StateDownload:
    """A state taken from another peer; ``lost_samples`` had been accumulated and were given up for it.

    ``was_apart``: it is that of another swarm, and the epochs that led to ``from_epoch`` are given up, too."""

    from_epoch: int
    to_epoch: int
    seconds: float
    lost_samples: int
    was_apart: bool = False


class LeanOptimizer(hivemind.Optimizer):
    """`hivemind.Optimizer` over our averagers, which says how its averaging rounds went.

    It looks for a group when it has something to average, not before: so whoever looks is ready, a group can begin when
    all are there, and it consists of those who are there then.
    """

    _partner_is_ahead = _is_late = _was_left_behind = False
    _partners: frozenset[PeerID] = frozenset()  # in the last round

    def __init__(self, *args, **kwargs):
        self._downloads: list[StateDownload] = []
        self._failed_downloads = 0  # in a row
        self._assisting: dict[str, StepControl] = {}  # by kind of round
        self.before_epoch_ends = lambda: None
        super().__init__(*args, **kwargs)

    def _make_gradient_averager(self, *args, **kwargs) -> LeanGradientAverager:
        averager = super()._make_gradient_averager(*args, **kwargs)
        averager.local_epoch = lambda: self.local_epoch
        return averager

    def _make_state_averager(self, **kwargs) -> LeanStateAverager:
        averager = LeanStateAverager(
            dht=self.dht,
            prefix=f"{self.run_id}_state_averager",
            min_matchmaking_time=self.matchmaking_time,
            allreduce_timeout=self.allreduce_timeout,
            shutdown_timeout=self.shutdown_timeout,
            offload_optimizer=self.offload_optimizer,
            custom_gradients=self.offload_optimizer,
            status_loglevel=self.status_loglevel,
            next_chunk_timeout=self.next_chunk_timeout,
            client_mode=self.client_mode,
            auxiliary=self.auxiliary,
            start=True,
            **kwargs,
        )
        averager.swarm_epoch = lambda: self.tracker.global_epoch
        return averager

    def _make_progress_tracker(self, target_batch_size: int, **kwargs) -> LeanProgressTracker:
        return LeanProgressTracker(
            dht=self.dht,
            prefix=self.run_id,
            target_batch_size=target_batch_size,
            client_mode=self.client_mode,
            status_loglevel=self.status_loglevel,
            start=True,
            **kwargs,
        )

    def _maybe_schedule_gradient_averaging(self) -> None:
        """Nothing: hivemind would begin to look for a group before the epoch ends."""

    def _maybe_schedule_state_averaging(self) -> None:
        """Nothing, as for gradients."""

    def assist(self) -> None:
        """As an auxiliary peer: take part in the next rounds, of gradients and of parameters, as they come."""
        for averager in (self.state_averager, self.grad_averager):
            step = self._assisting.get(averager.round_kind)
            if step is not None and step.done() and averager is self.grad_averager:
                self._learn_epoch(step)
            if step is None or step.done():
                ahead = min(ASSISTANTS_AHEAD * self.matchmaking_time, MAX_LIFETIME)
                self._assisting[averager.round_kind] = averager.assist(ahead=ahead)

    def _learn_epoch(self, step: StepControl) -> None:
        """From an assistant's round: the trainers among its members say in which epoch they are."""
        if step.cancelled() or step.exception() is not None:
            return
        self._meet(step.result() or {})
        epochs = [epoch for epoch in (step.result() or {}).values() if type(epoch) is int]
        if epochs:
            self.tracker.learn_epoch(min(epochs))

    def _meet(self, partners: Iterable[PeerID]) -> None:
        """In a round: whatever strangers store, the records of these are kept."""
        new, self._partners = set(partners) - self._partners, frozenset(partners)
        if new:
            befriend(self.dht, new)

    # A peer may be one epoch behind: the others have just ended theirs. But when it ends each epoch together with those
    # who end the next one, it stays behind, with a single batch an epoch, and averages parameters when they do not.
    # hivemind looks for that at the beginning of a step only, before it may learn where the others are.

    #
    # hivemind also gives up the first batch of an epoch when others have ended it meanwhile. But they may just be
    # looking for this peer. So it looks for them, and takes their state if they have gone on.

    def _should_load_state_from_peers(self) -> bool:
        if (self._partner_is_ahead and self.tracker.global_epoch > self.local_epoch) or self._was_left_behind:
            self._partner_is_ahead = self._was_left_behind = False
            return True
        return not self.is_synchronized_with_peers()

    def _notice_partners_ahead(self, epochs: dict) -> None:
        """``epochs``: those in which the members of a round of averaging began it, by peer; no epoch if auxiliary."""
        own = epochs.get(self.grad_averager.peer_id)
        others = [epoch for epoch in epochs.values() if type(epoch) is int]
        self._partner_is_ahead = type(own) is int and max(others) > own

    def _update_global_epoch(self, grad_scaler) -> None:
        if not self.auxiliary and self._should_load_state_from_peers():
            self.load_state_from_peers()
            return
        # When rounds take as long as epochs, this is the only moment at which no delayed update is under way, so that
        # parameters and epoch belong together. hivemind would wait for the update next.
        with self._patience.blocking():
            if self.delay_optimizer_step:
                self.state_averager.step(wait_for_delayed_updates=True)
            self._patience.renew()
            self.before_epoch_ends()
            self._is_late = self.tracker.global_epoch > self.local_epoch
            super()._update_global_epoch(grad_scaler)

    def _begin_averaging_gradients(self, grad_scaler) -> bool:
        # With a handle that was used for the last epoch's round, hivemind would skip this one's.
        if self.scheduled_grads is not None and self.scheduled_grads.done():
            self.scheduled_grads = None
        # Without a round hivemind leaves the sum over local steps in reused buffers that are not offloaded.
        began = super()._begin_averaging_gradients(grad_scaler)
        if not began and not self.offload_optimizer:
            self._load_local_gradients_into_optimizer()
        return began

    def _average_gradients_and_load_into_optimizer(self, maybe_step_control) -> None:
        # When a round fails, the buffers still hold this peer's own gradients. hivemind reloads them from accumulators,
        # which it has reset in the meantime, and so would step with the next epoch's first gradients instead.
        try:
            epochs = maybe_step_control.result(self.averaging_timeout)
            self._notice_partners_ahead(epochs)
            self._meet(epochs)
        except CancelledError:  # nobody was found, so nobody is there to average parameters with, either
            self.give_up_waiting()
            self._was_left_behind = self._is_late
        except BaseException as error:
            logger.debug("gradients were not averaged: %r", error)
        self._load_averaged_gradients_into_optimizer_()

    @property
    def _patience(self) -> Patience:
        return self.grad_averager.patience  # the state averager's, too

    def give_up_waiting(self) -> None:
        """Until the next epoch ends: end searches at once, and let rounds take no longer than they must."""
        self._patience.give_up()

    def stop_waiting(self) -> None:
        """As `give_up_waiting`, but for good, and for no download either; a signal handler may call it.

        A trainer that is asked to stop may just wait at the end of an epoch: for its partners, who stop, too.
        """
        self._patience.end()

    def shutdown(self) -> None:
        self.stop_waiting()
        super().shutdown()

    def share_state(self) -> None:
        """From now on hand this peer's state to those that join."""
        if not (self.client_mode or self.auxiliary):
            self.state_averager.allow_state_sharing = True

    def load_state_from_peers(self, **kwargs) -> None:
        self.give_up_waiting()  # whatever is searched for belongs to an epoch that the others have left behind
        epoch, samples, started = self.local_epoch, self.grad_averager.local_samples_accumulated, time.monotonic()
        was_apart = self.tracker.is_apart
        super().load_state_from_peers(**kwargs)
        # hivemind counts the state of whoever is about to end an epoch as that of the next, but not in its schedule, by
        # which a backup tells of which epoch it is.
        self.state_averager._update_scheduler()
        was_apart = was_apart and self.local_epoch > epoch
        self._downloads.append(StateDownload(epoch, self.local_epoch, time.monotonic() - started, samples, was_apart))
        if self.local_epoch > epoch:
            self.tracker.learn_epoch(self.local_epoch)
        self._check_claims(progressed=self.local_epoch > epoch)

    def _check_claims(self, *, progressed: bool) -> None:
        """After a download: if the swarm's newest state is older than somebody claims, do not ask for it for ever."""
        behind = self.local_epoch < self.tracker.global_epoch - 1
        self._failed_downloads = self._failed_downloads + 1 if behind and not progressed else 0
        trained = self.tracker.has_trained or self.tracker.local_progress.epoch > 0
        if behind and (progressed or (trained and self._failed_downloads >= 2)):
            self._failed_downloads = 0
            self.tracker.distrust_claims_above(self.local_epoch + 1)
        elif self._failed_downloads:  # nobody has what was announced, perhaps because they have just left
            time.sleep(min(MAX_DOWNLOAD_PAUSE_SECONDS, 0.1 * 2**self._failed_downloads))

    def take_refusals(self) -> list[tuple[str, str]]:
        """Peers of which something was not believed since the last call, and why; each once for each reason."""
        refusals = list(self.tracker.take_refusals().items())
        for averager in (self.grad_averager, self.state_averager):
            refusals += [refusal for refusal in averager.take_refusals() if refusal not in refusals]
        return refusals

    def finished_downloads(self) -> list[StateDownload]:
        """States taken from peers since the last call."""
        downloads, self._downloads = self._downloads, []
        return downloads

    def finished_rounds(self) -> list[Round]:
        """Averaging rounds of gradients and parameters that ended since the last call."""
        return self.grad_averager.finished_rounds() + self.state_averager.finished_rounds()


def make_collaborative_optimizer(
    model: torch.nn.Module,
    dht: hivemind.DHT,
    *,
    peer: PeerArguments,
    collaboration: CollaborationArguments,
    training: HFTrainerArguments,
    auxiliary: bool = False,
    shares_state: bool = True,
    metrics_path: Path | None = None,
    identity: Identity | None = None,
) -> LeanOptimizer:
    """Start the averagers of this peer. Must be called on the main thread, before other threads or data loaders start.

    They add what they are about to do to the file ``metrics_path``. An auxiliary peer has no gradients, so nothing of
    its own can be delayed; hivemind fails if asked to. One that has no state worth sharing yet passes
    ``shares_state=False``, and calls `LeanOptimizer.share_state` when it has.
    """
    learning_rate = make_learning_rate(training)
    membership = None if identity is None else identity.membership
    correct_step_cancellation()
    end_searches_without_waiting()
    request_timeout = min(3.0, collaboration.matchmaking_time * 0.8)  # must be shorter, or peers wait for each other
    vain_search = multiprocessing.Value("d", float("-inf"))
    patience = patience_seconds(
        matchmaking_time=collaboration.matchmaking_time, next_chunk_timeout=collaboration.next_chunk_timeout
    )
    averager_options = {
        "min_vector_size": peer.min_vector_size,
        "bandwidth": peer.bandwidth,
        "request_timeout": request_timeout,
        # hivemind would wait for a silent reducer twice as long as for a silent sender. A reducer answers when it has
        # given up the slowest sender, so that it must be waited for a little longer, but not longer than promised.
        "sender_timeout": 0.75 * collaboration.next_chunk_timeout,
        "reducer_timeout": collaboration.next_chunk_timeout,
        "progress_key": f"{peer.run_id}_progress",
        "patience": Patience(math.inf if auxiliary else patience),
        "attendance": Attendance(),
        "vain_search": vain_search,
        "phases_path": metrics_path,
        "membership": membership,
    }
    # Blockwise, not uniform: with one scale for a whole tensor, the small gradients of rare words drown in the error
    # (24 % of a row's norm in the median against 4 %), which LAMB then blows up to full steps.
    compression = SizeAdaptiveCompression(
        threshold=EIGHT_BIT_THRESHOLD, less=Float16Compression(), greater_equal=BlockwiseQuantization()
    )
    delay_step = collaboration.delay_optimizer_step and not auxiliary
    refresh = min(10.0, max(1.0, collaboration.matchmaking_time / 2))
    return LeanOptimizer(
        dht=dht,
        run_id=peer.run_id,
        target_batch_size=collaboration.target_batch_size,
        params=parameter_groups(model, training.weight_decay),
        optimizer=lambda params: make_lamb(params, training),
        scheduler=lambda optimizer: LambdaLR(optimizer, learning_rate),
        matchmaking_time=collaboration.matchmaking_time,
        next_chunk_timeout=collaboration.next_chunk_timeout,
        averaging_timeout=collaboration.averaging_timeout,
        average_state_every=collaboration.average_state_every,
        offload_optimizer=collaboration.offload_optimizer,
        delay_optimizer_step=delay_step,
        delay_grad_averaging=collaboration.delay_grad_averaging and delay_step,
        delay_state_averaging=delay_step,
        reuse_grad_buffers=collaboration.reuse_grad_buffers and not auxiliary,
        grad_compression=compression,
        # parameters, unlike gradients, keep the error: after a round in 8 bits two peers would differ by 1.3 %
        state_averaging_compression=Float16Compression(),
        grad_averager_factory=partial(
            LeanGradientAverager, target_batch_size=collaboration.target_batch_size, **averager_options
        ),
        averager_opts={**averager_options, "allow_state_sharing": None if shares_state else False},
        tracker_opts={
            "min_refresh_period": min(0.5, refresh / 4),
            "default_refresh_period": min(3.0, refresh),
            "max_refresh_period": refresh,
            "vain_search": vain_search,
            "private_key": None if identity is None else identity.private_key,
            "is_member": None if membership is None else lambda owner: not membership.is_revoked(owner),
            "ask_epoch": partial(ask_epoch, dht, peer.initial_peers),
            "tell_epoch": partial(tell_epoch, dht),
            "reachable": partial(reachable, dht),
        },
        shutdown_timeout=LEAVE_SECONDS,
        client_mode=peer.client_mode,
        auxiliary=auxiliary,
        verbose=logger.isEnabledFor(logging.DEBUG),
    )
