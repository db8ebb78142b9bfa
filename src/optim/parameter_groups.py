"""Which parameters weight decay applies to."""

import torch


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Parameters that need a gradient, in two groups: weight decay applies to all but biases and norms."""
    decayed, exempt = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (exempt if name.endswith("bias") or "norm" in name else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
