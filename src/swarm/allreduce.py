"""A round of averaging in which each reducer judges what it is sent, and each sender what comes back.

It ends when everybody can compute that it must, see `Schedule`: hivemind 1.1.12 limits only the pause between parts.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import AsyncIterator  # noqa: UP035, hivemind tells a stream by this type, not by that of collections.abc
from weakref import WeakValueDictionary

import torch
from hivemind.averaging.allreduce import AllReduceRunner
from hivemind.averaging.partition import AllreduceException, BannedException, TensorPartContainer
from hivemind.p2p import P2PContext
from hivemind.proto import averaging_pb2
from hivemind.utils.asyncio import aiter_with_timeout, amap_in_executor, attach_event_on_finished

from src.swarm.compression import compression_type, read_tensor
from src.swarm.contributions import Judge
from src.swarm.wire import checked_messages, objection_in, objection_message

logger = logging.getLogger(__name__)
failure_logger = logging.getLogger("hivemind.averaging.allreduce")  # `RoundReporting` collects what is said there

OBJECTION_SECONDS = 1.0  # that a peer to whose averages there is an objection has to read it
PARTING_SECONDS = 0.5  # that a round waits at its end for those who have not hung up yet: they may have an objection
# A member that says nothing of its bandwidth is taken to have the usual one; nobody is waited for as if it had less
# than the least. In Mbit/s.
USUAL_BANDWIDTH, LEAST_BANDWIDTH = 50.0, 2.0
NOTHING = torch.empty(0)
TICK_SECONDS = 0.1  # between two looks at whom a round waits for
RESERVE = 0.25  # of next_chunk_timeout: kept at a round's end for the averages, when nobody's values are waited for


class JudgingReducer:
    """Averages the parts of one round that are this peer's task; stands in for hivemind's `TensorPartReducer`.

    Keeps all contributions to a part until every sender has delivered or failed, then asks ``combine(part_index,
    {sender: (values, weight)})`` for their average, which it keeps until all who wait for it have it. Also unlike
    hivemind's, it does not lose a part for all when one of those who wait for it hangs up.
    """

    def __init__(self, num_parts: int, num_senders: int, combine):
        self.num_parts, self.num_senders, self.combine = num_parts, num_senders, combine
        self.contributions: list[dict] = [{} for _ in range(num_parts)]
        self.averages = [asyncio.get_running_loop().create_future() for _ in range(num_parts)]
        self.num_waiting = [0] * num_parts
        self.failed: set[int] = set()
        self._handed_out = asyncio.get_running_loop().create_future()  # in place of averages that nobody waits for
        self._handed_out.set_result(None)
        self.finished = asyncio.Event()
        if num_parts == 0:
            self.finished.set()

    async def accumulate_part(
        self, sender_index: int, part_index: int, tensor_part: torch.Tensor, weight: float = 1.0
    ) -> torch.Tensor:
        """Hand in a contribution; returns the average when all have delivered theirs."""
        if not 0 <= part_index < self.num_parts:
            raise AllreduceException(f"sent part {part_index + 1} of {self.num_parts}")
        if sender_index in self.failed:
            raise BannedException(f"sender {sender_index} was left out of the round")
        if self.finished.is_set():
            raise AllreduceException("sent a part after the end of the round")
        if self.averages[part_index] is self._handed_out:
            raise AllreduceException(f"sent part {part_index + 1} once more")
        self.contributions[part_index][sender_index] = tensor_part, weight
        self.num_waiting[part_index] += 1
        try:
            self._combine_if_complete(part_index)
            return await asyncio.shield(self.averages[part_index])
        finally:
            self.num_waiting[part_index] -= 1
            if self.num_waiting[part_index] == 0 and self.averages[part_index].done():
                self.averages[part_index] = self._handed_out

    def on_sender_failed(self, sender_index: int) -> None:
        """Wait for no further parts of this sender; those it has delivered count."""
        self.failed.add(sender_index)
        for part_index in range(self.num_parts):
            self._combine_if_complete(part_index)

    def _combine_if_complete(self, part_index: int) -> None:
        if self.finished.is_set() or self.averages[part_index].done():
            return
        contributions = self.contributions[part_index]
        if len(contributions.keys() | self.failed) < self.num_senders:
            return
        try:
            self.averages[part_index].set_result(self.combine(part_index, contributions))
        except Exception as error:  # else all would wait for this part until the round is broken off
            self.averages[part_index].set_exception(
                AllreduceException(f"could not combine part {part_index}: {error!r}")
            )
            self.averages[part_index].exception()  # that nobody asks for it is no reason for a warning
        self.contributions[part_index] = {}
        if all(average.done() for average in self.averages):
            self.finished.set()

    def waits_for(self) -> set[int]:
        """The senders whose values are missing where the others wait; senders go from part to part together."""
        for contributions, average in zip(self.contributions, self.averages, strict=True):
            if not average.done():
                return set(range(self.num_senders)) - contributions.keys() - self.failed
        return set()

    def finalize(self) -> None:
        """End the round: whoever still waits is told so."""
        self.finished.set()
        for average in self.averages:
            average.cancel()


class CheckedContainer(TensorPartContainer):
    """Takes averages from a peer as long as ``check(peer_index, part_index, own part, average)`` has no objection.

    Each replaces the own values when it comes, at a moment when these have been sent. hivemind takes differences from
    the own values, which leaves each peer the error of its own quantisation; and keeps all of them until those of a
    whole tensor can be put together, as large as the largest once more: up to two copies of the model.

    After one the peer's other averages are left, too: the own values stand in for them. ``when_over(peer_index,
    objection)`` is called when no further average of a peer is wanted, with "" if all of them were good; before that
    ``when_failed(peer_index)``, when the call has come to an end without them.
    """

    check = when_failed = staticmethod(lambda *arguments: None)
    when_over = staticmethod(lambda *arguments: None)

    def register_processed_part(self, peer_index: int, part_index: int, part: torch.Tensor) -> None:
        num_parts = self.num_parts_by_peer[peer_index]
        if self._outputs_registered_by_peer[peer_index] == num_parts:
            return  # on its way before the peer heard of the objection
        try:
            if part_index < num_parts:
                self.check(peer_index, part_index, self._input_parts_by_peer[peer_index][part_index][0], part)
        except AllreduceException as error:
            self._stand_in(peer_index)
            self.when_over(peer_index, str(error))
            return
        super().register_processed_part(peer_index, part_index, NOTHING)
        if part.numel():  # else there is nothing to change, see `JudgingAllReduce._combine`
            self._input_parts_by_peer[peer_index][part_index][0].copy_(part)
        if self._outputs_registered_by_peer[peer_index] == num_parts:
            self.when_over(peer_index, "")

    def register_failed_reducer(self, peer_index: int) -> None:
        self.when_failed(peer_index)
        self._stand_in(peer_index)
        self.when_over(peer_index, "")

    def _stand_in(self, peer_index: int) -> None:
        """As hivemind's `register_failed_reducer`; the own values are not judged."""
        for part_index in range(self._outputs_registered_by_peer[peer_index], self.num_parts_by_peer[peer_index]):
            own = self._input_parts_by_peer[peer_index][part_index][0]
            super().register_processed_part(peer_index, part_index, NOTHING)
            self.failed_size += own.numel()

    async def iterate_output_tensors(self) -> AsyncIterator[torch.Tensor]:
        """Ends when all averages have come or are not to come; there is nothing left to yield."""
        self._outputs_consumed = True
        for peer_index, num_parts in enumerate(self.num_parts_by_peer):
            available = self._output_part_available[peer_index]
            while self._outputs_registered_by_peer[peer_index] < num_parts:
                available.clear()
                await available.wait()
                if self.finished.is_set():
                    raise AllreduceException("the round ended before all averages had come")
        return
        yield


