"""Rounds of averaging: who may take part, how long partners are waited for, and how each round went.

A mixin for hivemind's averagers, whose own rounds end without a word when they are partial.
"""

import asyncio
import contextlib
import contextvars
import gc
import hashlib
import itertools
import logging
import math
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterable
from functools import partial
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import AsyncIterator  # noqa: UP035, hivemind tells a stream by this type, not by that of collections.abc

from hivemind.averaging import DecentralizedAverager
from hivemind.averaging.allreduce import AveragingMode
from hivemind.averaging.control import AveragingStage, StepControl
from hivemind.averaging.group_info import GroupInfo
from hivemind.averaging.matchmaking import MatchmakingException
from hivemind.compression import CompressionInfo
from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PHandlerError
from hivemind.proto import averaging_pb2
from hivemind.utils import MPFuture, MSGPackSerializer, get_dht_time
from hivemind.utils.asyncio import achain, anext, as_aiter

from src.access.gate import Gated, MemberGate
from src.access.membership import Membership
from src.metrics.journal import append_record
from src.metrics.records import Phase, Round, printable
from src.swarm.allreduce import JudgingAllReduce, Schedule
from src.swarm.compression import compression_type
from src.swarm.contributions import Judge
from src.swarm.matchmaking import Attendance, LeanMatchmaking, is_trainer
from src.swarm.patience import Patience
from src.swarm.state_transfer import Handouts

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.02
WAY_OF_AVERAGES = "averages as they are"  # before version 3 of the protocol, differences from what was sent
CURRENT_STEP: contextvars.ContextVar[int] = contextvars.ContextVar("CURRENT_STEP", default=0)
OWNER_WAITS: contextvars.ContextVar[list[float]] = contextvars.ContextVar("OWNER_WAITS")  # [since when], or empty
# p2pd now and then loses the end of a stream that its writer closes right after the last message, most of all on a busy
# machine (`pytest -m slow tests/swarm/test_stream_ends.py` counts it). So writers wait, and readers hang up first.
LINGER_SECONDS = 1.0
SEARCH_PAUSE = 0.2  # seconds; hivemind 1.1.12 asks for partners some hundred times a second while there are none
LAST_CALL = 1.0  # seconds in which a leader whose patience is used up begins with those who are there
LEAVING = "this peer is leaving"
GIVEN_UP = "the search was given up"  # for a state that was taken instead
SHORTEST_ROUND = 1 / 3  # of the timeouts, however long the search for the group has taken
# An averager's process must not wait until its owner has read what it reports: a pipe holds 64 KiB.
MAX_REASONS, MAX_REASON_LENGTH = 100, 300
MAX_GATHERED_BYTES = 4096  # what a member of a group says of itself has some thirty
MIN_BANDWIDTH, MAX_BANDWIDTH = 1e-3, 1e6  # Mbit/s that can be meant
ADMISSION_SECONDS = 10.0  # after which one that still takes the state must still be a member
SHUN_SECONDS = 600.0  # for which a peer that has sent what no honest one sends is neither let in nor called
# Who has kept so many of this peer's rounds waiting, one after the other, is left alone as well: for a minute, then, if
# it goes on, for twice as long each time. Whose bandwidth explains that it is slow keeps nobody waiting.
MAX_WAITS, WAIT_SECONDS = 3, 60.0
MAX_SHUNNED = 1000  # a new name costs nothing


class _RoundResult(dict):
    """What hivemind returns for a round (peer id -> gathered data), with the figures of `Round` beside it."""

    received = 1.0
    num_lost = 0
    refused: tuple[str, ...] = ()
    began = 0.0  # `time.monotonic` when the group was complete


