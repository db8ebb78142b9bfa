"""The auxiliary peer sums up what trainers report, writes a row for each of them, and scores what it stores."""

import io
import threading
import time
from types import SimpleNamespace

import pytest

from src.auxiliary import monitor as monitor_module
from src.auxiliary.monitor import MetricsMonitor, Watch, describe
from src.metrics.console import Progress
from src.metrics.journal import Journal, read_journal
from src.metrics.records import SwarmEpoch
from src.swarm.dht import TrainerMetrics, short_peer_name, store_metrics
from tests.auxiliary.test_auxiliary import make_store, wait_until
from tests.reference.fake_swarm import FakeDHT

PRESENT = TrainerMetrics(epoch=0)


def report(epoch: int, **values) -> TrainerMetrics:
    return TrainerMetrics(epoch=epoch, **{"loss": 10.0, "mini_steps": 2, "samples": 8, **values})


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_monitor_sums_up_an_epoch_by_forward_passes():
    summary = MetricsMonitor().summarise({
        b"a": TrainerMetrics(epoch=3, loss=12.0, mlm_loss=10.0, sop_loss=2.0, mini_steps=4, samples=40,
                             samples_per_second=2.5, failed_rounds=1),
        b"b": TrainerMetrics(epoch=3, loss=8.0, mlm_loss=7.0, sop_loss=1.0, mini_steps=1, samples=10,
                             samples_per_second=0.5),
    })  # fmt: skip
    assert summary == SwarmEpoch(epoch=3, loss=20 / 5, mlm_loss=17 / 5, sop_loss=3 / 5, samples=50,
                                   samples_per_second=3.0, alive_peers=2, failed_rounds=1)  # fmt: skip
    assert describe(summary) == (
        "epoch 3  loss 4.000 (words 3.400, order 0.600)  2 trainers, 50 samples, 3.0/s, "
        "1 round of averaging not complete"
    )


def test_monitor_has_nothing_to_say_without_reports_or_twice_for_an_epoch():
    monitor = MetricsMonitor()
    assert monitor.summarise({}) is None
    assert monitor.summarise({b"a": PRESENT}) is None, "a trainer that is only there"
    assert monitor.summarise({b"a": report(1)}).epoch == 1
    assert monitor.summarise({b"a": report(1)}) is None


def test_monitor_waits_one_look_for_a_late_report():
    monitor = MetricsMonitor()
    assert monitor.summarise({b"a": report(2), b"b": report(1)}) is None
    summary = monitor.summarise({b"a": report(2), b"b": report(2)})
    assert (summary.epoch, summary.alive_peers, summary.samples) == (2, 2, 16)


@pytest.mark.parametrize("other", [PRESENT, report(1)], ids=["only present", "gone"])
def test_monitor_does_not_wait_for_a_trainer_that_never_reports(other):
    monitor = MetricsMonitor()
    assert monitor.summarise({b"a": report(2), b"b": other}) is None
    summary = monitor.summarise({b"a": report(2), b"b": other})
    assert (summary.epoch, summary.alive_peers, summary.loss) == (2, 1, 5.0)


def test_monitor_is_not_silenced_by_a_trainer_that_is_gone_when_epochs_are_shorter_than_looks():
    monitor, epochs = MetricsMonitor(), []
    for epoch in range(2, 12):
        summary = monitor.summarise({b"a": report(epoch), b"gone": report(1)})
        epochs.append(summary and summary.epoch)
    assert epochs == [None, 3, None, 5, None, 7, None, 9, None, 11]


def test_monitor_of_trainers_that_computed_nothing_gives_finite_numbers():
    summary = MetricsMonitor().summarise({b"a": TrainerMetrics(epoch=1)})
    assert (summary.loss, summary.samples) == (0.0, 0)


def test_monitor_gives_each_report_of_a_trainer_once():
    monitor = MetricsMonitor()
    assert monitor.new_reports({b"a": report(1)}) == [(short_peer_name(b"a"), report(1))]
    assert monitor.new_reports({b"a": report(1)}) == []
    assert monitor.new_reports({b"a": report(1), b"b": report(1)}) == [(short_peer_name(b"b"), report(1))]
    assert [record.epoch for _, record in monitor.new_reports({b"a": report(2)})] == [2]


