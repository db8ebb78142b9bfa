"""Who is there: the swarm's progress, without trainers that have fallen silent."""

import time
from multiprocessing.sharedctypes import Synchronized

from hivemind.optim.progress_tracker import GlobalTrainingProgress
from hivemind.utils import get_dht_time

from src.training.claims import BoundedProgressTracker

# A trainer that lives reports at each local step, and in any case every half of the time for which a report is kept.
REPORT_SECONDS, SILENT_SECONDS = 30.0, 22.0


class LeanProgressTracker(BoundedProgressTracker):
    """hivemind's tracker counts a dead trainer as a partner and as a source of samples until its report expires.

    Here one that has not renewed its report for a while does not count, and neither does one that has not done so since
    ``vain_search``: the moment (`time.monotonic`) at which an averager of this peer found nobody to average with. Time
    is measured on this peer's clock only.
    """

    def __init__(self, *args, vain_search: Synchronized, **kwargs):
        self._vain_search = vain_search
        self._reports: dict[bytes, tuple[float, float]] = {}  # (time in the newest report, when it was first seen)
        super().__init__(*args, metadata_expiration=REPORT_SECONDS, **kwargs)

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

    def _parse_swarm_progress_data(self, metadata) -> GlobalTrainingProgress:
        return super()._parse_swarm_progress_data(self._of_live_peers(metadata, time.monotonic()))

    def _of_live_peers(self, metadata, now: float):
        if not isinstance(metadata, dict):
            return metadata
        live = {}
        for key, entry in metadata.items():
            reported_at = entry.value.get("time") if isinstance(entry.value, dict) else None
            last_report, seen = self._reports.get(key, (None, now))
            if reported_at != last_report:
                seen = now
            self._reports[key] = reported_at, seen
            silent = now - seen > SILENT_SECONDS or seen < self._vain_search.value
            if key == self._local_public_key or not silent:
                live[key] = entry
        return live
