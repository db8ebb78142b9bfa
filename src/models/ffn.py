"""Pre-norm feed-forward sub-layer."""

import torch.nn.functional as F
from torch import nn

from .recompute import is_recomputing


class LeanFFN(nn.Module):
    """hidden + dropout(sandwich_norm(dense_h2o(activation(dense_i2h(layer_norm(hidden))))))

    Gated: the activation of the first half of dense_i2h's output times its second half (arXiv 2002.05202).
    Kept for backward per token: the input and the output of dense_i2h before its activation.
    """

    def __init__(
        self,
        dense_i2h,
        dense_h2o,
        activation,
        *,
        hidden_size,
        gated,
        layer_norm_eps,
        sandwich_norm,
        hidden_dropout_prob,
    ):
        super().__init__()
        self.activation = activation
        self.gated = gated
        self.hidden_dropout_prob = hidden_dropout_prob
        self.dense_i2h, self.dense_h2o = dense_i2h, dense_h2o
        self.layer_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.sandwich_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps) if sandwich_norm else None

    def forward(self, hidden_states):
        """[batch, length, hidden_size] -> the same."""
        norm = self.layer_norm
        intermediate = self.dense_i2h(hidden_states, self._normalise, norm.weight, norm.bias)
        result_is_unused = is_recomputing() and self.sandwich_norm is None
        outputs = self.dense_h2o(intermediate, self._activate, result_is_unused=result_is_unused)
        if self.sandwich_norm is not None:
            outputs = self.sandwich_norm(outputs)
        return hidden_states + F.dropout(outputs, self.hidden_dropout_prob, self.training)

    def _normalise(self, hidden_states, weight, bias):
        return F.layer_norm(hidden_states, self.layer_norm.normalized_shape, weight, bias, self.layer_norm.eps)

    def _activate(self, intermediate):
        if not self.gated:
            return self.activation(intermediate)
        activated, multiplier = intermediate.chunk(2, dim=-1)
        return self.activation(activated) * multiplier
