"""However a supervised program ends, its exit code is right and no process stays behind (checked by process id)."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from src.process.supervisor import install_stop_handler, run_supervised

folder = Path(sys.argv[1])

def note(name, value):
    (folder / (name + ".part")).write_text(str(value))
    (folder / (name + ".part")).rename(folder / name)

def start(name, *, stubborn=False, daemon=False):
    "Fork a process that sleeps; stubborn: deaf to signals; daemon: in a session of its own, its parent gone."
    pid = os.fork()
    if pid != 0:
        return pid
    if daemon:
        os.setsid()
        if os.fork() != 0:
            os._exit(0)
    if stubborn:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    note(name, os.getpid())
    time.sleep(60)
    os._exit(0)

def start_family():
    start("stubborn", stubborn=True)
    start("daemon", stubborn=True, daemon=True)
    return start("worker")

def sleep_until(condition):
    while not condition():
        time.sleep(0.01)

def main():
    note("child", os.getpid())
    note("supervisor", os.getppid())
BODY

if __name__ == "__main__":
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    note("scratch/file", 1)
    run_supervised(main, grace_seconds=GRACE, scratch=scratch, back_off=BACK_OFF)
"""

FAMILY = "worker", "stubborn", "daemon"

STOPS_CLEANLY = """
    stop = []
    install_stop_handler(lambda: stop.append(1), deadline_seconds=20)
    worker = start_family()
    note("ready", 1)
    sleep_until(lambda: stop)
    time.sleep(0.1)
    note("clean", "worker alive" if os.waitpid(worker, os.WNOHANG)[0] == 0 else "worker dead")
    return 5
"""

IGNORES_SIGNALS = """
    start_family()
    signal.signal(signal.SIGTERM, lambda *_: note("asked", time.time()))
    note("ready", 1)
    sleep_until(lambda: False)
"""


