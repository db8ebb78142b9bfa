"""What memory a peer's processes use is written down at the end of epochs, and said once when one of them grows."""

import os
from types import SimpleNamespace

import pytest

from src.metrics.journal import Journal, read_journal
from src.metrics.records import MemoryUse, read_record
from src.process import watchdog
from src.swarm import averagers, memory_watch
from src.swarm.averagers import LeanGradientAverager, LeanStateAverager
from src.swarm.dht import WatchedDHT
from src.swarm.memory_watch import FIELDS, MAIN, MemoryWatch

GRADIENTS = averagers.AVERAGING_PROCESS.format(kind="gradients")


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """A watch for which a minute passes between two epochs, and that finds what ``sizes`` holds."""
    clock, said, sizes, measure = [0.0], [], {MAIN: 3000.0, GRADIENTS: 400.0}, ["PSS"]
    monkeypatch.setattr(memory_watch, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    path = tmp_path / "metrics.jsonl"
    it = MemoryWatch(Journal(path), say=said.append, measure=lambda processes: (measure[0], dict(sizes)))

    def note(epoch, *, seconds=60.0):
        clock[0] += seconds
        it.note(epoch)

    def found():
        return [record for _, record in map(read_record, read_journal(path))]

    return SimpleNamespace(note=note, said=said, sizes=sizes, measure=measure, found=found, path=path)


def test_each_process_is_written_down_but_not_too_often(watch):
    for epoch in range(1, 7):
        watch.note(epoch, seconds=10.0)
    assert watch.found() == [
        MemoryUse(1, "PSS", main=3000.0, gradients=400.0), MemoryUse(4, "PSS", main=3000.0, gradients=400.0)
    ]  # fmt: skip


def test_growth_is_said_once_for_each_process(watch):
    for epoch in range(100, 121):  # it has settled at 120
        watch.sizes[MAIN] = 100.0 if epoch < 120 else 3000.0
        watch.note(epoch)
    for main, gradients in ((3500.0, 1300.0), (4499.0, 1399.0), (4501.0, 1401.0), (9000.0, 9000.0)):
        epoch += 1
        watch.sizes.update({MAIN: main, GRADIENTS: gradients})
        watch.note(epoch)
        assert len(watch.said) == (0 if main < 4500 else 2)
    assert watch.said[0].startswith("the main process takes 4.5 GB of memory, 3 GB when it had settled: it grows.")
    assert (
        watch.said[1].startswith("the process that averages gradients takes 1.4 GB")
        and str(watch.path) in watch.said[1]
    )


def test_another_measure_is_named(watch):
    watch.measure[0] = "RSS"
    watch.note(1)
    watch.note(2)
    assert [record.measure for record in watch.found()] == ["RSS", "RSS"]
    (line,) = watch.said
    assert line.endswith("is written down as RSS")


def test_every_process_that_the_watchdog_watches_has_a_name_here(monkeypatch, tmp_path):
    names = [WatchedDHT.WHAT, watchdog.DAEMON]
    names += [
        kind._what(SimpleNamespace(round_kind=kind.round_kind)) for kind in (LeanGradientAverager, LeanStateAverager)
    ]
    assert set(FIELDS) == {MAIN, *names}
    monkeypatch.setattr(watchdog, "_watched", {name: (os.getpid(), None) for name in names} | {"none": (0, None)})
    MemoryWatch(Journal(tmp_path / "metrics.jsonl"), say=print).note(1)
    ((_, record),) = map(read_record, read_journal(tmp_path / "metrics.jsonl"))
    figures = {record.main, record.dht, record.p2pd, record.gradients, record.parameters}
    assert record.measure == "PSS" and min(figures) > 10
