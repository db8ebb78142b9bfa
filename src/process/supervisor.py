"""Run a program under a small supervisor process, so that whatever way it ends, it leaves no process behind.

hivemind starts processes of its own (a DHT process, averagers, p2pd). They outlive a program that is killed, and they
die too early when a signal goes to the whole process group, as Ctrl+C in a terminal does: the program then waits for
them until its timeouts. :func:`run_supervised` therefore splits a script in two. The program proper goes on in a
forked child, in a session of its own, where group signals do not reach it; the first process becomes a small
interpreter that runs this very file and only watches. A program that ends because one of its processes has died,
with `START_AGAIN`, is started again by the supervisor, with the same command.

Standard library only, so that the watching process takes about 15 MB, whatever the script has imported. Linux only.
"""

import atexit
import contextlib
import ctypes
import logging
import os
import select
import signal
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # <linux/prctl.h>
SECOND_INTERRUPT_SECONDS = 0.2  # `timeout -s INT` sends a signal twice within milliseconds, nobody types that fast
TORCHRUN_SECONDS = 3.0  # torchrun passes Ctrl+C, which the terminal has sent to all, on to its processes later
POLL_SECONDS = 0.02
CLEANER_SECONDS = 3.0  # torch's ends two seconds after its last user
GIVE_UP_SECONDS = 10.0  # a process that hangs inside the kernel cannot be killed by anyone

DIED = 75  # exit code of a program of which a process has died: EX_TEMPFAIL of <sysexits.h>, try again
START_AGAIN = 76  # what the program tells its supervisor instead, if it is to be started again; nobody else sees it
BACK_OFF_SECONDS = (2.0, 10.0, 30.0, 60.0, 120.0)  # before each new start within an hour; after the last one, DIED
HOUR = 3600.0
# What a program that is started again finds in its environment: its supervisor's process id, and the directory of
# sockets that it goes on using, in which it finds what its earlier life has left there.
RESTARTED_BY, SCRATCH = "LEANALBERT_RESTARTED_BY", "LEANALBERT_SOCKET_DIRECTORY"

_scratch: Path | None = None  # of the program that this process supervises, or is
_supervisor_pid: int | None = None


def _end_family() -> None:
    kill_descendants()
    if os.getppid() != _supervisor_pid:  # else it does so when the cleaners of shared memory have ended, too
        _remove_scratch()


def _remove_scratch() -> None:
    if _scratch is not None:
        import shutil  # here, because it takes longer to import than all the rest

        shutil.rmtree(_scratch, ignore_errors=True)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


def end_with_parent() -> None:
    """Let this process get SIGTERM when the one that started it ends, in whatever way."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def adopt_orphans() -> None:
    """From now on, processes whose parent has ended become children of this one if it started their parent."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def children_of(pid: int) -> list[int]:
    """Process ids of the direct children of a process, ended but unreaped ones included."""
    children = []
    for stat_file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended while we looked
            fields = stat_file.read_text(errors="replace").rpartition(")")[2].split()  # the name may hold ") "
            if int(fields[1]) == pid:
                children.append(int(stat_file.parent.name))
    return children


def _reap() -> list[tuple[int, int]]:
    """(process id, wait status) of each child that has ended since the last call."""
    ended = []
    with contextlib.suppress(ChildProcessError):  # no child at all
        while (found := os.waitpid(-1, os.WNOHANG))[0] != 0:
            ended.append(found)
    return ended


def _is_cleaner(pid: int) -> bool:
    """Whether a process removes shared memory files when all others are gone; killing it would leak them for good."""
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return b"torch_shm_manager" in command or b"multiprocessing.resource_tracker" in command
    return False


def kill_descendants() -> None:
    """Kill every descendant of this process but cleaners of shared memory, which end after their last user.

    This process must be a subreaper: then the children of a killed child become our own children, and killing
    direct children until there are none reaches all of them. A child's id cannot be reused before we have reaped it,
    so no stranger is hit.
    """
    give_up_at = time.monotonic() + GIVE_UP_SECONDS
    while victims := [pid for pid in children_of(os.getpid()) if not _is_cleaner(pid)]:
        if time.monotonic() > give_up_at:
            logger.error("Could not kill the processes %s", victims)
            return
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
        _reap()


def _kill_cleaners_that_stay() -> None:
    give_up_at = time.monotonic() + CLEANER_SECONDS
    while (cleaners := children_of(os.getpid())) and time.monotonic() < give_up_at:
        time.sleep(POLL_SECONDS)
        _reap()
    for pid in cleaners:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def start_deadline(seconds: float, code: int = 1) -> None:
    """From now on this process has so many seconds to end; after that it and all its descendants are killed."""

    def enforce() -> None:
        time.sleep(seconds)
        logger.error("Not finished %g s after the request to stop: ending by force", seconds)
        _end_family()
        os._exit(code)

    threading.Thread(target=enforce, name="deadline", daemon=True).start()


