"""Averaging does exchange values, says how it went, and waits for partners that are quicker."""

import asyncio
import contextlib
import logging
import os
import signal
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import bitsandbytes.functional  # noqa: F401, takes seconds: before averagers fork, as in a trainer
import hivemind
import pytest
import torch
from hivemind.averaging import DecentralizedAverager
from hivemind.averaging.allreduce import AveragingMode
from hivemind.averaging.control import StepControl
from hivemind.averaging.group_info import GroupInfo
from hivemind.averaging.key_manager import GroupKeyManager
from hivemind.averaging.matchmaking import MatchmakingException
from hivemind.averaging.partition import AllreduceException
from hivemind.compression import (
    BlockwiseQuantization,
    CompressionInfo,
    Float16Compression,
    NoCompression,
    SizeAdaptiveCompression,
    Uniform8BitQuantization,
)
from hivemind.optim.state_averager import TrainingStateAverager
from hivemind.p2p import PeerID
from hivemind.proto import averaging_pb2
from hivemind.utils import MPFuture, MSGPackSerializer, get_dht_time
from hivemind.utils.asyncio import as_aiter

from src.metrics.journal import read_journal
from src.metrics.records import Round
from src.swarm import allreduce, hivemind_fixes
from src.swarm.averagers import (
    LeanGradientAverager,
    LeanStateAverager,
    OwnProcess,
)
from src.swarm.compression import EIGHT_BIT_THRESHOLD
from src.swarm.contributions import Judge
from src.swarm.matchmaking import Attendance
from src.swarm.patience import Patience
from src.swarm.rounds import (
    MAX_REASON_LENGTH,
    MAX_REASONS,
    OWNER_WAITS,
    SEARCH_PAUSE,
    RoundReporting,
    _FailureCollector,
)
from src.trainer.epoch_report import explain
from tests.reference.clock import Clock

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
SHAPES = ((300, 256), (17,))  # one above and one below the size from which tensors travel in eight bits
COMPRESSIONS = {
    # relative errors: none has float32's, float16 has 11 significant bits, uniform 8-bit has 256 levels in +-6 sigma
    "none": (NoCompression(), 1e-6),
    "float16": (Float16Compression(), 2e-3),
    "uniform 8-bit": (Uniform8BitQuantization(), 5e-2),
    "blockwise 8-bit": (BlockwiseQuantization(), 5e-2),
    "by size": (
        SizeAdaptiveCompression(
            threshold=EIGHT_BIT_THRESHOLD, less=Float16Compression(), greater_equal=BlockwiseQuantization()
        ),
        5e-2,
    ),
}


class PlainAverager(OwnProcess, RoundReporting, DecentralizedAverager):
    """Averages any tensors and reports its rounds. At module level: remote calls are named after the class."""

    round_kind = "anything"


@pytest.fixture(scope="module")
def two_nodes():
    """Two DHT nodes on loopback that know each other."""
    with contextlib.ExitStack() as stack:
        nodes = []
        for _ in range(2):
            node = hivemind.DHT(start=True, initial_peers=loopback_addresses(nodes), host_maddrs=[LOOPBACK])
            stack.callback(node.shutdown)
            nodes.append(node)
        yield nodes


def loopback_addresses(nodes) -> list[str]:
    return [str(address) for node in nodes for address in node.get_visible_maddrs()]


def averager_options(prefix: str, compression) -> dict:
    return {
        "prefix": prefix,
        "start": True,
        "compression": compression,
        "min_matchmaking_time": 1.5,
        "request_timeout": 1.0,
        "allreduce_timeout": 20.0,
        "next_chunk_timeout": 8.0,
        "min_vector_size": 1000,
    }


def run_together(start_steps, *, attempts: int = 3) -> list[dict]:
    """The results of steps that are begun at once; on a busy machine peers may miss each other, then once more."""
    for attempts_left in reversed(range(attempts)):
        steps = start_steps()
        try:
            return [step.result(60) for step in steps]
        except Exception:
            if not attempts_left:
                raise
            for step in steps:
                with contextlib.suppress(Exception):
                    step.result(60)


def reported_rounds(averager, *, timeout: float = 10.0) -> list[Round]:
    """What the averager reports; the report may come a moment later than the result."""
    give_up_at = time.monotonic() + timeout
    while not (rounds := averager.finished_rounds()) and time.monotonic() < give_up_at:
        time.sleep(0.02)
    return rounds


