"""How a state goes from one peer to another: in little memory, and within limits on either side.

hivemind 1.1.12 (averager.py, `_load_state_from_peers`, `rpc_download_state`) has no limits: a donor may send for ever,
and anybody may have the state again and again, at the cost of the donor's training. It also holds up to five copies of
a tensor while it is received, and three while it is sent; the largest of the published model has 537 MB.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from hivemind.p2p import P2PContext
from hivemind.proto import averaging_pb2, runtime_pb2

LEAST_RATE = 32 * 2**10  # bytes per second, a quarter of a megabit: who is slower is left for somebody else
LEAST_RATE_OF_ONLY_DONOR = 4 * 2**10
USUAL_CHUNK = 2**16  # bytes of a tensor in a message, see hivemind's `split_for_streaming`
MAX_HANDOUTS = 2  # at once
STALLED_SECONDS = 20.0  # in which one that takes a state shows that it can
# Of the time, and so many seconds at once, in which this peer's processes work for those who take its state.
WORKING_SHARE, WORKING_BURST = 0.02, 2.0
# At once, and twice as much in each hour: a small state is taken often, by auxiliary peers, a large one by some peers.
# However large, and however slow this machine, so many states may be taken soon after each other.
BYTES_BURST, STATES_BURST = 2**30, 4


def parts_of(tensor: torch.Tensor, *, first: int = 0) -> Iterator[runtime_pb2.Tensor]:
    """What hivemind sends of an uncompressed tensor, one part at a time; only the first says what it is a part of.

    ``first``: the number of the part to begin with.
    """
    values, dtype = bytes_of(tensor.detach().contiguous()), str(tensor.dtype).removeprefix("torch.")
    num_parts = -(-values.numel() // USUAL_CHUNK)
    for number in range(first, max(1, num_parts)):
        part = runtime_pb2.Tensor(buffer=values[number * USUAL_CHUNK : (number + 1) * USUAL_CHUNK].numpy().tobytes())
        if number == 0:
            part.size.extend(tensor.shape)
            part.dtype, part.chunks = dtype, num_parts
        yield part


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's memory, as [bytes] of uint8."""
    return tensor.view(-1).view(torch.uint8)


class StateSender:
    """Mixin for a `TrainingStateAverager`: as hivemind's, but no tensor is copied as a whole to be sent."""

    async def rpc_download_state(self, request: averaging_pb2.DownloadRequest, context: P2PContext):
        async for message in self.state_messages():
            yield message

    async def state_messages(self, first_tensor: int = 0, first_part: int = 0):
        """All of the state, or what follows a part of a tensor; always with the state's metadata."""
        if not self.allow_state_sharing:
            return
        metadata, tensors, _ = await self._get_current_state_from_host_process()
        for number, tensor in enumerate(tensors[first_tensor:]):
            for part in parts_of(tensor, first=0 if number else first_part):
                yield averaging_pb2.DownloadData(tensor_part=part, metadata=metadata)
                metadata = None


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class IncompleteError(ValueError):
    """What has come is good, as far as it goes."""


