"""CPULAMB8Bit against recorded trajectories of the original, textbook LAMB, and the promises of its docstring."""

import copy
import io
import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from src.optim.lamb import CPULAMB8Bit

NEVER = 2**40  # a min_8bit_size no tensor reaches


def textbook_lamb_step(params, grads, moments, step, *, lr, betas, eps, weight_decay):
    """One step of LAMB, written for reading: 1904.00962 with the bias correction as a factor of the learning rate."""
    for param, grad, moment in zip(params, grads, moments, strict=True):
        moment[0] = betas[0] * moment[0] + (1 - betas[0]) * grad
        moment[1] = betas[1] * moment[1] + (1 - betas[1]) * grad**2
        update = moment[0] / (moment[1].sqrt() + eps) + weight_decay * param
        correction = math.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** step)
        param -= lr * correction * (param.norm() / update.norm()) * update


def make_params(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.1) for shape in shapes]


def set_gradients(params, step):
    """Gradients that depend on the step alone; magnitudes spread over four decades, as they do in a model."""
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        spread = 10 ** (torch.rand(param.shape, generator=generator) * 4 - 4)
        param.grad = torch.randn(param.shape, generator=generator) * spread


def train(optimizer, params, steps):
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def saved_and_loaded(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_states_equal(first, second):
    for state, other in zip(first.state.values(), second.state.values(), strict=True):
        assert state.keys() == other.keys()
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == other[key].dtype and torch.equal(value, other[key]), key
            else:
                assert value == other[key], key


@pytest.mark.parametrize("reuse_grad_buffers", [False, True])
@pytest.mark.parametrize("case", ["a", "b"])
def test_lamb_reproduces_recorded_trajectory(golden_dir, case, reuse_grad_buffers):
    facts = json.loads((golden_dir / f"lamb8bit_{case}.json").read_text())
    tensors = load_file(golden_dir / f"lamb8bit_{case}.safetensors")
    params = {name: torch.nn.Parameter(tensors[f"param/0/{name}"].clone()) for name in facts["shapes"]}
    groups = [dict(group, params=[params[name] for name in group["params"]]) for group in facts["param_groups"]]
    optimizer = CPULAMB8Bit(groups, **facts["arguments"], reuse_grad_buffers=reuse_grad_buffers)
    for record in facts["per_step"]:
        step = record["step"]
        for name, param in params.items():
            param.grad = tensors[f"grad/{step}/{name}"].float()
        optimizer.step()
        for name, param in params.items():
            torch.testing.assert_close(param.detach(), tensors[f"param/{step}/{name}"], atol=1e-6, rtol=0)
            state = optimizer.state[param]
            for key, value in record["tensors"][name].items():
                assert state[key] == pytest.approx(value, rel=1e-5), (step, name, key)
            for key in ("state1", "state2", "absmax1", "absmax2"):
                expected = tensors.get(f"state/{step}/{name}/{key}")
                if expected is None:
                    continue
                assert state[key].dtype == expected.dtype and state[key].shape == expected.shape
                if expected.dtype == torch.uint8:
                    assert (state[key].int() - expected.int()).abs().max() <= 1, (step, name, key)
                else:
                    torch.testing.assert_close(state[key], expected, rtol=1e-5, atol=1e-7)


def test_lamb_unquantised_is_textbook_lamb():
    options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    params = make_params((70, 80), (33,))
    reference = [param.detach().double() for param in params]
    moments = [[torch.zeros_like(param), torch.zeros_like(param)] for param in reference]
    optimizer = CPULAMB8Bit(params, **options, clamp_value=1e9, min_8bit_size=NEVER)
    for step in range(1, 6):
        set_gradients(params, step)
        textbook_lamb_step(reference, [param.grad.double() for param in params], moments, step, **options)
        optimizer.step()
    for param, expected in zip(params, reference, strict=True):
        torch.testing.assert_close(param.detach().double(), expected, atol=1e-6, rtol=1e-5)


def test_lamb_quantised_stays_near_unquantised():
    quantised, exact = make_params((128, 64)), make_params((128, 64))
    start = quantised[0].detach().clone()
    train(CPULAMB8Bit(quantised, lr=0.01, min_8bit_size=0), quantised, range(20))
    train(CPULAMB8Bit(exact, lr=0.01, min_8bit_size=NEVER), exact, range(20))
    moved, expected = (quantised[0] - start).flatten(), (exact[0] - start).flatten()
    assert torch.cosine_similarity(moved, expected, dim=0) > 0.97
    assert (moved - expected).norm() / expected.norm() < 0.25


@pytest.mark.parametrize("reuse_grad_buffers", [False, True])
@pytest.mark.parametrize("min_8bit_size", [0, NEVER])
def test_lamb_chunked_equals_unchunked_bit_for_bit(min_8bit_size, reuse_grad_buffers):
    shapes = (5 * 4096 + 1234,), (3, 4096), (777,)
    chunked, whole = make_params(*shapes), make_params(*shapes)
    options = {"min_8bit_size": min_8bit_size, "weight_decay": 0.01, "max_grad_norm": 1.0}
    optimizers = [
        CPULAMB8Bit(chunked, update_chunk_size=2 * 4096, reuse_grad_buffers=reuse_grad_buffers, **options),
        CPULAMB8Bit(whole, update_chunk_size=2**20, **options),
    ]
    train(optimizers[0], chunked, range(4))
    train(optimizers[1], whole, range(4))
    for param, expected in zip(chunked, whole, strict=True):
        assert torch.equal(param, expected)
    assert_states_equal(*optimizers)


def test_lamb_reuses_gradient_buffers_only_when_asked():
    params, reusing = make_params((64, 100)), make_params((64, 100))
    train(CPULAMB8Bit(params, min_8bit_size=0), params, [1])
    gradient = params[0].grad.clone()
    set_gradients(params, 1)
    assert torch.equal(gradient, params[0].grad)
    train(CPULAMB8Bit(reusing, min_8bit_size=0, reuse_grad_buffers=True), reusing, [1])
    assert not torch.equal(gradient, reusing[0].grad)
    assert torch.equal(params[0], reusing[0])


def test_lamb_state_is_allocated_at_once_and_takes_two_bytes_per_parameter():
    params = make_params((1024, 1024), (12, 4096), (4095,))
    optimizer = CPULAMB8Bit(params, min_8bit_size=4096)
    pointers = [state["state1"].data_ptr() for state in optimizer.state.values()]
    for param in params[:2]:
        tensors = [value for value in optimizer.state[param].values() if isinstance(value, torch.Tensor)]
        assert sum(tensor.nbytes for tensor in tensors) <= 2.01 * param.numel()
        assert {tensor.dtype for tensor in tensors} == {torch.uint8, torch.float32}
    assert optimizer.state[params[2]]["state1"].dtype == torch.float32
    structure = [sorted(state) for state in optimizer.state.values()]
    train(optimizer, params, [1])
    assert structure == [sorted(state) for state in optimizer.state.values()]
    assert pointers == [state["state1"].data_ptr() for state in optimizer.state.values()]


def test_lamb_initial_codes_mean_zero():
    param = make_params((4096,))[0]
    optimizer = CPULAMB8Bit([param], min_8bit_size=0, betas=(0.5, 0.5))
    optimizer.state[param]["absmax1"].fill_(1.0)
    optimizer.state[param]["absmax2"].fill_(1.0)
    reference = make_params((4096,))[0]
    train(optimizer, [param], [1])
    train(CPULAMB8Bit([reference], min_8bit_size=0, betas=(0.5, 0.5)), [reference], [1])
    assert torch.equal(param, reference)


def test_lamb_resumed_from_state_dict_continues_exactly():
    params = make_params((96, 100), (50,))
    optimizer = CPULAMB8Bit(params, lr=0.01, min_8bit_size=0)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5)
    train(optimizer, params, range(3))
    state_dict = saved_and_loaded(optimizer.state_dict())
    restored_params = copy.deepcopy(params)
    restored = CPULAMB8Bit(restored_params, lr=0.7, min_8bit_size=0)
    codes = restored.state[restored_params[0]]["state1"]
    restored.load_state_dict(state_dict)
    assert codes is restored.state[restored_params[0]]["state1"] and codes.dtype == torch.uint8
    assert_states_equal(optimizer, restored)
    options, expected = ({k: v for k, v in o.param_groups[0].items() if k != "params"} for o in (restored, optimizer))
    assert options == expected and options["lr"] == 0.005
    train(optimizer, params, range(3, 5))
    train(restored, restored_params, range(3, 5))
    assert all(torch.equal(param, other) for param, other in zip(params, restored_params, strict=True))