def assert_last_round_complete(averager, kind: str, *, num_peers: int = 2) -> Round:
    last = reported_rounds(averager)[-1]
    assert (last.kind, last.num_peers, last.received, last.num_lost, last.error) == (kind, num_peers, 1.0, 0, ""), last
    assert last.complete and 0 < last.seconds < 60
    return last


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_gradient_averaging_yields_the_weighted_mean_under_each_compression(two_nodes, shut_down_at_end, name):
    compression, tolerance = COMPRESSIONS[name]
    generator = torch.Generator().manual_seed(0)
    gradients = [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in two_nodes]
    samples = (1, 3)
    expected = [(one * samples[0] + other * samples[1]) / sum(samples) for one, other in zip(*gradients, strict=True)]
    averagers = []
    for node in two_nodes:
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
        options = averager_options(f"gradients_{name.replace(' ', '_')}", compression)
        averager = LeanGradientAverager(parameters, dht=node, reuse_grad_buffers=True, **options)
        averagers.append(shut_down_at_end(averager))

    def start_steps():
        for averager, own, num_samples in zip(averagers, gradients, samples, strict=True):
            for parameter, gradient in zip(averager.parameters, own, strict=True):
                parameter.grad.copy_(gradient)
            averager.accumulate_grads_(num_samples)
            yield averager.step(wait=False, timeout=15)

    for result in run_together(lambda: list(start_steps())):
        assert len(result) == 2
    for averager in averagers:
        assert_last_round_complete(averager, "gradients")
        with averager.get_tensors() as averaged:
            for tensor, mean in zip(averaged, expected, strict=True):
                assert float((tensor - mean).norm() / mean.norm()) < tolerance


def test_state_averaging_yields_the_mean_of_parameters(two_nodes, shut_down_at_end):
    averagers = [
        shut_down_at_end(
            LeanStateAverager(
                dht=node,
                params=[{"params": [torch.nn.Parameter(torch.full((2000,), value))]}],
                optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
                initialize_optimizer=False,
                **averager_options("state", Float16Compression()),
            )
        )
        for value, node in zip((1.0, 1.04), two_nodes, strict=True)
    ]
    results = run_together(
        lambda: [DecentralizedAverager.step(averager, wait=False, timeout=15, gather=5) for averager in averagers]
    )
    assert [list(result.values()) for result in results] == [[5, 5]] * 2
    rounds = [assert_last_round_complete(averager, "parameters") for averager in averagers]
    for one, other in (rounds, rounds[::-1]):
        # whoever averages how much: its values in 16 bits for others to average, or averages for them
        assert 4000 <= one.bytes_sent == other.bytes_received < 4600
    for averager in averagers:
        with averager.get_tensors() as averaged:
            torch.testing.assert_close(averaged[0], torch.full((2000,), 1.02), rtol=1e-3, atol=0)


def test_trainer_does_not_average_with_an_auxiliary_peer_alone(two_nodes, shut_down_at_end):
    trainers = [
        shut_down_at_end(PlainAverager([torch.full((2000,), value)], node, **averager_options("aux", NoCompression())))
        for value, node in zip((1.0, 3.0), two_nodes, strict=True)
    ]
    third_node = shut_down_at_end(
        hivemind.DHT(start=True, initial_peers=loopback_addresses(two_nodes[:1]), host_maddrs=[LOOPBACK])
    )
    auxiliary = shut_down_at_end(
        PlainAverager([torch.zeros(2000)], third_node, auxiliary=True, **averager_options("aux", NoCompression()))
    )
    steps = [averager.step(wait=False, timeout=60) for averager in (trainers[0], auxiliary)]
    time.sleep(4.0)  # longer than they need to find each other
    assert not any(step.done() for step in steps)
    steps.append(trainers[1].step(wait=False, timeout=60))
    assert [len(step.result(90)) for step in (steps[0], steps[2])] in ([2, 2], [3, 3])
    for trainer in trainers:
        assert reported_rounds(trainer)[-1].complete
        with trainer.get_tensors() as averaged:
            torch.testing.assert_close(averaged[0], torch.full((2000,), 2.0), rtol=1e-6, atol=0)


def test_round_without_a_partner_is_reported_with_an_error(two_nodes, shut_down_at_end):
    averager = PlainAverager([torch.ones(2000)], two_nodes[0], **averager_options("alone", NoCompression()))
    shut_down_at_end(averager)
    step = averager.step(wait=False, timeout=3, allow_retries=False)
    with pytest.raises(Exception, match="could not find a group"):
        step.result(30)
    (failed,) = reported_rounds(averager)
    assert failed.kind == "anything" and not failed.complete
    assert "could not find a group" in failed.error
    with averager.get_tensors() as tensors:
        torch.testing.assert_close(tensors[0], torch.ones(2000))


def test_cancelled_step_is_no_round(two_nodes, shut_down_at_end):
    hivemind_fixes.apply()
    averager = PlainAverager([torch.ones(2000)], two_nodes[0], **averager_options("cancelled", NoCompression()))
    shut_down_at_end(averager)
    step = averager.step(wait=False, timeout=10, require_trigger=True)
    assert step.cancel()
    again = averager.step(wait=False, timeout=2, allow_retries=False)  # its report comes after the first one's
    with pytest.raises(Exception, match="could not find a group"):
        again.result(30)
    assert len(reported_rounds(averager)) == 1