# -- the watch --------------------------------------------------------------------------------------------------------


class Looks:
    """A stop event that is set after so many waits; before each, the next action is carried out."""

    def __init__(self, *actions):
        self.actions, self.waits, self.ended = list(actions), [], False

    def is_set(self):
        return self.ended

    def wait(self, seconds):
        self.waits.append(seconds)
        if not self.actions:
            self.ended = True
            return True
        self.actions.pop(0)()
        return False


class Swarm:
    """A swarm whose one trainer reports what the test says, and the auxiliary peer's `Watch` of it."""

    def __init__(self, folder, *, every_epochs=2, total_steps=100, stores=True):
        self.dht, self.path = FakeDHT(), folder / "metrics.jsonl"
        self.store = make_store(folder, every_epochs=every_epochs)
        self.optimizer, self.averager = self.store.optimizer, self.store.optimizer.state_averager
        self.averager.epoch_of_peers = None
        self.optimizer.tracker.global_epoch = 0
        self.progress = Progress(io.StringIO())
        self.watch = Watch(
            SimpleNamespace(dht=self.dht, optimizer=self.optimizer), "run", total_steps=total_steps,
            journal=Journal(self.path), store=self.store if stores else None, progress=self.progress, stop=None,
        )  # fmt: skip
        self.completed = []

    def report(self, epoch, *, shared=None, owner=b"a", **values):
        """An action: the trainer reports an epoch, and shares the state of ``shared``."""

        def act():
            store_metrics(self.dht, "run", owner, report(epoch, **values), expiration=60.0)
            self.averager.epoch_of_peers = shared

        return act

    def look(self, *actions, monkeypatch) -> None:
        """One look after each action, and then the end."""
        self.watch.stop = Looks(*actions)
        monkeypatch.setattr(monitor_module, "time", SimpleNamespace(monotonic=lambda: len(self.watch.stop.waits)))
        self.watch.run(period=0.5, when_over=lambda: self.completed.append(self.store.last_epoch))

    def records(self, event):
        return [record for record in read_journal(self.path) if record["event"] == event]

    def lines(self):
        return [line for line in self.progress.stream.getvalue().splitlines() if not line.startswith("epoch")]


def nothing():
    pass


def test_watch_writes_summaries_and_retries_checkpoints(tmp_path, monkeypatch):
    swarm = Swarm(tmp_path)
    trouble = {"failed_rounds": 1, "failure": "averaging failed:\n\x1b evil [31m text"}
    swarm.optimizer.refusals = [("12D3", "it claims epoch 1000; at most 3 is possible")]
    swarm.look(
        nothing,
        *(swarm.report(epoch, shared=shared, mlm_loss=9.0, sop_loss=1.0, **trouble)
          for epoch, shared in ((1, None), (2, None), (2, 2), (3, 3), (4, 4))),
        monkeypatch=monkeypatch,
    )  # fmt: skip
    summaries = swarm.records("swarm_epoch")
    assert [(record["epoch"], record["loss"]) for record in summaries] == [(epoch, 5.0) for epoch in (1, 2, 3, 4)]
    assert [record["epoch"] for record in swarm.records("checkpoint")] == [2, 4]
    assert [record["epoch"] for record in swarm.records("memory")] == [1], "not again within 30 s"
    rows = swarm.records("peer")
    assert [record["epoch"] for record in rows] == [1, 2, 3, 4], "one row for each report of a trainer"
    assert {record["peer"] for record in rows} == {short_peer_name(b"a")}
    assert rows[0]["failure"] == "averaging failed: evil [31m text"
    assert [(r["peer"], r["reason"]) for r in swarm.records("refusal")] == [
        ("12D3", "it claims epoch 1000; at most 3 is possible")
    ]
    assert swarm.lines() == [
        "ignored what peer 12D3 sent: it claims epoch 1000; at most 3 is possible",
        "no checkpoint stored, will try again: no trainer shares its state yet",
        f"stored the state of epoch 2 in {swarm.store.path}",
        f"stored the state of epoch 4 in {swarm.store.path}",
    ]
    assert swarm.completed == []