def ended(pid):
    """Gone, or dead and waiting for a lazy init process to collect it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(condition, seconds=30.0):
    give_up_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up_at, "waited in vain"
        time.sleep(0.01)


class Program:
    """A supervised script and the process ids it notes in a folder."""

    def __init__(self, folder, body, grace_seconds=10.0, back_off=(60.0,)):
        self.folder = folder
        self.script = folder / "program.py"
        text = PROGRAM.replace("BODY", body).replace("GRACE", str(grace_seconds))
        self.script.write_text(text.replace("BACK_OFF", str(back_off)))
        self.command = [sys.executable, str(self.script), str(folder)]
        self.environment = dict(os.environ, PYTHONPATH=str(REPOSITORY))
        self.process = None

    def run(self, **options):
        return subprocess.run(self.command, env=self.environment, timeout=20, capture_output=True, text=True, **options)

    def launch(self, *names):
        """Start in a process group of its own, as a shell does, and wait until these notes are there."""
        self.process = subprocess.Popen(
            self.command,
            env=self.environment,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # ignored where the tests run under nohup
        )
        self.wait_for(*names)

    def wait_for(self, *names):
        wait_until(lambda: all((self.folder / name).exists() for name in names))

    def pid(self, name):
        return int((self.folder / name).read_text())

    def noted(self, name):
        return (self.folder / name).exists()

    def pids(self):
        notes = "child", "supervisor", *FAMILY
        return {name: self.pid(name) for name in notes if self.noted(name)}

    def assert_nothing_left(self, seconds=0.0):
        scratch = self.folder / "scratch"
        if seconds:
            wait_until(lambda: all(ended(pid) for pid in self.pids().values()) and not scratch.exists(), seconds)
        assert [name for name, pid in self.pids().items() if not ended(pid)] == []
        assert not scratch.exists()


@pytest.fixture
def program(tmp_path):
    """Creates programs; whatever a failed test leaves running is killed."""
    created = []

    def create(body, **options):
        created.append(Program(tmp_path, body, **options))
        return created[-1]

    yield create
    for one in created:
        for pid in one.pids().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if one.process is not None:
            one.process.wait()


@pytest.mark.parametrize(
    "body, code",
    [
        ("    return None", 0),
        ("    return 7", 7),
        ("    sys.exit(3)", 3),
        ("    sys.exit('no such file')", 1),
        ("    raise KeyError('lost')", 1),
        ("    os._exit(9)", 9),
        ("    os.kill(os.getpid(), signal.SIGSEGV)", 128 + signal.SIGSEGV),
    ],
)
def test_supervisor_returns_the_exit_code_of_the_program(program, body, code):
    started = program(body)
    done = started.run()
    assert done.returncode == code
    for message in ("no such file", "KeyError: 'lost'"):
        assert (message in done.stderr) == (message.split(":")[0] in body)
    started.assert_nothing_left()


def test_supervisor_passes_standard_streams_through(program):
    done = program("    print(input()[::-1])").run(input="LAMB\n")
    assert (done.stdout, done.stderr, done.returncode) == ("BMAL\n", "", 0)


def test_supervisor_kills_what_a_finished_program_left(program):
    started = program("    start_family()\n    sleep_until(lambda: (folder / 'daemon').exists())\n    return 4")
    assert started.run().returncode == 4
    started.assert_nothing_left()


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("target", ["supervisor", "group"])
def test_supervisor_forwards_a_stop_signal_to_the_program_alone(program, target, signal_number):
    started = program(STOPS_CLEANLY)
    started.launch("ready", *FAMILY)
    if target == "group":
        os.killpg(started.process.pid, signal_number)
    else:
        os.kill(started.process.pid, signal_number)
    assert started.process.wait(8) == 5
    assert (started.folder / "clean").read_text() == "worker alive"
    started.assert_nothing_left()


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_program_without_stop_handler_ends_at_once(program, signal_number):
    started = program("    start_family()\n    note('ready', 1)\n    time.sleep(60)")
    started.launch("ready", *FAMILY)
    started.process.send_signal(signal_number)
    assert started.process.wait(4) == 128 + signal_number
    started.assert_nothing_left()


def test_supervisor_kills_at_the_second_interrupt(program):
    started = program(IGNORES_SIGNALS, grace_seconds=60)
    started.launch("ready", *FAMILY)
    started.process.send_signal(signal.SIGINT)
    started.wait_for("asked")
    started.process.send_signal(signal.SIGINT)  # `timeout -s INT` signals twice within milliseconds
    time.sleep(0.4)
    assert started.process.poll() is None
    started.process.send_signal(signal.SIGINT)
    assert started.process.wait(3) == 128 + signal.SIGINT
    started.assert_nothing_left()


def test_supervisor_kills_after_the_grace_period(program):
    started = program(IGNORES_SIGNALS, grace_seconds=0.5)
    started.launch("ready", *FAMILY)
    began = time.monotonic()
    started.process.send_signal(signal.SIGTERM)
    assert started.process.wait(30) == 128 + signal.SIGKILL
    assert time.monotonic() - began >= 0.5
    started.assert_nothing_left()


def test_supervisor_cleans_up_after_a_killed_program(program):
    started = program(IGNORES_SIGNALS)
    started.launch("ready", *FAMILY)
    os.kill(started.pid("child"), signal.SIGKILL)
    assert started.process.wait(5) == 128 + signal.SIGKILL
    started.assert_nothing_left()


@pytest.mark.parametrize("body", [STOPS_CLEANLY, "    start_family()\n    note('ready', 1)\n    time.sleep(60)"])
def test_program_cleans_up_after_a_killed_supervisor(program, body):
    started = program(body)
    started.launch("ready", *FAMILY)
    started.process.kill()
    started.assert_nothing_left(seconds=4)
    assert started.noted("clean") == (body is STOPS_CLEANLY)


def test_deadline_ends_a_hanging_program_after_a_killed_supervisor(program):
    started = program("""
    install_stop_handler(lambda: note("asked", 1), deadline_seconds=0.5)
    start_family()
    note("ready", 1)
    sleep_until(lambda: False)
""")
    started.launch("ready", *FAMILY)
    started.process.kill()
    started.wait_for("asked")
    assert not ended(started.pid("child"))
    started.assert_nothing_left(seconds=4)


def test_program_that_cannot_run_python_does_not_outlive_a_killed_supervisor_for_long(program):
    started = program(
        """
    import collections, itertools
    start_family()
    note("ready", 1)
    collections.deque(itertools.repeat(0), maxlen=0)  # an endless loop in C: no handler and no thread gets its turn