class _CheckedStub:
    """Calls a reducer, checks its messages, and hangs up after ``num_parts`` of them or when told to `end`.

    The reducer lingers until then, see `RoundReporting.rpc_aggregate_part`. Hanging up waits until the end of the own
    parts is sent: without it the reducer would take the call for a broken one.

    The own messages end when it is known whether the averages are good, so that the last one may be an objection. Until
    the reducer has read that, what it sends is thrown away: a reducer that nobody reads from reads nothing, either, and
    would stand until its own time is up. ``note(text)`` is called with what the reducer objects to.
    """

    def __init__(self, stub, num_parts: int, note=lambda text: None, on_violation=lambda reason: None):
        self.stub, self.num_parts, self.note, self.on_violation = stub, num_parts, note, on_violation
        self.objection, self.is_over = "", asyncio.Event()
        self._caller: asyncio.Task | None = None

    def end(self, objection: str = "") -> None:
        """No further average is wanted; to be called in the task that takes the averages."""
        if self.is_over.is_set():
            return
        self.objection = objection
        self.is_over.set()
        if objection:
            self._caller = asyncio.current_task()
            asyncio.get_running_loop().call_later(OBJECTION_SECONDS, self._caller.cancel)

    async def rpc_aggregate_part(self, inputs):
        sent_all = asyncio.Event()
        stream = await self.stub.rpc_aggregate_part(attach_event_on_finished(self._with_verdict(inputs), sent_all))
        return self._take_parts(stream, sent_all)

    async def _with_verdict(self, inputs) -> AsyncIterator[averaging_pb2.AveragingData]:
        async for message in inputs:
            if self.objection:
                break
            yield message
        await self.is_over.wait()
        if self.objection:
            yield objection_message(averaging_pb2.PROTOCOL_VIOLATION, self.objection)

    async def _take_parts(self, stream, sent_all: asyncio.Event) -> AsyncIterator[averaging_pb2.AveragingData]:
        num_taken = 0
        async for message in checked_messages(stream, self.on_violation):
            if self.objection:
                break
            reason = objection_in(message)
            if message.code != averaging_pb2.AVERAGED_PART and reason:
                raise AllreduceException(f"ended the call, as this peer {reason}")
            if reason:
                self.note(f"left out values of this peer, the first {reason}")
            yield message
            num_taken += 1
            if num_taken == self.num_parts:
                await sent_all.wait()
                break
        if self.objection:
            with contextlib.suppress(Exception):
                async for message in stream:
                    if message.code != averaging_pb2.AVERAGED_PART:
                        break  # it has heard
                await stream.aclose()
            self._caller.cancel()  # the reason is known; that parts are missing would be no other one
        elif num_taken == self.num_parts:
            await stream.aclose()


