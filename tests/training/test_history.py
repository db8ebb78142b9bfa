"""A metrics file read for people: shares of the work, stalls with their reasons, and nothing a stranger can abuse."""

import json

import pytest

from src.training.history import THIS_PEER, RunHistory, read_history


def epoch(number: int, time: float, **values) -> dict:
    return {"event": "swarm_epoch", "time": time, "epoch": number, "loss": 5.0, "mlm_loss": 4.0, "sop_loss": 1.0,
            "samples": 8, "samples_per_second": 2.0, "alive_peers": 2, **values}  # fmt: skip


def row(name: str, total: int, *, time: float = 1000.0, number: int = 1, **values) -> dict:
    return {"event": "peer", "time": time, "peer": name, "epoch": number, "samples": 8, "total_samples": total,
            "samples_per_second": 2.0, "failed_rounds": 0, "failure": "", **values}  # fmt: skip


def test_history_shares_count_samples_of_reports_that_nobody_saw():
    history = RunHistory([row("a", 100), row("b", 50), row("a", 300, number=4)])  # epochs 2 and 3 were missed
    assert [(peer.name, peer.samples, part) for peer, part in history.shares()] == [
        ("a", 300.0, pytest.approx(6 / 7)), ("b", 50.0, pytest.approx(1 / 7)),
    ]  # fmt: skip


def test_history_adds_up_the_work_of_a_trainer_that_was_started_anew():
    history = RunHistory([row("a", 100), row("a", 0), row("a", 30), row("a", 40), row("a", 10)])
    assert history.peers["a"].samples == 100 + 40 + 10


def test_history_of_a_trainers_own_file():
    records = [{"event": "epoch", "time": 10.0 * e, "epoch": e, "mlm_loss": 4.0, "samples": 16, "num_peers": 0,
                "samples_per_second": 3.0} for e in (1, 2)]  # fmt: skip
    failed = {"event": "round", "time": 21.0, "epoch": 2, "complete": False, "kind": "gradients", "received": 0.5,
              "error": "", "reasons": ["caught TimeoutError"]}  # fmt: skip
    history = RunHistory([*records, failed, {**failed, "complete": True}])
    ((peer, part),) = history.shares()
    assert (peer.name, peer.samples, peer.failed_rounds, part) == (THIS_PEER, 32.0, 1, 1.0)
    assert history.last_epoch.num_peers == 1, "itself"
    assert history.last_epoch.loss is None, "it was not given"
    assert [failure.reason for failure in history.failures] == [
        "gradients: 50% of the values came back; caught TimeoutError"
    ]


def test_history_finds_stalls_and_what_was_reported_in_them():
    times = [0, 20, 40, 60, 80, 280, 300, 340]  # 200 s instead of 20; 40 s is less than three times as long
    records = [epoch(number, 1e9 + time) for number, time in enumerate(times, 1)]
    trouble = row("a", 8, time=1e9 + 200, number=6, failed_rounds=2, failure="peer b left")
    earlier = row("a", 8, time=1e9 + 30, number=2, failed_rounds=1, failure="something else")
    history = RunHistory([*records[:2], earlier, *records[2:5], trouble, *records[5:]])
    (stall,) = history.stalls()
    assert (stall.time, stall.seconds, stall.epoch, stall.reasons) == (1e9 + 80, 200.0, 6, ("peer b left",))
    assert history.num_failures == 3
    assert history.peers["a"].failed_rounds == 3


def test_history_does_not_take_missed_epochs_for_a_stall():
    numbers = [1, 2, 3, 4, 14, 15]
    assert RunHistory([epoch(number, 20.0 * number) for number in numbers]).stalls() == []


def test_history_forgets_epochs_that_are_done_again():
    history = RunHistory([epoch(number, 10.0 * number, mlm_loss=9.0) for number in (1, 2, 3, 4)])
    history.add(epoch(3, 100.0))
    assert [(e.epoch, e.mlm_loss) for e in history.epochs.values()] == [(1, 9.0), (2, 9.0), (3, 4.0)]


@pytest.mark.parametrize(
    "record",
    [None, 7, [], {}, {"event": "swarm_epoch"}, {"event": "shares", "time": 1.0}, {"event": ["x"], "time": 1.0},
     {"event": "peer", "time": float("nan")}, {"event": "held_out", "time": 1.0, "epoch": 1, "loss": None}],
)  # fmt: skip
def test_history_leaves_out_what_is_not_a_record(record):
    history = RunHistory([record])
    assert (history.epochs, history.peers, history.held_out) == ({}, {}, [])


def test_history_takes_records_whose_figures_are_nonsense():
    history = RunHistory([epoch(1, 5.0, mlm_loss=None, samples="many", alive_peers=[]),
                          {"event": "peer", "time": 6.0, "peer": {"a": 1}, "epoch": "x"}])  # fmt: skip
    assert (history.last_epoch.mlm_loss, history.last_epoch.samples) == (None, 0.0)
    assert list(history.peers) == ["{'a': 1}"]


def test_read_history_explains_a_wrong_file(tmp_path):
    for name, content, reason in (("none", None, "No such file"), ("other", '{"a": 1}\n7\n', "no record of a run")):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=rf"{name}: {reason}.*metrics\.jsonl"):
            read_history(tmp_path / name)
    (tmp_path / "good").write_text(json.dumps(epoch(3, 5.0)))
    assert read_history(tmp_path / "good").last_epoch.epoch == 3
