"""Limits for whoever takes a state from another peer, and for whoever hands out its own.

hivemind 1.1.12 (averager.py, `_load_state_from_peers`, `rpc_download_state`) has none: a donor may send for ever, and
anybody may have the state again and again, at the cost of the donor's training.
"""

import asyncio
import contextlib
import time
from dataclasses import dataclass
from itertools import count

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

    def _end_stalled(self) -> None:
        for number, handout in list(self.running.items()):
            if handout.is_stalled:
                del self.running[number]
                if handout.task is not None:
                    handout.task.cancel()

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


__all__ = ["LEAST_RATE", "LEAST_RATE_OF_ONLY_DONOR", "Handouts", "Intake", "TooSlowError"]
