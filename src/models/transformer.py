"""The stack of blocks: creates the shared matrices, hands them to the layers, applies the layers in order."""

import torch
from torch import nn

from .activations import get_activation
from .attention import LeanSelfAttention
from .attention_core import Spans
from .butterfly import ButterflyMatrix
from .ffn import LeanFFN
from .recompute import checkpointed
from .rotary import rotary_cos_sin
from .shared_linear import SharedLinear, SharedMatrix, shared_matrix_index
from .weight_of_pass import forward_pass


class LeanBlock(nn.Module):
    """Self-attention followed by the feed-forward sub-layer.

    `activation_memory` is one of `recompute.LEVELS`. transformers' `activation_checkpointing_enable` sets
    `gradient_checkpointing`, which means "checkpoint" while training; it is carried out here, not by the function that
    transformers offers, which would repeat the last product, too.
    """

    gradient_checkpointing = False

    def __init__(self, attention, ffn, activation_memory="default"):
        super().__init__()
        self.attention, self.ffn = attention, ffn
        self.activation_memory = activation_memory

    def forward(self, hidden_states, rotary_angles, attention_mask, wanted=None):
        """[batch, length, hidden_size] -> the same, or [wanted, hidden_size] at `wanted` positions of the rows put end
        to end: every position is attended to, and only these are computed to the end."""
        level = "checkpoint" if self.gradient_checkpointing and self.training else self.activation_memory
        if level == "default" or not torch.is_grad_enabled():
            return self._compute(hidden_states, rotary_angles, attention_mask, wanted)
        inputs = (hidden_states, rotary_angles, attention_mask)
        hidden_dropout = self.training and self.attention.hidden_dropout_prob > 0
        attention_dropout = self.training and self.attention.attention_probs_dropout_prob > 0
        # Kernels with attention dropout may keep all probabilities, so then the attention core runs again, too.
        keep_attention = level == "lean" and not attention_dropout
        if keep_attention and not torch.compiler.is_compiling():
            attended = self.attention.attend(*inputs, recompute_states=True)
            parts = select(wanted, hidden_states, attended)
            return checkpointed(self._finish, *parts, draws_random_numbers=hidden_dropout)
        random = hidden_dropout or attention_dropout
        return checkpointed(self._compute, *inputs, wanted, draws_random_numbers=random, keep_attention=keep_attention)

    def _compute(self, hidden_states, rotary_angles, attention_mask, wanted):
        attended = self.attention.attend(hidden_states, rotary_angles, attention_mask)
        return self._finish(*select(wanted, hidden_states, attended))

    def _finish(self, hidden_states, attended):
        return self.ffn(self.attention.add(hidden_states, attended))


def select(wanted, *states):
    """Of tensors [batch, length, size] the rows [wanted, size] at these positions; all as they are for None."""
    if wanted is None:
        return states
    return tuple(state.flatten(0, 1).index_select(0, wanted) for state in states)


class LeanLayerGroup(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden_states, rotary_angles, attention_mask, wanted=None):
        for layer in self.layers[:-1]:
            hidden_states = layer(hidden_states, rotary_angles, attention_mask)
        return self.layers[-1](hidden_states, rotary_angles, attention_mask, wanted)


class MatrixPool:
    """Makes each shared matrix when a block first asks for it; blocks that share one receive the same module."""

    def __init__(self, config):
        self.config = config
        self.matrices = {}

    def linear(self, kind, block, in_features, out_features, *, bias, num_parts=1):
        config = self.config
        index = shared_matrix_index(
            block,
            num_blocks=config.num_distinct_blocks,
            num_shared=int(config.share_large_matrices),
            num_inner_matrices=config.num_inner_matrices,
        )
        if (kind, index) not in self.matrices:
            self.matrices[kind, index] = self._make(in_features, out_features, num_parts)
        return SharedLinear(self.matrices[kind, index], bias=bias, adapter_dim=config.adapter_dim)

    def _make(self, in_features, out_features, num_parts):
        block_size, lowrank_dim = self.config.block_size, self.config.lowrank_dim
        if block_size:
            return ButterflyMatrix(in_features, out_features, block_size=block_size, lowrank_dim=lowrank_dim)
        return SharedMatrix(in_features, out_features, lowrank_dim=lowrank_dim, num_parts=num_parts)


