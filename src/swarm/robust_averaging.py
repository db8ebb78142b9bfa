"""Centered clipping that learns from history (arXiv 2012.10333; for all-reduce 2106.11257): what lies far from the
middle counts less, and what always lies on one side of it counts less still.

Clipping alone: the average v solves sum of w_i (x_i - v) min(1, r_i / |x_i - v|) = 0, so each contribution x_i is
pulled to within a radius r_i around it. The radius follows from the median of the distances, which a minority of liars
does not set, however far away they are. Honest contributions, whose distances are nearly equal in as many dimensions,
are hardly touched. But what hides in the noise of a single round passes. In the papers, therefore, each worker sends
its momentum, in which noise is averaged out and a lie is not. Here workers send what they always do, and the reducer
keeps their momentum: not the values but a sketch of them (a count sketch with signs that nobody else knows), from
which distances follow with an error of some per cent. What clipping does to the momenta, it does to the contributions
of the round, too.

A contribution of fewer samples is noisier, with the root of their number, and its radius is larger by as much. Who
claims few gains nothing: its weight falls faster than its radius grows. So it is with those that come for the first
time, whose momentum is as noisy as a single round.
"""

import math
import secrets
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch

RADIUS = 1.25  # times the median distance, as those of honest contributions differ a little
SKETCH = 1024  # numbers in place of a part's values
MOMENTUM = 0.95  # a round
MAX_MEMBERS = 128  # of whom the momentum of a part is kept: those who came last
MAX_ITERATIONS, TOLERANCE = 100, 1e-3  # of the shares
TINY = 1e-300


@dataclass
class Momentum:
    """Of one sender's contributions to one part; ``variance`` in units of that of a single sample."""

    sketch: torch.Tensor
    variance: float
    total: float = 1.0  # of the factors

    def add(self, sketch: torch.Tensor, weight: float) -> None:
        self.sketch.mul_(MOMENTUM).add_(sketch, alpha=1 - MOMENTUM)
        self.variance = MOMENTUM**2 * self.variance + (1 - MOMENTUM) ** 2 / weight
        self.total = MOMENTUM * self.total + (1 - MOMENTUM)

    @classmethod
    def begin(cls, sketch: torch.Tensor, weight: float) -> "Momentum":
        return cls(sketch * (1 - MOMENTUM), (1 - MOMENTUM) ** 2 / weight, 1 - MOMENTUM)

    @property
    def mean(self) -> torch.Tensor:
        return self.sketch / self.total

    @property
    def noise(self) -> float:
        return math.sqrt(self.variance) / self.total


class Clipping:
    """What a reducer knows of those whose contributions it averages; ``has_history``: whether rounds are alike."""

    def __init__(self, *, has_history: bool = True):
        self.has_history = has_history
        self._momenta: dict[int, dict[Hashable, Momentum]] = {}  # by part and sender
        self._signs, self._generator = torch.empty(0), torch.Generator().manual_seed(secrets.randbits(62))

    @torch.no_grad()
    def shares(self, part: int, contributions: Mapping[Hashable, tuple[torch.Tensor, float]]) -> dict[Hashable, float]:
        """The share of each sender in the average of a part; they are not negative, and their sum is 1.

        ``contributions``: {sender: (finite values, float32, of one shape; its weight, not negative)}, of which one is
        above zero. Who has no weight gets no share. Of less than three nobody can say who is wrong.
        """
        weights = {sender: weight for sender, (_, weight) in contributions.items() if weight > 0}
        sketches = {sender: self._sketch(contributions[sender][0]) for sender in weights}
        momenta = self._remember(part, sketches, weights) if self.has_history else {}
        factors = torch.ones(len(weights), dtype=torch.float64)
        amounts = torch.tensor(list(weights.values()), dtype=torch.float64)
        if len(weights) > 2:
            factors = clip_factors(torch.stack(list(sketches.values())), amounts, amounts.rsqrt())
            if momenta:
                means = torch.stack([momenta[sender].mean for sender in weights])
                noises = torch.tensor([momenta[sender].noise for sender in weights], dtype=torch.float64)
                factors *= clip_factors(means, amounts, noises)
        shares = factors * amounts
        shares = dict(zip(weights, (shares / shares.sum()).tolist(), strict=True))
        return {sender: shares.get(sender, 0.0) for sender in contributions}

    def _sketch(self, values: torch.Tensor) -> torch.Tensor:
        """[SKETCH]; its norm is about that of the values, and sketches of sums are sums of sketches."""
        num_rows = -(-values.numel() // SKETCH)
        if len(self._signs) < num_rows * SKETCH:
            more = torch.randint(2, (num_rows * SKETCH - len(self._signs),), generator=self._generator)
            self._signs = torch.cat([self._signs, 2.0 * more - 1.0])
        signed = torch.zeros(num_rows * SKETCH)
        torch.mul(values.reshape(-1), self._signs[: values.numel()], out=signed[: values.numel()])
        return signed.view(num_rows, SKETCH).sum(0)

    def _remember(self, part: int, sketches: dict, weights: dict) -> dict[Hashable, Momentum]:
        known = self._momenta.setdefault(part, {})
        for sender, sketch in sketches.items():
            momentum = known.pop(sender, None)
            if momentum is None:
                momentum = Momentum.begin(sketch, weights[sender])
            else:
                momentum.add(sketch, weights[sender])
            known[sender] = momentum  # in the order in which they came
        while len(known) > MAX_MEMBERS:
            del known[next(iter(known))]
        return known


def clip_factors(vectors: torch.Tensor, weights: torch.Tensor, noises: torch.Tensor) -> torch.Tensor:
    """By how much centered clipping shortens the way of each vector to their average: 1 where it does not.

    ``vectors``: [number, size]; ``weights``, above zero, and ``noises``, how noisy each is in comparison: [number].
    """
    vectors = (vectors - vectors[0]).double()  # parameters differ by little of their norm
    noises = noises / noises.median()
    between = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
    center = vectors[between.median(dim=1).values.argmin()]  # no liar, or near honest ones
    shares = torch.zeros_like(weights)
    for _ in range(MAX_ITERATIONS):
        distances = (vectors - center).norm(dim=1)
        radius = RADIUS * (distances / noises).median()
        factors = torch.where(distances > 0, radius * noises / distances.clamp_min(TINY), 1.0).clamp_max_(1.0)
        previous, shares = shares, factors * weights / (factors @ weights)
        center = shares @ vectors
        if float((shares - previous).abs().max()) < TOLERANCE:
            break
    return factors
