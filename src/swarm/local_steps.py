"""Local steps with an outer optimizer in a swarm: hivemind's way of a gradient, with a difference in its place.

Each trainer steps on its own (`src.optim.local_steps`); an epoch is still ``target_batch_size`` samples of all of them.
At its end hivemind's gradient averager averages how far each has come from the anchor, weighted by samples. The anchor
is what hivemind calls the offloaded parameters; the optimizer that it has over these is the outer one. So rounds,
matchmaking, auxiliary peers, clients, state transfer and backups are those of the synchronous mode. What differs, and
why:

- A difference is loaded as it is; hivemind would divide it by the number of local steps.
- hivemind copies the anchor over the parameters after each change of it. Here they *follow* it, from where they were
  when their difference was handed over: steps made while a round runs are kept, also when a state is taken meanwhile.
- A round that failed changes nothing: the difference goes into the next one, with its samples. (hivemind steps with
  the own one, after which anchor and momentum would be this peer's alone.) Of a partial round, what came is used.
- While a round runs in the background, trainers keep stepping, and their epoch ends when the round has; hivemind waits.
- A state is labelled with the epoch of its anchor, not with that which has just begun.
- Trainers tell each other samples of their anchors in each group. Those who have another one than most are not averaged
  with them: a difference from another point is none. They take the state of the others, and keep their local steps.
- How large a difference may be follows from the number of local steps, that is, from the samples.
- Averagers have names of their own, so that nobody of the other mode finds them.

Before epoch ``local_steps_after`` all is as in the synchronous mode, with the same LAMB, whose statistics go on.
"""

import logging
import math
import multiprocessing
import time
from statistics import median_low
from typing import NamedTuple

import torch
from hivemind.averaging.control import StepControl
from hivemind.averaging.group_info import GroupInfo
from hivemind.averaging.matchmaking import MatchmakingException
from hivemind.p2p import PeerID
from hivemind.utils import MSGPackSerializer

from src.optim.local_steps import DIFFERENCES, GRADIENTS, NOTHING, NUM_SAMPLES, LocalWork
from src.swarm.averagers import LeanGradientAverager, LeanStateAverager
from src.swarm.contributions import Judge, most_weight
from src.swarm.matchmaking import is_trainer
from src.swarm.optimizer import LeanOptimizer

logger = logging.getLogger(__name__)

KIND = "_local"
LEN_INTRODUCTION = 5
COMMON, OTHER_THAN_SOME, OTHER_THAN_MOST = range(3)  # the anchor, in the group that was found last
OTHERS_ARE_APART = "the group's other trainers go on from other parameters"
# How far apart samples of two anchors may lie: as a share of how far local steps have moved the usual trainer from it,
# and of the anchor's own size. Without the average of a whole epoch they are as far apart as local steps move, what
# rounding does to values on their way is far less.
MAX_SHARE, HARMLESS_SHARE = 0.5, 2e-3
HARMLESS_DIFFERENCE = 1e-4  # root mean square: also where the learning rate is zero here, and not yet or no more there
MAX_DOWNLOADS = 3  # in a row: the others may end an epoch while their state is on its way
PAUSE_EPOCHS = 2  # from one to the next, where anchors differ although a state was taken


class AnchorAverager(LeanStateAverager):
    """Averages and hands out the anchor, which the parameters follow."""

    work: LocalWork | None = None  # none on an auxiliary peer

    def _apply_optimizer_parameters_(self) -> None:
        if self.work is None:
            super()._apply_optimizer_parameters_()
        else:
            self.work.follow()

    def get_current_state(self):
        """As hivemind's, which counts an epoch that has only begun; the schedule tells that of the anchor."""
        metadata, tensors, infos = super().get_current_state()
        metadata["epoch"] = min(metadata["epoch"], self.scheduler._step_count - 1)
        return metadata, tensors, infos


