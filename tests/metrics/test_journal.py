"""A run's records survive crashes as valid JSON lines, and two peers on one machine never share a folder."""

import errno
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import wandb

from src.metrics.journal import (
    Journal,
    append_record,
    claim_run_directory,
    num_starts,
    read_journal,
    report_refusals,
)
from src.metrics.records import Phase, printable

IN_REPOSITORY = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


def test_journal_writes_one_complete_line_a_record_at_once(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    journal = Journal(path)
    journal.write("epoch", epoch=1, loss=2.5)
    assert path.read_text().endswith("}\n"), "on disk before the next record and before close()"
    journal.write("note", text="потери\u2028и строка\nещё")
    first, second = (json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1])
    assert (first["event"], first["epoch"], first["loss"]) == ("epoch", 1, 2.5)
    assert second["text"] == "потери\u2028и строка\nещё"
    assert abs(first["time"] - os.stat(path).st_mtime) < 60
    assert read_journal(path) == [first, second]


def test_journal_turns_numbers_that_are_not_finite_into_null(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    nested = {"rounds": [1, math.nan], "arguments": {"rate": math.inf}}
    record = journal.write("epoch", loss=math.nan, high=math.inf, low=-math.inf, fine=0.0, name="nan", **nested)
    assert (record["loss"], record["high"], record["low"], record["fine"]) == (None, None, None, 0.0)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == record


def test_journal_adds_to_the_file_of_an_earlier_run(tmp_path):
    for number in (1, 2):
        journal = Journal(tmp_path / "metrics.jsonl")
        journal.write("epoch", epoch=number)
        journal.close()
    assert [record["epoch"] for record in read_journal(tmp_path / "metrics.jsonl")] == [1, 2]


def test_starts_of_a_peer_are_counted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert num_starts(path) == 0
    for number in range(1, 4):
        journal = Journal(path)
        journal.write("start", role="trainer")
        journal.write("round", error='says "event": "start"')
        journal.close()
        assert num_starts(path) == number


@pytest.mark.parametrize("torn", [b'{"event": "epoch", "epo', '{"text": "поте'.encode()[:-1], b"{"])
def test_journal_loses_only_the_line_that_a_crash_cut_off(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"epoch": 1}\n' + torn)
    assert read_journal(path) == [{"epoch": 1}]
    Journal(path).write("epoch", epoch=2)
    assert [record["epoch"] for record in read_journal(path)] == [1, 2]


def test_records_of_another_process_never_mix_with_those_of_the_journal(tmp_path):
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path)
    other = subprocess.Popen(
        [sys.executable, "-c", APPEND, str(path)], env=IN_REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "begun\n"
    for number in range(500):
        journal.write("own", number=number, text="ж" * 100)
    assert other.wait(30) == 0
    records = read_journal(path)
    assert path.read_text().count("\n") == len(records) == 1000
    assert [record["number"] for record in records if record["event"] == "own"] == list(range(500))
    assert [int(record["peer"]) for record in records if record["event"] == "refusal"] == list(range(500))


def test_record_that_cannot_be_appended_is_lost_without_an_error(tmp_path):
    append_record(tmp_path / "absent" / "metrics.jsonl", Phase("gradients"))
    assert not (tmp_path / "absent").exists()


APPEND = """
import sys
from pathlib import Path
from src.metrics.journal import append_record
from src.metrics.records import Refusal
for number in range(500):
    append_record(Path(sys.argv[1]), Refusal(peer=str(number), reason="ш" * 100))
    if number == 0:
        print("begun", flush=True)
"""

FILL = """
import logging, resource, sys
from pathlib import Path
from src.metrics.journal import Journal
logging.basicConfig(format="%(message)s")
journal = Journal(Path(sys.argv[1]))
journal.write("first")
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
for number in range(5):
    journal.write("lost", number=number, text="x" * 30)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
journal.write("last")
journal.close()
"""


def test_full_disk_costs_records_but_not_the_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run([sys.executable, "-c", FILL, str(path)], env=IN_REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("lacks records from now on") == 1
    events = [record["event"] for record in read_journal(path)]
    assert events[0] == "first" and events[-1] == "last" and events.count("lost") < 2


# -- folders ----------------------------------------------------------------------------------------------------------

CLAIM = """
import os, sys, time
from src.metrics.journal import claim_run_directory
claim_run_directory(sys.argv[1], "run", "trainer")
daemon = os.fork()  # outlives the program, as hivemind's do
if daemon == 0:
    time.sleep(60)
print(daemon, flush=True)
os._exit(0)
"""


def test_journal_folder_is_named_after_run_and_role_and_numbered(tmp_path):
    folders = [claim_run_directory(str(tmp_path), "run", role) for role in ("trainer", "trainer", "aux", "trainer")]
    assert folders == [tmp_path / "run" / name for name in ("trainer", "trainer-2", "aux", "trainer-3")]
    assert claim_run_directory(str(tmp_path), "other", "trainer") == tmp_path / "other" / "trainer"


def test_journal_folder_without_locks_is_claimed_with_a_notice(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert claim_run_directory(str(tmp_path), "run", "trainer") == tmp_path / "run" / "trainer"
    assert f"{tmp_path / 'run' / 'trainer'} cannot be locked (Function not implemented)" in caplog.text


def test_journal_folder_is_free_again_when_the_program_and_its_children_have_ended(tmp_path):
    def claimed():
        return claim_run_directory(str(tmp_path), "run", "trainer").name

    with subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(tmp_path)], env=IN_REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as program:
        daemon = int(program.stdout.readline())
        try:
            assert program.wait(20) == 0
            assert claimed() == "trainer-2", "its child still lives"
        finally:
            os.kill(daemon, signal.SIGKILL)
    give_up_at = time.monotonic() + 10
    while claimed() != "trainer":
        assert time.monotonic() < give_up_at
        time.sleep(0.05)


# -- Weights & Biases -------------------------------------------------------------------------------------------------


class FakeRun:
    def __init__(self):
        self.logged, self.finished = [], False

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished = True


def test_journal_gives_wandb_the_numbers_of_each_record(tmp_path, monkeypatch):
    run, options = FakeRun(), {}
    monkeypatch.setattr(wandb, "init", lambda **given: options.update(given) or run)
    journal = Journal(tmp_path / "metrics.jsonl", wandb_project="project", run_name="name")
    journal.write("round", epoch=3, kind="gradients", seconds=0.5, complete=True)
    journal.close()
    assert (options["project"], options["name"]) == ("project", "name")
    assert run.logged == [{"epoch": 3, "round/seconds": 0.5, "round/complete": True}]
    assert run.finished


def test_journal_does_not_start_wandb_unasked(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb, "init", lambda **given: pytest.fail("wandb was started"))
    Journal(tmp_path / "metrics.jsonl").write("epoch", epoch=1)


def test_journal_explains_in_one_line_why_wandb_does_not_start(tmp_path, monkeypatch):
    def refuse(**given):
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(
        ValueError, match=r"--wandb_project project: No API key configured.*WANDB_MODE=offline"
    ) as caught:
        Journal(tmp_path / "metrics.jsonl", wandb_project="project")
    assert "\n" not in str(caught.value)


def test_journal_writes_the_same_figures_for_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    journal = Journal(tmp_path / "metrics.jsonl", tensorboard_dir=str(tmp_path / "board"), run_name="name")
    for epoch in (1, 2):
        journal.write("swarm_epoch", epoch=epoch, loss=10.0 / epoch, note="text")
        journal.write("peer", epoch=epoch, peer="3fa9c1d2", samples=8 * epoch)
    journal.close()
    board = EventAccumulator(str(tmp_path / "board" / "name")).Reload()
    assert set(board.Tags()["scalars"]) == {"swarm_epoch/loss", "peer/3fa9c1d2/samples"}
    assert [(event.step, event.value) for event in board.Scalars("swarm_epoch/loss")] == [(1, 10.0), (2, 5.0)]
    assert [event.value for event in board.Scalars("peer/3fa9c1d2/samples")] == [8.0, 16.0]
    assert len(read_journal(tmp_path / "metrics.jsonl")) == 4


def test_journal_says_which_package_tensorboard_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"^--tensorboard_dir needs a package: pip install tensorboard==[\d.]+$"):
        Journal(tmp_path / "metrics.jsonl", tensorboard_dir=str(tmp_path / "board"))


def test_journal_tells_listeners_what_it_writes_from_several_threads(tmp_path):
    journal, heard = Journal(tmp_path / "metrics.jsonl"), []

    def slow_listener(record):
        time.sleep(0.001 * (len(heard) % 3))
        heard.append(record)

    journal.listeners.append(slow_listener)

    def write(thread):
        for number in range(25):
            journal.write("note", thread=thread, number=number)

    threads = [threading.Thread(target=write, args=[thread]) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_journal(tmp_path / "metrics.jsonl") == heard
    assert len(heard) == 100


OFFLINE = """
import sys
from pathlib import Path
from src.metrics.journal import Journal
journal = Journal(Path(sys.argv[1]) / "metrics.jsonl", wandb_project="project", run_name="offline-run")
for epoch in (1, 2):
    journal.write("epoch", epoch=epoch, loss=1234.5)
journal.close()
"""


def test_journal_wandb_works_offline(tmp_path):
    # wandb starts a service of its own and remembers it in the environment: keep that out of the test's process
    folders = dict.fromkeys(["WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "HOME"], str(tmp_path))
    environment = {**IN_REPOSITORY, **folders, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    command = [sys.executable, "-c", OFFLINE, str(tmp_path)]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    (recorded,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = recorded.read_bytes()
    assert content.count(b"loss") >= 2
    assert b"offline-run" in content
    assert len(read_journal(tmp_path / "metrics.jsonl")) == 2


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb\nc", "a [31mb c"),
        ("\u202eevil", "evil"),
        ("слово", "слово"),
        (None, "None"),
        ("x" * 99, "x" * 39 + "…"),
    ],
)
def test_printable_text_cannot_steer_a_terminal(text, shown):
    assert printable(text, 40) == shown


def test_refusals_are_recorded_and_said_in_short_printable_lines(tmp_path):
    journal, said = Journal(tmp_path / "metrics.jsonl"), []
    report_refusals([("peer\x1b[2J" * 1000, "it claims\n\u202e" + "x" * 10**6)], journal, said.append)
    (record,) = read_journal(tmp_path / "metrics.jsonl")
    for text in (record["peer"], record["reason"], *said):
        assert text.isprintable() and len(text) < 500
