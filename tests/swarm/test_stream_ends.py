"""The last message of a stream arrives: writers linger, readers hang up when they have all they need."""

import asyncio
import multiprocessing
import os
from typing import AsyncIterator  # noqa: UP035, hivemind tells a stream by this type

import pytest
import torch
from hivemind.averaging.allreduce import AllReduceRunner
from hivemind.compression import Float16Compression
from hivemind.p2p import P2P, P2PContext
from hivemind.proto import averaging_pb2

from src.swarm.allreduce import JudgingAllReduce, _CheckedStub
from src.swarm.contributions import Judge
from src.swarm.rounds import LINGER_SECONDS

pytestmark = pytest.mark.swarm


NUM_PARTS = 3


class FakeStub:
    """Reads what is sent in a task of its own, answers each part, and then keeps the line open, as a reducer does."""

    def __init__(self):
        self.events = []

    async def rpc_aggregate_part(self, inputs):
        parts = asyncio.Queue()
        return self._answer(parts, asyncio.create_task(self._send(inputs, parts)))

    async def _send(self, inputs, parts):
        async for part in inputs:
            await parts.put(part)
        self.events.append("sent all")

    async def _answer(self, parts, sending):
        try:
            while True:
                await parts.get()
                yield averaging_pb2.AveragingData(code=averaging_pb2.AVERAGED_PART)
        finally:
            self.events.append("hung up")
            sending.cancel()


def test_caller_hangs_up_after_the_last_part_and_only_when_all_is_sent():
    async def parts():
        for _ in range(NUM_PARTS):
            yield averaging_pb2.AveragingData()
        await asyncio.sleep(0.1)  # the end of the own parts comes later than the last answer

    async def scenario():
        stub = FakeStub()
        caller = _CheckedStub(stub, NUM_PARTS)
        caller.end()  # nobody will object to the answers
        stream = await caller.rpc_aggregate_part(parts())
        return [message async for message in stream], stub.events

    messages, events = asyncio.run(asyncio.wait_for(scenario(), 20))
    assert len(messages) == NUM_PARTS
    assert events == ["sent all", "hung up"]


class Lingering(JudgingAllReduce):
    """As the averagers answer: see `RoundReporting.rpc_aggregate_part`."""

    def __init__(self, **options):
        super().__init__(judge=Judge(max_weight=2.0), **options)

    async def rpc_aggregate_part(
        self, stream: AsyncIterator[averaging_pb2.AveragingData], context: P2PContext
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        async for message in super().rpc_aggregate_part(stream, context):
            yield message
        await asyncio.sleep(LINGER_SECONDS)


async def count_partial(kind: type, *, rounds: int, size: int) -> int:
    """Rounds, seen from each of three peers on loopback, in which some values did not come back or a sender failed."""
    peers = [await P2P.create(host_maddrs=["/ip4/127.0.0.1/tcp/0"], startup_timeout=60)]
    addresses = await peers[0].get_visible_maddrs()
    for _ in range(2):
        peers.append(
            await P2P.create(host_maddrs=["/ip4/127.0.0.1/tcp/0"], initial_peers=addresses, startup_timeout=60)
        )
    partial = 0

    async def finish(runner):
        return [delta async for delta in runner]

    try:
        for number in range(rounds):
            options = {
                "servicer_type": kind, "prefix": f"round{number}", "group_id": os.urandom(8),
                "ordered_peer_ids": tuple(peer.peer_id for peer in peers), "peer_fractions": (1 / 3,) * 3,
                "part_size_bytes": 2**19, "compression": Float16Compression(),
                "sender_timeout": 10, "reducer_timeout": 20,
            }  # fmt: skip
            runners = [kind(p2p=peer, tensors=[torch.randn(size)], **options) for peer in peers]
            for peer, runner in zip(peers, runners, strict=True):
                await runner.add_p2p_handlers(peer, namespace=options["prefix"])
            await asyncio.gather(*map(finish, runners))
            partial += sum(
                runner.tensor_part_container.failed_size > 0 or len(runner.banned_senders) > 0 for runner in runners
            )
            for peer, runner in zip(peers, runners, strict=True):
                await runner.remove_p2p_handlers(peer, namespace=options["prefix"])
    finally:
        for peer in peers:
            await peer.shutdown()
    return partial


def burn(stop) -> None:
    while not stop.is_set():
        sum(range(10_000))


def test_rounds_with_lingering_writers_are_complete_and_do_not_wait_for_them(monkeypatch):
    monkeypatch.setitem(globals(), "LINGER_SECONDS", 1000.0)  # longer than the test may take
    assert asyncio.run(asyncio.wait_for(count_partial(Lingering, rounds=5, size=300_000), 200)) == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_part_is_lost_on_a_busy_machine():
    # hivemind's own runner loses a part now and then while other programs keep the cores busy. It then waits until it
    # gives up, so it gets fewer rounds; the counts are printed.
    stop = multiprocessing.Event()
    burners = [
        multiprocessing.Process(target=burn, args=(stop,), daemon=True) for _ in range(2 * (os.cpu_count() or 1))
    ]
    for burner in burners:
        burner.start()
    try:
        partial = {
            kind.__name__: asyncio.run(count_partial(kind, rounds=rounds, size=2_300_000))
            for kind, rounds in ((Lingering, 200), (AllReduceRunner, 30))
        }
    finally:
        stop.set()
        for burner in burners:
            burner.join()
    print(partial)
    assert partial["Lingering"] == 0, partial