@dataclass(frozen=True)
class Schedule:
    """How long a round takes at most, which all its members can compute.

    ``chunk`` is next_chunk_timeout, ``bandwidths`` are those of the members, Mbit/s or None, ``longest`` is what the
    averager ends a round by force after.
    """

    chunk: float
    bandwidths: Sequence[float | None]
    longest: float = math.inf

    def seconds(self, num_bytes: int) -> float:
        """Of the whole round, for so many bytes of values: each peer may send and receive them twice."""
        slowest = min(map(self._counted, self.bandwidths), default=USUAL_BANDWIDTH)
        return min(self.chunk + 2 * 8e-6 * num_bytes / slowest, 0.95 * self.longest)

    def sender_seconds(self, num_bytes: int, one: int, other: int) -> float:
        """For which ``one`` member, by its place in the group, may keep ``other`` waiting, all in all."""
        slower = min(self._counted(self.bandwidths[one]), self._counted(self.bandwidths[other]))
        seconds = (1 - RESERVE) * self.chunk + 2 * 8e-6 * num_bytes / slower
        return min(seconds, self.seconds(num_bytes) - RESERVE * self.chunk)

    @staticmethod
    def _counted(bandwidth: float | None) -> float:
        return max(LEAST_BANDWIDTH, bandwidth or USUAL_BANDWIDTH)


