"""Attention in blocks of queries equals torch's kernel, and is used only where it is faster."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.kept_bytes import kept_bytes
from src import LeanAlbertForPreTraining, LeanAlbertModel
from src.models import attention_core as module
from src.models.attention_core import BlockedAttention, attention_core

KEYS = torch.ones(3, 1, 1, 70, dtype=torch.bool)
KEYS[1, ..., 40:] = False
SEQUENCES = (torch.arange(70) // 30)[:, None] == torch.arange(70) // 30  # three that do not see each other
MASKS = {"all": None, "padded": KEYS, "packed": SEQUENCES[None, None], "by head": torch.rand(3, 2, 70, 70) > 0.5}
MASKS["by head"] |= torch.eye(70, dtype=torch.bool)


@pytest.fixture
def blocks(monkeypatch) -> None:
    """Blocks of a few queries for every sequence, on every processor."""
    monkeypatch.setattr(module, "SCORES_AT_ONCE", 70 * 16)
    monkeypatch.setattr(module, "MIN_LENGTH_PER_THREAD", 0)
    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


def make_inputs(dtype, *, batch=3, heads=2, length=70, head_size=8):
    """Queries laid out by token, keys and values by head, as the model has them, and a gradient."""
    generator = torch.Generator().manual_seed(0)
    query, gradient = torch.randn(2, batch, length, heads, head_size, generator=generator).transpose(2, 3).to(dtype)
    key, value = torch.randn(2, batch, heads, length, head_size, generator=generator).to(dtype)
    return [tensor.detach().requires_grad_() for tensor in (query, key, value)], gradient


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_blocks_give_attention_and_its_gradients(blocks, dtype, tolerance, mask):
    inputs, gradient = make_inputs(dtype)
    outputs = BlockedAttention.apply(*inputs, MASKS[mask])
    assert outputs.dtype == dtype and outputs.stride() == inputs[0].stride()
    found = [outputs, *torch.autograd.grad(outputs, inputs, gradient)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = F.scaled_dot_product_attention(*exact, attn_mask=MASKS[mask])
    expected = [expected, *torch.autograd.grad(expected, exact, gradient.double())]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def test_blocks_of_bf16_are_closer_to_the_exact_result_than_torchs_kernel(blocks):
    inputs, _ = make_inputs(torch.bfloat16)
    exact = F.scaled_dot_product_attention(*(tensor.double() for tensor in inputs))
    errors = [
        (function(*inputs).double() - exact).norm()
        for function in (lambda *tensors: BlockedAttention.apply(*tensors, None), F.scaled_dot_product_attention)
    ]
    assert errors[0] <= errors[1]


def test_gradients_of_blocks_in_fp64(blocks):
    inputs, _ = make_inputs(torch.float64, batch=2, length=5, head_size=4)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[1, ..., 3:] = False
    assert torch.autograd.gradcheck(lambda *tensors: BlockedAttention.apply(*tensors, mask), inputs)


def model_gradients(model, batch, *, autocast):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**batch).loss
    loss.backward()
    return loss, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("level", ["default", "lean", "checkpoint"])
@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-5), (True, 0.1)])
def test_model_trains_the_same_in_blocks(tiny_config, randomise, batch, monkeypatch, level, autocast, tolerance):
    config = tiny_config(activation_memory=level, hidden_dropout_prob=0.0, classifier_dropout_prob=0.0)
    model = randomise(LeanAlbertForPreTraining(config)).train()
    loss, expected = model_gradients(model, batch, autocast=False)
    used = []
    monkeypatch.setattr(module, "_suits_blocks", lambda query, dropout_prob: used.append(query.dtype) or True)
    monkeypatch.setattr(module, "SCORES_AT_ONCE", 33)
    found_loss, found = model_gradients(model, batch, autocast=autocast)
    assert len(used) == config.num_hidden_layers * (2 if level == "checkpoint" else 1)
    assert set(used) == {torch.bfloat16 if autocast else torch.float32}
    torch.testing.assert_close(found_loss, loss, rtol=tolerance, atol=0)
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= tolerance * expected[name].norm() + 1e-6, name


@pytest.mark.parametrize(("level", "units"), [("default", 10), ("lean", 2), ("checkpoint", 1)])
def test_blocks_keep_no_number_besides(tiny_config, blocks, level, units):
    inputs = torch.randn(2, 128, 16)
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "max_position_embeddings": 128}
    kept = []
    for layers in (2, 3):
        config = tiny_config(**sizes, num_hidden_layers=layers, activation_memory=level)
        model = LeanAlbertModel(config, add_pooling_layer=False).train()
        kept.append(kept_bytes(lambda model=model: model(inputs_embeds=inputs).last_hidden_state, model.parameters()))
    assert kept[1] - kept[0] == units * 2 * 128 * 4 * 256


def test_blocks_are_used_where_they_are_faster(monkeypatch):
    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    long, short = torch.zeros(1, 1, 512, 8), torch.zeros(1, 1, 511, 8)
    assert module._suits_blocks(long, 0.0) and module._suits_blocks(long.bfloat16(), 0.0)
    assert not module._suits_blocks(short, 0.0)
    assert not module._suits_blocks(long, 0.1)
    assert not module._suits_blocks(long.double(), 0.0)
    assert not module._suits_blocks(long.to("meta"), 0.0)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert module._suits_blocks(long, 0.0) and not module._suits_blocks(long.bfloat16(), 0.0)
    monkeypatch.setattr(module, "onednn_is_faster", lambda: False)
    assert not module._suits_blocks(long, 0.0)


def test_dropout_is_left_to_torch(blocks):
    inputs, _ = make_inputs(torch.float32)
    results = []
    for function in (attention_core, F.scaled_dot_product_attention):
        torch.manual_seed(3)
        results.append(function(*inputs, None, 0.5))
    torch.testing.assert_close(*results, rtol=0, atol=0)