class DifferenceAverager(LeanGradientAverager):
    """Averages differences from the anchor while ``averages_differences``, else gradients."""

    work: LocalWork | None = None
    averages_differences = keeps_gradients = False
    _has_nobody = False  # of this peer's anchor in the group that was found last; in the averager's process

    def __init__(self, *args, prefix: str, target_batch_size: int, **kwargs):
        self._target_batch_size = target_batch_size
        self._anchors = multiprocessing.Value("b", COMMON)
        prefix = f"{prefix.removesuffix('_grad_averager')}{KIND}_grad_averager"
        self._robust_averaging = kwargs.get("robust_averaging")
        super().__init__(*args, prefix=prefix, target_batch_size=target_batch_size, **kwargs)
        self._judge_of_gradients = self.judge

    @property
    def has_other_anchor(self) -> bool:
        """Whether most trainers of the last group had another anchor."""
        return self._anchors.value == OTHER_THAN_MOST

    @property
    def has_seen_others(self) -> bool:
        """Whether some of them had."""
        return self._anchors.value != COMMON

    def forget_group(self) -> None:
        """This peer has another anchor now."""
        self._anchors.value = COMMON

    def introduction(self):
        if not self.averages_differences:
            return super().introduction()
        values, distance = self.work.sample()
        return [self.local_epoch(), values.numpy().tobytes(), distance, self._weight(), self.is_apart()]

    def _weight(self) -> int:
        # what has not found a round for long may have more samples than an epoch can have; others do not believe that
        return min(self.work.weight, self._target_batch_size)

    def step(self, weight: float | None = None, reset_accumulators: bool = True, **kwargs):
        """As hivemind's; a difference weighs as much as the samples in it."""
        if not self.averages_differences:
            return super().step(weight, reset_accumulators, **kwargs)
        self.work.forget_nonsense()
        control = super().step(self._weight(), reset_accumulators=False, **kwargs)
        self._accumulators_used_in_step = False  # or hivemind would warn: gradients of the next local step may be there
        return control

    @torch.no_grad()
    def load_accumulators_into_averager_(self) -> None:
        if not self.averages_differences:
            super().load_accumulators_into_averager_()
            return
        with self.get_tensors() as differences:
            self.work.hand_over(differences)

    def reset_accumulated_grads_(self) -> None:
        """Not at an epoch's end: a local step that has begun goes on."""
        if not self.keeps_gradients:
            super().reset_accumulated_grads_()

    # -- in the averager's process

    async def _aggregate_with_group(self, group_info: GroupInfo, **kwargs) -> dict:
        group_info = self._of_one_anchor(self._usable_members(group_info))
        result = await super()._aggregate_with_group(group_info, **kwargs)
        for peer, said in result.items():
            if isinstance(said, (list, tuple)) and len(said) == LEN_INTRODUCTION:
                result[peer] = [said[0], said[-1]]  # as trainers say it that average gradients
        return result

    async def _run_allreduce_inplace_(self, tensors, group_info: GroupInfo, **kwargs):
        introductions = map(read_introduction, filter(is_trainer, group_info.gathered))
        weights = [said.weight for said in introductions if said is not None]
        if bool(weights) != self.judge.grows_with_weight:  # what is usual of gradients says nothing of differences
            self.judge = (
                judge_of_differences(self._target_batch_size, self._robust_averaging)
                if weights
                else self._judge_of_gradients
            )
        self.judge.own_weight = kwargs.get("weight") or 0.0
        self.judge.weight_of_average = min(max(weights, default=0.0), most_weight(weights))
        return await super()._run_allreduce_inplace_(tensors, group_info, **kwargs)

    def _why_to_give_up(self, step: StepControl, seconds: float) -> str:
        """As usual, and at once where hivemind would find the same group again and again."""
        if self._has_nobody:
            self._has_nobody = False
            return OTHERS_ARE_APART
        return super()._why_to_give_up(step, seconds)

    def _of_one_anchor(self, group_info: GroupInfo) -> GroupInfo:
        """The trainers of a group that have the same anchor as this peer, and their assistants, who help the most.

        All members see the parts of a group alike, so that each part averages without calling the others.
        """
        members = dict(zip(group_info.peer_ids, group_info.gathered, strict=True))
        trainers = {peer: read_introduction(said) for peer, said in members.items() if is_trainer(said)}
        parts = parts_of(trainers)
        if len(parts) < 2:
            self._anchors.value = COMMON
            return group_info
        own = next((part for part in parts if self.peer_id in part), parts[0])
        self._anchors.value = OTHER_THAN_SOME if own is parts[0] else OTHER_THAN_MOST
        if len(own) < 2:
            self._has_nobody = True
            raise MatchmakingException(OTHERS_ARE_APART)
        helped = own is parts[0]
        kept = {peer: said for peer, said in members.items() if peer in own or (peer not in trainers and helped)}
        kept.setdefault(self.peer_id, members[self.peer_id])
        for peer in trainers.keys() - kept.keys():
            self._remark(f"averages without {peer}, which goes on from other parameters")
        return GroupInfo(group_info.group_id, tuple(kept), tuple(kept.values()))


