"""A swarm that makes local steps computes what a simulation in one process does, and goes on when rounds fail."""

import contextlib
import math
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import hivemind
import pytest
import torch
from hivemind.averaging.allreduce import AveragingMode
from hivemind.averaging.group_info import GroupInfo
from hivemind.averaging.matchmaking import MatchmakingException
from hivemind.averaging.partition import AllreduceException
from hivemind.compression import NoCompression
from hivemind.p2p import PeerID
from hivemind.utils import MSGPackSerializer

from arguments import CollaborationArguments, HFTrainerArguments, PeerArguments
from benchmarks.local_steps import simulate
from src.optim.local_steps import DIFFERENCES, GRADIENTS, NUM_SAMPLES, AnchoredLAMB, LocalWork
from src.swarm import build
from src.swarm.averagers import LeanGradientAverager, LeanStateAverager
from src.swarm.build import make_collaborative_optimizer
from src.swarm.contributions import Judge
from src.swarm.local_steps import (
    OTHER_THAN_MOST,
    AnchorAverager,
    DifferenceAverager,
    LocalStepsOptimizer,
    judge_of_differences,
    parts_of,
    read_introduction,
)
from src.swarm.matchmaking import epoch_of
from src.swarm.optimizer import LeanOptimizer
from src.swarm.patience import Patience
from src.swarm.rounds import RoundReporting
from tests.reference.node import start_node

BATCH = 4


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))


def compute(model: torch.nn.Module, worker: int, epoch: int, step: int) -> None:
    """Add the gradients of a batch that no other worker, epoch or step has."""
    generator = torch.Generator().manual_seed(1000 * worker + 100 * epoch + step)
    inputs = torch.randn(BATCH, 6, generator=generator)
    targets = torch.randn(BATCH, 3, generator=generator)
    (model(inputs) - targets).square().mean().backward()


def settings(tmp_path, **options) -> dict:
    options = {"local_batch_size": BATCH, "target_batch_size": 2**20, **options}
    return {
        "collaboration": CollaborationArguments(
            matchmaking_time=3.0,
            next_chunk_timeout=8,
            averaging_timeout=30,
            **{"delay_optimizer_step": False, "delay_grad_averaging": False, **options},
        ),
        "training": HFTrainerArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            learning_rate=0.05,
            warmup_steps=2,
            num_zero_lr_steps=0,
            total_steps=20,
        ),
    }


@pytest.fixture
def start_optimizers(tmp_path, shut_down_at_end, monkeypatch):
    """Starts trainers of one run, without rounding on the way; each with a model of its own that begins alike."""
    monkeypatch.setattr(build, "gradient_compression", lambda bits: NoCompression())
    monkeypatch.setattr(build, "parameter_compression", NoCompression)

    optimizers: list[LocalStepsOptimizer] = []

    def start(count: int, *, client_mode: bool = False, **options) -> list[LocalStepsOptimizer]:
        """``count`` more of them; returns all."""
        for _ in range(count):
            known = [optimizer.dht for optimizer in optimizers]
            node, identity = start_node("local", *known, client_mode=client_mode)
            shut_down_at_end(node)
            model = make_model()
            optimizer = make_collaborative_optimizer(
                model,
                node,
                peer=PeerArguments(run_id="local", min_vector_size=1, client_mode=client_mode),
                identity=identity,
                **settings(tmp_path, **options),
            )
            optimizer.model = model
            optimizers.append(shut_down_at_end(optimizer))
        meet(optimizers)
        return optimizers

    return start


def meet(optimizers) -> None:
    give_up_at = time.monotonic() + 20
    while any(optimizer.tracker.global_progress.num_peers < len(optimizers) for optimizer in optimizers):
        assert time.monotonic() < give_up_at, "the trainers do not find each other"
        for optimizer in optimizers:
            optimizer.tracker.announce()
        time.sleep(0.1)