class Stage:
    """A state as it comes in: at most one copy of it, in memory that another process can take over as it is.

    ``expected``: tensors of the types and shapes that a state must have, in order. What it takes for a tensor, when the
    first part of that comes, it uses again for another donor's state. ``in_place``: no copy at all, what comes replaces
    the values of ``expected``; for a peer that has no state to lose. Raises ValueError for what does not fit.
    """

    def __init__(self, expected: Iterable[torch.Tensor], *, in_place: bool = False):
        self.expected: Sequence[torch.Tensor] = tuple(expected)
        self._tensors: list[torch.Tensor] = list(self.expected) if in_place else []
        self.begin()

    def begin(self) -> None:
        """Another donor's state is coming."""
        self._num_begun, self._memory, self._num_filled = 0, None, 0

    @property
    def num_bytes(self) -> int:
        """What has come of the state."""
        return sum(map(_num_bytes, self.expected[: max(0, self._num_begun - 1)])) + self._num_filled

    @property
    def is_complete(self) -> bool:
        return self.num_bytes == sum(map(_num_bytes, self.expected)) and self._num_begun == len(self.expected)

    def resume(self) -> tuple[int, int]:
        """What is missing: a tensor's number, and that of its first part that has not come as a whole."""
        part, is_whole = self._num_filled // USUAL_CHUNK, self._memory is None
        if not is_whole:
            is_whole = self._num_filled == self._memory.numel()
        if is_whole or part > 0:
            self._num_filled = self._num_filled if is_whole else part * USUAL_CHUNK
            return (self._num_begun, 0) if is_whole else (self._num_begun - 1, part)
        self._num_begun, self._memory, self._num_filled = self._num_begun - 1, None, 0  # it is told its type again
        return self._num_begun, 0

    def take(self, part: runtime_pb2.Tensor) -> None:
        """Part of a tensor has come, of the next one if it has a type."""
        if part.dtype:
            self._begin_tensor(part)
        if self._memory is None:
            raise ValueError("it does not begin with the beginning of a tensor")
        end = self._num_filled + len(part.buffer)
        if end > self._memory.numel():
            raise ValueError(f"tensor {self._num_begun - 1} has more than {self._memory.numel()} bytes")
        if part.buffer:
            self._memory[self._num_filled : end] = torch.frombuffer(bytearray(part.buffer), dtype=torch.uint8)
        self._num_filled = end

    def _begin_tensor(self, part: runtime_pb2.Tensor) -> None:
        self._end_tensor()
        number = self._num_begun
        if number == len(self.expected):
            raise ValueError(f"it has more than {number} tensors")
        own = self.expected[number]
        usual = str(own.dtype).removeprefix("torch."), list(own.shape)
        if (part.dtype, list(part.size)) != usual or part.compression != runtime_pb2.CompressionType.NONE:
            found = f"{part.dtype} of shape {list(part.size[:8])}, compression {part.compression}"
            raise ValueError(f"tensor {number} is {found}, instead of {usual[0]} of shape {usual[1]}, uncompressed")
        if number == len(self._tensors):
            self._tensors.append(torch.empty(own.shape, dtype=own.dtype).share_memory_())
        self._num_begun, self._memory, self._num_filled = number + 1, bytes_of(self._tensors[number].detach()), 0

    def _end_tensor(self) -> None:
        if self._memory is not None and self._num_filled < self._memory.numel():
            raise IncompleteError(
                f"tensor {self._num_begun - 1} has {self._num_filled} bytes instead of {self._memory.numel()}"
            )

    def end(self) -> list[torch.Tensor]:
        """The state's tensors, when all parts have come."""
        self._end_tensor()
        if self._num_begun < len(self.expected):
            raise IncompleteError(f"it has {self._num_begun} tensors instead of {len(self.expected)}")
        return list(self._tensors)


class TooSlowError(ValueError):
    """Another donor may be quicker."""


class Intake:
    """Watches what a donor sends: raises ValueError if that is more than a state can be, or does not become one.

    ``window``: seconds, in each of which ``least_rate`` bytes a second must come; only the values of tensors count.
    """

    def __init__(self, tensors, *, window: float, least_rate: float):
        state_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.bytes_left = 2**20 + 2 * state_bytes
        self.messages_left = 100 + 4 * len(tensors) + 2 * state_bytes // USUAL_CHUNK
        self.window, self.least_rate = window, least_rate
        self.window_began, self.useful_bytes = time.monotonic(), 0

    def resume(self) -> None:
        """Time that has passed without a connection does not count."""
        self.window_began, self.useful_bytes = time.monotonic(), 0

    def take(self, message) -> None:
        """A message has come."""
        self.bytes_left -= message.ByteSize()
        self.messages_left -= 1
        if self.bytes_left < 0:
            raise ValueError("it is larger than a state can be")
        if self.messages_left < 0:
            raise ValueError("it comes in more messages than a state can have")
        self.useful_bytes += len(message.tensor_part.buffer)
        seconds = time.monotonic() - self.window_began
        if seconds >= self.window:
            if self.useful_bytes < self.least_rate * seconds:
                raise TooSlowError(f"it sent {self.useful_bytes / seconds / 1000:.1f} KB/s")
            self.window_began, self.useful_bytes = time.monotonic(), 0


