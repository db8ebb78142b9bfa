"""Clipping keeps what honest contributions have in common, whatever a minority sends; without liars it is the mean."""

import math

import bitsandbytes.functional  # noqa: F401, takes seconds: before averagers fork, as in a trainer
import hivemind
import pytest
import torch

from src.swarm.averagers import LeanGradientAverager
from src.swarm.compression import gradient_compression
from src.swarm.contributions import Judge
from src.swarm.robust_averaging import MAX_MEMBERS, MOMENTUM, SKETCH, Clipping, Momentum
from tests.swarm.test_averagers import averager_options, loopback_addresses, run_together

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
SIZE, NUM_PEERS = 8000, 10
GENERATOR = torch.Generator().manual_seed(0)
TRUTH = torch.nn.functional.normalize(torch.randn(SIZE, generator=GENERATOR), dim=0)
LIES = {
    "far away": lambda honest: -9.9 * honest.mean(0),
    "as large as the others": lambda honest: -honest.mean(0) * (honest[0].norm() / honest.mean(0).norm()),
    "within the noise": lambda honest: honest.mean(0) - 1.5 * honest.std(0),
    "the mean turned round": lambda honest: -3.0 * honest.mean(0),
}


def rounds(clipping: Clipping, lie=None, *, count: int, noise: float = 2.0, liars: int = 3, claim: float = 1.0):
    """What a round's average is in the end, and which share the liars have: [size], float."""
    for _ in range(count):
        values = TRUTH + torch.randn(NUM_PEERS, SIZE, generator=GENERATOR) * noise / math.sqrt(SIZE)
        weights = [1.0] * NUM_PEERS
        if lie is not None:
            values[-liars:] = lie(values[:-liars])
            weights[-liars:] = [claim] * liars
        shares = clipping.shares(0, dict(enumerate(zip(values, weights, strict=True))))
    assert list(shares) == list(range(NUM_PEERS)) and sum(shares.values()) == pytest.approx(1.0)
    average = sum(shares[peer] * values[peer] for peer in shares)
    return average, sum(list(shares.values())[-liars:])


@pytest.mark.parametrize("kind", LIES)
@pytest.mark.parametrize("claim", [1.0, 0.01])
def test_liars_gain_little_from_one_round_to_the_next(kind, claim):
    """Each contribution has twice as much noise as truth, so that a lie is not far from it; three of ten lie."""
    average, share = rounds(Clipping(), LIES[kind], count=25, claim=claim)
    assert share < 0.15, "they are 0.3"
    assert float(average @ TRUTH) > 0.6
    assert float(torch.cosine_similarity(average, TRUTH, dim=0)) > 0.7, "a mean of seven honest ones has 0.8"


def test_lie_that_is_larger_than_noise_gains_little_at_once():
    average, share = rounds(Clipping(has_history=False), LIES["far away"], count=1, noise=1.0)
    assert share < 0.08 and float(average @ TRUTH) > 0.3


def test_nobody_is_clipped_much_where_nobody_lies():
    for clipping, count in ((Clipping(), 25), (Clipping(has_history=False), 1)):
        average, share = rounds(clipping, count=count)
        assert share == pytest.approx(0.3, abs=0.03)
        assert float(average @ TRUTH) == pytest.approx(1.0, abs=0.05)


def test_noise_of_few_samples_is_no_reason_to_be_clipped():
    values = TRUTH + torch.randn(NUM_PEERS, SIZE, generator=GENERATOR) * 2.0 / math.sqrt(SIZE)
    values[3] += torch.randn(SIZE, generator=GENERATOR) * 2.0 * math.sqrt(15.0) / math.sqrt(SIZE)
    weights = [16.0] * NUM_PEERS
    weights[3] = 1.0
    shares = Clipping(has_history=False).shares(0, dict(enumerate(zip(values, weights, strict=True))))
    assert shares[3] == pytest.approx(1 / (9 * 16 + 1), rel=0.15)


def test_of_equal_parameters_nothing_else_counts():
    """However little it differs: it is an honest peer's rounding, or a lie."""
    same, other = torch.randn(SIZE), torch.randn(SIZE)
    values = {peer: (same if peer < 6 else same + 1e-4 * other, 1.0) for peer in range(NUM_PEERS)}
    shares = Clipping(has_history=False).shares(0, values)
    assert sum(shares[peer] for peer in range(6)) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 3.0), (0.0, 1.0, 3.0), (5.0, 0.0)])
def test_of_less_than_three_with_weight_all_have_their_weights(weights):
    shares = Clipping().shares(0, {peer: (torch.randn(9), weight) for peer, weight in enumerate(weights)})
    assert list(shares.values()) == pytest.approx([weight / sum(weights) for weight in weights])


@pytest.mark.parametrize("size", [1, SKETCH - 1, SKETCH + 1, 100_000])
def test_sketches_have_the_norms_of_what_they_stand_for(size):
    clipping = Clipping()
    one, other = torch.randn(2, size, generator=GENERATOR)
    assert float((clipping._sketch(one) - clipping._sketch(other)).norm()) == pytest.approx(
        float((one - other).norm()), rel=0.15
    )