def make_block(config, matrices, block):
    """Block number `block`, counted through all groups, with its matrices taken from the pool."""
    hidden_size, intermediate_size = config.hidden_size, config.intermediate_size
    num_halves = 2 if config.hidden_act_gated else 1
    common = {
        "hidden_size": hidden_size,
        "layer_norm_eps": config.layer_norm_eps,
        "sandwich_norm": config.sandwich_norm,
        "hidden_dropout_prob": config.hidden_dropout_prob,
    }
    attention = LeanSelfAttention(
        matrices.linear("qkv", block, hidden_size, 3 * hidden_size, bias=config.attn_qkv_bias, num_parts=3),
        matrices.linear("out", block, hidden_size, hidden_size, bias=config.out_proj_bias),
        num_attention_heads=config.num_attention_heads,
        attention_probs_dropout_prob=config.attention_probs_dropout_prob,
        **common,
    )
    ffn = LeanFFN(
        matrices.linear("i2h", block, hidden_size, num_halves * intermediate_size, bias=True, num_parts=num_halves),
        matrices.linear("h2o", block, intermediate_size, hidden_size, bias=config.out_proj_bias),
        get_activation(config.hidden_act),
        gated=config.hidden_act_gated,
        **common,
    )
    return LeanBlock(attention, ffn, config.activation_memory)


class LeanTransformer(nn.Module):
    """`num_hidden_layers` applications of the layer groups, consecutive ones of the same group, then a layer norm."""

    def __init__(self, config):
        super().__init__()
        config.check()
        self.num_hidden_layers = config.num_hidden_layers
        self.head_size = config.hidden_size // config.num_attention_heads
        self.rotary_base = config.rotary_embedding_base if config.position_embedding_type == "rotary" else None
        # The pool is a local variable: matrices belong to the layers, so no state-dict key of its own appears.
        matrices = MatrixPool(config)
        num_inner = config.num_inner_groups
        self.layer_groups = nn.ModuleList(
            LeanLayerGroup(make_block(config, matrices, group * num_inner + inner) for inner in range(num_inner))
            for group in range(config.num_hidden_groups)
        )
        self.post_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, hidden_states, attention_mask=None, *, position_ids=None, output_hidden_states=False, wanted=None
    ):
        """[batch, length, hidden_size] -> the same after all layers, and with `output_hidden_states` a tuple of the
        input and the output of each group application, the last one normalised (otherwise None).

        attention_mask: 1 for real tokens and 0 for padding, [batch, length], or which keys each query may attend to,
        [batch, query, key] or [batch, heads or 1, query, key], or `Spans`. position_ids: [batch or 1, length].
        wanted: positions in the rows put end to end; what comes after the last attention is computed there only,
        [wanted, hidden_size].
        """
        attention_mask = make_attention_mask(attention_mask)
        rotary_angles = None
        if self.rotary_base is not None:
            if position_ids is None:
                position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
            rotary_angles = rotary_cos_sin(position_ids, self.head_size, self.rotary_base)

        all_hidden_states = [hidden_states]
        with forward_pass():
            for layer in range(self.num_hidden_layers):
                group = layer * len(self.layer_groups) // self.num_hidden_layers
                is_last = layer == self.num_hidden_layers - 1
                hidden_states = self.layer_groups[group](
                    hidden_states, rotary_angles, attention_mask, wanted if is_last else None
                )
                if output_hidden_states:
                    all_hidden_states.append(hidden_states)
        hidden_states = self.post_layer_norm(hidden_states)
        return hidden_states, (*all_hidden_states[:-1], hidden_states) if output_hidden_states else None


def drop_idle_mask(inputs):
    """A model's inputs by name, without an attention mask that hides nothing: on the CPU, this can be seen at once."""
    mask = inputs.get("attention_mask")
    if mask is None or not mask.all():
        return inputs
    return {name: value for name, value in inputs.items() if name != "attention_mask"}


def make_attention_mask(attention_mask):
    """Boolean mask for scaled_dot_product_attention that broadcasts to [batch, heads, query, key], `Spans`, or None.

    None, which allows the fastest kernels, is also the answer when nothing is masked, if the mask is on the CPU: for
    another device the host would have to wait, see `drop_idle_mask`. A query that may attend to nothing (a row of
    padding only) attends to everything, because the softmax of an empty set is NaN.
    """
    if attention_mask is None or isinstance(attention_mask, Spans):
        return attention_mask
    attention_mask = attention_mask.bool()
    if attention_mask.device.type == "cpu" and not torch.compiler.is_compiling() and attention_mask.all():
        return None
    if attention_mask.dim() == 2:
        attention_mask = attention_mask[:, None, None, :]  # [batch, 1, 1, key]
    elif attention_mask.dim() == 3:
        attention_mask = attention_mask[:, None]  # [batch, 1, query, key]
    return attention_mask | ~attention_mask.any(dim=-1, keepdim=True)
