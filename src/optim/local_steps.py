"""Local steps with an outer optimizer (DiLoCo, arXiv 2311.08105): the arithmetic of one peer, without a swarm.

A peer makes steps of an *inner* optimizer, here LAMB, on its own ``parameters``. Now and then the peers average how far
each has come from the last common parameters, the ``anchor``: that difference, anchor - parameters, is used as a
gradient by the *outer* optimizer, SGD with Nesterov momentum, which steps the anchor; the parameters follow it.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from src.optim.lamb import CPULAMB8Bit, _total_norm, host_float32, is_flat_float32

logger = logging.getLogger(__name__)

# What `AnchoredLAMB.step` finds in the gradients of the anchor: an average of gradients, one of differences, or nothing
# that it may use.
GRADIENTS, DIFFERENCES, NOTHING = "gradients", "differences", "nothing"
NUM_SAMPLES = 128  # values by which two anchors are compared


class AnchoredLAMB(CPULAMB8Bit):
    """The inner and the outer optimizer, over the anchor. One object, because whoever has the anchor needs the state of
    both: a peer that joins, and one that goes on from its backup.

    `inner_step` moves other tensors than the anchor, with LAMB's statistics. `step` moves the anchor, by what
    ``contents`` says of its gradients: with LAMB where peers do not make local steps yet.

    :param outer_learning_rate: 1 with a momentum of 0 takes the average of the peers' parameters as it is
    :param outer_momentum: Nesterov's, with ``buffer = momentum * buffer + difference``, as `torch.optim.SGD` has it
    """

    def __init__(self, params, *args, outer_learning_rate: float, outer_momentum: float, **options):
        if not outer_learning_rate > 0:
            raise ValueError(f"outer_learning_rate must be positive, got {outer_learning_rate!r}")
        if not 0 <= outer_momentum < 1:
            raise ValueError(f"outer_momentum must be in [0, 1), got {outer_momentum!r}")
        # not among the options of the groups, which a state from elsewhere would replace
        self.outer_learning_rate, self.outer_momentum = outer_learning_rate, outer_momentum
        self.contents = GRADIENTS
        super().__init__(params, *args, **options)

    def _initial_state(self, param: torch.Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return {**super()._initial_state(param, group), "momentum": torch.zeros(param.shape, dtype=torch.float32)}

    @torch.no_grad()
    def inner_step(self, parameters: Sequence[torch.Tensor]) -> None:
        """One step of LAMB on ``parameters``, which stand for those of this optimizer, with their gradients.

        They may lie on another device: their statistics do not, so that each is copied and copied back.
        """
        anchors = [(anchor, group) for group in self.param_groups for anchor in group["params"]]
        grad_scale = self._grad_scale(_total_norm(parameter.grad for parameter in parameters))
        if grad_scale is None:
            return
        for parameter, (anchor, group) in zip(parameters, anchors, strict=True):
            if is_flat_float32(parameter, parameter.grad):
                self._update_parameter(parameter, self.state[anchor], group, grad_scale)
            else:
                copy = host_float32(parameter.detach()).contiguous()
                copy.grad = host_float32(parameter.grad).contiguous()
                self._update_parameter(copy, self.state[anchor], group, grad_scale)
                parameter.copy_(copy)

    @torch.no_grad()
    def step(self, closure=None) -> torch.Tensor | None:
        """One step of the anchor; none at all if a gradient is not finite."""
        if self.contents == GRADIENTS:
            return super().step(closure)
        anchors = [anchor for group in self.param_groups for anchor in group["params"]]
        if self.contents == NOTHING or self._grad_scale(_total_norm(anchor.grad for anchor in anchors)) is None:
            return None
        for anchor in anchors:
            momentum = self.state[anchor]["momentum"].mul_(self.outer_momentum).add_(anchor.grad)
            anchor.add_(anchor.grad, alpha=-self.outer_learning_rate)
            anchor.add_(momentum, alpha=-self.outer_learning_rate * self.outer_momentum)
        return None


class LocalWork:
    """What a peer has learned by steps of its own, between the moments at which others have a part in it.

    ``parameters``: those it trains, on any device; ``anchor``: the common ones, on the CPU, which are changed from
    outside: by an outer step, an average, another peer's state. In all these cases `follow` lets the parameters move as
    the anchor did, so that local steps made since are kept. They are measured from ``base``: the anchor, or what was
    handed over last, as that has become part of the anchor. If it has not, `take_back` turns ``base`` to the anchor
    again, so that the next difference holds this one, too, and its samples count.

    (If others have averaged what this peer took back, it counts twice: who is cut off cannot know.)

    While differences are on their way only the one who waits for them may call `take_back`, and nobody `hand_over`.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], anchor: Sequence[torch.Tensor]):
        self.parameters, self.anchor = parameters, anchor
        self.base = [tensor.detach().clone() for tensor in anchor]
        self.samples = 0  # by which the parameters have moved, since anything was handed over
        self._sent = self._returned = 0

    @property
    def weight(self) -> int:
        """Samples that are in the next difference."""
        return self.samples + self._returned

    def forget_nonsense(self) -> None:
        """Give up all local steps if they have led to values that are not finite."""
        if not all(bool(torch.isfinite(norm)) for norm in torch._foreach_norm(list(self.parameters))):
            logger.warning("gave up local steps with %d samples: the parameters are not finite", self.weight)
            self.forget()

    @torch.no_grad()
    def hand_over(self, differences: Sequence[torch.Tensor]) -> None:
        """Write anchor - parameters into ``differences``, for a round."""
        self.forget_nonsense()
        self._sent, self.samples, self._returned = self.weight, 0, 0
        for parameter, anchor, base, difference in zip(
            self.parameters, self.anchor, self.base, differences, strict=True
        ):
            base.copy_(parameter)
            torch.sub(anchor, base, out=difference)

    @torch.no_grad()
    def take_back(self) -> None:
        """Of what was handed over nothing has become part of the anchor, nor will it."""
        self._returned = self._sent
        for base, anchor in zip(self.base, self.anchor, strict=True):
            base.copy_(anchor)

    @torch.no_grad()
    def take_back_missing(self, averages: Sequence[torch.Tensor]) -> None:
        """The same for those values for which no average has come: the own ones still stand there, and become zero.

        Whoever lost the same part of a round as others, because of a reducer that died, has the same anchor as these.
        """
        for base, anchor, average in zip(self.base, self.anchor, averages, strict=True):
            missing = average == anchor - base
            base.copy_(torch.where(missing, anchor, base))
            average.masked_fill_(missing, 0.0)

    @torch.no_grad()
    def follow(self) -> None:
        """Move the parameters as the anchor has moved."""
        for parameter, anchor, base in zip(self.parameters, self.anchor, self.base, strict=True):
            new = anchor.detach().clone()  # at one moment: others may be changing it
            parameter.sub_(base.to(parameter)).add_(new.to(parameter))
            base.copy_(new)

    @torch.no_grad()
    def forget(self) -> None:
        """Give up all local steps: the parameters are those of the anchor."""
        self.samples = self._sent = self._returned = 0
        for parameter, anchor, base in zip(self.parameters, self.anchor, self.base, strict=True):
            base.copy_(anchor)
            parameter.copy_(anchor)

    @torch.no_grad()
    def sample(self) -> tuple[torch.Tensor, float]:
        """[128] values of the anchor, at places that all peers know, and how far the parameters are from these there,
        as a root mean square."""
        generator, total = torch.Generator().manual_seed(0), sum(anchor.numel() for anchor in self.anchor)
        places = torch.randint(total, (NUM_SAMPLES,), generator=generator).sort().values
        values, distances, start = [], [], 0
        for parameter, anchor in zip(self.parameters, self.anchor, strict=True):
            end = start + anchor.numel()
            inside = places[(places >= start) & (places < end)] - start
            start = end
            if len(inside):
                values.append(anchor.detach().view(-1)[inside].clone())
                own = parameter.detach().view(-1)[inside.to(parameter.device)]
                distances.append(values[-1] - host_float32(own))
        return torch.cat(values), float(torch.cat(distances).square().mean().sqrt())


__all__ = ["DIFFERENCES", "GRADIENTS", "NOTHING", "AnchoredLAMB", "LocalWork"]