class _FailureCollector(logging.Handler):
    """Keeps what hivemind says, at debug level only, of the failures that make a round partial."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.failures: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage().replace("TimeoutError()", "TimeoutError('nothing came in time')")
        if message.startswith("Caught") and len(self.failures) < MAX_REASONS:
            self.failures.append(printable(message, MAX_REASON_LENGTH))  # it may quote another peer

    def take(self) -> tuple[str, ...]:
        failures, self.failures = tuple(self.failures), []
        return failures


def objection_to_member(gathered: bytes) -> str:
    """What is wrong with what a member of a group says of itself: [bandwidth, mode, serialized data]; empty if nothing.

    hivemind 1.1.12 (averager.py, `_aggregate_with_group`) reads that of all members at once, and computes with the
    bandwidths as they are: one member's nonsense breaks the round of all.
    """
    if len(gathered) > MAX_GATHERED_BYTES:
        return f"sends {len(gathered)} bytes about itself"
    try:
        bandwidth, mode, data = MSGPackSerializer.loads(gathered)
        AveragingMode(mode)
        MSGPackSerializer.loads(data)
    except Exception:  # msgpack has a dozen errors
        return "says nothing readable of itself"
    is_number = type(bandwidth) in (int, float)
    if bandwidth is not None and not (is_number and MIN_BANDWIDTH <= bandwidth <= MAX_BANDWIDTH):
        return f"claims a bandwidth of {str(bandwidth)[:40]} Mbit/s"
    return ""


class UncalledStub:
    """In place of the calls to a peer that is shunned."""

    def __init__(self, peer: PeerID):
        self.peer = peer

    def __getattr__(self, name: str):
        async def call(*args, **kwargs):
            raise P2PHandlerError(f"did not call {self.peer}: it has sent what no honest peer sends")

        return call


def paced(function, pause: float):
    """The coroutine function, but its calls begin ``pause`` seconds apart at least."""
    next_start = -math.inf

    async def wait_and_call(*args, **kwargs):
        nonlocal next_start
        await asyncio.sleep(max(0.0, next_start - time.monotonic()))
        next_start = time.monotonic() + pause
        return await function(*args, **kwargs)

    return wait_and_call


class RoundReporting(Gated):
    """Mixin for a `DecentralizedAverager`: sends a `Round` from the averager's process to its owner after each step.

    Also waits for partners that are quicker, see `rpc_aggregate_part`, but not for ever, see `_limit_search`.
    ``phases_path``: a metrics file to which the averager's process adds what it is about to do, as it happens.
    ``progress_key``: where in the DHT trainers report their progress; with it, a round begins as soon as all are there.
    The averagers of a peer share ``patience``, ``attendance``, and ``vain_search``: when one of them last searched long
    and in vain. Values that ``judge`` refuses are left out of the average.
    """

    round_kind = ""
    averages_parameters = False
    # Peer -> until when. Of the class, as `Gated._gate`: in the process that answers, which holds one averager of it.
    _shunned: dict[PeerID, float] = {}
    _remarks: tuple[str, ...] = ()  # for the report of the next round
    _waits: dict[PeerID, int] = {}  # rounds in a row that a peer has kept waiting
    _handouts: Handouts | None = None
    judge = Judge(max_weight=1.0)

    def __init_subclass__(cls, **kwargs):
        """hivemind names calls after the class, and collects them once (servicer.py): in a process that has used the
        class above, an averager would call another name than it answers to."""
        super().__init_subclass__(**kwargs)
        cls._rpc_handlers = cls._stub_type = None

    def __init__(
        self,
        *args,
        phases_path: Path | None = None,
        progress_key: str | None = None,
        patience: Patience | None = None,
        attendance: Attendance | None = None,
        vain_search: Synchronized | None = None,
        membership: Membership | None = None,
        **kwargs,
    ):
        # made before the process is forked, so that both sides hold an end
        self._rounds_receiver, self._rounds_sender = multiprocessing.Pipe(duplex=False)
        self._phases_path, self.patience = phases_path, patience or Patience()
        self._progress_key, self.attendance = progress_key, attendance or Attendance()
        self._vain_search = vain_search or multiprocessing.Value("d", float("-inf"))
        self._step_numbers = itertools.count(1)
        self._refusals_receiver, self._refusals_sender = multiprocessing.Pipe(duplex=False)
        self._num_refusals_unread = multiprocessing.Value("i", 0)
        self._membership, self._num_active_steps = membership, 0
        self._failures: _FailureCollector | None = None
        self._traffic: Counter = Counter()  # bytes "sent" and "received" in rounds, since the last one that ended
        super().__init__(*args, **kwargs)

    def _enter(self, phase: str, **details) -> None:
        if self._phases_path is not None:
            append_record(self._phases_path, Phase(self.round_kind, CURRENT_STEP.get(), phase, **details))

    def finished_rounds(self) -> list[Round]:
        """Rounds that ended since the last call; to be called by the owner, often enough for the pipe not to fill."""
        rounds = []
        while self._rounds_receiver.poll():
            rounds.append(self._rounds_receiver.recv())
        return rounds

    def take_refusals(self) -> list[tuple[str, str]]:
        """Peers that were not let in since the last call, and why."""
        refusals = []
        while self._refusals_receiver.poll():
            refusals.append(self._refusals_receiver.recv())
        with self._num_refusals_unread.get_lock():
            self._num_refusals_unread.value -= len(refusals)
        return refusals

    def _report_refusal(self, peer: str, reason: str) -> None:
        with self._num_refusals_unread.get_lock():
            if self._num_refusals_unread.value >= MAX_REASONS:
                return
            self._num_refusals_unread.value += 1
        self._refusals_sender.send((peer, printable(reason, MAX_REASON_LENGTH)))

    def assist(self, *, ahead: float) -> StepControl:
        """As an auxiliary peer: take part in the next round, whenever it is.

        It has nothing to get ready, so it always looks for a group. It announces itself for a moment ``ahead`` seconds
        from now: later than any trainer, so that it follows one, and leads only those who cannot lead themselves.
        """
        return DecentralizedAverager.step(self, gather=None, scheduled_time=get_dht_time() + ahead, wait=False)

    # -- who sends what no honest peer sends is left alone for a while

    @classmethod
    def _is_shunned(cls, peer: PeerID) -> bool:
        return cls._shunned.get(peer, -math.inf) > time.monotonic()

    def _shun(self, peer: PeerID, reason: str, seconds: float = SHUN_SECONDS) -> None:
        if self._is_shunned(peer):
            return
        now = time.monotonic()
        others = {other: until for other, until in self._shunned.items() if until > now}
        if len(others) >= MAX_SHUNNED:
            del others[min(others, key=others.get)]
        type(self)._shunned = {**others, peer: now + seconds}
        self.attendance.leave_out(peer.to_bytes(), seconds)
        self._report_refusal(str(peer), f"{reason}; it is left alone for {seconds / 60:.0f} minutes")
        self._remark(f"{peer} {reason}")

    def _note_waits(self, members: Iterable[PeerID], kept_waiting: set[PeerID]) -> None:
        """Of a round that is over. One key would else cost every round as long as a silent member is waited for."""
        waits = {peer: count for peer, count in self._waits.items() if peer not in members}
        for peer in kept_waiting:
            waits[peer] = count = self._waits.get(peer, 0) + 1
            if count >= MAX_WAITS:
                seconds = min(WAIT_SECONDS * 2 ** (count - MAX_WAITS), SHUN_SECONDS)
                self._shun(peer, f"has kept {count} rounds waiting, one after the other", seconds)
        self._waits = dict(list(waits.items())[-MAX_SHUNNED:])

    def _remark(self, text: str) -> None:
        if len(self._remarks) < MAX_REASONS:
            self._remarks = (*self._remarks, printable(text, MAX_REASON_LENGTH))

    @classmethod
    def get_stub(cls, p2p: P2P, peer: PeerID, *, namespace: str | None = None):
        return UncalledStub(peer) if cls._is_shunned(peer) else super().get_stub(p2p, peer, namespace=namespace)

    def _usable_members(self, group_info: GroupInfo) -> GroupInfo:
        """The group without those of whom nothing can be known; all its members see it alike.

        Whoever leads should not have let them in, but to leave would be to leave all the others.
        """
        kept = {}
        for peer, gathered in zip(group_info.peer_ids, group_info.gathered, strict=True):
            if objection := objection_to_member(gathered):
                if peer == self.peer_id:
                    raise MatchmakingException("the group's leader says about this peer what it has not said")
                self._shun(peer, objection)
            else:
                kept.setdefault(peer, gathered)  # each once
        if len(kept) == len(group_info.peer_ids):
            return group_info
        return GroupInfo(group_info.group_id, tuple(kept), tuple(kept.values()))

    # -- only members of a private run may call, and are called

    def _run_internal(self) -> None:
        gc.freeze()  # what this process was forked with lasts: it takes a second to search that for garbage
        type(self)._shunned = {}
        if self._membership is not None:
            look_up = partial(self.dht.get, latest=True, return_future=True)
            type(self)._gate = MemberGate(
                self._membership, look_up, lambda peer, objection: self._report_refusal(str(peer), objection)
            )
        super()._run_internal()

    async def rpc_join_group(
        self, request: averaging_pb2.JoinRequest, context: P2PContext
    ) -> AsyncIterator[averaging_pb2.MessageFromLeader]:
        """Let another trainer join the group that this peer gathers."""
        if not await self._admits(context.remote_id):
            yield averaging_pb2.MessageFromLeader(code=averaging_pb2.PROTOCOL_VIOLATION)
            return
        if objection := objection_to_member(request.gather):
            self._shun(context.remote_id, objection)
        if self._is_shunned(context.remote_id):
            yield averaging_pb2.MessageFromLeader(code=averaging_pb2.PROTOCOL_VIOLATION)
            return
        self.attendance.came(context.remote_id.to_bytes())
        async for message in super().rpc_join_group(request, context):
            yield message
        await asyncio.sleep(LINGER_SECONDS)  # who does not hear that the group is complete leaves it, unknown to others

    # -- rounds

    @property
    def schema_hash(self) -> bytes:
        """Of the tensors, as hivemind's, and of how they travel: peers that differ in that find no group together."""
        compression = self.allreduce_kwargs["compression"]
        infos = map(CompressionInfo.from_tensor, self._averaged_tensors)
        types = [compression_type(compression, info) for info in infos]
        return hashlib.sha256(self._hash_of_shapes + f"{WAY_OF_AVERAGES} {types}".encode()).digest()

    @schema_hash.setter
    def schema_hash(self, hash_of_shapes: bytes) -> None:
        self._hash_of_shapes = hash_of_shapes

    @property
    def _matchmaking(self):
        return self._paced_matchmaking

    @_matchmaking.setter
    def _matchmaking(self, matchmaking) -> None:
        key_manager = matchmaking.group_key_manager
        key_manager.get_averagers = paced(key_manager.get_averagers, SEARCH_PAUSE)
        if self._progress_key is not None:
            matchmaking = LeanMatchmaking.adopt(
                matchmaking,
                attendance=self.attendance,
                progress_key=self._progress_key,
                averages_parameters=self.averages_parameters,
                may_linger=lambda: not self.patience.owner_is_blocked,
            )
        self._paced_matchmaking = matchmaking

    async def _aggregate_with_group(self, group_info: GroupInfo, **kwargs) -> dict:
        # A trainer whom only auxiliary peers have found would get its own values back, count the round, and be one
        # round ahead of the others. All of such a group see that, and look on until the step's time is up.
        group_info = self._usable_members(group_info)
        modes = [self.serializer.loads(gathered)[1] for gathered in group_info.gathered]
        if sum(mode != AveragingMode.AUX.value for mode in modes) < 2:
            raise MatchmakingException("the group has no second trainer")
        self._enter("averaging", num_peers=len(modes))
        self._collect_failures()
        kwargs.update(self._round_timeouts())
        began = time.monotonic()
        try:
            result = _RoundResult(await super()._aggregate_with_group(group_info, **kwargs))
        except MatchmakingException as error:
            if not isinstance(error.__context__, asyncio.CancelledError):
                raise
            raise MatchmakingException(  # hivemind's text would end in a colon
                f"the round was broken off after {time.monotonic() - began:.0f} s{self._waited_for(group_info)}"
            ) from error
        result.began = began
        runner = self._running_groups[group_info.group_id].result()
        container = runner.tensor_part_container
        result.received = 1.0 - container.failed_size / container.total_size
        result.num_lost, result.refused = len(runner.banned_senders), runner.refused
        self._note_waits(set(group_info.peer_ids) - runner.ignored, runner.kept_waiting)
        return result

    def _waited_for(self, group_info: GroupInfo) -> str:
        runner = self._running_groups.get(group_info.group_id)
        peers = runner.result().missing_peers() if runner is not None and runner.done() else ()
        return f", while it waited for {', '.join(map(str, peers))}" if peers else ""

    def _seconds_left(self) -> float:
        """Of this peer's patience, while the owner of the present step waits for it."""
        since = OWNER_WAITS.get([])
        return self.patience.left - (time.monotonic() - since[0] if since else 0.0)

    def _shortest_round(self) -> float:
        return SHORTEST_ROUND * (self.next_chunk_timeout or 0.0)

    def _round_timeouts(self) -> dict[str, float]:
        """Those of hivemind's options, but shorter when patience is running out: what a peer waits for is the sum."""
        limits = {name: self.allreduce_kwargs.get(name) for name in ("sender_timeout", "reducer_timeout")}
        if not self.next_chunk_timeout or None in limits.values():
            return {}
        share = min(1.0, max(self._seconds_left() / self.next_chunk_timeout, SHORTEST_ROUND))
        return {name: share * limit for name, limit in limits.items()}

    def _schedule(self, group_info: GroupInfo) -> Schedule | None:
        if not self.next_chunk_timeout:
            return None
        bandwidths = [self.serializer.loads(gathered)[0] for gathered in group_info.gathered]
        return Schedule(self.next_chunk_timeout, bandwidths, longest=self._allreduce_timeout or math.inf)

    async def _run_allreduce_inplace_(self, tensors, group_info: GroupInfo, group_id: bytes | None = None, **kwargs):
        """As hivemind's, with a reducer that looks at what it averages."""
        group_id = group_info.group_id if group_id is None else group_id
        runner = JudgingAllReduce(
            judge=self.judge,
            schedule=self._schedule(group_info),
            ignored=frozenset(filter(self._is_shunned, group_info.peer_ids)),
            on_violation=self._shun,
            traffic=self._traffic,
            p2p=self._p2p,
            servicer_type=type(self),
            prefix=self.prefix,
            tensors=tensors,
            group_id=group_id,
            ordered_peer_ids=group_info.peer_ids,
            **kwargs,
        )
        self._running_groups[group_id].set_result(runner)
        async for _ in runner:
            pass  # averages replace the ``tensors`` as they come, see `CheckedContainer`
        if runner.is_sender:  # an auxiliary peer has no values of its own that would change
            self.last_updated = get_dht_time()
            self._state_updated.set()

    def _collect_failures(self) -> None:
        """In the averager's own process, so that the caller's loggers stay as they are."""
        if self._failures is None:
            self._failures = _FailureCollector()
            allreduce_logger = logging.getLogger("hivemind.averaging.allreduce")
            allreduce_logger.addHandler(self._failures)
            allreduce_logger.setLevel(logging.DEBUG)
            allreduce_logger.propagate = False

    async def rpc_aggregate_part(
        self, stream: AsyncIterator[averaging_pb2.AveragingData], context: P2PContext
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        """Average a part that a partner sends; if it is quicker than this peer, wait until this peer's round begins.

        hivemind 1.1.12 means to wait, too, but does it with an event that the end of the *previous* round sets. When
        that one ends after the search for this group has begun, early parts are refused and the round stays partial.
        """
        request = await anext(stream)
        if not await self._admits(context.remote_id):
            yield averaging_pb2.AveragingData(code=averaging_pb2.PROTOCOL_VIOLATION)
            await asyncio.sleep(LINGER_SECONDS)
            return
        give_up_at = time.monotonic() + (self.next_chunk_timeout or float("inf"))
        while (
            request.group_id not in self._running_groups
            and self._num_active_steps > 0
            and time.monotonic() < give_up_at
        ):
            await asyncio.sleep(POLL_SECONDS)
        async for message in super().rpc_aggregate_part(achain(as_aiter(request), stream), context):
            yield message
        await asyncio.sleep(LINGER_SECONDS)

    async def _step(self, *, step: StepControl, future_for_init: MPFuture) -> None:
        started = time.monotonic()
        self._num_active_steps += 1
        CURRENT_STEP.set(next(self._step_numbers))
        OWNER_WAITS.set([])
        self._enter("matchmaking")
        limit = asyncio.create_task(self._limit_search(step))
        try:
            await super()._step(step=step, future_for_init=future_for_init)
        finally:
            self._num_active_steps -= 1
            given_up = limit.result() if limit.done() and not limit.cancelled() else ""
            limit.cancel()
            # A round and its tensors end in reference cycles, of which Python may take notice after a hundred rounds:
            # it counts objects, not bytes.
            asyncio.get_running_loop().call_later(2 * LINGER_SECONDS, gc.collect)
            for since in OWNER_WAITS.get():
                self.patience.spend(time.monotonic() - since)
            self._enter("idle")
            seconds = time.monotonic() - started
            reasons = self._failures.take() if self._failures is not None else ()
            reasons, self._remarks = self._remarks + reasons, ()
            if isinstance(step._result, _RoundResult):
                result = step._result
                if not is_trainer(step.data_for_gather):  # an assistant has been looking since its last round
                    seconds = time.monotonic() - result.began
                self._report(
                    seconds,
                    num_peers=len(result),
                    received=result.received,
                    num_lost=result.num_lost,
                    reasons=result.refused + reasons,
                    num_refused=len(result.refused),
                )
            elif given_up == LEAVING:
                pass  # no failure
            elif given_up:
                self._report(seconds, error=given_up, reasons=reasons)
            elif not step.cancelled():
                error = step._exception
                message = (
                    printable(str(error) or repr(error), MAX_REASON_LENGTH) if error is not None else "no group found"
                )
                self._report(seconds, error=message, reasons=reasons)

    def _report(self, seconds: float, **figures) -> None:
        sent, received = self._traffic.pop("sent", 0), self._traffic.pop("received", 0)
        self._rounds_sender.send(Round(self.round_kind, seconds, bytes_sent=sent, bytes_received=received, **figures))

    async def _limit_search(self, step: StepControl) -> str:
        """Cancel a step whose owner waits for it in vain; returns why, or nothing if the search was over before.

        hivemind searches until averaging_timeout. When a swarm's last partner dies, its record outlives it for a while,
        and the survivor would stand still for that long at the end of each epoch.
        """
        waiting_since = OWNER_WAITS.get()
        while not step.done():
            await asyncio.sleep(POLL_SECONDS)
            if step._trigger is None or not step.triggered:
                continue
            if not waiting_since:
                waiting_since.append(time.monotonic())
            searching = step.stage == AveragingStage.LOOKING_FOR_GROUP and not self._running_groups
            if isinstance(self._matchmaking, LeanMatchmaking):
                searching = searching and self._matchmaking.is_searching(step)
            if searching and (reason := self._why_to_give_up(step, time.monotonic() - waiting_since[0])):
                step._cancel.set_result(None)  # before the owner hears of it: else it sets this, too, and one set fails
                MPFuture.cancel(step)
                return reason
        return ""

    def _why_to_give_up(self, step: StepControl, seconds: float) -> str:
        """Empty as long as there is hope; ``seconds`` is how long the search's owner has waited for it."""
        if self.patience.is_over:
            return LEAVING
        if self.patience.spent == float("inf"):
            return GIVEN_UP
        lean = self._matchmaking if isinstance(self._matchmaking, LeanMatchmaking) else None
        if self._seconds_left() >= self._shortest_round():
            if lean is not None and lean.is_in_vain(step):
                return f"no other trainer was ready or about to be; looked for {seconds:.0f} s"
            return ""
        if lean is not None and lean.current_followers and self._seconds_left() > self._shortest_round() - LAST_CALL:
            lean.time_is_up = True  # better a group of some than none
            return ""
        if self.patience.spent > self._shortest_round():
            return f"after the epoch's other round only {seconds:.0f} s were left, and no other trainer was ready"
        self._vain_search.value = time.monotonic()
        return f"no other trainer was ready within {seconds:.0f} s"

    async def rpc_download_state(
        self, request: averaging_pb2.DownloadRequest, context: P2PContext
    ) -> AsyncIterator[averaging_pb2.DownloadData]:
        """Hand this peer's state to another one."""
        messages = self._hand_out(context, super().rpc_download_state(request, context))
        async with contextlib.aclosing(messages):
            async for message in messages:
                yield message

    async def _hand_out(self, context: P2PContext, state, *, again: bool = False):
        """The messages of a ``state``, if the caller may have it; ``again``: it goes on where it was broken off."""
        if not await self._admits(context.remote_id) or self._is_shunned(context.remote_id):
            return
        if self._handouts is None:
            self._handouts = Handouts()
        peer = context.remote_id.to_bytes()
        if again:
            self._handouts.end(peer)
        if objection := self._handouts.objection(peer):
            logger.debug("no state for %s: %s", context.remote_id, objection)
            await asyncio.sleep(LINGER_SECONDS)  # it may ask again at once
            return
        self.attendance.came(peer)
        self._enter("serving", peer=str(context.remote_id))
        admitted_at = time.monotonic()
        try:
            handout = self._handouts.hand_out(peer, state)
            async with contextlib.aclosing(handout) as messages:
                async for message in messages:
                    if time.monotonic() > admitted_at + ADMISSION_SECONDS:  # a slow one may be shut out meanwhile
                        if not await self._admits(context.remote_id):
                            return
                        admitted_at = time.monotonic()
                    yield message
            await asyncio.sleep(LINGER_SECONDS)
        finally:
            self._enter("served", peer=str(context.remote_id))


__all__ = ["RoundReporting"]