def test_watch_names_the_same_trouble_once_until_it_is_over(tmp_path, monkeypatch):
    swarm = Swarm(tmp_path)
    swarm.look(*(swarm.report(epoch) for epoch in (2, 3, 4)), swarm.report(5, shared=5),
               *(swarm.report(epoch) for epoch in (7, 8)), monkeypatch=monkeypatch)  # fmt: skip
    trouble = "no checkpoint stored, will try again: no trainer shares its state yet"
    assert swarm.lines() == [trouble, f"stored the state of epoch 5 in {swarm.store.path}", trouble]


# -- the end of the run -----------------------------------------------------------------------------------------------


def test_watch_stores_the_last_state_whatever_the_interval_and_completes_the_run_once(tmp_path, monkeypatch):
    swarm = Swarm(tmp_path, every_epochs=20, total_steps=6)
    swarm.look(swarm.report(5, shared=5), swarm.report(6, shared=6), nothing, nothing, nothing, monkeypatch=monkeypatch)
    assert [record["epoch"] for record in swarm.records("checkpoint")] == [6]
    assert swarm.completed == [6]


def test_watch_tries_again_until_it_has_the_last_state(tmp_path, monkeypatch):
    """A trainer may still be at work on its last step, and hand over the epoch before."""
    swarm = Swarm(tmp_path, every_epochs=20, total_steps=6)
    swarm.look(swarm.report(6), swarm.report(6, shared=5), swarm.report(6, shared=6), nothing, monkeypatch=monkeypatch)
    assert swarm.lines() == [
        "no checkpoint stored, will try again: no trainer shares its state yet",
        f"stored the state of epoch 5 in {swarm.store.path}",
        f"stored the state of epoch 6 in {swarm.store.path}",
    ]
    assert swarm.completed == [6]
    assert swarm.watch.stop.waits[1:3] == [1.0, 2.0]


@pytest.mark.parametrize(("present", "stored"), [({b"a": True}, [1, 6]), ({b"a": True, b"b": False}, [])])
def test_watch_takes_the_state_of_clients_for_whoever_joins(tmp_path, monkeypatch, present, stored):
    """Where all trainers are clients: at once, and every five epochs, whatever the interval of checkpoints."""
    swarm = Swarm(tmp_path, every_epochs=20)
    swarm.optimizer.tracker.present = present
    swarm.look(*(swarm.report(epoch, shared=epoch) for epoch in range(1, 8)), monkeypatch=monkeypatch)
    assert [record["epoch"] for record in swarm.records("checkpoint")] == swarm.optimizer.kept == stored


def test_watch_notices_the_end_before_its_next_look_is_due(tmp_path):
    swarm = Swarm(tmp_path, every_epochs=20, total_steps=6)
    swarm.watch.stop, swarm.averager.epoch_of_peers = threading.Event(), 6
    watching = threading.Thread(
        target=swarm.watch.run,
        kwargs={"period": 3600.0, "when_over": lambda: swarm.completed.append(swarm.store.last_epoch)},
        daemon=True,
    )
    watching.start()
    time.sleep(0.7)
    assert swarm.completed == []
    swarm.report(6, shared=6)()
    swarm.optimizer.tracker.global_epoch = 6
    wait_until(lambda: swarm.completed == [6], timeout=5.0)
    swarm.watch.stop.set()
    watching.join(5.0)
    assert not watching.is_alive()
    assert [record["epoch"] for record in swarm.records("swarm_epoch")] == [6], "looked at once more for the end"


def test_watch_says_what_to_do_when_the_trainers_left_with_the_last_state(tmp_path, monkeypatch):
    swarm = Swarm(tmp_path, every_epochs=20, total_steps=6)
    swarm.optimizer.tracker.global_progress.num_peers = 0
    swarm.look(swarm.report(6), nothing, nothing, swarm.report(6, shared=6), nothing, monkeypatch=monkeypatch)
    assert len(swarm.lines()) == 3 and swarm.completed == [6]
    assert "start one of them again with the same flags, and it hands it over" in swarm.lines()[1]


