from functools import partial

import pytest
import torch
import torch.nn.functional as F

from src import LeanAlbertModel
from src.models.shared_linear import PreparedLinear, SharedLinear, SharedMatrix, shared_matrix_index

MATRICES = ("attention.dense_qkv", "attention.dense_out", "ffn.dense_i2h", "ffn.dense_h2o")


def normalise(inputs, weight, bias):
    return F.layer_norm(inputs, inputs.shape[-1:], weight, bias)


def gate(inputs):
    first, second = inputs.chunk(2, dim=-1)
    return F.gelu(first) * second


def random(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()


def test_prepared_linear_gradients_match_finite_differences():
    norm = (random(3, 2, 6), random(5, 6), random(5), random(6), random(6))
    assert torch.autograd.gradcheck(partial(PreparedLinear.apply, normalise, None), norm)
    assert torch.autograd.gradcheck(
        partial(PreparedLinear.apply, gate, None), (random(3, 2, 6), random(5, 3), random(5))
    )
    assert torch.autograd.gradcheck(partial(PreparedLinear.apply, F.gelu, None), (random(3, 6), random(5, 6), None))


@pytest.mark.parametrize("frozen", range(5))
def test_prepared_linear_skips_gradients_that_nobody_needs(frozen):
    tensors = [random(3, 6), random(5, 6), random(5), random(6), random(6)]
    tensors[frozen].requires_grad_(False)
    inputs, weight, bias, *norm = tensors
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    actual = torch.autograd.grad(PreparedLinear.apply(normalise, None, *tensors).square().sum(), wanted)
    expected = torch.autograd.grad(F.linear(normalise(inputs, *norm), weight, bias).square().sum(), wanted)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("autocast_backward", [False, True])
def test_prepared_linear_under_autocast_equals_plain_linear(autocast_backward):
    tensors = [random(2, 7, 6, dtype=torch.float32), random(5, 6, dtype=torch.float32)]
    tensors += [random(size, dtype=torch.float32) for size in (5, 6, 6)]
    inputs, weight, bias, *norm = tensors
    gradients = []
    for function in (
        lambda: PreparedLinear.apply(normalise, None, *tensors),
        lambda: F.linear(normalise(inputs, *norm), weight, bias),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = function()
        assert outputs.dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast_backward):
            gradients.append(torch.autograd.grad(outputs.float().square().sum(), tensors))
    assert all(gradient.dtype == torch.float32 for gradient in gradients[0])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize("forward_enabled", [False, True])
def test_prepared_linear_prepares_in_backward_under_the_autocast_of_forward(forward_enabled):
    seen = []

    def prepare(inputs):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return inputs * 2

    inputs, weight = random(3, 6, dtype=torch.float32), random(5, 6, dtype=torch.float32)
    with torch.autocast("cpu", torch.float16, enabled=forward_enabled):
        outputs = PreparedLinear.apply(prepare, None, inputs, weight, None)
    with torch.autocast("cpu", torch.bfloat16, enabled=not forward_enabled):
        outputs.float().sum().backward()
    assert len(seen) == 2
    assert seen[0] == seen[1]


def test_shared_linear_adds_low_rank_term_and_adapter():
    layer = SharedLinear(SharedMatrix(6, 5, lowrank_dim=2), adapter_dim=3).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(random(*parameter.shape))
    matrix = layer.shared_matrix
    weight = matrix.weight + matrix.lowrank_second @ matrix.lowrank_first + layer.adapter_second @ layer.adapter_first
    inputs = random(2, 3, 6)
    torch.testing.assert_close(layer(inputs), inputs @ weight.T + layer.bias)
    norm = (random(6), random(6))
    torch.testing.assert_close(layer(inputs, normalise, *norm), normalise(inputs, *norm) @ weight.T + layer.bias)


@pytest.mark.parametrize(
    ("num_shared", "num_inner", "expected"),
    [
        (0, 1, [0, 1, 2, 3, 4, 5]),
        (1, 1, [0, 0, 0, 0, 0, 0]),
        (2, 1, [0, 0, 0, 1, 1, 1]),
        (1, 2, [0, 1, 0, 1, 0, 1]),
        (2, 2, [0, 1, 0, 3, 2, 3]),
        (6, 1, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_shared_matrix_index_table(num_shared, num_inner, expected):
    indices = [
        shared_matrix_index(block, num_blocks=6, num_shared=num_shared, num_inner_matrices=num_inner)
        for block in range(6)
    ]
    assert indices == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"share_large_matrices": True}, [0, 0, 0, 0]),
        ({"share_large_matrices": 2}, [0, 0, 1, 1]),
        ({"share_large_matrices": True, "num_inner_matrices": 2}, [0, 1, 0, 1]),
        (
            {"share_large_matrices": True, "num_inner_matrices": 2, "num_hidden_groups": 2, "num_inner_groups": 2},
            [0, 1, 0, 1],
        ),
    ],
)
def test_layers_hold_the_same_matrix_exactly_where_configured(tiny_config, options, expected):
    model = LeanAlbertModel(tiny_config(num_hidden_layers=4, adapter_dim=2, **options))
    layers = [layer for group in model.transformer.layer_groups for layer in group.layers]
    for name in MATRICES:
        linears = [layer.get_submodule(name) for layer in layers]
        for i, first in enumerate(linears):
            for j, second in enumerate(linears):
                assert (first.shared_matrix is second.shared_matrix) == (expected[i] == expected[j])
                assert (first.shared_matrix.weight is second.shared_matrix.weight) == (expected[i] == expected[j])
                assert (first.adapter_first is second.adapter_first) == (i == j)


def test_two_models_from_equal_configs_share_nothing(tiny_config):
    storages = [
        {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
        for model in (LeanAlbertModel(tiny_config(share_large_matrices=True, lowrank_dim=2)) for _ in range(2))
    ]
    assert not storages[0] & storages[1]
    config = tiny_config(share_large_matrices=True)
    first, second = LeanAlbertModel(config), LeanAlbertModel(config)
    assert not {id(parameter) for parameter in first.parameters()} & {id(p) for p in second.parameters()}