def test_lamb_loaded_state_is_a_copy():
    params = make_params((4096,))
    optimizer = CPULAMB8Bit(params, min_8bit_size=0)
    state_dict = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state_dict)
    train(optimizer, params, [1])
    assert state_dict["state"][0]["step"] == 0 and state_dict["state"][0]["absmax1"].eq(0).all()


def change(state_dict, key, value):
    state_dict["state"][1][key] = value


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda s: change(s, "state1", s["state"][1]["state1"].float()), "parameter 1: state1 is torch.float32"),
        (lambda s: change(s, "absmax2", torch.zeros(7)), r"parameter 1: absmax2 is torch.float32 \(7,\), expected"),
        (lambda s: change(s, "absmax2", 1.0), "parameter 1: absmax2 must be a tensor, got float"),
        (lambda s: change(s, "step", torch.tensor(3)), "parameter 1: step must be a number, got Tensor"),
        (lambda s: change(s, "qmap1", torch.zeros(256)), "parameter 1 has the keys .*min_8bit_size"),
        (lambda s: s["state"][1].pop("absmax1"), "parameter 1 has the keys .*min_8bit_size"),
        (lambda s: s["state"].pop(1), "no entry for parameter 1"),
        (lambda s: s["param_groups"][0]["params"].pop(), r"groups of \[1\] parameters, expected \[2\]"),
        (lambda s: s["param_groups"][0].pop("lr"), r"lacks the group options \['lr'\]"),
    ],
)
def test_lamb_refuses_a_state_that_does_not_fit_and_stays_unchanged(spoil, message):
    params = make_params((64, 64), (64, 64))
    optimizer, other = (CPULAMB8Bit(params, min_8bit_size=0) for _ in range(2))
    train(optimizer, params, [1])
    state_dict = copy.deepcopy(optimizer.state_dict())
    spoil(state_dict)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state_dict)
    assert_states_equal(other, CPULAMB8Bit(params, min_8bit_size=0))


