"""The memory of a peer's processes over weeks: written down at the end of epochs, and said when it grows."""

import os
import time
from collections.abc import Callable

from src.console import format_bytes
from src.metrics.journal import Journal
from src.metrics.records import MemoryUse
from src.process.memory import memory_of
from src.process.watchdog import DAEMON, watched_processes
from src.swarm.averagers import AVERAGING_PROCESS
from src.swarm.dht import WatchedDHT

MAIN = "the main process"
# what each process is called, to people and in records
FIELDS = {
    MAIN: "main",
    WatchedDHT.WHAT: "dht",
    DAEMON: "p2pd",
    **{AVERAGING_PROCESS.format(kind=kind): kind for kind in ("gradients", "parameters")},
}
PAUSE_SECONDS = 30.0  # between two looks: the kernel goes through all pages of a process
SETTLED_EPOCHS = 20  # after which a process has all that it needs
MAX_GROWTH, MAX_ADDED = 1.5, 1000.0  # times what it had then, and MB beyond it: both together are too much


class MemoryWatch:
    """Writes `MemoryUse` to ``journal`` and says, once for each process, when it has grown too much."""

    def __init__(
        self,
        journal: Journal,
        *,
        say: Callable[[str], None],
        measure: Callable[[dict[str, int]], tuple[str, dict[str, float]]] = memory_of,
    ):
        self.journal, self.say, self.measure = journal, say, measure
        self._looked_at, self._first_epoch = -float("inf"), None
        self._settled: dict[str, float] = {}  # MB that a process had when it had settled
        self._said: set[str] = set()

    def note(self, epoch: int) -> None:
        """To be called at the end of each epoch; looks now and then."""
        if time.monotonic() - self._looked_at < PAUSE_SECONDS:
            return
        self._looked_at = time.monotonic()
        kind, sizes = self.measure({MAIN: os.getpid(), **watched_processes()})
        self._say_measure(kind)
        fields = {FIELDS[name]: round(size, 1) for name, size in sizes.items() if name in FIELDS}
        self.journal.record(MemoryUse(epoch, kind, **fields))
        self._first_epoch = epoch if self._first_epoch is None else self._first_epoch
        if epoch >= self._first_epoch + SETTLED_EPOCHS:
            for name, size in sizes.items():
                self._compare(name, size)

    def _say_measure(self, kind: str) -> None:
        if kind != "PSS" and kind not in self._said:
            self._said.add(kind)
            self.say(f"this kernel does not tell the PSS of processes: what memory they use is written down as {kind}"
                     if kind else "this kernel does not tell the memory of processes: it is not watched")  # fmt: skip

    def _compare(self, name: str, size: float) -> None:
        settled = self._settled.setdefault(name, size)
        if size <= max(MAX_GROWTH * settled, settled + MAX_ADDED) or name in self._said:
            return
        self._said.add(name)
        self.say(
            f"{name} takes {format_bytes(1e6 * size)} of memory, {format_bytes(1e6 * settled)} when it had settled: it "
            f"grows. Stop and start this peer before there is none left; {self.journal.path} has the figures"
        )
