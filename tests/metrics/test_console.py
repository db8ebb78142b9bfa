"""What the person at the terminal sees: how others join, progress in place on a terminal, lines in a file."""

import io
import logging
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from hivemind.utils import get_dht_time

from src.console import format_moment, format_seconds, quiet_libraries
from src.metrics import console
from src.metrics.console import EpochPace, Progress, Pulse
from src.metrics.records import Round, TrainerEpoch
from tests.reference.fake_swarm import FakeOptimizer, tiny_model


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"), (119, "119 s"), (120, "2 min"), (3600, "60 min"), (7199, "120 min"), (7200, "2.0 h"),
        (9000, "2.5 h"), (172_799, "48.0 h"), (172_800, "2.0 d"), (864_000, "10.0 d"),
    ],
)  # fmt: skip
def test_console_durations_are_written_as_people_do(seconds, text):
    assert format_seconds(seconds) == text


def test_console_knows_no_date_that_no_calendar_has():
    assert format_moment(1_800_000_000.0).startswith("2027-01-15 ")
    assert format_moment(1e30) == "in more than a thousand years"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def optimizer_in_epoch_3():
    optimizer = FakeOptimizer(tiny_model(), samples_per_epoch=64, epoch=3)
    optimizer.tracker.global_progress.samples_accumulated = 40
    optimizer.tracker.global_progress.num_peers = 2
    optimizer.tracker.global_progress.eta_next_epoch = get_dht_time() + 30
    return optimizer


def update(progress: Progress, optimizer) -> None:
    progress.update(optimizer.local_epoch, optimizer.tracker, 80)


def test_console_progress_is_overwritten_in_place_on_a_terminal():
    progress = Progress(Terminal(), refresh_seconds=0.0)
    update(progress, optimizer_in_epoch_3())
    progress.say("a line")
    written = progress.stream.getvalue()
    assert written.startswith("\r\033[Kepoch 4: 40 of 64 samples, 2 peers, ")
    assert written.endswith(" s left\r\033[Ka line\n")


def test_console_progress_is_not_redrawn_too_often():
    progress = Progress(Terminal(), refresh_seconds=60.0)
    for _ in range(3):
        update(progress, optimizer_in_epoch_3())
    assert progress.stream.getvalue().count("epoch 4") == 1


@pytest.mark.parametrize(("num_peers", "eta", "expected"), [(0, float("inf"), "samples, 1 peer"),
                                                            (1, 0.0, "1 peer, 0 s left")])  # fmt: skip
def test_console_progress_knows_what_it_does_not_know(num_peers, eta, expected):
    optimizer, progress = optimizer_in_epoch_3(), Progress(Terminal(), refresh_seconds=0.0)
    optimizer.tracker.global_progress.num_peers = num_peers
    optimizer.tracker.global_progress.eta_next_epoch = eta
    update(progress, optimizer)
    assert progress.stream.getvalue().endswith(expected)


@pytest.fixture
def clock(monkeypatch):
    """Seconds since 1970 that pass when they are told to."""
    now = SimpleNamespace(seconds=1_800_000_000.0)
    times = SimpleNamespace(monotonic=lambda: now.seconds, time=lambda: now.seconds)
    monkeypatch.setattr(console, "time", times)
    monkeypatch.setattr(console, "get_dht_time", lambda: now.seconds)
    return now


def test_console_progress_in_a_file_is_a_line_a_minute(clock):
    progress, optimizer = Progress(io.StringIO()), optimizer_in_epoch_3()
    tracker = optimizer.tracker
    pulse = Pulse(progress, optimizer, total_epochs=80, stop=None)
    lines = []
    for _ in range(240):
        clock.seconds += 0.5
        tracker.global_progress.eta_next_epoch = clock.seconds + 30
        pulse.look()
        lines.append(progress.stream.getvalue().count("\n"))
    assert lines[108:112] == [0, 1, 1, 1] and lines[-1] == 2, "within 60 s of each other"
    first = progress.stream.getvalue().splitlines()[0]
    assert first.startswith(
        "epoch 4: 40 of 64 samples, 2 peers, 12.0/s, 30 s left; at this pace the run ends 2027-01-15 "
    )


def test_console_progress_in_a_file_names_no_rate_before_there_is_one(clock):
    progress, optimizer = Progress(io.StringIO()), optimizer_in_epoch_3()
    optimizer.tracker.samples_per_second = 1e-9
    optimizer.tracker.global_progress.eta_next_epoch = float("inf")
    Pulse(progress, optimizer, total_epochs=80, stop=None)
    clock.seconds += 3600
    update(progress, optimizer)
    assert progress.stream.getvalue() == "epoch 4: 40 of 64 samples, 2 peers\n"


def test_console_lines_of_epochs_make_up_for_those_within(clock):
    progress, optimizer = Progress(io.StringIO()), optimizer_in_epoch_3()
    for _ in range(10):
        clock.seconds += 50.0
        update(progress, optimizer)
        progress.routine("epoch")
    assert progress.stream.getvalue() == 10 * "epoch\n"


def test_console_says_once_that_nobody_trains(clock):
    progress, optimizer = Progress(io.StringIO()), optimizer_in_epoch_3()
    optimizer.auxiliary, optimizer.tracker.global_progress.num_peers = True, 0
    pulse = Pulse(progress, optimizer, total_epochs=80, stop=None)
    for peers in (0, 0, 2, 2, 0, 0):
        clock.seconds += 60.0
        optimizer.tracker.global_progress.num_peers = peers
        pulse.look()
    said = [line.partition(":")[0] for line in progress.stream.getvalue().splitlines()]
    assert said == ["no trainer is at work", "epoch 4", "epoch 4", "no trainer is at work"]


