"""LAMB (arXiv 1904.00962) with both moments on the CPU in 8 bits per value, quantised block-wise (arXiv 2110.02861)."""

import functools
import importlib.util
import logging
import math
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch

logger = logging.getLogger(__name__)

BLOCK_SIZE = 4096  # values that share one scale


@functools.cache
def _bitsandbytes() -> ModuleType:
    """``bitsandbytes.functional``, imported on first use because that takes seconds, without its notice about 4-bit."""
    noisy = logging.getLogger("bitsandbytes.backends.cpu.ops")
    previous_level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional
    finally:
        noisy.setLevel(previous_level)
    return bitsandbytes.functional


@functools.cache
def _code_books() -> tuple[torch.Tensor, torch.Tensor]:
    """The 256 values a code stands for: signed for the first moment, unsigned for the second."""
    return _bitsandbytes().create_dynamic_map(signed=True), _bitsandbytes().create_dynamic_map(signed=False)


def _dequantize(codes: torch.Tensor, absmax: torch.Tensor, code_book: torch.Tensor) -> torch.Tensor:
    return _bitsandbytes().dequantize_blockwise(codes, absmax=absmax, code=code_book, blocksize=BLOCK_SIZE)


def _quantize_into(codes: torch.Tensor, absmax: torch.Tensor, values: torch.Tensor, code_book: torch.Tensor) -> None:
    _bitsandbytes().quantize_blockwise(values, code=code_book, absmax=absmax, out=codes, blocksize=BLOCK_SIZE)


def _total_norm(tensors: Iterable[torch.Tensor]) -> float:
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float32).item() for tensor in tensors]
    return math.sqrt(sum(norm * norm for norm in norms))


def host_float32(values: torch.Tensor) -> torch.Tensor:
    """The same values in float32 on the CPU; no copy where they are that already."""
    return values.to(device="cpu", dtype=torch.float32)


def is_flat_float32(*tensors: torch.Tensor) -> bool:
    """Whether the values can be addressed in place as one flat float32 array in main memory."""
    return all(t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in tensors)


def _check_options(group: dict[str, Any]) -> None:
    if not group["lr"] >= 0:
        raise ValueError(f"lr must be 0 or more, got {group['lr']!r}")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']!r}")
    if not group["eps"] > 0:
        raise ValueError(f"eps must be positive, got {group['eps']!r}")
    if not group["weight_decay"] >= 0:
        raise ValueError(f"weight_decay must be 0 or more, got {group['weight_decay']!r}")


def _choose_kernel(kernel: str) -> str:
    if kernel not in ("auto", "numba", "bitsandbytes"):
        raise ValueError(f'kernel must be "auto", "numba" or "bitsandbytes", got {kernel!r}')
    has_numba = importlib.util.find_spec("numba") is not None
    if kernel == "numba" and not has_numba:
        raise ValueError('kernel must be "bitsandbytes" or "auto" where numba is not installed')
    if kernel == "auto":
        return "numba" if has_numba else "bitsandbytes"
    return kernel


