"""Notice within a second that one of this peer's processes has died, and end the program in order instead of hanging.

hivemind 1.1.12 waits for its processes without limits: for the DHT's, p2pd below it, and two that average. When one is
gone, for good. So a thread of its own looks at the processes themselves and acts whatever the main thread is waiting
for: it says what died, kills the others, writes the backup, and ends the program with code 75, upon which the
supervisor starts it again (`supervisor.run_supervised`).

A process that lives may hang, too. So each is asked every few seconds whether it answers. One that does not counts as
dead after a minute in which it has slept throughout, or after a minute of processor time: one that waits for a
processor that others use, or for memory that was swapped out, does neither.
"""

import logging
import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from src.process.supervisor import DIED, START_AGAIN, children_of, kill_descendants, leave_at_once, start_deadline

logger = logging.getLogger(__name__)

DAEMON = "the network daemon, p2pd,"
POLL_SECONDS = 0.25
STOPPED_SECONDS = 60.0  # a process that is stopped (SIGSTOP) may go on; after so long it counts as dead
END_SECONDS = 40.0  # for the backup, once a process has died
LEAVE_SECONDS = 6.0  # for leaving in order, once a batch is given up after a stop
ASK_SECONDS = 5.0  # between an answer and the next question
OVERDUE_SECONDS = 15.0  # after the last answer; from then on it counts what a process does instead of answering
ASLEEP_SECONDS = 45.0  # of sleep, so that a deadlock is noticed a minute after the last answer
BUSY_SECONDS = 60.0  # of processor time; honest work that keeps a process from answering takes a few
START_SECONDS = 300.0  # for a process to begin to answer, which takes one or two

_watched: dict[str, tuple[int, Callable[[], object] | None]] = {}


def may_start_again(restart: bool) -> bool:
    """Whether this program's supervisor will start it again: not against ``--restart``, and not under torchrun."""
    return restart and "TORCHELASTIC_RUN_ID" not in os.environ


def watch(name: str, pid: int, ask: Callable[[], object] | None = None) -> None:
    """Let this program's watchdogs look at a process that it cannot be without, ``name``: what it is.

    ``ask()`` returns when the process has answered; to be passed once it is ready to.
    """
    _watched[name] = pid, ask


def watch_daemon(parent: int) -> None:
    """The same for p2pd, the child of the DHT's process."""
    daemons = [pid for pid in children_of(parent) if _status(pid)[0].startswith("p2pd")]
    watch(DAEMON, daemons[0] if daemons else 0)


def watched_processes() -> dict[str, int]:
    """Ids of the processes that this program cannot be without, by what they are."""
    return {name: pid for name, (pid, _) in _watched.items() if pid > 0}


def _status(pid: int) -> tuple[str, str]:
    """A process' name and its state, a letter; empty ones if there is none."""
    with suppress(OSError):
        name, _, fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").partition("(")[2].rpartition(")")
        return name, fields.split()[0]
    return "", ""


def _threads_of(pid: int) -> str:
    """The states of all threads of a process, a letter each."""
    states = []
    for stat_file in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError):
            states.append(stat_file.read_text(errors="replace").rpartition(")")[2].split()[0])
    return "".join(states)


def _processor_seconds(pid: int) -> float:
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


class Questions(threading.Thread):
    """Asks a process again and again whether it answers, and keeps account of what it does while it does not."""

    def __init__(self, name: str, pid: int, ask: Callable[[], object]):
        super().__init__(name=f"question to {name}", daemon=True)
        self.pid, self.ask = pid, ask
        self.is_over = False
        self._looked_at = time.monotonic()
        self._note_answer()

    def run(self) -> None:
        while not self.is_over:
            try:
                self.ask()
                self._note_answer()
            except Exception as error:  # the process may have ended, which others notice
                logger.debug("no answer: %r", error)
            time.sleep(ASK_SECONDS)

    def _note_answer(self) -> None:
        self._answered_at, self._asleep, self._busy_before = time.monotonic(), 0.0, None

    def objection(self) -> str:
        """Why the process counts as dead; to be called often."""
        now = time.monotonic()
        # if this process stood still itself, stopped or without a processor, it has seen nothing of the time
        seen, self._looked_at = min(now - self._looked_at, 2 * POLL_SECONDS), now
        if now - self._answered_at < OVERDUE_SECONDS:
            return ""
        busy = _processor_seconds(self.pid)
        if self._busy_before is None:
            self._busy_before = busy
        if set(_threads_of(self.pid)) == {"S"}:
            self._asleep += seen
        silent = f"has answered nothing for {now - self._answered_at:.0f} s"
        if self._asleep > ASLEEP_SECONDS:
            return f"{silent}: it hangs"
        return f"{silent}, however busy" if busy - self._busy_before > BUSY_SECONDS else ""


