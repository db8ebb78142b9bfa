"""The numba kernel of CPULAMB8Bit: right codes, the arithmetic of the reference path, the same state format."""

import copy
import os
import time
import tracemalloc

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import lamb_step
from benchmarks.reference.whole_tensor_lamb import WholeTensorLAMB8Bit
from src.optim.lamb import CPULAMB8Bit, _code_books

pytest.importorskip("numba")

from src.optim import lamb_kernel

NEVER = 2**40  # a min_8bit_size no tensor reaches


def lognormal(shape, spread, *, seed):
    """Values of random sign whose magnitudes spread over ``spread`` natural units (one standard deviation)."""
    generator = torch.Generator().manual_seed(seed)
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return sign * torch.exp(spread * torch.randn(shape, generator=generator)) * 1e-3


def make_optimizer(*shapes, **options):
    params = [torch.nn.Parameter(lognormal(shape, 1.0, seed=index)) for index, shape in enumerate(shapes)]
    options = {"lr": 0.01, "weight_decay": 1.0, "min_8bit_size": 0, "kernel": "numba"} | options
    return CPULAMB8Bit(params, **options), params


def train(optimizer, steps, *, spread=1.0):
    for step in steps:
        for param in optimizer.param_groups[0]["params"]:
            param.grad = lognormal(param.shape, spread, seed=1000 + step)
        optimizer.step()


def assert_states_equal(first, second):
    for state, other in zip(first.state.values(), second.state.values(), strict=True):
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key


def distance_to_codes(values, codes, book):
    return (book[codes.long()] - values).abs()


def interval_edges(first_items):
    """Entries c - 1 and c enclose the values that code c of the unsigned book stands for; 255 stands for 1 alone."""
    decades = [np.linspace(10.0 ** (i - 7), 10.0 ** (i - 6), first_items * 2**i + 1)[:-1] for i in range(7)]
    return torch.tensor(np.concatenate([*decades, [1.0, 1.0]]))


def test_kernel_takes_nearest_codes_for_first_moments_and_never_zero_for_a_positive_second_moment():
    optimizer, (param,) = make_optimizer((16 * 4096 + 100,), betas=(0.0, 0.0), lr=0.0)
    param.grad = lognormal(param.shape, 3.0, seed=5)
    param.grad[::7] = 0.0
    optimizer.step()
    state = optimizer.state[param]
    signed_book, _ = _code_books()
    blocks = torch.arange(param.numel()) // 4096
    values1, values2 = param.grad / state["absmax1"][blocks], param.grad**2 / state["absmax2"][blocks]
    nearest1 = (values1[:, None] - signed_book).abs().amin(dim=1)
    edges = interval_edges(first_items=2)
    positive = values2 > 0
    assert (distance_to_codes(values1, state["state1"], signed_book) <= nearest1 * (1 + 1e-5) + 1e-12).all()
    codes2 = state["state2"][positive].long()
    low, high = edges[codes2 - 1], edges[codes2]  # of the interval each code stands for
    below_the_book = (codes2 == 1) & (values2[positive] < 1e-7)
    assert ((low <= values2[positive] * (1 + 1e-5)) | below_the_book).all()
    assert (values2[positive] <= high * (1 + 1e-5)).all()
    assert (state["state2"] > 0).equal(positive)
    assert (state["state1"] == 127)[~positive].all()
    assert state["state1"].max() == 255 and state["state1"].min() == 0 and state["state2"].max() == 255


@pytest.mark.parametrize("first_items, book", [(1, "signed"), (2, "unsigned")])
def test_kernel_knows_every_value_of_the_code_books(first_items, book):
    values = _code_books()[0 if book == "signed" else 1].numpy()
    smallest, scale, offset, last = lamb_kernel._decades(first_items)
    magnitudes = values[values > 0]
    decade = np.searchsorted(smallest, magnitudes, side="right") - 1
    codes = np.minimum((scale[decade] * magnitudes + offset[decade]).astype(int), last[decade])
    assert codes.tolist() == list(range(1, magnitudes.size + 1))


