"""What a run will take, as a trainer tells its person: at the start what is known, the hours when its pace is."""

import time
from collections.abc import Callable
from dataclasses import replace

from src.preflight.plan import Circumstances, Pace, Plan

STEPS, SECONDS = 3, 60.0  # local steps, or seconds of them, that are enough to know the pace


class Outlook:
    """``make`` a plan of the circumstances, of which the swarm's are read from ``tracker``, and say it.

    The pace is that of the first local steps, without the very first, in which much is set up, and without what the
    swarm's optimizer takes of the time. ``length()``: of sequences now.
    """

    def __init__(
        self,
        make: Callable[[Circumstances], Plan],
        now: Circumstances,
        *,
        tracker,
        length: Callable[[], int],
        say: Callable[[str], None],
    ):
        self.make, self.now, self.tracker, self.length, self.say = make, now, tracker, length, say
        self._said: set[str] = set()  # names of warnings
        self._began, self._samples, self._steps, self._waited = None, 0, 0, 0.0
        self._is_over = False

    def begin(self) -> None:
        """Say all but the hours."""
        plan = self.make(
            replace(
                self.now,
                num_trainers=1 + self.tracker.global_progress.num_peers,
                others_per_second=self.tracker.samples_per_second,
                epoch=self.tracker.global_epoch,
                why_no_pace="follows after the first local steps",
            )
        )
        self._say(plan, plan.lines())

    def after_step(self, samples: int, waited: float) -> None:
        """To be called after each local step, of which so many seconds were not computing."""
        if self._is_over:
            return
        now = time.monotonic()
        if self._began is None:
            self._began = now
            return
        self._samples, self._steps, self._waited = self._samples + samples, self._steps + 1, self._waited + waited
        seconds = now - self._began - self._waited
        if (self._steps < STEPS and seconds < SECONDS) or seconds <= 0:
            return
        self._is_over = True
        own = self.tracker.performance_ema.samples_per_second
        pace = Pace(self._samples / seconds, seconds / self._steps, self.length())
        plan = self.make(
            replace(
                self.now,
                num_trainers=max(1, self.tracker.global_progress.num_peers),
                pace=pace,
                others_per_second=max(0.0, self.tracker.samples_per_second - own),
                epoch=self.tracker.global_epoch,
            )
        )
        self._say(plan, plan.pace_lines())

    def _say(self, plan: Plan, lines: list[str]) -> None:
        new = [warning for warning in plan.warnings if warning.name not in self._said]
        self._said |= {warning.name for warning in new}
        self.say("\n".join([*lines, *(warning.lines() for warning in new)]))
