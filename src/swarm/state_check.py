"""Is a state that another peer sent one that can be trained on? Everything is checked before anything is changed."""

import hashlib
import math

import torch
from hivemind.optim.state_averager import dump_optimizer_state
from hivemind.utils import nested_pack

FINITE_BLOCK = 2**18  # values
SAMPLES_PER_TENSOR = 64  # values by which two peers' parameters are compared
MAX_MOMENTUM = 10.0  # times the parameters' norm, or a root mean square of one
MAX_DISTANCE, SMALL_DISTANCE = 0.5, 0.01  # between two peers: as a share of the norm; root mean square, always allowed


def check_state(metadata, tensors: list[torch.Tensor], *, parameters, optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError, saying what is wrong, if a downloaded state does not fit these parameters and this optimizer.

    ``metadata``: {"epoch": int, "optimizer_metadata": [...]} as hivemind's `dump_optimizer_state` describes a state;
    ``tensors``: parameters first, then those of the optimizer.
    """
    if not isinstance(metadata, dict) or type(metadata.get("epoch")) is not int or metadata["epoch"] < 0:
        raise ValueError("it has no epoch")
    own_layout, own_tensors = dump_optimizer_state(optimizer)
    expected = [*parameters, *own_tensors]
    if len(tensors) != len(expected):
        raise ValueError(f"it has {len(tensors)} tensors instead of {len(expected)}")
    for number, (tensor, own) in enumerate(zip(tensors, expected, strict=True)):
        if tensor.shape != own.shape or tensor.dtype != own.dtype:
            found, usual = (f"{t.dtype} of shape {list(t.shape)}" for t in (tensor, own))
            raise ValueError(f"tensor {number} is {found} instead of {usual}")
        if not is_finite(tensor):
            raise ValueError(f"tensor {number} is not finite")
    layout = metadata.get("optimizer_metadata")
    if not isinstance(layout, (list, tuple)) or len(layout) != len(own_layout):
        raise ValueError("its optimizer state has another structure")
    values = [_value(item, own, tensors[len(parameters) :]) for item, own in zip(layout, own_layout, strict=True)]
    own_state = optimizer.state_dict()
    state = nested_pack(values, structure=own_state)
    for group, own_group in zip(state["param_groups"], own_state["param_groups"], strict=True):
        if any(group.get(name) != own_group.get(name) for name in ("params", "num_parts")):
            raise ValueError("its optimizer state has other parameters")
    numbers = (number for group in own_state["param_groups"] for number in group["params"])
    for number, parameter in zip(numbers, tensors, strict=False):  # the first tensors are the parameters
        _check_statistics(state["state"].get(number, {}), parameter)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are, looked at a block at a time: `torch.isfinite` makes a copy of what it is given."""
    blocks = tensor.detach().reshape(-1).split(FINITE_BLOCK) if tensor.is_floating_point() else ()
    return all(bool(torch.isfinite(block).all()) for block in blocks)


def _value(item, own: dict, tensors: list[torch.Tensor]):
    """What an item of a layout stands for, if it is like ``own``."""
    if not isinstance(item, dict) or item.get("type") != own["type"]:
        raise ValueError("its optimizer state has another structure")
    if own["type"] == "tensor":
        if item.get("index") != own["index"]:
            raise ValueError("its optimizer state has another order")
        return tensors[own["index"]]
    value, usual = item.get("value"), own["value"]
    numbers = type(value) in (int, float) and type(usual) in (int, float)
    if not numbers and type(value) is not type(usual):
        raise ValueError(f"its optimizer state has {value!r} where {usual!r} is usual")
    if numbers and not (math.isfinite(value) and abs(value) < 2**53):
        raise ValueError(f"its optimizer state has the value {value}")
    return value


def _check_statistics(state: dict, parameter: torch.Tensor) -> None:
    """Second moments, scales and counters are never negative; the optimizer takes roots of them. Momentum is added to
    the parameters, and so cannot be many times as large."""
    for name, value in state.items():
        if name == "momentum":
            size, usual = float(value.norm()), max(float(parameter.norm()), math.sqrt(parameter.numel()))
            if size > MAX_MOMENTUM * usual:
                raise ValueError(f"its optimizer state has a momentum of {size:.3g}, beside parameters of {usual:.3g}")
        if name in ("state2", "absmax1", "absmax2") and value.is_floating_point() and float(value.min()) < 0:
            raise ValueError(f"its optimizer state has a negative {name}")
        if name == "step" and (value < 0 or value != int(value)):
            raise ValueError(f"its optimizer state has made {value} steps")


@torch.no_grad()
def sample_parameters(parameters, seed: bytes) -> torch.Tensor:
    """Some values of each tensor, at places that follow from ``seed``: whoever does not know it cannot prepare them."""
    samples = []
    for number, tensor in enumerate(parameters):
        digest = hashlib.sha256(seed + number.to_bytes(4, "little")).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        places = torch.randint(tensor.numel(), (SAMPLES_PER_TENSOR,), generator=generator)
        samples.append(tensor.detach().reshape(-1)[places].to(dtype=torch.float32))
    return torch.stack(samples)  # [tensors, samples]


def far_apart(one: torch.Tensor, other: torch.Tensor) -> str:
    """How two peers' samples differ more than training explains; empty if they do not."""
    if one.shape != other.shape or not bool(torch.isfinite(other).all()):
        return "its samples are malformed"
    distances = (one - other).norm(dim=1)
    allowed = (MAX_DISTANCE * other.norm(dim=1)).clamp_min(SMALL_DISTANCE * math.sqrt(SAMPLES_PER_TENSOR))
    worst = int((distances / allowed).argmax())
    if float(distances[worst]) <= float(allowed[worst]):
        return ""
    return (
        f"in tensor {worst} their values differ by {float(distances[worst] / other[worst].norm().clamp_min(1e-9)):.0%}"
    )