def test_console_says_nothing_after_the_last_epoch(clock):
    progress = Progress(io.StringIO())
    clock.seconds += 100.0
    Pulse(progress, optimizer_in_epoch_3(), total_epochs=3, stop=None).look()
    assert progress.stream.getvalue() == ""


def test_the_end_of_the_run_moves_with_the_pace():
    pace = EpochPace()
    for epoch, now in ((3, 0.0), (4, 100.0), (4, 105.0), (5, 110.0), (6, 120.0)):
        pace.note(epoch, now)
    assert pace.seconds == 10.0
    pace.note(7, 160.0)
    assert pace.seconds == 20.0
    pace.note(500, 161.0)  # the state of a swarm that is further
    assert pace.seconds is None
    pace.note(501, 163.0)
    pace.note(503, 167.0)  # an auxiliary peer looks now and then
    assert pace.seconds == 2.0
    for epoch in range(504, 600):
        pace.note(epoch, 167.0 + 5.0 * (epoch - 503))
    assert pace.seconds == 5.0, "of the last epochs only"
    pace.note(400, 1000.0)
    assert pace.seconds is None


def test_a_pulse_beats_whatever_the_main_thread_does():
    progress, stop = Progress(io.StringIO(), refresh_seconds=0.0), threading.Event()
    pulse = Pulse(progress, optimizer_in_epoch_3(), total_epochs=80, stop=stop)
    pulse.start()
    give_up_at = time.monotonic() + 60
    while not progress.stream.getvalue() and time.monotonic() < give_up_at:
        time.sleep(0.05)
    stop.set()
    pulse.join(timeout=60)
    assert progress.stream.getvalue().startswith("epoch 4: 40 of 64 samples") and not pulse.is_alive()


RECORD = TrainerEpoch(
    epoch=5, loss=3.5, mlm_loss=3.0, sop_loss=0.5, samples=32, samples_per_second=8.25, num_peers=2, seconds=4.0
)


def test_console_epoch_line_has_all_figures():
    progress = Progress(io.StringIO())
    progress.epoch_finished(RECORD, 80, [Round("gradients", 1.0, num_peers=2, received=1.0)])
    line = progress.stream.getvalue()
    for figure in ("epoch 5/80", "loss 3.500", "words 3.000", "order 0.500", "32 samples here", "8.2/s", "2 peers",
                   "averaged with 2 peers", "4.0 s", "5 min left, until 20"):  # fmt: skip
        assert figure in line
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    "rounds",
    [[], [Round("parameters", 1.0, 2, 1.0)], [Round("gradients", 1.0, 2, 0.5)], [Round("gradients", 1.0, error="x")]],
    ids=["none", "parameters only", "partial", "failed"],
)
def test_console_epoch_line_claims_no_averaging_that_was_not_complete(rounds):
    progress = Progress(io.StringIO())
    progress.epoch_finished(RECORD, 80, rounds)
    assert "averaged with" not in progress.stream.getvalue()


def test_console_silences_libraries_but_not_this_project(monkeypatch):
    for variable in ("HIVEMIND_LOGLEVEL", "GOLOG_LOG_LEVEL", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(variable, "")  # so that it is put back
        monkeypatch.delenv(variable)
    names = ("transformers", "accelerate", "datasets", "bitsandbytes", "torch", "hivemind", "asyncio")
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        with warnings.catch_warnings(record=True) as shown:
            quiet_libraries()
            warnings.warn("not shown")
        enabled = [name for name in names if logging.getLogger(name).isEnabledFor(logging.WARNING)]
        assert (shown, enabled) == ([], [])
        assert logging.getLogger("src.trainer.callback").isEnabledFor(logging.WARNING)
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false", "its threads do not survive forks"
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def test_console_leaves_hivemind_to_its_own_switch(monkeypatch):
    monkeypatch.setenv("HIVEMIND_LOGLEVEL", "DEBUG")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    level = logging.getLogger("hivemind").level
    with warnings.catch_warnings():
        quiet_libraries()
    assert logging.getLogger("hivemind").level == level


@pytest.mark.parametrize(("verbosity", "times"), [(None, 0), ("warning", 1)])
def test_console_shows_what_libraries_say_at_most_once(verbosity, times):
    code = (
        "from src.console import quiet_libraries; import logging; quiet_libraries()\n"
        "import datasets, huggingface_hub\n"
        "logging.getLogger('huggingface_hub.utils._http').warning('Retrying in 1s [Retry 1/5].')\n"
        "logging.getLogger('datasets.utils.file_utils').warning('Retrying in 5sec [1/20]')\n"
        "from hivemind.utils.logging import get_logger; get_logger('hivemind.p2p').info('[Checking')\n"
    )
    kept = [name for name in os.environ if not name.endswith("VERBOSITY") and name != "HIVEMIND_LOGLEVEL"]
    environment = {name: os.environ[name] for name in kept}
    environment |= {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    if verbosity is not None:
        environment |= {"DATASETS_VERBOSITY": verbosity, "HF_HUB_VERBOSITY": verbosity, "HIVEMIND_LOGLEVEL": "INFO"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert [done.stderr.count(f"[{kind}") for kind in ("Retry 1/5", "1/20", "Checking")] == [times] * 3
