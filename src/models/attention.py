"""Pre-norm self-attention sub-layer."""

from contextlib import nullcontext

import torch.nn.functional as F
from torch import nn

from .attention_core import attention_core
from .recompute import recomputed
from .rotary import split_and_rotate


class LeanSelfAttention(nn.Module):
    """hidden + dropout(sandwich_norm(dense_out(attention(dense_qkv(layer_norm(hidden))))))

    Kept for backward per token, in hidden sizes: the input (1), queries, keys and values (3), the attended values (1).
    """

    def __init__(
        self,
        dense_qkv,
        dense_out,
        *,
        hidden_size,
        num_attention_heads,
        layer_norm_eps,
        sandwich_norm,
        hidden_dropout_prob,
        attention_probs_dropout_prob,
    ):
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.dense_qkv, self.dense_out = dense_qkv, dense_out
        self.layer_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.sandwich_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps) if sandwich_norm else None

    def forward(self, hidden_states, rotary_angles, attention_mask):
        """[batch, length, hidden_size] -> the same; other arguments: see `attend`."""
        return self.add(hidden_states, self.attend(hidden_states, rotary_angles, attention_mask))

    def attend(self, hidden_states, rotary_angles, attention_mask, *, recompute_states=False):
        """Attended values [batch, length, hidden_size] before the output projection.

        rotary_angles: cos and sin of `rotary.rotary_cos_sin`, or None; attention_mask: boolean, True = may be
        attended to, broadcast to [batch, heads, query, key], or None. With `recompute_states` queries, keys and values
        are not kept for backward but computed again.
        """
        query, key, value = self._project(hidden_states, rotary_angles)
        keeping = nullcontext()
        if recompute_states:
            keeping = recomputed(query, lambda: self._project(hidden_states, rotary_angles)[0])
        dropout_prob = self.attention_probs_dropout_prob if self.training else 0.0
        with keeping:
            attended = attention_core(query, key, value, attention_mask, dropout_prob)
        return attended.transpose(1, 2).flatten(2)

    def add(self, hidden_states, attended):
        """The sub-layer's output from its input and its attended values, all [batch, length, hidden_size]."""
        outputs = self.dense_out(attended)
        if self.sandwich_norm is not None:
            outputs = self.sandwich_norm(outputs)
        return hidden_states + F.dropout(outputs, self.hidden_dropout_prob, self.training)

    def _project(self, hidden_states, rotary_angles):
        """Queries, keys and values after rotation, each [batch, heads, length, head_size], views of one tensor."""
        norm = self.layer_norm
        projected = self.dense_qkv(hidden_states, self._normalise, norm.weight, norm.bias)
        return split_and_rotate(projected, self.num_attention_heads, *(rotary_angles or ()))

    def _normalise(self, hidden_states, weight, bias):
        return F.layer_norm(hidden_states, self.layer_norm.normalized_shape, weight, bias, self.layer_norm.eps)
