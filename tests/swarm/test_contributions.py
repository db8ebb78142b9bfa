"""One member who sends rubbish harms nobody and is named; ordinary differences between peers pass."""

import asyncio
import contextlib
import logging
import math
import multiprocessing
import time
import weakref
from types import SimpleNamespace

import bitsandbytes.functional  # noqa: F401, takes seconds: before averagers fork, as in a trainer
import hivemind
import pytest
import torch
from hivemind.averaging import DecentralizedAverager
from hivemind.averaging.allreduce import AllReduceRunner
from hivemind.averaging.partition import AllreduceException, BannedException
from hivemind.compression import (
    BlockwiseQuantization,
    CompressionInfo,
    Float16Compression,
    NoCompression,
    deserialize_torch_tensor,
    serialize_torch_tensor,
)
from hivemind.p2p import PeerID
from hivemind.proto import averaging_pb2
from hivemind.utils.asyncio import as_aiter

from src.swarm.allreduce import CheckedContainer, JudgingAllReduce, JudgingReducer, Schedule
from src.swarm.averagers import LeanStateAverager, OwnProcess
from src.swarm.compression import FourBitQuantization
from src.swarm.contributions import FIRST_WHOLE_RATIO, MAX_WHOLE_RATIO, Judge
from src.swarm.rounds import RoundReporting
from src.swarm.wire import check_wire_tensor, checked_messages, objection_message

SIZE = 400
SHAPE = torch.Size([SIZE])


