"""One cast and one gradient sum for a weight of many layers: the gradients are autograd's."""

from contextlib import nullcontext

import pytest
import torch

from src import LeanAlbertForPreTraining
from src.models import transformer, weight_of_pass
from src.models.recompute import LEVELS
from src.models.weight_of_pass import GradientSum, WeightOfPass, add_product

SHARED = {"num_hidden_groups": 3, "share_large_matrices": 1, "hidden_dropout_prob": 0.0, "classifier_dropout_prob": 0.0}


@pytest.fixture(params=[1, 30, 10**6], ids=["each use", "two at once", "all at once"])
def rows_gathered(request, monkeypatch):
    """Of rows of 22 tokens."""
    monkeypatch.setattr(weight_of_pass, "ROWS_GATHERED", request.param)
    monkeypatch.setattr(weight_of_pass, "ROWS_AT_ONCE", 16)


def make_model(tiny_config, randomise, **options):
    return randomise(LeanAlbertForPreTraining(tiny_config(**{**SHARED, **options}))).train()


def find_gradients(model, batch, *, dtype=None):
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(**batch).loss
    found = torch.autograd.grad(loss, list(model.parameters()))
    return dict(zip([name for name, _ in model.named_parameters()], found, strict=True))


@pytest.mark.parametrize("options", [{}, {"adapter_dim": 2, "lowrank_dim": 2}, {"share_large_matrices": 0}])
@pytest.mark.parametrize("level", LEVELS)
def test_gradients_are_those_of_autograd(tiny_config, randomise, batch, monkeypatch, rows_gathered, level, options):
    model = make_model(tiny_config, randomise, activation_memory=level, **options).double()
    found = find_gradients(model, batch)
    assert all(parameter.grad is None for parameter in model.parameters())
    monkeypatch.setattr(transformer, "forward_pass", nullcontext)
    for name, gradient in find_gradients(model, batch).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", LEVELS)
def test_sum_of_narrow_products_is_nearer_to_exact_than_autograds(
    tiny_config, randomise, batch, monkeypatch, rows_gathered, dtype, level
):
    model = make_model(tiny_config, randomise, activation_memory=level)
    found = find_gradients(model, batch, dtype=dtype)
    exact = find_gradients(make_model(tiny_config, randomise).double(), batch)
    monkeypatch.setattr(transformer, "forward_pass", nullcontext)
    before = find_gradients(model, batch, dtype=dtype)
    matrices = [name for name in found if name.endswith("shared_matrix.weight")]
    assert len(matrices) == 4
    for name in matrices:
        assert found[name].dtype == torch.float32
        errors = [(gradients[name] - exact[name]).norm() / exact[name].norm() for gradients in (found, before)]
        assert errors[0] <= 1.1 * errors[1] <= 0.1, name


@pytest.mark.parametrize("level", LEVELS)
def test_weight_is_cast_once_for_a_forward_and_backward_pass(tiny_config, randomise, batch, monkeypatch, level):
    casts, forward = [], WeightOfPass.forward
    monkeypatch.setattr(WeightOfPass, "forward", lambda *arguments: casts.append(1) or forward(*arguments))
    model = make_model(tiny_config, randomise, activation_memory=level)
    find_gradients(model, batch, dtype=torch.bfloat16)
    assert len(casts) == 4
    find_gradients(model, batch)
    assert len(casts) == 8


def test_backward_passes_add_up_and_hooks_see_the_sum(tiny_config, randomise, batch):
    model = make_model(tiny_config, randomise)
    weight = model.albert.transformer.layer_groups[0].layers[0].ffn.dense_i2h.shared_matrix.weight
    seen = []
    weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    loss = model(**batch).loss
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    model(**batch).loss.backward()
    assert len(seen) == 3
    torch.testing.assert_close(weight.grad, 3 * once)
    torch.testing.assert_close(seen[0], once)


def test_part_that_nobody_asked_for_is_forgotten(tiny_config, randomise, batch):
    model = make_model(tiny_config, randomise)
    loss = model(**batch).loss
    torch.autograd.grad(loss, model.albert.embeddings.word_embeddings.weight, retain_graph=True)
    found = torch.autograd.grad(loss, list(model.parameters()))
    for gradient, expected in zip(found, find_gradients(model, batch).values(), strict=True):
        torch.testing.assert_close(gradient, expected)


def test_frozen_matrices_get_no_gradient(tiny_config, randomise, batch):
    model = make_model(tiny_config, randomise)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("shared_matrix" not in name)
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == ("shared_matrix" in name)


def test_two_forward_passes_before_their_backward_passes(tiny_config, randomise, batch):
    model = make_model(tiny_config, randomise, activation_memory="lean")
    expected = find_gradients(model, batch)
    losses = [model(**batch).loss for _ in range(2)]
    for loss in losses:
        for gradient, name in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
            torch.testing.assert_close(gradient, expected[name])


def test_nothing_is_added_outside_of_a_backward_pass():
    assert GradientSum().take() is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_product_is_added_in_place_on_a_gpu(dtype):
    grad_rows, input_rows = (torch.randn(64, size, device="cuda").to(dtype) for size in (48, 32))
    total = add_product(None, grad_rows, input_rows)
    assert total.dtype == torch.float32
    assert add_product(total, grad_rows, input_rows) is total
    exact = 2 * grad_rows.double().t() @ input_rows.double()
    torch.testing.assert_close(total.double(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out_features", "in_features"), [(600, 40), (40, 600), (40, 40)])
def test_sum_of_rows_in_any_order_and_number(out_features, in_features, dtype):
    """Few rows wait for each other, many do not; a wide weight's fp32 gradient is summed the other way round."""
    pairs = [(torch.randn(rows, out_features).to(dtype), torch.randn(rows, in_features).to(dtype))
             for rows in (30, 700, 500, 20, 600, 10)]  # fmt: skip
    gradients = GradientSum()
    for pair in pairs:
        gradients.add(*pair)
    total = gradients.take()
    expected = sum(grad_rows.double().t() @ input_rows.double() for grad_rows, input_rows in pairs)
    assert total.dtype == torch.promote_types(dtype, torch.float32) and total.is_contiguous()
    torch.testing.assert_close(total.double(), expected, rtol=0, atol=0.5 if dtype == torch.bfloat16 else 1e-3)
    assert gradients.take() is None
