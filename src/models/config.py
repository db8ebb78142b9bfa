"""Configuration of LeanALBERT models: values, defaults and checks; builds nothing."""

import dataclasses
import math

from transformers import PreTrainedConfig

from .activations import FUSED_GELU, is_known
from .recompute import LEVELS

# Written by earlier releases of the pretraining code; they never influenced the computation.
LEGACY_OPTIONS = ("inner_group_num", "num_memory_blocks")
POSITIVE_OPTIONS = (
    "hidden_size",
    "num_hidden_layers",
    "num_hidden_groups",
    "num_inner_groups",
    "num_inner_matrices",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "rotary_embedding_base",
    "vocab_size",
    "embedding_size",
    "type_vocab_size",
    "layer_norm_eps",
    "initializer_range",
)
# Anything larger is a mistake, or somebody's attempt to fill the memory; and numbers of any length can be written.
LARGEST_COUNT, LARGEST_SIZE, LARGEST_NUMBER = 4096, 2**27, 1e15
SIZE_ENDINGS = ("_size", "_layers", "_heads", "_groups", "_matrices", "_labels", "_embeddings", "_dim", "_experts")
FRACTIONAL_OPTIONS = ("rotary_embedding_base", "layer_norm_eps", "initializer_range")
NON_NEGATIVE_OPTIONS = ("share_large_matrices", "adapter_dim", "block_size", "lowrank_dim")
PROBABILITY_OPTIONS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob")


