"""From a pretrained model, or a baseline, to scores and submissions: what finetune_mlm.py and predict_on_lidirus.py do.

Everything that can be wrong with data or model is found by `prepare` and `usable_length`, before any training.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from src.files import write_atomically
from tasks.finetuning import report
from tasks.finetuning.backbone import Pretrained, max_positions
from tasks.finetuning.base import FinetuningTask
from tasks.finetuning.baselines import tfidf_predictions
from tasks.finetuning.console import InputError
from tasks.finetuning.experiment import Experiment, Run, describe_row, open_run
from tasks.finetuning.ledger import Ledger, best_row
from tasks.finetuning.training import Settings, encode_data
from tasks.registry import TASKS, get_task, tasks_with_data
from tasks.submission import ARCHIVE, check_directory, write_archive

RUSSIAN_SUPERGLUE_SITE = "https://russiansuperglue.com"
RUCOLA_SITE = "https://rucola-benchmark.com"
OFFICIAL_NUMBERS = {task.submission_file: task.num_test_records for task in TASKS.values()}


@dataclass
class Benchmark:
    """A task to answer, the task to train on for it (itself, but for LiDiRus), and the records of both.

    records: "train" and "validation" of the training task, "test" of the task to answer.
    """

    task: FinetuningTask
    training_task: FinetuningTask
    records: Mapping[str, Sequence[Mapping]]

    def majority(self, split: str) -> list:
        task = self.task if split == "test" else self.training_task
        return task.majority_predictions(self.records["train"], self.records[split])

    def majority_scores(self) -> dict[str, float]:
        validation = self.records["validation"]
        return self.training_task.score(self.majority("validation"), validation)


def prepare(task_name: str, data_dir: Path) -> list[Benchmark]:
    """The benchmarks of that name, or of "all" that have data, with their records. Raises ValueError for bad data."""
    if task_name.lower() != "all":
        tasks = [get_task(task_name)]
    else:
        tasks = []
        for task in tasks_with_data(data_dir):
            if task.trained_on is None or get_task(task.trained_on).has_local_data(data_dir):
                tasks.append(task)
            else:
                print(
                    f"-t all leaves {task.name} out: its model learns from {task.trained_on}, which has no folder here"
                )
        tasks.sort(key=lambda task: task.trained_on is not None)  # after the task whose model they use
        if not tasks:
            known = ", ".join(task.name for task in TASKS.values())
            raise ValueError(
                f"-t all: there is no folder of a task in {data_dir} (nor in its RussianSuperGLUE/ or combined/); "
                f"expected some of {known}. Get them from {RUSSIAN_SUPERGLUE_SITE}/tasks/download and "
                f"{get_task('RuCoLA').download_url}"
            )
    return [load_benchmark(task, data_dir) for task in tasks]


def load_benchmark(task: FinetuningTask, data_dir: Path) -> Benchmark:
    if task.trained_on is None:
        return Benchmark(task, task, task.load(data_dir))
    training_task = get_task(task.trained_on)
    test = task.load(data_dir, splits=("test",))
    return Benchmark(task, training_task, training_task.load(data_dir, splits=("train", "validation")) | test)


def usable_length(pretrained: Pretrained, settings: Settings) -> Settings:
    """The settings with max_length lowered, with a note, to what the model can read.

    Loads the weights once, so that any that do not fit are found now.
    """
    limits = [pretrained.tokenizer.model_max_length, max_positions(pretrained.load())]
    limit = int(min(limit for limit in limits if limit is not None))
    if limit >= settings.max_length:
        return settings
    pretrained.notes.append(
        f"--max-length {settings.max_length} is lowered to {limit}, the longest input of this model"
    )
    return dataclasses.replace(settings, max_length=limit)


def finetune(
    benchmark: Benchmark,
    pretrained: Pretrained,
    settings: Settings,
    *,
    num_seeds: int,
    ledger: Ledger,
    predictions_dir: Path,
    report_to: str = "none",
) -> Path:
    """Runs the seeds that are missing, reports all, and writes the best one's predictions; returns their file."""
    task = benchmark.training_task
    experiment = Experiment(task, pretrained, benchmark.records, settings, ledger)
    print(describe_work(benchmark, experiment, num_seeds=num_seeds))
    rows = run_missing_seeds(experiment, num_seeds=num_seeds, report_to=report_to)
    majority = benchmark.majority_scores()
    table = report.score_table(task, rows, majority, model=pretrained.name)
    write_atomically(experiment.directory / "scores.txt", table + "\n")
    picture = report.plot_scores(task, rows, majority, experiment.directory / "dev.png")
    print(f"\n{table}\n  curves: {picture}\n")
    best = best_row(rows, task.main_metric)
    test = benchmark.records["test"]
    metric = benchmark.task.main_metric
    if benchmark.task.majority_if_better and majority[metric] >= best["dev"][metric]:
        print(
            f"{benchmark.task.name}: the most frequent answer is as good on dev as the best seed or better ({metric} "
            f"{majority[metric]:.4f} and {best['dev'][metric]:.4f}), so it is what gets submitted"
        )
        predictions = benchmark.majority("test")
    else:
        if benchmark.task.majority_if_better:
            print(
                f"{benchmark.task.name}: seed {best['seed']} is better on dev than the most frequent answer ({metric} "
                f"{best['dev'][metric]:.4f} and {majority[metric]:.4f}), so it is what gets submitted"
            )
        run = open_run(ledger.path.parent / best["directory"], task)
        predictions = run.predict(benchmark.task, test)
        print_test_scores(benchmark.task, f"{pretrained.name}, seed {best['seed']}", predictions, test, benchmark)
    return write_predictions(benchmark.task, predictions_dir / pretrained.name, test, predictions)


