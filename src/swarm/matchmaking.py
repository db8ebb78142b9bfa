"""Whom a round of averaging waits for: those who can take part, as long as they may need, and nobody else.

hivemind 1.1.12 begins a round when the time of its leader is up (`--matchmaking_time`), however early all have asked.
Here the leader begins as soon as everybody is there of whom the DHT says that they are about to come.
"""

import asyncio
import logging
import time
import zlib
from collections.abc import Callable
from multiprocessing.sharedctypes import RawArray
from statistics import median_low

import pydantic.v1 as pydantic  # as in hivemind
from hivemind.averaging.allreduce import AveragingMode
from hivemind.averaging.control import StepControl
from hivemind.averaging.group_info import GroupInfo
from hivemind.averaging.matchmaking import Matchmaking
from hivemind.optim.progress_tracker import LocalTrainingProgress
from hivemind.p2p import PeerID
from hivemind.proto import averaging_pb2
from hivemind.utils import MSGPackSerializer, get_dht_time

from src.access.ownership import peer_of

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.02
LOOK_SECONDS = 0.5  # between two looks at who is there, while a group is gathered
LONG_WAIT = 0.8  # of the time of a search: whoever could have come in it, and did not, is not waited for again
APART_SECONDS = 10.0  # for which nobody waits for a trainer that is too many epochs away
FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 1.0, 16.0


class Attendance:
    """Which peers did not come to a round that waited for them; the averagers of one peer share it.

    Such a peer is waited for no more until it turns up by itself: a record of somebody who never comes costs one wait.
    One that has come before is given another chance after one round, then after three, seven and so on.

    Peers are told apart by a checksum; when two share one, at worst a round does not wait for the second. Must be made
    before the averagers' processes are forked.
    """

    SIZE, FOR_EVER = 2**16, 2**30

    def __init__(self):
        self._misses, self._skips, self._has_come = (RawArray("i", self.SIZE) for _ in range(3))
        self._left_out_until = RawArray("d", self.SIZE)  # `time.monotonic`

    def _place(self, peer: bytes) -> int:
        return zlib.crc32(peer) % self.SIZE

    def is_awaited(self, peer: bytes) -> bool:
        place = self._place(peer)
        return self._skips[place] == 0 and self._left_out_until[place] <= time.monotonic()

    def leave_out(self, peer: bytes, seconds: float) -> None:
        """Wait for a peer no more, even if it comes."""
        self._left_out_until[self._place(peer)] = time.monotonic() + seconds

    def came(self, peer: bytes) -> None:
        """To a round, or with a request of another kind: it can reach this peer."""
        place = self._place(peer)
        self._misses[place], self._skips[place], self._has_come[place] = 0, 0, 1

    def missed(self, peer: bytes) -> None:
        """A round began without it, although it could have been there."""
        place = self._place(peer)
        if self._skips[place] > 0:
            self._skips[place] -= self._skips[place] < self.FOR_EVER
            return
        self._misses[place] += 1
        self._skips[place] = 2 ** min(self._misses[place], 20) - 1 if self._has_come[place] else self.FOR_EVER


class Surroundings:
    """What the DHT says of other peers at one moment: the trainers' progress, and who looks for a group."""

    def __init__(self, progress: dict[bytes, LocalTrainingProgress], looking: set[bytes]):
        self.progress, self.looking = progress, looking

    def still_computing(self, epoch: int, *, parameters: bool) -> set[bytes]:
        """Trainers that come when their batch is done: they have samples of this epoch.

        ``parameters``: of a round of parameters, which the trainers begin the new ``epoch`` with.
        """
        if parameters:
            return self.of_epoch(epoch) | self.still_computing(epoch - 1, parameters=False)
        return {peer for peer in self.of_epoch(epoch) if self.progress[peer].samples_accumulated > 0}

    def beginning(self, epoch: int) -> set[bytes]:
        """Trainers that have no samples of this epoch yet, so that the others lose nothing without them."""
        return {peer for peer in self.of_epoch(epoch) if self.progress[peer].samples_accumulated == 0}

    def ready(self, epoch: int) -> set[bytes]:
        """Peers that need no time: whoever looks for a group, and trainers that have just ended this epoch."""
        return self.looking | self.of_epoch(epoch + 1)

    def of_epoch(self, epoch: int) -> set[bytes]:
        return {peer for peer, its in self.progress.items() if its.epoch == epoch}


