"""LeanALBERT written the slow, obvious way: one formula per line, loops over heads, autograd keeps what it likes.

Works on the state dict of a model, in any dtype. Dropout draws its masks in the order and shapes in which the model
draws them, so equal seeds give equal masks.
"""

import math

import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN


def layer_norm(inputs, weight, bias, eps):
    centred = inputs - inputs.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + eps) * weight + bias


def dropout(inputs, prob):
    return F.dropout(inputs, prob, training=True) if prob else inputs


def shared_linear(state, prefix, inputs):
    outputs = inputs @ state[f"{prefix}.shared_matrix.weight"].T
    if f"{prefix}.bias" in state:
        outputs = outputs + state[f"{prefix}.bias"]
    for first, second in (
        ("shared_matrix.lowrank_first", "shared_matrix.lowrank_second"),
        ("adapter_first", "adapter_second"),
    ):
        if f"{prefix}.{first}" in state:
            outputs = outputs + inputs @ state[f"{prefix}.{first}"].T @ state[f"{prefix}.{second}"].T
    return outputs


def rotate(head, base):
    """[batch, length, size]: the pair (i, i + size / 2) at position p turns by p * base ** (-2 i / size)."""
    size = head.shape[-1]
    columns = [None] * size
    positions = torch.arange(head.shape[1], dtype=torch.float32)
    for i in range(size // 2):
        # The angle is rounded to fp32 as in the model, whatever the dtype of everything else.
        angle = positions * torch.tensor(float(base)) ** -torch.tensor(2 * i / size)
        cos, sin = angle.cos(), angle.sin()
        columns[i] = head[..., i] * cos - head[..., i + size // 2] * sin
        columns[i + size // 2] = head[..., i + size // 2] * cos + head[..., i] * sin
    return torch.stack(columns, dim=-1)


def attend(queries, keys, values, allowed, prob):
    """Lists of heads [batch, length, size] -> [batch, heads, length, size]."""
    scores = torch.stack([query @ key.transpose(1, 2) for query, key in zip(queries, keys, strict=True)], dim=1)
    scores = scores / math.sqrt(queries[0].shape[-1])
    scores = scores.masked_fill(~allowed[:, None, None, :], -math.inf)
    return dropout(scores.softmax(-1), prob) @ torch.stack(values, dim=1)


def attention(config, state, prefix, hidden, allowed):
    normed = layer_norm(
        hidden, state[f"{prefix}.layer_norm.weight"], state[f"{prefix}.layer_norm.bias"], config.layer_norm_eps
    )
    queries, keys, values = (
        part.chunk(config.num_attention_heads, dim=-1)
        for part in shared_linear(state, f"{prefix}.dense_qkv", normed).chunk(3, dim=-1)
    )
    if config.position_embedding_type == "rotary":
        queries = [rotate(head, config.rotary_embedding_base) for head in queries]
        keys = [rotate(head, config.rotary_embedding_base) for head in keys]
    heads = attend(queries, keys, values, allowed, config.attention_probs_dropout_prob)
    outputs = shared_linear(state, f"{prefix}.dense_out", torch.cat(heads.unbind(1), dim=-1))
    return add_residual(config, state, prefix, hidden, outputs)


def feed_forward(config, state, prefix, hidden):
    act = ACT2FN["gelu_pytorch_tanh" if config.hidden_act == "gelu_fused" else config.hidden_act]
    normed = layer_norm(
        hidden, state[f"{prefix}.layer_norm.weight"], state[f"{prefix}.layer_norm.bias"], config.layer_norm_eps
    )
    inner = shared_linear(state, f"{prefix}.dense_i2h", normed)
    if config.hidden_act_gated:
        half = config.intermediate_size
        inner = act(inner[..., :half]) * inner[..., half:]
    else:
        inner = act(inner)
    return add_residual(config, state, prefix, hidden, shared_linear(state, f"{prefix}.dense_h2o", inner))


def add_residual(config, state, prefix, hidden, outputs):
    if config.sandwich_norm:
        weight, bias = state[f"{prefix}.sandwich_norm.weight"], state[f"{prefix}.sandwich_norm.bias"]
        outputs = layer_norm(outputs, weight, bias, config.layer_norm_eps)
    return hidden + dropout(outputs, config.hidden_dropout_prob)


def encode(config, state, input_ids, attention_mask, token_type_ids):
    """Last hidden state [batch, length, hidden_size] from the state dict of a LeanAlbertModel."""
    hidden = state["embeddings.word_embeddings.weight"][input_ids]
    hidden = hidden + state["embeddings.token_type_embeddings.weight"][token_type_ids]
    if config.position_embedding_type == "absolute":
        hidden = hidden + state["embeddings.position_embeddings.weight"][: input_ids.shape[1]]
    norm = (state["embeddings.layer_norm.weight"], state["embeddings.layer_norm.bias"])
    hidden = dropout(layer_norm(hidden, *norm, config.layer_norm_eps), config.hidden_dropout_prob)
    if config.embedding_size != config.hidden_size:
        hidden = hidden @ state["embeddings.embedding_hidden_mapping.weight"].T
        hidden = hidden + state["embeddings.embedding_hidden_mapping.bias"]
    for layer in range(config.num_hidden_layers):
        group = int(layer / (config.num_hidden_layers / config.num_hidden_groups))
        for inner in range(config.num_inner_groups):
            prefix = f"transformer.layer_groups.{group}.layers.{inner}"
            hidden = attention(config, state, f"{prefix}.attention", hidden, attention_mask.bool())
            hidden = feed_forward(config, state, f"{prefix}.ffn", hidden)
    norm = (state["transformer.post_layer_norm.weight"], state["transformer.post_layer_norm.bias"])
    return layer_norm(hidden, *norm, config.layer_norm_eps)
