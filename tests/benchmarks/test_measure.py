"""What the benchmarks' own tools promise: turns, verdicts, results that are whole, nothing left running."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from benchmarks import run_all
from benchmarks.measure import Row, Timing, interleave, ratio, report

END_A_TREE = """
import subprocess, sys
from benchmarks.run_all import end
from src.process.supervisor import adopt_orphans, children_of
import os
adopt_orphans()
process = subprocess.Popen(["bash", "-c", "trap '' TERM; sleep 100 & sleep 100"], start_new_session=True)
import time, benchmarks.run_all as run_all
run_all.GRACE_SECONDS = 0.2
time.sleep(0.3)
end(process)
print(children_of(os.getpid()))
"""


def test_interleave_takes_turns_and_does_not_count_the_warm_up():
    calls, clock = [], iter(range(100))
    timings = interleave(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, clock=lambda: next(clock)
    )
    assert calls == ["a", "b"] * 3
    assert timings["a"].samples == timings["b"].samples == (1, 1)


def test_interleave_makes_fewer_rounds_where_they_take_long_but_at_least_one(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("benchmarks.measure.time", SimpleNamespace(monotonic=lambda: now[0]))
    for seconds, rounds in ((0.0, 1), (39.0, 2), (60.0, 4)):  # a round takes 10, one of them is the warm-up
        run = lambda: now.append(now.pop() + 10)  # noqa: E731
        timings = interleave({"a": run}, rounds=4, seconds=seconds, clock=lambda: now[0])
        assert timings["a"].samples == (10,) * rounds, seconds


def test_ratio_is_the_median_of_the_rounds():
    assert ratio(Timing((1.0, 2.0, 30.0)), Timing((2.0, 4.0, 10.0))) == 0.5


@pytest.mark.parametrize(
    "value, relative, target, met, missed_by",
    [(5.0, 0.9, "<= 0.9", True, 0), (5.0, 1.2, "<= 1", False, 0.2), (2.0, None, ">= 4", False, 0.5)],
)
def test_row_is_judged_by_its_ratio_or_else_by_its_value(value, relative, target, met, missed_by):
    row = Row("claim", "case", "ours", value, "s", ratio=relative, target=target)
    assert row.met is met and row.missed_by == pytest.approx(missed_by)


def test_row_refuses_a_target_it_cannot_read():
    with pytest.raises(ValueError, match="'about 3'"):
        Row("claim", "case", "ours", 1.0, "s", target="about 3")


def test_results_name_what_failed_what_is_missing_and_what_missed(tmp_path):
    rows = [
        Row("speed", "small", "ours", 1.0, "s", 0.5, "<= 0.25", peer="theirs"),
        Row("speed", "small", "theirs", 2.0, "s"),
    ]
    report("lamb_step", "A title", rows, ["a note"], tmp_path / "results")
    assert not list((tmp_path / "results").glob("*.new"))
    run_all.write_results(tmp_path, run_all.read_results(tmp_path / "results"), {"encoder": "ended with code 1"})
    text = (tmp_path / "RESULTS.md").read_text()
    assert "**no result from `encoder`**: ended with code 1" in text and "`start_up`**: not run yet" in text
    assert "0 of 1 targets are met." in text and "**missed by 100%**" in text and "theirs: 2 s" in text
    assert "- speed, small, ours: missed by 100%; 8-bit LAMB step\n" in text
    assert (tmp_path / "bench_time.png").exists() and json.loads((tmp_path / "results" / "lamb_step.json").read_text())


def test_notes_have_a_section_for_each_script_with_targets():
    notes = (run_all.HERE / "NOTES.md").read_text(encoding="utf-8")
    assert all(f"\n## {section}" in notes for section in run_all.SECTIONS.values())


def test_script_is_not_started_when_it_is_missing_or_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setitem(run_all.LIMITS, "nothing", 60)
    assert "no such script" in run_all.run_script("nothing", tmp_path, quick=True, deadline=time.monotonic() + 99)
    assert "not run" in run_all.run_script("lamb_step", tmp_path, quick=True, deadline=time.monotonic() + 5)


def test_end_kills_a_script_that_ignores_signals_and_what_it_started():
    done = subprocess.run([sys.executable, "-c", END_A_TREE], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
