"""Who is there: the swarm's progress, without trainers that have fallen silent."""

import threading
import time
from collections.abc import Callable
from multiprocessing.sharedctypes import Synchronized

from hivemind.optim.progress_tracker import GlobalTrainingProgress
from hivemind.utils import get_dht_time

from src.access.ownership import name_of
from src.swarm.claims import MAX_REMEMBERED, BoundedProgressTracker

# A trainer that lives renews its report at its local steps, and in any case this often: also while it waits for a
# round, or computes a batch for minutes. A report is kept so long; without a new one its trainer counts as silent.
RENEW_SECONDS, REPORT_SECONDS, SILENT_SECONDS = 7.0, 30.0, 22.0
PAUSE_SECONDS = 1.0  # between two reports of an epoch's samples; between them others count on by this trainer's speed


class MutableEvent(threading.Event):
    """An event that can be told to ignore `set`."""

    is_muted = False

    def set(self) -> None:
        if not self.is_muted:
            super().set()


class LeanProgressTracker(BoundedProgressTracker):
    """hivemind's tracker counts a dead trainer as a partner and as a source of samples until its report expires.

    Here one that has not renewed its report for a while does not count, and neither does one that has not done so since
    ``vain_search``: the moment (`time.monotonic`) at which an averager of this peer found nobody to average with. Time
    is measured on this peer's clock only. The sign of life is that a report is stored again, with a later expiration;
    what it says may stay the same for long.

    ``tell_epoch`` passes on what this peer knows, for whoever asks it: (epoch, seconds ago), or None. ``reachable``
    gives those of some peers, by name, who answer.
    """

    def __init__(
        self,
        *args,
        vain_search: Synchronized,
        tell_epoch: Callable[[tuple[int, float] | None], None] = lambda known: None,
        reachable: Callable[[list[str]], set[str]] = set,
        **kwargs,
    ):
        self._vain_search, self._tell_epoch, self._reachable = vain_search, tell_epoch, reachable
        self._reports: dict[bytes, tuple[float, float]] = {}  # (when the newest report expires, when it was first seen)
        self._published_at = -float("inf")
        super().__init__(*args, metadata_expiration=REPORT_SECONDS, **kwargs)

    def start(self) -> None:
        self.should_report_progress = MutableEvent()  # hivemind sets it at each local step
        super().start()
        threading.Thread(target=self._renew_report, name="heartbeat", daemon=True).start()

    def _renew_report(self) -> None:
        """hivemind would renew a report at half its time only, so that a single lost one makes a peer seem dead.

        Also exchanges with the peers of this peer's choice where the swarm is.
        """
        while not self.shutdown_triggered.wait(RENEW_SECONDS):
            self.should_report_progress.set()
            self.ask_for_epoch()
            self._tell_epoch(self.known_epoch())

    def report_local_progress(self, local_epoch: int, samples_accumulated: int, update_global_samples: bool = True):
        """As hivemind's, but samples are published once a second at most: signing, sending and checking a report takes
        milliseconds of everybody's processor. A new epoch, and its first samples, are published at once."""
        event, previous, now = self.should_report_progress, self.local_progress, time.monotonic()
        is_routine = local_epoch == previous.epoch and samples_accumulated > previous.samples_accumulated > 0
        event.is_muted = is_routine and now < self._published_at + PAUSE_SECONDS
        try:
            super().report_local_progress(local_epoch, samples_accumulated, update_global_samples)
        finally:
            if not event.is_muted:
                self._published_at = now
            event.is_muted = False

    def announce(self) -> None:
        """Tell the others that this peer is about to train, and see who else is; hivemind waits for the first samples.

        Without it trainers that start together end their first epoch, or two, each on its own.
        """
        own = self._get_local_progress(self.local_progress.epoch, self.local_progress.samples_accumulated)
        self.dht.store(
            key=self.training_progress_key,
            subkey=self._local_public_key,
            value=own.dict(),
            expiration_time=get_dht_time() + self.metadata_expiration,
        )
        with self.lock_global_progress:
            found = self.dht.get(self.training_progress_key, latest=True)
            self.global_progress = self._parse_swarm_progress_data(found.value if found is not None else None)

    def num_present(self) -> int:
        """Trainers that are there, this one included: a record alone, which costs nothing, does not make one.

        Clients cannot be called, so that their record has to do.
        """
        others = {name_of(owner): client for owner, client in self.present.items() if owner != self._local_public_key}
        callable_ = [name for name, client in others.items() if not client]
        return 1 + len(others) - len(callable_) + len(self._reachable(callable_) & set(callable_))

    def _parse_swarm_progress_data(self, metadata) -> GlobalTrainingProgress:
        return super()._parse_swarm_progress_data(self._of_live_peers(metadata, time.monotonic()))

    def _of_live_peers(self, metadata, now: float):
        if not isinstance(metadata, dict):
            return metadata
        live = {}
        for key, entry in metadata.items():
            last_expiration, seen = self._reports.get(key, (None, now))
            if entry.expiration_time != last_expiration:
                seen = now
            self._reports[key] = entry.expiration_time, seen
            silent = now - seen > SILENT_SECONDS or seen < self._vain_search.value
            if key == self._local_public_key or not silent:
                live[key] = entry
        if len(self._reports) > MAX_REMEMBERED:
            self._reports = {key: report for key, report in self._reports.items() if key in metadata}
        return live
