"""A metrics file read for people: shares of the work, stalls with their reasons, and nothing a stranger can abuse."""

import io
import itertools
import json
import math
import sys
import threading
import tracemalloc

import pytest
from rich.console import Console

from src.export.model_card import draw_curve, held_out_curve, learning_curve
from src.metrics.history import THIS_PEER, RunHistory, read_history
from src.metrics.journal import Journal, read_journal
from src.metrics.report import make_report
from src.metrics.terminal import TerminalView


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
    history = RunHistory([*records, failed, {**failed, "complete": True, "received": 1.0}])
    ((peer, part),) = history.shares()
    assert (peer.name, peer.samples, peer.failed_rounds, part) == (THIS_PEER, 32.0, 1, 1.0)
    assert history.last_epoch.num_peers == 1, "itself"
    assert history.last_epoch.loss is None, "it was not given"
    assert [failure.reason for failure in history.failures] == [
        "gradients: 50% of the values came back; caught TimeoutError"
    ]


def test_history_knows_how_long_each_trainer_computed():
    own = [{"event": "epoch", "time": 10.0, "epoch": 1, "seconds": 10.0, "waited_seconds": 1.0},
           {"event": "epoch", "time": 30.0, "epoch": 2, "seconds": 30.0, "waited_seconds": 9.0}]  # fmt: skip
    others = [row("a", 8, computing=0.5), row("a", 16, computing=0.75), row("b", 8), row("liar", 8, computing=2.0)]
    computing = {name: peer.computing for name, peer in RunHistory([*own, *others]).peers.items()}
    assert computing == {THIS_PEER: 0.75, "a": 0.75, "b": None, "liar": 1.0}


def test_history_adds_up_what_each_trainer_sent_and_received_whatever_was_missed_or_started_anew():
    own = [{"event": "epoch", "time": 10.0 * number, "epoch": number, "bytes_sent": 100, "bytes_received": 10}
           for number in (1, 2)]  # fmt: skip
    others = [row("a", 8, bytes_sent=5, bytes_received=1), row("a", 24, bytes_sent=20, bytes_received=4),
              row("a", 8, bytes_sent=7, bytes_received=2), row("b", 8)]  # fmt: skip
    traffic = {name: (peer.bytes_sent, peer.bytes_received) for name, peer in RunHistory([*own, *others]).peers.items()}
    assert traffic == {THIS_PEER: (200, 20), "a": (27, 6), "b": (0, 0)}


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
     {"event": "peer", "time": float("nan")}, {"event": "held_out", "time": 1.0, "epoch": 1, "loss": None},
     {"event": "minimal_pairs", "time": 1.0, "epoch": 1, "accuracy": 0.5, "low": None}],
)  # fmt: skip
def test_history_leaves_out_what_is_not_a_record(record):
    history = RunHistory([record])
    assert (history.epochs, history.peers, history.held_out, history.pairs) == ({}, {}, [], [])


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


# Numbers and other things that somebody else's file may hold in the place of a number or a text, as JSON.
ODD_VALUES = ["1e999", "NaN", "-Infinity", "1" * 400, "1" * 5000, "1.7e308", "-1.7e308", "5e-324", "1e300", "-5",
              "true", "null", '"text"', '"\\ud800\\u001b[2J"', "[1]", '{"a": {"b": []}}', "[" * 900 + "]" * 900,
              "[" * 100_000 + "]" * 100_000]  # fmt: skip
EVERY_KIND = [
    {"event": "start", "time": 1e9, "run_id": "r", "role": "aux", "target_batch_size": 64, "total_steps": 100},
    *(epoch(n, 1e9 + 20 * n) for n in (1, 2, 3)),
    row("a", 64, time=1e9 + 60, number=3, failed_rounds=1, failure="b left", lone_epochs=0),
    {"event": "epoch", "time": 1e9 + 61, "epoch": 4, "mlm_loss": 4.0, "loss": 4.0, "sop_loss": 0.5, "samples": 16,
     "num_peers": 1, "samples_per_second": 3.0, "lone_epochs": 0},
    {"event": "round", "time": 1e9 + 62, "epoch": 4, "complete": False, "kind": "gradients", "received": 0.5,
     "error": "", "reasons": ["timeout"]},
    {"event": "held_out", "time": 1e9 + 63, "epoch": 4, "loss": 4.0, "accuracy": 0.2, "order_accuracy": 0.5},
    {"event": "checkpoint", "time": 1e9 + 64, "epoch": 4},
    {"event": "minimal_pairs", "time": 1e9 + 65, "epoch": 4, "accuracy": 0.6, "low": 0.5, "high": 0.7, "syntax": 0.6,
     "num_pairs": 450, "num_paradigms": 45},
]  # fmt: skip