def train_epoch(optimizers, num_steps, epoch: int) -> None:
    """As many steps as each has to make, if any, then all of them end the epoch together."""

    def train(number: int) -> None:
        optimizer = optimizers[number]
        for step in range(num_steps[number]):
            compute(optimizer.model, number, epoch, step)
            optimizer.step(batch_size=BATCH)
            assert optimizer.local_epoch == epoch, "no epoch ends by itself"
        optimizer._update_global_epoch(None)

    threads = [threading.Thread(target=train, args=(number,)) for number in range(len(optimizers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [optimizer.local_epoch for optimizer in optimizers] == [epoch + 1] * len(optimizers)


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().reshape(-1).clone() for tensor in tensors])


@pytest.mark.parametrize(
    ("num_steps", "options"),
    [
        ([3, 1], {"outer_momentum": 0.9, "local_steps_after": 2}),
        pytest.param([3, 3], {"average_state_every": 2}, marks=pytest.mark.slow),
        pytest.param([2], {}, marks=pytest.mark.slow),
    ],
    ids=["of unequal speed, after synchronous epochs", "two trainers", "alone"],
)
def test_swarm_in_lockstep_equals_the_simulation(tmp_path, start_optimizers, num_steps, options):
    epochs = 4
    optimizers, common = start_optimizers(len(num_steps), **options), make_model()
    for parameter in common.parameters():
        parameter.grad = torch.zeros_like(parameter)
    expected = []
    simulate(
        common,
        compute,
        training=settings(tmp_path)["training"],
        num_steps=lambda epoch: num_steps,
        num_workers=len(num_steps),
        epochs=epochs,
        outer_momentum=options.get("outer_momentum", 0.5),
        synchronous_epochs=options.get("local_steps_after", 0),
        after_epoch=lambda epoch: expected.append(flat(common.parameters())),
    )
    assert float((expected[-1] - expected[0]).abs().max()) > 0.02
    for epoch in range(epochs):
        train_epoch(optimizers, num_steps, epoch)
        ended = [optimizer.finished_rounds() for optimizer in optimizers]
        assert all(one.complete for rounds in ended for one in rounds), (epoch, ended)
        for optimizer in optimizers:
            torch.testing.assert_close(flat(optimizer.model.parameters()), expected[epoch], rtol=0, atol=1e-5)
    assert optimizers[0].grad_averager.prefix == "local_local_grad_averager", "whom the other mode does not find"
    assert optimizers[0].state_averager.prefix == "local_local_state_averager"
    local_epochs = epochs - options.get("local_steps_after", 0)
    assert [optimizer.inner_steps for optimizer in optimizers] == [steps * local_epochs for steps in num_steps]


@pytest.mark.parametrize("kind", [AnchorAverager, DifferenceAverager])
def test_averagers_call_the_names_that_they_answer_to_whatever_else_the_process_has_used(kind):
    for one in (*kind.__mro__[1:2], kind):
        one._collect_rpc_handlers()
    assert kind._stub_type.__name__ == f"{kind.__name__}Stub" != kind.__mro__[1]._stub_type.__name__


def assert_in_step(optimizers) -> None:
    for optimizer in optimizers:
        anchor = flat(optimizer._anchor())
        assert torch.equal(flat(optimizer.state_averager.main_parameters), anchor)
        torch.testing.assert_close(anchor, flat(optimizers[0]._anchor()), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_newcomer_gets_both_optimizers_states_and_averages_in_its_first_epoch(start_optimizers):
    """As a client, which others cannot call."""
    train_epoch(optimizers := start_optimizers(2), [2, 2], 0)
    train_epoch(optimizers, [2, 2], 1)
    newcomer = start_optimizers(1, client_mode=True)[-1]
    newcomer.load_state_from_peers()
    assert newcomer.local_epoch == 2
    assert_in_step(optimizers)
    own, of_donor = (one.state_averager.optimizer.state_dict()["state"] for one in (newcomer, optimizers[0]))
    for number, statistics in own.items():
        torch.testing.assert_close(statistics["momentum"], of_donor[number]["momentum"])
        assert all(float(statistics[name].norm()) > 0 for name in ("momentum", "state1", "state2"))
    train_epoch(optimizers, [2, 1, 3], 2)
    assert_in_step(optimizers)
    for optimizer in optimizers:
        assert [one.num_peers for one in optimizer.finished_rounds()][-1] == 3


@pytest.mark.slow
def test_epochs_without_a_round_change_nothing_and_what_was_learned_in_them_is_averaged_in_the_next(start_optimizers):
    optimizers = start_optimizers(2)
    train_epoch(optimizers, [2, 2], 0)
    before = flat(optimizers[0]._anchor())
    for number in (0, 1):  # one after the other, so that neither finds the other
        train_epoch([optimizers[number]], [2], 1)
        optimizers[number].tracker.announce()
    for optimizer in optimizers:
        torch.testing.assert_close(flat(optimizer._anchor()), before)
        learned = flat(optimizer.state_averager.main_parameters) - before
        assert float(learned.norm()) > 0.01 and optimizer.work.weight == 2 * BATCH
        assert optimizer.finished_rounds()[-1].error
    train_epoch(optimizers, [2, 2], 2)
    assert_in_step(optimizers)
    assert float((flat(optimizers[0]._anchor()) - before).norm()) > 0.01
    assert [optimizer.work.weight for optimizer in optimizers] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("poison", [math.nan, 1e6])
def test_poisoned_difference_is_left_out_of_the_average(tmp_path, start_optimizers, monkeypatch, poison):
    start_optimizers(2)
    optimizers, common = start_optimizers(1, client_mode=True), make_model()  # a liar that averages no part itself
    for parameter in common.parameters():
        parameter.grad = torch.zeros_like(parameter)
    liar = optimizers[-1].work
    monkeypatch.setattr(liar, "hand_over", lambda differences: [one.fill_(poison) for one in differences])
    simulate(
        common,
        compute,
        training=settings(tmp_path)["training"],
        num_steps=lambda epoch: [3, 3],
        num_workers=2,
        epochs=2,
    )
    for epoch in range(2):  # also in the first, in which the learning rate is zero
        train_epoch(optimizers, [3, 3, 3], epoch)
        rounds = [one for optimizer in optimizers[:2] for one in optimizer.finished_rounds()]
        assert {one.num_peers for one in rounds} == {3} and any(one.num_refused for one in rounds)
    for optimizer in optimizers[:2]:
        torch.testing.assert_close(flat(optimizer.model.parameters()), flat(common.parameters()), rtol=0, atol=1e-5)


# -- whom a difference is averaged with -------------------------------------------------------------------------------


def introduction(
    anchor: torch.Tensor | None, distance: float = 0.1, *, epoch: int = 7, mode=AveragingMode.NODE
) -> bytes:
    """What a member of a group says of itself."""
    said = epoch if anchor is None else [epoch, anchor.numpy().tobytes(), distance, 8, False]
    said = None if mode == AveragingMode.AUX else said
    return MSGPackSerializer.dumps([None, mode.value, MSGPackSerializer.dumps(said)])


ANCHOR = torch.randn(NUM_SAMPLES, generator=torch.Generator().manual_seed(0))
ROUNDED = ANCHOR.half().float()  # as after a round of parameters
OLD = ANCHOR + 0.1 * torch.randn(NUM_SAMPLES, generator=torch.Generator().manual_seed(1))  # before a step


def peer_ids(names: str) -> list[PeerID]:
    return [PeerID(name.encode()) for name in names]


@pytest.mark.parametrize(
    ("anchors", "distances", "parts"),
    [
        ({"a": ANCHOR, "b": ROUNDED, "c": ANCHOR}, (0.1, 0.1, 0.1), ["abc"]),
        ({"a": OLD, "b": ROUNDED, "c": ANCHOR}, (0.1, 0.1, 0.1), ["bc", "a"]),
        ({"a": ANCHOR, "b": OLD}, (0.1, 0.1), ["a", "b"]),  # of equal parts all must see the same one first
        ({"a": ANCHOR, "b": OLD, "c": OLD}, (4.0, 4.0, 4.0), ["abc"]),  # one that has moved far: it does not matter
        ({"a": ANCHOR, "b": OLD, "c": OLD}, (1e9, 0.1, 0.1), ["bc", "a"]),  # one liar moves no limit
        ({"a": ANCHOR, "b": ROUNDED}, (0.0, 0.0), ["ab"]),  # at a learning rate of zero
        ({"a": None, "b": ANCHOR, "c": None}, (0.1, 0.1, 0.1), ["ac", "b"]),  # some still average gradients
    ],
)
def test_group_falls_apart_by_anchors(anchors, distances, parts):
    trainers = {
        PeerID(name.encode()): read_introduction(introduction(anchor, distance))
        for (name, anchor), distance in zip(anchors.items(), distances, strict=True)
    }
    assert parts_of(trainers) == [set(peer_ids(part)) for part in parts]
    assert parts_of(dict(reversed(trainers.items()))) == parts_of(trainers), "all members must see it alike"


@pytest.mark.parametrize(
    "said",
    [
        None,
        7,
        [7],
        [7, ANCHOR.numpy().tobytes(), 0.1],
        [7, b"", 0.1, 8, False],
        [7, b"123", 0.1, 8, False],
        [7, ANCHOR[:5].numpy().tobytes(), 0.1, 8, False],
        [7, ANCHOR.numpy().tobytes(), "far", 8, False],
        [7, ANCHOR.numpy().tobytes(), math.nan, 8, False],
        [7, ANCHOR.numpy().tobytes(), 0.1, -1, False],
        [7, ANCHOR.numpy().tobytes(), 0.1, math.inf, False],
        [7, torch.full((NUM_SAMPLES,), math.inf).numpy().tobytes(), 0.1, 8, False],
        {"epoch": 7},
    ],
)
def test_introduction_that_makes_no_sense_is_that_of_no_anchor(said):
    gathered = MSGPackSerializer.dumps([None, AveragingMode.NODE.value, MSGPackSerializer.dumps(said)])
    assert read_introduction(gathered) is None
    assert read_introduction(b"\x00nonsense") is None


def bare_averager() -> DifferenceAverager:
    """One without a process of its own."""
    averager = DifferenceAverager.__new__(DifferenceAverager)
    averager._parent_pid, averager._anchors, averager.remarks = None, SimpleNamespace(value=0), []
    averager._remark = averager.remarks.append
    return averager


@pytest.mark.parametrize(
    ("own", "kept", "apart"),
    [("a", "abx", False), ("b", "abx", False), ("c", "cd", True), ("d", "cd", True), ("x", "abx", False)],
)
def test_each_part_of_a_group_averages_by_itself_and_the_smaller_one_knows_that_it_is_apart(
    monkeypatch, own, kept, apart
):
    monkeypatch.setattr(DifferenceAverager, "peer_id", PeerID(own.encode()), raising=False)
    said = {"a": introduction(ANCHOR), "c": introduction(OLD), "b": introduction(ROUNDED), "d": introduction(OLD),
            "x": introduction(None, mode=AveragingMode.AUX)}  # fmt: skip
    averager = bare_averager()
    group = averager._of_one_anchor(GroupInfo(b"group", tuple(peer_ids("".join(said))), tuple(said.values())))
    assert sorted(group.peer_ids, key=str) == sorted(peer_ids(kept), key=str) and averager.has_other_anchor is apart
    assert len(averager.remarks) == 2


def test_who_is_alone_with_its_anchor_does_not_look_for_the_same_group_again(monkeypatch):
    monkeypatch.setattr(DifferenceAverager, "peer_id", PeerID(b"c"), raising=False)
    averager = bare_averager()
    said = {"a": introduction(ANCHOR), "b": introduction(ANCHOR), "c": introduction(OLD)}
    with pytest.raises(MatchmakingException, match="other parameters"):
        averager._of_one_anchor(GroupInfo(b"group", tuple(peer_ids("abc")), tuple(said.values())))
    assert averager.has_other_anchor
    assert "other parameters" in averager._why_to_give_up(None, 0.0)
    monkeypatch.setattr(RoundReporting, "_why_to_give_up", lambda self, step, seconds: "")
    assert averager._why_to_give_up(None, 0.0) == "", "the next search is another one"
    averager.forget_group()
    assert not averager.has_other_anchor


def test_epoch_of_an_introduction_is_read_by_whoever_leads():
    assert epoch_of(introduction(ANCHOR, epoch=9)) == epoch_of(introduction(None, epoch=9)) == 9


# -- how large a difference may be ------------------------------------------------------------------------------------


def judged(own: float, own_weight: float, other: float, other_weight: float, **options) -> dict:
    """What a reducer with some norm and weight of its own says of another one's part."""
    judge, shape = Judge(max_weight=1000, **options), torch.Size([4])
    contributions = {0: (torch.full(shape, own / 2), own_weight), 1: (torch.full(shape, other / 2), other_weight)}
    return judge.combine(0, contributions, shape=shape, own=0, harmless=0.0)[1]


def test_difference_of_many_steps_may_be_as_much_larger():
    """A slow trainer has made one step while a fast one has made thirty, all of one size."""
    assert judged(1.0, 10, 30.0, 300)
    assert not judged(1.0, 10, 30.0, 300, grows_with_weight=True)
    assert judged(1.0, 10, 30.0, 20, grows_with_weight=True), "two steps cannot have led so far"
    judge = Judge(max_weight=1000, grows_with_weight=True)
    judge.own_weight, judge.weight_of_average, own = 10.0, 300.0, torch.full((4,), 0.5)
    judge.parts[0].remember(1.0)
    judge.check_average(0, own, 30 * own, harmless=0.0)
    with pytest.raises(AllreduceException, match="where"):
        judge.check_average(0, own, 301 * own, harmless=0.0)


def test_where_nothing_is_learned_nobody_else_has_learned_anything():
    """With a learning rate of zero there is no difference to compare with, and none that could be honest."""
    judge = judge_of_differences(1000)
    judge.own_weight, shape = 8.0, torch.Size([100])
    room = judge.room_for_whole(0.0)
    given = {0: (torch.zeros(shape), 8.0), 1: (torch.full(shape, 1e-5), 8.0), 2: (torch.full(shape, 0.1), 8.0)}
    average, refused = judge.combine(0, given, shape=shape, own=0, harmless=0.0, small=room)
    assert list(refused) == [2] and float(average[0]) == pytest.approx(5e-6)
    judge.check_average(0, torch.zeros(shape), torch.full(shape, 1e-5), harmless=0.0, small=room)
    with pytest.raises(AllreduceException, match="where"):
        judge.check_average(0, torch.zeros(shape), torch.full(shape, 0.1), harmless=0.0, small=room)
    assert Judge(max_weight=1000).room_for_whole(0.0) == math.inf, "a gradient of zero says nothing of others'"


def test_claim_of_many_samples_gives_no_more_room_than_those_of_the_others():
    judge, shape = Judge(max_weight=10**6, grows_with_weight=True), torch.Size([4])
    part = torch.full(shape, 0.5)
    given = {0: (part, 10), 1: (part, 12), 2: (60 * part, 10**6)}
    assert list(judge.combine(0, given, shape=shape, own=0, harmless=0.0)[1]) == [2]


# -- ends of epochs ---------------------------------------------------------------------------------------------------


class OneProcess:
    """What a `LocalStepsOptimizer` needs of hivemind, without processes."""

    def __init__(self, *, local_steps_after: int = 0, epoch: int = 3):
        self.anchor = [torch.ones(3)]
        self.parameter = torch.nn.Parameter(torch.ones(3))
        self.parameter.grad = torch.zeros(3)
        self.lamb = AnchoredLAMB(self.anchor, lr=0.1, outer_learning_rate=1.0, outer_momentum=0.0)
        self.optimizer = optimizer = LocalStepsOptimizer.__new__(LocalStepsOptimizer)
        optimizer._parent_pid, optimizer.auxiliary, optimizer.local_steps_after = None, False, local_steps_after
        optimizer.local_batch_size, optimizer.delay_optimizer_step, optimizer._samples_of_epoch = 8, True, 0
        optimizer._may_load_from, optimizer._usual_state_every, optimizer.average_state_every = 0, 5, 5
        optimizer.target_batch_size = 100
        optimizer.offload_optimizer, optimizer.before_epoch_ends = True, lambda: None
        self.reported = []
        optimizer.tracker = SimpleNamespace(
            global_epoch=epoch, report_local_progress=lambda epoch, samples: self.reported.append((epoch, samples))
        )
        optimizer.state_averager = SimpleNamespace(
            local_epoch=epoch, pending_updates=set(), optimizer=self.lamb, main_parameters=[self.parameter],
            lock_optimizer=threading.Lock(), step=lambda **options: None,
        )  # fmt: skip
        averager = optimizer.grad_averager = DifferenceAverager.__new__(DifferenceAverager)
        averager._parent_pid = None  # hivemind's __del__ leaves it alone
        averager.parameters, averager._local_accumulators, averager.reuse_grad_buffers = [self.parameter], None, True
        averager._anchors, averager.warn, averager.patience = SimpleNamespace(value=0), True, Patience()
        averager._new_averaged_grads = False
        averager.reset_accumulated_grads_()
        averager.get_tensors = lambda: contextlib.nullcontext([self.average])
        optimizer.work = averager.work = LocalWork([self.parameter], self.anchor)
        self.average, self.ended = torch.zeros(3), []

    def end_epochs(self, monkeypatch) -> None:
        """In place of what hivemind does at an epoch's end."""

        def end(optimizer, grad_scaler) -> None:
            self.ended.append((optimizer.local_epoch, self.lamb.contents, optimizer.average_state_every))
            optimizer.grad_averager.load_accumulators_into_averager_()
            optimizer.grad_averager.reset_accumulated_grads_()
            optimizer.state_averager.local_epoch += 1

        monkeypatch.setattr(hivemind.Optimizer, "_update_global_epoch", end)


def test_local_step_is_made_when_its_samples_are_there_and_one_that_has_begun_goes_on_in_the_next_epoch(monkeypatch):
    one = OneProcess()
    one.end_epochs(monkeypatch)
    for _ in range(3):
        one.parameter.grad += 1.0
        one.optimizer._check_and_accumulate_gradients(4, None)
    assert one.optimizer.inner_steps == 1 and one.optimizer.work.weight == 8
    assert one.reported == [(3, 4), (3, 8), (3, 12)]
    assert bool((one.parameter < 1.0).all()) and torch.equal(one.parameter.grad, torch.ones(3))
    one.optimizer._update_global_epoch(None)
    assert one.optimizer.work.weight == 0 and torch.equal(one.average, 1.0 - one.parameter)
    assert torch.equal(one.parameter.grad, torch.ones(3)), "half a local step"
    one.parameter.grad += 1.0
    one.optimizer._check_and_accumulate_gradients(4, None)
    assert one.optimizer.inner_steps == 2 and one.optimizer.work.weight == 8
    assert one.reported[-1] == (4, 4), "the other four were of the epoch before"


def test_epoch_does_not_end_while_a_round_is_under_way(monkeypatch):
    one, update = OneProcess(), Future()
    one.end_epochs(monkeypatch)
    one.optimizer.state_averager.pending_updates = {update}
    one.optimizer._update_global_epoch(None)
    assert one.ended == []
    one.parameter.grad += 1.0
    one.optimizer._check_and_accumulate_gradients(8, None)
    assert one.optimizer.inner_steps == 1, "steps go on"
    update.set_result(None)
    one.optimizer._update_global_epoch(None)
    assert one.ended == [(3, DIFFERENCES, 5)]


def test_parameters_are_averaged_before_the_first_local_steps(monkeypatch):
    one = OneProcess(local_steps_after=4, epoch=2)
    one.end_epochs(monkeypatch)
    for _ in range(3):
        one.parameter.grad += 1.0
        one.optimizer._check_and_accumulate_gradients(8, None)
        one.optimizer._update_global_epoch(None)
    assert one.ended == [(2, GRADIENTS, 5), (3, GRADIENTS, 1), (4, DIFFERENCES, 5)]
    assert one.optimizer.inner_steps == 1
    assert [averages_differences_of(one, epoch) for epoch in (3, 4)] == [False, True]


def averages_differences_of(one: OneProcess, epoch: int) -> bool:
    one.optimizer.state_averager.local_epoch = epoch
    return one.optimizer.makes_local_steps


@pytest.mark.parametrize("received", [0.0, 0.5, 1.0])
def test_what_a_round_brought_decides_what_is_stepped(monkeypatch, received):
    one = OneProcess()
    one.end_epochs(monkeypatch)
    one.parameter.grad += 1.0
    one.optimizer._check_and_accumulate_gradients(8, None)
    one.optimizer._update_global_epoch(None)
    own = one.average.clone()
    one.average[0] = 0.5  # the others have not come, if the round was partial
    one.anchor[0].grad = one.average
    one.optimizer._take_averages(received)
    one.lamb.step()
    one.optimizer.work.follow()
    stepped = {0.0: torch.zeros(3), 0.5: torch.tensor([0.5, 0.0, 0.0]), 1.0: torch.tensor([0.5, own[1], own[2]])}
    torch.testing.assert_close(one.anchor[0], 1.0 - stepped[received])
    kept = {0.0: own, 0.5: torch.tensor([0.0, own[1], own[2]]), 1.0: torch.zeros(3)}
    torch.testing.assert_close(one.parameter.data, one.anchor[0] - kept[received])
    assert one.optimizer.work.weight == (8 if received == 0.0 else 0)


@pytest.mark.parametrize(
    ("epochs", "speed", "downloads", "pause"),
    [
        ((4, 5), 1.0, 2, 2),
        ((5,), 1.0, 1, 2),
        ((4, 4, 4, 4), 1.0, 3, 2),
        ((4, 4), 1e12, 1, 6),  # it takes more than an epoch: there must be a round of parameters before the next
    ],
)
def test_state_that_is_old_when_it_has_come_is_taken_once_more_but_not_for_ever(
    monkeypatch, epochs, speed, downloads, pause
):
    one, coming, taken = OneProcess(epoch=3), iter(epochs), []
    one.optimizer.tracker.global_epoch, one.optimizer.tracker.samples_per_second = 5, speed
    one.optimizer._should_check_synchronization_on_update = False

    def load(optimizer) -> None:
        optimizer.state_averager.state_epoch, optimizer.state_averager.has_taken_state = next(coming), True
        taken.append(optimizer.state_averager.state_epoch)
        optimizer.state_averager.local_epoch = 5

    monkeypatch.setattr(LeanOptimizer, "load_state_from_peers", load)
    one.optimizer.grad_averager._anchors.value = OTHER_THAN_MOST
    one.optimizer.load_state_from_peers()
    assert len(taken) == downloads and not one.optimizer.grad_averager.has_other_anchor
    one.optimizer.grad_averager._anchors.value = OTHER_THAN_MOST  # it has not helped
    loads = []
    for epoch in range(5, 5 + pause + 2):
        one.optimizer.state_averager.local_epoch = one.optimizer.tracker.global_epoch = epoch
        loads.append(one.optimizer._should_load_state_from_peers())
    assert loads == [False] * pause + [True] * 2


def test_bad_gradients_cost_the_local_step_that_they_are_in():
    one = OneProcess()
    for samples in (8, 4):
        one.parameter.grad += 1.0
        one.optimizer._check_and_accumulate_gradients(samples, None)
    assert one.optimizer.discard_gradients() == 4
    assert one.reported[-1] == (3, 8) and one.optimizer.work.weight == 8
    assert not one.parameter.grad.any()


@pytest.mark.parametrize(("spoilt", "weight"), [(False, 16), (True, 0)])
def test_difference_weighs_as_much_as_its_samples_and_nothing_where_there_is_none(monkeypatch, spoilt, weight):
    one, given = OneProcess(), []
    averager, one.optimizer.work.samples = one.optimizer.grad_averager, 30
    averager.averages_differences, averager._target_batch_size = True, 16  # more than an epoch has: of failed rounds
    if spoilt:
        one.parameter.data[0] = math.nan
    monkeypatch.setattr(LeanGradientAverager, "step", lambda self, weight, **options: given.append((weight, options)))
    averager.step(reset_accumulators=True, wait=False)
    assert given == [(weight, {"reset_accumulators": False, "wait": False})]
    epoch, samples, *rest = averager.introduction()
    assert (epoch, len(samples), rest) == (0, 4 * NUM_SAMPLES, [0.0, weight, False])


def test_state_is_labelled_with_the_epoch_of_its_anchor(monkeypatch):
    averager = AnchorAverager.__new__(AnchorAverager)
    averager._parent_pid = None
    averager.scheduler = SimpleNamespace(_step_count=5)
    monkeypatch.setattr(LeanStateAverager, "get_current_state", lambda self: ({"epoch": 5}, [], []))
    assert averager.get_current_state()[0]["epoch"] == 4, "the round of epoch 4 is under way"
