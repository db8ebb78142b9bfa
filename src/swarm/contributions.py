"""What may enter an average: nothing that is not finite, far larger than usual, or weighted beyond reason.

hivemind 1.1.12 adds up whatever arrives, so one peer's NaN ruins the parameters of all. Here a reducer looks at all
contributions to a part before it averages them, and a sender looks at what reducers send back. Not detected: values
of ordinary size that point the wrong way.
"""

import logging
import math
import secrets
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from statistics import median, median_high, median_low

import torch
from hivemind.averaging.partition import AllreduceException

from src.swarm.robust_averaging import Clipping

logger = logging.getLogger(__name__)

MAX_NORM_RATIO = 10.0  # how far a part's norm may lie above the usual one, whatever the rest of the contribution is
# Honest peers differ by more than that in single parts: who has no labels of sentence order has no gradient there, nor
# in the rows of words it never meets. So a part may be anything, as long as all of the sender's parts together stay
# below this many times what is usual for a whole contribution. Measured in a tiny model at the end of its training: the
# gradient of a language that it has not seen yet was 60 times that of the one it knows, in batches of equal size.
MAX_WHOLE_RATIO = 80.0
# One round shows little of what is usual: a single sample that the model knew by heart had 1/350 of another's.
# Without own values and memory there is even less to go by: the first parts of a round may be unlike the rest.
FIRST_WHOLE_RATIO, UNKNOWN_RATIO = 500.0, 1e6
FORGETTING = 0.9  # a round
# Between the parameters of honest peers, as a share of their norm: what is always allowed, in the first round, how many
# times what was usual in the rounds before, and how many times what this peer has moved by itself since others' values
# entered its own: without a common round of gradients each goes its own way. All rounds of late may move them in one
# direction by DRIFT_RATIO times what is allowed, or many small lies would be a large one.
LEAST_DISTANCE, FIRST_DISTANCE, DISTANCE_RATIO, MOVEMENT_RATIO, DRIFT_RATIO = 0.02, 0.1, 20.0, 3.0, 1.5
USUAL_GROWTH = 1.02  # a round: else who goes to the limit once would be usual in the next
# Root mean squares: up to the first, parameters are as good as zero, and a step of the optimizer is more than a share.
TINY_PARAMETERS, SMALL_DISTANCE = 0.006, 0.003
DRIFT_SAMPLES = 256  # of a part, by which its drift is told
MAX_WEIGHT_RATIO = 2.0  # to the median of a round of three or more: nobody's samples count more


class Usual:
    """The highest of the norms of late, and from how many rounds that is known."""

    def __init__(self):
        self.norm, self.num_rounds = 0.0, 0

    def remember(self, norm: float) -> None:
        self.norm = max(norm, FORGETTING * self.norm)
        self.num_rounds += 1

    def ratio(self) -> float:
        """How far a whole contribution may lie above what is usual."""
        return FIRST_WHOLE_RATIO if self.num_rounds <= 1 else MAX_WHOLE_RATIO


class Drift:
    """Where others' values have led a part of the parameters, told by samples at places that nobody else knows."""

    def __init__(self, num_values: int):
        generator = torch.Generator().manual_seed(secrets.randbits(62))
        self.places = torch.randint(num_values, (DRIFT_SAMPLES,), generator=generator)
        self.led, self.left_at = torch.zeros(DRIFT_SAMPLES), None

    def remember(self, own: torch.Tensor, difference: torch.Tensor) -> None:
        """``own`` values become ``own + difference``."""
        samples = difference.reshape(-1)[self.places]
        self.led.mul_(FORGETTING).add_(samples)
        self.left_at = own.reshape(-1)[self.places] + samples

    def with_difference(self, difference: torch.Tensor) -> float:
        """How far the values would be led with one more difference."""
        samples = self.led * FORGETTING + difference.reshape(-1)[self.places]
        return float(samples.norm()) * math.sqrt(difference.numel() / DRIFT_SAMPLES)

    def own_movement(self, own: torch.Tensor) -> float:
        """Since then, as a share of the norm."""
        samples = own.reshape(-1)[self.places]
        return float((samples - self.left_at).norm() / samples.norm().clamp_min(1e-30))


