"""The two optimizers of local steps against torch's own and LAMB, and what becomes of local steps when rounds fail."""

import math

import pytest
import torch

from src.optim.lamb import CPULAMB8Bit
from src.optim.local_steps import DIFFERENCES, GRADIENTS, NOTHING, AnchoredLAMB, LocalWork

SHAPES = (3, 4), (5,)


def random_tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def make_optimizer(anchor: list[torch.Tensor], **options) -> AnchoredLAMB:
    groups = [{"params": [tensor], "weight_decay": decay} for tensor, decay in zip(anchor, (0.1, 0.0), strict=True)]
    options = {"outer_learning_rate": 0.7, "outer_momentum": 0.9, **options}
    return AnchoredLAMB(groups, lr=0.1, **options)


def give_gradients(tensors: list[torch.Tensor], seed: int) -> None:
    for tensor, gradient in zip(tensors, random_tensors(seed), strict=True):
        tensor.grad = gradient


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_outer_step_is_sgd_with_nesterov_momentum_and_no_weight_decay(momentum):
    anchor, expected = random_tensors(0), random_tensors(0)
    optimizer = make_optimizer(anchor, outer_momentum=momentum)
    sgd = torch.optim.SGD(expected, lr=0.7, momentum=momentum, nesterov=momentum > 0)
    optimizer.contents = DIFFERENCES
    for seed in range(1, 5):
        give_gradients(anchor, seed), give_gradients(expected, seed)
        optimizer.step(), sgd.step()
        for own, other in zip(anchor, expected, strict=True):
            torch.testing.assert_close(own, other, rtol=0, atol=1e-6)


def test_inner_steps_are_those_of_lamb_on_other_tensors_and_its_statistics_go_on_from_synchronous_ones():
    anchor, own, expected = random_tensors(0), random_tensors(0), random_tensors(0)
    optimizer = make_optimizer(anchor)
    groups = [{"params": [tensor], "weight_decay": decay} for tensor, decay in zip(expected, (0.1, 0.0), strict=True)]
    lamb = CPULAMB8Bit(groups, lr=0.1)
    assert optimizer.contents == GRADIENTS
    give_gradients(anchor, 1), give_gradients(expected, 1)
    optimizer.step(), lamb.step()
    for tensor, common in zip(own, anchor, strict=True):
        tensor.copy_(common)
    after_first = [tensor.clone() for tensor in anchor]
    for seed in range(2, 5):
        give_gradients(own, seed), give_gradients(expected, seed)
        optimizer.inner_step(own), lamb.step()
    for tensor, other, common, then in zip(own, expected, anchor, after_first, strict=True):
        assert torch.equal(tensor, other)
        assert torch.equal(common, then), "inner steps leave the anchor"


def test_inner_step_takes_parameters_that_are_no_flat_array_of_the_host():
    """As those of a GPU, which are copied."""
    anchor, own = random_tensors(0), random_tensors(0)
    spread = [torch.stack([tensor, tensor], dim=-1)[..., 0] for tensor in own]
    assert not any(tensor.is_contiguous() for tensor in spread)
    optimizer, other = make_optimizer(anchor), make_optimizer(random_tensors(0))
    give_gradients(own, 1), give_gradients(spread, 1)
    optimizer.inner_step(spread), other.inner_step(own)
    for tensor, flat, before in zip(spread, own, anchor, strict=True):
        torch.testing.assert_close(tensor, flat)
        assert not torch.equal(tensor, before)


@pytest.mark.parametrize("contents", [DIFFERENCES, NOTHING])
def test_outer_step_with_nothing_or_with_bad_values_changes_nothing(contents):
    anchor = random_tensors(0)
    optimizer = make_optimizer(anchor)
    optimizer.contents = contents
    give_gradients(anchor, 1)
    if contents == DIFFERENCES:
        anchor[1].grad[2] = math.nan
    optimizer.step()
    for tensor, before in zip(anchor, random_tensors(0), strict=True):
        assert torch.equal(tensor, before)
        assert float(optimizer.state[tensor]["momentum"].norm()) == 0