def test_momentum_of_a_newcomer_is_its_first_contribution_and_as_noisy():
    sketch = torch.randn(SKETCH)
    momentum = Momentum.begin(sketch, 4.0)
    torch.testing.assert_close(momentum.mean, sketch)
    assert momentum.noise == pytest.approx(1 / math.sqrt(4.0))
    for _ in range(200):
        momentum.add(sketch, 4.0)
    torch.testing.assert_close(momentum.mean, sketch)
    assert momentum.noise == pytest.approx(math.sqrt((1 - MOMENTUM) / (1 + MOMENTUM)) / 2, rel=0.01)


def test_new_names_do_not_fill_the_memory():
    clipping = Clipping()
    for number in range(MAX_MEMBERS + 20):
        clipping.shares(0, {name: (torch.ones(3), 1.0) for name in ("always there", f"new {number}", "too")})
    assert len(clipping._momenta[0]) == MAX_MEMBERS and "always there" in clipping._momenta[0]


@pytest.mark.parametrize("judges_parameters", [False, True])
def test_judge_clips_what_it_has_not_refused(judges_parameters):
    judge = Judge(max_weight=4.0, robust_averaging="clip", max_distance=0.5 if judges_parameters else None)
    assert judge.clipping.has_history is not judges_parameters
    honest = torch.randn(SIZE, generator=GENERATOR)
    contributions = dict.fromkeys(range(4), (honest, 1.0))
    contributions[4] = honest * (0.95 if judges_parameters else -1.0), 1.0
    contributions[5] = honest * math.nan, 1.0
    average, refused = judge.combine(0, contributions, shape=honest.shape, own=0, harmless=0.0, names="abcdef")
    assert list(refused) == [5]
    torch.testing.assert_close(average, honest, rtol=1e-3, atol=1e-3)
    assert Judge(max_weight=4.0).clipping is None


# -- a real swarm -----------------------------------------------------------------------------------------------------

VALUES, ROUNDS, STEP = 80_000, 12, 0.3


def tensors_of(averager) -> list[torch.Tensor]:
    with averager.get_tensors() as tensors:
        return [tensor.clone() for tensor in tensors]


def learn(averagers, local_steps: int, seed: int = 0) -> list[float]:
    """The honest peers' loss in the end: descent on a least-squares problem of which each sees noisy gradients.

    With more than one local step, differences from the common point are averaged, as with --local_batch_size. The last
    averager lies, within what judges take to be possible.
    """
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(VALUES, generator=generator)
    points = [torch.zeros(VALUES)] * len(averagers)
    for _ in range(ROUNDS):
        contributions = []
        for point in points[:-1]:
            local = point.clone()
            for _ in range(local_steps):
                local -= STEP / local_steps * (local - target + torch.randn(VALUES, generator=generator))
            contributions.append((point - local) / STEP)
        contributions.append(-5.0 * contributions[0])

        def start_steps(contributions=contributions):
            for averager, own in zip(averagers, contributions, strict=True):
                (parameter,) = averager.parameters
                parameter.grad.copy_(own)
                averager.accumulate_grads_(16)
                yield averager.step(wait=False, timeout=20)

        results = run_together(lambda start_steps=start_steps: list(start_steps()))
        assert [len(result) for result in results] == [len(averagers)] * len(averagers)
        averages = [tensors_of(averager)[0] for averager in averagers]
        assert all(torch.equal(average, averages[0]) for average in averages)
        points = [point - STEP * average for point, average in zip(points, averages, strict=True)]
    return [float(((point - target) ** 2).mean()) for point in points[:-1]]


def test_nobody_counts_more_than_the_median_where_samples_may_be_claimed():
    judge = Judge(max_weight=1000.0, robust_averaging="clip")
    values = torch.randn(3, SIZE, generator=GENERATOR)
    contributions = {sender: (values[sender], weight) for sender, weight in enumerate((10.0, 10.0, 1000.0))}
    average, refused = judge.combine(0, contributions, shape=values[0].shape, own=0, harmless=0.0)
    assert not refused
    torch.testing.assert_close(average, values.mean(0), rtol=0.02, atol=0.02)


@pytest.mark.slow
@pytest.mark.swarm
@pytest.mark.timeout(600)
@pytest.mark.parametrize("local_steps", [1, 4], ids=["synchronous", "local steps"])
def test_one_liar_of_four_does_no_harm_in_a_real_swarm(shut_down_at_end, local_steps):
    """Without clipping, it does. Its own share of the values is averaged by an honest peer: it is a client."""
    losses = {}
    for clip in (None, "clip"):
        nodes, averagers = [], []
        for number in range(4):
            nodes.append(hivemind.DHT(start=True, initial_peers=loopback_addresses(nodes), host_maddrs=[LOOPBACK]))
            shut_down_at_end(nodes[-1])
            options = averager_options(f"liar_{clip}_{local_steps}", gradient_compression(4))
            averagers.append(
                LeanGradientAverager(
                    [torch.nn.Parameter(torch.zeros(VALUES))],
                    dht=nodes[-1],
                    reuse_grad_buffers=True,
                    client_mode=number == 3,
                    robust_averaging=clip,
                    target_batch_size=64,
                    **{**options, "min_group_size": 4, "target_group_size": 8, "part_size_bytes": 2**13},
                )
            )
            shut_down_at_end(averagers[-1])
        losses[clip] = max(learn(averagers, local_steps))
    assert losses["clip"] < 0.1, losses
    assert losses[None] > 0.6, losses