def like(value: float, seed: int = 0) -> torch.Tensor:
    """Values of root mean square ``value``."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * value


def combine(judge: Judge, *contributions, own: int | None = 0, own_rms: float = 1.0, part: int = 0):
    numbered = {index: pair if isinstance(pair, tuple) else (pair, 1.0) for index, pair in enumerate(contributions)}
    return judge.combine(part, numbered, shape=SHAPE, own=own, harmless=own_rms * math.sqrt(SIZE))


BAD = {
    "NaN": torch.where(torch.arange(SIZE) == 7, math.nan, like(1.0)),
    "infinite": torch.where(torch.arange(SIZE) == 7, math.inf, like(1.0)),
    "a thousand times the usual": like(1000.0),
    "beyond float32": torch.full(SHAPE, 1e30),
    "of another shape": torch.ones(1),
    "weighted -1": (like(1.0), -1.0),
    "weighted 1e12": (like(1.0), 1e12),
    "weighted NaN": (like(1.0), math.nan),
    "weighted infinity": (like(1.0), math.inf),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("own", [0, None], ids=["trainer", "auxiliary"])
def test_judge_leaves_out_bad_values_and_names_their_sender(kind, own):
    honest = like(1.0, 1), like(1.0, 2)
    average, refused = combine(Judge(max_weight=4.0), *honest, BAD[kind], own=own)
    torch.testing.assert_close(average, (honest[0] + honest[1]) / 2)
    assert list(refused) == [2] and refused[2], refused


class Unreadable(torch.Tensor):
    """Whatever is asked of its values fails."""

    def norm(self, *args, **kwargs):
        raise RuntimeError("no norm")


UNUSABLE = {str(dtype): torch.ones(SHAPE, dtype=dtype) for dtype in (torch.int64, torch.int32, torch.uint8, torch.bool)}
UNUSABLE["unreadable"] = torch.ones(SHAPE).as_subclass(Unreadable)


@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.parametrize("own", [0, None], ids=["trainer", "auxiliary"])
def test_what_has_no_average_is_left_out_and_the_others_have_theirs(kind, own):
    honest = like(1.0, 1), like(1.0, 2)
    average, refused = combine(Judge(max_weight=4.0), *honest, UNUSABLE[kind], own=own)
    torch.testing.assert_close(average, (honest[0] + honest[1]) / 2)
    assert list(refused) == [2] and refused[2], refused


def test_judge_takes_ordinary_differences():
    judge = Judge(max_weight=100.0)
    for other, weight in ((like(9.0, 1), 1.0), (like(0.01, 1), 50.0), (torch.zeros(SHAPE), 3.0), (like(1.0, 1), 0.0)):
        own = like(1.0)
        average, refused = combine(judge, own, (other, weight))
        assert not refused
        torch.testing.assert_close(average, (own + weight * other) / (1 + weight), rtol=1e-4, atol=1e-5)


def test_judge_allows_for_the_noise_of_few_samples_but_not_for_less():
    def refused(norm: float, weight: float):
        return combine(Judge(max_weight=400.0), (like(1.0), 400.0), (like(norm, 1), weight))[1]

    assert not refused(150.0, 1.0)  # a 20th root of the weight, and ten times
    assert refused(250.0, 1.0)
    assert refused(150.0, 100.0)


def test_judge_compares_with_all_values_where_a_part_has_none():
    """A part of rare words may be zero for this peer, not for another; up to ``harmless`` that is no question."""
    average, refused = combine(Judge(max_weight=1.0), torch.zeros(SHAPE), like(0.9), own_rms=1.0)
    assert not refused and float(average.norm()) > 0
    assert combine(Judge(max_weight=1.0), torch.zeros(SHAPE), like(2.0), own_rms=1.0)[1]


def test_judge_of_an_auxiliary_peer_remembers_what_is_usual():
    judge = Judge(max_weight=1.0)
    for seed in range(3):
        assert not combine(judge, like(1.0, seed), like(1.0, seed + 10), own=None, own_rms=0.0)[1]
    assert list(combine(judge, like(1.0), like(0.001), own=None, own_rms=0.0)[1]) == []
    newcomer = Judge(max_weight=1.0)  # cannot know which of two is right, and takes the harmless one
    assert list(combine(newcomer, like(1.0), like(0.001), own=None, own_rms=0.0)[1]) == [0]


def test_old_parameters_of_an_auxiliary_peer_say_nothing_of_others():
    judge = Judge(max_weight=1.0, harmless_rms=0.05, max_distance=0.5)
    old, trained = like(1.0, 1), (like(1.0, 2), like(1.0, 2) + like(0.01, 3))
    contributions = {0: (old, 0.0), **{1 + index: (values, 1.0) for index, values in enumerate(trained)}}
    for own in (0, 1):  # hivemind lets it take part with a weight of zero
        average, refused = judge.combine(0, contributions, shape=SHAPE, own=own, harmless=0.0)
        assert not refused
        torch.testing.assert_close(average, (trained[0] + trained[1]) / 2)
    judge.check_average(0, old, trained[0], harmless=math.inf)
    with pytest.raises(AllreduceException, match="lies"):
        judge.check_average(0, old, trained[0], harmless=0.0)


def test_part_may_be_anything_that_the_whole_of_a_contribution_justifies():
    """A part of which the own values are all zero is no reason, and many such parts are no way around the limit."""
    judge = Judge(max_weight=1.0)
    for _ in range(10):
        room = judge.room_for_whole(own_norm=6.0)
    assert room == MAX_WHOLE_RATIO * 6.0
    limits = {"shape": SHAPE, "own": 0, "harmless": 0.0, "small": room}
    refused, before = [], {}
    for part in range(1000):
        contributions = {0: (torch.zeros(SHAPE), 1.0), 1: (like(2.0, part), 1.0)}
        average, without = judge.combine(part, contributions, before=before, **limits)
        refused.append(1 in without)
        assert bool(average.any()) is not refused[-1]
    first = refused.index(True)
    assert all(refused[first:]) and first == pytest.approx((room / (2.0 * math.sqrt(SIZE))) ** 2, rel=0.1)
    assert 1 in judge.combine(0, {0: (like(0.1), 1.0), 1: (like(100.0), 1.0)}, **limits)[1], "beyond it at once"
    # the same for the averages that come back
    before, average = 0.0, like(2.0)
    for part in range(first - 20):
        before = judge.check_average(part, torch.zeros(SHAPE), average, harmless=0.0, small=room, before=before)
    with pytest.raises(AllreduceException, match="sent an average of norm"):
        for part in range(1000):
            before = judge.check_average(part, torch.zeros(SHAPE), average, harmless=0.0, small=room, before=before)


def test_usual_norm_needs_rounds_to_be_known_and_is_nobody_elses_to_move():
    judge = Judge(max_weight=1.0)
    assert judge.room_for_whole(0.0) == math.inf, "nothing is known yet"
    judge = Judge(max_weight=1.0)
    assert [judge.room_for_whole(own_norm=1.0) for _ in range(3)] == [FIRST_WHOLE_RATIO, *[MAX_WHOLE_RATIO] * 2]
    assert judge.room_for_whole(0.001) > 0.8 * MAX_WHOLE_RATIO, "one easy batch is forgotten less soon than others"
    for _ in range(200):
        judge.room_for_whole(0.001)
    assert judge.room_for_whole(0.001) == pytest.approx(0.001 * MAX_WHOLE_RATIO), "but the end of training is noticed"
    for _ in range(20):  # most of the others send ever more
        combine(judge, like(1.0), like(9.0, 1), like(9.0, 2))
    assert set(combine(judge, like(1.0), like(20.0, 1), like(20.0, 2))[1]) == {1, 2}


def test_auxiliary_peer_judges_by_the_parts_it_has_averaged_so_far():
    def combine_as_auxiliary(judge, part, *values, before=None):
        contributions = {sender: (one, 1.0) for sender, one in enumerate(values)}
        options = {"shape": SHAPE, "own": None, "harmless": 0.0, "small": math.inf, "before": before}
        return set(judge.combine(part, contributions, **options)[1])

    judge = Judge(max_weight=1.0)
    zeros = torch.zeros(SHAPE)
    assert not combine_as_auxiliary(judge, 0, zeros, like(1.0)), "it knows nothing of either yet"
    assert combine_as_auxiliary(Judge(max_weight=1.0), 0, like(1.0), like(1.0, 1), like(1e8)) == {2}
    for _ in range(6):
        assert not combine_as_auxiliary(judge, 0, zeros, like(1.0))
        assert not combine_as_auxiliary(judge, 1, zeros, zeros)
    assert not combine_as_auxiliary(judge, 1, zeros, like(1.0)), "the first labels of sentence order"
    assert combine_as_auxiliary(judge, 0, like(1.0), like(200.0)) == {1}
    for _ in range(20):  # one who sends nothing does not make the other's values look large
        assert not combine_as_auxiliary(judge, 0, zeros, like(1.0))
    assert combine_as_auxiliary(judge, 0, like(1.0), like(50.0), before={1: 10_000.0}) == {1}, "with the parts before"
    assert not combine_as_auxiliary(judge, 0, like(1.0), like(50.0), before={1: 1000.0})


def test_parts_of_parameters_are_judged_one_by_one():
    """They hardly differ between peers, so the whole justifies nothing, with own values or without."""
    judge = Judge(max_weight=1.0, harmless_rms=0.05, max_distance=0.5)
    assert judge.room_for_whole(own_norm=1000.0) == 0.0
    contributions = {sender: (values, 1.0) for sender, values in enumerate((like(1.0), like(1.0, 1), like(20.0, 2)))}
    _, refused = judge.combine(0, contributions, shape=SHAPE, own=None, harmless=0.0, small=math.inf)
    assert set(refused) == {2}


def test_judge_counts_a_weight_that_is_too_high_as_the_highest_possible():
    average, refused = combine(Judge(max_weight=4.0), (like(1.0), 4.0), (like(1.0, 1), 39.0))
    assert not refused
    torch.testing.assert_close(average, (like(1.0) + like(1.0, 1)) / 2)


@pytest.mark.parametrize(("one", "other"), [(0.0, 0.0), (0.0, 2.0)])
def test_judge_never_divides_by_zero(one, other):
    average, refused = combine(Judge(max_weight=4.0), (like(1.0), one), (like(1.0, 1), other))
    assert not refused and average.isfinite().all()


def test_judge_returns_finite_values_when_there_is_nothing_good():
    average, refused = combine(Judge(max_weight=1.0), BAD["NaN"], BAD["infinite"])
    assert set(refused) == {0, 1}
    assert average.isfinite().all() and float((average - like(1.0)).norm()) < 3  # its own values, less the NaN


PARAMETERS = {
    "a copy that is behind": (like(0.02) * 1.01, True),
    "biases after the first step": (torch.full(SHAPE, 0.002), True),
    "an eighth more": (like(0.2) * 1.125, False),
    "zeros": (torch.zeros(SHAPE), False),
    "the wrong sign": (-like(0.2), False),
    "random values of usual size": (like(0.2, 5), False),
}


@pytest.mark.parametrize("kind", PARAMETERS)
def test_parameters_far_from_the_own_are_refused(kind):
    """Checked both when they arrive and when an average comes back."""
    values, good = PARAMETERS[kind]
    own = torch.zeros(SHAPE) if "biases" in kind else like(0.02) if good else like(0.2)
    judge = Judge(max_weight=1.0, harmless_rms=0.05, max_distance=0.5)
    refused = combine(judge, own, values)[1]
    assert list(refused) == ([] if good else [1])
    with contextlib.nullcontext() if good else pytest.raises(AllreduceException, match="lies"):
        judge.check_average(0, own, values, harmless=0.02 * math.sqrt(SIZE))


@pytest.mark.parametrize(
    "average", [BAD["NaN"], BAD["infinite"], BAD["a thousand times the usual"], BAD["of another shape"]]
)
def test_average_that_comes_back_is_checked(average):
    judge = Judge(max_weight=1.0)
    judge.check_average(0, like(1.0), like(5.0, 1), harmless=math.sqrt(SIZE))
    with pytest.raises(AllreduceException, match="sent an average"):
        judge.check_average(0, like(1.0), average, harmless=math.sqrt(SIZE))


def test_peer_that_tags_along_takes_any_finite_average():
    Judge(max_weight=1.0).check_average(0, torch.zeros(SHAPE), like(5.0), harmless=math.inf)
    with pytest.raises(AllreduceException):
        Judge(max_weight=1.0).check_average(0, torch.zeros(SHAPE), BAD["NaN"], harmless=math.inf)


def test_nobody_counts_more_than_twice_the_median_of_three():
    values = like(1.0), like(1.0, 1), like(1.0, 2)
    average, _ = combine(Judge(max_weight=256.0), *zip(values, (64.0, 64.0, 256.0), strict=True))
    torch.testing.assert_close(average, (values[0] + values[1] + 2 * values[2]) / 4)
    average, _ = combine(Judge(max_weight=256.0), *zip(values, (64.0, 256.0, 0.0), strict=True))
    torch.testing.assert_close(average, (values[0] + 4 * values[1]) / 5, msg="of two, both count by their samples")


@pytest.mark.parametrize("in_steps", [0.49, 0.019, 0.005])
@pytest.mark.parametrize("way", ["reducer", "receiver"])
def test_parameters_cannot_be_led_away_step_by_step(in_steps, way):
    """By one of two, who always sends so much more than its partner has; half of that comes about."""
    judge, own = Judge(max_weight=1.0, harmless_rms=0.05, max_distance=0.2), like(0.2)
    for _ in range(50):
        theirs = own * (1 + in_steps)
        if way == "reducer":
            own = combine(judge, own, theirs, own_rms=0.0)[0]
        else:
            with contextlib.suppress(AllreduceException):
                judge.check_average(0, own, (own + theirs) / 2, harmless=0.0)
                own = (own + theirs) / 2
    assert float(own.norm() / like(0.2).norm()) < 1.3, "it was 1021 times"


def test_parameters_that_differ_as_usual_are_taken_for_ever():
    judge, own = Judge(max_weight=1.0, harmless_rms=0.05, max_distance=0.2), like(0.2)
    for seed in range(100):  # 0.5 % and now and then 1.5 %, while all of them are trained
        theirs = own + like(0.003 if seed % 10 == 5 else 0.001, seed + 1)
        average, refused = combine(judge, own, theirs, own_rms=0.0)
        assert not refused
        own = average * 1.01
        judge.check_average(1, own, own + like(0.001, seed + 200), harmless=0.0)


def test_peers_that_have_gone_their_own_ways_are_not_apart_for_ever():
    """Without common rounds of gradients, each is trained alone for a while."""
    judge, own = Judge(max_weight=1.0, harmless_rms=0.05, max_distance=0.2), like(0.2)
    assert not combine(judge, own, own + like(0.0002, 1), own_rms=0.0)[1]
    mine, theirs = own + like(0.01, 2), own + like(0.01, 3)
    average, refused = combine(judge, mine, theirs, own_rms=0.0)
    assert not refused
    assert combine(judge, average, average + like(0.014, 4), own_rms=0.0)[1], "nothing has moved since"


@pytest.mark.parametrize("way", ["reducer", "receiver"])
def test_two_colluders_of_three_are_bounded_in_the_first_round_as_well(way):
    """By what this peer has itself: nothing else is known to it yet."""
    judge, own = Judge(max_weight=256.0), like(1.0)
    room = judge.room_for_whole(float(own.norm()))
    for factor, passes in ((400.0, True), (600.0, False), (1e9, False)):
        lies = -factor * own
        if way == "reducer":
            contributions = {0: (own, 64.0), 1: (lies, 64.0), 2: (lies, 64.0)}
            refused = judge.combine(0, contributions, shape=SHAPE, own=0, harmless=0.0, small=room)[1]
            assert set(refused) == (set() if passes else {1, 2})
        else:
            with contextlib.nullcontext() if passes else pytest.raises(AllreduceException):
                judge.check_average(0, own, lies, harmless=0.0, small=room)


@pytest.mark.parametrize("num_liars", [1, 2])
def test_what_an_auxiliary_peer_lets_pass_in_its_first_round_is_refused_by_those_who_get_it(num_liars):
    """It has nothing to compare with, and lets nearly everything pass; trainers have values of their own."""
    own, most_that_passes = like(1.0), 0.0
    for factor in (1.0, 100.0, 400.0, 1400.0, 1e4, 1e5, 1e9):
        auxiliary, trainer = Judge(max_weight=256.0), Judge(max_weight=256.0)
        lies = {2 + liar: (-factor * own, 64.0) for liar in range(num_liars)}
        contributions = {0: (own, 64.0), 1: (like(1.0, 1), 64.0), **lies}
        average, _ = auxiliary.combine(0, contributions, shape=SHAPE, own=None, harmless=0.0, small=math.inf)
        room = trainer.room_for_whole(float(own.norm()))
        with contextlib.suppress(AllreduceException):
            trainer.check_average(0, own, average, harmless=0.0, small=room)
            most_that_passes = max(most_that_passes, float(average.norm() / own.norm()))
    assert 100.0 < most_that_passes < 500.0


# -- the reducer ------------------------------------------------------------------------------------------------------


def total(part_index, contributions):
    return sum(values * weight for values, weight in contributions.values())


def test_reducer_waits_for_all_senders_and_for_failed_ones_no_longer():
    async def scenario():
        reducer = JudgingReducer(2, 3, total)
        first = [asyncio.create_task(reducer.accumulate_part(i, 0, torch.ones(2), 1.0 + i)) for i in range(2)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not any(task.done() for task in first)
        reducer.on_sender_failed(2)
        assert [task.tolist() for task in await asyncio.gather(*first)] == [[3.0, 3.0]] * 2
        with pytest.raises(BannedException):
            await reducer.accumulate_part(2, 0, torch.ones(2))
        assert not reducer.finished.is_set()
        await asyncio.gather(*(reducer.accumulate_part(i, 1, torch.ones(2)) for i in range(2)))
        assert reducer.finished.is_set()
        with pytest.raises(AllreduceException, match="part 3 of 2"):
            await reducer.accumulate_part(0, 2, torch.ones(2))

    asyncio.run(scenario())


def test_reducer_keeps_no_average_that_all_have():
    async def scenario():
        reducer, kept = JudgingReducer(2, 2, total), []
        for part_index in range(2):
            tasks = [asyncio.create_task(reducer.accumulate_part(i, part_index, torch.ones(2))) for i in range(2)]
            averages = await asyncio.gather(*tasks)
            assert [average.tolist() for average in averages] == [[2.0, 2.0]] * 2
            kept.append(weakref.ref(averages[0]))
            del averages, tasks
        with pytest.raises(AllreduceException, match=r"after the end|once more"):
            await reducer.accumulate_part(1, 0, torch.ones(2))
        await asyncio.sleep(0.01)
        return [one() for one in kept]

    assert asyncio.run(scenario()) == [None, None]


def test_round_holds_no_second_copy_of_what_it_averages():
    """Averages replace the own values as they come, whatever tensor they belong to, and are not kept."""

    async def scenario():
        tensors, kept = [torch.zeros(50), torch.ones(100)], []
        container = CheckedContainer(tensors, (0.5, 0.5), part_size_bytes=100)
        for peer_index in (1, 0):
            for part_index, (own, _) in enumerate(list(container._input_parts_by_peer[peer_index])):
                average = torch.full_like(own, 2.0) if peer_index else own + 2.0
                kept.append(weakref.ref(average))
                container.register_processed_part(peer_index, part_index, average)
                del average
        assert [one() for one in kept] == [None] * len(kept)
        async for _ in container.iterate_output_tensors():
            pass
        return tensors

    zeros, ones = asyncio.run(scenario())
    assert set(torch.cat([zeros, ones]).tolist()) == {2.0, 3.0}
    assert zeros.tolist() == [2.0] * 50 and ones.tolist() == [3.0] * 25 + [2.0] * 75


def test_reducer_serves_the_others_when_one_that_waits_hangs_up():
    async def scenario():
        reducer = JudgingReducer(1, 2, total)
        impatient = asyncio.create_task(reducer.accumulate_part(0, 0, torch.ones(2)))
        await asyncio.sleep(0.01)
        impatient.cancel()
        await asyncio.sleep(0.01)
        return await asyncio.wait_for(reducer.accumulate_part(1, 0, torch.ones(2)), 5)

    assert asyncio.run(scenario()).tolist() == [2.0, 2.0]


def test_reducer_tells_those_who_wait_that_the_round_has_ended():
    async def scenario():
        reducer = JudgingReducer(1, 2, total)
        waiting = asyncio.create_task(reducer.accumulate_part(0, 0, torch.ones(2)))
        await asyncio.sleep(0.01)
        reducer.finalize()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(scenario())


def test_reducer_leaves_nobody_waiting_when_values_cannot_be_combined():
    def fails_once(part_index, contributions):
        if part_index == 0:
            raise RuntimeError("of whatever kind")
        return torch.zeros(2)

    async def scenario():
        reducer = JudgingReducer(2, 2, fails_once)
        waiting = [asyncio.create_task(reducer.accumulate_part(i, 0, torch.ones(2))) for i in range(2)]
        outcomes = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 5)
        assert [type(outcome) for outcome in outcomes] == [AllreduceException] * 2
        await asyncio.wait_for(asyncio.gather(*(reducer.accumulate_part(i, 1, torch.ones(2)) for i in range(2))), 5)
        assert reducer.finished.is_set()

    asyncio.run(scenario())


def test_time_of_a_round_follows_from_its_bytes_and_its_slowest_member():
    megabytes = 10**6
    assert Schedule(60.0, (None, 100.0, 10.0)).seconds(50 * megabytes) == 60 + 2 * 400 / 10
    assert Schedule(60.0, (100.0, 0.01)).seconds(50 * megabytes) == 60 + 2 * 400 / 2, "nobody has less than 2 Mbit/s"
    assert Schedule(60.0, (None, None)).seconds(50 * megabytes) == 60 + 2 * 400 / 50
    assert Schedule(60.0, (100.0, 0.01), longest=200.0).seconds(50 * megabytes) == 190.0, "before it is broken off"
    schedule = Schedule(60.0, (100.0, 10.0, None))
    assert schedule.sender_seconds(50 * megabytes, 0, 2) == 45 + 2 * 400 / 50
    assert (
        schedule.sender_seconds(50 * megabytes, 1, 2)
        == 45 + 2 * 400 / 10
        == schedule.sender_seconds(50 * megabytes, 0, 1)
    ), "the slower of both sides counts"


class Partners:
    """A round of two without a network: the runner of one, and calls of the other."""

    own, other = PeerID(b"own"), PeerID(b"other")

    def __init__(self, size: int = 30, **timeouts):
        self.runner = JudgingAllReduce(
            judge=Judge(max_weight=1.0),
            p2p=SimpleNamespace(peer_id=self.own),
            servicer_type=JudgingAllReduce,
            prefix=None,
            group_id=b"group",
            tensors=[torch.ones(size)],
            ordered_peer_ids=(self.own, self.other),
            peer_fractions=(0.5, 0.5),
            **{"part_size_bytes": 40, **timeouts},
        )

    def call(self, num_parts: int, last=None, *, size: int = 10, pause: float = 0.0):
        """The answers to a call that sends parts and then stays open, or ends with another message."""

        async def messages():
            for index in range(num_parts):
                await asyncio.sleep(pause)
                yield averaging_pb2.AveragingData(
                    code=averaging_pb2.NO_CODE if index else averaging_pb2.PART_FOR_AVERAGING,
                    group_id=b"" if index else b"group",
                    tensor_part=serialize_torch_tensor(torch.full((size,), 3.0)),
                    weight=1.0,
                )
            if last is None:
                await asyncio.Event().wait()
            yield last

        return self.runner.rpc_aggregate_part(messages(), SimpleNamespace(remote_id=self.other))


def test_partner_that_takes_no_averages_is_left_out_in_time(caplog):
    """Nothing else ends its call: who cannot send does not notice that nothing comes, either."""

    async def scenario():
        partners = Partners(size=50, sender_timeout=0.2)
        runner = partners.runner
        own = [asyncio.create_task(runner.tensor_part_reducer.accumulate_part(0, i, torch.ones(10))) for i in range(3)]
        answers = partners.call(1)
        await anext(answers)
        began = time.monotonic()
        await asyncio.wait_for(asyncio.gather(*own), 5)  # while the next answer is not asked for
        return time.monotonic() - began, runner

    with caplog.at_level(logging.DEBUG, logger="hivemind.averaging.allreduce"):
        seconds, runner = asyncio.run(scenario())
    assert seconds > 0.1 and runner.banned_senders == {Partners.other}
    assert "does not read what it is sent" in caplog.text and str(Partners.other) in caplog.text
    assert runner.missing_peers() == [Partners.other], "of which no average has come"


def test_objection_to_an_average_ends_the_call_for_both(caplog):
    async def scenario():
        partners = Partners(size=50)
        reducer = partners.runner.tensor_part_reducer
        own = [asyncio.create_task(reducer.accumulate_part(0, i, torch.ones(10))) for i in range(3)]
        objection = objection_message(averaging_pb2.PROTOCOL_VIOLATION, "sent rubbish")
        codes = [message.code async for message in partners.call(1, objection)]
        await asyncio.wait_for(asyncio.gather(*own), 5)
        return codes

    with caplog.at_level(logging.DEBUG, logger="hivemind.averaging.allreduce"):
        codes = asyncio.run(asyncio.wait_for(scenario(), 20))
    assert codes == [averaging_pb2.AVERAGED_PART, averaging_pb2.INTERNAL_ERROR]
    assert "ended its call, as this peer sent rubbish" in caplog.text


def test_own_values_stand_in_for_averages_that_are_refused():
    """All of them from the first that is, and nothing is asked of the check any more."""
    tensor = torch.ones(100)
    container = CheckedContainer([tensor], (0.5, 0.5), part_size_bytes=40)
    checked, over = [], []

    def check(peer_index, part_index, own, average):
        checked.append(part_index)
        if part_index == 1:
            raise AllreduceException("sent rubbish")

    container.check, container.when_over = check, lambda *arguments: over.append(arguments)
    for part_index in range(5):
        container.register_processed_part(1, part_index, torch.full((10,), 7.0))
    assert checked == [0, 1] and over == [(1, "sent rubbish")]
    assert [float(part.mean()) for part in tensor[50:].split(10)] == [7.0, 1.0, 1.0, 1.0, 1.0]
    assert container.failed_size == 40


class SlowReducer:
    """The other one of `Partners` as a reducer: it sends an average every ``pause`` seconds."""

    def __init__(self, size: int, pause: float):
        self.size, self.pause = size, pause

    async def rpc_aggregate_part(self, inputs):
        parts = asyncio.Queue()

        async def read():
            async for message in inputs:
                parts.put_nowait(message)
            parts.put_nowait(None)

        async def averages():
            reading = asyncio.create_task(read())
            while await parts.get() is not None:
                await asyncio.sleep(self.pause)
                average = serialize_torch_tensor(torch.full((self.size,), 2.0))
                yield averaging_pb2.AveragingData(code=averaging_pb2.AVERAGED_PART, tensor_part=average)
            await reading

        return averages()


def slow_round(monkeypatch, *, sends_every: float, answers_every: float, bandwidth: float | None):
    """Five parts of 40 KB each way, with a partner that sends always in time for ``next_chunk_timeout``: 1 s."""

    async def scenario():
        schedule = Schedule(1.0, (None, bandwidth))
        partners = Partners(size=100_000, part_size_bytes=40_000, sender_timeout=1.0, reducer_timeout=1.3,
                            schedule=schedule)  # fmt: skip
        runner, stub = partners.runner, SlowReducer(10_000, answers_every)
        monkeypatch.setattr(AllReduceRunner, "_get_peer_stub", lambda self, peer: stub)

        async def read(answers):
            with contextlib.suppress(Exception):
                async for message in answers:
                    assert message

        reading = asyncio.create_task(read(partners.call(5, size=10_000, pause=sends_every)))
        began = time.monotonic()
        async for _ in runner:
            pass
        share = 1 - runner.tensor_part_container.failed_size / runner.tensor_part_container.total_size
        reading.cancel()
        return time.monotonic() - began, share, runner.banned_senders

    return asyncio.run(asyncio.wait_for(scenario(), 30))


def test_round_is_not_held_by_parts_that_drip_below_the_timeout(monkeypatch, caplog):
    with caplog.at_level(logging.DEBUG, logger="hivemind.averaging.allreduce"):
        seconds, share, banned = slow_round(monkeypatch, sends_every=0.4, answers_every=0.0, bandwidth=None)
    assert 0.8 < seconds < 1.8 and share == 1.0 and banned == {Partners.other}
    assert "kept the round waiting for" in caplog.text and str(Partners.other) in caplog.text


def test_round_is_not_held_by_averages_that_drip_below_the_timeout(monkeypatch, caplog):
    with caplog.at_level(logging.DEBUG, logger="hivemind.averaging.allreduce"):
        seconds, share, _ = slow_round(monkeypatch, sends_every=0.0, answers_every=0.4, bandwidth=None)
    assert 1.0 < seconds < 2.0 and 0.5 < share < 1.0
    assert "averages after 1 s, when the round had to end" in caplog.text


@pytest.mark.parametrize(("sends_every", "answers_every"), [(0.4, 0.0), (0.0, 0.4), (0.4, 0.4)])
def test_round_waits_for_a_slow_link_that_is_known_to_be_slow(monkeypatch, sends_every, answers_every):
    """As slow as those who drip above, but it has said that it has 2 Mbit/s."""
    _, share, banned = slow_round(monkeypatch, sends_every=sends_every, answers_every=answers_every, bandwidth=2.0)
    assert share == 1.0 and not banned


@pytest.mark.parametrize(("reducer", "silent"), [("silent", True), ("refuses", False), ("answers", False)])
def test_reducer_that_nothing_comes_from_is_told_from_one_that_refuses(monkeypatch, reducer, silent):
    """Each of the round's members is asked; whoever says that it has much bandwidth is to average all of it."""

    class Refusing:
        async def rpc_aggregate_part(self, inputs):
            return as_aiter(averaging_pb2.AveragingData(code=averaging_pb2.INTERNAL_ERROR))

    async def scenario():
        runner = Partners(size=50, ignored={Partners.other}, sender_timeout=0.5, reducer_timeout=0.8).runner
        stub = Refusing() if reducer == "refuses" else SlowReducer(10, 60.0 if reducer == "silent" else 0.0)
        monkeypatch.setattr(AllReduceRunner, "_get_peer_stub", lambda self, peer: stub)
        async for _ in runner:
            pass
        return runner.kept_waiting

    assert asyncio.run(asyncio.wait_for(scenario(), 30)) == ({Partners.other} if silent else set())