def odd_files(odd: str):
    """Files of a run in which one field of one record has an odd value, with the name of the field."""
    for place, record in enumerate(EVERY_KIND):
        for field in record:
            lines = [json.dumps(other) for other in EVERY_KIND]
            lines[place] = json.dumps({**record, field: "ODD"}).replace('"ODD"', odd)
            yield f"{record['event']}: {field}", "\n".join(lines) + "\n"


@pytest.mark.parametrize("odd", ODD_VALUES, ids=[value[:12] for value in ODD_VALUES])
def test_file_of_somebody_else_ends_in_a_report_whatever_stands_in_it(tmp_path, odd):
    path = tmp_path / "metrics.jsonl"
    view = TerminalView(Console(file=io.StringIO(), force_terminal=True, width=80))
    for name, text in odd_files(odd):
        path.write_text(text, encoding="utf-8")
        view.history = read_history(path)
        page = make_report(view.history)
        assert page.encode("utf-8", errors="replace") and len(page) < 60_000, name
        view.console.print(view.render())
        records = [record for record in read_journal(path) if isinstance(record, dict)]
        curve, held_out = learning_curve(records), held_out_curve(records)
        assert len(draw_curve(curve, held_out)) < 10_000, name


@pytest.mark.parametrize("key", ["mlm_loss", "samples_per_second", "samples", "time", "epoch"])
def test_values_of_opposite_extremes_or_next_to_each_other_can_be_drawn(key):
    for low, high in ((-1e15, 1e15), (1e9, 1e9 + 1e-6), (5.0, math.nextafter(5.0, 6.0)), (1e-9, 2e-9), (0.0, 0.0)):
        records = [{**record, key: value} for record, value in zip(EVERY_KIND[1:4], (low, high, low), strict=True)]
        assert make_report(RunHistory([EVERY_KIND[0], *records])).endswith("</html>\n")


def test_reading_a_long_file_takes_no_memory_for_what_no_report_shows(tmp_path):
    """A report of a running peer is made every two minutes, for weeks."""
    path = tmp_path / "metrics.jsonl"
    phases = ({"event": "phase", "time": 1.0, "phase": "idle", "step": step} for step in range(20_000))
    path.write_text("".join(json.dumps(record) + "\n" for record in (epoch(1, 1.0), *phases)), encoding="utf-8")
    tracemalloc.start()
    try:
        assert len(read_history(path).epochs) == 1
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 4
    finally:
        tracemalloc.stop()


def test_history_can_be_read_while_another_thread_adds_to_it():
    history, over, errors = RunHistory(), threading.Event(), []
    view = TerminalView(Console(file=io.StringIO(), width=80))
    view.history = history

    def add():
        for number in itertools.count():
            if over.is_set():
                return
            history.add(row(f"peer{number}", number, failed_rounds=1, failure="left"))
            history.add(epoch(number % 5000 + 1, 1e9 + number))

    def look():
        try:
            for _ in range(20):
                begun = len(history.peers)
                while len(history.peers) < begun + 100:
                    view.render()
        except RuntimeError as error:
            errors.append(error)
        over.set()

    threads = [threading.Thread(target=target, daemon=True) for target in (look, add)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert not errors


def test_history_that_follows_a_journal_misses_nothing_written_meanwhile(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.write("start", run_id="r")
    writer = threading.Thread(target=lambda: journal.write("checkpoint", epoch=7))

    def read(path):
        history = read_history(path)
        writer.start()
        writer.join(0.3)  # it must wait
        return history

    history = journal.follow(read)
    writer.join(5)
    assert history.last_checkpoint == 7
    journal.close()
