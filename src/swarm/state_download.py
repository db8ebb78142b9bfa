"""How this peer takes a state from one donor: within limits, and going on where it was when the connection breaks.

A state of the published model takes minutes on a fast line and hours on a slow one. hivemind 1.1.12 gives up after ten
minutes, whatever has come by then, and begins anew, for ever (optim/optimizer.py, `load_state_from_peers`).
"""

import asyncio
import contextlib
import logging
import math
import time
from typing import AsyncIterator  # noqa: UP035, hivemind tells a stream by this type, not by that of collections.abc

import torch
from hivemind.p2p import P2PContext, PeerID
from hivemind.proto import averaging_pb2
from hivemind.utils.asyncio import aiter_with_timeout

from src.swarm.state_transfer import LEAST_RATE, LEAST_RATE_OF_ONLY_DONOR, IncompleteError, Intake, Stage

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 3.0  # in which a donor that lives begins to answer; or a third of next_chunk_timeout, if that is more
# After the last byte, for a connection to come back, if there is no other donor; else the time in which one answers.
RESUME_SECONDS, RESUME_PAUSE = 180.0, 1.0
MAX_BREAKS = 30  # of one state
START_ALLOWANCE = 600.0  # seconds, for those who are asked in vain


class StateReceiver:
    """Mixin for a `TrainingStateAverager`."""

    def longest_download(self) -> float:
        """Seconds until a search for a state is over, however slow: from the slowest rate that any donor may have."""
        tensors = self.get_current_state()[1]
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return START_ALLOWANCE + num_bytes / LEAST_RATE_OF_ONLY_DONOR

    # -- in the averager's process

    async def _in_time(self, answer, who: str, *, at_most: float = math.inf):
        """Await an answer, but not for ever: between two peers that start at once it sometimes never comes."""
        seconds = min(at_most, self.next_chunk_timeout or self.request_timeout)
        try:
            return await asyncio.wait_for(answer, seconds)
        except TimeoutError as error:
            raise TimeoutError(f"{who} did not answer within {seconds:.0f} s") from error

    def _answer_seconds(self) -> float:
        return max(ANSWER_SECONDS, (self.next_chunk_timeout or 0.0) / 3)

    async def _download(self, donor: PeerID, stage: Stage, *, is_only_one: bool) -> tuple[dict, list[torch.Tensor]]:
        """The state of one donor. Raises ValueError for what is no state, and what the network raises for good."""
        intake = Intake(
            stage.expected,
            window=self._answer_seconds(),
            least_rate=LEAST_RATE_OF_ONLY_DONOR if is_only_one else LEAST_RATE,
        )
        patience = RESUME_SECONDS if is_only_one else self._answer_seconds()
        metadata, place, breaks, news = None, None, 0, (0, time.monotonic())
        stage.begin()
        while True:
            try:
                messages = self._messages_of(donor, place, is_only_one=is_only_one)
                async with contextlib.aclosing(messages):
                    async for message in messages:
                        intake.take(message)
                        if message.metadata and metadata is None:
                            metadata = self.serializer.loads(message.metadata)
                        stage.take(message.tensor_part)
                        if stage.num_bytes > news[0]:
                            news = stage.num_bytes, time.monotonic()
                if metadata is None:
                    raise ValueError("it sent none")
                return metadata, stage.end()
            except Exception as error:
                breaks += 1
                is_wrong = isinstance(error, ValueError) and not isinstance(error, IncompleteError)
                if is_wrong or metadata is None or breaks > MAX_BREAKS or time.monotonic() > news[1] + patience:
                    raise
                logger.debug("the state of %s breaks off after %d bytes: %r", donor, stage.num_bytes, error)
            if stage.is_complete:  # only its end was lost
                return metadata, stage.end()
            await asyncio.sleep(RESUME_PAUSE)
            place = stage.resume()
            intake.resume()

    async def _messages_of(self, donor: PeerID, place: tuple[int, int] | None, *, is_only_one: bool):
        """What a donor sends of its state, from its beginning or from a ``place``: a tensor, and a part of it."""
        stub, stream = self.get_stub(self._p2p, donor, namespace=self.prefix), None

        async def begin():
            nonlocal stream
            if place is None:
                stream = await stub.rpc_download_state(averaging_pb2.DownloadRequest())
            else:
                where = averaging_pb2.AveragingData(group_id=self.serializer.dumps(list(place)))
                stream = await stub.rpc_resume_state(where)
            first = await anext(stream, None)
            if first is None:
                raise IncompleteError("it hands out no state at present")
            return first

        silence = self.next_chunk_timeout or self.request_timeout
        try:
            yield await self._in_time(begin(), "it", at_most=math.inf if is_only_one else self._answer_seconds())
            rest = aiter_with_timeout(stream, silence if is_only_one else min(silence, self._answer_seconds()))
            async for message in rest:
                yield message
        finally:
            if stream is not None:
                await stream.aclose()  # whatever else it would send is read by nobody

    async def rpc_resume_state(
        self, request: averaging_pb2.AveragingData, context: P2PContext
    ) -> AsyncIterator[averaging_pb2.DownloadData]:
        """What is left of a state that broke off: from a tensor and a part of it on, both in ``request.group_id``."""
        tensor, part = self.serializer.loads(request.group_id[:64])
        if not (type(tensor) is int and type(part) is int and tensor >= 0 and part >= 0):
            return
        rest = self._hand_out(context, self.state_messages(tensor, part), again=True)
        async with contextlib.aclosing(rest):
            async for message in rest:
                yield message
