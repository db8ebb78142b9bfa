"""Notice within a second that one of this peer's processes has died, and end the program in order instead of hanging.

hivemind 1.1.12 waits for its processes without limits: for the DHT's, p2pd below it, and two that average. When one is
gone, for good. So a thread of its own looks at the processes themselves, asks nobody, and acts whatever the main thread
is waiting for: it says what died, kills the others, writes the backup, and ends the program with code 75, upon which
the supervisor starts it again (`supervisor.run_supervised`).
"""

import logging
import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from src.process.supervisor import DIED, START_AGAIN, children_of, kill_descendants, leave_at_once, start_deadline

if TYPE_CHECKING:  # hivemind takes seconds to load
    import hivemind

    from src.swarm.optimizer import LeanOptimizer

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.25
STOPPED_SECONDS = 60.0  # a process that is stopped (SIGSTOP) may go on; after so long it counts as dead
END_SECONDS = 40.0  # for the backup, once a process has died
LEAVE_SECONDS = 6.0  # for leaving in order, once a batch is given up after a stop


def may_start_again(restart: bool) -> bool:
    """Whether this program's supervisor will start it again: not against ``--restart``, and not under torchrun."""
    return restart and "TORCHELASTIC_RUN_ID" not in os.environ


def processes_of(dht: "hivemind.DHT", optimizer: "LeanOptimizer") -> dict[str, int | None]:
    """{what it is: process id} of all that a peer cannot be without; None: it has ended already."""
    daemons = [pid for pid in children_of(dht.pid) if _status(pid)[0].startswith("p2pd")]
    return {
        "the DHT process": dht.pid,
        "the network daemon, p2pd,": daemons[0] if daemons else None,
        "the process that averages gradients": optimizer.grad_averager.pid,
        "the process that averages parameters": optimizer.state_averager.pid,
    }


def _status(pid: int) -> tuple[str, str]:
    """A process' name and its state, a letter; empty ones if there is none."""
    with suppress(OSError):
        name, _, fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").partition("(")[2].rpartition(")")
        return name, fields.split()[0]
    return "", ""


class Watchdog(threading.Thread):
    """Ends this program when one of ``processes`` has died, or when it does not come to its end after a ``stop``.

    ``save(alone)`` writes a backup from this thread; ``alone``: all other processes of this peer have been killed.
    ``is_late(seconds)``: whether the main thread, asked to stop so many seconds ago, is waited for no longer; a backup
    is written and the swarm left for it then, with ``leave``.

    It watches within ``with``. Leaving that waits, for good, if the program is just being ended: so no exception, nor
    anything that the main thread does because a process has died, comes before the backup.
    """

    def __init__(
        self,
        processes: dict[str, int | None],
        *,
        say: Callable[[str], None],
        stop: threading.Event,
        start_again: bool,
        save: Callable[[bool], None] = lambda alone: None,
        is_late: Callable[[float], bool] = lambda seconds: False,
        leave: Callable[[], None] = lambda: None,
    ):
        super().__init__(name="watchdog", daemon=True)
        self.processes, self.say, self.stop, self.start_again = processes, say, stop, start_again
        self.save, self.is_late, self.leave = save, is_late, leave
        self._lock, self._is_over = threading.Lock(), False
        self._ended = [name for name, pid in processes.items() if pid is None]
        self._names: dict[int, str] = {}  # by the descriptor that becomes readable when a process ends
        self._poll = select.poll()
        for name, pid in processes.items():
            if pid is not None:
                self._open(name, pid)
        self._stopped_since: dict[str, float] = {}

    def _open(self, name: str, pid: int) -> None:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            self._ended.append(name)
            return
        self._names[descriptor] = name
        self._poll.register(descriptor, select.POLLIN)

    def __enter__(self) -> "Watchdog":
        self.start()
        return self

    def __exit__(self, exception_type, *_) -> None:
        if exception_type is not None:  # perhaps because a process has died this very moment
            time.sleep(2 * POLL_SECONDS)
        with self._lock:  # held for good by a thread that ends the program
            self._is_over = True

    def run(self) -> None:
        asked_at = None
        while True:
            ended = self._ended + [self._names[descriptor] for descriptor, _ in self._poll.poll(1000 * POLL_SECONDS)]
            if self.stop.is_set() and asked_at is None:
                asked_at = time.monotonic()
            with self._lock:
                if self._is_over:
                    return
                if ended:
                    self._end(f"{ended[0]} has died")
                if (name := self._stopped_too_long()) is not None:
                    self._end(f"{name} has been stopped for {STOPPED_SECONDS:.0f} s")
                if asked_at is not None and self.is_late(time.monotonic() - asked_at):
                    self._give_up_the_batch()

    def _stopped_too_long(self) -> str | None:
        now = time.monotonic()
        for name, pid in self.processes.items():
            if pid is not None and _status(pid)[1] == "T":
                if now - self._stopped_since.setdefault(name, now) > STOPPED_SECONDS:
                    return name
            else:
                self._stopped_since.pop(name, None)
        return None

    def _end(self, what: str) -> NoReturn:
        code = START_AGAIN if self.start_again else DIED
        start_deadline(END_SECONDS, code)
        how = " and starting again" if self.start_again and not self.stop.is_set() else ""
        self.say(f"{what}: ending{how}; exit code {DIED}")
        try:
            kill_descendants()  # what they would still do is of no use, and they would hold shared locks
            self.save(True)
        except BaseException as error:
            logger.error("no backup was written: %r", error)
        leave_at_once(code)

    def _give_up_the_batch(self) -> NoReturn:
        self.say("asked to stop, but the batch under way takes too long: it is given up")
        try:
            self.save(False)
            start_deadline(LEAVE_SECONDS, 0)
            self.leave()
        except BaseException as error:
            logger.error("could not leave the swarm in order: %r", error)
        leave_at_once(0)
