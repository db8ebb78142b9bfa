"""A donor that does not come to an end is left for the next one; whoever takes the state costs a run little."""

import asyncio
import contextlib
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes.functional  # noqa: F401, takes seconds: before averagers fork, as in a trainer
import hivemind
import psutil
import pytest
import torch
from hivemind.compression import Float16Compression, NoCompression, deserialize_torch_tensor
from hivemind.p2p import P2P
from hivemind.proto import averaging_pb2, runtime_pb2
from hivemind.utils.streaming import combine_from_streaming, split_for_streaming

from src.swarm import state_transfer
from src.swarm.averagers import LeanStateAverager
from src.swarm.state_transfer import LEAST_RATE, Handouts, Intake, Stage, TooSlowError, parts_of

LOOPBACK = "/ip4/127.0.0.1/tcp/0"


def data(size: int = 0, **fields) -> averaging_pb2.DownloadData:
    return averaging_pb2.DownloadData(tensor_part=runtime_pb2.Tensor(buffer=b"\0" * size), **fields)


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(state_transfer, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def taking(clock, size: int, *, every: float, messages: int, window: float = 3.0) -> None:
    intake = Intake([torch.zeros(1_000_000)], window=window, least_rate=LEAST_RATE)
    for _ in range(messages):
        clock.now += every
        intake.take(data(size))


def test_intake_takes_a_state_over_a_slow_link_and_no_trickle(clock):
    taking(clock, 2**16, every=1.5, messages=60)  # 44 KB/s, a third of a megabit
    with pytest.raises(TooSlowError, match=r"it sent 1\.0 KB/s"):
        taking(clock, 1000, every=1.0, messages=4)


def test_intake_counts_messages_as_well_as_bytes(clock):
    with pytest.raises(ValueError, match="more messages"):
        taking(clock, 0, every=0.0, messages=1000)
    with pytest.raises(ValueError, match="larger than a state"):
        taking(clock, 2**20, every=0.01, messages=20)


def test_metadata_is_no_progress(clock):
    intake = Intake([torch.zeros(1_000_000)], window=3.0, least_rate=LEAST_RATE)
    with pytest.raises(TooSlowError):
        for _ in range(4):
            clock.now += 1.0
            intake.take(averaging_pb2.DownloadData(metadata=b"\0" * 100_000))


async def state(clock, *, seconds: float, sizes=(1000,)):
    """Messages that take this peer so long to make."""
    for size in sizes:
        clock.now += seconds
        yield data(size)


async def take_all(handouts, peer, messages) -> int:
    return len([message async for message in handouts.hand_out(peer, messages)])


def test_two_may_take_the_state_at_once_and_each_only_once(clock):
    async def scenario():
        handouts = Handouts()
        taken = [handouts.hand_out(peer, state(clock, seconds=0.0)) for peer in (b"one", b"two")]
        assert handouts.objection(b"one") == ""
        await anext(taken[0])
        assert handouts.objection(b"one") == "it takes the state already" and handouts.objection(b"two") == ""
        await anext(taken[1])
        assert handouts.objection(b"three") == "2 others take the state"
        await taken[0].aclose()
        assert handouts.objection(b"three") == ""

    asyncio.run(scenario())


def test_who_stalls_loses_its_place_when_somebody_else_asks(clock):
    async def scenario():
        handouts, reading = Handouts(), []

        async def read(peer, size):
            async for _ in handouts.hand_out(peer, state(clock, seconds=0.0, sizes=(size,) * 3)):
                await asyncio.Event().wait()  # p2pd takes no more, since the peer does not

        for peer, size in ((b"stalls", 1000), (b"is slow", 2**22)):
            reading.append(asyncio.create_task(read(peer, size)))
        await asyncio.sleep(0.01)
        clock.now += 15.0
        assert handouts.objection(b"third"), "it may still be on its way"
        clock.now += 15.0
        assert handouts.objection(b"third") == ""
        await asyncio.sleep(0.01)
        assert [task.done() for task in reading] == [True, False]
        reading[1].cancel()

    asyncio.run(scenario())


def test_work_for_others_takes_a_small_share_of_the_time(clock):
    handouts, served = Handouts(), 0

    async def scenario():
        nonlocal served
        while clock.now < 1000.0 + 3600:
            if handouts.objection(b"stranger"):
                clock.now += 1.0
            else:
                served += await take_all(handouts, b"stranger", state(clock, seconds=0.5))

    asyncio.run(scenario())
    assert 0.5 * served < 0.05 * 3600
    assert served > 100, "who needs the state does get it"


def test_slow_machine_hands_even_a_large_state_to_some_peers_soon_after_each_other(clock):
    async def scenario():
        handouts, served = Handouts(), 0
        for number in range(10):
            peer = b"%d" % number
            if not handouts.objection(peer):
                await take_all(handouts, peer, state(clock, seconds=3.0, sizes=(1000,) * 10))  # half a minute of work
                served += 1
        return served

    assert 4 <= asyncio.run(scenario()) < 7


@pytest.mark.parametrize("state_bytes", [2**22, 2**30])
def test_bytes_of_an_hour_are_bounded_and_some_peers_may_come_at_once(clock, state_bytes):
    handouts, served, first = Handouts(), 0, None

    async def scenario():
        nonlocal served, first
        message = SimpleNamespace(ByteSize=lambda: state_bytes)

        async def messages():
            yield message

        while clock.now < 1000.0 + 3600:
            if handouts.objection(b"stranger"):
                first = first or served
                clock.now += 10.0
            else:
                served += await take_all(handouts, b"stranger", messages())

    asyncio.run(scenario())
    assert first >= 4
    assert served * state_bytes <= 3 * max(2**30, 4 * state_bytes) + 2 * state_bytes


# -- tensors on their way ---------------------------------------------------------------------------------------------

TENSORS = {
    "several parts": torch.randn(300, 101),
    "codes": torch.arange(200_000).to(torch.uint8),
    "a number": torch.tensor(0.5),
    "nothing": torch.zeros(0),
    "a whole part": torch.randn(2**14),
    "transposed": torch.randn(200, 300).T,
}


@pytest.mark.parametrize("kind", TENSORS)
def test_parts_are_those_that_hivemind_sends_and_reads(kind):
    tensor = TENSORS[kind]
    hiveminds = list(split_for_streaming(NoCompression().compress(tensor, None)))
    assert [one.SerializeToString() for one in parts_of(tensor)] == [one.SerializeToString() for one in hiveminds]
    assert torch.equal(deserialize_torch_tensor(combine_from_streaming(parts_of(tensor))), tensor)


def send(stage: Stage, tensors) -> list[torch.Tensor]:
    stage.begin()
    for tensor in tensors:
        for part in parts_of(tensor):
            stage.take(part)
    return stage.end()


def test_stage_holds_one_copy_in_shared_memory_whoever_sends():
    stage = Stage(TENSORS.values())
    first = send(stage, TENSORS.values())
    others = [tensor + 1 for tensor in TENSORS.values()]
    second = send(stage, others)
    assert [one.data_ptr() for one in first] == [one.data_ptr() for one in second]
    assert all(one.is_shared() and torch.equal(one, other) for one, other in zip(second, others, strict=True))
    own = [torch.zeros(300, 101), torch.zeros(3, dtype=torch.int64)]
    sent = [TENSORS["several parts"], torch.arange(3)]
    taken = send(Stage(own, in_place=True), sent)
    assert [one.data_ptr() for one in taken] == [one.data_ptr() for one in own]
    assert all(torch.equal(one, other) for one, other in zip(own, sent, strict=True))


OWN = torch.zeros(40_000), torch.zeros(3)
MISFITS = {
    "another shape": (parts_of(torch.zeros(200, 200)), r"tensor 0 is float32 of shape \[200, 200\].* instead"),
    "another type": (parts_of(torch.zeros(40_000, dtype=torch.float64)), "tensor 0 is float64"),
    "compressed": (
        split_for_streaming(Float16Compression().compress(OWN[0], None)),
        "tensor 0 is float32 .* compression 2, instead",
    ),
    "a part too much": ([*parts_of(OWN[0]), runtime_pb2.Tensor(buffer=b"0000")], "more than 160000 bytes"),
    "a part less": ([*list(parts_of(OWN[0]))[:-1], *parts_of(OWN[1])], "tensor 0 has 131072 bytes instead of 160000"),
    "the end of another": (list(parts_of(OWN[0]))[1:], "does not begin"),
    "a tensor less": (parts_of(OWN[0]), "has 1 tensors instead of 2"),
    "a tensor more": ([part for one in (*OWN, OWN[1]) for part in parts_of(one)], "more than 2 tensors"),
    "nothing": ([], "has 0 tensors instead of 2"),
}


@pytest.mark.parametrize("num_parts", range(5))
@pytest.mark.parametrize("cut", [0, 100])
def test_stage_says_where_a_state_goes_on(num_parts, cut):
    """``cut``: bytes of the last part that are missing."""
    stage, parts = Stage(OWN), [part for tensor in OWN for part in parts_of(tensor)]
    if num_parts:
        last = parts[num_parts - 1]
        parts[num_parts - 1] = runtime_pb2.Tensor.FromString(last.SerializeToString())
        parts[num_parts - 1].buffer = last.buffer[: len(last.buffer) - cut]
    for part in parts[:num_parts]:
        stage.take(part)
    assert stage.is_complete == (num_parts == len(parts) and not cut)
    tensor, first = stage.resume()
    assert (tensor, first) != (0, 0) or num_parts <= (1 if cut else 0)
    for number, own in enumerate(OWN[tensor:]):
        for part in parts_of(own, first=0 if number else first):
            stage.take(part)
    assert all(torch.equal(*pair) for pair in zip(stage.end(), OWN, strict=True))


@pytest.mark.parametrize("kind", MISFITS)
def test_stage_takes_no_more_and_nothing_else_than_a_state(kind):
    stage, (parts, text) = Stage(OWN), MISFITS[kind]
    with pytest.raises(ValueError, match=text):
        for part in [*parts]:
            stage.take(part)
        stage.end()


# -- whole downloads --------------------------------------------------------------------------------------------------


class BadDonor(LeanStateAverager):
    """Sends something for ever, but no state; or a state that is slow to come."""

    fault = ""

    async def rpc_download_state(self, request: averaging_pb2.DownloadRequest, context: hivemind.p2p.P2PContext):
        if self.fault == "breaks off":
            async for message in self._some(super().rpc_download_state(request, context), 12):
                yield message
        if self.fault == "is slow":
            async for message in super().rpc_download_state(request, context):
                yield message
                await asyncio.sleep(2.0)
            return
        while True:
            if self.fault == "sends empty messages":
                yield averaging_pb2.DownloadData()
            elif self.fault == "sends metadata":
                yield averaging_pb2.DownloadData(metadata=self.serializer.dumps({"epoch": 6}))
                await asyncio.sleep(0.05)
            else:
                yield averaging_pb2.DownloadData(
                    tensor_part=runtime_pb2.Tensor(buffer=b"\0" * 1000, size=[10**6], dtype="float32", chunks=10**6)
                )
                await asyncio.sleep(1.0)
            await asyncio.sleep(0)

    async def rpc_resume_state(self, request: averaging_pb2.AveragingData, context: hivemind.p2p.P2PContext):
        async for message in self._some(super().rpc_resume_state(request, context), 7):
            yield message

    async def _some(self, messages, number: int):
        async for message in messages:
            yield message
            number -= 1
            if not number:
                raise OSError("the cable was pulled")


BadDonor.rpc_resume_state.__annotations__["return"] = LeanStateAverager.rpc_resume_state.__annotations__["return"]
BadDonor.rpc_download_state.__annotations__["return"] = LeanStateAverager.rpc_download_state.__annotations__["return"]
BadDonor.__name__ = "LeanStateAverager"  # or its remote calls would not be found


@pytest.fixture
def start_peers():
    with contextlib.ExitStack() as stack:
        nodes = []

        def start(epoch: int, *, fault: str = "", size: int = 2000, **options) -> LeanStateAverager:
            known = [str(address) for node in nodes for address in node.get_visible_maddrs()]
            node = hivemind.DHT(start=True, initial_peers=known, host_maddrs=[LOOPBACK])
            stack.callback(node.shutdown)
            nodes.append(node)
            averager = (BadDonor if fault else LeanStateAverager)(
                dht=node,
                params=[{"params": [torch.nn.Parameter(torch.ones(size).share_memory_()) for _ in range(4)]}],
                optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
                initialize_optimizer=False,
                prefix="transfer",
                start=False,
                compression=Float16Compression(),
                request_timeout=1.0,
                next_chunk_timeout=6.0,
                declare_state_period=60.0,
                **options,
            )
            averager.fault = fault
            averager.run_in_background(await_ready=True)
            stack.callback(averager.shutdown)
            averager.local_epoch, averager.swarm_epoch = epoch, lambda: 5
            averager.state_sharing_priority = epoch
            return averager

        yield start


def join(joining) -> float:
    time.sleep(2.0)  # until all donors have told their epochs; whoever is ahead is asked first
    began = time.monotonic()
    joining.load_state_from_peers(timeout=60)
    return time.monotonic() - began


@pytest.mark.timeout(200)
@pytest.mark.parametrize("fault", ["sends empty messages", "sends metadata", "trickles", "is slow"])
def test_donor_that_does_not_come_to_an_end_is_left_for_the_next_one(start_peers, fault):
    good, bad, joining = start_peers(5), start_peers(6, fault=fault), start_peers(0)
    memory = psutil.Process(joining.pid).memory_info().rss
    seconds = join(joining)
    assert joining.local_epoch == 5 and seconds < 10 and good.local_epoch == 5
    ((peer, reason),) = joining.take_refusals()
    assert peer == str(bad.peer_id) and "asking the next donor" in reason
    assert psutil.Process(joining.pid).memory_info().rss < memory + 2**27


@pytest.mark.timeout(200)
def test_download_goes_on_where_it_was_broken_off(start_peers):
    """A part of 64 KiB at most is sent twice: the donor hands out 12 of them, then 7 at a time."""
    donor, joining = start_peers(6, fault="breaks off", size=200_000), start_peers(0, size=200_000)
    generator = torch.Generator().manual_seed(0)
    for parameter in donor.optimizer.param_groups[0]["params"]:
        parameter.data.copy_(torch.randn(200_000, generator=generator))
    seconds = join(joining)
    assert joining.local_epoch == 6 and not joining.take_refusals()
    pairs = zip(*(one.optimizer.param_groups[0]["params"] for one in (donor, joining)), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    assert seconds < 20, "six breaks"


def test_search_for_a_state_ends_another_one_whose_owner_has_given_up():
    """Or there would be two copies of the state, and more the longer nobody has a good one."""
    running, tasks = [0], []

    async def search():
        running[0] += 1
        try:
            await asyncio.sleep(60)
        finally:
            running[0] -= 1

    async def scenario():
        averager = SimpleNamespace(_search=None, patience=SimpleNamespace(is_over=False), _find_good_state=search)
        for _ in range(3):
            future = SimpleNamespace(set_result=lambda result: None, done=lambda: False)
            tasks.append(asyncio.create_task(LeanStateAverager._load_state_from_peers(averager, future)))
            await asyncio.sleep(0.1)
        assert running == [1] and [task.done() for task in tasks] == [True, True, False]
        averager.patience.is_over = True
        await asyncio.wait_for(tasks[-1], 5)
        await asyncio.sleep(0)

    asyncio.run(scenario())
    assert running == [0]


@pytest.mark.timeout(200)
def test_slow_donor_is_not_left_when_there_is_no_other(start_peers):
    start_peers(5, fault="is slow", size=20_000)  # four parts of 40 KB in 8 s
    joining = start_peers(0, size=20_000)
    join(joining)
    assert joining.take_refusals() == [] and joining.local_epoch == 5


@pytest.mark.timeout(200)
def test_twenty_strangers_who_take_the_state_all_the_time_cost_little(start_peers):
    """Less than a tenth of one processor's time, in the averager's process."""
    donor, joining = start_peers(5, size=500_000), start_peers(0, size=500_000)

    def used() -> float:
        return sum(psutil.Process(donor.pid).cpu_times()[:2])

    async def strangers(seconds: float):
        p2ps = [
            await P2P.create(initial_peers=donor.dht.get_visible_maddrs(), host_maddrs=[LOOPBACK]) for _ in range(5)
        ]
        taken, until = 0, time.monotonic() + seconds

        async def take(p2p):
            nonlocal taken
            stub = LeanStateAverager.get_stub(p2p, donor.peer_id, namespace="transfer")
            while time.monotonic() < until:
                with contextlib.suppress(Exception):
                    stream = await stub.rpc_download_state(averaging_pb2.DownloadRequest())
                    async for _ in stream:
                        taken += 1

        before = used()
        await asyncio.gather(*(take(p2p) for p2p in p2ps * 4))
        for p2p in p2ps:
            await p2p.shutdown()
        return used() - before, taken

    cost, taken = asyncio.run(strangers(4.0))  # first what may be had at once
    cost, taken = asyncio.run(strangers(20.0))
    print(f"{cost:.2f} s of 20, {taken} messages")
    assert cost < 2.0 and joining.local_epoch == 0


def megabytes(pids) -> float:
    """What processes hold together, shared memory counted once, files left out."""
    lines = [line.split() for pid in pids for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return sum(int(words[1]) for words in lines if words[0] in ("Pss_Anon:", "Pss_Shmem:")) / 1000


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("auxiliary", "copies"), [(False, 1.0), (True, 0.0)])
def test_download_takes_one_copy_of_the_state_and_none_at_an_auxiliary_peer(start_peers, auxiliary, copies):
    """Of donor and newcomer together, at the peak; the largest of four tensors is a quarter of the state."""
    size = 8_000_000  # values of a tensor, in shared memory, so that no process keeps what another one overwrites
    donor, joining = start_peers(5, size=size), start_peers(0, size=size, auxiliary=auxiliary)
    pids = [psutil.Process().pid, donor.pid, joining.pid]
    readings, over = [megabytes(pids)], threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            readings.append(megabytes(pids))

    watching = threading.Thread(target=watch)
    watching.start()
    join(joining)
    over.set()
    watching.join()
    state = 4 * 4 * size / 1e6
    rise = (max(readings) - readings[0]) / state
    assert joining.local_epoch == 5
    assert rise < copies + 0.25  # on a busy machine the peak may pass between two readings