def judge_of_differences(target_batch_size: int, robust_averaging: str | None = None) -> Judge:
    return Judge(
        max_weight=target_batch_size,
        harmless_rms=HARMLESS_DIFFERENCE,
        grows_with_weight=True,
        robust_averaging=robust_averaging,
    )


class Introduction(NamedTuple):
    """What a trainer tells the others of a group: [128] samples of its anchor, how far it has gone from there (root
    mean square), with how many samples of text."""

    anchor: torch.Tensor
    distance: float
    weight: float


def read_introduction(gathered: bytes) -> Introduction | None:
    """None if a member of a group averages gradients, or says nonsense.

    ``gathered`` is what it says of itself: [bandwidth, mode, serialized introduction].
    """
    try:
        _, samples, distance, weight, _ = MSGPackSerializer.loads(MSGPackSerializer.loads(gathered)[2])
        values = torch.frombuffer(bytearray(samples), dtype=torch.float32)
    except Exception:  # msgpack has a dozen errors
        return None
    if values.shape != (NUM_SAMPLES,) or type(distance) is not float or type(weight) is not int:
        return None
    if not (0 <= distance < math.inf and 0 <= weight < 2**63 and bool(torch.isfinite(values).all())):
        return None
    return Introduction(values, distance, float(weight))


def parts_of(trainers: dict[PeerID, Introduction | None]) -> list[set[PeerID]]:
    """Trainers by the anchor they have, the largest part first; of equal ones that of the lowest peer id.

    Those of whom no anchor is known are a part of their own: they average gradients.
    """
    moved = [said.distance for said in trainers.values() if said is not None and said.distance > 0]
    usual = median_low(moved) if moved else 0.0

    def are_near(one, other) -> bool:
        if one is None or other is None:
            return one is other
        allowed = max(MAX_SHARE * usual, HARMLESS_SHARE * float(one.anchor.square().mean().sqrt()))
        return float((one.anchor - other.anchor).square().mean().sqrt()) <= allowed

    parts, left = [], dict(sorted(trainers.items(), key=lambda item: item[0].to_bytes()))
    near = {peer: {other for other in left if are_near(left[peer], left[other])} for peer in left}
    while left:
        middle = max(left, key=lambda peer: len(near[peer] & left.keys()))
        parts.append((near[middle] & left.keys()) | {middle})
        left = {peer: said for peer, said in left.items() if peer not in parts[-1]}
    return sorted(parts, key=len, reverse=True)