def test_lamb_state_passes_through_hivemind_unchanged():
    averager = pytest.importorskip("hivemind.optim.state_averager")
    params = make_params((80, 80), (50,))
    optimizer, other = (CPULAMB8Bit(params, min_8bit_size=0) for _ in range(2))
    train(optimizer, params, range(2))
    metadata, tensors = averager.dump_optimizer_state(optimizer)
    values = [entry["value"] for entry in metadata if entry["type"] == "value"]
    assert all(isinstance(value, bool | int | float) for value in values)
    averager.load_optimizer_state(other, metadata, [tensor.clone() for tensor in tensors])
    assert_states_equal(optimizer, other)


@pytest.mark.parametrize("bad_value", [float("nan"), float("inf")])
def test_lamb_skips_a_step_with_non_finite_gradients_as_a_whole(bad_value, caplog):
    params = make_params((64, 100), (40,))
    optimizer = CPULAMB8Bit(params, min_8bit_size=0, reuse_grad_buffers=True)
    train(optimizer, params, [1])
    params_before, state_before = copy.deepcopy(params), copy.deepcopy(optimizer.state_dict())
    for num_skipped in (1, 2):
        set_gradients(params, 2)
        params[1].grad[7] = bad_value
        optimizer.step()
        assert optimizer.num_skipped_steps == num_skipped == len(caplog.records)
    assert all(torch.equal(param, before) for param, before in zip(params, params_before, strict=True))
    untouched = CPULAMB8Bit(params, min_8bit_size=0)
    untouched.load_state_dict(state_before)
    assert_states_equal(optimizer, untouched)
    train(optimizer, params, [2])
    assert not torch.equal(params[0], params_before[0]) and optimizer.num_skipped_steps == 2


