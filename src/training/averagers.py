"""hivemind's averagers, made to say how each round went, and two corrections without which peers lose step.

Names of these classes are part of the protocol (they name the remote calls): all peers of a run must use the same ones.
"""

import asyncio
import contextvars
import itertools
import logging
import math
import multiprocessing
import random
import secrets
import time
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from statistics import median_low
from typing import AsyncIterator  # noqa: UP035, hivemind tells a stream by this type, not by that of collections.abc

import torch
from hivemind.averaging.allreduce import AveragingMode
from hivemind.averaging.control import AveragingStage, StepControl
from hivemind.averaging.group_info import GroupInfo
from hivemind.averaging.key_manager import GroupKeyManager
from hivemind.averaging.matchmaking import MatchmakingException
from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.optim.grad_averager import GradientAverager
from hivemind.optim.state_averager import TrainingStateAverager, dump_optimizer_state
from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.proto import averaging_pb2
from hivemind.utils import DHTExpiration, MPFuture, get_dht_time
from hivemind.utils.asyncio import achain, aiter_with_timeout, anext, as_aiter, azip
from hivemind.utils.streaming import combine_from_streaming

from src.training.auth import GatedStub, MemberGate, Membership
from src.training.contributions import Judge, JudgingAllReduce, check_wire_tensor
from src.training.journal import append_record
from src.training.state_check import check_state, far_apart, sample_parameters

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.02
MAX_LEAD = 20  # epochs by which a donor may be ahead of where the swarm was last seen
CURRENT_STEP: contextvars.ContextVar[int] = contextvars.ContextVar("CURRENT_STEP", default=0)
# p2pd now and then loses the end of a stream that its writer closes right after the last message, most of all on a busy
# machine (`pytest -m slow tests/training/test_stream_ends.py` counts it). So writers wait, and readers hang up first.
LINGER_SECONDS = 1.0


@dataclass(frozen=True)
class Round:
    """One attempt to average: ``received`` is the share of values that came back averaged, ``num_peers`` counts all
    members of the group including this one, ``num_lost`` those that failed while sending to this peer, ``num_refused``
    those of whose values some were left out as bad, ``reasons`` is what went wrong between this peer and others."""

    kind: str
    seconds: float
    num_peers: int = 0
    received: float = 0.0
    num_lost: int = 0
    error: str = ""
    reasons: tuple[str, ...] = ()
    num_refused: int = 0

    @property
    def complete(self) -> bool:
        return not self.error and self.received == 1.0 and self.num_lost == 0


class _RoundResult(dict):
    """What hivemind returns for a round (peer id -> gathered data), with the figures of `Round` beside it."""

    received = 1.0
    num_lost = 0
    refused: tuple[str, ...] = ()