def read_progress(metadata: object) -> dict[bytes, LocalTrainingProgress]:
    """{peer id: what it reports} of the trainers that have not said goodbye, from the DHT's value for the progress.

    The id is that of the key that has signed the record; the one that the record itself states may be anybody's.
    """
    found = {}
    for owner, entry in metadata.items() if isinstance(metadata, dict) else ():
        if (peer := peer_of(owner)) is None:
            continue
        try:
            found[peer] = LocalTrainingProgress.parse_obj(entry.value)
        except pydantic.ValidationError:  # the progress tracker names whoever sends such things
            continue
    return found


class LeanMatchmaking(Matchmaking):
    """hivemind's search for a group, but a leader begins when all are there for whom it is worth to wait.

    Trainers that still compute a batch of the epoch are waited for until the leader's time is up; whoever needs no
    time, such as an assistant, ``request_timeout`` after the last of them. A trainer that would be alone also waits for
    those that have just begun the epoch, as long as it ``may_linger``: it has something else to do meanwhile.

    It also asks a leader again that did not let this peer in, because it was busy, say: hivemind never does until that
    leader's next announcement. Two swarms of one name have groups of their own, see `is_of_another_swarm`.
    """

    attendance: Attendance
    progress_key: str
    averages_parameters: bool
    may_linger: Callable[[], bool]

    @classmethod
    def adopt(
        cls,
        matchmaking: Matchmaking,
        *,
        attendance: Attendance,
        progress_key: str,
        averages_parameters: bool,
        may_linger: Callable[[], bool],
    ) -> "LeanMatchmaking":
        """Turn the object that hivemind has made into one of this class: it offers no factory."""
        matchmaking.__class__ = cls
        matchmaking.attendance, matchmaking.progress_key = attendance, progress_key
        matchmaking.averages_parameters, matchmaking.may_linger = averages_parameters, may_linger
        matchmaking._found_for = None
        matchmaking._start_search()
        return matchmaking

    def _start_search(self) -> None:
        self.time_is_up = False  # set from outside: begin with those who are there
        self._began = self._somebody_awaited_at = time.monotonic()
        self._computing_until = self._looked_at = -float("inf")
        self._first: Surroundings | None = None
        self._now: Surroundings | None = None
        self._asked_at: dict[PeerID, float] = {}
        self._retry_seconds: dict[PeerID, float] = {}

    async def look_for_group(self, step: StepControl) -> GroupInfo | None:
        """As hivemind's; a group may come about before the leader's time is up."""
        watch, group, self._found_for = asyncio.create_task(self._begin_when_all_are_there(step)), None, None
        try:
            group = await super().look_for_group(step)
        finally:
            watch.cancel()
            if group is None:
                self._note_missing(step, set(), self._began, self._first, self._now)
        if group is not None:  # the others wait for this peer's part: nothing may come before that
            self._found_for = step
            self._noting = asyncio.create_task(
                self._note_attendance(step, {peer.to_bytes() for peer in group.peer_ids}, self._began, self._first)
            )
        return group

    def is_searching(self, step: StepControl) -> bool:
        """Whether the step's group is still to be found; until the step's stage says so, it takes a moment."""
        is_found = self._found_for is step or (self.step_control is step and self.assembled_group.done())
        return not is_found

    def is_in_vain(self, step: StepControl) -> bool:
        """Whether nobody can be expected any more, and nobody has been for a while."""
        if self.current_leader is not None or self._num_trainers(step) > 1 or self._now is None:
            return False
        self.awaited(step)  # notes when there was somebody
        return time.monotonic() > self._somebody_awaited_at + self.request_timeout

    def awaited(self, step: StepControl) -> set[bytes]:
        """The peers that are not in this peer's group, but worth to wait for."""
        epoch, now = self._epoch(step), time.monotonic()
        if epoch is None or self._now is None:
            return set()
        missing = self._now.still_computing(epoch, parameters=self.averages_parameters)
        if missing := self._worth_waiting_for(missing):
            self._computing_until = now
        elif now < max(self._began, self._computing_until) + self.request_timeout:
            missing = self._worth_waiting_for(self._now.ready(epoch))
        if not missing and self._num_trainers(step) < 2 and self.may_linger():
            missing = self._worth_waiting_for(self._now.beginning(epoch))
        if missing:
            self._somebody_awaited_at = now
        return missing

    def _worth_waiting_for(self, peers: set[bytes]) -> set[bytes]:
        return set(filter(self.attendance.is_awaited, peers - {peer.to_bytes() for peer in self.current_followers}))

    def _epoch(self, step: StepControl) -> int | None:
        """The epoch of the round: this peer's, or for an assistant that of the trainers who have asked."""
        epochs = [epoch_of(step.data_for_gather)]
        if epochs == [None]:
            epochs = [epoch_of(request.gather) for request in self.current_followers.values()]
        epochs = [epoch for epoch in epochs if epoch is not None]
        return median_low(epochs) if epochs else None

    # -- leading

    def is_of_another_swarm(self, gathered: bytes) -> bool:
        """Whether who says that of itself trains too many epochs away: its gradients are those of other parameters.

        A peer may be one epoch behind another: the others have just ended theirs. An assistant cannot judge, as it has
        no epoch of its own, and anybody may be the first to ask it.
        """
        own = epoch_of(self.step_control.data_for_gather) if self.step_control is not None else None
        other = epoch_of(gathered)
        return own is not None and other is not None and abs(own - other) > 1

    def _check_reasons_to_reject(self, request, context):
        reason = super()._check_reasons_to_reject(request, context)
        if reason is None and self.is_of_another_swarm(request.gather):
            self.attendance.leave_out(context.remote_id.to_bytes(), APART_SECONDS)
            reason = averaging_pb2.MessageFromLeader(code=averaging_pb2.NOT_LOOKING_FOR_GROUP)
        return reason

    async def _begin_when_all_are_there(self, step: StepControl) -> None:
        while self.step_control is not step:  # an earlier search has not ended yet
            await asyncio.sleep(POLL_SECONDS)
        self._start_search()
        while True:
            await asyncio.sleep(POLL_SECONDS)
            if self.current_leader is not None:
                continue
            try:
                await self._look_around(step)
                if self._may_begin(step):
                    async with self.lock_request_join_group:
                        if self._may_begin(step) and not self.assembled_group.done():
                            await self.leader_assemble_group()
            except Exception as error:  # hivemind's own rule holds, then: a round begins when the time is up
                logger.debug("could not look who is there: %r", error)

    async def _look_around(self, step: StepControl) -> None:
        if time.monotonic() < self._looked_at + LOOK_SECONDS:
            return
        self._looked_at = time.monotonic()
        # hivemind looks for earlier leaders only until it is sure of the earliest, which an assistant's announcement
        # for a far moment makes it too soon.
        self.potential_leaders.update_triggered.set()
        if self._epoch(step) is not None:
            self._now = await self._surroundings()
            self._first = self._first or self._now

    async def _surroundings(self) -> Surroundings:
        keys = self.group_key_manager
        looks = asyncio.gather(
            keys.dht.get(self.progress_key, latest=True, return_future=True),
            keys.get_averagers(keys.current_key, only_active=True),
        )
        found, looking = await asyncio.wait_for(looks, self.request_timeout)
        progress, own = read_progress(found.value if found is not None else None), self.peer_id.to_bytes()
        progress.pop(own, None)
        return Surroundings(progress, {peer.to_bytes() for peer, _ in looking} - {own})

    def _may_begin(self, step: StepControl) -> bool:
        if self.client_mode or self.current_leader is not None or self._num_trainers(step) < 2:
            return False
        now = time.monotonic()
        self._asked_at = {peer: self._asked_at.get(peer, now) for peer in self.current_followers}
        # Nobody waits longer than that, also if this peer is an assistant, whose own search has no end.
        if self.time_is_up or min(self._asked_at.values()) < now - self.min_matchmaking_time:
            return True
        return self._now is not None and not self.awaited(step)

    def _num_trainers(self, step: StepControl) -> int:
        """In the group that this peer leads, itself included."""
        asked = [step.data_for_gather, *(request.gather for request in self.current_followers.values())]
        return sum(map(is_trainer, asked))

    # -- following

    def get_request_expiration_time(self) -> float:
        """As hivemind's; who cannot lead follows also a leader whose own time is later, such as an assistant."""
        if self.client_mode:
            return min(get_dht_time() + 100 * self.min_matchmaking_time, self.potential_leaders.search_end_time)
        return super().get_request_expiration_time()

    async def _request_join_group(self, leader: PeerID) -> GroupInfo | None:
        group = await super()._request_join_group(leader)
        if group is None:
            seconds = self._retry_seconds.get(leader, FIRST_RETRY_SECONDS)
            self._retry_seconds[leader] = min(2 * seconds, LONGEST_RETRY_SECONDS)
            asyncio.get_running_loop().call_later(seconds, self._forget_attempts, leader)
        return group

    def _forget_attempts(self, leader: PeerID) -> None:
        attempts = self.potential_leaders.past_attempts
        attempts.difference_update([attempt for attempt in attempts if attempt[0] == leader])

    # -- after the search

    async def _note_attendance(
        self, step: StepControl, members: set[bytes], began: float, first: Surroundings | None
    ) -> None:
        """Remember who came and who was waited for in vain. All members do, since each may be the next to lead."""
        for peer in members:
            self.attendance.came(peer)
        if time.monotonic() < began + self.request_timeout:
            return  # nobody was waited for
        try:
            self._note_missing(step, members, began, first, await self._surroundings())
        except Exception as error:
            logger.debug("could not look who is missing: %r", error)

    def _note_missing(
        self,
        step: StepControl,
        members: set[bytes],
        began: float,
        first: Surroundings | None,
        last: Surroundings | None,
    ) -> None:
        """Whoever could have come all the time, from the ``first`` to the ``last`` look, has missed the round."""
        waited, epoch = time.monotonic() - began, self._epoch(step)
        if epoch is None or first is None or last is None:
            return
        missing, known = set(), first.looking.union(*map(first.of_epoch, (epoch - 1, epoch, epoch + 1)))
        if waited > self.request_timeout:
            # when there was no group, the others may have had theirs before this peer came, and be in the next epoch
            missing |= last.ready(epoch) if members else last.looking
        if waited > LONG_WAIT * self.min_matchmaking_time:
            missing |= last.of_epoch(epoch) | (last.of_epoch(epoch - 1) if self.averages_parameters else set())
        for peer in known & missing - members:
            self.attendance.missed(peer)


def is_trainer(gathered: bytes) -> bool:
    """Whether a member of a group has values of its own; ``gathered`` as for `epoch_of`."""
    try:
        return MSGPackSerializer.loads(gathered)[1] != AveragingMode.AUX.value
    except Exception:  # msgpack has a dozen errors
        return False


def epoch_of(gathered: bytes) -> int | None:
    """The epoch in which a member of a group asked for it; None for an assistant, or if it does not say.

    ``gathered`` is what the member sends along: [bandwidth, mode, serialized epoch, or a list that begins with it].
    """
    try:
        said = MSGPackSerializer.loads(MSGPackSerializer.loads(gathered)[2])
        epoch = said[0] if isinstance(said, (list, tuple)) else said
    except Exception:
        return None
    return epoch if type(epoch) is int and is_trainer(gathered) else None


__all__ = ["Attendance", "LeanMatchmaking", "Surroundings", "read_progress"]