""",
        grace_seconds=1.0,
    )
    started.launch("ready", *FAMILY)
    started.process.kill()
    started.assert_nothing_left(seconds=6)


def test_program_that_hangs_in_an_exit_handler_is_ended_after_the_grace_period(program):
    started = program("    import atexit\n    atexit.register(time.sleep, 60)\n    start_family()", grace_seconds=0.5)
    began = time.monotonic()
    assert started.run().returncode == 1
    assert time.monotonic() - began < 40, "it hangs for a minute"
    started.assert_nothing_left()


def test_stop_handler_is_not_inherited_by_forked_processes(program):
    started = program("""
    install_stop_handler(lambda: note("asked", os.getpid()), deadline_seconds=20)
    start("worker")
    sleep_until(lambda: (folder / "worker").exists())
    worker = int((folder / "worker").read_text())
    os.kill(worker, signal.SIGTERM)
    return -os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
""")
    assert started.run().returncode == signal.SIGTERM
    assert not started.noted("asked")


def test_killed_program_leaves_no_shared_memory(program):
    started = program("""
    from multiprocessing import shared_memory
    note("memory", shared_memory.SharedMemory(create=True, size=4096).name)
    start_family()
    os.kill(os.getpid(), signal.SIGKILL)
""")
    assert started.run().returncode == 128 + signal.SIGKILL
    segment = Path("/dev/shm") / (started.folder / "memory").read_text().lstrip("/")
    assert not segment.exists()
    started.assert_nothing_left()


def test_supervisor_works_in_a_terminal(program):
    started = program(
        STOPS_CLEANLY.replace("stop = []", "stop = []; print('terminal:', sys.stdout.isatty(), flush=True)")
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, started.command, started.environment)
    started.wait_for("ready")
    os.write(terminal, b"\x03")  # Ctrl+C
    status = os.waitpid(pid, 0)[1]
    assert b"terminal: True" in os.read(terminal, 1000)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 5 and started.noted("clean")
    started.assert_nothing_left()


def test_interrupt_that_torchrun_passes_on_is_no_second_one(program):
    started = program(STOPS_CLEANLY.replace("time.sleep(0.1)", "time.sleep(1.5)"))
    started.environment["TORCHELASTIC_RUN_ID"] = "none"
    started.launch("ready", *FAMILY)
    started.process.send_signal(signal.SIGINT)
    time.sleep(0.6)
    started.process.send_signal(signal.SIGINT)
    assert started.process.wait(8) == 5
    started.assert_nothing_left()


@pytest.mark.parametrize("under_torchrun", [True, False])
def test_program_ends_when_the_torchrun_that_started_it_is_killed(program, under_torchrun):
    started = program(STOPS_CLEANLY)
    if under_torchrun:
        started.environment["TORCHELASTIC_RUN_ID"] = "none"
    parent = [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])", *started.command]
    started.process = subprocess.Popen(parent, env=started.environment, start_new_session=True)
    started.wait_for("ready", *FAMILY)
    started.process.kill()
    if under_torchrun:
        started.assert_nothing_left(seconds=5)
        assert started.noted("clean")
    else:  # a program that was started in the background of a shell goes on when the shell ends
        time.sleep(1.0)
        assert not ended(started.pid("child"))


def test_program_goes_on_after_all_its_processes_were_stopped_for_a_while(program):
    started = program(STOPS_CLEANLY)
    started.launch("ready", *FAMILY)
    pids = [started.process.pid, started.pid("child"), *(started.pid(name) for name in FAMILY)]
    for number, seconds in ((signal.SIGSTOP, 2.5), (signal.SIGCONT, 1.5)):
        for pid in pids:
            os.kill(pid, number)
        time.sleep(seconds)
    assert started.process.poll() is None and not started.noted("clean")
    started.process.send_signal(signal.SIGTERM)
    assert started.process.wait(8) == 5
    started.assert_nothing_left()


def test_supervisor_stays_small_whatever_the_script_has_loaded(program):
    started = program("    time.sleep(0.5)\n    note('status', open(f'/proc/{os.getppid()}/status').read())")
    started.script.write_text("ballast = b'x' * 100_000_000\n" + started.script.read_text())
    assert started.run().returncode == 0
    resident_kilobytes = int((started.folder / "status").read_text().split("VmRSS:")[1].split()[0])
    assert resident_kilobytes < 30_000


# -- a program that ends with START_AGAIN -----------------------------------------------------------------------------

COUNTS_ITS_LIVES = """
    life = len(list(folder.glob("life*"))) + 1
    note(f"life{life}", f"{os.getpid()} {os.getsid(0)} {os.environ['TMPDIR']} {sys.argv[1:]}")
