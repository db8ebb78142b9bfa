"""A member that breaks the protocol of a round is refused, named and left alone; the others have their round."""

import asyncio
import contextlib
import gc
import time
import weakref
from types import SimpleNamespace

import bitsandbytes.functional  # noqa: F401, takes seconds: before averagers fork, as in a trainer
import hivemind
import pytest
import torch
from hivemind.averaging.allreduce import AveragingMode
from hivemind.averaging.group_info import GroupInfo
from hivemind.averaging.matchmaking import MatchmakingException
from hivemind.compression import Float16Compression, serialize_torch_tensor
from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PHandlerError
from hivemind.proto import averaging_pb2
from hivemind.utils import MSGPackSerializer

from src.swarm import rounds
from src.swarm.allreduce import CheckedContainer, JudgingAllReduce
from src.swarm.averagers import LeanGradientAverager, LeanStateAverager
from src.swarm.matchmaking import Attendance
from src.swarm.patience import Patience
from src.swarm.rounds import RoundReporting, objection_to_member

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
NODE = AveragingMode.NODE.value
DATA = MSGPackSerializer.dumps(5)


def gathered(bandwidth=None, mode=NODE, data=DATA) -> bytes:
    return MSGPackSerializer.dumps([bandwidth, mode, data])


HONEST = [gathered(), gathered(100.0), gathered(1), gathered(0.5, AveragingMode.CLIENT.value), gathered(None, 2)]
NONSENSE = {
    "no message": b"\xc1\xff",
    "nothing": b"",
    "too short": MSGPackSerializer.dumps([1.0, NODE]),
    "a number": MSGPackSerializer.dumps(1),
    "an unknown mode": gathered(mode=99),
    "a mode in words": gathered(mode="node"),
    "unreadable data": gathered(data=b"\xc1"),
    "data that is no bytes": gathered(data=7),
    "long": gathered(data=MSGPackSerializer.dumps("x" * 5000)),
    "bandwidth NaN": gathered(float("nan")),
    "infinite bandwidth": gathered(float("inf")),
    "negative bandwidth": gathered(-1.0),
    "no bandwidth": gathered(0.0),
    "tiny bandwidth": gathered(5e-324),
    "absurd bandwidth": gathered(1e30),
    "bandwidth in words": gathered("fast"),
    "bandwidth as a list": gathered([1.0]),
    "bandwidth as truth": gathered(True),
}


def test_what_honest_members_say_of_themselves_is_taken():
    assert [objection_to_member(one) for one in HONEST] == [""] * len(HONEST)


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_that_a_member_says_of_itself_is_noticed(kind):
    assert objection_to_member(NONSENSE[kind])


class Asked:
    """In place of hivemind's averager: lets everybody in."""

    async def rpc_join_group(self, request, context):
        yield averaging_pb2.MessageFromLeader(code=averaging_pb2.ACCEPTED)

    @classmethod
    def get_stub(cls, p2p, peer, *, namespace=None):
        return "a stub"

    async def rpc_download_state(self, request, context):
        for _ in range(5):
            yield averaging_pb2.DownloadData()


class AskedAverager(RoundReporting, Asked):
    peer_id = PeerID(b"own")


@pytest.fixture
def averager(monkeypatch):
    monkeypatch.setattr(AskedAverager, "_shunned", {})
    return AskedAverager(attendance=Attendance())


def answer(averager, peer: PeerID, data: bytes):
    async def ask():
        answers = averager.rpc_join_group(
            averaging_pb2.JoinRequest(gather=data), context=SimpleNamespace(remote_id=peer)
        )
        return (await anext(answers)).code

    return asyncio.run(ask())


def test_who_asks_with_nonsense_is_refused_named_and_left_alone_for_a_while(averager, monkeypatch):
    bad, good = PeerID(b"bad"), PeerID(b"good")
    averager.attendance.came(bad.to_bytes())
    assert averager.attendance.is_awaited(bad.to_bytes())
    assert answer(averager, bad, NONSENSE["no message"]) == averaging_pb2.PROTOCOL_VIOLATION
    for peer, data, code in ((bad, gathered(), "PROTOCOL_VIOLATION"), (good, gathered(), "ACCEPTED")):
        assert averaging_pb2.MessageCode.Name(answer(averager, peer, data)) == code
    assert AskedAverager.get_stub(None, good) == "a stub"
    with pytest.raises(P2PHandlerError, match="did not call"):  # as if it could not be reached: hivemind asks others
        asyncio.run(AskedAverager.get_stub(None, bad).rpc_join_group(None))
    assert not averager.attendance.is_awaited(bad.to_bytes())
    ((peer, reason),) = averager.take_refusals()
    assert peer == str(bad) and "says nothing readable of itself" in reason
    assert len(averager._remarks) == 1 and str(bad) in averager._remarks[0]
    later = time.monotonic() + rounds.SHUN_SECONDS
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert answer(averager, bad, gathered()) == averaging_pb2.ACCEPTED, "but not for ever"
    assert averager.attendance.is_awaited(bad.to_bytes())


