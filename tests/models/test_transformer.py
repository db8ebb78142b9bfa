import copy

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

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


def test_pairwise_mask_separates_packed_texts(tiny_config, randomise, encoder_inputs):
    model = randomise(LeanAlbertModel(tiny_config())).eval()
    ids = encoder_inputs["input_ids"][:1]
    text = torch.tensor([[0] * 6 + [1] * 5])
    positions = torch.tensor([[*range(6), *range(5)]])
    packed = model(ids, attention_mask=text[:, :, None] == text[:, None, :], position_ids=positions)
    parts = [model(ids[:, :6]).last_hidden_state, model(ids[:, 6:]).last_hidden_state]
    torch.testing.assert_close(packed.last_hidden_state, torch.cat(parts, dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing_gives_equal_gradients(tiny_config, randomise, batch, variant, reentrant):
    config = tiny_config(**VARIANTS[variant], **DROPOUTS["both"])
    model = randomise(LeanAlbertForPreTraining(config)).train()
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for each in (model, other):
        torch.manual_seed(11)
        each(**batch).loss.backward()
    for (name, parameter), (_, checkpointed) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(checkpointed.grad, parameter.grad, msg=lambda m, n=name: f"{n}: {m}")


def saved_units(config, inputs_embeds, *, checkpointing=False, **arguments):
    """Bytes kept for backward per token, in units of 4 * hidden_size; storages counted once, parameters not at all."""
    model = LeanAlbertModel(config, add_pooling_layer=False).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def remember(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # holding the tensor keeps its address taken
        return tensor

    with saved_tensors_hooks(remember, lambda tensor: tensor):
        outputs = model(inputs_embeds=inputs_embeds, **arguments).last_hidden_state
    assert outputs.requires_grad
    num_tokens = inputs_embeds.shape[0] * inputs_embeds.shape[1]
    return sum(num_bytes for num_bytes, _ in kept.values()) / (num_tokens * 4 * config.hidden_size)


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({}, 10),
        ({"position_embedding_type": "absolute"}, 10),
        ({"share_large_matrices": True}, 10),
        ({"hidden_act": "gelu_new"}, 10),
        ({"hidden_act_gated": True}, 14),
        ({"sandwich_norm": True}, 12),
        ({"adapter_dim": 4, "lowrank_dim": 4}, 10 + 8 * 4 / 256),
    ],
)
def test_block_keeps_few_bytes_for_backward(tiny_config, options, limit):
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "max_position_embeddings": 64}
    inputs = torch.randn(2, 64, 16)
    mask = torch.ones(2, 64)
    mask[1, 50:] = 0
    units = [
        saved_units(tiny_config(**sizes, **options, num_hidden_layers=layers), inputs, attention_mask=mask)
        for layers in (2, 3)
    ]
    # Attention also keeps one number per head and token (log-sum-exp) and a copy of the mask; sandwich norms keep
    # mean and deviation.
    statistics = 4 / 256 + 2 * 2 / 256 + 1 / 64
    assert units[1] - units[0] <= limit + statistics


def test_gradient_checkpointing_keeps_only_the_input_of_a_block(tiny_config):
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
    inputs = torch.randn(2, 64, 16)
    units = [
        saved_units(tiny_config(**sizes, num_hidden_layers=layers), inputs, checkpointing=True) for layers in (2, 3)
    ]
    assert units[1] - units[0] <= 1.01


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


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_model_gives_equal_gradients(tiny_config, randomise, encoder_inputs, variant):
    model = randomise(LeanAlbertModel(tiny_config(**VARIANTS[variant]), add_pooling_layer=False))
    gradients = []
    torch._dynamo.reset()
    # aot_eager traces forward and backward as inductor does, without the minutes its compiler takes.
    for each in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        each(**encoder_inputs).last_hidden_state.square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name in gradients[0]:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], rtol=1e-4, atol=1e-3)


def test_hidden_states_are_input_every_layer_and_final_norm(tiny_config, encoder_inputs):
    model = LeanAlbertModel(tiny_config()).eval()
    outputs = model(**encoder_inputs, output_hidden_states=True)
    assert len(outputs.hidden_states) == 4
    embedded = model.embeddings(encoder_inputs["input_ids"], encoder_inputs["token_type_ids"])
    torch.testing.assert_close(outputs.hidden_states[0], embedded)
    assert outputs.hidden_states[-1] is outputs.last_hidden_state
    assert model(**encoder_inputs).hidden_states is None
