"""CPUMuon8Bit against Muon written for reading in float64, and what its docstring promises."""

import copy
import math
import os
import threading
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from arguments import REPOSITORY
from src import LeanAlbertConfig, LeanAlbertForPreTraining
from src.models.shared_linear import dense_matrices
from src.optim import muon
from src.optim.lamb import CPULAMB8Bit
from src.optim.muon import CPUMuon8Bit, newton_schulz_, newton_schulz_operations
from src.optim.parameter_groups import parameter_groups
from tests.optim.test_lamb import assert_states_equal, make_params, saved_and_loaded, set_gradients, train

NEVER = 2**40  # a min_8bit_size no tensor reaches


def reference_newton_schulz(matrix):
    """The iteration as it was published, in float64."""
    x = matrix / matrix.norm()
    if x.shape[0] > x.shape[1]:
        return reference_newton_schulz(matrix.T).T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def reference_muon_step(param, grad, momentum, *, num_parts, lr, weight_decay):
    momentum.mul_(0.95).add_(grad)
    parts = (grad + 0.95 * momentum).chunk(num_parts)
    update = torch.cat([reference_newton_schulz(part) * math.sqrt(max(part.shape)) for part in parts])
    param -= lr * weight_decay * param + lr * 0.2 * update


def make_optimizer(params, num_parts=1, kind=CPUMuon8Bit, **options):
    """The first parameter is Muon's, the rest LAMB's."""
    matrix = {"params": params[:1], "num_parts": num_parts, "weight_decay": 0.1}
    return kind([{"params": params[1:]}, matrix], lr=0.01, reuse_grad_buffers=True, **options)


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (32, 32)])
def test_newton_schulz_is_the_published_iteration_and_makes_singular_values_nearly_equal(shape, monkeypatch):
    monkeypatch.setattr(muon, "COLUMNS_AT_ONCE", 7)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = newton_schulz_(matrix.clone())
    torch.testing.assert_close(found.double(), reference_newton_schulz(matrix.double()), atol=1e-4, rtol=0)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.3 and values.max() < 1.3
    assert newton_schulz_(torch.zeros(shape)).eq(0).all()


def test_newton_schulz_operations_are_those_of_its_products():
    assert newton_schulz_operations(4096, 16384) == newton_schulz_operations(16384, 4096)
    with FlopCounterMode(display=False) as counter:
        newton_schulz_(torch.randn(24, 60))
    assert counter.get_total_flops() == newton_schulz_operations(24, 60)


