"""How far the swarm is, as far as what others claim can be believed.

hivemind 1.1.12 takes the highest epoch that anybody claims for the swarm's and adds up all claimed samples: one forged
record stops the training of all peers for as long as it lasts, or ends each epoch at once.
"""

import logging
import math
import time
from collections.abc import Callable

import pydantic.v1 as pydantic  # as in hivemind
from hivemind.optim.progress_tracker import GlobalTrainingProgress, LocalTrainingProgress, ProgressTracker
from hivemind.utils import get_dht_time

from src.access.ownership import name_of as _name

logger = logging.getLogger(__name__)

MAX_CLOCK_ERROR = 60.0  # seconds that a record's time may lie in the future
# Seconds that it may lie in the past: it is the moment of the last finished batch, and a batch may take minutes.
LONGEST_BATCH = 6 * 3600.0
FASTEST_EPOCH = 0.25  # seconds: nobody finishes epochs quicker than this
MAX_SPEEDUP = 4.0  # how much quicker than this peer's own recent epochs those of others may be
FIRST_DISTRUST, LONGEST_DISTRUST = 60.0, 3600.0  # seconds for which an unproven claim is ignored; doubled each time
NEWS_SECONDS = 10.0  # by which what a peer of this peer's choice says may be out of date
# Keys cost nothing, so what is remembered of those who have them is bounded; so is what is said in one go.
MAX_REMEMBERED, MAX_REFUSALS = 4096, 20


