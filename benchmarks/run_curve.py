"""What a run came to, epoch by epoch, as a table and a picture, from its auxiliary peer's records.

    python -m benchmarks.run_curve outputs/my-exp/aux/metrics.jsonl --picture benchmarks/results/my-exp.png

The table has a line for each scored checkpoint: samples and hours until then, masked-token loss and accuracy on
held-out text, and with --eval_pairs the share of minimal pairs that are right.
"""

import argparse
import sys
from pathlib import Path

from src.files import write_atomically
from src.metrics.history import RunHistory, Scores, read_history

LONGEST_PAUSE = 600.0  # seconds without an epoch that count as training; a run that stood still did not train


def hours_trained(history: RunHistory, epoch: int) -> float:
    """Until the end of an epoch; pauses count up to `LONGEST_PAUSE`."""
    times = [one.time for one in history.epochs.values() if one.epoch <= epoch]
    start = min([history.first_time, *times[:1]])
    return sum(min(after - before, LONGEST_PAUSE) for before, after in zip([start, *times], times, strict=False)) / 3600


def samples_until(history: RunHistory, epoch: int) -> float:
    """Those of the epochs that were seen, and as many for each epoch that was not."""
    seen = [one.samples for one in history.epochs.values() if one.epoch <= epoch]
    return epoch * sum(seen) / len(seen) if seen else 0.0


def scores_by_epoch(history: RunHistory) -> list[Scores]:
    """The last score of each epoch: a peer that was started again has scored its checkpoint twice."""
    return sorted({score.epoch: score for score in history.held_out}.values(), key=lambda score: score.epoch)


def table(history: RunHistory) -> str:
    pairs = {score.epoch: score for score in history.pairs}
    lines = ["| epoch | samples | hours | held-out loss | accuracy | minimal pairs |", f"|{' --- |' * 6}"]
    for score in scores_by_epoch(history):
        pair = pairs.get(score.epoch)
        right = f"{pair.accuracy:.3f} ({pair.low:.3f} to {pair.high:.3f})" if pair is not None else ""
        lines.append(
            f"| {score.epoch} | {samples_until(history, score.epoch):,.0f} | {hours_trained(history, score.epoch):.2f} "
            f"| {score.loss:.3f} | {score.accuracy:.3f} | {right} |"
        )
    return "\n".join(lines)


def draw(history: RunHistory, picture: Path) -> None:
    """Training and held-out loss by epoch on the left axis, pairs with their 95 % intervals on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    epochs, scores = [one for one in history.epochs.values() if one.mlm_loss is not None], scores_by_epoch(history)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot([one.epoch for one in epochs], [one.mlm_loss for one in epochs], color="tab:blue", alpha=0.4,
              label="training text")  # fmt: skip
    axes.plot([one.epoch for one in scores], [one.loss for one in scores], color="tab:blue", marker="o",
              label="held-out text")  # fmt: skip
    axes.set_xlabel("epoch (global step)")
    axes.set_ylabel("masked-token loss, nats")
    if history.pairs:
        right = axes.twinx()
        found = [
            [one.epoch, one.accuracy, max(0.0, one.accuracy - one.low), max(0.0, one.high - one.accuracy)]
            for one in history.pairs
        ]
        numbers, shares, below, above = zip(*found, strict=True)
        right.errorbar(numbers, shares, yerr=[below, above], color="tab:orange", marker="s", capsize=3)
        right.set_ylabel("share of minimal pairs that are right", color="tab:orange")
    axes.legend(loc="upper right")
    write_atomically(picture, lambda file: figure.savefig(file, format="png", dpi=110))
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path, help="metrics.jsonl of an auxiliary peer that scored its checkpoints")
    parser.add_argument("--picture", type=Path, help=".png to draw")
    options = parser.parse_args(argv)
    try:
        history = read_history(options.metrics)
        if not history.held_out:
            raise ValueError(f"{options.metrics}: no checkpoint was scored (--store_checkpoints --eval_sources TEXT)")
        print(table(history))
        if options.picture is not None:
            draw(history, options.picture)
    except (ValueError, OSError) as error:
        print(f"benchmarks.run_curve: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
