"""What the person at the terminal sees of a peer: progress, in lines or in place."""

import sys
import time

from hivemind.utils import get_dht_time

from src.console import counted, format_seconds, rate
from src.metrics.records import Round, TrainerEpoch


class Progress:
    """Prints to ``stream``; what changes within an epoch only on a terminal, where it can be overwritten."""

    def __init__(self, stream=None, refresh_seconds: float = 0.5):
        self.stream = stream if stream is not None else sys.stdout
        self.live = self.stream.isatty()
        self.refresh_seconds, self.last_update = refresh_seconds, 0.0

    def say(self, message: str) -> None:
        """A line that stays."""
        clear = "\r\033[K" if self.live else ""
        print(f"{clear}{message}\n", end="", file=self.stream, flush=True)  # in one write: several threads speak

    def routine(self, message: str) -> None:
        """A line of which there is one an epoch; a view that shows its figures otherwise leaves it out."""
        self.say(message)

    def peers_seen(self, progress: dict) -> None:
        """News on single trainers, which lines have no room for."""

    def close(self) -> None:
        """End what is drawn in place; lines go on."""

    def update(self, epoch: int, progress) -> None:
        """On a terminal, show samples of the target, peers and the time left in the epoch after ``epoch``, in place.

        ``progress``: hivemind's ``GlobalTrainingProgress``.
        """
        if not self.live or time.monotonic() - self.last_update < self.refresh_seconds:
            return
        self.last_update = time.monotonic()
        eta = max(0.0, progress.eta_next_epoch - get_dht_time())
        remaining = format_seconds(eta) if eta < 1e9 else "?"
        print(
            f"\r\033[Kepoch {epoch + 1}: {progress.samples_accumulated} of "
            f"{progress.target_batch_size} samples, {counted(max(1, progress.num_peers), 'peer')}, {remaining} left",
            end="",
            file=self.stream,
            flush=True,
        )

    def epoch_finished(self, record: TrainerEpoch, total_epochs: int, rounds: list[Round]) -> None:
        """One line for an epoch."""
        gradients = [r for r in rounds if r.kind == "gradients" and r.complete]
        alone = any(r.kind == "gradients" and r.error for r in rounds)
        averaged = f"averaged with {counted(gradients[-1].num_peers, 'peer')}" if gradients else "not averaged yet"
        averaged = "own gradients alone" if alone else averaged
        remaining = (total_epochs - record.epoch) * record.seconds
        self.say(
            f"epoch {record.epoch}/{total_epochs}  loss {record.loss:.3f} (words {record.mlm_loss:.3f}, "
            f"order {record.sop_loss:.3f})  {record.samples} samples here, {rate(record.samples_per_second)}  "
            f"{counted(max(1, record.num_peers), 'peer')}, {averaged}  {record.seconds:.1f} s, "
            f"{format_seconds(remaining)} left"
        )