class JudgingAllReduce(AllReduceRunner):
    """One round of averaging under the eyes of a `Judge`; ``refused`` says what was left out, one line a peer.

    ``ignored``: members whose values are not waited for; ``on_violation(peer, reason)`` is called when a member sends
    what no honest peer sends. ``traffic``: the bytes of all messages are added to its "sent" and "received".
    """

    def __init__(
        self,
        *,
        judge: Judge,
        tensors: Sequence[torch.Tensor],
        peer_fractions,
        schedule: Schedule | None = None,
        ignored=frozenset(),
        on_violation=lambda peer, reason: None,
        traffic: Counter | None = None,
        **kwargs,
    ):
        super().__init__(tensors=tensors, peer_fractions=peer_fractions, **kwargs)
        self.judge, self.schedule, self.ignored, self.on_violation = judge, schedule, ignored, on_violation
        self.traffic = Counter() if traffic is None else traffic
        self.tensor_part_reducer.finished.set()  # replaced below; it would complain of having received nothing
        options = {name: kwargs[name] for name in ("compression", "part_size_bytes", "tensor_infos") if name in kwargs}
        self.own_index = self.ordered_peer_ids.index(self.peer_id)
        container = CheckedContainer(tensors, peer_fractions, return_deltas=False, **options)
        container.check, container.when_over = self._check_average, self._end_call
        container.when_failed = self._note_silence
        self._calls: dict[int, _CheckedStub] = {}  # by place in the group
        self._talks: dict[int, asyncio.Task] = {}  # the same
        compression, infos = container.compression, container.tensor_infos
        self.num_bytes = round(
            sum(
                tensor.numel() * tensor.element_size() * compression.estimate_compression_ratio(info)
                for tensor, info in zip(tensors, infos, strict=True)
            )
        )
        self._num_served, self._nobody_served = 0, asyncio.Event()
        self._nobody_served.set()
        self._untold: dict = {}  # peer -> why its values are left out
        self.tensor_part_container = container
        self._own_infos = [info for _, info in container._input_parts_by_peer[self.own_index]]
        self._packed: WeakValueDictionary[int, asyncio.Future] = WeakValueDictionary()  # averages as they travel
        self.parts_for_local_averaging = container.get_raw_input_parts(self.own_index)
        self.tensor_part_reducer = JudgingReducer(
            len(self.parts_for_local_averaging), len(self.sender_peer_ids), self._combine
        )
        self.is_sender = self.peer_id in self.sender_peer_ids
        self._has_values = self.is_sender and self.weight > 0  # auxiliary and who tags along has none to compare with
        self._room = judge.room_for_whole(self._norm(tensors)) if self._has_values else math.inf
        self._averaged: dict[int, float] = {}  # sender -> norm of its parts that entered an average
        self._taken: dict[int, float] = {}  # place in the group -> norm of the averages taken from there
        self.kept_waiting: set = set()  # members of which nothing came, as senders or as reducers
        self._began = time.monotonic()
        self._refusals: Counter = Counter()
        self._first_reasons: dict = {}

    @staticmethod
    def _norm(tensors: Sequence[torch.Tensor]) -> float:
        return math.hypot(*(float(norm) for norm in torch._foreach_norm(list(tensors))))

    def _number(self, peer_index: int, part_index: int) -> int:
        """A part's place among all parts of all tensors, which does not depend on who averages it."""
        return sum(self.tensor_part_container.num_parts_by_peer[:peer_index]) + part_index

    def _combine(self, part_index: int, contributions: dict) -> torch.Tensor:
        """The average; or nothing, if nobody else has sent any or all have sent the same parameters.

        Each keeps its own then, as exact as they are. Parameters travel as float16: an average of equal ones would only
        be rounded, which in a run's last epochs is as much as the optimizer moves them.
        """
        shape = self.parts_for_local_averaging[part_index].shape
        average, refused = self.judge.combine(
            self._number(self.own_index, part_index),
            contributions,
            shape=shape,
            own=self.sender_peer_ids.index(self.peer_id) if self.is_sender else None,
            harmless=0.0,
            small=self._room,
            before=self._averaged,
            names=self.sender_peer_ids,
        )
        for sender, reason in refused.items():
            peer = self.sender_peer_ids[sender]
            self._refusals[peer] += 1
            if peer not in self._first_reasons:
                self._first_reasons[peer] = self._untold[peer] = reason
        return NOTHING if not refused and self._leave_all_as_it_is(part_index, contributions) else average

    def _leave_all_as_it_is(self, part_index: int, contributions: dict) -> bool:
        sent = [values for sender, (values, _) in contributions.items() if self.sender_peer_ids[sender] != self.peer_id]
        if not sent or not self.judge.judges_parameters:
            return not sent
        if not all(torch.equal(values, sent[0]) for values in sent[1:]):
            return False
        if len(sent) == len(contributions):
            return True
        pack, own = self.tensor_part_container.compression.compress, self.parts_for_local_averaging[part_index]
        return torch.equal(read_tensor(pack(own, self._own_infos[part_index])), sent[0])

    def _pack(self, part_index: int, average: torch.Tensor) -> asyncio.Future:
        """An average of this peer's as it travels, for all who wait for it now: their values come from the same bytes.

        So after a complete round all members hold equal values, this one included. Kept as long as one of them needs
        it; packed again, it would be the same.
        """
        packed = self._packed.get(part_index)
        if packed is None:
            pack, loop = self.tensor_part_container.compression.compress, asyncio.get_running_loop()
            packed = loop.run_in_executor(None, pack, average, self._own_infos[part_index])
            self._packed[part_index] = packed
        return packed

    def _check_average(self, peer_index: int, part_index: int, own: torch.Tensor, average: torch.Tensor) -> None:
        if peer_index != self.own_index and (average.numel() or not self.judge.judges_parameters):
            self._taken[peer_index] = self.judge.check_average(
                self._number(peer_index, part_index),
                own,
                average,
                harmless=0.0 if self._has_values else math.inf,
                small=self._room,
                before=self._taken.get(peer_index, 0.0),
            )

    @property
    def refused(self) -> tuple[str, ...]:
        return tuple(
            f"left out {count} of {self.tensor_part_reducer.num_parts} parts of {peer}: the first {reason}"
            for peer, reason in self._first_reasons.items()
            for count in (self._refusals[peer],)
        )

    def missing_peers(self) -> list:
        """Those whose averages or values had not come when the round ended."""
        container, reducer = self.tensor_part_container, self.tensor_part_reducer
        counts = zip(container._outputs_registered_by_peer, container.num_parts_by_peer, strict=True)
        missing = {self.ordered_peer_ids[i] for i, (came, due) in enumerate(counts) if self.is_sender and came < due}
        for contributions, average in zip(reducer.contributions, reducer.averages, strict=True):
            if not average.done() or average.cancelled():
                senders = set(range(reducer.num_senders)) - contributions.keys() - reducer.failed
                missing.update(self.sender_peer_ids[i] for i in senders)
        return [peer for peer in self.ordered_peer_ids if peer in missing and peer != self.peer_id]

    def _get_peer_stub(self, peer):
        index = self.ordered_peer_ids.index(peer)
        num_parts = self.tensor_part_container.num_parts_by_peer[index]
        call = _CheckedStub(
            super()._get_peer_stub(peer),
            num_parts,
            note=partial(self._note_failure, peer),
            on_violation=partial(self.on_violation, peer),
        )
        self._calls[index] = call
        return call

    def _end_call(self, peer_index: int, objection: str) -> None:
        if objection:
            self._note_failure(self.ordered_peer_ids[peer_index], objection)
        if peer_index in self._calls:
            self._calls[peer_index].end(objection)

    @staticmethod
    def _note_failure(peer, reason: str) -> None:
        failure_logger.debug("Caught %r when communicating with %s", AllreduceException(reason), peer)

    async def run(self) -> AsyncIterator[torch.Tensor]:
        """As hivemind's, but in time, and those who take this peer's averages may still say what they think of them."""
        for peer in self.ignored:
            if peer in self.sender_peer_ids:
                await self._ban_sender(peer)
        time_keeper = asyncio.create_task(self._keep_time())
        try:
            async for difference in super().run():
                yield difference
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._nobody_served.wait(), PARTING_SECONDS)
        finally:
            time_keeper.cancel()

    def _note_silence(self, peer_index: int) -> None:
        """Whoever claims a high bandwidth is to average all parts of all others, which are lost if it does not.

        Who cannot be reached, or refuses, does so at once.
        """
        is_silent = self.tensor_part_container._outputs_registered_by_peer[peer_index] == 0
        seconds = math.inf if self.reducer_timeout is None else 0.95 * self.reducer_timeout
        if is_silent and time.monotonic() - self._began > seconds:
            self.kept_waiting.add(self.ordered_peer_ids[peer_index])

    # Three of hivemind's, each with one difference: averages travel as they are, in the run's compression, and who has
    # averaged them takes the same bytes. hivemind 1.1.12 (allreduce.py) sends differences, in the sender's compression.

    async def _communicate_with_peer(self, peer_id) -> None:
        index = self.ordered_peer_ids.index(peer_id)
        self._talks[index] = asyncio.current_task()
        if peer_id == self.peer_id:
            await self._average_own_parts()
            return
        try:
            await self._exchange_parts(peer_id, index)
        except BaseException as error:
            if isinstance(error, Exception):
                failure_logger.debug("Caught %r when communicating to %s", error, peer_id)
            self.tensor_part_container.register_failed_reducer(index)
            raise

    async def _average_own_parts(self) -> None:
        loop, sender = asyncio.get_running_loop(), self.sender_peer_ids.index(self.peer_id)
        for part_index, values in enumerate(self.parts_for_local_averaging):
            average = await self.tensor_part_reducer.accumulate_part(sender, part_index, values, weight=self.weight)
            packed = await asyncio.shield(self._pack(part_index, average))
            average = await loop.run_in_executor(None, read_tensor, packed)
            self.tensor_part_container.register_processed_part(self.own_index, part_index, average)

    async def _exchange_parts(self, peer_id, index: int) -> None:
        container, has_sent = self.tensor_part_container, asyncio.Event()
        inputs = attach_event_on_finished(self._generate_input_for_peer(index), has_sent)
        stream = await self._get_peer_stub(peer_id).rpc_aggregate_part(self._counted(inputs, "sent"))
        if self.should_delay_results(self.peer_id):
            await has_sent.wait()

        def read(message: averaging_pb2.AveragingData) -> torch.Tensor:
            if message.code != averaging_pb2.AVERAGED_PART:
                raise AllreduceException(f"{peer_id} sent {averaging_pb2.MessageCode.Name(message.code)}")
            return read_tensor(message.tensor_part)

        messages, num_taken = aiter_with_timeout(self._counted(stream, "received"), self.reducer_timeout), 0
        async for average in amap_in_executor(read, messages, max_prefetch=container.prefetch):
            container.register_processed_part(index, num_taken, average)
            num_taken += 1
        if num_taken != container.num_parts_by_peer[index]:
            raise AllreduceException(
                f"peer {peer_id} sent {num_taken} parts, but we expected {container.num_parts_by_peer[index]}"
            )

    async def _counted(self, messages, way: str) -> AsyncIterator[averaging_pb2.AveragingData]:
        async for message in messages:
            self.traffic[way] += message.ByteSize()
            yield message

    async def _accumulate_parts_streaming(
        self, stream, sender_index: int
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        reducer, num_averaged = self.tensor_part_reducer, 0
        parts = amap_in_executor(
            lambda message: (read_tensor(message.tensor_part), message.weight),
            stream,
            max_prefetch=self.tensor_part_container.prefetch,
        )
        try:
            async for values, weight in parts:
                try:
                    average = await reducer.accumulate_part(sender_index, num_averaged, values, weight=weight)
                except BannedException:
                    break
                packed = await asyncio.shield(self._pack(num_averaged, average))
                num_averaged += 1
                yield averaging_pb2.AveragingData(code=averaging_pb2.AVERAGED_PART, tensor_part=packed)
        finally:
            if num_averaged != reducer.num_parts:
                await self._ban_sender(self.sender_peer_ids[sender_index])

    # hivemind 1.1.12 (allreduce.py, `rpc_aggregate_part` and `_communicate_with_peer`) limits the time between two
    # messages only: who sends one just before that time is up, again and again, holds a round for as long as it likes.

    async def _keep_time(self) -> None:
        """Leave out senders who keep the others waiting for longer than their bandwidth explains; end the round."""
        if self.schedule is None:
            return
        reducer, late, began = self.tensor_part_reducer, Counter(), time.monotonic()
        ends_at = began + self.schedule.seconds(self.num_bytes)
        last_call, looked_at = ends_at - RESERVE * self.schedule.chunk, began
        while (now := time.monotonic()) < ends_at:
            passed, looked_at = (
                min(now - looked_at, 2 * TICK_SECONDS),
                now,
            )  # if this peer was busy, it is nobody's fault
            for sender in self._others(reducer.waits_for()):
                late[sender] += passed
                # in the end somebody is to blame for it: not those whose turn has just come
                is_last = now > last_call and late[sender] >= max(late.values()) / 2
                if late[sender] > self._may_be_late(sender) or is_last:
                    self._note_failure(
                        self.sender_peer_ids[sender],
                        f"kept the round waiting for {late[sender]:.0f} s, more than its bandwidth explains",
                    )
                    self.kept_waiting.add(self.sender_peer_ids[sender])
                    await self._ban_sender(self.sender_peer_ids[sender])
            await asyncio.sleep(TICK_SECONDS)
        for index, task in self._talks.items():
            if index != self.own_index and not task.done():
                came = self.tensor_part_container._outputs_registered_by_peer[index]
                due = self.tensor_part_container.num_parts_by_peer[index]
                text = f"had sent {came} of {due} averages after {now - began:.0f} s, when the round had to end"
                self._note_failure(self.ordered_peer_ids[index], text)
                task.cancel()
        while not reducer.finished.is_set():
            for sender in self._others(reducer.waits_for()):
                await self._ban_sender(self.sender_peer_ids[sender])
            await asyncio.sleep(0)

    def _others(self, senders: set[int]) -> list[int]:
        return [sender for sender in senders if self.sender_peer_ids[sender] != self.peer_id]

    def _may_be_late(self, sender: int) -> float:
        place = self.ordered_peer_ids.index(self.sender_peer_ids[sender])
        return self.schedule.sender_seconds(self.num_bytes, place, self.own_index)

    async def _ban_sender(self, peer_id) -> None:
        """Leave a sender out of what is not averaged yet; hanging up after the last average is no failure."""
        if not self.tensor_part_reducer.finished.is_set():
            if peer_id not in self.active_senders | self.ignored:
                self.kept_waiting.add(peer_id)
            await super()._ban_sender(peer_id)
        # hivemind 1.1.12 (allreduce.py, `run` awaits `_handle_missing_senders`) ends no round before all have begun to
        # send or sender_timeout is over; for one that is left out there is nothing to wait
        self.active_senders.add(peer_id)
        if self.active_senders >= set(self.sender_peer_ids):
            self.all_senders_started.set()

    async def rpc_aggregate_part(
        self, stream: AsyncIterator[averaging_pb2.AveragingData], context: P2PContext
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        """As hivemind's, with malformed tensors refused before they are read, and reasons given to who is refused."""
        peer = context.remote_id
        if peer not in self.sender_peer_ids:
            yield averaging_pb2.AveragingData(code=averaging_pb2.PROTOCOL_VIOLATION)
            return
        messages = checked_messages(self._counted(stream, "received"), partial(self.on_violation, peer))
        self._num_served += 1
        self._nobody_served.clear()
        try:
            num_sent, code = 0, averaging_pb2.AVERAGED_PART
            async for message in super().rpc_aggregate_part(self._parts_in(messages), context):
                num_sent, code = num_sent + 1, message.code
                if code == averaging_pb2.AVERAGED_PART and peer in self._untold:
                    message.MergeFrom(objection_message(code, self._untold.pop(peer)))
                self.traffic["sent"] += message.ByteSize()
                with self._limit_reading(peer):
                    yield message
            if code != averaging_pb2.AVERAGED_PART:
                return
            if num_sent < self.tensor_part_reducer.num_parts:
                yield objection_message(averaging_pb2.INTERNAL_ERROR, "was left out of the round")
                return
            objection = await self._last_word(messages)
            if objection:
                self._note_failure(peer, objection)
                yield averaging_pb2.AveragingData(code=averaging_pb2.INTERNAL_ERROR)  # heard
        finally:
            self._num_served -= 1
            if self._num_served == 0:
                self._nobody_served.set()

    async def _parts_in(self, messages) -> AsyncIterator[averaging_pb2.AveragingData]:
        """The parts that a caller sends; its call stays open until it knows whether it objects to the averages."""
        for info in self._own_infos:
            message = await anext(messages, None)
            if message is None:
                return
            if message.code == averaging_pb2.PROTOCOL_VIOLATION:
                raise AllreduceException(f"ended its call, as this peer {objection_in(message)}")
            expected = compression_type(self.tensor_part_container.compression, info)
            if message.HasField("tensor_part") and message.tensor_part.compression != expected:
                raise AllreduceException(
                    f"sent values in compression {message.tensor_part.compression}, not {expected} as all others"
                )
            yield message

    @staticmethod
    async def _last_word(messages) -> str:
        """What a caller who has sent all its parts and was sent all averages objects to."""
        with contextlib.suppress(TimeoutError, AllreduceException):
            message = await asyncio.wait_for(anext(messages, None), OBJECTION_SECONDS)
            if message is not None and message.code == averaging_pb2.PROTOCOL_VIOLATION:
                return f"does not take all averages, as this peer {objection_in(message)}"
        return ""

    @contextlib.contextmanager
    def _limit_reading(self, peer):
        """Leave a sender out that does not take an average in time: hivemind would wait for it until the round ends."""
        if self.sender_timeout is None:
            yield
            return

        def leave_out() -> None:
            self._note_failure(peer, f"does not read what it is sent, for {self.sender_timeout:.0f} s")
            self._leaving_out = asyncio.ensure_future(self._ban_sender(peer))

        timer = asyncio.get_running_loop().call_later(self.sender_timeout, leave_out)
        try:
            yield
        finally:
            timer.cancel()


__all__ = ["JudgingAllReduce", "JudgingReducer", "Schedule"]
