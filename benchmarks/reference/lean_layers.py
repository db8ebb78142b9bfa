"""The block of the ancestor code as its description goes: 11 units kept, and an attention core that runs twice.

Kept for backward, in units of 4 * hidden_size bytes per token: both inputs (2), the normalised input of attention (1),
queries, keys and values (3), attended values (1), the feed-forward layer before its activation (4). The core builds all
scores, and builds them again in backward.
"""

import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from src.models.rotary import rotary_cos_sin, rotate
from src.models.shared_linear import PreparedLinear


def original_block(block, hidden_states, cos, sin, penalty=None):
    """What a LeanBlock with biases and without sandwich norm, dropout and adapters computes, with its parameters."""
    attention, ffn = block.attention, block.ffn
    normed = attention.layer_norm(hidden_states)
    qkv, out = attention.dense_qkv, attention.dense_out
    states = F.linear(normed, qkv.shared_matrix.weight, qkv.bias).unflatten(-1, (3, attention.num_attention_heads, -1))
    attended = checkpoint(attention_core, states, cos, sin, penalty, use_reentrant=False)
    hidden_states = hidden_states + F.linear(attended, out.shared_matrix.weight, out.bias)

    norm, first, second = ffn.layer_norm, ffn.dense_i2h, ffn.dense_h2o
    inner = PreparedLinear.apply(
        ffn._normalise, None, hidden_states, first.shared_matrix.weight, first.bias, norm.weight, norm.bias
    )
    return hidden_states + PreparedLinear.apply(ffn._activate, None, inner, second.shared_matrix.weight, second.bias)


def attention_core(states, cos, sin, penalty=None):
    """[batch, length, 3, heads, head_size] -> [batch, length, hidden_size]; penalty: [batch, 1, 1, key] or None"""
    query, key, value = states.unbind(2)
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])  # [batch, heads, query, key]
    if penalty is not None:
        scores = scores + penalty
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)


def original_encoder(transformer, hidden_states, attention_mask=None):
    """The same for a whole LeanTransformer with one block per group and rotary positions.

    attention_mask: 1 for real tokens and 0 for padding, [batch, length], or None.
    """
    penalty = None
    if attention_mask is not None:
        penalty = (1.0 - attention_mask[:, None, None].to(hidden_states.dtype)) * -10000.0
    positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
    cos, sin = rotary_cos_sin(positions, transformer.head_size, transformer.rotary_base)
    for group in transformer.layer_groups:
        hidden_states = original_block(group.layers[0], hidden_states, cos, sin, penalty)
    return transformer.post_layer_norm(hidden_states)