def install_stop_handler(*stop_requests: Callable[[], None], deadline_seconds: float) -> None:
    """On the first SIGTERM or SIGINT call ``stop_requests`` and start a deadline; later ones change nothing.

    Call it on the main thread, and after ``hivemind.Optimizer`` has been created: that one ignores SIGINT. Processes
    forked later do not inherit the handler, they die of SIGTERM as usual.
    """
    stopping = False

    def handle(signal_number: int, frame: object) -> None:
        nonlocal stopping
        if not stopping:
            stopping = True
            start_deadline(deadline_seconds)
            for request in stop_requests:
                request()

    _install_in_this_process_only(handle)


def _install_in_this_process_only(handler: Callable[[int, object], None]) -> None:
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, handler)

    def reset_in_child() -> None:
        for signal_number, default in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
            if signal.getsignal(signal_number) is handler:
                signal.signal(signal_number, default)

    os.register_at_fork(after_in_child=reset_in_child)


def run_supervised(
    main: Callable[[], int | None],
    *,
    grace_seconds: float = 30.0,
    scratch: Path | None = None,
    back_off: tuple[float, ...] = BACK_OFF_SECONDS,
) -> NoReturn:
    """Run ``main`` in a supervised child, then end with its exit code once no descendant is left.

    The directory ``scratch``, if there is one, is removed then.

    When ``main`` ends with `START_AGAIN`, the command that started this program is run once more, in ``scratch`` and
    after a pause from ``back_off``: as often within an hour as that has values. After that, when it was asked to stop,
    and under torchrun, which has a policy of its own, the exit code is `DIED`.

    Call it last in a script, on the main thread. Neither process returns from it: this one executes the supervisor,
    the child ends as an interpreter does, exit handlers included.

    - SIGTERM, SIGINT (Ctrl+C) and SIGHUP to the supervisor become one SIGTERM to the child, not to its children.
      Until ``main`` calls :func:`install_stop_handler`, the child ends at once on it.
    - ``grace_seconds`` after that, or at a second Ctrl+C, the child is killed. So is, when the child has ended in
      whatever way, everything it has started, daemons in sessions of their own included.
    - If the supervisor is killed, the child receives SIGTERM and kills its own descendants when it ends. Caught in a
      library's loop it could not; so a guard process kills whatever is left of them ``grace_seconds`` later.

    Exit code: ``main``'s, or 128 + n if signal n ended the child (130 after Ctrl+C).
    """
    global _scratch
    assert threading.current_thread() is threading.main_thread(), "signals are delivered to the main thread"
    _scratch = scratch
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # may be inherited as ignored, children would then vanish unseen
    restarted_by = os.environ.pop(RESTARTED_BY, None)
    # Blocked signals stay pending through fork and exec, until the supervisor asks for them: none is lost.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD})
    if restarted_by is not None:  # this process is the child already
        _run_child(main, int(restarted_by), mask, grace_seconds)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if under_torchrun:  # it would leave its processes behind when it is killed
        end_with_parent()
    sys.stdout.flush()
    sys.stderr.flush()
    supervisor_pid = os.getpid()
    child_pid = os.fork()
    if child_pid == 0:
        _run_child(main, supervisor_pid, mask, grace_seconds)
    interpreter = [sys.executable, "-I", "-S"]  # neither site-packages nor the environment: starts in 30 ms
    second_interrupt = TORCHRUN_SECONDS if under_torchrun else SECOND_INTERRUPT_SECONDS
    pauses = "" if under_torchrun else ",".join(map(str, back_off))
    arguments = [str(child_pid), str(grace_seconds), str(second_interrupt), str(scratch or ""), _usual_tmpdir(), pauses]
    command = [sys.executable, *sys.orig_argv[1:]]
    os.execv(interpreter[0], [*interpreter, str(Path(__file__).resolve()), *arguments, *command])


def _usual_tmpdir() -> str:
    """TMPDIR of a program that is started again: of this one's, a directory of sockets was made the TMPDIR."""
    import tempfile  # here, as the supervisor does not need it

    return tempfile.gettempdir()


def _run_child(main: Callable[[], int | None], supervisor_pid: int, mask: set[int], grace_seconds: float) -> NoReturn:
    global _supervisor_pid
    _supervisor_pid = supervisor_pid
    if os.getsid(0) != os.getpid():
        os.setsid()
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    end_with_parent()
    if os.getppid() != supervisor_pid:  # killed before PDEATHSIG was set
        os._exit(1)
    _start_guard(supervisor_pid, grace_seconds)
    _install_in_this_process_only(_end_at_once)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    child_pid = os.getpid()

    def clean_up_without_supervisor() -> None:
        if os.getpid() == child_pid and os.getppid() != supervisor_pid:
            _end_family()

    atexit.register(clean_up_without_supervisor)
    try:
        code = main()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if os.getpid() == child_pid:
        start_deadline(grace_seconds)  # a hanging exit handler must not keep the process alive
    sys.exit(code)