def describe_work(benchmark: Benchmark, experiment: Experiment, *, num_seeds: int) -> str:
    """The line that opens a task: what is about to be done, on what, and where it will be."""
    numbers = {split: len(records) for split, records in benchmark.records.items()}
    trained_on = "" if benchmark.task is benchmark.training_task else f" (trained on {benchmark.training_task.name})"
    device = "GPU" if torch.cuda.is_available() else "CPU"
    return (
        f"{benchmark.task.name}{trained_on}: {numbers['train']} training, {numbers['validation']} dev and "
        f"{numbers['test']} test records; {experiment.pretrained.name} on the {device} in "
        f"{experiment.settings.precision}, {'1 seed' if num_seeds == 1 else f'{num_seeds} seeds'}, kept in "
        f"{experiment.directory}"
    )


def run_missing_seeds(experiment: Experiment, *, num_seeds: int, report_to: str) -> list[dict]:
    finished = {row["seed"]: row for row in experiment.finished(num_seeds)}
    for row in finished.values():
        print(f"{describe_row(experiment.task, row)}, in the ledger")
    data = None
    for seed in range(num_seeds):
        if seed not in finished:
            data = data or encode_data(
                experiment.task,
                experiment.records,
                experiment.pretrained.tokenizer,
                max_length=experiment.settings.max_length,
            )
            finished[seed] = experiment.run_seed(seed, data, report_to=report_to)
            print(describe_row(experiment.task, finished[seed]))
    return [finished[seed] for seed in range(num_seeds)]


def evaluate_baseline(benchmark: Benchmark, name: str, *, predictions_dir: Path) -> Path:
    """Scores the "majority" or "tfidf" baseline on dev, and writes its predictions; returns their file."""
    answers = {}
    for split, task in (("validation", benchmark.training_task), ("test", benchmark.task)):
        records = benchmark.records[split]
        if name == "majority":
            answers[split] = benchmark.majority(split)
        else:
            answers[split] = tfidf_predictions(task, benchmark.records["train"], records)
    scores = benchmark.training_task.score(answers["validation"], benchmark.records["validation"])
    majority = scores if name == "majority" else benchmark.majority_scores()
    print(f"\n{report.baseline_table(benchmark.training_task, f'{name} (dev)', scores, majority)}\n")
    test = benchmark.records["test"]
    print_test_scores(benchmark.task, name, answers["test"], test, benchmark)
    return write_predictions(benchmark.task, predictions_dir / name, test, answers["test"])


def print_test_scores(task: FinetuningTask, name: str, predictions: list, records: Sequence, benchmark=None) -> None:
    """The scores on a test set whose labels are public (LiDiRus), with those of its groups."""
    if not task.is_labelled(records):
        return
    scores = task.score(predictions, records)
    majority = task.score(benchmark.majority("test"), records) if benchmark is not None else scores
    print(report.baseline_table(task, name, scores, majority))
    if any(report.GROUP_SEPARATOR in metric for metric in scores):
        print(report.group_table(scores, records))
    print()


def predict_with_run(task: FinetuningTask, run: Run, records: Sequence[Mapping], *, predictions_dir: Path) -> Path:
    predictions = run.predict(task, records)
    print_test_scores(task, f"{run.row['model']}, seed {run.row['seed']}", predictions, records)
    return write_predictions(task, predictions_dir / run.row["model"], records, predictions)


def write_predictions(task: FinetuningTask, directory: Path, records: Sequence, predictions: Sequence) -> Path:
    path = task.write_submission(directory, records, predictions)
    print(f"{task.name}: {len(records)} test records answered, {path} written and checked\n")
    return path


def pack(directory: Path, data_dir: Path) -> bool:
    """Checks a folder of predictions and packs what is in it; ends with a line on what to do next.

    False if a file there is wrong: then nothing is packed.
    """
    try:
        checked = check_directory(directory, data_dir)
    except ValueError as error:  # a damaged test file of another task whose predictions lie there too
        raise InputError(str(error)) from error
    for message in checked.wrong.values():
        print(f"WRONG: {message}")
    if checked.wrong:
        print(f"No {ARCHIVE} written; correct these files, then python -m tasks.submission {directory} --zip")
        return False
    missing = write_archive(directory)
    for note in checked.notes:
        if ARCHIVE not in note:
            print(f"Note: {note}")
    partial = [name for name, number in checked.right.items() if number != OFFICIAL_NUMBERS[name]]
    print(next_step(directory, set(checked.right), missing=missing, partial=partial))
    return True


def next_step(directory: Path, files: set[str], *, missing: Sequence[str], partial: Sequence[str]) -> str:
    """What the person should do with the files; partial ones answer other test records than the official ones."""
    if partial:
        return f"Next: get the official test files for {', '.join(partial)} and run the same command again"
    steps = []
    if (directory / ARCHIVE).is_file():
        lacking = f" once it is complete (missing: {', '.join(missing)})" if missing else ""
        steps.append(f"upload {directory / ARCHIVE} to {RUSSIAN_SUPERGLUE_SITE}{lacking}")
    rucola = get_task("RuCoLA").submission_file
    if rucola in files:
        steps.append(f"upload {directory / rucola} to {RUCOLA_SITE}")
    return f"Next: {'; '.join(steps)}"
