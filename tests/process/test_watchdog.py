"""When one of a peer's processes dies, the program says which, writes its backup and ends, whatever it waits for."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from src.process.local_swarm import REPOSITORY, LocalPeer

PROGRAM = """
import os, sys, threading, time
from src.process import watchdog
from src.process.supervisor import run_supervised

def start(name):
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    return pid

def main():
    watchdog.STOPPED_SECONDS = 1.0
    say = lambda message: print(message, flush=True)
    stop, processes = threading.Event(), {name: start(name) for name in ("the first", "the second")}
    for name, pid in processes.items():
        watchdog.watch(name, pid)
    def save(alone):
        try:
            os.kill(processes["the first"], 0)
            say("saved beside others")
        except ProcessLookupError:
            say(f"saved, alone: {alone}")
    options = dict(say=say, stop=stop, start_again=START_AGAIN, save=save, leave=lambda: say("left"))
BODY

if __name__ == "__main__":
    sys.exit(run_supervised(main, back_off=(0.1,)))
"""
TINY = ["--target_batch_size", "32", "--backup_every_epochs", "1000", "--total_steps", "100000"]
TINY += ["--host_maddrs", "/ip4/127.0.0.1/tcp/0"]
HUGE_BATCH = ["--per_device_train_batch_size", "8000", "--activation_memory", "checkpoint"]
STUCK = """
    with watchdog.Watchdog(**options):
        print(*processes.values(), flush=True)
        threading.Event().wait()  # as hivemind's futures do
"""


@pytest.fixture
def launch(tmp_path):
    started = []

    def launch(body, start_again=False):
        (tmp_path / "program.py").write_text(PROGRAM.replace("BODY", body).replace("START_AGAIN", str(start_again)))
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "program.py")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield launch
    for process in started:
        process.kill()
        process.communicate()


def pids_of(process) -> list[int]:
    return [int(pid) for pid in process.stdout.readline().split()]


def test_watchdog_says_what_died_saves_when_all_are_gone_and_ends_a_program_that_waits_for_ever(launch):
    process = launch(STUCK)
    second = pids_of(process)[1]
    os.kill(second, signal.SIGKILL)
    output = process.communicate(timeout=30)[0].splitlines()
    assert output == ["the second has died: ending; exit code 75", "saved, alone: True"]
    assert process.returncode == 75


def test_watchdog_lets_the_supervisor_start_the_program_again(launch):
    process = launch(STUCK, start_again=True)
    os.kill(pids_of(process)[0], signal.SIGKILL)
    said = [process.stdout.readline().strip() for _ in range(3)]
    assert said[0] == "the first has died: ending and starting again; exit code 75"
    assert said[2] == "Starting again in 0.1 s (1 of 1 starts an hour)"
    os.kill(pids_of(process)[0], signal.SIGKILL)
    assert process.wait(30) == 75
    assert process.stdout.read().strip().endswith("started again 1 times within an hour: giving up")


def test_watchdog_waits_for_a_stopped_process_but_not_for_ever(launch):
    process = launch(STUCK)
    first = pids_of(process)[0]
    os.kill(first, signal.SIGSTOP)
    time.sleep(0.6)
    os.kill(first, signal.SIGCONT)
    time.sleep(0.6)
    assert process.poll() is None
    os.kill(first, signal.SIGSTOP)
    assert process.communicate(timeout=30)[0].startswith("the first has been stopped for 1 s: ending")
    assert process.returncode == 75


def test_watchdog_is_quiet_once_its_peer_leaves(launch):
    process = launch("""
    with watchdog.Watchdog(**options):
        time.sleep(0.5)
    for pid in processes.values():
        os.kill(pid, 9)
    time.sleep(1)
    say("done")
""")
    assert process.communicate(timeout=30)[0] == "done\n" and process.returncode == 0


def test_watchdog_is_quicker_than_an_error_that_the_death_causes(launch):
    process = launch("""
    with watchdog.Watchdog(**options):
        time.sleep(0.5)
        os.kill(processes["the first"], 9)
        raise BrokenPipeError("the pipe to the process is broken")