"""
DIES = COUNTS_ITS_LIVES + "    start_family()\n    os._exit(76)"


def lives(started):
    return [(started.folder / f"life{n + 1}").read_text() for n in range(len(list(started.folder.glob("life*"))))]


@pytest.mark.parametrize("under_torchrun", [False, True])
def test_program_that_asks_for_it_is_started_again_as_often_as_allowed(program, under_torchrun):
    started = program(DIES, back_off=(0.0, 0.1, 0.2))
    if under_torchrun:  # which has a policy of its own
        started.environment["TORCHELASTIC_RUN_ID"] = "none"
    done = started.run()
    assert done.returncode == 75
    assert len(lives(started)) == (1 if under_torchrun else 4)
    if under_torchrun:
        assert done.stderr == ""
    else:
        assert done.stderr.splitlines()[0] == "Starting again in 0 s (1 of 3 starts an hour)"
        assert done.stderr.splitlines()[-1] == "The program has been started again 3 times within an hour: giving up"
    started.assert_nothing_left()


def test_program_that_is_started_again_is_supervised_as_before_and_finds_its_files_but_no_sockets(program):
    started = program(
        COUNTS_ITS_LIVES
        + """
    import socket
    scratch = folder / "scratch"
    if life == 1:
        (scratch / "key").write_text("secret")
        socket.socket(socket.AF_UNIX).bind(str(scratch / "socket"))
        (scratch / "torch").mkdir()
        os._exit(76)
    note("found", sorted(path.name for path in scratch.iterdir()))
    note("supervised by", os.getppid() == int((folder / "supervisor").read_text()))
"""
        + STOPS_CLEANLY,
        back_off=(0.0,),
    )
    started.launch("ready", *FAMILY)
    first, second = lives(started)
    assert first.split()[0] != second.split()[0] and second.split()[0] == second.split()[1], "a session of its own"
    assert first.split()[2:] == second.split()[2:], "the same arguments and TMPDIR"
    assert (started.folder / "found").read_text() == "['file', 'key']"
    os.killpg(started.process.pid, signal.SIGINT)
    assert started.process.wait(8) == 5
    assert (started.folder / "clean").read_text() == "worker alive"
    started.assert_nothing_left()
    assert not (started.folder / "scratch").exists()


def test_program_that_was_started_again_cleans_up_after_a_killed_supervisor(program):
    started = program(COUNTS_ITS_LIVES + "    if life == 1:\n        os._exit(76)\n" + STOPS_CLEANLY, back_off=(0.0,))
    started.launch("ready", *FAMILY)
    started.process.kill()
    started.assert_nothing_left(seconds=4)
    assert started.noted("clean")


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_stop_between_two_starts_ends_the_supervisor_at_once(program, signal_number):
    started = program(DIES, back_off=(60.0,))
    started.launch("life1", *FAMILY)
    wait_until(lambda: ended(started.pid("child")))
    time.sleep(0.3)
    started.process.send_signal(signal_number)
    assert started.process.wait(4) == 128 + signal_number
    started.assert_nothing_left()


def test_program_that_was_asked_to_stop_is_not_started_again(program):
    started = program(
        COUNTS_ITS_LIVES + "    install_stop_handler(lambda: os._exit(76), deadline_seconds=20)\n"
        "    note('ready', 1)\n    sleep_until(lambda: False)", back_off=(0.0,),
    )  # fmt: skip
    started.launch("ready")
    started.process.send_signal(signal.SIGTERM)
    assert started.process.wait(4) == 75 and len(lives(started)) == 1


@pytest.mark.parametrize("stop", ["kill the supervisor", "interrupt all"])
def test_program_that_is_just_loading_after_a_new_start_ends_with_its_supervisor(program, stop):
    started = program(COUNTS_ITS_LIVES + "    os._exit(76)", back_off=(0.0,))
    loading = (
        "    if 'LEANALBERT_RESTARTED_BY' in os.environ:\n        note('worker', os.getpid())\n        time.sleep(60)\n"
    )
    started.script.write_text(started.script.read_text().replace("    scratch =", loading + "    scratch =", 1))
    started.launch("worker")
    if stop == "interrupt all":
        os.killpg(started.process.pid, signal.SIGINT)
        assert started.process.wait(4) == 128 + signal.SIGINT
        started.assert_nothing_left()
    else:
        started.process.kill()
        wait_until(lambda: ended(started.pid("worker")))
