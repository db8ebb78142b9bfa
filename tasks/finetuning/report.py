"""What fine-tuning has reached: a table over seeds beside baselines and published scores, and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tasks.finetuning.base import FinetuningTask
from tasks.finetuning.ledger import best_row

MAX_SEED_ROWS = 20
GROUP_SEPARATOR = "/"  # in names of scores of a part of the records: "mcc/logic/Negation"


def columns_of(task: FinetuningTask, *score_rows: Mapping[str, float]) -> list[str]:
    """Names of the scores, the main one first; not those of single groups of records."""
    names = [name for scores in score_rows for name in scores if GROUP_SEPARATOR not in name]
    return list(dict.fromkeys([task.main_metric, *names]))


def summaries(rows: Sequence[Mapping], columns: Sequence[str], main_metric: str) -> list[tuple[str, dict]]:
    """Mean, standard deviation (of the sample, so from two seeds on), median and best seed."""
    table = np.array([[row["dev"][name] for name in columns] for row in rows])
    lines = [("mean", table.mean(axis=0))]
    if len(rows) > 1:
        lines += [("std", table.std(axis=0, ddof=1)), ("median", np.median(table, axis=0))]
    best = best_row(rows, main_metric)
    named = [(name, dict(zip(columns, map(float, values), strict=True))) for name, values in lines]
    return [*named, (f"best (seed {best['seed']})", best["dev"])]


def score_table(task: FinetuningTask, rows: Sequence[Mapping], majority: Mapping[str, float], *, model: str) -> str:
    """The dev scores of all seeds and their summary, the most frequent answer's, and published test scores."""
    columns = columns_of(task, majority)
    lines = [(f"seed {row['seed']}, epoch {row['best_epoch']:.3g}", row["dev"]) for row in rows[:MAX_SEED_ROWS]]
    lines += summaries(rows, columns, task.main_metric)
    seeds = "1 seed" if len(rows) == 1 else f"{len(rows)} seeds"
    title = f"{task.name}, {model}: dev scores of {seeds}, best epoch of each by {task.main_metric}"
    return _table(title, columns, [*lines, ("most frequent answer", majority)], task)


def baseline_table(task: FinetuningTask, name: str, scores: Mapping[str, float], majority: Mapping[str, float]) -> str:
    """The scores of one set of predictions beside the same comparisons."""
    columns = columns_of(task, majority)
    lines = [(name, scores)] + ([("most frequent answer", majority)] if scores is not majority else [])
    return _table(f"{task.name}: scores of {name}", columns, lines, task)


def published_lines(task: FinetuningTask, columns: Sequence[str]) -> list[tuple[str, dict]]:
    """Published scores under our columns; the score of a task with two metrics is their mean."""
    lines = []
    for name, scores in task.published_scores.items():
        mean = {"score": sum(scores.values()) / len(scores)} if "score" in columns else {}
        lines.append((name, {**mean, **scores}))
    return lines


def _table(title: str, columns: Sequence[str], lines: list, task: FinetuningTask) -> str:
    published = published_lines(task, columns)
    names = [name for name, _ in (*lines, *published)]
    width = max(map(len, names), default=0) + 2
    cells = {name: max(8, len(name) + 2) for name in columns}

    def format_line(name: str, scores: Mapping[str, float]) -> str:
        values = {column: f"{scores[column]:.4f}" if column in scores else "-" for column in columns}
        return f"  {name:<{width}}" + "".join(f"{text:>{cells[column]}}" for column, text in values.items())

    header = f"  {'':<{width}}" + "".join(f"{column:>{cells[column]}}" for column in columns)
    text = [title, header, *(format_line(*line) for line in lines)]
    if published:
        text += [f"  published ({task.published_where}):", *(format_line(*line) for line in published)]
    return "\n".join(line.rstrip() for line in text)


def group_table(scores: Mapping[str, float], records: Sequence[Mapping]) -> str:
    """The scores of groups of records ("mcc/logic", "mcc/logic/Negation") with the number of records in each."""
    lines = []
    for name, value in scores.items():
        _, *path = name.split(GROUP_SEPARATOR)
        size = sum(_is_in_group(record, path) for record in records)
        label = "all" if not path else "  " * len(path) + path[-1]
        lines.append(f"  {label:<44}{size:>6}{value:>10.4f}")
    metric = next(iter(scores)).split(GROUP_SEPARATOR)[0]
    return "\n".join([f"  {'':<44}{'pairs':>6}{metric:>10}", *lines])


def _is_in_group(record: Mapping, path: Sequence[str]) -> bool:
    tags = record.get("tags", {})
    return not path or (path[0] in tags and (len(path) == 1 or path[1] in tags[path[0]]))


def plot_scores(task: FinetuningTask, rows: Sequence[Mapping], majority: Mapping[str, float], path: Path) -> Path:
    """The main dev score by epoch, a line for each seed with its best epoch marked; the baseline dashed."""
    from matplotlib.figure import Figure  # pyplot would look for a display

    metric = task.main_metric
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        epochs, values = zip(*((entry["epoch"], entry[metric]) for entry in row["history"]), strict=True)
        (line,) = axes.plot(epochs, values, marker=".", linewidth=1.2, label=f"seed {row['seed']}")
        axes.plot(
            [row["best_epoch"]],
            [row["dev"][metric]],
            marker="o",
            markersize=8,
            fillstyle="none",
            color=line.get_color(),
        )
    axes.axhline(majority[metric], color="grey", linestyle="--", linewidth=1, label="most frequent answer")
    axes.set(title=f"{task.name}, {rows[0]['model']}", xlabel="epoch", ylabel=f"dev {metric}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