@pytest.mark.parametrize("options", [{"outer_learning_rate": 0.0}, {"outer_momentum": 1.0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make_optimizer(random_tensors(0), **options)


def test_state_of_both_optimizers_survives_a_dictionary():
    anchor, other = random_tensors(0), random_tensors(0)
    optimizer, copy = make_optimizer(anchor), make_optimizer(other)
    give_gradients(anchor, 1)
    optimizer.inner_step(anchor)
    optimizer.contents = DIFFERENCES
    optimizer.step()
    copy.load_state_dict(optimizer.state_dict())
    for tensor, twin in zip(anchor, other, strict=True):
        for name in ("state1", "state2", "momentum"):
            assert torch.equal(optimizer.state[tensor][name], copy.state[twin][name])
            assert float(copy.state[twin][name].norm()) > 0


# -- local work ------------------------------------------------------------------------------------------------------


class Peer:
    """One with local work, and buffers as those in which hivemind averages."""

    def __init__(self, seed: int = 0):
        self.anchor, self.parameters = random_tensors(seed), random_tensors(seed)
        self.differences = [torch.empty_like(tensor) for tensor in self.anchor]
        self.work = LocalWork(self.parameters, self.anchor)

    def learn(self, seed: int, samples: int = 4) -> list[torch.Tensor]:
        moved = [0.1 * tensor for tensor in random_tensors(seed)]
        for parameter, move in zip(self.parameters, moved, strict=True):
            parameter.add_(move)
        self.work.samples += samples
        return moved

    def move_anchor(self, by: list[torch.Tensor]) -> None:
        for tensor, move in zip(self.anchor, by, strict=True):
            tensor.sub_(move)


def assert_equal(tensors, others) -> None:
    for tensor, other in zip(tensors, others, strict=True):
        torch.testing.assert_close(tensor, other, rtol=0, atol=1e-6)


def test_parameters_are_exactly_the_anchor_after_an_undelayed_round():
    peer = Peer()
    peer.learn(1)
    peer.work.hand_over(peer.differences)
    peer.move_anchor(random_tensors(2))
    peer.work.follow()
    for parameter, anchor in zip(peer.parameters, peer.anchor, strict=True):
        assert torch.equal(parameter, anchor)


def test_steps_made_during_a_round_are_kept_and_enter_the_next_difference_alone():
    peer = Peer()
    first = peer.learn(1, samples=8)
    assert peer.work.weight == 8
    peer.work.hand_over(peer.differences)
    assert_equal(peer.differences, [-move for move in first])
    assert peer.work.weight == 0
    second = peer.learn(2)
    peer.move_anchor(random_tensors(3))
    peer.work.follow()
    assert_equal(peer.parameters, [anchor + move for anchor, move in zip(peer.anchor, second, strict=True)])
    assert peer.work.weight == 4
    peer.work.hand_over(peer.differences)
    assert_equal(peer.differences, [-move for move in second])


def test_difference_of_a_failed_round_enters_the_next_one_with_its_samples():
    peer = Peer()
    first = peer.learn(1, samples=8)
    peer.work.hand_over(peer.differences)
    second = peer.learn(2)
    for tensor in peer.differences:
        tensor.fill_(7.0)  # a round that was broken off leaves what it likes
    peer.work.take_back()
    peer.work.follow()  # the anchor has not moved
    assert_equal(peer.parameters, [a + one + two for a, one, two in zip(peer.anchor, first, second, strict=True)])
    assert peer.work.weight == 12
    peer.work.hand_over(peer.differences)
    assert_equal(peer.differences, [-one - two for one, two in zip(first, second, strict=True)])
    peer.work.take_back()
    assert peer.work.weight == 12, "also after two failures"


def test_what_is_missing_of_a_partial_round_enters_the_next_one():
    peer = Peer()
    moved = peer.learn(1)
    peer.work.hand_over(peer.differences)
    average = torch.full((5,), 0.25)
    peer.differences[1].copy_(average)  # of the first tensor nothing has come
    peer.work.take_back_missing(peer.differences)
    assert_equal(peer.differences, [torch.zeros(3, 4), average])
    peer.move_anchor(peer.differences)
    peer.work.follow()
    assert_equal(peer.parameters, [peer.anchor[0] + moved[0], peer.anchor[1]])
    peer.work.hand_over(peer.differences)
    assert_equal(peer.differences, [-moved[0], torch.zeros(5)])


def test_local_steps_are_kept_when_another_state_is_taken():
    peer = Peer()
    moved = peer.learn(1)
    for tensor, new in zip(peer.anchor, random_tensors(9), strict=True):
        tensor.copy_(new)
    for _ in range(2):  # as often as it is asked to: the anchor has moved once
        peer.work.follow()
        assert_equal(peer.parameters, [new + move for new, move in zip(random_tensors(9), moved, strict=True)])
    assert peer.work.weight == 4


def test_parameters_that_are_not_finite_are_given_up_and_send_zeros(caplog):
    peer = Peer()
    peer.learn(1)
    peer.parameters[0][0, 0] = math.nan
    peer.work.hand_over(peer.differences)
    assert_equal(peer.differences, [torch.zeros(shape) for shape in SHAPES])
    assert_equal(peer.parameters, random_tensors(0))
    assert peer.work.weight == 0 and "gave up local steps with 4 samples" in caplog.text


def test_samples_of_two_anchors_are_of_the_same_places():
    one, other = Peer(), Peer()
    other.learn(1)
    values, distance = one.work.sample()
    assert values.shape == (128,) and distance == 0.0
    of_other, moved = other.work.sample()
    assert torch.equal(values, of_other) and 0.02 < moved < 0.5
    all_values = torch.cat([tensor.view(-1) for tensor in one.anchor])
    assert bool(torch.isin(values, all_values).all()) and len(values.unique()) > 10