def test_round_is_given_up_when_its_owner_has_waited_for_a_partner_long_enough(two_nodes, shut_down_at_end, tmp_path):
    hivemind_fixes.apply()
    metrics = tmp_path / "metrics.jsonl"
    averager = PlainAverager(
        [torch.ones(2000)],
        two_nodes[0],
        patience=Patience(2.0 + 8.0 / 3),  # a search, and the shortest round
        phases_path=metrics,
        **averager_options("vain", NoCompression()),
    )
    shut_down_at_end(averager)
    step = averager.step(wait=False, timeout=60, require_trigger=True)
    time.sleep(3.0)
    assert not step.done(), "nobody waits for it yet"
    triggered = time.monotonic()
    step.allow_allreduce()
    with pytest.raises(BaseException):  # noqa: B017, futures.CancelledError is one of several that hivemind may raise
        step.result(30)
    assert 1.5 < time.monotonic() - triggered < 6
    (failed,) = reported_rounds(averager)
    assert failed.error == "no other trainer was ready within 2 s" and not failed.complete
    phases = [(record["kind"], record["phase"]) for record in read_journal(metrics)]
    assert phases == [("anything", "matchmaking"), ("anything", "idle")]
    assert averager._vain_search.value > triggered
    assert 1.9 < averager.patience.spent < 6, "the next round of this epoch's end is not searched for as long"


@pytest.mark.parametrize("leave", ["the epoch", "the swarm"])
def test_search_is_given_up_at_once_when_its_owner_wants_to_leave(two_nodes, shut_down_at_end, leave):
    hivemind_fixes.apply()
    averager = PlainAverager(
        [torch.ones(2000)], two_nodes[0], patience=Patience(30.0), **averager_options("leaving", NoCompression())
    )
    shut_down_at_end(averager)
    step = averager.step(wait=False, timeout=60, require_trigger=True)
    step.allow_allreduce()
    time.sleep(1.0)
    assert not step.done()
    if leave == "the epoch":
        averager.patience.give_up()
    else:
        averager.patience.end()
        averager.patience.renew()  # in vain
    began = time.monotonic()
    with pytest.raises(BaseException):  # noqa: B017, as above
        step.result(30)
    assert time.monotonic() - began < 25, "a search goes on for a minute"
    if leave == "the epoch":
        (failed,) = reported_rounds(averager)
        assert failed.error == "the search was given up"
    else:
        time.sleep(0.5)
        assert averager.finished_rounds() == [], "to leave is no failure"
    assert averager._vain_search.value == float("-inf"), "this says nothing about the others"


class RefusingJudge(Judge):
    """Has something against whatever others send, or against the averages they send back."""

    def __init__(self, what: str):
        super().__init__(max_weight=1.0)
        self.what = what

    def combine(self, part, contributions, *, own, **kwargs):
        average, refused = super().combine(part, contributions, own=own, **kwargs)
        if self.what == "values":
            return contributions[own][0], {sender: "is disliked" for sender in contributions if sender != own}
        return average, refused

    def check_average(self, part, own, delta, **kwargs):
        if self.what == "averages" and float(delta.norm()) > 0:
            raise AllreduceException("sent an average that is disliked")


@pytest.mark.parametrize("what", ["averages", "values"])
@pytest.mark.parametrize("size", [3000, 300_000], ids=["all is sent at once", "more than the pipes hold"])
def test_who_is_refused_hears_of_it_at_once_and_with_the_reason(two_nodes, shut_down_at_end, monkeypatch, what, size):
    # a machine that stands still for half a second in between is no fault
    monkeypatch.setattr(allreduce, "PARTING_SECONDS", 5.0)
    monkeypatch.setattr(allreduce, "OBJECTION_SECONDS", 5.0)
    averagers = []
    for node, value in zip(two_nodes, (1.0, 2.0), strict=True):
        options = averager_options(f"refused_{what}_{size}", NoCompression())
        options.update(start=False, part_size_bytes=2000, sender_timeout=12.0, reducer_timeout=16.0)
        averager = PlainAverager([torch.full((size,), value)], node, **options)
        averager.judge = RefusingJudge(what) if value == 1.0 else Judge(max_weight=1.0)
        averager.run_in_background(await_ready=True)
        averagers.append(shut_down_at_end(averager))
    run_together(lambda: [averager.step(wait=False, timeout=15, allow_retries=False) for averager in averagers])
    for averager, other in zip(averagers, reversed(averagers), strict=True):
        last = reported_rounds(averager)[-1]
        assert last.seconds < 11.0 and not last.error, "a search of 1.5 s, and a round without waiting for 12 s"
        (reason,) = last.reasons
        assert "disliked" in reason and other.peer_id.to_base58() in reason
    with averagers[0].get_tensors() as (tensor,):
        assert float(tensor.max()) <= 1.5 and float(tensor.min()) == 1.0, "its own values stand in for the other's"


class FailingJudge(Judge):
    """Of a peer that fails when it is to average what it was sent; ``fail()`` is called in the averager's process."""

    def __init__(self, fail):
        super().__init__(max_weight=1.0)
        self.fail = fail

    def combine(self, *args, **kwargs):
        self.fail()
        return super().combine(*args, **kwargs)


