"""What the soak benchmark makes of its samples."""

import itertools
import json
import os
from types import SimpleNamespace

import pytest

from benchmarks import soak
from benchmarks.soak import anonymous_megabytes, growth, summarise, table, watch

HOURLY = {"aux: main": 4.0, "trainer-1: main": 0.0}


def summary_of(folder, *, minutes, hourly, spurt=0.0):
    """Of processes that grow by so many MB an hour, and by ``spurt`` MB in the first minutes."""
    journal = folder / "soak" / "trainer" / "metrics.jsonl"
    journal.parent.mkdir(parents=True)
    journal.write_text("".join(json.dumps({"event": "epoch", "epoch": n}) + "\n" for n in range(30)), encoding="utf-8")
    moments = [30.0 * number for number in range(round(2 * minutes))]
    memory = {
        name: [400 + rate * moment / 3600 + min(spurt, spurt * moment / 300) for moment in moments]
        for name, rate in hourly.items()
    }
    return summarise(moments, memory, folder, minutes=minutes)


def test_soak_fits_a_line_in_megabytes_an_hour():
    assert growth([0.0, 1800.0, 3600.0], [10.0, 12.0, 14.0]) == pytest.approx(4.0)


@pytest.mark.parametrize(("worst", "kept", "verdict"), [(4.0, True, "kept"), (6.0, False, "NOT kept")])
def test_soak_judges_the_worst_process_after_the_first_quarter(tmp_path, worst, kept, verdict):
    results = summary_of(tmp_path, minutes=120, hourly={**HOURLY, "trainer-2: gradients": worst}, spurt=100.0)
    assert results["kept"] is kept and results["worst_megabytes_an_hour"] == pytest.approx(worst)
    assert results["epochs_an_hour"] == 15 and results["fitted_minutes"] == 90
    assert table(results).endswith(f"No process grows by more than 5 MB an hour: {verdict}.")


def test_soak_that_was_too_short_says_so(tmp_path):
    results = summary_of(tmp_path, minutes=5, hourly={**HOURLY, "trainer-2: gradients": 60.0})
    assert results["kept"] is None and "not judged: " in table(results) and "run 120 or more" in table(results)


def test_soak_reads_the_memory_of_a_process():
    assert 20 < anonymous_megabytes(os.getpid()) < 20_000


def test_soak_overlooks_what_a_process_takes_for_a_moment(monkeypatch):
    readings = itertools.cycle([400.0, *[450.0] * (soak.READINGS - 1)])
    monkeypatch.setattr(soak, "processes_of", lambda peer: {peer: SimpleNamespace(pid=1)})
    monkeypatch.setattr(soak, "anonymous_megabytes", lambda pid: next(readings))
    moments, memory = watch(["aux"], seconds=0.2)
    assert len(moments) > 2 and memory == {"aux": [400.0] * len(moments)}