class LocalStepsOptimizer(LeanOptimizer):
    """As `LeanOptimizer`, with steps of its own after ``local_batch_size`` samples, from an epoch on.

    Its optimizer must be an `AnchoredLAMB`, and offloaded.
    """

    state_averager_class = AnchorAverager
    kind = KIND
    work: LocalWork | None = None

    def __init__(self, *args, local_batch_size: int, local_steps_after: int = 0, **kwargs):
        self.local_batch_size, self.local_steps_after = local_batch_size, local_steps_after
        self._samples_of_epoch = 0  # that have led to local steps
        self._may_load_from = 0  # this epoch on, if the others have another anchor
        super().__init__(*args, **kwargs)
        if not self.auxiliary:
            self.work = LocalWork(self.state_averager.main_parameters, self._anchor())
        self.state_averager.work = self.grad_averager.work = self.work
        self._usual_state_every = self.average_state_every

    def _anchor(self) -> list[torch.Tensor]:
        return [parameter for group in self.state_averager.optimizer.param_groups for parameter in group["params"]]

    @property
    def makes_local_steps(self) -> bool:
        return self.local_epoch >= self.local_steps_after

    def _check_and_accumulate_gradients(self, batch_size: int, grad_scaler) -> bool:
        if not self.makes_local_steps:
            return super()._check_and_accumulate_gradients(batch_size, grad_scaler)
        averager = self.grad_averager
        averager.accumulate_grads_(batch_size)
        if averager.local_samples_accumulated >= self.local_batch_size:
            self._make_local_step()
        self._report_samples()
        return True

    @torch.no_grad()
    def _make_local_step(self) -> None:
        averager, parameters = self.grad_averager, self.state_averager.main_parameters
        for parameter, gradient in zip(parameters, averager._grad_accumulators(), strict=True):
            if parameter.grad is not gradient:
                parameter.grad.copy_(gradient)
            parameter.grad.mul_(1.0 / averager.local_times_accumulated)
        with self.state_averager.lock_optimizer:  # a backup, or the outer step of a round that ran in the background
            self.state_averager.optimizer.inner_step(parameters)
        self.work.samples += averager.local_samples_accumulated
        self._samples_of_epoch += averager.local_samples_accumulated
        self.inner_steps += 1
        averager.reset_accumulated_grads_()

    def _report_samples(self) -> None:
        samples = self._samples_of_epoch + self.grad_averager.local_samples_accumulated
        self.tracker.report_local_progress(self.local_epoch, max(0, samples))

    def _update_global_epoch(self, grad_scaler) -> None:
        if self.auxiliary:
            super()._update_global_epoch(grad_scaler)
            return
        epoch, averager, averages_differences = self.local_epoch, self.grad_averager, self.makes_local_steps
        if averages_differences and not all(update.done() for update in self.state_averager.pending_updates):
            return  # local steps go on until then
        averager.averages_differences = averager.keeps_gradients = averages_differences
        # the first differences must be from the same parameters
        is_last_before = epoch + 1 == self.local_steps_after
        self.average_state_every = 1 if is_last_before else self._usual_state_every
        self.state_averager.optimizer.contents = DIFFERENCES if averages_differences else GRADIENTS
        try:
            super()._update_global_epoch(grad_scaler)
        finally:
            averager.keeps_gradients = False
        if self.local_epoch != epoch:
            # those of a local step that is not complete were reported in the epoch that is over
            self._samples_of_epoch = -averager.local_samples_accumulated if averages_differences else 0

    def _take_averages(self, received: float) -> None:
        if self.grad_averager.averages_differences:
            self._are_apart |= self.grad_averager.has_seen_others
            if received == 0.0:
                self.state_averager.optimizer.contents = NOTHING
                self.work.take_back()
            elif received < 1.0:
                with self.grad_averager.get_tensors() as averages:
                    self.work.take_back_missing(averages)
        super()._take_averages(received)

    def _should_load_state_from_peers(self) -> bool:
        if super()._should_load_state_from_peers():
            return True
        return (
            self.makes_local_steps and self.grad_averager.has_other_anchor and self.local_epoch >= self._may_load_from
        )

    def load_state_from_peers(self, **kwargs) -> None:
        """As usual, and once more if the others have gone on meanwhile: a difference from an old anchor is none.

        Not if they always will have: then the next round of parameters brings this peer to the others.
        """
        averager = self.state_averager
        for _ in range(MAX_DOWNLOADS):
            began = time.monotonic()
            super().load_state_from_peers(**kwargs)
            self._samples_of_epoch = 0
            self.grad_averager.forget_group()
            lasts_epochs = (time.monotonic() - began) * self.tracker.samples_per_second > self.target_batch_size
            is_new = averager.state_epoch >= self.tracker.global_epoch
            if is_new or lasts_epochs or not (averager.has_taken_state and self.makes_local_steps):
                break
        self._may_load_from = self.local_epoch + (self._usual_state_every + 1 if lasts_epochs else PAUSE_EPOCHS)

    def discard_gradients(self) -> int:
        if not self.makes_local_steps:
            return super().discard_gradients()
        averager = self.grad_averager
        samples = averager.local_samples_accumulated if averager.reuse_grad_buffers else 0
        if samples:
            averager.reset_accumulated_grads_()
            self._report_samples()
        return samples

    def forget_local_work(self) -> None:
        if self.work is not None:
            self.work.forget()


__all__ = ["AnchorAverager", "DifferenceAverager", "LocalStepsOptimizer"]