def test_new_names_do_not_fill_the_memory(averager):
    for number in range(rounds.MAX_SHUNNED + 50):
        averager._shun(PeerID(number.to_bytes(4, "big")), "sent rubbish")
    assert len(averager._shunned) == rounds.MAX_SHUNNED
    assert averager._is_shunned(PeerID((rounds.MAX_SHUNNED + 49).to_bytes(4, "big")))


@pytest.mark.parametrize("kind", NONSENSE)
def test_group_of_another_leader_is_not_left_because_of_a_member(averager, kind):
    own, bad, good = averager.peer_id, PeerID(b"bad"), PeerID(b"good")
    group = GroupInfo(b"group", (bad, own, good), (NONSENSE[kind], gathered(), gathered(100.0)))
    usable = averager._usable_members(group)
    assert usable.peer_ids == (own, good) and usable.gathered == group.gathered[1:]
    assert averager._is_shunned(bad) and not averager._is_shunned(good)
    assert averager._usable_members(usable) is usable
    with pytest.raises(MatchmakingException, match="has not said"):
        averager._usable_members(GroupInfo(b"group", (own, good), (NONSENSE[kind], gathered())))


def test_member_that_a_leader_names_twice_counts_once(averager):
    group = GroupInfo(b"group", (averager.peer_id, PeerID(b"x"), PeerID(b"x")), (gathered(),) * 3)
    assert averager._usable_members(group).peer_ids == (averager.peer_id, PeerID(b"x"))


@pytest.mark.parametrize("revoked", [False, True])
def test_member_that_is_revoked_while_it_takes_the_state_gets_no_more_of_it(averager, monkeypatch, revoked):
    monkeypatch.setattr(rounds, "ADMISSION_SECONDS", -1.0)
    monkeypatch.setattr(rounds, "LINGER_SECONDS", 0.0)
    answers = iter([True, True, not revoked])

    async def admits(self, peer):
        return next(answers, not revoked)

    monkeypatch.setattr(RoundReporting, "_admits", admits)

    async def download() -> int:
        messages = averager.rpc_download_state(None, SimpleNamespace(remote_id=PeerID(b"member")))
        return len([message async for message in messages])

    assert asyncio.run(download()) == (1 if revoked else 5)
    assert not averager._handouts.running, "another one may have it"