class CPULAMB8Bit(torch.optim.Optimizer):
    """LAMB with block-wise 8-bit statistics in main memory: 2.01 bytes of state per quantised parameter.

    With m, v the moments of the (clipped) gradient, one step computes for each tensor::

        update = m / (sqrt(v) + eps) + weight_decay * param
        trust_ratio = min(norm(param), clamp_value) / norm(update)         # 1 where either norm is 0
        param -= lr * trust_ratio * update * sqrt(1 - beta2^step) / (1 - beta1^step)

    The moments are dequantised, updated and quantised again in chunks; ``update`` uses them as they are before they
    are quantised. Differs from the paper: the bias correction (left out when ``bias_correction`` is False) is one
    factor outside ``update``, so it does not enter the trust ratio, and the trust ratio is bounded through
    ``clamp_value`` only.

    A step in which any gradient is not finite changes nothing; ``num_skipped_steps`` counts these.

    :param clamp_value: upper bound of the parameter norm inside the trust ratio
    :param min_8bit_size: tensors of fewer elements (or fewer than one block of 4096) keep float32 moments
    :param reuse_grad_buffers: compute the update inside ``param.grad``, which saves a temporary as large as the
        largest tensor; the gradients are then lost after the step
    :param update_chunk_size: elements updated at once, a multiple of 4096; the result does not depend on it
    :param max_grad_norm: clip gradients to this norm over all parameters of all groups; None: do not clip
    :param kernel: what updates 8-bit statistics: "bitsandbytes" (the codes of the original implementation), "numba"
        (several times faster, nearer to float32 statistics, see ``lamb_kernel.py``) or "auto" (numba if installed).
        All kernels read and write the same state. "numba" takes float32 tensors in main memory, stored contiguously,
        a whole one at a time; others go through bitsandbytes.
    """

    def __init__(  # noqa: PLR0913 (an optimizer's options)
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        clamp_value: float = 10.0,
        bias_correction: bool = True,
        min_8bit_size: int = 65536,
        reuse_grad_buffers: bool = False,
        update_chunk_size: int = 2**17,
        max_grad_norm: float | None = None,
        kernel: str = "bitsandbytes",
    ):
        if not clamp_value > 0:
            raise ValueError(f"clamp_value must be positive, got {clamp_value!r}")
        if min_8bit_size < 0:
            raise ValueError(f"min_8bit_size must be 0 or more, got {min_8bit_size!r}")
        if update_chunk_size <= 0 or update_chunk_size % BLOCK_SIZE != 0:
            raise ValueError(f"update_chunk_size must be a multiple of {BLOCK_SIZE}, got {update_chunk_size!r}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive (None: no clipping), got {max_grad_norm!r}")
        self.clamp_value, self.bias_correction = clamp_value, bias_correction
        self.min_8bit_size, self.update_chunk_size = min_8bit_size, update_chunk_size
        self.reuse_grad_buffers, self.max_grad_norm = reuse_grad_buffers, max_grad_norm
        self.kernel = _choose_kernel(kernel)
        self.num_skipped_steps = 0
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group and allocates its statistics: memory use and state structure are fixed from the start."""
        super().add_param_group(param_group)
        _check_options(self.param_groups[-1])
        for param in self.param_groups[-1]["params"]:
            self.state[param] = self._initial_state(param, self.param_groups[-1])
        if self.kernel == "numba" and any("absmax1" in state for state in self.state.values()):
            from src.optim.lamb_kernel import compile_kernel  # here, not above: numba takes seconds to import

            compile_kernel()  # now, because a background thread would hold up the others while it compiles

    def _initial_state(self, param: torch.Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = {"step": 0, "weight_norm": 0.0, "step_norm": 0.0, "trust_ratio": 1.0}
        return state | self._zero_moment(param, 1) | self._zero_moment(param, 2)

    def _zero_moment(self, param: torch.Tensor, index: int) -> dict[str, torch.Tensor]:
        """The first or second moment of a tensor before its first step: codes and scales, or float32 if it is small."""
        if param.numel() < max(self.min_8bit_size, BLOCK_SIZE):
            return {f"state{index}": torch.zeros(param.shape, dtype=torch.float32)}
        zero = int(_code_books()[index - 1].abs().argmin())  # the code of 0.0 is not 0 in the signed code book
        return {
            f"state{index}": torch.full(param.shape, zero, dtype=torch.uint8),
            f"absmax{index}": torch.zeros(-(-param.numel() // BLOCK_SIZE), dtype=torch.float32),
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """One update of all parameters that have a gradient; nothing at all if a gradient is not finite."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale = self._grad_scale(self._gradient_norm())
        for group in self.param_groups if grad_scale is not None else ():
            for param in group["params"]:
                if param.grad is not None:
                    self._update_parameter(param, self.state[param], group, grad_scale)
        return loss

    def _gradient_norm(self) -> float:
        return _total_norm(p.grad for group in self.param_groups for p in group["params"] if p.grad is not None)

    def _grad_scale(self, grad_norm: float) -> float | None:
        """What gradients of this norm are multiplied by, to clip them; None, counted as a skipped step, if it is not
        finite."""
        if not math.isfinite(grad_norm):
            self.num_skipped_steps += 1
            logger.warning("Skipped an optimizer step: the gradient norm is %s", grad_norm)
            return None
        return 1.0 if self.max_grad_norm is None else min(1.0, self.max_grad_norm / (grad_norm + 1e-6))

    def _update_parameter(
        self, param: torch.Tensor, state: dict[str, Any], group: dict[str, Any], grad_scale: float
    ) -> None:
        state["step"] += 1
        update = self._update_buffer(param)  # [numel]
        if self.kernel == "numba" and state["state1"].dtype == torch.uint8 and is_flat_float32(param, param.grad):
            step_norm, param_norm = self._update_with_numba(param, state, update, group, grad_scale)
        else:
            step_norm, param_norm = self._update_in_chunks(param, state, update, group, grad_scale)
        state["weight_norm"], state["step_norm"] = min(param_norm, self.clamp_value), step_norm
        degenerate = param_norm == 0 or step_norm == 0
        state["trust_ratio"] = 1.0 if degenerate else state["weight_norm"] / step_norm
        step_size = group["lr"] * state["trust_ratio"] * self._bias_correction_factor(state["step"], group["betas"])
        param.add_(update.view(param.shape).to(param), alpha=-step_size)

    def _update_with_numba(
        self,
        param: torch.Tensor,
        state: dict[str, Any],
        update: torch.Tensor,
        group: dict[str, Any],
        grad_scale: float,
    ) -> tuple[float, float]:
        """Updates the statistics and writes the update; returns the norms of update and parameter."""
        from src.optim.lamb_kernel import update_tensor

        tensors = [state[key] for key in ("state1", "absmax1", "state2", "absmax2")]
        tensors += [*_code_books(), param.grad, param.detach(), update]
        options = grad_scale, *group["betas"], group["eps"], group["weight_decay"]
        arrays = tuple(tensor.view(-1).numpy() for tensor in tensors)
        return update_tensor(arrays, options, num_threads=torch.get_num_threads())

    def _update_in_chunks(
        self,
        param: torch.Tensor,
        state: dict[str, Any],
        update: torch.Tensor,
        group: dict[str, Any],
        grad_scale: float,
    ) -> tuple[float, float]:
        """As :meth:`_update_with_numba`, for any tensor, ``update_chunk_size`` elements at once."""
        flat_param, flat_grad = param.detach().reshape(-1), param.grad.reshape(-1)  # [numel]
        for start in range(0, param.numel(), self.update_chunk_size):
            chunk = slice(start, min(start + self.update_chunk_size, param.numel()))
            grad = host_float32(flat_grad[chunk])
            update_chunk = torch.mul(grad, grad_scale, out=update[chunk])
            self._write_update(update_chunk, state, chunk, group["betas"], group["eps"])
            if group["weight_decay"] != 0:
                update_chunk.add_(host_float32(flat_param[chunk]), alpha=group["weight_decay"])
        return _total_norm([update]), _total_norm([param])

    def _update_buffer(self, param: torch.Tensor) -> torch.Tensor:
        """Where the update of a tensor is written, [numel]: its gradient where that is asked for and possible."""
        if self.reuse_grad_buffers and is_flat_float32(param.grad):
            return param.grad.view(-1)
        return torch.empty(param.numel(), dtype=torch.float32)

    def _write_update(
        self, grad: torch.Tensor, state: dict[str, Any], chunk: slice, betas: tuple[float, float], eps: float
    ) -> None:
        """Updates the moments of one chunk with its gradient, then overwrites the gradient with m / (sqrt(v) + eps)."""
        beta1, beta2 = betas
        stored1, stored2 = state["state1"].view(-1)[chunk], state["state2"].view(-1)[chunk]
        quantised = stored1.dtype == torch.uint8
        if quantised:
            blocks = slice(chunk.start // BLOCK_SIZE, -(-chunk.stop // BLOCK_SIZE))
            absmax1, absmax2 = state["absmax1"][blocks], state["absmax2"][blocks]
            signed_book, unsigned_book = _code_books()
            moment1 = _dequantize(stored1, absmax1, signed_book)
            moment2 = _dequantize(stored2, absmax2, unsigned_book)
        else:
            moment1, moment2 = stored1, stored2

        moment1.mul_(beta1).add_(grad, alpha=1 - beta1)
        moment2.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if quantised:
            _quantize_into(stored1, absmax1, moment1, signed_book)
            _quantize_into(stored2, absmax2, moment2, unsigned_book)
        torch.div(moment1, moment2.sqrt().add_(eps), out=grad)

    def _bias_correction_factor(self, step: int, betas: tuple[float, float]) -> float:
        return math.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** step) if self.bias_correction else 1.0

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies a state into the allocated one, exactly and in place; ValueError if the structure differs.

        torch's own method would turn uint8 codes into the parameter's dtype. Everything is checked before anything
        is changed. Options of the groups (``lr``, ``betas``, ...) are taken from ``state_dict``.
        """
        groups, saved_groups = self.param_groups, state_dict["param_groups"]
        sizes, saved_sizes = ([len(group["params"]) for group in g] for g in (groups, saved_groups))
        if sizes != saved_sizes:
            raise ValueError(f"optimizer state has groups of {saved_sizes} parameters, expected {sizes}")
        pairs = []
        for group, saved_group in zip(groups, saved_groups, strict=True):
            missing = self.defaults.keys() - saved_group.keys()
            if missing:
                raise ValueError(f"optimizer state lacks the group options {sorted(missing)}")
            for param, index in zip(group["params"], saved_group["params"], strict=True):
                if index not in state_dict["state"]:
                    raise ValueError(f"optimizer state has no entry for parameter {index}")
                _check_same_structure(self.state[param], state_dict["state"][index], f"parameter {index}")
                pairs.append((self.state[param], state_dict["state"][index]))

        for state, saved_state in pairs:
            for key, value in saved_state.items():
                if isinstance(value, torch.Tensor):
                    state[key].copy_(value)
                else:
                    state[key] = value
        for group, saved_group in zip(groups, saved_groups, strict=True):
            group.update({key: value for key, value in saved_group.items() if key != "params"})


def _check_same_structure(state: dict[str, Any], saved_state: dict[str, Any], name: str) -> None:
    if state.keys() != saved_state.keys():
        raise ValueError(
            f"optimizer state of {name} has the keys {sorted(saved_state)}, expected {sorted(state)} "
            "(was it saved with another min_8bit_size?)"
        )
    for key, value in state.items():
        saved_value = saved_state[key]
        if not isinstance(value, torch.Tensor):
            if isinstance(saved_value, bool) or not isinstance(saved_value, int | float):
                raise ValueError(f"optimizer state of {name}: {key} must be a number, got {type(saved_value).__name__}")
        elif not isinstance(saved_value, torch.Tensor):
            raise ValueError(f"optimizer state of {name}: {key} must be a tensor, got {type(saved_value).__name__}")
        elif (saved_value.dtype, saved_value.shape) != (value.dtype, value.shape):
            raise ValueError(
                f"optimizer state of {name}: {key} is {saved_value.dtype} {tuple(saved_value.shape)}, "
                f"expected {value.dtype} {tuple(value.shape)}"
            )