def test_kernel_updates_like_the_bitsandbytes_path_from_the_same_state():
    start, _ = make_optimizer((5 * 4096 + 321,), (3, 4096), kernel="bitsandbytes", max_grad_norm=0.1)
    train(start, range(3))
    results = {}
    for kernel in ("numba", "bitsandbytes"):
        optimizer, params = make_optimizer((5 * 4096 + 321,), (3, 4096), kernel=kernel, max_grad_norm=0.1)
        optimizer.load_state_dict(copy.deepcopy(start.state_dict()))
        train(optimizer, [3])
        results[kernel] = optimizer, params
    for param, expected in zip(results["numba"][1], results["bitsandbytes"][1], strict=True):
        torch.testing.assert_close(param, expected, atol=1e-7, rtol=1e-5)
    for state, expected in zip(*(result[0].state.values() for result in results.values()), strict=True):
        assert state.keys() == expected.keys() and state["step"] == 4
        for key in ("absmax1", "absmax2"):
            torch.testing.assert_close(state[key], expected[key], rtol=1e-5, atol=0)
        for key in ("weight_norm", "step_norm", "trust_ratio"):
            assert state[key] == pytest.approx(expected[key], rel=1e-5)


@pytest.mark.parametrize("num_threads", [2, 3])
def test_kernel_result_does_not_depend_on_threads_or_gradient_buffers(num_threads, monkeypatch):
    monkeypatch.setattr(lamb_kernel, "MIN_BLOCKS_PER_THREAD", 2)
    one_thread, expected = make_optimizer((11 * 4096 + 5,))
    train(one_thread, range(3))
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    optimizer, params = make_optimizer((11 * 4096 + 5,), reuse_grad_buffers=True)
    train(optimizer, range(3))
    assert torch.equal(params[0], expected[0])
    assert_states_equal(optimizer, one_thread)


@pytest.mark.parametrize("spread, lowest_cosine", [(1.0, 0.985), (1.5, 0.95), (2.0, 0.8)])
def test_kernel_stays_nearer_to_float32_statistics_than_the_original(spread, lowest_cosine):
    moved = lamb_step.last_moves(spread, num_values=2**16)
    cosine = {name: torch.cosine_similarity(moved[name], moved["fp32"], dim=0) for name in ("ours", "original")}
    assert cosine["ours"] > lowest_cosine and cosine["ours"] > cosine["original"] + 0.005
    assert moved["ours"].abs().max() < 4 * moved["fp32"].abs().max()