def test_who_keeps_rounds_waiting_again_and_again_is_left_alone_for_longer_each_time(averager, monkeypatch):
    now, silent, good, said = [1000.0], PeerID(b"silent"), PeerID(b"good"), []
    monkeypatch.setattr(rounds, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(averager, "_report_refusal", lambda peer, reason: said.append((peer, reason)), raising=False)

    def rounds_until_shunned(kept_waiting=frozenset({silent})) -> int:
        for number in range(1, 10):
            averager._note_waits({silent, good}, kept_waiting)
            assert not averager._is_shunned(good)
            if averager._is_shunned(silent):
                return number
        return 0

    averager._note_waits({silent, good}, {silent, good})
    averager._note_waits({silent, good}, {silent, good})
    averager._note_waits({good}, set())  # a round without the other one says nothing of it
    averager._note_waits({silent, good}, set())
    assert averager._waits == {}, "all is well again"
    assert rounds_until_shunned() == rounds.MAX_WAITS
    for minutes in (1, 2, 4, 8, 10, 10):
        assert averager._shunned[silent] == pytest.approx(now[0] + 60.0 * minutes)
        now[0] += 60.0 * minutes + 1
        assert rounds_until_shunned() == 1
    text = "has kept 3 rounds waiting, one after the other; it is left alone for 1 minutes"
    assert said[0] == (str(silent), text)
    for number in range(2 * rounds.MAX_SHUNNED):
        averager._note_waits(set(), {PeerID(number.to_bytes(4, "big"))})
    assert len(averager._waits) == rounds.MAX_SHUNNED


class Ring:
    """Something that refers to itself, as a round of averaging does, and so holds its tensors."""

    def __init__(self):
        self.itself = self


class LeavesRing:
    """In place of hivemind's averager: a round that leaves nothing but a ring."""

    def _run_internal(self):
        self.num_inherited = gc.get_freeze_count()

    async def _step(self, *, step, future_for_init):
        self.ring = weakref.ref(Ring())


class RingAverager(RoundReporting, LeavesRing):
    pass


def test_what_a_round_leaves_behind_is_freed_soon_after_it(monkeypatch):
    """Also when Python sees no reason to look for garbage; what an averager's process was forked with is left out."""
    monkeypatch.setattr(rounds, "LINGER_SECONDS", 0.02)
    step, averager = SimpleNamespace(done=lambda: True, cancelled=lambda: True, _result=None), RingAverager()
    gc.collect()
    gc.disable()
    try:
        averager._run_internal()
        assert averager.num_inherited > 10_000

        async def take_part():
            await averager._step(step=step, future_for_init=None)
            assert averager.ring() is not None, "who takes part in the round may still use it"
            await asyncio.sleep(0.2)

        asyncio.run(take_part())
        assert averager.ring() is None
    finally:
        gc.unfreeze()
        gc.enable()


# -- whole rounds -----------------------------------------------------------------------------------------------------


class BadContainer(CheckedContainer):
    """Sends what is to be averaged slowly, or as integers."""

    async def iterate_input_parts_for(self, peer_index):
        async for part in super().iterate_input_parts_for(peer_index):
            if self.fault == "integers":
                part = serialize_torch_tensor(torch.ones(list(part.size), dtype=torch.int64))
            elif self.fault == "drips":
                await asyncio.sleep(1.5)
            yield part


class BadRound(JudgingAllReduce):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.tensor_part_container.__class__ = BadContainer


class BadAverager(LeanGradientAverager):
    fault = ""

    async def _run_allreduce_inplace_(self, *args, **kwargs):
        if self.fault == "silence":
            await asyncio.sleep(60.0)
        BadContainer.fault = self.fault
        rounds.JudgingAllReduce = BadRound  # in this averager's process only
        await super()._run_allreduce_inplace_(*args, **kwargs)


BadAverager.__name__ = "LeanGradientAverager"  # or its remote calls would not be found


class Garbling:
    """A serializer that garbles what this peer says of itself."""

    loads = staticmethod(MSGPackSerializer.loads)

    @staticmethod
    def dumps(value):
        return b"\xc1\xff" if isinstance(value, (list, tuple)) and len(value) == 3 else MSGPackSerializer.dumps(value)


@pytest.mark.swarm
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("fault", "bandwidth"), [("garbles", None), ("integers", None), ("drips", None), ("drips", 6.0)]
)
def test_honest_peers_average_in_time_with_a_bad_member_and_name_it(shut_down_at_end, fault, bandwidth):
    """Who drips, but says that its link is as slow as that, is waited for: it may be honest."""
    nodes, averagers = [], []
    for number in range(3):
        known = [str(address) for node in nodes for address in node.get_visible_maddrs()]
        nodes.append(shut_down_at_end(hivemind.DHT(start=True, initial_peers=known, host_maddrs=[LOOPBACK])))
        averager = (BadAverager if number == 2 else LeanGradientAverager)(
            [torch.nn.Parameter(torch.zeros(3_000_000))],
            dht=nodes[-1],
            reuse_grad_buffers=True,
            prefix="bad_member",
            start=False,
            compression=Float16Compression(),
            min_matchmaking_time=2.0,
            request_timeout=1.0,
            allreduce_timeout=30.0,
            next_chunk_timeout=2.0,
            sender_timeout=1.8,
            reducer_timeout=2.0,
            min_vector_size=1000,
            patience=Patience(4.0),
            bandwidth=bandwidth if number == 2 else None,
        )
        if number == 2:
            averager.fault, averager.serializer = fault, Garbling if fault == "garbles" else MSGPackSerializer
        averager.run_in_background(await_ready=True)
        averagers.append(shut_down_at_end(averager))
    offender, honest = str(averagers[2].peer_id), averagers[:2]
    for _ in range(3):  # on a busy machine they may miss each other
        steps = []
        for averager in averagers:
            averager.parameters[0].grad.fill_(1.0)
            averager.accumulate_grads_(64)
            steps.append(averager.step(wait=False, timeout=30, allow_retries=False))
        results = []
        for step in steps[:2]:
            with contextlib.suppress(BaseException):  # also CancelledError
                results.append(len(step.result(40)))
        time.sleep(0.5)  # the report may come a moment later than the result
        reported = [averager.finished_rounds()[-1] for averager in honest]
        if all(one.num_peers >= (2 if fault == "garbles" else 3) for one in reported):
            break
    assert all(not one.error for one in reported), reported
    named = [offender in " ".join(one.reasons) for one in reported]
    if bandwidth is not None:
        assert not any(named) and all(one.complete for one in reported), reported
        return
    assert any(named), reported
    # a search, 2 s and 2 x 48 Mbit over 50 Mbit/s; with 1.5 s for each of its parts it would be 6 s more
    assert max(one.seconds for one in reported) < 2.0 + 2.0 + 2.0 + 1.5, reported


