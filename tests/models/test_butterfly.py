import pytest
import torch
import torch.nn.functional as F

from src import LeanAlbertModel
from src.models.butterfly import ButterflyMatrix, butterfly_indices
from src.models.transformer import LeanTransformer


def make_matrix(in_features, out_features, **options):
    matrix = ButterflyMatrix(in_features, out_features, block_size=4, **options).double()
    with torch.no_grad():
        matrix.weight.copy_(torch.randn(matrix.weight.shape, generator=torch.Generator().manual_seed(0)))
    return matrix


def to_dense(matrix):
    """[out_features, in_features], one block after the other as the class documents its weight."""
    size = matrix.block_size
    dense = torch.zeros(matrix.out_features, matrix.in_features, dtype=matrix.weight.dtype)
    for i, targets in enumerate(matrix.backward_indices.tolist()):
        blocks = matrix.weight[i * size : (i + 1) * size].reshape(len(targets), size, size)
        for block, target in zip(blocks, targets, strict=True):
            dense[target * size : (target + 1) * size, i * size : (i + 1) * size] = block
    return dense


@pytest.mark.parametrize(("in_features", "out_features"), [(16, 16), (16, 48), (64, 16), (4, 8), (32, 32)])
def test_butterfly_product_and_gradients_equal_the_dense_matrix(in_features, out_features):
    matrix = make_matrix(in_features, out_features)
    inputs = torch.randn(2, 3, in_features, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(out_features, dtype=torch.float64, requires_grad=True)
    dense = to_dense(matrix)
    sources = (inputs, matrix.weight, bias)
    for prepare in (None, F.gelu):
        actual = matrix.multiply(inputs, bias, prepare=prepare)
        expected = F.linear(inputs if prepare is None else prepare(inputs), to_dense(matrix), bias)
        torch.testing.assert_close(actual, expected)
        gradients = torch.autograd.grad(actual.square().sum(), sources)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), sources))
    blocks = min(in_features, out_features) // 4
    share = (dense != 0).double().mean().item()
    assert share == pytest.approx(blocks.bit_length() / blocks)


def test_butterfly_connects_blocks_that_differ_in_one_bit():
    forward_indices, backward_indices = butterfly_indices(32, 64, 4)
    for i, targets in enumerate(backward_indices.tolist()):
        assert targets == [target for target in range(16) if (target % 8 ^ i).bit_count() <= 1]
    sources = forward_indices // backward_indices.shape[1]
    assert (backward_indices.flatten()[forward_indices.long()] == torch.arange(16)[:, None]).all()
    assert all((target % 8 ^ int(i)).bit_count() <= 1 for target, row in enumerate(sources) for i in row)
    assert (forward_indices.dtype, backward_indices.dtype) == (torch.int32, torch.int64)


@pytest.mark.parametrize(("in_features", "out_features"), [(24, 24), (16, 40), (18, 16)])
def test_butterfly_refuses_sizes_it_cannot_tile(in_features, out_features):
    with pytest.raises(ValueError, match="block_size=4"):
        butterfly_indices(in_features, out_features, 4)


def test_butterfly_model_survives_saving(tiny_config, randomise, encoder_inputs, tmp_path):
    config = tiny_config(intermediate_size=64, block_size=8, lowrank_dim=2, share_large_matrices=True)
    model = randomise(LeanAlbertModel(config)).eval()
    model.save_pretrained(tmp_path)
    loaded, info = LeanAlbertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    expected = model(**encoder_inputs).last_hidden_state
    assert torch.equal(loaded.eval()(**encoder_inputs).last_hidden_state, expected)


def test_butterfly_activations_are_recomputed(tiny_config):
    config = tiny_config(hidden_size=64, intermediate_size=256, block_size=16, num_hidden_layers=1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        LeanTransformer(config).apply(initialise)(torch.randn(2, 8, 64))
    wide = [tensor for tensor in kept if tensor.numel() == 2 * 8 * 256]
    assert len({tensor.data_ptr() for tensor in wide}) <= 1


def initialise(module):
    for parameter in module.parameters(recurse=False):
        torch.nn.init.normal_(parameter, std=0.1)