def test_lamb_clips_by_the_norm_over_all_groups():
    clipped, scaled = make_params((64, 100), (40,)), make_params((64, 100), (40,))
    options = {"min_8bit_size": 0, "eps": 0.1}
    optimizer = CPULAMB8Bit([{"params": [param]} for param in clipped], max_grad_norm=0.5, **options)
    train(optimizer, clipped, [1])
    set_gradients(scaled, 1)
    torch.nn.utils.clip_grad_norm_(scaled, 0.5)
    CPULAMB8Bit(scaled, **options).step()
    for param, expected in zip(clipped, scaled, strict=True):
        torch.testing.assert_close(param, expected, atol=1e-6, rtol=0)


def test_lamb_at_zero_learning_rate_moves_statistics_only():
    params = make_params((4096,))
    before = params[0].detach().clone()
    optimizer = CPULAMB8Bit(params, lr=1.0, min_8bit_size=0)
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, params, [1])
    assert torch.equal(before, params[0]) and optimizer.state[params[0]]["absmax1"].item() > 0


def test_lamb_moves_all_zero_parameters_with_a_trust_ratio_of_one():
    param = torch.nn.Parameter(torch.zeros(40, 2))
    optimizer = CPULAMB8Bit([param], lr=0.01, betas=(0.9, 0.9), eps=1e-12)
    for gradient in (torch.zeros(40, 2), torch.full((40, 2), -3.0)):
        param.grad = gradient
        optimizer.step()
        assert optimizer.state[param]["trust_ratio"] == 1.0
    # m / sqrt(v) = 0.3 / sqrt(0.9), bias correction sqrt(1 - 0.9^2) / (1 - 0.9^2)
    expected = 0.01 * 0.3 / math.sqrt(0.9) / math.sqrt(1 - 0.9**2)
    torch.testing.assert_close(param.detach(), torch.full((40, 2), expected))


def test_lamb_leaves_parameters_without_gradient_alone():
    params = make_params((4096,), (4096,))
    before = params[1].detach().clone()
    optimizer = CPULAMB8Bit(params, min_8bit_size=0, weight_decay=0.1)
    set_gradients(params[:1], 1)
    optimizer.step()
    assert torch.equal(before, params[1]) and optimizer.state[params[1]]["step"] == 0


def test_lamb_updates_transposed_parameters_and_all_zero_gradients():
    contiguous = make_params((80, 90))[0]
    transposed = torch.nn.Parameter(contiguous.detach().clone().t())
    for param in (contiguous, transposed):
        optimizer = CPULAMB8Bit([param], min_8bit_size=0, reuse_grad_buffers=True)
        for gradient in (torch.ones(80, 90), torch.linspace(-1, 1, 7200).view(80, 90), torch.zeros(80, 90)):
            param.grad = gradient if param is contiguous else gradient.t()
            optimizer.step()
            assert param.isfinite().all()
    torch.testing.assert_close(contiguous.detach(), transposed.detach().t(), atol=5e-4, rtol=0)


def test_lamb_step_returns_the_loss_of_the_closure():
    param = make_params((4096,))[0]
    optimizer = CPULAMB8Bit([param], min_8bit_size=0)

    def closure():
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > optimizer.step(closure) > 0


@pytest.mark.parametrize(
    "option, value",
    [
        ("lr", -1.0),
        ("betas", (0.9, 1.0)),
        ("eps", 0.0),
        ("weight_decay", -0.1),
        ("clamp_value", 0.0),
        ("min_8bit_size", -1),
        ("update_chunk_size", 5000),
        ("max_grad_norm", 0.0),
    ],
)
def test_lamb_error_names_the_bad_option(option, value):
    with pytest.raises(ValueError, match=f"^{option} must be"):
        CPULAMB8Bit(make_params((4,)), **{option: value})


def test_lamb_imports_bitsandbytes_only_to_quantise():
    program = (
        "import sys, torch\n"
        "from src.optim.lamb import CPULAMB8Bit\n"
        "CPULAMB8Bit([torch.nn.Parameter(torch.ones(9))])\n"
        "assert 'bitsandbytes' not in sys.modules\n"
        "CPULAMB8Bit([torch.nn.Parameter(torch.ones(4096))], min_8bit_size=0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
