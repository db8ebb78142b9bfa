"""Figures and pictures of a finished run, from the files its peers wrote."""

from dataclasses import dataclass
from pathlib import Path

import torch

from src.metrics.journal import read_journal
from src.trainer.backup import read_backup


@dataclass(frozen=True)
class RunSummary:
    """One trainer's view of a run. ``rounds`` are averaging rounds of gradients; the losses are of masked tokens."""

    epochs: int
    first_loss: float
    last_loss: float
    rounds: int
    rounds_with_partner: int
    partial: int
    failed: int


@dataclass(frozen=True)
class ParameterDifference:
    """``relative``: norm of the difference over norm of the parameters; ``largest``: biggest single difference."""

    relative: float
    largest: float


def summarise_run(metrics: Path) -> RunSummary:
    """Read a trainer's metrics file; the losses are means over the first and the last tenth of the epochs."""
    records = read_journal(metrics)
    epochs = [record for record in records if record["event"] == "epoch"]
    rounds = [record for record in records if record["event"] == "round" and record["kind"] == "gradients"]
    if not epochs:
        raise ValueError(f"{metrics}: no epoch was finished")
    tenth = max(1, len(epochs) // 10)
    return RunSummary(
        epochs=epochs[-1]["epoch"],
        first_loss=epochs[0]["mlm_loss"],
        last_loss=sum(record["mlm_loss"] for record in epochs[-tenth:]) / tenth,
        rounds=len(rounds),
        rounds_with_partner=sum(record["complete"] for record in rounds),
        partial=sum(not record["complete"] and not record["error"] for record in rounds),
        failed=sum(bool(record["error"]) for record in rounds),
    )


def compare_parameters(first: Path, second: Path) -> ParameterDifference:
    """How far the models in two backups are apart, over all their parameters."""
    models = [read_backup(path)["model"] for path in (first, second)]
    one, other = (torch.cat([tensor.double().flatten() for tensor in model.values()]) for model in models)
    difference = one - other
    return ParameterDifference(float(difference.norm() / one.norm()), float(difference.abs().max()))


def draw_learning_curve(metrics: Path, picture: Path) -> Path:
    """Masked-token and sentence-order loss by epoch, with failed rounds marked; returns ``picture``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read_journal(metrics)
    epochs = [record for record in records if record["event"] == "epoch"]
    incomplete = [r["epoch"] for r in records if r["event"] == "round" and not r["complete"]]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot([r["epoch"] for r in epochs], [r["mlm_loss"] for r in epochs], color="tab:blue")
    axes.set_xlabel("epoch (global step)")
    axes.set_ylabel("masked-token loss, nats", color="tab:blue")
    orders = [(r["epoch"], r["sop_loss"]) for r in epochs if r["sop_loss"] is not None]
    if orders:
        order = axes.twinx()
        order.plot(*zip(*orders, strict=True), color="tab:orange", alpha=0.6)
        order.set_ylabel("sentence-order loss, nats", color="tab:orange")
    for epoch in incomplete:
        axes.axvline(epoch, color="tab:red", linewidth=0.8, linestyle=":")
    axes.set_title("Learning curve" + (" (dotted: rounds of averaging not complete)" if incomplete else ""))
    figure.savefig(picture, dpi=120)
    plt.close(figure)
    return picture
