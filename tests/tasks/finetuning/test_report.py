import pytest

from tasks.finetuning import report
from tasks.registry import TASKS


def rows(*scores):
    return [
        {
            "seed": seed,
            "model": "tiny",
            "best_epoch": 2.0,
            "dev": {"mcc": mcc, "accuracy": 0.5 + mcc},
            "history": [{"epoch": 1.0, "mcc": 0.0}, {"epoch": 2.0, "mcc": mcc}],
        }
        for seed, mcc in enumerate(scores)
    ]


def line_of(table, start):
    return next(line.split()[-2:] for line in table.splitlines() if line.strip().startswith(start))


def test_score_table_summarises_seeds_beside_majority_and_published_scores():
    majority = {"accuracy": 0.6753, "mcc": 0.0}
    table = report.score_table(TASKS["rucola"], rows(0.1, 0.2, 0.45), majority, model="tiny")
    assert "tiny: dev scores of 3 seeds" in table
    assert line_of(table, "mean") == ["0.2500", "0.7500"]
    assert line_of(table, "std") == ["0.1803", "0.1803"]  # sqrt((.15^2 + .05^2 + .2^2) / 2)
    assert line_of(table, "median") == ["0.2000", "0.7000"]
    assert line_of(table, "best (seed 2)") == ["0.4500", "0.9500"]
    assert line_of(table, "most frequent answer") == ["0.0000", "0.6753"]
    assert line_of(table, "ruRoBERTa-large") == ["0.5300", "0.7934"]


def test_score_table_of_one_seed_has_no_deviation():
    table = report.score_table(TASKS["rucola"], rows(0.1), {"accuracy": 0.6, "mcc": 0.0}, model="tiny")
    assert "of 1 seed," in table
    assert "std" not in table


def test_published_scores_of_two_metrics_get_their_mean():
    scores = dict(report.published_lines(TASKS["rcb"], ["score", "macro_f1", "accuracy"]))
    assert scores["RuLeanALBERT"]["score"] == pytest.approx((0.361 + 0.413) / 2)


def test_group_table_counts_the_records_of_each_group():
    scores = {"mcc": 0.25, "mcc/logic": 0.5, "mcc/logic/Negation": 1.0}
    records = [{"tags": {"logic": ["Negation", "Universal"]}}, {"tags": {"logic": ["Universal"]}}, {"tags": {}}]
    _, *lines = report.group_table(scores, records).splitlines()
    assert [line.split() for line in lines] == [
        ["all", "3", "0.2500"],
        ["logic", "2", "0.5000"],
        ["Negation", "1", "1.0000"],
    ]


def test_plot_is_a_picture_with_a_line_for_each_seed(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    original = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *args, **kw: drawn.append(args) or original(self, *args, **kw))
    path = report.plot_scores(TASKS["rucola"], rows(0.1, 0.2), {"mcc": 0.0}, tmp_path / "new" / "dev.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [args[1] for args in drawn] == [(0.0, 0.1), [0.1], (0.0, 0.2), [0.2]]