class Watchdog(threading.Thread):
    """Ends this program when a watched process has died, or when it does not come to its end after a ``stop``.

    ``save(alone)`` writes a backup from this thread; ``alone``: all other processes of this peer have been killed.
    ``is_late(seconds)``: whether the main thread, asked to stop so many seconds ago, is waited for no longer; a backup
    is written and the swarm left for it then, with ``leave``.

    ``asks``: whether processes must answer. Not while others are forked: what a thread that asks has just locked would
    stay locked in them.

    It watches within ``with``. Leaving that waits, for good, if the program is just being ended: so no exception, nor
    anything that the main thread does because a process has died, comes before the backup.
    """

    def __init__(
        self,
        *,
        say: Callable[[str], None],
        stop: threading.Event,
        start_again: bool,
        asks: bool = True,
        save: Callable[[bool], None] = lambda alone: None,
        is_late: Callable[[float], bool] = lambda seconds: False,
        leave: Callable[[], None] = lambda: None,
    ):
        super().__init__(name="watchdog", daemon=True)
        self.say, self.stop, self.start_again, self.asks = say, stop, start_again, asks
        self.save, self.is_late, self.leave = save, is_late, leave
        self._lock, self._is_over = threading.Lock(), False
        self._ended: list[str] = []
        self._names: dict[int, str] = {}  # by the descriptor that becomes readable when a process ends
        self._questions: dict[str, Questions] = {}
        self._poll = select.poll()
        self._stopped_since: dict[str, float] = {}

    def _open_new_ones(self) -> None:
        for name, (pid, ask) in list(_watched.items()):
            if name not in self._names.values() and name not in self._ended:
                try:
                    descriptor = os.pidfd_open(pid)
                except OSError:
                    if self.asks or name == DAEMON:  # else it may have ended by itself, see `_has_died`
                        self._ended.append(name)
                    continue
                self._names[descriptor] = name
                self._poll.register(descriptor, select.POLLIN)
            if self.asks and ask is not None and name not in self._questions:
                self._questions[name] = Questions(name, pid, ask)
                self._questions[name].start()

    def __enter__(self) -> "Watchdog":
        self.start()
        return self

    def __exit__(self, exception_type, *_) -> None:
        if exception_type is not None:  # perhaps because a process has died this very moment
            time.sleep(2 * POLL_SECONDS)
        with self._lock:  # held for good by a thread that ends the program
            self._is_over = True
        for questions in self._questions.values():
            questions.is_over = True

    def run(self) -> None:
        asked_at = None
        while True:
            self._open_new_ones()
            ready = [descriptor for descriptor, _ in self._poll.poll(1000 * POLL_SECONDS)]
            ended = self._ended + [self._names[descriptor] for descriptor in ready if self._has_died(descriptor)]
            if self.stop.is_set() and asked_at is None:
                asked_at = time.monotonic()
            with self._lock:
                if self._is_over:
                    return
                if ended:
                    self._end(f"{ended[0]} has died")
                if (name := self._stopped_too_long()) is not None:
                    self._end(f"{name} has been stopped for {STOPPED_SECONDS:.0f} s")
                for name, questions in self._questions.items():
                    if objection := questions.objection():
                        self._end(f"{name} {objection}")
                if asked_at is not None and self.is_late(time.monotonic() - asked_at):
                    self._give_up_the_batch()

    def _has_died(self, descriptor: int) -> bool:
        """Not if it has ended by itself, as the DHT's process does when it cannot start: the main thread hears why."""
        try:
            status = os.waitid(os.P_PIDFD, descriptor, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        except ChildProcessError:  # it is p2pd, no child of this process, or the main thread has waited for it
            return self.asks or self._names[descriptor] == DAEMON
        return status is None or (status.si_code, status.si_status) != (os.CLD_EXITED, 0)

    def _stopped_too_long(self) -> str | None:
        now = time.monotonic()
        for name, (pid, _) in list(_watched.items()):
            if _status(pid)[1] == "T":
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