@pytest.mark.swarm
@pytest.mark.timeout(120)
def test_member_that_claims_another_epoch_does_not_prevent_a_round_of_parameters(shut_down_at_end):
    nodes, averagers = [], []
    for number in range(3):
        known = [str(address) for node in nodes for address in node.get_visible_maddrs()]
        nodes.append(shut_down_at_end(hivemind.DHT(start=True, initial_peers=known, host_maddrs=[LOOPBACK])))
        averager = LeanStateAverager(
            dht=nodes[-1],
            params=[torch.nn.Parameter(torch.full((5000,), 1.0 + number / 1000))],
            optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
            initialize_optimizer=False,
            prefix="other_epoch",
            min_matchmaking_time=2.0,
            request_timeout=1.0,
            allreduce_timeout=30.0,
            next_chunk_timeout=4.0,
            sender_timeout=3.0,
            reducer_timeout=4.0,
            min_vector_size=1000,
            start=True,
        )
        averagers.append(shut_down_at_end(averager))
    liar = str(averagers[2].peer_id)
    for _ in range(4):  # on a busy machine they may miss each other
        steps = [
            hivemind.DecentralizedAverager.step(averager, gather=epoch, wait=False, timeout=15, allow_retries=False)
            for averager, epoch in zip(averagers, (3, 3, 4), strict=True)
        ]
        for step in steps:
            with contextlib.suppress(BaseException):  # also CancelledError
                step.result(30)
        time.sleep(0.5)
        reports = [averager.finished_rounds()[-1] for averager in averagers]
        if all(liar in " ".join(one.reasons) for one in reports[:2]):
            break
    assert all(one.complete and one.num_peers == 2 for one in reports[:2]), reports
    assert "different epochs" in reports[2].error
    for averager in averagers[:2]:
        with averager.get_tensors() as (averaged,):
            torch.testing.assert_close(averaged, torch.full((5000,), 1.0005))


@pytest.mark.swarm
@pytest.mark.slow
@pytest.mark.timeout(200)
def test_client_that_joins_every_round_and_is_silent_keeps_only_some_of_them_waiting(shut_down_at_end, monkeypatch):
    """It cannot be called, has any key it likes, and sends nothing."""
    monkeypatch.setattr(rounds, "MAX_WAITS", 1)
    nodes, averagers = [], []
    for number in range(3):
        known = [str(address) for node in nodes for address in node.get_visible_maddrs()]
        is_client = number == 2
        where = {"client_mode": True} if is_client else {"host_maddrs": [LOOPBACK]}
        nodes.append(shut_down_at_end(hivemind.DHT(start=True, initial_peers=known, **where)))
        averager = (BadAverager if is_client else LeanGradientAverager)(
            [torch.nn.Parameter(torch.zeros(10_000))],
            dht=nodes[-1],
            reuse_grad_buffers=True,
            prefix="silent",
            start=False,
            client_mode=is_client,
            min_matchmaking_time=2.0,
            request_timeout=1.0,
            allreduce_timeout=30.0,
            next_chunk_timeout=4.0,
            sender_timeout=3.0,
            reducer_timeout=4.0,
            min_vector_size=1000,
        )
        averager.fault = "silence"
        averager.run_in_background(await_ready=True)
        averagers.append(shut_down_at_end(averager))
    silent, honest, said, seconds = str(averagers[2].peer_id), averagers[:2], {}, []
    for _ in range(6):  # on a busy machine they may miss each other
        steps = []
        for averager in averagers:
            averager.parameters[0].grad.fill_(1.0)
            averager.accumulate_grads_(64)
            steps.append(averager.step(wait=False, timeout=25, allow_retries=False))
        for step in steps[:2]:
            with contextlib.suppress(BaseException):  # also CancelledError
                step.result(40)
        steps[2].cancel()
        time.sleep(0.5)
        for averager in honest:
            said.update(averager.take_refusals())
        reports = [averager.finished_rounds()[-1] for averager in honest]
        seconds.append((max(one.seconds for one in reports), [one.num_peers for one in reports], bool(said)))
        if len(seconds) > 1 and seconds[-2][2] and all(one.complete for one in reports):
            break
    assert "kept 1 rounds waiting" in said.get(silent, ""), seconds
    assert all(one.num_peers == 2 and one.complete for one in reports), seconds