""")
    assert process.communicate(timeout=30)[0].splitlines() == [
        "the first has died: ending; exit code 75",
        "saved, alone: True",
    ]
    assert process.returncode == 75


def test_watchdog_finds_a_process_that_was_gone_before_it_began(launch):
    process = launch("""
    watchdog.watch_daemon(processes["the first"])
    with watchdog.Watchdog(**options):
        time.sleep(20)
""")
    assert process.communicate(timeout=30)[0].startswith("the network daemon, p2pd, has died: ending")


HANG = """
    watchdog.ASK_SECONDS, watchdog.OVERDUE_SECONDS = 0.1, 0.5
    watchdog.ASLEEP_SECONDS, watchdog.BUSY_SECONDS = LIMITS
    asked, answer = os.pipe(), os.pipe()
    def serve():
        while os.read(asked[0], 1) == b"?":
            os.write(answer[1], b"!")
        HOW
    pid = os.fork()
    if pid == 0:
        serve()
    def ask():
        os.write(asked[1], b"?")
        os.read(answer[0], 1)
    watchdog.watch("the third", pid, ask)
    with watchdog.Watchdog(**options):
        time.sleep(1.5)
        say("so far it has answered")
        os.write(asked[1], b".")
        time.sleep(SECONDS)
        say("it is let be")
        os._exit(0)
"""


def hanging(how: str, *, asleep: float = 1e9, busy: float = 1e9, seconds: float = 30) -> str:
    return HANG.replace("HOW", how).replace("LIMITS", f"{asleep}, {busy}").replace("SECONDS)", f"{seconds})")


def test_watchdog_ends_a_program_whose_process_lives_but_sleeps_instead_of_answering(launch):
    process = launch(hanging("time.sleep(60)", asleep=1.0))
    said = process.communicate(timeout=30)[0].splitlines()
    assert said[0] == "so far it has answered"
    assert said[1].startswith("the third has answered nothing for") and ": it hangs: ending; exit code 75" in said[1]
    assert said[2] == "saved, alone: True" and process.returncode == 75


def test_watchdog_ends_a_program_whose_process_turns_round_and_round_instead_of_answering(launch):
    process = launch(hanging("while True: pass", busy=0.5))
    said = process.communicate(timeout=60)[0].splitlines()
    assert ", however busy: ending; exit code 75" in said[1] and process.returncode == 75


def test_watchdog_waits_for_a_process_that_gets_no_processor(launch):
    """It is ready to run and does not sleep, nor has it used up what honest work may take."""
    process = launch(hanging("while True: pass", asleep=0.5, seconds=4))
    assert process.communicate(timeout=60)[0].splitlines() == ["so far it has answered", "it is let be"]


def test_watchdog_does_not_count_the_time_in_which_its_own_program_was_stopped(launch):
    process = launch(hanging("time.sleep(60)", asleep=2.5, seconds=0.6))
    assert process.stdout.readline() == "so far it has answered\n"
    (program,) = (child for child in psutil.Process(process.pid).children() if child.name().startswith("python"))
    program.suspend()
    time.sleep(4)
    program.resume()
    assert process.communicate(timeout=60)[0] == "it is let be\n"


def test_watchdog_gives_a_batch_up_that_takes_too_long_after_a_stop_and_leaves_in_order(launch):
    process = launch("""
    options["is_late"] = lambda seconds: seconds > 0.5
    with watchdog.Watchdog(**options):
        time.sleep(0.5)
        stop.set()
        time.sleep(20)
""")
    expected = ["asked to stop, but the batch under way takes too long: it is given up", "saved beside others", "left"]
    assert process.communicate(timeout=30)[0].splitlines() == expected
    assert process.returncode == 0


def test_watchdog_ends_a_program_whose_leaving_hangs(launch):
    process = launch("""
    watchdog.LEAVE_SECONDS = 0.5
    options.update(is_late=lambda seconds: True, leave=lambda: time.sleep(60))
    stop.set()
    with watchdog.Watchdog(**options):
        time.sleep(20)
