"""Our attention kernels equal torch's, and are used only where they are faster."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.kept_bytes import kept_bytes
from src import LeanAlbertForPreTraining, LeanAlbertModel
from src.models import attention_core as module
from src.models.attention_core import BLOCKS, HEADS, KERNELS, BlockedAttention, Spans, attention_core
from src.models.fastest import TORCH, use_cpu_kernels

KEYS = torch.ones(3, 1, 1, 70, dtype=torch.bool)
KEYS[1, ..., 40:] = False
SEQUENCES = (torch.arange(70) // 30)[:, None] == torch.arange(70) // 30  # three that do not see each other
MASKS = {"all": None, "padded": KEYS, "packed": SEQUENCES[None, None], "by head": torch.rand(3, 2, 70, 70) > 0.5}
MASKS["by head"] |= torch.eye(70, dtype=torch.bool)


@pytest.fixture
def blocks(monkeypatch) -> None:
    """Blocks of a few queries for every sequence, and few heads at a time, on every processor."""
    monkeypatch.setattr(module, "SCORES_AT_ONCE", 70 * 16)
    monkeypatch.setattr(module, "HEAD_SCORES_AT_ONCE", 2 * 70 * 70)
    monkeypatch.setattr(module, "MIN_LENGTH_PER_THREAD", 0)


@pytest.fixture(params=KERNELS)
def kernel(request, blocks):
    return KERNELS[request.param].apply


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
def test_kernels_give_attention_and_its_gradients(kernel, dtype, tolerance, mask):
    inputs, gradient = make_inputs(dtype)
    outputs = kernel(*inputs, MASKS[mask])
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("numbers", [[[1] * 30 + [2] * 30 + [0] * 10, [1] * 70, [4, 5] * 35], [[1] * 70] * 3])
def test_spans_are_what_their_mask_says(kernel, dtype, numbers):
    spans, (inputs, gradient) = Spans.of(torch.tensor(numbers)), make_inputs(dtype)
    mask = torch.tensor(numbers)[:, None, :, None] == torch.tensor(numbers)[:, None, None, :]
    if numbers[2][:2] == [4, 5]:  # instances of one token: neighbours differ, so none sees another
        mask[2] = torch.eye(70, dtype=torch.bool)
    assert spans.mask(mask.device).equal(mask)
    results = []
    for function, each in ((kernel, spans), (F.scaled_dot_product_attention, mask)):
        outputs = function(*inputs, each)
        results.append([outputs, *torch.autograd.grad(outputs, inputs, gradient)])
    tolerance = 1e-12 if dtype == torch.float64 else 3e-2
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("level", ["default", "lean", "checkpoint"])
def test_packed_rows_train_as_with_a_mask(tiny_config, randomise, batch, blocks, level):
    config = tiny_config(activation_memory=level, hidden_dropout_prob=0.0, classifier_dropout_prob=0.0)
    model = randomise(LeanAlbertForPreTraining(config)).train()
    batch["instance_index"] = torch.tensor([[1] * 6 + [2] * 5, [1] * 4 + [2] * 3 + [0] * 4])
    batch["sentence_order_label"] = torch.tensor([0, 1, 1, 0])
    loss, found = model_gradients(model, batch, autocast=False)
    use_cpu_kernels(TORCH)
    try:
        expected_loss, expected = model_gradients(model, batch, autocast=False)
    finally:
        use_cpu_kernels(None)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_kernels_in_fp64(kernel):
    inputs, _ = make_inputs(torch.float64, batch=2, length=5, head_size=4)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[1, ..., 3:] = False
    assert torch.autograd.gradcheck(lambda *tensors: kernel(*tensors, mask), inputs)


def model_gradients(model, batch, *, autocast):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**batch).loss
    loss.backward()
    return loss, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("level", ["default", "lean", "checkpoint"])
@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-5), (True, 0.1)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_model_trains_the_same_by_each(tiny_config, randomise, batch, monkeypatch, level, autocast, tolerance, kernel):
    config = tiny_config(activation_memory=level, hidden_dropout_prob=0.0, classifier_dropout_prob=0.0)
    model = randomise(LeanAlbertForPreTraining(config)).train()
    loss, expected = model_gradients(model, batch, autocast=False)
    used = []
    monkeypatch.setattr(module, "_choose", lambda query, *rest: used.append(query.dtype) or kernel)
    monkeypatch.setattr(module, "SCORES_AT_ONCE", 33)
    monkeypatch.setattr(module, "HEAD_SCORES_AT_ONCE", 333)
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


def test_fastest_of_those_that_suit_is_used(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(module, "_find_fastest", lambda names, *rest: names)
    long, short, medium = torch.zeros(1, 1, 1024, 8), torch.zeros(1, 1, 511, 8), torch.zeros(1, 1, 512, 8)
    use_cpu_kernels("measure")
    try:
        assert module._choose(long, None, 0.0) == (BLOCKS, TORCH)
        assert module._choose(medium.bfloat16(), None, 0.0) == (BLOCKS, HEADS, TORCH)
        assert module._choose(short, None, 0.0) == (HEADS, TORCH)
        assert module._choose(long, Spans((((0, 512), (512, 1024)),), 1024), 0.0) == (BLOCKS, HEADS)
        assert module._choose(long, Spans((((0, 1024),),), 1024), 0.0) == (BLOCKS,)
        for other in (long.double(), long.to("meta"), long[:0]):
            assert module._choose(other, None, 0.0) == TORCH
        assert module._choose(long, None, 0.1) == TORCH
        use_cpu_kernels(TORCH)
        assert module._choose(long, None, 0.0) == TORCH
        use_cpu_kernels("onednn")
        assert module._choose(long, None, 0.0) == BLOCKS
        assert module._choose(short, None, 0.0) == TORCH
    finally:
        use_cpu_kernels(None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_are_measured(monkeypatch, dtype):
    ran = []

    def run_all(key, names, candidates):
        ran.extend(name for name, run in candidates().items() if run() is None)
        return HEADS

    monkeypatch.setattr(module, "_found", {})
    monkeypatch.setattr(module, "fastest", run_all)
    assert module._find_fastest((TORCH, BLOCKS, HEADS), dtype, 60, 8, 1) == HEADS
    assert ran == [TORCH, BLOCKS, HEADS] and [key[2] for key in module._found] == [64]


def test_dropout_is_left_to_torch(blocks):
    inputs, _ = make_inputs(torch.float32)
    results = []
    for function in (attention_core, F.scaled_dot_product_attention):
        torch.manual_seed(3)
        results.append(function(*inputs, None, 0.5))
    torch.testing.assert_close(*results, rtol=0, atol=0)
