"""hivemind's optimizer over our averagers: when it looks for partners, takes their state, steps."""

import logging
import time
from collections.abc import Iterable
from concurrent.futures import CancelledError

import hivemind
from hivemind.averaging.control import StepControl
from hivemind.p2p import PeerID

from src.access.ownership import MAX_LIFETIME
from src.access.record_limits import befriend
from src.metrics.records import Round, StateDownload
from src.swarm.averagers import (
    LeanGradientAverager,
    LeanStateAverager,
    read_introductions,
)
from src.swarm.patience import Patience
from src.swarm.progress import LeanProgressTracker

logger = logging.getLogger(__name__)

MAX_DOWNLOAD_PAUSE_SECONDS = 2.0
ASSISTANTS_AHEAD = 10.0  # times --matchmaking_time, see `RoundReporting.assist`


class LeanOptimizer(hivemind.Optimizer):
    """`hivemind.Optimizer` over our averagers, which says how its averaging rounds went.

    It looks for a group when it has something to average, not before: so whoever looks is ready, a group can begin when
    all are there, and it consists of those who are there then.
    """

    client_mode = False  # as long as hivemind has not set it
    state_averager_class = LeanStateAverager
    kind = ""  # of averagers, in the names under which they find each other
    makes_local_steps, inner_steps = False, 0  # since the start, see `src.swarm.local_steps`
    _partner_is_ahead = _is_late = _was_left_behind = False
    _is_apart = _are_apart = False  # this peer's parameters; those of some member of its rounds
    _state_every = 1
    _partners: frozenset[PeerID] = frozenset()  # in the last round

    def __init__(self, *args, **kwargs):
        self._downloads: list[StateDownload] = []
        self._failed_downloads = 0  # in a row
        self._assisting: dict[str, StepControl] = {}  # by kind of round
        self.before_epoch_ends = lambda: None
        super().__init__(*args, **kwargs)
        self.load_state_timeout = self.state_averager.longest_download()

    # Members of a complete round hold equal gradients, so their parameters stay equal. Whoever has got only a part of
    # the averages says so in its next round, and all members of that one average parameters as soon as they can.

    @property
    def average_state_every(self) -> int:
        return 1 if self._are_apart else self._state_every

    @average_state_every.setter
    def average_state_every(self, epochs: int) -> None:
        self._state_every = epochs

    def _is_news_that_it_is_apart(self) -> bool:
        return self._is_apart and not self._are_apart

    def _make_gradient_averager(self, *args, **kwargs) -> LeanGradientAverager:
        averager = super()._make_gradient_averager(*args, **kwargs)
        averager.local_epoch, averager.is_apart = lambda: self.local_epoch, self._is_news_that_it_is_apart
        return averager

    def _make_state_averager(self, **kwargs) -> LeanStateAverager:
        averager = self.state_averager_class(
            dht=self.dht,
            prefix=f"{self.run_id}{self.kind}_state_averager",
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
        members, _ = read_introductions(step.result())
        self._meet(members)
        epochs = [epoch for epoch in members.values() if type(epoch) is int]
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
            if self.local_epoch % self.average_state_every == 0:  # parameters are being averaged
                self._is_apart = self._are_apart = False
        self._tell_epoch()

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
        received = 0.0
        try:
            result = maybe_step_control.result(self.averaging_timeout)
            received = getattr(result, "received", 1.0)
            epochs, is_one_apart = read_introductions(result)
            self._are_apart |= is_one_apart
            self._notice_partners_ahead(epochs)
            self._meet(epochs)
        except CancelledError:  # nobody was found, so nobody is there to average parameters with, either
            self.give_up_waiting()
            self._was_left_behind = self._is_late
        except BaseException as error:
            logger.debug("gradients were not averaged: %r", error)
        self._is_apart |= received < 1.0
        self._take_averages(received)

    def _take_averages(self, received: float) -> None:
        """A round is over, of which this share has come back; 0 if it failed."""
        # The buffers still hold this peer's own gradients, then. hivemind reloads them from accumulators, which it has
        # reset in the meantime, and so would step with the next epoch's first gradients instead.
        self._load_averaged_gradients_into_optimizer_()

    def discard_gradients(self) -> int:
        """Those accumulated so far are not finite; returns the samples that are lost with them."""
        averager = self.grad_averager
        if not averager.reuse_grad_buffers:  # then the bad ones have not been added yet
            return 0
        samples = averager.local_samples_accumulated
        averager.reset_accumulated_grads_()
        self.tracker.report_local_progress(self.local_epoch, samples_accumulated=0)
        return samples

    def forget_local_work(self) -> None:
        """The parameters and the optimizer's copy of them have been replaced by others."""

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
        """From now on hand this peer's state to those that join; a client, to those whom it has called."""
        if self.client_mode:
            self.state_averager.offer_state(self.local_epoch)
        elif not self.auxiliary:
            self.state_averager.allow_state_sharing = True

    def _tell_epoch(self) -> None:
        """Of a client's state; hivemind tells that of others."""
        if self.client_mode and self.state_averager.allow_state_sharing:
            self.share_state()

    def keep_state(self, epoch: int) -> None:
        """As an auxiliary peer that has just taken the state of ``epoch``: hand it on if it came from a client, whom
        nobody else can call. Trainers that can be called have a newer one."""
        averager = self.state_averager
        averager.state_sharing_priority = epoch
        averager.allow_state_sharing = averager.took_state_of_client

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
            self._is_apart = self.state_averager.lacks_epochs
            self.tracker.learn_epoch(self.local_epoch)
        self._tell_epoch()
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
