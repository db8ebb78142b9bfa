"""LAMB with 8-bit statistics as RuLeanALBERT computed it: each tensor at once, through ``bitsandbytes.functional``.

The yardstick of `benchmarks/lamb_step.py`; written from a description of the algorithm and checked against recorded
trajectories (tests/optim/test_lamb_kernel.py). All arithmetic that can be in place is.
"""

import math
from collections.abc import Iterable

import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_blockwise, quantize_blockwise

BLOCK_SIZE = 4096


class WholeTensorLAMB8Bit:
    """The update of `CPULAMB8Bit`, whose docstring has the formula; every tensor has 8-bit statistics."""

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        clamp_value: float = 1e9,
        max_grad_norm: float = 1.0,
    ):
        self.params = list(params)
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.clamp_value, self.max_grad_norm, self.num_steps = clamp_value, max_grad_norm, 0
        self.books = create_dynamic_map(signed=True), create_dynamic_map(signed=False)
        self.moments = [[self._zeros(param, book) for book in self.books] for param in self.params]

    @staticmethod
    def _zeros(param: torch.Tensor, book: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of the blocks of an all-zero moment."""
        codes = torch.full(param.shape, int(book.abs().argmin()), dtype=torch.uint8)
        return codes, torch.zeros(-(-param.numel() // BLOCK_SIZE))

    @torch.no_grad()
    def step(self) -> None:
        self.num_steps += 1
        torch.nn.utils.clip_grad_norm_(self.params, self.max_grad_norm)
        for param, stored in zip(self.params, self.moments, strict=True):
            self._update(param, stored)

    def _update(self, param: torch.Tensor, stored: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        beta1, beta2 = self.betas
        moment1, moment2 = (
            dequantize_blockwise(codes, absmax=absmax, code=book, blocksize=BLOCK_SIZE)
            for (codes, absmax), book in zip(stored, self.books, strict=True)
        )
        moment1.mul_(beta1).add_(param.grad, alpha=1 - beta1)
        moment2.mul_(beta2).addcmul_(param.grad, param.grad, value=1 - beta2)
        for moment, (codes, absmax), book in zip((moment1, moment2), stored, self.books, strict=True):
            quantize_blockwise(moment, code=book, absmax=absmax, out=codes, blocksize=BLOCK_SIZE)
        update = moment1.div_(moment2.sqrt_().add_(self.eps)).add_(param, alpha=self.weight_decay)
        update_norm, param_norm = float(update.norm()), float(param.norm())
        trust_ratio = min(param_norm, self.clamp_value) / update_norm if param_norm and update_norm else 1.0
        correction = math.sqrt(1 - beta2**self.num_steps) / (1 - beta1**self.num_steps)
        param.add_(update, alpha=-self.lr * trust_ratio * correction)