class LeanAlbertConfig(PreTrainedConfig):
    """Options of a pre-norm ALBERT (arXiv 1909.11942) whose large matrices may be shared between layers.

    Depth: `num_hidden_layers` applications of `num_hidden_groups` groups (default: one group per layer), each made of
    `num_inner_groups` blocks with biases, norms and adapters of their own.

    Sharing: `share_large_matrices` is the number of matrix sets used by all blocks (False or 0: every block has its
    own, True or 1: one set); blocks of a set alternate between `num_inner_matrices` matrices. `adapter_dim` adds a
    LoRA-like term (arXiv 2106.09685) to every block's use of a matrix, `lowrank_dim` a low-rank term to the matrix
    itself, `block_size` makes the matrix block-sparse (Pixelated Butterfly, arXiv 2112.00029).

    Block: `hidden_act` is a transformers activation name or "gelu_fused" (the tanh approximation); with
    `hidden_act_gated` it is applied to one half of the first projection and multiplies the other (arXiv 2002.05202).
    `sandwich_norm` normalises what each sub-layer adds (arXiv 2105.13290); then `out_proj_bias` defaults to False.
    `position_embedding_type` is "rotary" (arXiv 2104.09864) or "absolute".

    `activation_memory` is how much a block keeps for the backward pass; results do not change. "default" repeats
    no matrix product; "lean" keeps a fifth of that and repeats two thirds of the forward products (not the attention
    core, unless it has dropout); "checkpoint" keeps the block's input alone and repeats the core as well.

    `initializer_range` defaults to sqrt(2 / (5 * hidden_size)) (arXiv 1910.05895). `sparse_prediction` computes
    masked-LM logits only where there is a label, and while training no more than 128 rows of them at a time; the loss
    is the same. `tie_word_embeddings` makes the decoder of the
    masked-LM head the word embedding matrix itself.

    Raises ValueError, naming the option, for values that cannot be built.
    """

    model_type = "lean_albert"

    vocab_size: int = 30000
    embedding_size: int = 128
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_hidden_groups: int | None = None
    num_inner_groups: int = 1
    share_large_matrices: bool | int = 0
    num_inner_matrices: int = 1
    adapter_dim: int = 0
    num_attention_heads: int = 64
    intermediate_size: int = 16384
    block_size: int = 0
    lowrank_dim: int = 0
    hidden_act: str = FUSED_GELU
    hidden_act_gated: bool = False
    attn_qkv_bias: bool = True
    out_proj_bias: bool | None = None
    sandwich_norm: bool = False
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    layer_norm_eps: float = 1e-12
    position_embedding_type: str = "rotary"
    max_position_embeddings: int = 512
    rotary_embedding_base: int | float = 10000
    initializer_range: float | None = None
    classifier_dropout_prob: float = 0.1
    type_vocab_size: int = 2
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | None = 3
    activation_memory: str = "default"
    sparse_prediction: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        for name in LEGACY_OPTIONS:
            kwargs.pop(name, None)
        self._require("hidden_size", _is_number(self.hidden_size) and self.hidden_size >= 1, "must be positive")
        self._require("hidden_size", self.hidden_size <= LARGEST_SIZE, f"must not exceed {LARGEST_SIZE}")
        refuse_absurd_numbers(kwargs)
        if self.num_hidden_groups is None:
            self.num_hidden_groups = self.num_hidden_layers
        if self.out_proj_bias is None:
            self.out_proj_bias = not self.sandwich_norm
        if self.initializer_range is None:
            self.initializer_range = math.sqrt(2 / (5 * self.hidden_size))
        self.check()
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers, but overrides take part in the construction: defaults that depend on other options
        follow them and the result is checked. (transformers assigns overrides to the finished object.)"""
        own = {field.name for field in dataclasses.fields(cls)} & kwargs.keys() - {"dtype"}
        overrides = {name: kwargs.pop(name) for name in own}
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    @property
    def num_distinct_blocks(self):
        """Blocks with parameters of their own; more than `num_hidden_layers` when groups hold several."""
        return self.num_hidden_groups * self.num_inner_groups

    def check(self):
        """Raises ValueError naming the first option whose value is impossible or contradicts another one."""
        for name in POSITIVE_OPTIONS:
            self._require(name, _is_number(getattr(self, name)) and getattr(self, name) > 0, "must be positive")
        for name in NON_NEGATIVE_OPTIONS:
            self._require(name, _is_number(getattr(self, name)) and getattr(self, name) >= 0, "must not be negative")
        for name in FRACTIONAL_OPTIONS:
            self._require(name, getattr(self, name) <= LARGEST_NUMBER, f"must not exceed {LARGEST_NUMBER:.0f}")
        for name in [name for name in (*POSITIVE_OPTIONS, *NON_NEGATIVE_OPTIONS) if name not in FRACTIONAL_OPTIONS]:
            largest = LARGEST_COUNT if name.startswith("num_") else LARGEST_SIZE
            self._require(name, isinstance(getattr(self, name), int), "must be a whole number")
            self._require(name, getattr(self, name) <= largest, f"must not exceed {largest}")
        for name in PROBABILITY_OPTIONS:
            self._require(name, _is_number(getattr(self, name)) and 0 <= getattr(self, name) < 1, "must be in [0, 1)")
        self._check_shapes()
        self._check_sharing()
        known = is_known(self.hidden_act)
        self._require("hidden_act", known, f'must be "{FUSED_GELU}" or the name of a transformers activation')
        self._require("activation_memory", self.activation_memory in LEVELS, f"must be one of {LEVELS}")
        kinds = ("rotary", "absolute")
        self._require("position_embedding_type", self.position_embedding_type in kinds, f"must be one of {kinds}")

    def _check_shapes(self):
        heads = self.num_attention_heads
        self._require(
            "num_attention_heads", self.hidden_size % heads == 0, f"must divide hidden_size ({self.hidden_size})"
        )
        if self.position_embedding_type == "rotary":
            reason = f"gives heads of odd size {self.hidden_size // heads}, which rotary embeddings cannot rotate"
            self._require("num_attention_heads", self.hidden_size // heads % 2 == 0, reason)
        if self.pad_token_id is not None:
            fits = 0 <= self.pad_token_id < self.vocab_size
            self._require("pad_token_id", fits, f"must be below vocab_size ({self.vocab_size}) and not negative")
        if self.block_size:
            for name in ("hidden_size", "intermediate_size"):
                reason = f"must be a multiple of block_size ({self.block_size})"
                self._require(name, getattr(self, name) % self.block_size == 0, reason)

    def _check_sharing(self):
        fits = self.num_hidden_groups <= self.num_hidden_layers
        self._require("num_hidden_groups", fits, f"must not exceed num_hidden_layers ({self.num_hidden_layers})")
        fits = self.share_large_matrices <= self.num_distinct_blocks
        reason = f"must not exceed num_hidden_groups * num_inner_groups ({self.num_distinct_blocks})"
        self._require("share_large_matrices", fits, reason)

    def _require(self, name, condition, reason):
        if not condition:
            value = getattr(self, name)
            is_absurd = isinstance(value, int) and abs(value) > LARGEST_NUMBER  # Python refuses to print very long ones
            raise ValueError(f"{name}={'a huge number' if is_absurd else repr(value)[:80]} {reason}")


def _is_number(value):
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def refuse_absurd_numbers(options):
    """Raises ValueError if a configuration, of a model of any family, has a size that no model has. Already the object
    that transformers makes of it may not fit into the memory."""
    for name, value in options.items():
        largest = LARGEST_COUNT if str(name).startswith("num_") else LARGEST_SIZE
        if isinstance(value, int) and value > largest and str(name).endswith(SIZE_ENDINGS):
            raise ValueError(f"{name} must not exceed {largest}")
