"""Which parameters weight decay applies to, and which matrices Muon takes."""

from collections.abc import Mapping

import torch


def parameter_groups(
    model: torch.nn.Module, weight_decay: float, *, matrices: Mapping[torch.Tensor, int] | None = None
) -> list[dict]:
    """Parameters that need a gradient, in two groups: weight decay applies to all but biases and norms.

    ``matrices``: {weight: number of its parts}, for `src.optim.muon.CPUMuon8Bit`: a group more for each number.
    """
    matrices, decayed, exempt, by_parts = matrices or {}, [], [], {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter in matrices:
            by_parts.setdefault(matrices[parameter], []).append(parameter)
        else:
            (exempt if name.endswith("bias") or "norm" in name else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    for num_parts, parameters in sorted(by_parts.items()):
        groups.append({"params": parameters, "weight_decay": weight_decay, "num_parts": num_parts})
    return groups