@pytest.mark.parametrize(
    ("fail", "explanation"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "ended"),
        (lambda: time.sleep(20), "in time: it is overloaded or stopped"),
    ],
    ids=["it is killed", "it stands still"],
)
def test_hivemind_log_of_a_failure_is_understood(two_nodes, shut_down_at_end, temporary_directory, fail, explanation):
    """`explain` reads hivemind's own words, which a new release may change."""
    averagers = []
    for number, node in enumerate(two_nodes):
        options = averager_options(f"failing_{explanation[:5]}", NoCompression()) | {"start": False}
        options.update(part_size_bytes=2000, sender_timeout=3.0, reducer_timeout=4.0)
        averager = PlainAverager([torch.full((300_000,), float(number))], node, **options)
        averager.judge = FailingJudge(fail) if number == 1 else Judge(max_weight=1.0)
        sockets = set(temporary_directory.glob("p2pclient-*"))
        averager.run_in_background(await_ready=True)
        averagers.append(averager)
    shut_down_at_end(averagers[0])
    steps = [averager.step(wait=False, timeout=15, allow_retries=False) for averager in averagers]
    with contextlib.suppress(Exception):
        steps[0].result(30)
    averagers[1].kill()
    averagers[1].join(10)
    for left in set(temporary_directory.glob("p2pclient-*")) - sockets:
        left.unlink()
    reasons = {reason: explain(reason) for one in reported_rounds(averagers[0]) for reason in one.reasons}
    unknown = [reason for reason, text in reasons.items() if text == reason]
    assert reasons and all(reason.startswith("Caught AllreduceException") for reason in unknown), "not our own words"
    assert any(explanation in text for text in reasons.values()), reasons


class GroupThatDoesNotEnd:
    def finalize(self, *, cancel):
        return {asyncio.ensure_future(asyncio.sleep(60))}


def test_averager_that_is_shut_down_in_a_round_that_does_not_end_removes_its_socket(two_nodes, temporary_directory):
    averager = PlainAverager(
        [torch.zeros(10)], two_nodes[0], **averager_options("unended", NoCompression()) | {"start": False}
    )
    averager.shutdown_timeout, averager._running_groups = 2.0, {"group": GroupThatDoesNotEnd()}
    before = set(temporary_directory.glob("p2pclient-*"))
    averager.run_in_background(await_ready=True)
    assert len(set(temporary_directory.glob("p2pclient-*")) - before) == 1
    averager.shutdown()
    assert averager.exitcode == 0, "it had to be killed"
    assert set(temporary_directory.glob("p2pclient-*")) == before


# Below no process is started: the averagers' methods are called as in the averager's own process.


NOTHING = MSGPackSerializer.dumps(None)


class FakeAverager:
    """Stands in for `DecentralizedAverager`: ends a step with what the test says."""

    outcome: object
    serializer, allreduce_kwargs, next_chunk_timeout = MSGPackSerializer, {}, None
    modes = (AveragingMode.NODE, AveragingMode.CLIENT, AveragingMode.AUX)

    async def _step(self, *, step, future_for_init):
        gathered = [MSGPackSerializer.dumps([None, mode.value, NOTHING]) for mode in self.modes]
        try:
            group = SimpleNamespace(group_id=b"group", gathered=gathered, peer_ids=range(len(gathered)))
            step._result = await self._aggregate_with_group(group)
        except BaseException as error:
            step._exception = error
            raise

    async def _aggregate_with_group(self, group_info, **kwargs):
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


class ReportingFakeAverager(RoundReporting, FakeAverager):
    round_kind = "fake"

    def __init__(self, outcome, *, failed_size: int = 0, banned=(), refused=()):
        super().__init__()
        self.outcome = outcome
        runner = asyncio.Future(loop=asyncio.new_event_loop())
        container = SimpleNamespace(failed_size=failed_size, total_size=1000)
        runner.set_result(
            SimpleNamespace(
                tensor_part_container=container,
                banned_senders=set(banned),
                refused=tuple(refused),
                ignored=frozenset(),
                kept_waiting=(),
            )
        )
        self._running_groups = {b"group": runner}


def fake_step(*, cancelled: bool = False, mode: AveragingMode = AveragingMode.NODE):
    data = MSGPackSerializer.dumps([None, mode.value, NOTHING])
    return SimpleNamespace(
        _result=None, _exception=None, _trigger=None, data_for_gather=data, done=lambda: False,
        cancelled=lambda: cancelled,
    )  # fmt: skip


def report_of(averager: ReportingFakeAverager, **kwargs) -> list[Round]:
    with contextlib.suppress(Exception, asyncio.CancelledError):
        asyncio.run(averager._step(step=fake_step(**kwargs), future_for_init=None))
    return averager.finished_rounds()