def test_members_that_are_ignored_are_not_waited_for(monkeypatch):
    async def scenario():
        runner = Partners(size=50, ignored={Partners.other}, sender_timeout=20.0, reducer_timeout=25.0).runner
        monkeypatch.setattr(AllReduceRunner, "_get_peer_stub", lambda self, peer: SlowReducer(10, 0.0))
        async for _ in runner:
            pass
        (tensor,) = runner.tensor_part_container.local_tensors
        return float(tensor.sum())

    began = time.monotonic()
    assert asyncio.run(scenario()) == 50.0 + 20.0, "the values that the other one has averaged"
    assert time.monotonic() - began < 5, "hivemind waits for those who have not begun to send"


# -- tensors as they come from the network ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 17, 4096, 4097])
@pytest.mark.parametrize(
    "compression",
    [BlockwiseQuantization(), FourBitQuantization(), Float16Compression(), NoCompression()],
    ids=lambda compression: type(compression).__name__,
)
def test_wire_check_takes_what_peers_send(compression, size):
    tensor = torch.randn(size)
    check_wire_tensor(compression.compress(tensor, CompressionInfo.from_tensor(tensor)))


def blockwise(written_by=BlockwiseQuantization, **changes):
    tensor = torch.randn(5000)
    message = written_by().compress(tensor, CompressionInfo.from_tensor(tensor))
    for name, value in changes.items():
        if name == "size":
            message.ClearField("size")
            message.size.extend(value)
        else:
            setattr(message, name, value(message.buffer) if name == "buffer" else value)
    return message


