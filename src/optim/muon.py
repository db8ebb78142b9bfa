"""Muon for a model's large matrices, with its momentum in 8 bits per value; 8-bit LAMB for all other parameters.

Muon (https://kellerjordan.github.io/posts/muon/) steps along the momentum of a matrix with all of its singular values
made about equal. Five products in a row, a Newton-Schulz iteration, do that without a decomposition.
"""

import logging
import math
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from src.optim.lamb import (
    BLOCK_SIZE,
    CPULAMB8Bit,
    _code_books,
    _dequantize,
    _quantize_into,
    host_float32,
)

logger = logging.getLogger(__name__)

NUM_STEPS = 5
A, B, C = 3.4445, -4.7750, 2.0315  # of the polynomial; they take singular values from 0.01 on near to 1 in five steps
STEP_RMS = 0.2  # of an update's values at a learning rate of 1, about what Adam's have (arXiv 2502.16982)
COLUMNS_AT_ONCE = 1024  # that are multiplied at a time, which bounds the memory
NICENESS = 10  # of the thread that works while the next batches are computed


def newton_schulz_(matrix: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of a [rows, columns] matrix near to 1, in place: most end between 0.7 and 1.2.

    Those below a hundredth of the Frobenius norm stay smaller. A matrix of zeros stays one.
    """
    matrix.div_(torch.linalg.vector_norm(matrix, dtype=torch.float32) + 1e-20)
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()  # [small, large]
    for _ in range(NUM_STEPS):
        gram = wide @ wide.t()
        factor = torch.addmm(gram, gram, gram, beta=B, alpha=C)
        for columns in wide.split(COLUMNS_AT_ONCE, dim=1):
            columns.copy_(torch.addmm(columns, factor, columns, beta=A))
    return matrix


def newton_schulz_operations(rows: int, columns: int) -> int:
    """Floating-point operations of :func:`newton_schulz_`."""
    small, large = sorted((rows, columns))
    return NUM_STEPS * (4 * small**2 * large + 2 * small**3)


class CPUMuon8Bit(CPULAMB8Bit):
    """Muon in main memory: 1.001 bytes of state per value of a large matrix; see `CPULAMB8Bit` for all the rest.

    A group with the option ``num_parts`` above 0 holds matrices whose rows are so many equal parts, each of which is
    orthogonalised by itself: three for stacked queries, keys and values. Their step is, for each part::

        momentum = beta * momentum + gradient                              # kept in 8 bits, in blocks of 4096
        update = newton_schulz(gradient + beta * momentum)                 # Nesterov
        param -= lr * weight_decay * param + lr * 0.2 * sqrt(max(rows, columns)) * update

    ``lr`` means the same for both kinds of groups, so one learning rate and one schedule serve all parameters.

    :param momentum: beta
    :param device: where matrices are orthogonalised; a GPU gets one part at a time, in bfloat16 if it has that. One
        whose memory is full leaves the work to the CPU.
    :param in_background: let CPU threads of low priority do it, because others compute meanwhile
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        device: torch.device | str = "cpu",
        in_background: bool = False,
        **options,
    ):
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum!r}")
        self.momentum, self.device, self.in_background = momentum, torch.device(device), in_background
        self._norm: float | None = None  # of the gradients, when the next step is prepared
        self._prepared: dict[torch.Tensor, tuple[torch.Tensor, dict[str, torch.Tensor]]] = {}
        self._stream = None
        super().__init__(params, lr, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        num_parts = param_group.setdefault("num_parts", 0)
        for param in param_group["params"] if num_parts else ():
            if param.dim() != 2 or param.shape[0] % num_parts:
                raise ValueError(f"num_parts={num_parts} does not divide the rows of a parameter {list(param.shape)}")
        super().add_param_group(param_group)

    def _initial_state(self, param: torch.Tensor, group: dict[str, Any]) -> dict[str, Any]:
        if not group["num_parts"]:
            return super()._initial_state(param, group)
        return {"step": 0, **self._zero_moment(param, 1)}

    @torch.no_grad()
    def prepare(self) -> None:
        """Do the part of the next step that takes long, which changes neither parameters nor state.

        So others may read and average both meanwhile. Gradients are used up; `step` calls this where nobody has.
        """
        self._prepared.clear()
        self._norm = norm = super()._gradient_norm()
        if not math.isfinite(norm):
            return
        matrices = [
            (param, group)
            for group in self.param_groups
            for param in group["params"]
            if group["num_parts"] and param.grad is not None
        ]
        for param, _ in matrices:
            self._prepared[param] = self._advance_momentum(param, self._grad_scale(norm))
        work = [
            part
            for param, group in matrices
            for part in self._prepared[param][0].view(param.shape).chunk(group["num_parts"])
        ]
        if self.in_background and self.device.type == "cpu":
            at_low_priority(lambda: self._orthogonalise(work))
        else:
            self._orthogonalise(work)

    def _advance_momentum(self, param: torch.Tensor, grad_scale: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The matrix to be orthogonalised, [numel], and the momentum after the step as it will be kept."""
        state, update = self.state[param], self._update_buffer(param)
        following = {key: torch.empty_like(value) for key, value in state.items() if isinstance(value, torch.Tensor)}
        stored, new, grad = state["state1"].view(-1), following["state1"].view(-1), param.grad.reshape(-1)
        for start in range(0, param.numel(), self.update_chunk_size):
            chunk = slice(start, min(start + self.update_chunk_size, param.numel()))
            direction = torch.mul(host_float32(grad[chunk]), grad_scale, out=update[chunk])
            if stored.dtype != torch.uint8:
                moment = torch.add(direction, stored[chunk], alpha=self.momentum, out=new[chunk])
            else:
                blocks = slice(chunk.start // BLOCK_SIZE, -(-chunk.stop // BLOCK_SIZE))
                moment = _dequantize(stored[chunk], state["absmax1"][blocks], _code_books()[0])
                moment.mul_(self.momentum).add_(direction)
                _quantize_into(new[chunk], following["absmax1"][blocks], moment, _code_books()[0])
            direction.add_(moment, alpha=self.momentum)
        return update, following

    def _orthogonalise(self, parts: list[torch.Tensor]) -> None:
        for part in parts:
            if self.device.type == "cpu":
                newton_schulz_(part)
                continue
            try:
                self._orthogonalise_on_device(part)
            except torch.OutOfMemoryError:
                logger.warning("%s has no memory left for Muon's products, they go to the CPU from now on", self.device)
                self.device = torch.device("cpu")
                newton_schulz_(part)

    def _orthogonalise_on_device(self, part: torch.Tensor) -> None:
        """In a stream of its own, which takes what the model's kernels leave free."""
        with torch.cuda.device(self.device):
            self._stream = self._stream or torch.cuda.Stream()
            with torch.cuda.stream(self._stream):
                native = torch.cuda.is_bf16_supported(including_emulation=False)
                matrix = part.to(self.device, torch.bfloat16 if native else torch.float32)
                part.copy_(newton_schulz_(matrix))
                self._stream.synchronize()

    def _gradient_norm(self) -> float:
        if self._norm is None:
            self.prepare()
        norm, self._norm = self._norm, None
        return norm

    def _update_parameter(
        self, param: torch.Tensor, state: dict[str, Any], group: dict[str, Any], grad_scale: float
    ) -> None:
        if not group["num_parts"]:
            super()._update_parameter(param, state, group, grad_scale)
            return
        update, momentum = self._prepared.pop(param)
        state["step"] += 1
        for key, value in momentum.items():
            state[key].copy_(value)
        rows, columns = param.shape[0] // group["num_parts"], param.shape[1]
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.add_(update.view(param.shape).to(param), alpha=-group["lr"] * STEP_RMS * math.sqrt(max(rows, columns)))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in `CPULAMB8Bit`; a step that is prepared keeps its direction, and the loaded momentum stays."""
        super().load_state_dict(state_dict)
        self._prepared = {param: (update, {}) for param, (update, _) in self._prepared.items()}


def at_low_priority(work: Callable[[], None]) -> None:
    """Do it on a thread that gives way to others, and so do the threads among which torch shares out its products.

    They are started by it and end with it. Where threads have no priority of their own (macOS), it stays as it is.
    """
    num_threads = torch.get_num_threads()

    def give_way() -> None:
        if hasattr(os, "setpriority") and os.uname().sysname == "Linux":
            thread = threading.get_native_id()
            priority = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, max(priority, NICENESS))
        torch.set_num_threads(num_threads)  # a new thread would take all cores

    with ThreadPoolExecutor(1, thread_name_prefix="muon", initializer=give_way) as pool:
        pool.submit(torch.no_grad()(work)).result()