def test_watch_goes_on_when_the_end_was_only_claimed(tmp_path, monkeypatch):
    swarm = Swarm(tmp_path, every_epochs=20, total_steps=60)
    tracker = swarm.optimizer.tracker

    def claim(epoch):
        return lambda: setattr(tracker, "global_epoch", epoch)

    swarm.look(
        claim(60), claim(3), swarm.report(12, shared=12), swarm.report(20, shared=20), nothing, monkeypatch=monkeypatch
    )
    assert [record["epoch"] for record in swarm.records("checkpoint")] == [20], "when they are due, as before"
    assert swarm.completed == []


def test_watch_after_a_restart_at_the_end_completes_the_run_without_a_trainer(tmp_path, monkeypatch):
    make_store(tmp_path).update(timeout=60.0)  # epoch 7
    swarm = Swarm(tmp_path, total_steps=7)
    swarm.look(*[nothing] * 5, monkeypatch=monkeypatch)
    assert swarm.completed == [7]
    assert swarm.lines() == []


def test_watch_of_a_peer_that_stores_nothing_completes_the_run_too(tmp_path, monkeypatch):
    swarm = Swarm(tmp_path, total_steps=6, stores=False)
    swarm.look(swarm.report(5), swarm.report(6), nothing, nothing, monkeypatch=monkeypatch)
    assert swarm.completed == [0]


def test_watch_that_is_stopped_while_the_last_state_is_missing_ends_without_a_word(tmp_path, monkeypatch):
    swarm = Swarm(tmp_path, total_steps=6)
    swarm.averager.load_state_from_peers = lambda timeout: setattr(swarm.watch.stop, "ended", True)
    swarm.look(swarm.report(6), nothing, nothing, monkeypatch=monkeypatch)
    assert swarm.lines() == [] and swarm.completed == []


# -- a run that went back ---------------------------------------------------------------------------------------------


def test_watch_says_once_that_a_checkpoint_newer_than_the_run_is_kept(tmp_path, monkeypatch):
    make_store(tmp_path).update(timeout=60.0)  # epoch 7
    swarm = Swarm(tmp_path, every_epochs=1)
    swarm.look(*(swarm.report(epoch, shared=epoch) for epoch in (2, 3, 4, 5)), monkeypatch=monkeypatch)
    (line,) = swarm.lines()
    assert line.startswith("the trainers are at epoch 3, older than the checkpoint of epoch 7 in ")
    assert "--local_path" in line
    assert swarm.store.last_epoch == 7 and swarm.records("checkpoint") == []
    swarm.look(*(swarm.report(epoch, shared=epoch) for epoch in (7, 8)), monkeypatch=monkeypatch)
    assert [record["epoch"] for record in swarm.records("checkpoint")] == [8]


def test_watch_takes_no_trainer_that_is_gone_or_late_for_a_run_that_went_back(tmp_path, monkeypatch):
    make_store(tmp_path).update(timeout=60.0)  # epoch 7
    swarm = Swarm(tmp_path, every_epochs=5)
    swarm.look(swarm.report(3, owner=b"gone"), swarm.report(6, owner=b"late"), swarm.report(7),
               swarm.report(5, owner=b"later"), swarm.report(8), monkeypatch=monkeypatch)  # fmt: skip
    assert swarm.lines() == []


def test_watch_says_that_an_older_state_was_not_stored(tmp_path, monkeypatch):
    make_store(tmp_path).update(timeout=60.0)  # epoch 7
    swarm = Swarm(tmp_path, every_epochs=1)
    swarm.look(swarm.report(8, shared=4), swarm.report(9, shared=4), monkeypatch=monkeypatch)
    (line,) = swarm.lines()
    assert line.startswith("a trainer sent the state of epoch 4, older than the checkpoint of epoch 7 in ")
    assert swarm.records("checkpoint") == []