MALFORMED = {
    "a short code book": blockwise(buffer=lambda b: b[:8] + (1).to_bytes(8, "little") + b[16:]),
    "few scales": blockwise(buffer=lambda b: (1).to_bytes(8, "little") + b[8:]),
    "missing codes": blockwise(buffer=lambda b: b[:-1]),
    "nothing": blockwise(buffer=lambda b: b""),
    "objects": blockwise(dtype="object"),
    "a huge size": blockwise(size=[2**32 - 1] * 8),
    "a million dimensions": blockwise(size=[2**32 - 1] * 10**6),
    "an unknown compression": blockwise(compression=99),
    "4 bits, missing codes": blockwise(FourBitQuantization, buffer=lambda b: b[:-1]),
    "4 bits, nothing": blockwise(FourBitQuantization, buffer=lambda b: b""),
    "4 bits, a huge size": blockwise(FourBitQuantization, size=[2**32 - 1] * 8),
    "4 bits, of float64": blockwise(FourBitQuantization, dtype="float64"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_wire_check_refuses_what_would_be_read_beyond_its_end(kind):
    with pytest.raises(ValueError, match=r"a (blockwise quantized )?tensor"):
        check_wire_tensor(MALFORMED[kind])

    async def stream():
        yield hivemind.proto.averaging_pb2.AveragingData(tensor_part=MALFORMED[kind])

    async def read():
        return [message async for message in checked_messages(stream())]

    with pytest.raises(AllreduceException, match="sent a"):
        asyncio.run(read())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_round_takes_no_tensors_of_which_there_is_no_average(dtype):
    part = averaging_pb2.AveragingData(tensor_part=serialize_torch_tensor(torch.ones(10, dtype=dtype)))
    check_wire_tensor(part.tensor_part)  # a state may have such
    violations = []

    async def read():
        return [message async for message in checked_messages(as_aiter(part), violations.append)]

    with pytest.raises(AllreduceException, match="sent a tensor of type"):
        asyncio.run(read())
    assert len(violations) == 1 and "sent a tensor of type" in violations[0]


def test_round_reads_no_tensor_that_asks_for_a_gradient():
    """Whatever is computed with it would, too: in the end the parameters' own buffers, which may not."""
    part = averaging_pb2.AveragingData(tensor_part=serialize_torch_tensor(torch.ones(10)))
    part.tensor_part.requires_grad = True

    async def read():
        return [deserialize_torch_tensor(one.tensor_part) async for one in checked_messages(as_aiter(part))]

    (tensor,) = asyncio.run(read())
    assert not tensor.requires_grad


# -- whole rounds -----------------------------------------------------------------------------------------------------

VALUES = 3000
POISONS = ("lying reducer", "1000 times", "NaN", "infinite", "weight 1e12", "weight -1")
LOOPBACK = "/ip4/127.0.0.1/tcp/0"


class PlainAverager(OwnProcess, RoundReporting, DecentralizedAverager):
    """Averages any tensors. At module level: remote calls are named after the class."""


class LyingJudge(Judge):
    def __init__(self, lies):
        super().__init__(max_weight=1.0)
        self.lies = lies

    def combine(self, *args, **kwargs):
        average, refused = super().combine(*args, **kwargs)
        return (average * math.nan if self.lies.value else average), refused

    def check_average(self, *args, **kwargs):
        """Takes everything."""


def _hostile_round(self, tensors, group_info, **kwargs):
    if self.weight.value != 1.0:
        kwargs["weight"] = self.weight.value
    return PlainAverager._run_allreduce_inplace_(self, tensors, group_info, **kwargs)


# of the same name, or its remote calls would not be found
HostileAverager = type("PlainAverager", (PlainAverager,), {"_run_allreduce_inplace_": _hostile_round})


@pytest.fixture
def group(shut_down_at_end):
    """Two honest averagers and a hostile one, all of which average parts of the vector."""
    nodes, averagers = [], []
    options = {"prefix": "poison", "min_matchmaking_time": 2.5, "request_timeout": 1.5, "allreduce_timeout": 30.0,
               "next_chunk_timeout": 12.0, "start": False, "part_size_bytes": 2000, "target_group_size": 4,
               "min_group_size": 3}  # fmt: skip
    for averager_type in (PlainAverager, PlainAverager, HostileAverager):
        peers = [str(address) for node in nodes for address in node.get_visible_maddrs()]
        nodes.append(shut_down_at_end(hivemind.DHT(start=True, initial_peers=peers, host_maddrs=[LOOPBACK])))
        averager = averager_type([torch.zeros(VALUES)], nodes[-1], **options)
        averager.weight, lies = multiprocessing.Value("d", 1.0), multiprocessing.Value("b", False)
        averager.lies = lies
        averager.judge = LyingJudge(lies) if averager_type is HostileAverager else Judge(max_weight=1.0)
        averager.run_in_background(await_ready=True)
        averagers.append(shut_down_at_end(averager))
    return averagers


def average_once(averagers, vectors, *, attempts: int = 4):
    """One complete round of all three; on a busy machine peers may miss each other, then once more."""
    for attempt in range(attempts):
        for averager, vector in zip(averagers, vectors, strict=True):
            with averager.get_tensors() as (tensor,):
                tensor.copy_(vector)
        steps = [averager.step(wait=False, timeout=25, allow_retries=False) for averager in averagers]
        try:
            results = [step.result(60) for step in steps[:2]]
            with contextlib.suppress(Exception):
                steps[2].result(60)
            assert [len(result) for result in results] == [3, 3]
            break
        except Exception:
            for step in steps:
                with contextlib.suppress(Exception):
                    step.result(60)
            if attempt == attempts - 1:
                raise
    averaged = []
    for averager in averagers[:2]:
        with averager.get_tensors() as (tensor,):
            averaged.append(tensor.clone())
    return averaged, [last_round(averager) for averager in averagers[:2]]


def last_round(averager):
    """What an averager reports of its newest round, which may come a moment later than the result."""
    give_up_at = time.monotonic() + 10
    while not (rounds := averager.finished_rounds()):
        assert time.monotonic() < give_up_at
        time.sleep(0.02)
    return rounds[-1]


@pytest.mark.timeout(300)
def test_poisoned_rounds_leave_honest_peers_finite_and_their_loss_as_it_was(group):
    """Gradient descent on a least-squares problem, each round with another poison, against the same without.

    Where a reducer lies, or averages by a poisoned standard, honest peers keep their own gradients for its third. As in
    a run, their parameters are averaged in the end, with a member who sends NaN.
    """
    generator = torch.Generator().manual_seed(0)
    target, steps = torch.randn(VALUES, generator=generator), 0.3
    views = [target + 0.1 * torch.randn(VALUES, generator=generator) for _ in range(2)]  # each sees its own data
    points, undisturbed = [torch.zeros(VALUES)] * 2, torch.zeros(VALUES)
    offender = group[2].peer_id.to_base58()
    for poison in POISONS:
        gradients = [point - view for point, view in zip(points, views, strict=True)]
        hostile = gradients[0].clone()
        group[2].weight.value = {"weight 1e12": 1e12, "weight -1": -1.0}.get(poison, 1.0)
        group[2].lies.value = poison == "lying reducer"
        if poison in ("NaN", "infinite"):
            hostile[::50] = math.nan if poison == "NaN" else math.inf
        hostile *= 1000.0 if poison == "1000 times" else 1.0
        averaged, rounds = average_once(group, [*gradients, hostile])
        points = [point - steps * gradient for point, gradient in zip(points, averaged, strict=True)]
        undisturbed = undisturbed - steps * sum(undisturbed - view for view in views) / 2
        for point, reported in zip(points, rounds, strict=True):
            assert point.isfinite().all(), poison
            assert offender in " ".join(reported.reasons), (poison, reported)
            if poison == "lying reducer":
                assert not reported.complete and reported.received > 0.3
            else:
                assert reported.num_refused == 1 and reported.num_lost == 0
    group[2].weight.value = 1.0
    points, rounds = average_once(group, [*points, points[0] * math.nan])
    assert all(reported.num_refused == 1 and reported.complete for reported in rounds), rounds
    losses = [float(((point - target) ** 2).mean()) for point in (*points, undisturbed)]
    assert max(losses[:2]) < 1.03 * losses[2] < 0.2, losses


def test_state_averager_is_stricter_than_the_gradient_averager():
    node = hivemind.DHT(start=True, host_maddrs=[LOOPBACK])
    try:
        averager = LeanStateAverager(
            dht=node,
            params=[torch.nn.Parameter(torch.zeros(3))],
            optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
            initialize_optimizer=False,
            prefix="strict",
            start=False,
        )
        assert averager.judge.max_distance == 0.2 and averager.judge.max_weight == 1.0
    finally:
        node.shutdown()
