"""The simulation of liars runs, tells what it has found, and finds in a few rounds that clipping helps."""

import json
import sys

import pytest
import torch

from benchmarks import robust_averaging
from benchmarks.robust_averaging import (
    ATTACKS,
    NUM_LIARS,
    NUM_PEERS,
    Outcome,
    Simulation,
    all_outcomes,
    average,
    missed,
)
from src.swarm.contributions import MAX_NORM_RATIO, Judge


@pytest.mark.slow
def test_few_rounds_of_liars_turn_the_mean_round_and_not_the_clipped_average(monkeypatch):
    monkeypatch.setattr(robust_averaging, "NUM_HELD_OUT", 16)
    simulation, said = Simulation(epochs=12, batch_size=16), []
    outcomes = all_outcomes(simulation, ["sign flip"], say=said.append)
    kept = {(outcome.attack, outcome.rule): outcome.kept for outcome in outcomes}
    assert kept["nobody lies", "mean"] == 1.0 and kept["nobody lies", "clip"] > 0.8
    assert kept["sign flip", "mean"] < 0.0 < 0.5 < kept["sign flip", "clip"]
    assert len(said) == 4 and "of the undisturbed drop" in said[0]
    assert simulation.run("mean").last_loss == outcomes[0].last_loss, "a run depends on nothing but its seed"


@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_is_refused_and_each_is_what_it_says(name):
    honest = [[torch.randn(500) + 0.3, torch.randn(20)] for _ in range(NUM_PEERS - NUM_LIARS)]
    judge = Judge(max_weight=float(16 * NUM_PEERS))
    means = [torch.stack(parts).mean(0) for parts in zip(*honest, strict=True)]
    for averaged, mean in zip(average(judge, honest, 16.0, ATTACKS[name]), means, strict=True):
        if name == "a little is enough":
            assert float((averaged - mean).norm()) > 0.2
        else:
            assert float(torch.cosine_similarity(averaged, mean, dim=0)) == pytest.approx(-1.0, abs=1e-3)
        if name == "sign flip":
            assert float(averaged.norm()) < 0.3 * MAX_NORM_RATIO * max(float(parts.norm()) for parts in honest[0])
    undisturbed = average(Judge(max_weight=160.0), honest + honest[:3], 16.0, None)
    assert all(torch.isfinite(values).all() for values in undisturbed)


def test_missed_targets_are_named():
    def outcome(attack, rule, kept):
        return Outcome(attack, rule, 8.0, 7.0, kept)

    good = [outcome("nobody lies", "mean", 1.0), outcome("nobody lies", "clip", 0.995),
            outcome("a", "mean", 0.4), outcome("a", "clip", 0.91)]  # fmt: skip
    assert missed(good) == []
    bad = [outcome("nobody lies", "mean", 1.0), outcome("nobody lies", "clip", 0.98), outcome("a", "mean", 0.4),
           outcome("a", "clip", 0.89), outcome("b", "mean", 0.7), outcome("b", "clip", 0.95)]  # fmt: skip
    assert [line.split(":")[0] for line in missed(bad)] == ["nobody lies", "a"]


def test_figures_are_written_and_the_code_tells_what_is_missed(tmp_path, monkeypatch, capsys):
    outcomes = [Outcome("nobody lies", "mean", 8.0, 7.0), Outcome("nobody lies", "clip", 8.0, 7.5, 0.5)]
    monkeypatch.setattr(robust_averaging, "Simulation", lambda **options: options)
    monkeypatch.setattr(robust_averaging, "all_outcomes", lambda simulation, say: outcomes)
    monkeypatch.setattr(sys, "argv", ["robust_averaging", "--results", str(tmp_path / "figures.json")])
    assert robust_averaging.main() == 1
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["outcomes"][1]["kept"] == 0.5 and "nobody lies" in written["missed"][0]
    assert "missed: nobody lies" in capsys.readouterr().out
    outcomes.pop()
    outcomes.append(Outcome("nobody lies", "clip", 8.0, 7.0))
    assert robust_averaging.main() == 0