def test_flood_of_refusals_does_not_make_an_averager_wait_for_its_owner():
    averager = ReportingFakeAverager({})

    def flood():
        for number in range(5000):
            averager._report_refusal(f"stranger {number}", "x" * 10_000)

    flooding = threading.Thread(target=flood, daemon=True)
    flooding.start()
    flooding.join(20)
    assert not flooding.is_alive(), "nobody reads, and the pipe is full"
    first = averager.take_refusals()
    assert len(first) == MAX_REASONS and first[0][0] == "stranger 0" and len(first[0][1]) == MAX_REASON_LENGTH
    averager._report_refusal("late", "has shown no valid token")
    assert averager.take_refusals() == [("late", "has shown no valid token")]


@pytest.mark.parametrize(("spent", "vain"), [(0.2, True), (9.0, False)])
def test_only_a_long_search_in_vain_speaks_against_the_others(spent, vain):
    averager = ReportingFakeAverager({})
    averager.next_chunk_timeout, averager.patience = 8.0, Patience(10.0)
    averager.patience.spend(spent)
    before = time.monotonic()
    averager.patience.spend(1.0)
    OWNER_WAITS.set([time.monotonic() - 7.1])
    averager._paced_matchmaking = None
    reason = averager._why_to_give_up(None, 7.1)
    assert (averager._vain_search.value >= before) is vain
    assert ("only 7 s were left" in reason) is not vain and "no other trainer was ready" in reason


def test_round_report_counts_what_was_lost():
    members = {"first": None, "second": None, "third": None}
    (whole,) = report_of(ReportingFakeAverager(members))
    assert (whole.num_peers, whole.received, whole.num_lost, whole.complete) == (3, 1.0, 0, True)
    (partial,) = report_of(ReportingFakeAverager(members, failed_size=250))
    assert (partial.received, partial.complete, partial.error) == (0.75, False, "")
    (lost,) = report_of(ReportingFakeAverager(members, banned=["second"]))
    assert (lost.num_lost, lost.complete) == (1, False)
    (poisoned,) = report_of(ReportingFakeAverager(members, refused=["left out 3 of 3 parts of second: ..."]))
    assert (poisoned.num_refused, poisoned.complete) == (1, True)
    assert poisoned.reasons == ("left out 3 of 3 parts of second: ...",)


def test_assistant_reports_how_long_a_round_took_and_not_its_search(monkeypatch):
    averager, clock = ReportingFakeAverager({PeerID(b"one"): 1}), Clock()
    monkeypatch.setattr("src.swarm.rounds.time", clock)

    async def look_for_group_first(self, group_info, **kwargs):
        clock.advance(0.25)
        return await RoundReporting._aggregate_with_group(self, group_info, **kwargs)

    monkeypatch.setattr(ReportingFakeAverager, "_aggregate_with_group", look_for_group_first)
    (of_trainer,), (of_assistant,) = report_of(averager), report_of(averager, mode=AveragingMode.AUX)
    assert (of_trainer.seconds, of_assistant.seconds) == (0.25, 0.0)


def test_round_report_names_the_error():
    (failed,) = report_of(ReportingFakeAverager(MatchmakingException("no leader")))
    assert failed.error == "no leader" and not failed.complete
    averager = ReportingFakeAverager({"trainer": None, "auxiliary": None})
    averager.modes = (AveragingMode.AUX, AveragingMode.NODE)
    (useless,) = report_of(averager)
    assert "no second trainer" in useless.error
    (timed_out,) = report_of(ReportingFakeAverager(TimeoutError()))  # has no message of its own
    assert "timed out" in timed_out.error.lower() or "TimeoutError" in timed_out.error
    assert report_of(ReportingFakeAverager(asyncio.CancelledError("owner's wish")), cancelled=True) == []


def test_round_that_is_broken_off_says_for_whom_it_waited():
    async def broken_off(*args, **kwargs):
        try:
            raise asyncio.CancelledError
        except asyncio.CancelledError as error:
            raise MatchmakingException(f"Unable to run All-Reduce: {error}")  # noqa: B904, as hivemind does

    averager = ReportingFakeAverager(None)
    averager._running_groups[b"group"].result().missing_peers = lambda: ["slow", "slower"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeAverager, "_aggregate_with_group", broken_off)
        (failed,) = report_of(averager)
    assert failed.error == "the round was broken off after 0 s, while it waited for slow, slower"


def test_silence_of_a_partner_is_called_by_its_name():
    collector = _FailureCollector()
    collector.emit(logging.makeLogRecord({"msg": f"Caught {TimeoutError()!r} when communicating to partner"}))
    assert collector.take() == ("Caught TimeoutError('nothing came in time') when communicating to partner",)


def test_round_report_ends_the_activity_also_after_a_failure():
    averager = ReportingFakeAverager(MatchmakingException("no leader"))
    report_of(averager)
    assert averager._num_active_steps == 0


