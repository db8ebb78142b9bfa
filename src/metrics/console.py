"""What the person at the terminal sees of a peer: progress, in lines or in place."""

import sys
import threading
import time
from collections import deque

from hivemind.utils import get_dht_time

from src.console import counted, format_moment, format_seconds, rate
from src.metrics.records import Round, SwarmEpoch, TrainerEpoch

LINE_SECONDS = 55.0  # between two lines within an epoch, where nothing can be overwritten
PULSE_SECONDS = 0.5
SLOWEST = 1e-9  # samples a second that are a speed; hivemind gives a number for none, too
KEPT_EPOCHS, LONGEST_JUMP = 20, 20


class EpochPace:
    """Seconds that an epoch takes, from the ends of the last ones; None before the second one."""

    def __init__(self):
        self._ends: deque[tuple[float, int]] = deque(maxlen=KEPT_EPOCHS)
        self._epoch: int | None = None

    def note(self, epoch: int, now: float) -> None:
        """To be called often, with the epochs that are over."""
        previous, self._epoch = self._epoch, epoch
        if previous is None or epoch == previous:
            return
        if not 0 < epoch - previous <= LONGEST_JUMP:  # another peer's state, or an older one
            self._ends.clear()
        self._ends.append((now, epoch))

    @property
    def seconds(self) -> float | None:
        if len(self._ends) < 2:
            return None
        (first, from_epoch), (last, to_epoch) = self._ends[0], self._ends[-1]
        return (last - first) / (to_epoch - from_epoch)


class Progress:
    """Prints to ``stream``; what changes within an epoch in place on a terminal, and elsewhere in a line a minute."""

    def __init__(self, stream=None, refresh_seconds: float | None = None):
        self.stream = stream if stream is not None else sys.stdout
        self.live = self.stream.isatty()
        self.refresh_seconds = refresh_seconds
        if refresh_seconds is None:
            self.refresh_seconds = PULSE_SECONDS if self.live else LINE_SECONDS
        self.last_update = 0.0 if self.live else time.monotonic()
        self.pace = EpochPace()

    def say(self, message: str) -> None:
        """A line that stays."""
        self._write(message)

    def _write(self, message: str) -> None:
        clear = "\r\033[K" if self.live else ""
        print(f"{clear}{message}\n", end="", file=self.stream, flush=True)  # in one write: several threads speak

    def routine(self, message: str) -> None:
        """A line of which there is one an epoch; a view that shows its figures otherwise leaves it out."""
        self._restart()
        self.say(message)

    def _restart(self) -> None:
        """An epoch has been told of: the next line within one is due later."""
        if not self.live:
            self.last_update = time.monotonic()

    def peers_seen(self, progress: dict) -> None:
        """News on single trainers, which lines have no room for."""

    def close(self) -> None:
        """End what is drawn in place; lines go on."""

    def update(self, epoch: int, tracker, total_epochs: int) -> None:
        """Show samples of the target, peers and the time left in the epoch after ``epoch``; and, where there is room,
        speed and the end of the run. To be called often: most calls do nothing.
        """
        self.pace.note(epoch, time.monotonic())
        if time.monotonic() - self.last_update < self.refresh_seconds:
            return
        self.last_update = time.monotonic()
        progress = tracker.global_progress
        left = max(0.0, progress.eta_next_epoch - get_dht_time())
        shown = f"epoch {epoch + 1}: {progress.samples_accumulated} of {progress.target_batch_size} samples, "
        shown += counted(max(1, progress.num_peers), "peer")
        remaining = f", {format_seconds(left)} left" if left < 1e9 else ""
        if self.live:
            print(f"\r\033[K{shown}{remaining}", end="", file=self.stream, flush=True)
        else:
            speed = f", {rate(tracker.samples_per_second)}" if tracker.samples_per_second > SLOWEST else ""
            self._write(f"{shown}{speed}{remaining}{self._end(epoch, total_epochs, left, tracker)}")

    def _end(self, epoch: int, total_epochs: int, left: float, tracker) -> str:
        """When the run ends, by the epochs so far or, before there are enough, by the trainers' speed."""
        seconds = self.pace.seconds
        if seconds is None and tracker.samples_per_second > SLOWEST:
            seconds = tracker.global_progress.target_batch_size / tracker.samples_per_second
        if seconds is None:
            return ""
        after = min(left, seconds) + (total_epochs - epoch - 1) * seconds
        return f"; at this pace the run ends {format_moment(time.time() + after)}"

    def epoch_finished(self, record: TrainerEpoch, total_epochs: int, rounds: list[Round]) -> None:
        """One line for an epoch."""
        gradients = [r for r in rounds if r.kind == "gradients" and r.complete]
        alone = any(r.kind == "gradients" and r.error for r in rounds)
        averaged = f"averaged with {counted(gradients[-1].num_peers, 'peer')}" if gradients else "not averaged yet"
        averaged = "not averaged" if alone and record.inner_steps else "own gradients alone" if alone else averaged
        steps = f" in {counted(record.inner_steps, 'step')}" if record.inner_steps else ""
        self._restart()
        remaining = (total_epochs - record.epoch) * (self.pace.seconds or record.seconds)
        self.say(
            f"epoch {record.epoch}/{total_epochs}  {describe_loss(record)}  {record.samples} samples here{steps}, "
            f"{rate(record.samples_per_second)}  "
            f"{counted(max(1, record.num_peers), 'peer')}, {averaged}  {record.seconds:.1f} s, "
            f"{format_seconds(remaining)} left, until {format_moment(time.time() + remaining)}"
        )


def describe_loss(record: TrainerEpoch | SwarmEpoch) -> str:
    """An epoch's loss and, where sentence order is trained besides, its two parts."""
    if record.sop_loss is None:
        return f"loss {record.loss:.3f}"
    return f"loss {record.loss:.3f} (words {record.mlm_loss:.3f}, order {record.sop_loss:.3f})"


class Pulse(threading.Thread):
    """Shows how far the epoch is, whatever the main thread waits for: a batch, or a round, may take minutes."""

    def __init__(self, progress: Progress, optimizer, *, total_epochs: int, stop: threading.Event):
        super().__init__(name="pulse", daemon=True)
        self.progress, self.optimizer, self.total_epochs, self.stop = progress, optimizer, total_epochs, stop
        self._has_said_none = False

    def run(self) -> None:
        while not self.stop.wait(PULSE_SECONDS):
            self.look()

    def look(self) -> None:
        tracker = self.optimizer.tracker
        if not self.optimizer.auxiliary:
            epoch = self.optimizer.local_epoch
        elif tracker.global_progress.num_peers > 0:
            epoch, self._has_said_none = tracker.global_epoch, False
        else:
            if not self._has_said_none and not self.progress.live:
                self.progress.say("no trainer is at work")
            self._has_said_none = True
            return
        if epoch < self.total_epochs:
            self.progress.update(epoch, tracker, self.total_epochs)