@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_muon_unquantised_is_the_reference(num_parts):
    params = make_params((48, 20), (20, 33))
    expected, momentum = params[0].detach().double(), torch.zeros(48, 20, dtype=torch.float64)
    lamb_params = make_params((48, 20), (20, 33))[1:]
    optimizer = make_optimizer(params, num_parts, min_8bit_size=NEVER)
    lamb = CPULAMB8Bit(lamb_params, lr=0.01, min_8bit_size=NEVER)
    for step in range(6):
        set_gradients(params, step)
        lamb_params[0].grad = params[1].grad.clone()
        gradient = params[0].grad.double()
        reference_muon_step(expected, gradient, momentum, num_parts=num_parts, lr=0.01, weight_decay=0.1)
        optimizer.step()
        lamb.step()
    torch.testing.assert_close(params[0].detach().double(), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(params[1], lamb_params[0]), "what is not Muon's is LAMB's"


def test_parts_are_orthogonalised_by_themselves():
    stacked = make_params((96, 32))
    singles = [torch.nn.Parameter(part.clone()) for part in stacked[0].detach().chunk(3)]
    optimizers = [make_optimizer([single], min_8bit_size=NEVER) for single in singles]
    optimizer = make_optimizer(stacked, num_parts=3, min_8bit_size=NEVER)
    for step in range(2):
        set_gradients(stacked, step)
        for single, gradient in zip(singles, stacked[0].grad.clone().chunk(3), strict=True):
            single.grad = gradient
        for one in (optimizer, *optimizers):
            one.step()
    torch.testing.assert_close(stacked[0].detach(), torch.cat([single.detach() for single in singles]))


def test_quantised_momentum_stays_near_the_reference():
    params = make_params((128, 96))
    start, expected = params[0].detach().clone(), params[0].detach().double()
    momentum = torch.zeros(128, 96, dtype=torch.float64)
    optimizer = make_optimizer(params, min_8bit_size=0)
    for step in range(30):
        set_gradients(params, step)
        gradient = params[0].grad.double()
        reference_muon_step(expected, gradient, momentum, num_parts=1, lr=0.01, weight_decay=0.1)
        optimizer.step()
    moved, wanted = (params[0].detach() - start).double(), expected - start.double()
    assert optimizer.state[params[0]]["state1"].dtype == torch.uint8
    assert torch.cosine_similarity(moved.flatten(), wanted.flatten(), dim=0) > 0.99
    assert (params[0].detach() - expected).norm() / expected.norm() < 1e-2


def test_peers_that_compute_in_different_precision_stay_together(monkeypatch):
    """On some the products run in bfloat16, with their own rounding; all have the same averaged gradients."""
    exact, coarse = make_params((96, 64)), make_params((96, 64))
    for params, dtype in ((exact, torch.float32), (coarse, torch.bfloat16)):
        monkeypatch.setattr(
            muon, "newton_schulz_", lambda part, dtype=dtype: part.copy_(newton_schulz_(part.to(dtype)))
        )
        train(make_optimizer(params, min_8bit_size=0), params, range(50))
    assert not torch.equal(exact[0], coarse[0])
    assert (exact[0] - coarse[0]).norm() / exact[0].norm() < 1e-2


def test_chunked_equals_unchunked_bit_for_bit():
    chunked, whole = make_params((130, 100)), make_params((130, 100))
    optimizers = [
        make_optimizer(params, num_parts=2, min_8bit_size=0, update_chunk_size=size, max_grad_norm=1.0)
        for params, size in ((chunked, 4096), (whole, 2**20))
    ]
    train(optimizers[0], chunked, range(3))
    train(optimizers[1], whole, range(3))
    assert torch.equal(chunked[0], whole[0])
    assert_states_equal(*optimizers)


def test_gradients_are_clipped_over_all_parameters_before_the_momentum():
    clipped, scaled = make_params((64, 70), (40,)), make_params((64, 70), (40,))
    options = {"min_8bit_size": NEVER, "eps": 0.1}
    train(make_optimizer(clipped, max_grad_norm=0.5, **options), clipped, [1])
    optimizer = make_optimizer(scaled, **options)
    set_gradients(scaled, 1)
    torch.nn.utils.clip_grad_norm_(scaled, 0.5)
    norm = scaled[0].grad.norm()
    optimizer.step()
    torch.testing.assert_close(clipped[0], scaled[0])
    torch.testing.assert_close(clipped[1], scaled[1])
    torch.testing.assert_close(optimizer.state[scaled[0]]["state1"].norm(), norm)


@pytest.mark.parametrize("in_background", [False, True])
def test_prepare_leaves_parameters_and_state_alone_and_step_does_the_rest(in_background):
    params, others = make_params((64, 70), (5000,)), make_params((64, 70), (5000,))
    optimizer = make_optimizer(params, min_8bit_size=0, max_grad_norm=1.0, in_background=in_background)
    other = make_optimizer(others, min_8bit_size=0, max_grad_norm=1.0)
    for step in range(2):
        set_gradients(params, step)
        before, state = copy.deepcopy(params), copy.deepcopy(optimizer.state_dict())
        optimizer.prepare()
        assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
        untouched = make_optimizer(make_params((64, 70), (5000,)), min_8bit_size=0)
        untouched.load_state_dict(state)
        assert_states_equal(optimizer, untouched)
        optimizer.step()
        set_gradients(others, step)
        other.step()
    assert all(torch.equal(param, one) for param, one in zip(params, others, strict=True))
    assert_states_equal(optimizer, other)


def test_state_that_is_taken_between_prepare_and_step_stays():
    params = make_params((64, 70))
    optimizer, newer = (make_optimizer(params, min_8bit_size=0) for _ in range(2))
    train(newer, params, range(3))
    taken = copy.deepcopy(newer.state_dict())
    set_gradients(params, 4)
    optimizer.prepare()
    optimizer.load_state_dict(taken)
    before = params[0].detach().clone()
    optimizer.step()
    assert torch.equal(optimizer.state[params[0]]["state1"], newer.state[params[0]]["state1"])
    assert optimizer.state[params[0]]["step"] == 4 and not torch.equal(params[0], before)


def test_work_in_the_background_is_done_at_low_priority_and_nothing_of_it_stays():
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    seen, before = [], threading.active_count()
    muon.at_low_priority(lambda: seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
    assert seen == [max(own, muon.NICENESS)]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="as it was"):
        muon.at_low_priority(lambda: (_ for _ in ()).throw(RuntimeError("as it was")))


def test_gpu_without_memory_leaves_the_products_to_the_cpu(monkeypatch, caplog):
    params, expected = make_params((40, 50)), make_params((40, 50))
    optimizer = make_optimizer(params, min_8bit_size=0, device="cuda")

    def full(self, part):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(CPUMuon8Bit, "_orthogonalise_on_device", full)
    train(optimizer, params, range(2))
    train(make_optimizer(expected, min_8bit_size=0), expected, range(2))
    assert torch.equal(params[0], expected[0])
    assert [record.getMessage() for record in caplog.records] == [
        "cuda has no memory left for Muon's products, they go to the CPU from now on"
    ]


@pytest.mark.parametrize("bad_value", [float("nan"), float("inf")])
def test_step_with_non_finite_gradients_is_skipped_as_a_whole(bad_value):
    params = make_params((64, 70), (5000,))
    optimizer = make_optimizer(params, min_8bit_size=0)
    train(optimizer, params, [1])
    before, state = copy.deepcopy(params), copy.deepcopy(optimizer.state_dict())
    set_gradients(params, 2)
    params[1].grad[7] = bad_value
    optimizer.step()
    assert optimizer.num_skipped_steps == 1
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
    untouched = make_optimizer(params, min_8bit_size=0)
    untouched.load_state_dict(state)
    assert_states_equal(optimizer, untouched)
    train(optimizer, params, [2])
    assert not torch.equal(params[0], before[0])


def test_resumed_from_a_state_dict_continues_exactly():
    params = make_params((96, 100), (50,))
    optimizer = make_optimizer(params, num_parts=3, min_8bit_size=0)
    train(optimizer, params, range(3))
    restored_params = copy.deepcopy(params)
    restored = make_optimizer(restored_params, num_parts=3, min_8bit_size=0)
    restored.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert_states_equal(optimizer, restored)
    train(optimizer, params, range(3, 5))
    train(restored, restored_params, range(3, 5))
    assert all(torch.equal(param, other) for param, other in zip(params, restored_params, strict=True))


def test_state_of_lamb_is_refused():
    params = make_params((96, 100), (50,))
    lamb = make_optimizer(params, kind=CPULAMB8Bit)
    with pytest.raises(ValueError, match="parameter 1 has the keys"):
        make_optimizer(params).load_state_dict(lamb.state_dict())


def test_state_passes_through_hivemind_unchanged():
    averager = pytest.importorskip("hivemind.optim.state_averager")
    params = make_params((80, 80), (50,))
    optimizer, other = (make_optimizer(params, min_8bit_size=0) for _ in range(2))
    train(optimizer, params, range(2))
    metadata, tensors = averager.dump_optimizer_state(optimizer)
    averager.load_optimizer_state(other, metadata, [tensor.clone() for tensor in tensors])
    assert_states_equal(optimizer, other)


def test_groups_of_a_model_give_its_large_matrices_to_muon_in_their_parts():
    config = LeanAlbertConfig(vocab_size=50, embedding_size=8, hidden_size=16, num_hidden_layers=3, adapter_dim=2,
                              num_attention_heads=2, intermediate_size=32, share_large_matrices=1,
                              hidden_act_gated=True)  # fmt: skip
    model = LeanAlbertForPreTraining(config)
    lamb = parameter_groups(model, 0.1)
    decayed, exempt, *matrices = parameter_groups(model, 0.1, matrices=dense_matrices(model))
    block = model.albert.transformer.layer_groups[0].layers[0]
    names = {
        1: [block.attention.dense_out, block.ffn.dense_h2o],
        2: [block.ffn.dense_i2h],
        3: [block.attention.dense_qkv],
    }
    assert {group["num_parts"]: list(map(id, group["params"])) for group in matrices} == {
        parts: [id(linear.shared_matrix.weight) for linear in linears] for parts, linears in names.items()
    }
    assert {group["weight_decay"] for group in matrices} == {0.1}
    found = [id(param) for group in (decayed, exempt, *matrices) for param in group["params"]]
    assert sorted(found) == sorted(id(param) for group in lamb for param in group["params"])
    assert list(map(id, exempt["params"])) == list(map(id, lamb[1]["params"]))


def test_state_at_published_size_is_below_1_3_bytes_per_parameter():
    """Counted from the shapes: a state for each of them would be 340 MB."""
    config = LeanAlbertConfig.from_json_file(REPOSITORY / "recipes" / "ruleanalbert" / "config.json")
    with torch.device("meta"):
        model = LeanAlbertForPreTraining(config)
    groups = parameter_groups(model, 0.01, matrices=dense_matrices(model))
    sizes = [(param.numel(), group.get("num_parts", 0)) for group in groups for param in group["params"]]
    one = SimpleNamespace(numel=lambda: 2**20, shape=(2**20,))
    optimizer = CPUMuon8Bit([torch.nn.Parameter(torch.ones(1))])
    big = {parts: sum(value.nbytes for value in optimizer._initial_state(one, {"num_parts": parts}).values()
                      if isinstance(value, torch.Tensor)) / 2**20 for parts in (0, 1)}  # fmt: skip
    assert big == {0: 2 + 8 / 4096, 1: 1 + 4 / 4096}
    state = sum(size * (big[bool(parts)] if size >= 2**20 else 8) for size, parts in sizes)
    total = sum(size for size, _ in sizes)
    assert 294e6 < total < 296e6 and state / total < 1.3
    assert sum(size for size, parts in sizes if parts) / total > 0.9


@pytest.mark.parametrize(("options", "message"), [
    ({"momentum": 1.0}, r"^momentum must be in \[0, 1\)"),
    ({"num_parts": 3}, r"^num_parts=3 does not divide"),
])  # fmt: skip
def test_error_names_the_bad_option(options, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(make_params((4, 4)), **options)