def test_end_of_a_search_is_told_in_the_background_and_its_beginning_is_not():
    hivemind_fixes.apply()
    hivemind_fixes.apply()  # harmless

    class SlowDHT:
        peer_id, told = None, []

        async def store(self, **kwargs):
            await asyncio.sleep(0.3)  # a node has died
            self.told.append(kwargs["value"])
            return True

    async def scenario():
        manager, began = GroupKeyManager(SlowDHT(), "run", "", None), time.monotonic()
        assert await manager.declare_averager("run.0b", PeerID(b"own"), 100.0)
        told_to_begin = time.monotonic() - began
        assert await manager.declare_averager("run.0b", PeerID(b"own"), 100.0, looking_for_group=False)
        told_to_end = time.monotonic() - began - told_to_begin
        assert SlowDHT.told == [True]
        await asyncio.sleep(0.5)
        return told_to_begin, told_to_end

    told_to_begin, told_to_end = asyncio.run(scenario())
    assert SlowDHT.told == [True, False]
    assert told_to_begin >= 0.3 > 0.1 > told_to_end


class Group:
    """A round under way that answers each part with what it was sent."""

    async def rpc_aggregate_part(self, stream, context):
        async for message in stream:
            yield averaging_pb2.AveragingData(code=averaging_pb2.AVERAGED_PART, weight=message.weight)


def part_for(group_id: bytes, weight: float) -> averaging_pb2.AveragingData:
    return averaging_pb2.AveragingData(code=averaging_pb2.PART_FOR_AVERAGING, group_id=group_id, weight=weight)


def idle_averager(*, active_steps: int, next_chunk_timeout: float | None) -> LeanGradientAverager:
    """An averager's inside without its process, between two rounds: the last one's event is still set."""
    averager = LeanGradientAverager.__new__(LeanGradientAverager)
    averager._parent_pid = None  # hivemind's __del__ leaves it alone
    averager._running_groups, averager._num_active_steps = {}, active_steps
    averager.next_chunk_timeout = next_chunk_timeout
    averager._pending_groups_registered = asyncio.Event()
    averager._pending_groups_registered.set()
    return averager


async def collect(averager, *parts) -> list:
    stream = averager.rpc_aggregate_part(as_aiter(*parts), context=SimpleNamespace(remote_id=PeerID(b"partner")))
    return [message async for message in stream]


class Answering:
    """In place of hivemind's averager: gives one message to each kind of call."""

    async def rpc_join_group(self, request, context):
        yield averaging_pb2.MessageFromLeader(code=averaging_pb2.BEGIN_ALLREDUCE)

    async def rpc_aggregate_part(self, stream, context):
        yield averaging_pb2.AveragingData(code=averaging_pb2.AVERAGED_PART)

    async def rpc_download_state(self, request, context):
        yield averaging_pb2.DownloadData()


class LingeringAverager(RoundReporting, Answering):
    next_chunk_timeout = _phases_path = _progress_key = None
    attendance = Attendance()
    _running_groups = ()
    _num_active_steps = 0
    patience = Patience()

    def __init__(self):
        pass


@pytest.mark.parametrize("call", ["rpc_join_group", "rpc_aggregate_part", "rpc_download_state"])
def test_stream_stays_open_after_its_last_message_until_the_reader_hangs_up(call):
    async def scenario():
        gathered = MSGPackSerializer.dumps([None, AveragingMode.NODE.value, NOTHING])
        request = averaging_pb2.JoinRequest(gather=gathered) if call == "rpc_join_group" else None
        request = as_aiter(averaging_pb2.AveragingData()) if call == "rpc_aggregate_part" else request
        answers = getattr(LingeringAverager(), call)(request, SimpleNamespace(remote_id=PeerID(b"partner")))
        await anext(answers)
        ending = asyncio.create_task(anext(answers))
        await asyncio.sleep(0.2)
        assert not ending.done(), "p2pd may lose the message"
        ending.cancel()  # as hivemind does with a handler whose caller has hung up

    asyncio.run(scenario())


def test_searches_for_partners_are_a_while_apart():
    """hivemind repeats a search as soon as it has found nobody."""

    async def scenario():
        begun = []

        async def get_averagers(group_key, only_active):
            begun.append(time.monotonic())
            return [group_key, only_active]

        averager = LingeringAverager()
        averager._matchmaking = SimpleNamespace(group_key_manager=SimpleNamespace(get_averagers=get_averagers))
        asked = time.monotonic()
        for _ in range(3):
            assert await averager._matchmaking.group_key_manager.get_averagers("key", only_active=True) == ["key", True]
        assert begun[0] - asked < SEARCH_PAUSE / 2, "the first search begins at once"
        assert min(begun[1] - begun[0], begun[2] - begun[1]) > 0.9 * SEARCH_PAUSE

    asyncio.run(scenario())


def test_round_is_given_less_time_when_patience_is_running_out():
    averager = LingeringAverager()
    averager.next_chunk_timeout = 8.0
    averager.allreduce_kwargs = {"sender_timeout": 6.0, "reducer_timeout": 8.0}

    def timeouts_after(*waited: float, spent: float = 0.0) -> dict:
        averager.patience = Patience(10.0)
        averager.patience.spend(spent)
        OWNER_WAITS.set([time.monotonic() - seconds for seconds in waited])
        return {name: round(seconds, 1) for name, seconds in averager._round_timeouts().items()}

    usual, shortest = {"sender_timeout": 6.0, "reducer_timeout": 8.0}, {"sender_timeout": 2.0, "reducer_timeout": 2.7}
    assert timeouts_after() == timeouts_after(1.0) == timeouts_after(spent=1.5) == usual
    assert timeouts_after(6.0) == timeouts_after(spent=6.0) == timeouts_after(2.0, spent=4.0) == {
        "sender_timeout": 3.0, "reducer_timeout": 4.0
    }, "10 s in all"  # fmt: skip
    assert timeouts_after(60.0) == timeouts_after(spent=float("inf")) == shortest
    averager.next_chunk_timeout = None
    assert timeouts_after(6.0) == {}