def _start_guard(supervisor_pid: int, grace_seconds: float) -> None:
    """Fork a process that ends with this one, or ends this one and all below it when it outlives its supervisor."""
    program_pid, supervisor = os.getpid(), os.pidfd_open(supervisor_pid)
    if os.fork() != 0:
        os.close(supervisor)
        return
    for signal_number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signal_number, signal.SIG_IGN)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == program_pid:  # else it was killed before PDEATHSIG was set
        select.select([supervisor], [], [])  # until it has ended
        time.sleep(grace_seconds)
        _remove_scratch()  # now: this process ends with the program
        _kill_tree(program_pid)
    os._exit(0)


def _kill_tree(root: int) -> None:
    """Kill a process and all below it but this one; all are stopped first, so that none can start another."""
    stopped, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        if pid == os.getpid() or _is_cleaner(pid):
            continue
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
        stopped.append(pid)
        waiting += children_of(pid)
    for pid in reversed(stopped):  # the root last: its death is this process' end, too
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def leave_at_once(code: int) -> NoReturn:
    """End this program and its descendants without exit handlers, which would wait for half-started processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    _end_family()
    os._exit(code)


def _end_at_once(signal_number: int, frame: object) -> None:
    _end_family()
    os._exit(128 + signal_number)


def _supervise(child_pid: int, grace_seconds: float, second_interrupt_seconds: float) -> int:
    """Wait for the child to end, forward signals, kill all when its time is up; returns the exit code."""
    stop_signals = _stop_signals()
    first_signal, stop_at = None, float("inf")
    while True:
        for pid, status in _reap():
            if pid == child_pid:
                code = _exit_code(status, first_signal)
                return DIED if code == START_AGAIN and first_signal is not None else code
        now = time.monotonic()
        if now >= stop_at:
            logger.warning("Not finished %g s after the request to stop: killing the program", grace_seconds)
            return 128 + signal.SIGKILL
        received = signal.sigtimedwait(stop_signals | {signal.SIGCHLD}, min(1.0, stop_at - now))
        # Stopped and continued (Ctrl+Z, fg), CPython may return a record that holds no signal at all.
        if received is None or received.si_signo not in stop_signals:
            continue
        if first_signal is None:
            first_signal, stopped_at, stop_at = received.si_signo, time.monotonic(), time.monotonic() + grace_seconds
            os.kill(child_pid, signal.SIGTERM)
        elif received.si_signo == signal.SIGINT and time.monotonic() - stopped_at > second_interrupt_seconds:
            return 128 + signal.SIGINT


def _stop_signals() -> set[int]:
    stop_signals = {signal.SIGTERM, signal.SIGINT}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
        stop_signals.add(signal.SIGHUP)
    return stop_signals


def _exit_code(status: int, first_signal: int | None) -> int:
    code = os.waitstatus_to_exitcode(status)
    ended_by_request = code in (-signal.SIGTERM, 128 + signal.SIGTERM)
    if ended_by_request and first_signal is not None:
        return 128 + first_signal  # what the user sent, not what it was forwarded as
    return code if code >= 0 else 128 - code


def _watch_until_nothing_is_left() -> int:
    global _scratch
    child_pid, grace_seconds, second_interrupt_seconds = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    _scratch = Path(sys.argv[4]) if sys.argv[4] else None
    back_off = [float(pause) for pause in sys.argv[6].split(",") if pause]
    starts: list[float] = []  # the moments at which the program was started again within the last hour
    try:
        while (code := _supervise(child_pid, grace_seconds, second_interrupt_seconds)) == START_AGAIN:
            kill_descendants()
            _kill_cleaners_that_stay()
            starts = [moment for moment in starts if time.monotonic() - moment < HOUR]
            if len(starts) >= len(back_off):
                if back_off:
                    logger.warning("The program has been started again %d times within an hour: giving up", len(starts))
                return DIED
            pause = back_off[len(starts)]
            logger.warning("Starting again in %g s (%d of %d starts an hour)", pause, len(starts) + 1, len(back_off))
            if (received := signal.sigtimedwait(_stop_signals(), pause)) is not None:
                return 128 + received.si_signo
            starts.append(time.monotonic())
            child_pid = _start_again(sys.argv[7:], tmpdir=sys.argv[5])
        return code
    finally:
        kill_descendants()
        _kill_cleaners_that_stay()
        _remove_scratch()


def _start_again(command: list[str], *, tmpdir: str) -> int:
    """Run the program's command as a child of this supervisor; returns its process id."""
    if _scratch is not None:
        _remove_sockets_of_the_dead(_scratch)
    supervisor_pid = os.getpid()
    environment = {**os.environ, RESTARTED_BY: str(supervisor_pid), SCRATCH: str(_scratch or ""), "TMPDIR": tmpdir}
    child_pid = os.fork()
    if child_pid == 0:
        os.setsid()
        end_with_parent()
        if os.getppid() != supervisor_pid:  # killed before PDEATHSIG was set
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_SETMASK, set())
        try:
            os.execve(command[0], command, environment)
        finally:
            os._exit(127)
    return child_pid


def _remove_sockets_of_the_dead(directory: Path) -> None:
    """What processes had made for themselves; files stay: they are what a new start goes on with."""
    import shutil

    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(_watch_until_nothing_is_left())
