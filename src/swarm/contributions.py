"""What may enter an average: nothing that is not finite, far larger than usual, or weighted beyond reason.

hivemind 1.1.12 adds up whatever arrives, so one peer's NaN ruins the parameters of all. Here a reducer looks at all
contributions to a part before it averages them, and a sender looks at what reducers send back. Not detected: values
of ordinary size that point the wrong way.
"""

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median, median_high, median_low
from typing import AsyncIterator  # noqa: UP035, hivemind tells a stream by this type, not by that of collections.abc

import torch
from hivemind.averaging.allreduce import AllReduceRunner
from hivemind.averaging.partition import AllreduceException, BannedException, TensorPartContainer
from hivemind.p2p import P2PContext
from hivemind.proto import averaging_pb2, runtime_pb2
from hivemind.utils.asyncio import attach_event_on_finished

logger = logging.getLogger(__name__)
failure_logger = logging.getLogger("hivemind.averaging.allreduce")  # `RoundReporting` collects what is said there

MAX_NORM_RATIO = 10.0  # how far a part's norm may lie above the usual one, whatever the rest of the contribution is
# Honest peers differ by more than that in single parts: who has no labels of sentence order has no gradient there, nor
# in the rows of words it never meets. So a part may be anything, as long as all of the sender's parts together stay
# below this many times what is usual for a whole contribution. Measured in a tiny model at the end of its training: the
# gradient of a language that it has not seen yet was 60 times that of the one it knows, in batches of equal size.
MAX_WHOLE_RATIO = 80.0
# One round shows little of what is usual: a single sample that the model knew by heart had 1/350 of another's.
# Without own values and memory there is even less to go by: the first parts of a round may be unlike the rest.
FIRST_WHOLE_RATIO, UNKNOWN_RATIO = 500.0, 1e6
FORGETTING = 0.9  # a round
# Between the parameters of honest peers, as a share of their norm: what is always allowed, in the first round, how many
# times what was usual in the rounds before, and how many times what this peer has moved by itself since others' values
# entered its own: without a common round of gradients each goes its own way. All rounds of late may move them in one
# direction by DRIFT_RATIO times what is allowed, or many small lies would be a large one.
LEAST_DISTANCE, FIRST_DISTANCE, DISTANCE_RATIO, MOVEMENT_RATIO, DRIFT_RATIO = 0.02, 0.1, 20.0, 3.0, 1.5
USUAL_GROWTH = 1.02  # a round: else who goes to the limit once would be usual in the next
# Root mean squares: up to the first, parameters are as good as zero, and a step of the optimizer is more than a share.
TINY_PARAMETERS, SMALL_DISTANCE = 0.006, 0.003
DRIFT_SAMPLES = 256  # of a part, by which its drift is told
MAX_WEIGHT_RATIO = 2.0  # to the median of a round of three or more: nobody's samples count more
ROUND_DTYPES = {"float32", "float16", "bfloat16", "float64"}  # only such values have an average
WIRE_DTYPES = ROUND_DTYPES | {"uint8", "int64", "int32", "bool"}  # the optimizer's state has those, too
MAX_OBJECTION_LENGTH = 200  # bytes
OBJECTION_SECONDS = 1.0  # that a peer to whose averages there is an objection has to read it
PARTING_SECONDS = 0.5  # that a round waits at its end for those who have not hung up yet: they may have an objection
# A member that says nothing of its bandwidth is taken to have the usual one; nobody is waited for as if it had less
# than the least. In Mbit/s.
USUAL_BANDWIDTH, LEAST_BANDWIDTH = 50.0, 2.0
TICK_SECONDS = 0.1  # between two looks at whom a round waits for
RESERVE = 0.25  # of next_chunk_timeout: kept at a round's end for the averages, when nobody's values are waited for
BLOCK_SIZE, CODE_BOOK_SIZE = 4096, 256  # of hivemind's blockwise quantization


