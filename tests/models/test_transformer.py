import copy
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from benchmarks.kept_bytes import kept_bytes
from src import LeanAlbertForPreTraining, LeanAlbertModel
from src.models.transformer import make_attention_mask
from tests.reference import naive_albert

VARIANTS = {
    "plain": {},
    "gated": {"hidden_act_gated": True, "hidden_act": "gelu"},
    "sandwich": {"sandwich_norm": True, "attn_qkv_bias": False},
    "absolute": {"position_embedding_type": "absolute", "embedding_size": 32, "hidden_act": "silu"},
    "adapters": {"share_large_matrices": True, "adapter_dim": 3, "lowrank_dim": 2, "hidden_act_gated": True},
    "groups": {"num_hidden_layers": 5, "num_hidden_groups": 3, "num_inner_groups": 2, "share_large_matrices": 2},
}
DROPOUTS = {
    "none": {},
    "hidden": {"hidden_dropout_prob": 0.3},
    "attention": {"attention_probs_dropout_prob": 0.2},
    "both": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2},
}


@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_encoder_and_all_gradients_match_reference(tiny_config, randomise, encoder_inputs, variant, dropout):
    config = tiny_config(**VARIANTS[variant], **DROPOUTS[dropout])
    model = randomise(LeanAlbertModel(config, add_pooling_layer=False).double()).train()
    state = dict(model.named_parameters(remove_duplicate=False))
    parameters = dict(model.named_parameters())
    probe = torch.randn(2, 11, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    torch.manual_seed(5)
    actual = model(**encoder_inputs).last_hidden_state
    torch.manual_seed(5)
    expected = naive_albert.encode(config, state, **encoder_inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)

    actual_gradients = torch.autograd.grad((actual * probe).sum(), list(parameters.values()))
    expected_gradients = torch.autograd.grad((expected * probe).sum(), list(parameters.values()))
    pad = config.pad_token_id
    for name, first, second in zip(parameters, actual_gradients, expected_gradients, strict=True):
        if name == "embeddings.word_embeddings.weight":
            assert first[pad].eq(0).all()  # padding_idx: the look-up of padding contributes no gradient
            first, second = first[pad + 1 :], second[pad + 1 :]
        scale = second.abs().max()
        torch.testing.assert_close(first / scale, second / scale, rtol=0, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_padding_does_not_change_real_tokens(tiny_config, randomise, encoder_inputs):
    model = randomise(LeanAlbertModel(tiny_config())).eval()
    padded = model(**encoder_inputs)
    short = model(**{name: tensor[1:, :7] for name, tensor in encoder_inputs.items()})
    torch.testing.assert_close(padded.last_hidden_state[1:, :7], short.last_hidden_state, rtol=1e-5, atol=1e-5)
    changed = {**encoder_inputs, "input_ids": encoder_inputs["input_ids"].clone()}
    changed["input_ids"][1, 7:] = 42
    torch.testing.assert_close(model(**changed).last_hidden_state[1, :7], padded.last_hidden_state[1, :7])


def test_rows_of_padding_only_stay_finite(tiny_config, encoder_inputs):
    encoder_inputs["attention_mask"][0] = 0
    assert LeanAlbertModel(tiny_config())(**encoder_inputs).last_hidden_state.isfinite().all()


def test_attention_mask_is_none_when_nothing_is_padded():
    assert make_attention_mask(None) is None
    assert make_attention_mask(torch.ones(2, 5)) is None
    mask = make_attention_mask(torch.tensor([[1, 1, 0], [0, 0, 0]]))
    assert mask.tolist() == [[[[True, True, False]]], [[[True, True, True]]]]


def test_attention_mask_on_another_device_is_not_looked_at():
    """A tensor on the meta device holds no numbers: whoever asks for one, and would have to wait, gets an error."""
    assert make_attention_mask(torch.ones(2, 5, device="meta")).shape == (2, 1, 1, 5)


@pytest.mark.gpu
@pytest.mark.parametrize("level", ["default", "lean"])
def test_encoder_never_waits_for_a_gpu(tiny_config, encoder_inputs, level):
    model = LeanAlbertModel(tiny_config(activation_memory=level)).cuda().train()
    inputs = {name: tensor.cuda() for name, tensor in encoder_inputs.items()}
    model(**inputs).last_hidden_state.sum().backward()  # libraries begin their work with waits of their own
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**inputs).last_hidden_state.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_mask_that_hides_nothing_changes_nothing(tiny_config, randomise, encoder_inputs, monkeypatch):
    model = randomise(LeanAlbertModel(tiny_config())).eval()
    encoder_inputs["attention_mask"][:] = 1
    expected = model(**encoder_inputs).last_hidden_state
    on_gpu = torch.ones(2, 1, 1, 11, dtype=torch.bool)  # what is made of it there
    monkeypatch.setattr("src.models.transformer.make_attention_mask", lambda attention_mask: on_gpu)
    torch.testing.assert_close(model(**encoder_inputs).last_hidden_state, expected)


def test_pairwise_mask_separates_packed_texts(tiny_config, randomise, encoder_inputs):
    model = randomise(LeanAlbertModel(tiny_config())).eval()
    ids = encoder_inputs["input_ids"][:1]
    text = torch.tensor([[0] * 6 + [1] * 5])
    positions = torch.tensor([[*range(6), *range(5)]])
    packed = model(ids, attention_mask=text[:, :, None] == text[:, None, :], position_ids=positions)
    parts = [model(ids[:, :6]).last_hidden_state, model(ids[:, 6:]).last_hidden_state]
    torch.testing.assert_close(packed.last_hidden_state, torch.cat(parts, dim=1), rtol=1e-5, atol=1e-5)


def loss_gradients(model, batch):
    model.zero_grad()
    torch.manual_seed(11)
    model(**batch).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def with_activation_memory(model, level):
    """A copy with equal parameters; `level` is an option of the configuration and no part of the state dict."""
    config = copy.deepcopy(model.config)
    config.activation_memory = level
    other = type(model)(config).to(model.dtype).train(model.training)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("level", ["lean", "checkpoint"])
@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("variant", [*VARIANTS, "butterfly"])
def test_every_level_of_activation_memory_gives_equal_gradients(tiny_config, randomise, batch, variant, dropout, level):
    options = VARIANTS.get(variant, {"block_size": 4, "intermediate_size": 64, "lowrank_dim": 2, "adapter_dim": 2})
    model = randomise(LeanAlbertForPreTraining(tiny_config(**options, **DROPOUTS[dropout])).double()).train()
    expected = loss_gradients(model, batch)
    actual = loss_gradients(with_activation_memory(model, level), batch)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("level", ["lean", "checkpoint"])
def test_levels_of_activation_memory_agree_under_autocast(tiny_config, randomise, batch, level):
    model = randomise(LeanAlbertForPreTraining(tiny_config(**DROPOUTS["hidden"]))).train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = []
        for each in (model, with_activation_memory(model, level)):
            torch.manual_seed(11)
            losses.append((each(**batch).loss, dict(each.named_parameters())))
    gradients = []
    for loss, parameters in losses:
        loss.backward()  # outside of autocast: what is computed again must be computed as it was in forward
        gradients.append({name: parameter.grad for name, parameter in parameters.items()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_lean_level_can_go_backward_twice(tiny_config, randomise, encoder_inputs):
    model = randomise(LeanAlbertModel(tiny_config(activation_memory="lean"), add_pooling_layer=False))
    outputs = model(**encoder_inputs).last_hidden_state.square().sum()
    parameters = list(model.parameters())
    first = torch.autograd.grad(outputs, parameters, retain_graph=True)
    second = torch.autograd.grad(outputs, parameters)
    torch.testing.assert_close(second, first, rtol=0, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing_gives_equal_gradients(tiny_config, randomise, batch, variant):
    model = randomise(LeanAlbertForPreTraining(tiny_config(**VARIANTS[variant], **DROPOUTS["both"]))).train()
    expected = loss_gradients(model, batch)
    model.activation_checkpointing_enable()
    torch.testing.assert_close(loss_gradients(model, batch), expected)


def saved_units(config, inputs_embeds, *, checkpointing=False, **arguments):
    """Bytes kept for backward per token, in units of 4 * hidden_size."""
    model = LeanAlbertModel(config, add_pooling_layer=False).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    num_bytes = kept_bytes(
        lambda: model(inputs_embeds=inputs_embeds, **arguments).last_hidden_state, model.parameters()
    )
    num_tokens = inputs_embeds.shape[0] * inputs_embeds.shape[1]
    return num_bytes / (num_tokens * 4 * config.hidden_size)


def units_per_block(config_of, **arguments):
    """Units that each block adds, for `config_of(num_hidden_layers=...)`."""
    units = [saved_units(config_of(num_hidden_layers=layers), **arguments) for layers in (2, 3)]
    return units[1] - units[0]


HALF_PADDED = torch.cat([torch.ones(2, 64), torch.cat([torch.ones(1, 64), torch.zeros(1, 64)])], dim=1)
WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "max_position_embeddings": 128}
# Attention keeps one number per head and token (log-sum-exp); SDPA on CPU a copy of the mask with one per token.
LOG_SUM_EXP, MASK = 4 / 256, 1 / 256


@pytest.mark.parametrize(
    ("options", "default", "lean"),
    [
        ({}, 10, 2),
        ({"position_embedding_type": "absolute"}, 10, 2),
        ({"share_large_matrices": True}, 10, 2),
        ({"hidden_act": "gelu_new"}, 10, 2),
        ({"hidden_act_gated": True}, 14, 2),
        ({"sandwich_norm": True}, 12 + 4 / 256, 2),  # means and deviations
        ({"hidden_dropout_prob": 0.1}, 12, 2),  # factors 0 or 1 / (1 - p)
        ({"adapter_dim": 4, "lowrank_dim": 4}, 10 + 8 * 4 / 256, 2 + 8 / 256),
    ],
)
def test_block_keeps_few_bytes_for_backward(tiny_config, options, default, lean):
    inputs = torch.randn(2, 128, 16)
    for level, units in (("default", default), ("lean", lean), ("checkpoint", 1)):
        config_of = partial(tiny_config, **WIDE, **options, activation_memory=level)
        expected = units + (LOG_SUM_EXP if level != "checkpoint" else 0)
        assert units_per_block(config_of, inputs_embeds=inputs) == pytest.approx(expected, abs=1e-6)
        masked = units_per_block(config_of, inputs_embeds=inputs, attention_mask=HALF_PADDED)
        assert expected <= masked <= expected + MASK + 1e-6


def test_gradient_checkpointing_keeps_only_the_input_of_a_block(tiny_config):
    units = units_per_block(partial(tiny_config, **WIDE), inputs_embeds=torch.randn(2, 64, 16), checkpointing=True)
    assert units == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_autocast_trains_close_to_fp32(tiny_config, batch, variant):
    model = LeanAlbertForPreTraining(tiny_config(**VARIANTS[variant], classifier_dropout_prob=0.0))
    exact = model(**batch).loss
    exact.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=0.01, atol=0)
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        difference, size = (parameter.grad - expected[name]).norm(), expected[name].norm()
        assert difference <= 0.1 * size + 1e-6, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_parameters_train(tiny_config, batch, variant):
    model = LeanAlbertForPreTraining(tiny_config(**VARIANTS[variant], classifier_dropout_prob=0.0))
    exact = model(**batch).loss
    model.bfloat16()
    loss = model(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in model.parameters())
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(("variant", "level"), [*((name, "default") for name in VARIANTS), ("gated", "lean")])
def test_compiled_model_gives_equal_gradients(tiny_config, randomise, encoder_inputs, variant, level):
    config = tiny_config(**VARIANTS[variant], activation_memory=level)
    model = randomise(LeanAlbertModel(config, add_pooling_layer=False))
    gradients = []
    torch._dynamo.reset()
    # aot_eager traces forward and backward as inductor does, without the minutes its compiler takes.
    for each in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        each(**encoder_inputs).last_hidden_state.square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name in gradients[0]:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("level", ["default", "lean"])
def test_compiled_model_is_not_compiled_again_for_every_length(tiny_config, level):
    model = LeanAlbertModel(tiny_config(num_hidden_layers=1, activation_memory=level), add_pooling_layer=False)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    for length in range(64, 257, 32):
        mask = torch.ones(2, length, dtype=torch.long)
        mask[1, length // 2 :] = 0
        compiled(torch.ones(2, length, dtype=torch.long), mask).last_hidden_state.sum().backward()
    assert 1 <= counter.frame_count <= 2


def test_hidden_states_are_input_every_layer_and_final_norm(tiny_config, encoder_inputs):
    model = LeanAlbertModel(tiny_config()).eval()
    outputs = model(**encoder_inputs, output_hidden_states=True)
    assert len(outputs.hidden_states) == 4
    embedded = model.embeddings(encoder_inputs["input_ids"], encoder_inputs["token_type_ids"])
    torch.testing.assert_close(outputs.hidden_states[0], embedded)
    assert outputs.hidden_states[-1] is outputs.last_hidden_state
    assert model(**encoder_inputs).hidden_states is None