class _FailureCollector(logging.Handler):
    """Keeps what hivemind says, at debug level only, of the failures that make a round partial."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.failures: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("Caught"):
            self.failures.append(message)

    def take(self) -> tuple[str, ...]:
        failures, self.failures = tuple(self.failures), []
        return failures


class RoundReporting:
    """Mixin for a `DecentralizedAverager`: sends a `Round` from the averager's process to its owner after each step.

    Also waits for partners that are quicker, see `rpc_aggregate_part`, but not for ever, see `_limit_search`.
    ``phases_path``: a metrics file to which the averager's process adds what it is about to do, as it happens.
    ``search_seconds``: how long the owner of a step is kept waiting for a group. ``vain_search``, which the averagers
    of a peer share, is when that time was last up: nobody is waited for twice.
    Values that ``judge`` refuses are left out of the average.
    """

    round_kind = ""
    judge = Judge(max_weight=1.0)

    def __init__(
        self,
        *args,
        phases_path: Path | None = None,
        search_seconds: float = float("inf"),
        vain_search: Synchronized | None = None,
        membership: Membership | None = None,
        **kwargs,
    ):
        # made before the process is forked, so that both sides hold an end
        self._rounds_receiver, self._rounds_sender = multiprocessing.Pipe(duplex=False)
        self._phases_path, self._search_seconds = phases_path, search_seconds
        self._vain_search = vain_search or multiprocessing.Value("d", float("-inf"))
        self._step_numbers = itertools.count(1)
        self._refusals_receiver, self._refusals_sender = multiprocessing.Pipe(duplex=False)
        self._membership, self._num_active_steps = membership, 0
        self._failures: _FailureCollector | None = None
        super().__init__(*args, **kwargs)

    def _enter(self, phase: str, **details) -> None:
        if self._phases_path is not None:
            append_record(
                self._phases_path, "phase", kind=self.round_kind, step=CURRENT_STEP.get(), phase=phase, **details
            )

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
        return refusals

    # -- only members of a private run may call, and are called

    _gate: MemberGate | None = None  # of the averager's process, which has no other averager

    def _run_internal(self) -> None:
        if self._membership is not None:

            def report(peer: PeerID, objection: str) -> None:
                self._refusals_sender.send((str(peer), objection))

            type(self)._gate = MemberGate(self._membership, self.dht, report)
        super()._run_internal()

    async def _admits(self, peer: PeerID) -> bool:
        return self._gate is None or not await self._gate.objection(peer)

    @classmethod
    def get_stub(cls, p2p: P2P, peer: PeerID, *, namespace: str | None = None):
        stub = super().get_stub(p2p, peer, namespace=namespace)
        return stub if cls._gate is None else GatedStub(stub, peer, cls._gate)

    async def rpc_join_group(
        self, request: averaging_pb2.JoinRequest, context: P2PContext
    ) -> AsyncIterator[averaging_pb2.MessageFromLeader]:
        """Let another trainer join the group that this peer gathers."""
        if not await self._admits(context.remote_id):
            yield averaging_pb2.MessageFromLeader(code=averaging_pb2.PROTOCOL_VIOLATION)
            return
        async for message in super().rpc_join_group(request, context):
            yield message

    # -- rounds

    async def _aggregate_with_group(self, group_info: GroupInfo, **kwargs) -> dict:
        # A trainer whom only auxiliary peers have found would get its own values back, count the round, and be one
        # round ahead of the others. All of such a group see that, and look on until the step's time is up.
        modes = [self.serializer.loads(gathered)[1] for gathered in group_info.gathered]
        if sum(mode != AveragingMode.AUX.value for mode in modes) < 2:
            raise MatchmakingException("the group has no second trainer")
        self._enter("averaging", num_peers=len(modes))
        self._collect_failures()
        result = _RoundResult(await super()._aggregate_with_group(group_info, **kwargs))
        runner = self._running_groups[group_info.group_id].result()
        container = runner.tensor_part_container
        result.received = 1.0 - container.failed_size / container.total_size
        result.num_lost, result.refused = len(runner.banned_senders), runner.refused
        return result

    async def _run_allreduce_inplace_(self, tensors, group_info: GroupInfo, group_id: bytes | None = None, **kwargs):
        """As hivemind's, with a reducer that looks at what it averages."""
        group_id = group_info.group_id if group_id is None else group_id
        runner = JudgingAllReduce(
            judge=self.judge,
            p2p=self._p2p,
            servicer_type=type(self),
            prefix=self.prefix,
            tensors=tensors,
            group_id=group_id,
            ordered_peer_ids=group_info.peer_ids,
            **kwargs,
        )
        self._running_groups[group_id].set_result(runner)
        if runner.is_sender:
            async for tensor, difference in azip(as_aiter(*tensors), runner):
                tensor.add_(difference, alpha=self._averaging_alpha)
                self.last_updated = get_dht_time()
                self._state_updated.set()
        else:
            async for _ in runner:
                pass  # an auxiliary peer has no values of its own that would change

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
        self._enter("matchmaking")
        limit = asyncio.create_task(self._limit_search(step))
        try:
            await super()._step(step=step, future_for_init=future_for_init)
        finally:
            self._num_active_steps -= 1
            gave_up = limit.done() and not limit.cancelled() and limit.result()
            limit.cancel()
            self._enter("idle")
            seconds = time.monotonic() - started
            reasons = self._failures.take() if self._failures is not None else ()
            if isinstance(step._result, _RoundResult):
                result = step._result
                num_refused, reasons = len(result.refused), result.refused + reasons
                self._rounds_sender.send(
                    Round(
                        self.round_kind,
                        seconds,
                        len(result),
                        result.received,
                        result.num_lost,
                        "",
                        reasons,
                        num_refused,
                    )
                )
            elif gave_up:
                message = f"no other trainer was ready within {self._search_seconds:.0f} s"
                self._rounds_sender.send(Round(self.round_kind, seconds, error=message, reasons=reasons))
            elif not step.cancelled():
                error = step._exception
                message = str(error) or repr(error) if error is not None else "no group found"
                self._rounds_sender.send(Round(self.round_kind, seconds, error=message, reasons=reasons))

    async def _limit_search(self, step: StepControl) -> bool:
        """Cancel a step whose owner waits for it in vain; returns whether it did.

        hivemind searches until averaging_timeout. When a swarm's last partner dies, its record outlives it for a while,
        and the survivor would stand still for that long at the end of each epoch.
        """
        began, waiting_since = time.monotonic(), None
        while not step.done():
            await asyncio.sleep(POLL_SECONDS)
            if step._trigger is None or not step.triggered:
                continue
            waiting_since = waiting_since or time.monotonic()
            searching = step.stage == AveragingStage.LOOKING_FOR_GROUP and not self._running_groups
            patience = self._search_seconds if self._vain_search.value < began else 0.0
            if searching and time.monotonic() - waiting_since > patience:
                self._vain_search.value = time.monotonic()
                step.cancel()
                return True
        return False

    async def rpc_download_state(
        self, request: averaging_pb2.DownloadRequest, context: P2PContext
    ) -> AsyncIterator[averaging_pb2.DownloadData]:
        """Hand this peer's state to another one."""
        if not await self._admits(context.remote_id):
            return
        self._enter("serving", peer=str(context.remote_id))
        try:
            async for message in super().rpc_download_state(request, context):
                yield message
            await asyncio.sleep(LINGER_SECONDS)
        finally:
            self._enter("served", peer=str(context.remote_id))


