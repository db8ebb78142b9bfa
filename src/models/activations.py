"""Activations by the names that a configuration may give (`hidden_act`): transformers' own, and those listed here.

To add one, put it into ACTIVATIONS; it gets a tensor of any shape and returns one of that shape.
"""

from collections.abc import Callable

import torch
from transformers.activations import ACT2FN

FUSED_GELU = "gelu_fused"  # the original's name of the tanh approximation (arXiv 1606.08415)
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {FUSED_GELU: ACT2FN["gelu_pytorch_tanh"]}


def is_known(name: str) -> bool:
    return name in ACTIVATIONS or name in ACT2FN


def get_activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    return ACTIVATIONS[name] if name in ACTIVATIONS else ACT2FN[name]