def check_wire_tensor(tensor: runtime_pb2.Tensor, dtypes: set[str] = WIRE_DTYPES) -> None:
    """Raises ValueError if a tensor message contradicts itself, or is none of ``dtypes``.

    bitsandbytes reads a blockwise tensor without checks: with a short code book it would read beyond the buffer.
    """
    if tensor.dtype not in dtypes:
        raise ValueError(f"a tensor of type {tensor.dtype!r}")
    if min(tensor.size, default=0) < 0:
        raise ValueError(f"a tensor of shape {list(tensor.size)}")
    if tensor.compression != runtime_pb2.BLOCKWISE_8BIT:
        return  # the others are read by numpy and torch, which check
    num_values = math.prod(tensor.size)
    num_blocks = -(-num_values // BLOCK_SIZE)
    header = num_blocks.to_bytes(8, "little") + CODE_BOOK_SIZE.to_bytes(8, "little")
    if (
        not tensor.buffer.startswith(header)
        or len(tensor.buffer) != 16 + 4 * (num_blocks + CODE_BOOK_SIZE) + num_values
    ):
        raise ValueError("a blockwise quantized tensor whose sizes contradict each other")


async def checked_messages(
    stream, on_violation: Callable[[str], None] = lambda reason: None
) -> AsyncIterator[averaging_pb2.AveragingData]:
    """The messages of a round, as long as their tensors are well-formed; then an `AllreduceException`.

    ``on_violation(reason)`` is called before that: no honest peer ever sends such a thing.
    """
    async for message in stream:
        if message.HasField("tensor_part"):
            try:
                check_wire_tensor(message.tensor_part, ROUND_DTYPES)
            except ValueError as error:
                on_violation(f"sent {error}")
                raise AllreduceException(f"sent {error}") from error
            # hivemind (compression/serialization.py, `deserialize_torch_tensor`) does as it is told here: then whatever
            # is computed with this part asks for a gradient, too, in the end the averager's own tensors
            message.tensor_part.requires_grad = False
        yield message


def objection_message(code: int, reason: str) -> averaging_pb2.AveragingData:
    """A message that says what is wrong with the other side's values, in a field that hivemind leaves empty there."""
    return averaging_pb2.AveragingData(code=code, peer_id=reason.encode()[:MAX_OBJECTION_LENGTH])


def objection_in(message: averaging_pb2.AveragingData) -> str:
    return message.peer_id[:MAX_OBJECTION_LENGTH].decode(errors="replace")


class Usual:
    """The highest of the norms of late, and from how many rounds that is known."""

    def __init__(self):
        self.norm, self.num_rounds = 0.0, 0

    def remember(self, norm: float) -> None:
        self.norm = max(norm, FORGETTING * self.norm)
        self.num_rounds += 1

    def ratio(self) -> float:
        """How far a whole contribution may lie above what is usual."""
        return FIRST_WHOLE_RATIO if self.num_rounds <= 1 else MAX_WHOLE_RATIO


class Drift:
    """Where others' values have led a part of the parameters, told by samples at places that nobody else knows."""

    def __init__(self, num_values: int):
        generator = torch.Generator().manual_seed(secrets.randbits(62))
        self.places = torch.randint(num_values, (DRIFT_SAMPLES,), generator=generator)
        self.led, self.left_at = torch.zeros(DRIFT_SAMPLES), None

    def remember(self, own: torch.Tensor, difference: torch.Tensor) -> None:
        """``own`` values become ``own + difference``."""
        samples = difference.reshape(-1)[self.places]
        self.led.mul_(FORGETTING).add_(samples)
        self.left_at = own.reshape(-1)[self.places] + samples

    def with_difference(self, difference: torch.Tensor) -> float:
        """How far the values would be led with one more difference."""
        samples = self.led * FORGETTING + difference.reshape(-1)[self.places]
        return float(samples.norm()) * math.sqrt(difference.numel() / DRIFT_SAMPLES)

    def own_movement(self, own: torch.Tensor) -> float:
        """Since then, as a share of the norm."""
        samples = own.reshape(-1)[self.places]
        return float((samples - self.left_at).norm() / samples.norm().clamp_min(1e-30))


class Judge:
    """Decides which contributions to a part are averaged; remembers across rounds what is usual.

    What is usual follows this peer's own values, which nobody else can move; only who has none goes by the others'.

    ``max_weight``: a larger weight counts as this, one beyond ten times this is not believed at all.
    ``harmless_rms``: values whose root mean square is not above this are never too large.
    ``max_distance``: how far values may lie from this peer's own at most, as a share of their norm; None: anywhere. For
    parameters, which are nearly equal on all peers: up to that it depends on what is usual, see `LEAST_DISTANCE`.
    """

    def __init__(self, *, max_weight: float, harmless_rms: float = 0.0, max_distance: float | None = None):
        self.max_weight, self.harmless_rms, self.max_distance = max_weight, harmless_rms, max_distance
        self.whole, self.parts = Usual(), defaultdict(Usual)  # by number of the part
        self.distances: dict[int, float] = defaultdict(float)  # the same
        self.drifts: dict[int, Drift] = {}

    def room_for_whole(self, own_norm: float) -> float:
        """Up to which norm a whole contribution is believed, to be asked once a round; infinite if nothing is known."""
        if self.max_distance is not None:
            return 0.0  # parameters hardly differ, in no part
        self.whole.remember(own_norm)
        return self.whole.ratio() * self.whole.norm or math.inf

    def combine(
        self,
        part: int,
        contributions: dict[int, tuple[torch.Tensor, float]],
        *,
        shape: torch.Size,
        own: int | None,
        harmless: float,
        small: float = 0.0,
        before: dict[int, float] | None = None,
    ) -> tuple[torch.Tensor, dict[int, str]]:
        """The weighted mean of the contributions to a part that can be believed, and why others cannot, by sender.

        ``own``: which contribution is this peer's; ``harmless``: a norm up to which a part is never too large;
        ``small``: one up to which a sender's parts of this round together are not, infinite if this peer's own values
        say nothing of that; ``before``: what that norm is without this part, by sender, and is then with it.
        """
        before = {} if before is None else before
        refused, weights, norms = {}, {}, {}
        for sender, (values, weight) in contributions.items():
            try:
                norms[sender] = self._checked_norm(values, weight, shape)
                weights[sender] = min(weight, self.max_weight)
            except ValueError as error:
                refused[sender] = str(error)
            except Exception as error:  # whatever it is that it sent: the others have their average
                refused[sender] = f"cannot be read: {error!r}"
        sums = {sender: math.hypot(norm, before.get(sender, 0.0)) for sender, norm in norms.items()}
        unlike = self._too_large(part, norms, sums, weights, shape, own, harmless, small)
        unlike.update(self._too_far(part, contributions, norms, weights, own))
        for sender in unlike:
            del weights[sender], norms[sender], sums[sender]
        before.update(sums)
        refused.update(unlike)
        if not weights:  # not even this peer's own: better nothing than NaN
            values = contributions[own][0] if own in contributions else torch.zeros(shape)
            return torch.nan_to_num(values, 0.0, 0.0, 0.0), refused
        # the higher of two: else one who sends nothing but zeros would make the other's values look large
        self.parts[part].remember(norms[own] if weights.get(own) else median_high(norms.values()))
        is_trainer = bool(weights.get(own))
        counted = [weight for weight in weights.values() if weight > 0]
        if len(counted) > 2:  # of two, who has done more would lose most of it
            limit = MAX_WEIGHT_RATIO * median(counted)
            weights = {sender: min(weight, limit) for sender, weight in weights.items()}
        total = math.fsum(weights.values())
        if total == 0:  # all only tag along: nobody will use the result
            weights, total = dict.fromkeys(weights, 1.0), float(len(weights))
        average = torch.zeros(shape)
        for sender, weight in weights.items():
            average.add_(contributions[sender][0], alpha=weight)
        average.div_(total)
        if self.max_distance is not None and is_trainer and len(counted) > 1:
            self._remember_drift(part, contributions[own][0], average - contributions[own][0])
        return average, refused

    def _checked_norm(self, values: torch.Tensor, weight: float, shape: torch.Size) -> float:
        """Raises ValueError if no average can be taken of a contribution."""
        if values.shape != shape:
            raise ValueError(f"has shape {list(values.shape)} instead of {list(shape)}")
        if not values.is_floating_point():
            raise ValueError(f"has values of type {values.dtype}")
        if not 0 <= weight <= 10 * self.max_weight:  # nor NaN
            raise ValueError(f"has the weight {weight:g}, possible are 0 to {self.max_weight:g}")
        if not math.isfinite(norm := float(values.norm())):
            raise ValueError("is not finite")
        return norm

    def _too_large(self, part, norms, sums, weights, shape, own, harmless, small) -> dict[int, str]:
        if not norms:
            return {}
        usual = self.parts[part].norm
        if weights.get(own):
            reference, typical_weight = max(usual, norms[own]), weights[own]
        else:  # most of the others cannot lie far from what they usually send
            middle = median_low(norms.values())
            reference = max(usual, min(middle, MAX_NORM_RATIO * usual) if usual else middle)
            typical_weight = median_low(weights.values())
        if small == math.inf:
            small = self._room_by_memory(part, median_low(sums.values()))
        harmless = max(harmless, self.harmless_rms * math.sqrt(shape.numel()))
        refused = {}
        for sender, norm in norms.items():
            # gradients of fewer samples are noisier, with the root of their number; they weigh less, too
            allowance = math.sqrt(max(1.0, typical_weight / weights[sender])) if weights[sender] > 0 else math.inf
            if not self._is_possible(norm, sums[sender], reference * allowance, harmless, small * allowance):
                refused[sender] = f"has the norm {norm:.3g} where {reference:.3g} is usual"
        return refused

    def _room_by_memory(self, part: int, middle: float) -> float:
        """For `small` where there are no own values: what was usual in all parts that this peer has averaged so far."""
        if self.max_distance is not None:
            return 0.0  # see `room_for_whole`
        known = math.hypot(*(usual.norm for usual in self.parts.values()))
        if known and self.parts[part].num_rounds:
            return self.parts[part].ratio() * known
        return UNKNOWN_RATIO * max(known, middle) or math.inf

    @staticmethod
    def _is_possible(norm: float, with_others: float, reference: float, harmless: float, small: float) -> bool:
        return norm <= max(MAX_NORM_RATIO * reference, harmless) or with_others <= small

    def _too_far(self, part, contributions, norms, weights, own) -> dict[int, str]:
        # hivemind lets an auxiliary peer take part with old values and a weight of zero: they say nothing of others'
        if self.max_distance is None or not weights.get(own):
            return {}
        refused, shares, own_values = {}, [], contributions[own][0]
        for sender in (sender for sender, weight in weights.items() if weight > 0 and sender != own):
            difference = contributions[sender][0] - own_values
            if reason := self._distance_objection(part, own_values, difference):
                refused[sender] = reason
            else:
                shares.append(float(difference.norm()) / max(norms[own], 1e-30))
        if shares:
            self._remember_distance(part, median_low(shares))
        return refused

    def _distance_objection(self, part: int, own: torch.Tensor, difference: torch.Tensor) -> str:
        """Why parameters cannot differ like this from this peer's; empty if they can."""
        own_norm, distance, allowed = float(own.norm()), float(difference.norm()), self._allowed_distance(part, own)
        if distance > allowed:
            return f"lies {distance:.3g} from this peer's values, which have the norm {own_norm:.3g}"
        if part in self.drifts:
            led = self.drifts[part].with_difference(difference)
            if led > DRIFT_RATIO * allowed:
                return f"leads this peer's values, which have the norm {own_norm:.3g}, by {led:.3g} in a few rounds"
        return ""

    def _allowed_distance(self, part: int, own: torch.Tensor) -> float:
        own_norm, root = float(own.norm()), math.sqrt(own.numel())
        if part in self.drifts:
            movement = MOVEMENT_RATIO * self.drifts[part].own_movement(own)
            share = max(LEAST_DISTANCE, DISTANCE_RATIO * self.distances[part], movement)
        else:
            share = FIRST_DISTANCE
        small = SMALL_DISTANCE * root if own_norm <= TINY_PARAMETERS * root else 0.0
        return max(min(self.max_distance, share) * own_norm, small)

    def _remember_distance(self, part: int, share: float) -> None:
        known = self.distances[part]
        most = max(USUAL_GROWTH * known, LEAST_DISTANCE / DISTANCE_RATIO)
        self.distances[part] = max(FORGETTING * known, min(share, most))

    def _remember_drift(self, part: int, own: torch.Tensor, difference: torch.Tensor) -> None:
        if part not in self.drifts:
            self.drifts[part] = Drift(own.numel())
        self.drifts[part].remember(own, difference)

    def check_average(
        self,
        part: int,
        own: torch.Tensor,
        delta: torch.Tensor,
        *,
        harmless: float,
        small: float = 0.0,
        before: float = 0.0,
    ) -> float:
        """Raises AllreduceException if ``own + delta`` cannot be an honest average of the part ``own`` belongs to.

        ``harmless``, ``small`` and ``before`` as for `combine`, ``before`` for the one who sent it. An infinite
        ``harmless`` means that the own values say nothing. Returns what ``before`` is for the next part.
        """
        if delta.shape != own.shape:
            raise AllreduceException(f"sent an average of shape {list(delta.shape)} instead of {list(own.shape)}")
        norm, own_norm = float((own + delta).norm()), float(own.norm())
        if not math.isfinite(norm):
            raise AllreduceException("sent an average that is not finite")
        together = math.hypot(norm, before)
        if harmless == math.inf:
            return together
        reference = max(own_norm, self.parts[part].norm)
        harmless = max(harmless, self.harmless_rms * math.sqrt(own.numel()))
        if not self._is_possible(norm, together, reference, harmless, small):
            raise AllreduceException(f"sent an average of norm {norm:.3g}, where {reference:.3g} is usual")
        if self.max_distance is not None:
            if reason := self._distance_objection(part, own, delta):
                raise AllreduceException(f"sent an average that {reason}")
            self._remember_distance(part, float(delta.norm()) / max(own_norm, 1e-30))
            self._remember_drift(part, own, delta)
        return together


class JudgingReducer:
    """Averages the parts of one round that are this peer's task; stands in for hivemind's `TensorPartReducer`.

    Keeps all contributions to a part until every sender has delivered or failed, then asks ``combine(part_index,
    {sender: (values, weight)})`` for their average. Also unlike hivemind's, it does not lose a part for all when one of
    those who wait for it hangs up.
    """

    def __init__(self, num_parts: int, num_senders: int, combine):
        self.num_parts, self.num_senders, self.combine = num_parts, num_senders, combine
        self.contributions: list[dict] = [{} for _ in range(num_parts)]
        self.averages = [asyncio.get_running_loop().create_future() for _ in range(num_parts)]
        self.failed: set[int] = set()
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
        self.contributions[part_index][sender_index] = tensor_part, weight
        self._combine_if_complete(part_index)
        return await asyncio.shield(self.averages[part_index])

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
    """Takes averages from another peer as long as ``check(peer_index, part_index, own part, delta)`` has no objection.

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
        super().register_processed_part(peer_index, part_index, part)
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
            super().register_processed_part(peer_index, part_index, torch.zeros_like(own))
            self.failed_size += own.numel()


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
    what no honest peer sends.
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
        **kwargs,
    ):
        super().__init__(tensors=tensors, peer_fractions=peer_fractions, **kwargs)
        self.judge, self.schedule, self.ignored, self.on_violation = judge, schedule, ignored, on_violation
        self.tensor_part_reducer.finished.set()  # replaced below; it would complain of having received nothing
        options = {name: kwargs[name] for name in ("compression", "part_size_bytes", "tensor_infos") if name in kwargs}
        self.own_index = self.ordered_peer_ids.index(self.peer_id)
        container = CheckedContainer(tensors, peer_fractions, return_deltas=True, **options)
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
        shape = self.parts_for_local_averaging[part_index].shape
        average, refused = self.judge.combine(
            self._number(self.own_index, part_index),
            contributions,
            shape=shape,
            own=self.sender_peer_ids.index(self.peer_id) if self.is_sender else None,
            harmless=0.0,
            small=self._room,
            before=self._averaged,
        )
        for sender, reason in refused.items():
            peer = self.sender_peer_ids[sender]
            self._refusals[peer] += 1
            if peer not in self._first_reasons:
                self._first_reasons[peer] = self._untold[peer] = reason
        return average

    def _check_average(self, peer_index: int, part_index: int, own: torch.Tensor, delta: torch.Tensor) -> None:
        if peer_index != self.own_index:
            self._taken[peer_index] = self.judge.check_average(
                self._number(peer_index, part_index),
                own,
                delta,
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

    async def _communicate_with_peer(self, peer_id) -> None:
        self._talks[self.ordered_peer_ids.index(peer_id)] = asyncio.current_task()
        await super()._communicate_with_peer(peer_id)

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
        messages = checked_messages(stream, partial(self.on_violation, peer))
        self._num_served += 1
        self._nobody_served.clear()
        try:
            num_sent, code = 0, averaging_pb2.AVERAGED_PART
            async for message in super().rpc_aggregate_part(self._parts_in(messages), context):
                num_sent, code = num_sent + 1, message.code
                if code == averaging_pb2.AVERAGED_PART and peer in self._untold:
                    message.MergeFrom(objection_message(code, self._untold.pop(peer)))
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
        for _ in range(self.tensor_part_reducer.num_parts):
            message = await anext(messages, None)
            if message is None:
                return
            if message.code == averaging_pb2.PROTOCOL_VIOLATION:
                raise AllreduceException(f"ended its call, as this peer {objection_in(message)}")
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


__all__ = ["Judge", "JudgingAllReduce", "JudgingReducer", "Schedule", "check_wire_tensor", "checked_messages"]