@pytest.mark.parametrize(
    ("own", "epochs", "members"),
    [
        ("a", {"a": 4, "b": 4, "auxiliary": 9}, ("a", "b", "auxiliary")),  # an assistant's epoch says nothing
        ("a", {"a": 4, "b": 4, "liar": 5}, ("a", "b")),
        ("a", {"a": 4, "liar 1": 5, "b": 4, "liar 2": 5, "liar 3": 5}, ("a", "b")),
        ("a", {"a": 4, "b": 4, "liar": None}, ("a", "b")),
        ("a", {"a": 4, "b": 4, "liar": 2**63, "auxiliary": 0}, ("a", "b", "auxiliary")),
        ("auxiliary", {"a": 4, "b": 4, "liar": 5, "auxiliary": 0}, ("a", "b", "auxiliary")),
        ("a", {"a": 4, "b": 4, "c": 5, "d": 5, "auxiliary": 0}, ("a", "b", "auxiliary")),
        ("c", {"a": 4, "b": 4, "c": 5, "d": 5, "auxiliary": 0}, ("c", "d")),
        ("auxiliary", {"a": 4, "b": 4, "c": 5, "d": 5, "auxiliary": 0}, ("a", "b", "auxiliary")),
        ("a", {"a": 4, "b": 5, "auxiliary": 4}, None),
        ("auxiliary", {"a": 4, "b": 5, "auxiliary": 4}, None),
    ],
)
def test_parameters_are_averaged_among_trainers_of_one_epoch_only(monkeypatch, own, epochs, members):
    averaged = []

    async def average(self, group_info, **kwargs):
        averaged.append(group_info.peer_ids)
        return {peer: epochs[peer] for peer in group_info.peer_ids}

    monkeypatch.setattr(RoundReporting, "_aggregate_with_group", average)
    averager = LeanStateAverager.__new__(LeanStateAverager)
    averager._parent_pid, averager._ident = None, None
    monkeypatch.setattr(LeanStateAverager, "peer_id", own)
    dumps = averager.serializer.dumps
    modes = {name: AveragingMode.AUX if name == "auxiliary" else AveragingMode.NODE for name in epochs}
    gathered = tuple(dumps([100.0, modes[name].value, dumps(epoch)]) for name, epoch in epochs.items())
    group = GroupInfo(b"group", tuple(epochs), gathered)
    if members is None:
        with pytest.raises(MatchmakingException, match="different epochs"):
            asyncio.run(averager._aggregate_with_group(group))
        return
    result = asyncio.run(averager._aggregate_with_group(group))
    assert averaged == [members]
    assert set(result.values()) == {epochs[own]}, "hivemind would go to the highest epoch"
    left_out = [name for name in epochs if name not in members and name != "auxiliary"]
    assert len(averager._remarks) == len(left_out)
    assert all(any(name in remark for remark in averager._remarks) for name in left_out)


def test_part_that_comes_before_the_round_begins_is_served_once_it_does():
    async def scenario():
        averager = idle_averager(active_steps=1, next_chunk_timeout=30.0)
        answers = asyncio.create_task(collect(averager, part_for(b"late", 1.0), part_for(b"late", 2.0)))
        for _ in range(5):  # the partner's call has reached us and waits
            await asyncio.sleep(0.01)
        assert not answers.done()
        round_under_way = asyncio.get_running_loop().create_future()
        round_under_way.set_result(Group())
        averager._running_groups[b"late"] = round_under_way
        return await asyncio.wait_for(answers, 10)

    answers = asyncio.run(scenario())
    assert [message.code for message in answers] == [averaging_pb2.AVERAGED_PART] * 2
    assert [message.weight for message in answers] == [1.0, 2.0]


def test_part_of_an_unknown_group_is_refused_at_once_while_no_step_is_active():
    async def scenario():
        averager = idle_averager(active_steps=0, next_chunk_timeout=None)
        return await asyncio.wait_for(collect(averager, part_for(b"unknown", 1.0)), 5)

    assert [message.code for message in asyncio.run(scenario())] == [averaging_pb2.BAD_GROUP_ID]