class BoundedProgressTracker(ProgressTracker):
    """hivemind's tracker, less the records that claim what cannot be.

    A record is left out if it is malformed, if its clock is wrong, if it claims more than ten times the samples of an
    epoch, or an epoch further ahead than others can have come since this peer began its own. Samples beyond the target
    and rates beyond four times the swarm's count as that. `distrust_claims_above` is for claims that nobody could prove
    by handing over a state.

    A peer that has not trained an epoch yet, or never does, cannot judge by its own. It goes by what it has at first
    hand (`learn_epoch`) and the time since then. Within these limits, or if it knows nothing, it believes the lowest
    claim, and nobody who is more than one epoch ahead of that: any number of keys costs nothing, so that a majority
    means nothing, and whoever believes too little finds out, while whoever believes too much waits for ever.

    Two halves of a swarm whose network was cut, or two swarms that were begun under one name, meet further apart than
    this. Then a trainer believes as much as the peers of its own choice bear out, see `is_apart`; who has chosen none
    can only be told, since another swarm and a forger look alike.

    ``is_member(public key) -> bool`` leaves out the records of whoever does not belong to a private run.
    ``ask_epoch()`` is what the peers of this peer's choice say, (epoch, seconds since then), or None.
    """

    first_hand: tuple[int, float] | None = None  # an epoch of the swarm, and when (`time.monotonic`) it was in it
    told: tuple[int, float] | None = None  # the same, from the peers of this peer's choice when it last asked them
    _somebody_is_far_ahead = False

    def __init__(
        self,
        *args,
        is_member: Callable[[bytes], bool] | None = None,
        ask_epoch: Callable[[], tuple[int, float] | None] = lambda: None,
        **kwargs,
    ):
        self.is_member, self._ask_epoch = is_member, ask_epoch
        self.has_trained = self._has_samples = False
        self.epoch_since = time.monotonic()  # when this peer began its epoch
        self.seconds_per_epoch: float | None = None
        self.distrusted: dict[bytes, tuple[float, float, int]] = {}  # owner -> until when, how long, above which epoch
        self.last_claims: dict[bytes, int] = {}  # owner of a record -> the epoch it claims
        self.refusals: dict[str, str] = {}  # what was left out, by peer, until it is taken
        self._said: set[tuple[str, str]] = set()
        self.present: dict[bytes, bool] = {}  # owners of the records that were believed -> whether they are clients
        self._limit = math.inf  # the highest epoch that was believed at the last look
        self.samples_per_second = 0.0  # of all trainers that were believed, this one included
        self.ask_for_epoch()
        super().__init__(*args, **kwargs)

    # -- what this peer knows of its own

    def report_local_progress(self, local_epoch: int, samples_accumulated: int, update_global_samples: bool = True):
        """As hivemind's; also takes down how long epochs take."""
        previous, now = self.local_progress.epoch, time.monotonic()
        if local_epoch != previous:
            if local_epoch == previous + 1 and self._has_samples:
                seconds = now - self.epoch_since
                old = self.seconds_per_epoch if self.seconds_per_epoch is not None else seconds
                self.seconds_per_epoch = 0.8 * old + 0.2 * seconds
                self.has_trained = True
            self.epoch_since, self._has_samples = now, False
        self._has_samples = self._has_samples or samples_accumulated > 0
        super().report_local_progress(local_epoch, samples_accumulated, update_global_samples)

    def ask_for_epoch(self) -> None:
        """Ask the peers of this peer's choice where the swarm is, unless this peer can judge by its own epochs."""
        may_judge = self.has_trained and not self._somebody_is_far_ahead
        answer = None if may_judge else self._ask_epoch()
        self.told = None if answer is None else (answer[0], time.monotonic() - answer[1])
        if self.told is not None and not self.has_trained:
            self.first_hand = self.told

    def learn_epoch(self, epoch: int) -> None:
        """Those with whom this peer has averaged, or whose state it has taken, were in ``epoch`` just now.

        It bears out what is believed, and cannot go beyond: whoever claims much can also come to a round.
        """
        known = self.first_hand[0] if self.first_hand is not None else 0
        if known <= epoch <= self._limit:
            self.first_hand = epoch, time.monotonic()

    def known_epoch(self) -> tuple[int, float] | None:
        """What this peer knows without trusting any record: an epoch of the swarm, and how many seconds ago."""
        if self.has_trained:
            return self.local_progress.epoch, time.monotonic() - self.epoch_since
        return None if self.first_hand is None else (self.first_hand[0], time.monotonic() - self.first_hand[1])

    def highest_plausible_epoch(self) -> float:
        """No peer can be further than this; infinite while this peer knows nothing."""
        if not self.has_trained:
            if self.first_hand is None:
                return math.inf
            epoch, since = self.first_hand
            return epoch + 1 + (time.monotonic() - since + NEWS_SECONDS) // FASTEST_EPOCH
        told = self.told
        if told is None:
            return self._highest_by_own_epochs()
        others = told[0] + 1 + (time.monotonic() - told[1] + NEWS_SECONDS) // self._fastest_epoch()
        return max(others, self._highest_by_own_epochs())

    def _fastest_epoch(self) -> float:
        return max(FASTEST_EPOCH, (self.seconds_per_epoch or 0.0) / MAX_SPEEDUP)

    def _highest_by_own_epochs(self) -> float:
        return self.local_progress.epoch + 1 + (time.monotonic() - self.epoch_since) // self._fastest_epoch()

    @property
    def is_apart(self) -> bool:
        """Whether the swarm that this peer believes in is further than its own one can have come."""
        return self.has_trained and self.global_progress.epoch > self._highest_by_own_epochs()

    def distrust_claims_above(self, epoch: int) -> None:
        """Ignore for a while whoever claims a higher epoch: none of the swarm's states is that new.

        Other peers' records may be slow to come, so the first time is short, and each further one twice as long.
        """
        now = time.monotonic()
        for owner, claimed in self.last_claims.items():
            if claimed > epoch and self.distrusted.get(owner, (0.0,))[0] <= now:
                seconds = min(2 * self.distrusted.get(owner, (0, FIRST_DISTRUST / 2, 0))[1], LONGEST_DISTRUST)
                self.distrusted[owner] = now + seconds, seconds, epoch
                if len(self.distrusted) > MAX_REMEMBERED:
                    del self.distrusted[min(self.distrusted, key=lambda key: self.distrusted[key][0])]
        self.global_progress.epoch = min(self.global_progress.epoch, max(epoch, self.local_progress.epoch))

    # -- what others claim

    def _parse_swarm_progress_data(self, metadata) -> GlobalTrainingProgress:
        if isinstance(metadata, dict):
            metadata = self._believable(metadata)
            self.samples_per_second = sum(entry.value["samples_per_second"] for entry in metadata.values())
        return super()._parse_swarm_progress_data(metadata)

    def _believable(self, metadata: dict) -> dict:
        records, now = {}, get_dht_time()
        for owner, entry in metadata.items():
            if entry.value is None:  # said goodbye
                continue
            try:
                record = LocalTrainingProgress.parse_obj(entry.value)
            except pydantic.ValidationError as error:
                self._refuse(owner, "form", f"its progress record is malformed: {error.errors()[0]['msg']}")
                continue
            own = owner == self._local_public_key
            kind, objection = ("", "") if own else self._objection(owner, record, now)
            if objection:
                self._refuse(owner, kind, objection)
            else:
                records[owner] = record
        self.last_claims = {owner: record.epoch for owner, record in records.items() if owner != self._local_public_key}
        own_limit = self._highest_by_own_epochs()
        self._somebody_is_far_ahead = any(epoch > own_limit for epoch in self.last_claims.values())
        possible = self.highest_plausible_epoch()
        self._limit = min(possible, self._limit_by_claims(records, possible))
        accepted = {}
        for owner, record in records.items():
            until, _, highest = self.distrusted.get(owner, (0.0, 0.0, 0))
            proven = max(highest, self.local_progress.epoch + 1)
            if record.epoch > possible and owner != self._local_public_key:
                reason = f"it claims epoch {record.epoch}; at most {possible:.0f} is possible"
                if self.has_trained:
                    reason += "; if there is a swarm that far, join it: --initial_peers with an address you trust"
                self._refuse(owner, "epoch", reason)
            elif record.epoch > self._limit and owner != self._local_public_key:
                continue  # perhaps those who claim less are behind: nobody is to blame
            elif record.epoch > proven and until > time.monotonic():
                reason = f"it claims epoch {record.epoch}, but nobody has a state that new"
                self._refuse(owner, "epoch", reason)
            else:
                accepted[owner] = type(metadata[owner])(self._bounded(record).dict(), metadata[owner].expiration_time)
        self.present = {owner: records[owner].client_mode for owner in accepted}
        return self._with_clients(accepted)

    def _with_clients(self, records: dict) -> dict:
        """hivemind leaves clients out of the swarm's epoch, since they hand over no state. So when one is the first to
        end an epoch, its samples would count no more, and the others would go on without them.

        Here it counts as one epoch ahead at most: for that nobody needs a state. Where all are clients, they count as
        others do: an auxiliary peer hands on their state, see `src.swarm.client_state`."""
        if all(entry.value["client_mode"] for entry in records.values()):
            for entry in records.values():
                entry.value.update(client_mode=False)
            return records
        highest = max(
            (entry.value["epoch"] for entry in records.values() if not entry.value["client_mode"]),
            default=self.local_progress.epoch,
        )
        highest = max(highest, self.local_progress.epoch)
        for entry in records.values():
            if entry.value["client_mode"]:
                entry.value.update(client_mode=False, epoch=min(entry.value["epoch"], highest + 1))
        return records

    def _objection(self, owner: bytes, record: LocalTrainingProgress, now: float) -> tuple[str, str]:
        """What kind of lie it is, and in words; empty if it is none."""
        if self.is_member is not None and not self.is_member(owner):
            return "member", "it is no member of the run"
        if record.samples_accumulated > 10 * self.target_batch_size:
            samples = f"{record.samples_accumulated} samples in an epoch of {self.target_batch_size}"
            return "samples", f"it claims {samples}"
        if not math.isfinite(record.samples_per_second):
            return "speed", "it claims an infinite speed"
        if not -MAX_CLOCK_ERROR < now - record.time < LONGEST_BATCH:
            return "clock", f"its clock is off by {abs(now - record.time):.0f} s"
        return "", ""

    def _limit_by_claims(self, records: dict[bytes, LocalTrainingProgress], possible: float) -> float:
        """For a peer that has not trained: one epoch beyond the lowest claim that fits what it knows.

        Newcomers without samples are in epoch 0, wherever the swarm is.
        """
        epochs = [record.epoch for owner, record in records.items() if owner != self._local_public_key
                  and (record.epoch > 0 or record.samples_accumulated > 0)]  # fmt: skip
        if self.has_trained or not epochs:
            return math.inf
        known = max(self.local_progress.epoch, self.first_hand[0] if self.first_hand is not None else 0) - 1
        return min((epoch for epoch in epochs if known <= epoch <= possible), default=min(epochs)) + 1

    def _bounded(self, record: LocalTrainingProgress) -> LocalTrainingProgress:
        return record.copy(
            update={
                "samples_accumulated": min(record.samples_accumulated, self.target_batch_size),
                "samples_per_second": min(record.samples_per_second, self.target_batch_size / self._fastest_epoch()),
                "time": max(record.time, get_dht_time() - self.metadata_expiration),
            }
        )

    def _refuse(self, owner: bytes, kind: str, reason: str) -> None:
        """``kind`` is what is said of a peer once, not at every look."""
        peer = _name(owner)
        if (peer, kind) in self._said or len(self.refusals) >= MAX_REFUSALS:
            return
        if len(self._said) >= MAX_REMEMBERED:
            self._said.pop()
        self._said.add((peer, kind))
        self.refusals[peer] = reason

    def take_refusals(self) -> dict[str, str]:
        """Whose records were left out since the last call, and why; each peer once for each kind of reason."""
        refusals, self.refusals = self.refusals, {}
        return refusals