class LeanGradientAverager(RoundReporting, GradientAverager):
    """Averages gradients once an epoch; nobody can have computed more than ``target_batch_size`` samples of them.

    Members of a group tell each other their ``local_epoch()``: the result of a step holds it by peer.
    """

    round_kind = "gradients"

    def __init__(self, *args, target_batch_size: int = 2**20, **kwargs):
        self.judge = Judge(max_weight=target_batch_size)
        super().__init__(*args, **{"allow_state_sharing": False, **kwargs})

    @staticmethod
    def local_epoch() -> int:
        return 0

    def schedule_step(self, scheduled_time: DHTExpiration | None = None, **kwargs) -> StepControl:
        """As hivemind's, with this peer's epoch for the others of the group."""
        return super().schedule_step(scheduled_time, gather=self.local_epoch(), **kwargs)

    def load_state_from_peers(self, **kwargs) -> None:
        """Nothing: gradients are no state. hivemind would download them from a peer and throw them away."""


class LeanStateAverager(RoundReporting, TrainingStateAverager):
    """Averages parameters now and then, and hands the state to peers that join.

    A state is taken from another peer only if it fits, is finite and near to what a second donor has, if there is one;
    else the next donor is asked. ``swarm_epoch()`` is where the swarm is believed to be.
    """

    round_kind = "parameters"

    def __init__(self, *args, **kwargs):
        self.judge = Judge(max_weight=1.0, harmless_rms=0.05, max_distance=0.5)
        self._expected_epoch = multiprocessing.Value("d", 0.0)
        super().__init__(*args, **kwargs)

    @staticmethod
    def swarm_epoch() -> int:
        return 0

    def load_state_from_peers(self, **kwargs):
        """As hivemind's, but the options of the optimizer stay this peer's own, and the schedule sets the rate."""
        self._expected_epoch.value = self.swarm_epoch()
        groups = self.optimizer.param_groups
        own = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        try:
            return super().load_state_from_peers(**kwargs)
        except ValueError as error:  # not reached as long as the check of the averager's process is as strict
            self._refusals_sender.send(("?", f"its state does not fit: {error}"))
            return None
        finally:
            for group, options in zip(groups, own, strict=True):
                group.update(options)
            if self.scheduler is not None:
                rates = zip(groups, self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
                for group, base, factor in rates:
                    group["lr"] = base * factor(self.scheduler.last_epoch)

    # -- in the averager's process

    async def rpc_sample_state(
        self, request: averaging_pb2.AveragingData, context: P2PContext
    ) -> averaging_pb2.AveragingData:
        """A few parameters, by which a joining peer compares donors; ``weight`` is this peer's epoch."""
        if not self.allow_state_sharing or not await self._admits(context.remote_id):
            return averaging_pb2.AveragingData(code=averaging_pb2.PROTOCOL_VIOLATION)
        tensors = self._averaged_tensors
        if not self.reuse_tensors:  # then those of the averager are as old as the last round
            _, tensors, _ = await self._get_current_state_from_host_process()
            tensors = tensors[: len(self._averaged_tensors)]
        samples = sample_parameters(tensors, request.group_id[:64])
        return averaging_pb2.AveragingData(
            code=averaging_pb2.AVERAGED_PART,
            tensor_part=serialize_torch_tensor(samples),
            weight=self.state_sharing_priority,
        )

    async def _load_state_from_peers(self, future: MPFuture, timeout: float | None = None) -> None:
        """Download from donors until one's state is good; hand over ``None`` if none is."""
        try:
            try:
                donors = await self._find_donors()
            except TimeoutError as error:
                self._refusals_sender.send(("?", f"no state was asked for: {error}"))
                return
            for number, donor in enumerate(donors):
                try:
                    metadata, tensors = await self._download(donor)
                    check_state(metadata, tensors, parameters=self._averaged_tensors, optimizer=self.optimizer)
                    await self._compare_donors(donor, metadata["epoch"], tensors, donors)
                except Exception as error:
                    rest = "asking the next donor" if number + 1 < len(donors) else "there is no other donor"
                    reason = str(error) or type(error).__name__
                    self._refusals_sender.send((str(donor), f"its state was not taken: {reason}; {rest}"))
                    continue
                future.set_result((metadata, tensors))
                return
        finally:
            if not future.done():
                future.set_result(None)

    async def _find_donors(self) -> list[PeerID]:
        """Those who offer their state, the newest first; nobody gets ahead of the others by an absurd claim."""
        key = f"{self._matchmaking.group_key_manager.prefix}.all_averagers"
        found = await self._in_time(self.dht.get(key, latest=True, return_future=True), "the swarm's records")
        offers = found.value.items() if found is not None and isinstance(found.value, dict) else ()
        priorities = {
            PeerID(peer): float(entry.value)
            for peer, entry in offers
            if isinstance(peer, bytes) and type(entry.value) in (int, float) and 0 <= entry.value < math.inf
        }
        priorities.pop(self.peer_id, None)
        if not priorities:
            return []
        highest = max(median_low(priorities.values()), self._expected_epoch.value) + 1.0
        return sorted(priorities, key=lambda peer: (min(priorities[peer], highest), random.random()), reverse=True)

    async def _in_time(self, answer, who: str):
        """Await an answer, but not for ever: between two peers that start at once it sometimes never comes."""
        seconds = self.next_chunk_timeout or self.request_timeout
        try:
            return await asyncio.wait_for(answer, seconds)
        except TimeoutError as error:
            raise TimeoutError(f"{who} did not answer within {seconds:.0f} s") from error

    async def _download(self, donor: PeerID) -> tuple[dict, list[torch.Tensor]]:
        stub = self.get_stub(self._p2p, donor, namespace=self.prefix)
        stream = await self._in_time(stub.rpc_download_state(averaging_pb2.DownloadRequest()), "it")
        _, own_tensors = dump_optimizer_state(self.optimizer)
        bytes_left = 2**20 + sum(2 * t.numel() * t.element_size() for t in (*self._averaged_tensors, *own_tensors))
        metadata, parts, tensors = None, [], []

        def finish_tensor():
            tensor = combine_from_streaming(parts)
            check_wire_tensor(tensor)
            tensors.append(deserialize_torch_tensor(tensor).detach())
            parts.clear()

        async for message in aiter_with_timeout(stream, self.next_chunk_timeout or self.request_timeout):
            bytes_left -= message.ByteSize()
            if bytes_left < 0:
                raise ValueError("it is larger than a state can be")
            if message.metadata:
                metadata = self.serializer.loads(message.metadata)
            if message.tensor_part.dtype and parts:  # the first part of the next tensor
                finish_tensor()
            parts.append(message.tensor_part)
        if parts:
            finish_tensor()
        if metadata is None:
            raise ValueError("it sent none")
        return metadata, tensors

    async def _compare_donors(self, donor: PeerID, epoch: int, tensors, donors: list[PeerID]) -> None:
        """Raises ValueError if more of the other donors contradict a state than confirm it."""
        expected, seed = self._expected_epoch.value, secrets.token_bytes(16)
        if epoch > expected + MAX_LEAD:
            raise ValueError(f"it claims epoch {epoch}, the swarm is at {expected:.0f}")
        samples = sample_parameters(tensors[: len(self._averaged_tensors)], seed)
        confirmed, contradictions = 0, []
        for witness in [peer for peer in donors if peer != donor][:3]:
            try:
                stub = self.get_stub(self._p2p, witness, namespace=self.prefix)
                answer = await stub.rpc_sample_state(
                    averaging_pb2.AveragingData(group_id=seed), timeout=self.next_chunk_timeout or self.request_timeout
                )
                check_wire_tensor(answer.tensor_part)
                theirs = deserialize_torch_tensor(answer.tensor_part)
            except Exception as error:
                logger.debug("no samples from %s: %r", witness, error)
                continue
            if not expected - 3 <= answer.weight < math.inf:
                continue  # it has just joined, and has no state of its own yet
            difference = far_apart(samples, theirs)
            if not difference:
                confirmed += 1
                break
            contradictions.append(f"{witness} has another one, {difference}")
        if len(contradictions) > confirmed:
            raise ValueError("; ".join(contradictions))


def correct_step_cancellation() -> None:
    """Let `StepControl.cancel` mark a step as cancelled before it wakes the averager.

    hivemind 1.1.12 wakes the averager's process first. If that looks at the step before it is marked, the round runs
    although its owner no longer takes part, and that peer stays one averaging round off its partners.
    """

    def cancel(self: StepControl) -> bool:
        was_cancelled = MPFuture.cancel(self)
        if self._trigger is not None:
            self._trigger.cancel()
        if self._cancel is not None:
            self._cancel.set_result(None)
        return was_cancelled

    StepControl.cancel = cancel


def end_searches_without_waiting() -> None:
    """Let an averager begin its round at once when it has a group.

    hivemind 1.1.12 first tells the DHT that the search is over and waits for the answers. When a node has died lately
    that takes seconds, in which the other members of the group wait, and give up.
    """
    if hasattr(GroupKeyManager.declare_averager, "waiting"):
        return  # done already
    declare, in_the_background = GroupKeyManager.declare_averager, set()

    async def declare_averager(
        self: GroupKeyManager, group_key, peer_id, expiration_time, looking_for_group: bool = True
    ) -> bool:
        task = asyncio.ensure_future(declare(self, group_key, peer_id, expiration_time, looking_for_group))
        if looking_for_group:
            return await task
        in_the_background.add(task)  # asyncio itself keeps no reference
        task.add_done_callback(in_the_background.discard)
        return True

    declare_averager.waiting = declare
    GroupKeyManager.declare_averager = declare_averager


__all__ = [
    "LeanGradientAverager",
    "LeanStateAverager",
    "Round",
    "correct_step_cancellation",
    "end_searches_without_waiting",
]
