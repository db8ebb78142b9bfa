"""Figures of a run by hand: epochs, losses, rounds, and how far two trainers are apart."""

import math

import pytest
import torch

from src.metrics.journal import Journal
from src.trainer.run_summary import ParameterDifference, compare_parameters, draw_learning_curve, summarise_run


@pytest.fixture
def metrics(tmp_path):
    """Twenty epochs whose loss falls from 20 to 1, and six rounds of averaging."""
    journal = Journal(tmp_path / "metrics.jsonl")
    for epoch in range(1, 21):
        journal.write("epoch", epoch=epoch, mlm_loss=21.0 - epoch, sop_loss=0.7)
    for kind, received, error in [("gradients", 1.0, ""), ("gradients", 1.0, ""), ("gradients", 0.5, ""),
                                  ("gradients", 0.0, "no group found"), ("parameters", 1.0, ""),
                                  ("parameters", 0.0, "no group found")]:  # fmt: skip
        complete = received == 1.0 and not error
        journal.write("round", epoch=3, kind=kind, received=received, error=error, complete=complete)
    return tmp_path / "metrics.jsonl"


def test_swarm_report_counts_epochs_losses_and_rounds_of_gradients(metrics):
    summary = summarise_run(metrics)
    assert (summary.epochs, summary.first_loss, summary.last_loss) == (20, 20.0, 1.5)
    assert (summary.rounds, summary.rounds_with_partner, summary.partial, summary.failed) == (4, 2, 1, 1)


def test_swarm_report_of_a_run_without_epochs_is_an_error(tmp_path):
    Journal(tmp_path / "metrics.jsonl").write("round", kind="gradients", complete=True, error="")
    with pytest.raises(ValueError, match="no epoch was finished"):
        summarise_run(tmp_path / "metrics.jsonl")


def test_swarm_report_parameter_difference_by_hand(tmp_path):
    for name, values in (("a", [3.0, 4.0]), ("b", [3.0, 4.5])):
        model = {"x": torch.tensor(values), "y": torch.tensor([[12.0]])}
        torch.save({"model": model, "optimizer": {}, "scheduler": {}, "epoch": 1}, tmp_path / f"{name}.pth")
    difference = compare_parameters(tmp_path / "a.pth", tmp_path / "b.pth")
    assert difference.relative == pytest.approx(0.5 / 13)
    assert difference.largest == pytest.approx(0.5)
    assert compare_parameters(tmp_path / "a.pth", tmp_path / "a.pth") == ParameterDifference(0.0, 0.0)


def test_swarm_report_does_not_confuse_nan_with_agreement(tmp_path):
    for name, value in (("a", 1.0), ("b", math.nan)):
        state = {"model": {"x": torch.tensor([value])}, "optimizer": {}, "scheduler": {}, "epoch": 1}
        torch.save(state, tmp_path / f"{name}.pth")
    assert not compare_parameters(tmp_path / "a.pth", tmp_path / "b.pth").relative < 1e-2


def test_swarm_report_draws_a_picture(metrics, tmp_path):
    picture = draw_learning_curve(metrics, tmp_path / "curve.png")
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    assert picture.stat().st_size > 5000