def most_weight(weights: Iterable[float], *, ratio: float = MAX_WEIGHT_RATIO) -> float:
    """What a weight counts at most; of two, who has done more would lose most of it."""
    counted = [weight for weight in weights if weight > 0]
    return ratio * median(counted) if len(counted) > 2 else math.inf


class Judge:
    """Decides which contributions to a part are averaged; remembers across rounds what is usual.

    What is usual follows this peer's own values, which nobody else can move; only who has none goes by the others'.

    ``max_weight``: a larger weight counts as this, one beyond ten times this is not believed at all.
    ``harmless_rms``: values whose root mean square is not above this are never too large.
    ``max_distance``: how far values may lie from this peer's own at most, as a share of their norm; None: anywhere. For
    parameters, which are nearly equal on all peers: up to that it depends on what is usual, see `LEAST_DISTANCE`.
    ``grows_with_weight``: as the sum of steps of one size does, while a mean of gradients does not. Then before each
    round ``own_weight`` must be set to that of this peer's contribution, 0 if it has none, and ``weight_of_average`` to
    that of which the average is at most, as far as the members say.
    ``robust_averaging``: "clip" for what is left then to be averaged by `src.swarm.robust_averaging`, where nobody
    counts more than the median, as samples can be claimed; None: the mean.
    """

    own_weight = weight_of_average = 0.0

    def __init__(
        self,
        *,
        max_weight: float,
        harmless_rms: float = 0.0,
        max_distance: float | None = None,
        grows_with_weight: bool = False,
        robust_averaging: str | None = None,
    ):
        self.max_weight, self.harmless_rms, self.max_distance = max_weight, harmless_rms, max_distance
        self.grows_with_weight = grows_with_weight
        self.clipping = Clipping(has_history=not self.judges_parameters) if robust_averaging == "clip" else None
        self.whole, self.parts = Usual(), defaultdict(Usual)  # by number of the part
        self.distances: dict[int, float] = defaultdict(float)  # the same
        self.drifts: dict[int, Drift] = {}

    @property
    def judges_parameters(self) -> bool:
        """Those are nearly equal on all peers; gradients are not."""
        return self.max_distance is not None

    def room_for_whole(self, own_norm: float) -> float:
        """Up to which norm a whole contribution is believed, to be asked once a round; infinite if nothing is known."""
        if self.judges_parameters:
            return 0.0  # parameters hardly differ, in no part
        self.whole.remember(own_norm)
        if self.grows_with_weight and self.own_weight > 0:  # steps at a learning rate of zero lead nowhere, others' too
            return self.whole.ratio() * self.whole.norm
        return self.whole.ratio() * self.whole.norm or math.inf

    def combine(
        self,
        part: int,
        contributions: dict[int, tuple[torch.Tensor, float]],
        *,
        shape: torch.Size,
        own: int | None,
        harmless: float,
        small: float = 0.0,
        before: dict[int, float] | None = None,
        names: Sequence[Hashable] | None = None,
    ) -> tuple[torch.Tensor, dict[int, str]]:
        """The weighted mean of the contributions to a part that can be believed, and why others cannot, by sender.

        ``own``: which contribution is this peer's; ``harmless``: a norm up to which a part is never too large;
        ``small``: one up to which a sender's parts of this round together are not, infinite if this peer's own values
        say nothing of that; ``before``: what that norm is without this part, by sender, and is then with it; ``names``:
        by which senders are known again in other rounds, by default their numbers.
        """
        before = {} if before is None else before
        refused, weights, norms = {}, {}, {}
        for sender, (values, weight) in contributions.items():
            try:
                norms[sender] = self._checked_norm(values, weight, shape)
                weights[sender] = min(weight, self.max_weight)
            except ValueError as error:
                refused[sender] = str(error)
            except Exception as error:  # whatever it is that it sent: the others have their average
                refused[sender] = f"cannot be read: {error!r}"
        sums = {sender: math.hypot(norm, before.get(sender, 0.0)) for sender, norm in norms.items()}
        unlike = self._too_large(part, norms, sums, weights, shape, own, harmless, small)
        unlike.update(self._too_far(part, contributions, norms, weights, own))
        for sender in unlike:
            del weights[sender], norms[sender], sums[sender]
        before.update(sums)
        refused.update(unlike)
        if not weights:  # not even this peer's own: better nothing than NaN
            values = contributions[own][0] if own in contributions else torch.zeros(shape)
            return torch.nan_to_num(values, 0.0, 0.0, 0.0), refused
        # the higher of two: else one who sends nothing but zeros would make the other's values look large
        self.parts[part].remember(norms[own] if weights.get(own) else median_high(norms.values()))
        is_trainer = bool(weights.get(own))
        counted = [weight for weight in weights.values() if weight > 0]
        limit = most_weight(weights.values(), ratio=MAX_WEIGHT_RATIO if self.clipping is None else 1.0)
        weights = {sender: min(weight, limit) for sender, weight in weights.items()}
        total = math.fsum(weights.values())
        if total == 0:  # all only tag along: nobody will use the result
            weights, total = dict.fromkeys(weights, 1.0), float(len(weights))
        if self.clipping is not None:
            known_as = {sender: sender if names is None else names[sender] for sender in weights}
            counted = {known_as[sender]: (contributions[sender][0], weight) for sender, weight in weights.items()}
            shares = self.clipping.shares(part, counted)
            weights, total = {sender: shares[name] for sender, name in known_as.items()}, 1.0
        average = torch.zeros(shape)
        for sender, weight in weights.items():
            average.add_(contributions[sender][0], alpha=weight)
        average.div_(total)
        if self.judges_parameters and is_trainer and len(counted) > 1:
            self._remember_drift(part, contributions[own][0], average - contributions[own][0])
        return average, refused

    def _checked_norm(self, values: torch.Tensor, weight: float, shape: torch.Size) -> float:
        """Raises ValueError if no average can be taken of a contribution."""
        if values.shape != shape:
            raise ValueError(f"has shape {list(values.shape)} instead of {list(shape)}")
        if not values.is_floating_point():
            raise ValueError(f"has values of type {values.dtype}")
        if not 0 <= weight <= 10 * self.max_weight:  # nor NaN
            raise ValueError(f"has the weight {weight:g}, possible are 0 to {self.max_weight:g}")
        if not math.isfinite(norm := float(values.norm())):
            raise ValueError("is not finite")
        return norm

    def _too_large(self, part, norms, sums, weights, shape, own, harmless, small) -> dict[int, str]:
        if not norms:
            return {}
        usual = self.parts[part].norm
        if weights.get(own):
            reference, typical_weight = max(usual, norms[own]), weights[own]
        else:  # most of the others cannot lie far from what they usually send
            middle = median_low(norms.values())
            reference = max(usual, min(middle, MAX_NORM_RATIO * usual) if usual else middle)
            typical_weight = median_low(weights.values())
        if small == math.inf:
            small = self._room_by_memory(part, median_low(sums.values()))
        harmless = max(harmless, self.harmless_rms * math.sqrt(shape.numel()))
        refused = {}
        for sender, norm in norms.items():
            # gradients of fewer samples are noisier, with the root of their number; they weigh less, too
            allowance = math.sqrt(max(1.0, typical_weight / weights[sender])) if weights[sender] > 0 else math.inf
            if self.grows_with_weight and typical_weight > 0:
                allowance = max(allowance, min(weights[sender], most_weight(weights.values())) / typical_weight)
            if not self._is_possible(norm, sums[sender], reference * allowance, harmless, small * allowance):
                refused[sender] = f"has the norm {norm:.3g} where {reference:.3g} is usual"
        return refused

    def _room_by_memory(self, part: int, middle: float) -> float:
        """For `small` where there are no own values: what was usual in all parts that this peer has averaged so far."""
        if self.judges_parameters:
            return 0.0  # see `room_for_whole`
        known = math.hypot(*(usual.norm for usual in self.parts.values()))
        if known and self.parts[part].num_rounds:
            return self.parts[part].ratio() * known
        return UNKNOWN_RATIO * max(known, middle) or (0.0 if self.grows_with_weight else math.inf)

    @staticmethod
    def _is_possible(norm: float, with_others: float, reference: float, harmless: float, small: float) -> bool:
        return norm <= max(MAX_NORM_RATIO * reference, harmless) or with_others <= small

    def _too_far(self, part, contributions, norms, weights, own) -> dict[int, str]:
        # hivemind lets an auxiliary peer take part with old values and a weight of zero: they say nothing of others'
        if not self.judges_parameters or not weights.get(own):
            return {}
        refused, shares, own_values = {}, [], contributions[own][0]
        for sender in (sender for sender, weight in weights.items() if weight > 0 and sender != own):
            difference = contributions[sender][0] - own_values
            if reason := self._distance_objection(part, own_values, difference):
                refused[sender] = reason
            else:
                shares.append(float(difference.norm()) / max(norms[own], 1e-30))
        if shares:
            self._remember_distance(part, median_low(shares))
        return refused

    def _distance_objection(self, part: int, own: torch.Tensor, difference: torch.Tensor) -> str:
        """Why parameters cannot differ like this from this peer's; empty if they can."""
        own_norm, distance, allowed = float(own.norm()), float(difference.norm()), self._allowed_distance(part, own)
        if distance > allowed:
            return f"lies {distance:.3g} from this peer's values, which have the norm {own_norm:.3g}"
        if part in self.drifts:
            led = self.drifts[part].with_difference(difference)
            if led > DRIFT_RATIO * allowed:
                return f"leads this peer's values, which have the norm {own_norm:.3g}, by {led:.3g} in a few rounds"
        return ""

    def _allowed_distance(self, part: int, own: torch.Tensor) -> float:
        own_norm, root = float(own.norm()), math.sqrt(own.numel())
        if part in self.drifts:
            movement = MOVEMENT_RATIO * self.drifts[part].own_movement(own)
            share = max(LEAST_DISTANCE, DISTANCE_RATIO * self.distances[part], movement)
        else:
            share = FIRST_DISTANCE
        small = SMALL_DISTANCE * root if own_norm <= TINY_PARAMETERS * root else 0.0
        return max(min(self.max_distance, share) * own_norm, small)

    def _remember_distance(self, part: int, share: float) -> None:
        known = self.distances[part]
        most = max(USUAL_GROWTH * known, LEAST_DISTANCE / DISTANCE_RATIO)
        self.distances[part] = max(FORGETTING * known, min(share, most))

    def _remember_drift(self, part: int, own: torch.Tensor, difference: torch.Tensor) -> None:
        if part not in self.drifts:
            self.drifts[part] = Drift(own.numel())
        self.drifts[part].remember(own, difference)

    def check_average(
        self,
        part: int,
        own: torch.Tensor,
        average: torch.Tensor,
        *,
        harmless: float,
        small: float = 0.0,
        before: float = 0.0,
    ) -> float:
        """Raises AllreduceException if ``average`` cannot be an honest one of the part ``own`` belongs to.

        ``harmless``, ``small`` and ``before`` as for `combine`, ``before`` for the one who sent it. An infinite
        ``harmless`` means that the own values say nothing. Returns what ``before`` is for the next part.
        """
        if average.shape != own.shape:
            raise AllreduceException(f"sent an average of shape {list(average.shape)} instead of {list(own.shape)}")
        norm, own_norm = float(average.norm()), float(own.norm())
        if not math.isfinite(norm):
            raise AllreduceException("sent an average that is not finite")
        together = math.hypot(norm, before)
        if harmless == math.inf:
            return together
        reference = max(own_norm, self.parts[part].norm)
        harmless = max(harmless, self.harmless_rms * math.sqrt(own.numel()))
        if self.grows_with_weight and self.own_weight > 0:
            most = max(1.0, min(self.max_weight, self.weight_of_average) / self.own_weight)
            reference, small = most * reference, most * small
        if not self._is_possible(norm, together, reference, harmless, small):
            raise AllreduceException(f"sent an average of norm {norm:.3g}, where {reference:.3g} is usual")
        if self.judges_parameters:
            delta = average - own
            if reason := self._distance_objection(part, own, delta):
                raise AllreduceException(f"sent an average that {reason}")
            self._remember_distance(part, float(delta.norm()) / max(own_norm, 1e-30))
            self._remember_drift(part, own, delta)
        return together
