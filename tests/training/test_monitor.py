"""The auxiliary peer sums up what trainers report, writes a row for each of them, and scores what it stores."""

import io
from types import SimpleNamespace

import pytest

from src.training.console import Progress
from src.training.dht import TrainerMetrics, short_peer_name, store_metrics
from src.training.journal import Journal, read_journal
from src.training.monitor import EpochSummary, MetricsMonitor, describe, watch
from tests.reference.fake_swarm import FakeDHT
from tests.training.test_auxiliary import make_store

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
    assert summary == EpochSummary(epoch=3, loss=20 / 5, mlm_loss=17 / 5, sop_loss=3 / 5, samples=50,
                                   samples_per_second=3.0, alive_peers=2, failed_rounds=1)  # fmt: skip
    assert describe(summary) == (
        "epoch 3  loss 4.000 (words 3.400, order 0.600)  2 trainers, 50 samples, 3.0/s, "
        "1 rounds of averaging not complete"
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
    """A stop event that is set after so many looks; before each, the next action is carried out."""

    def __init__(self, *actions):
        self.actions = list(actions)

    def wait(self, period):
        assert period == 2.5
        if not self.actions:
            return True
        self.actions.pop(0)()
        return False


def test_watch_writes_summaries_and_retries_checkpoints(tmp_path):
    dht, store = FakeDHT(), make_store(tmp_path, every_epochs=2)
    averager = store.optimizer.state_averager
    averager.epoch_of_peers = None
    progress, path = Progress(io.StringIO()), tmp_path / "metrics.jsonl"

    def trainer_reports(epoch, epoch_of_peers):
        store_metrics(
            dht,
            "run",
            b"a",
            report(
                epoch, mlm_loss=9.0, sop_loss=1.0, failed_rounds=1, failure="averaging failed:\n\x1b evil [31m text"
            ),
            expiration=60.0,
        )
        averager.epoch_of_peers = epoch_of_peers

    store.optimizer.refusals = [("12D3", "it claims epoch 1000; at most 3 is possible")]
    watch(
        SimpleNamespace(dht=dht, optimizer=store.optimizer), "run",
        period=2.5, journal=Journal(path), store=store, progress=progress,
        stop=Looks(lambda: None, lambda: trainer_reports(1, None), lambda: trainer_reports(2, None),
                   lambda: trainer_reports(2, 2), lambda: trainer_reports(3, 3), lambda: trainer_reports(4, 4)),
    )  # fmt: skip
    records = read_journal(path)
    summaries = [record for record in records if record["event"] == "swarm_epoch"]
    assert [(record["epoch"], record["loss"]) for record in summaries] == [(epoch, 5.0) for epoch in (1, 2, 3, 4)]
    assert [record["epoch"] for record in records if record["event"] == "checkpoint"] == [2, 4]
    rows = [record for record in records if record["event"] == "peer"]
    assert [record["epoch"] for record in rows] == [1, 2, 3, 4], "one row for each report of a trainer"
    assert {record["peer"] for record in rows} == {short_peer_name(b"a")}
    assert rows[0]["failure"] == "averaging failed: evil [31m text"
    lines = progress.stream.getvalue().splitlines()
    assert [(r["peer"], r["reason"]) for r in records if r["event"] == "refusal"] == [
        ("12D3", "it claims epoch 1000; at most 3 is possible")
    ]
    assert [line for line in lines if not line.startswith("epoch")] == [
        "ignored what peer 12D3 sent: it claims epoch 1000; at most 3 is possible",
        "no checkpoint stored, will try again: no trainer shares its state yet",
        f"stored the state of epoch 2 in {store.path}",
        f"stored the state of epoch 4 in {store.path}",
    ]
