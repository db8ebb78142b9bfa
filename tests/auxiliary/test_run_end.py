"""At the end of a run the auxiliary peer scores and uploads the last model and says where it is."""

import io
import shlex
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune_mlm import parse_arguments
from src.auxiliary.run_end import RunEnd
from src.metrics.console import Progress
from src.metrics.report import Reporter
from tests.auxiliary.test_auxiliary import SCORES, FakeHub, make_evaluator, make_store, make_uploader
from tests.reference.clock import Clock


def make_end(folder, *, store=None, evaluator=None, uploader=None):
    """The end of a run of 7 epochs, in which all that it is made of speaks to one person."""
    progress, stop = Progress(io.StringIO()), threading.Event()
    (folder / "metrics.jsonl").write_text('{"event": "start", "time": 1.0, "run_id": "run", "total_steps": 7}\n')
    for part in (evaluator, uploader):
        if part is not None:
            part.store, part.progress, part.stop = store, progress, stop
            part.start()
    reporter = Reporter(folder / "metrics.jsonl", folder / "report.html", interval=60.0, progress=progress, stop=stop)
    return RunEnd("run", 7, store=store, evaluator=evaluator, uploader=uploader, reporter=reporter,
                  progress=progress, stop=stop)  # fmt: skip


@pytest.fixture
def store(tmp_path):
    store = make_store(tmp_path)
    store.update(timeout=60.0)  # epoch 7
    return store


def finish(end) -> list[str]:
    """All that was said until the run was complete."""
    try:
        end.complete()
        return end.progress.stream.getvalue().splitlines()
    finally:
        end.stop.set()


def test_end_scores_uploads_and_reports_before_three_lines_on_the_model(tmp_path, store):
    hub = FakeHub()
    lines = finish(make_end(tmp_path, store=store, evaluator=make_evaluator(tmp_path, lambda folder: SCORES),
                            uploader=make_uploader(tmp_path, hub, interval=43_200.0)))  # fmt: skip
    assert sorted(lines[:2]) == [
        "epoch 7 on held-out text: masked-token loss 4.500, accuracy 25.0%; sentence-order accuracy 50.0%",
        "uploaded epoch 7 to org/name",
    ]
    complete, where, how = lines[2:]
    assert complete.startswith("run run is complete") and "Ctrl+C" in complete
    assert where == f"its model is in {store.path} and uploaded to org/name"
    assert how.startswith("evaluate it with  python finetune_mlm.py ")
    assert (tmp_path / "report.html").exists()


def test_end_names_a_command_that_the_program_understands(tmp_path, store):
    how = finish(make_end(tmp_path, store=store))[-1]
    program, *flags = shlex.split(how.partition("python ")[2])
    assert program == "finetune_mlm.py"
    assert Path(parse_arguments(flags).checkpoint) == store.path


def test_end_does_not_wait_for_ever_for_an_upload_that_fails(tmp_path, store):
    uploader = make_uploader(tmp_path, FakeHub(failures=10), interval=43_200.0)
    failed, _, where, _ = finish(make_end(tmp_path, store=store, uploader=uploader))
    assert failed == "upload to org/name failed, will try again: the hub is away"
    assert where == f"its model is in {store.path}; not uploaded to org/name yet: tried again every 60 s"


def test_end_that_is_stopped_says_nothing_of_a_complete_run(tmp_path, store):
    goes_on, end = threading.Event(), None

    def evaluate(folder):
        end.stop.set()
        goes_on.wait(20.0)
        return SCORES

    evaluator = make_evaluator(tmp_path, evaluate)
    end = make_end(tmp_path, store=store)
    end.evaluator = evaluator
    evaluator.store, evaluator.progress, evaluator.stop = store, end.progress, end.stop
    evaluator.start()
    try:
        assert finish(end) == []
    finally:
        goes_on.set()
        evaluator.join(10.0)


def test_end_for_a_peer_that_stores_nothing_is_one_line_and_a_report(tmp_path):
    (line,) = finish(make_end(tmp_path))
    assert line.startswith("run run is complete")
    assert (tmp_path / "report.html").exists()


def test_end_waits_for_an_upload_after_a_stop_and_names_what_is_missing(tmp_path, store, monkeypatch):
    hub, goes_on = FakeHub(), threading.Event()
    uploader = make_uploader(tmp_path, hub, interval=43_200.0)
    hub.upload_folder = lambda **kwargs: goes_on.wait(30.0)
    end = make_end(tmp_path, store=store, uploader=uploader)
    end.stop.set()
    clock = Clock()
    monkeypatch.setattr("src.auxiliary.run_end.time", clock)
    hung = SimpleNamespace(join=clock.advance)
    try:
        end.wait_for([hung, hung], seconds=0.5)
        assert clock.now == 1000.5, "for all of them together"
        assert "no time left: epoch 7 is not uploaded" in end.progress.stream.getvalue()
    finally:
        goes_on.set()
    end.wait_for([uploader], seconds=10.0)
    assert end.progress.stream.getvalue().splitlines()[-1] == "uploaded epoch 7 to org/name"