class LargestAllocation(TorchDispatchMode):
    """The largest tensor, in bytes, that an operation made outside of the memory of its arguments."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("kernel", ["numba", "bitsandbytes"])
@pytest.mark.parametrize("min_8bit_size", [0, NEVER])
def test_lamb_step_makes_no_temporary_above_a_megabyte(kernel, min_8bit_size):
    optimizer, _ = make_optimizer((3 * 2**18 + 100,), kernel=kernel, min_8bit_size=min_8bit_size,
                                  reuse_grad_buffers=True, max_grad_norm=0.1)  # fmt: skip
    train(optimizer, [1])
    optimizer.param_groups[0]["params"][0].grad.fill_(0.01)
    tracemalloc.start()
    try:
        with LargestAllocation() as allocations:
            optimizer.step()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert allocations.largest <= 10**6 and peak <= 10**6


def test_kernel_scratch_of_a_thread_is_small_and_it_releases_the_interpreter_lock():
    assert lamb_kernel.BLOCK_SIZE * 4 * 2 + 256 * 4 * 2 < 10**5
    assert lamb_kernel.update_blocks.targetoptions["nogil"] is True


def test_reference_of_the_original_is_the_bitsandbytes_path():
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1, "max_grad_norm": 0.01}
    first, second = ([torch.nn.Parameter(lognormal((9000,), 1.0, seed=3))] for _ in range(2))
    original = WholeTensorLAMB8Bit(first, **settings)
    checked = CPULAMB8Bit(second, **settings, clamp_value=1e9, min_8bit_size=0, kernel="bitsandbytes")
    for step in range(4):
        for (param,), optimizer in ((first, original), (second, checked)):
            param.grad = lognormal((9000,), 1.0, seed=100 + step)
            optimizer.step()
    torch.testing.assert_close(first[0], second[0], atol=1e-6, rtol=1e-5)
    assert (original.moments[0][0][0].int() - checked.state[second[0]]["state1"].int()).abs().max() <= 1


def test_kernel_survives_blocks_of_zeros_and_denormal_gradients():
    optimizer, (param,) = make_optimizer((3 * 4096,))
    for value in (0.0, 1e-42, 1e-30, 1e-3, 0.0):
        param.grad = torch.zeros_like(param)
        param.grad[:4096] = value
        optimizer.step()
        assert param.isfinite().all()
    codes = optimizer.state[param]["state1"]
    assert (codes[4096:] == 127).all() and (codes[:4096] == 255).all()


def test_kernel_state_moves_to_the_bitsandbytes_path_and_back():
    first, params = make_optimizer((9000,), (50,))
    train(first, range(2))
    second, _ = make_optimizer((9000,), (50,), kernel="bitsandbytes")
    second.load_state_dict(first.state_dict())
    assert_states_equal(first, second)
    train(second, [2])
    first.load_state_dict(second.state_dict())
    train(first, [3])
    assert first.state[params[0]]["step"] == 4 and params[0].isfinite().all()


def test_kernel_leaves_odd_tensors_to_the_general_path():
    contiguous, transposed = (torch.nn.Parameter(lognormal((80, 90), 1.0, seed=1)) for _ in range(2))
    transposed.data = transposed.data.t().contiguous().t()
    for param in (contiguous, transposed):
        param.grad = lognormal((80, 90), 1.0, seed=2)
        CPULAMB8Bit([param], min_8bit_size=0, kernel="numba").step()
    torch.testing.assert_close(contiguous, transposed, atol=1e-7, rtol=1e-5)


def test_kernel_skips_a_step_with_non_finite_gradients():
    optimizer, (param,) = make_optimizer((4096,))
    train(optimizer, [1])
    before, state_before = param.detach().clone(), copy.deepcopy(optimizer.state_dict())
    param.grad[5] = float("nan")
    optimizer.step()
    assert torch.equal(param, before) and optimizer.num_skipped_steps == 1
    other, _ = make_optimizer((4096,))
    other.load_state_dict(state_before)
    assert_states_equal(optimizer, other)


def test_kernel_works_in_a_forked_process(monkeypatch):
    monkeypatch.setattr(lamb_kernel, "MIN_BLOCKS_PER_THREAD", 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    optimizer, _ = make_optimizer((8 * 4096,))
    train(optimizer, [1])
    child = os.fork()
    if child == 0:
        train(optimizer, [2])
        os._exit(33)
    give_up_at = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > give_up_at:
            os.kill(child, 9)
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(ended[1]) == 33


def test_kernel_is_compiled_once_and_by_the_constructor():
    optimizer, _ = make_optimizer((9000,))
    compiled = list(lamb_kernel.update_blocks.signatures)
    train(optimizer, [1])
    assert len(compiled) == 1 and lamb_kernel.update_blocks.signatures == compiled


def test_kernel_auto_is_numba_and_the_default_is_the_original_arithmetic():
    param = torch.nn.Parameter(torch.zeros(4))
    assert CPULAMB8Bit([param], kernel="auto").kernel == "numba"
    assert CPULAMB8Bit([param]).kernel == "bitsandbytes"
    with pytest.raises(ValueError, match=r"^kernel must be .*'triton'"):
        CPULAMB8Bit([param], kernel="triton")


def test_kernel_auto_does_without_numba(monkeypatch):
    param = torch.nn.Parameter(torch.zeros(4))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert CPULAMB8Bit([param], kernel="auto").kernel == "bitsandbytes"
    with pytest.raises(ValueError, match=r"^kernel must be .* numba is not installed"):
        CPULAMB8Bit([param], kernel="numba")