def test_part_of_an_unknown_group_is_refused_when_the_step_ends_or_time_is_up():
    async def scenario(*, next_chunk_timeout, ends: bool):
        averager = idle_averager(active_steps=1, next_chunk_timeout=next_chunk_timeout)
        answers = asyncio.create_task(collect(averager, part_for(b"unknown", 1.0)))
        await asyncio.sleep(0.05)
        if ends:
            assert not answers.done()
            averager._num_active_steps = 0
        return await asyncio.wait_for(answers, 5)

    for options in ({"next_chunk_timeout": None, "ends": True}, {"next_chunk_timeout": 0.2, "ends": False}):
        assert [message.code for message in asyncio.run(scenario(**options))] == [averaging_pb2.BAD_GROUP_ID], options


@pytest.mark.parametrize(
    ("epoch", "is_done", "named"), [(20, True, 20), (20, False, 19), (19, True, 19), (19, False, 19)]
)
def test_state_averager_names_the_last_epoch_only_when_its_step_is_done(monkeypatch, epoch, is_done, named):
    state = {"epoch": epoch}, [torch.ones(2)], ["info"]
    monkeypatch.setattr(TrainingStateAverager, "get_current_state", lambda self: (dict(state[0]), *state[1:]))
    averager = LeanStateAverager.__new__(LeanStateAverager)
    averager._parent_pid, averager._ident = None, None
    averager.final_epoch, averager.pending_updates, averager.mode = 20, {Future()}, AveragingMode.NODE
    if is_done:
        next(iter(averager.pending_updates)).set_result(None)
    assert averager.get_current_state() == ({"epoch": named}, *state[1:])


@pytest.mark.parametrize("averager_type", [LeanGradientAverager, LeanStateAverager])
def test_remote_calls_stream_in_both_directions(averager_type):
    averager_type._collect_rpc_handlers()
    handlers = {handler.method_name: handler for handler in averager_type._rpc_handlers}
    for own in ("rpc_sample_state", "rpc_resume_state"):
        assert (handlers.pop(own, None) is not None) == (averager_type is LeanStateAverager)
    original = {handler.method_name: handler for handler in handlers_of(averager_type.__bases__[-1])}
    assert handlers == original  # the same messages and streams as in hivemind's own class
    part = handlers["rpc_aggregate_part"]
    assert part.stream_input and part.stream_output
    assert part.request_type is part.response_type is averaging_pb2.AveragingData


def handlers_of(averager_type) -> list:
    fresh = type(averager_type.__name__, (averager_type,), {"_rpc_handlers": None})
    fresh._collect_rpc_handlers()
    return fresh._rpc_handlers


def test_step_cancellation_marks_the_step_before_it_wakes_the_averager():
    hivemind_fixes.apply()
    trigger, wake = MPFuture(), MPFuture()  # before a step: hivemind cannot do with one as a process' first future
    step = StepControl(
        scheduled_time=get_dht_time() + 10,
        deadline=get_dht_time() + 60,
        allow_retries=False,
        weight=1.0,
        data_for_gather=b"",
    )
    order = []

    def recording(name: str, action):
        def record(*args):
            order.append((name, step.cancelled()))
            return action(*args)

        return record

    trigger.cancel = recording("trigger", trigger.cancel)
    wake.set_result = recording("wake", wake.set_result)
    step.attach(trigger, wake)
    assert step.cancel() is True
    assert step.cancelled() and trigger.cancelled() and wake.done()
    assert order == [("trigger", True), ("wake", True)]


def test_blockwise_compression_keeps_the_gradients_of_rare_words():
    """Rows of an embedding's gradient differ by orders of magnitude; figures: docs/differences-from-2022.md."""
    generator = torch.Generator().manual_seed(0)
    row_scales = torch.logspace(-4, 0, 8000)[torch.randperm(8000, generator=generator)]
    gradient = torch.randn(8000, 256, generator=generator) * row_scales[:, None]
    info = CompressionInfo.from_tensor(gradient)
    median_error = {}
    for compression in (Uniform8BitQuantization(), BlockwiseQuantization()):
        restored = compression.extract(compression.compress(gradient, info))
        errors = (restored - gradient).norm(dim=1) / gradient.norm(dim=1)
        median_error[type(compression)] = float(errors.median())
    assert median_error[Uniform8BitQuantization] == pytest.approx(0.24, abs=0.02)
    assert median_error[BlockwiseQuantization] == pytest.approx(0.04, abs=0.01)


def test_gradients_of_local_steps_of_different_size_count_by_their_samples(monkeypatch):
    averager = object.__new__(LeanGradientAverager)
    accumulator, gradient = torch.zeros(1), torch.zeros(1)
    vars(averager).update(
        reuse_grad_buffers=False, local_samples_accumulated=0, local_times_accumulated=0, _anchor_batch_size=None,
        _accumulators_used_in_step=False, warn=False,
        _grads_from_parameters=lambda: [gradient], _grad_accumulators=lambda: [accumulator],
    )  # fmt: skip
    for value, samples in ((1.0, 4), (2.0, 8), (5.0, 2)):
        gradient.fill_(value)
        averager.accumulate_grads_(samples)
    assert averager.local_samples_accumulated == 14
    assert float(accumulator / averager.local_times_accumulated) == pytest.approx((1 * 4 + 2 * 8 + 5 * 2) / 14)