class Allowance:
    """What may be spent: at most ``burst`` at once, and then what comes in, ``rate`` a second."""

    def __init__(self, burst: float, rate: float):
        self.burst, self.rate = burst, rate
        self.amount, self.updated = burst, time.monotonic()

    @property
    def left(self) -> float:
        """Below zero after more was spent than there was."""
        now = time.monotonic()
        self.amount = min(self.burst, self.amount + self.rate * (now - self.updated))
        self.updated = now
        return self.amount

    def spend(self, amount: float) -> None:
        self.amount = self.left - amount

    def raise_burst(self, burst: float) -> None:
        """To so much, if it is less; what was spent stays spent."""
        more = max(0.0, burst - self.burst)
        self.amount, self.burst = self.left + more, self.burst + more


@dataclass
class Handout:
    """A state that is on its way to a peer."""

    peer: bytes
    task: asyncio.Task | None
    began: float
    num_bytes: int = 0
    working_seconds: float = 0.0

    @property
    def is_stalled(self) -> bool:
        seconds = time.monotonic() - self.began - STALLED_SECONDS
        return seconds > 0 and self.num_bytes < LEAST_RATE * seconds


class Handouts:
    """Decides who may have this peer's state now, so that its own training suffers little."""

    def __init__(self):
        self.seconds = Allowance(WORKING_BURST, WORKING_SHARE)
        self.bytes = Allowance(BYTES_BURST, 2 * BYTES_BURST / 3600)
        self.running: dict[int, Handout] = {}
        self._numbers = count()

    def objection(self, peer: bytes) -> str:
        """Why a peer may not have the state now; empty if it may."""
        if any(handout.peer == peer for handout in self.running.values()):
            return "it takes the state already"
        if len(self.running) >= MAX_HANDOUTS:
            self._end_stalled()
        if len(self.running) >= MAX_HANDOUTS:
            return f"{MAX_HANDOUTS} others take the state"
        if self.seconds.left <= 0:
            return "handing out the state took too much time lately"
        if self.bytes.left <= 0:
            return "too much of the state was handed out lately"
        return ""

    def end(self, peer: bytes) -> None:
        """Of a peer that asks again: the connection over which it was taking the state is gone."""
        for number, handout in list(self.running.items()):
            if handout.peer == peer:
                self._end(number, handout)

    def _end(self, number: int, handout: Handout) -> None:
        del self.running[number]
        if handout.task is not None:
            handout.task.cancel()

    def _end_stalled(self) -> None:
        for number, handout in list(self.running.items()):
            if handout.is_stalled:
                self._end(number, handout)

    async def hand_out(self, peer: bytes, messages):
        """The messages of a state, which end when that peer stalls and another one asks."""
        number, handout = next(self._numbers), Handout(peer, asyncio.current_task(), time.monotonic())
        self.running[number] = handout
        try:
            while True:
                began = time.monotonic()
                try:
                    message = await anext(messages)
                except StopAsyncIteration:
                    break
                finally:
                    working_seconds = time.monotonic() - began
                    handout.working_seconds += working_seconds
                    self.seconds.spend(working_seconds)
                size = message.ByteSize()
                handout.num_bytes += size
                self.bytes.spend(size)
                yield message
            self._allow_for(handout)
        finally:
            self.running.pop(number, None)
            with contextlib.suppress(RuntimeError):  # it is just being asked for a message
                await messages.aclose()

    def _allow_for(self, handout: Handout) -> None:
        """Some peers may have even a large state soon after each other, also from a slow machine."""
        self.bytes.raise_burst(STATES_BURST * handout.num_bytes)
        self.bytes.rate = 2 * self.bytes.burst / 3600
        self.seconds.raise_burst(STATES_BURST * handout.working_seconds)


__all__ = ["LEAST_RATE", "LEAST_RATE_OF_ONLY_DONOR", "Handouts", "IncompleteError", "Intake", "Stage", "StateSender",
           "TooSlowError"]  # fmt: skip
