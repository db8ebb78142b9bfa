"""The model's gradient buffers between Trainer, which thinks in local steps, and the swarm, which thinks in epochs."""

import logging

import torch

from src.trainer.hf_trainer import LossScaler

logger = logging.getLogger(__name__)


class GradientBuffers:
    """Gradients of ``parameters``, with what a local step needs done to them.

    ``reused``: an epoch's gradients are summed up in these buffers, so that Trainer must not reset them after a step.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], *, scaler: LossScaler | None = None, reused: bool = False):
        self.parameters, self.scaler, self.reused = parameters, scaler, reused
        self._hidden: list[torch.Tensor | None] = []

    def gradients(self) -> list[torch.Tensor]:
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def are_finite(self) -> bool:
        """Also adapts the loss scale to it."""
        gradients = self.gradients()
        finite = not gradients or bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all())
        if self.scaler is not None:
            self.scaler.update(finite)
        return finite

    @torch.no_grad()
    def unscale(self) -> None:
        """Take the loss scale out of gradients that have just been computed."""
        self._multiply(self.gradients(), 1.0 if self.scaler is None else 1.0 / self.scaler.scale)

    @torch.no_grad()
    def multiply(self, factor: float) -> None:
        self._multiply(self.gradients(), factor)

    @staticmethod
    def _multiply(gradients: list[torch.Tensor], factor: float) -> None:
        if factor != 1.0 and gradients:
            torch._foreach_mul_(gradients, factor)

    def reset(self) -> None:
        for gradient in self.gradients():
            gradient.zero_()

    def hide(self) -> None:
        """From Trainer, which is about to reset them."""
        if self.reused:
            self._hidden = [parameter.grad for parameter in self.parameters]
            for parameter in self.parameters:
                parameter.grad = None

    @torch.no_grad()
    def show(self) -> None:
        """Again what was hidden; gradients of the next batch will be added, and these are scaled."""
        for parameter, gradient in zip(self.parameters, self._hidden, strict=False):
            parameter.grad = gradient
        if self._hidden and self.scaler is not None:
            self._multiply(self.gradients(), self.scaler.scale)
        self._hidden = []


def all_finite(tensors: list[torch.Tensor]) -> bool:
    return bool(torch.isfinite(torch.stack(torch._foreach_norm(tensors))).all())