""")
    process.communicate(timeout=30)
    assert process.returncode == 0


# -- a real trainer


@pytest.mark.timeout(300)
def test_trainer_whose_p2pd_dies_goes_on_from_its_backup_as_the_same_peer_at_the_same_address(tmp_path):
    peer = LocalPeer("trainer", "run_trainer.py", ["@demo/trainer.args", *TINY, "--output_dir", tmp_path], echo=False)
    try:
        address = peer.wait_for_line(r"--initial_peers (/ip4/127\S+)").group(1)
        name = peer.wait_for_line(r"reports call this trainer (\w+)").group(1)
        peer.wait_for_line(r"epoch 2/")
        os.kill(p2pd_below(peer.process.pid), signal.SIGKILL)
        peer.wait_for_line(r"p2pd, has died: ending and starting again", timeout=10)
        saved = int(peer.wait_for_line(r"resumed from .*backup.pth at epoch (\d+)").group(1))
        assert saved >= 2, "of the moment, not of the last backup that was due"
        peer.wait_for_line(rf"epoch {saved + 2}/")
        assert peer.output().count(f"--initial_peers {address}") == 2
        assert peer.output().count(f"reports call this trainer {name}") == 2
        assert peer.output().index("wrote the backup") < peer.output().index("Starting again in 2 s")
        assert "Traceback" not in peer.output()
        assert peer.stop() == 0
    finally:
        peer.stop()


@pytest.mark.timeout(300)
def test_trainer_whose_dht_process_dies_before_it_trains_is_started_again(tmp_path):
    peer = LocalPeer("trainer", "run_trainer.py", ["@demo/trainer.args", *TINY, "--output_dir", tmp_path], echo=False)
    try:
        give_up_at = time.monotonic() + 100
        while not (p2pd := [p for p in psutil.Process(peer.process.pid).children(True) if p.name() == "p2pd"]):
            assert time.monotonic() < give_up_at and peer.process.poll() is None, peer.output()
            time.sleep(0.005)
        p2pd[0].parent().kill()
        peer.wait_for_line(r"the DHT process has died: ending and starting again", timeout=20)
        peer.wait_for_line(r"epoch 1/")
        assert "Traceback" not in peer.output() and "error" not in peer.output()
        assert peer.stop() == 0
    finally:
        peer.stop()


@pytest.mark.timeout(300)
def test_trainer_that_may_not_start_again_ends_with_code_75(tmp_path):
    arguments = ["@demo/trainer.args", *TINY, "--output_dir", tmp_path, "--restart", "False"]
    peer = LocalPeer("trainer", "run_trainer.py", arguments, echo=False)
    try:
        peer.wait_for_line(r"epoch 2/")
        os.kill(p2pd_below(peer.process.pid), signal.SIGKILL)
        assert peer.process.wait(60) == 75
        assert (tmp_path / "demo" / "trainer" / "backup.pth").exists()
        assert "Starting again" not in peer.output()
    finally:
        peer.stop()


def p2pd_below(pid: int) -> int:
    """Of a peer, by its supervisor."""
    (p2pd,) = (process.pid for process in psutil.Process(pid).children(recursive=True) if process.name() == "p2pd")
    return p2pd


@pytest.mark.timeout(300)
def test_trainer_in_a_batch_that_takes_longer_than_a_stop_may_leaves_with_a_backup(tmp_path):
    trained = ["--target_batch_size", "32", "--output_dir", tmp_path, "--host_maddrs", "/ip4/127.0.0.1/tcp/0"]
    peer = LocalPeer("trainer", "run_trainer.py", ["@demo/trainer.args", *trained, *HUGE_BATCH], echo=False)
    try:
        peer.wait_for_line("reports call this trainer")
        time.sleep(4)  # reading and computing its first batch take half a minute
        asked = time.monotonic()
        assert peer.stop() == 0
        assert time.monotonic() - asked < 25
        assert "the batch under way takes too long: it is given up" in peer.output()
        assert "wrote the backup" in peer.output() and "by force" not in peer.output()
        assert (tmp_path / "demo" / "trainer" / "backup.pth").exists()
    finally:
        peer.stop()
