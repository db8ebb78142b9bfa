"""Seeds of one task and one pretrained model: run what the ledger does not have yet, keep and open finished runs."""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from src.files import write_atomically
from src.models import load_tokenizer
from tasks.finetuning.backbone import Pretrained, build_encoder
from tasks.finetuning.base import FinetuningTask
from tasks.finetuning.console import InputError
from tasks.finetuning.inference import load_weights, predict_logits, read_weights
from tasks.finetuning.ledger import Ledger, best_row, settings_key
from tasks.finetuning.progress import best_index, shown_metrics
from tasks.finetuning.sources import fingerprint
from tasks.finetuning.training import CHECKPOINTS, MEMORY_FILE, WEIGHTS, Settings, TaskData, fit_seed

RUN_FILE = "run.json"


@dataclass
class Experiment:
    """A task to train on, a pretrained encoder, and settings; seeds differ in nothing but the seed.

    A finished seed leaves a row in the ledger and a directory `MODEL/TASK/KEY/seed-N`. The weights are kept for the
    best seed only.
    """

    task: FinetuningTask
    pretrained: Pretrained
    records: Mapping[str, Sequence[Mapping]]
    settings: Settings
    ledger: Ledger

    def __post_init__(self):
        splits = {split: self.records[split] for split in ("train", "validation")}
        self.data_fingerprint = fingerprint(splits)
        self.key = settings_key(
            task=self.task.name,
            model=self.pretrained.fingerprint,
            data=self.data_fingerprint,
            **asdict(self.settings),
        )

    @property
    def directory(self) -> Path:
        return self.ledger.path.parent / self.pretrained.name / self.task.name / self.key

    def finished(self, num_seeds: int) -> list[dict]:
        """The rows of seeds 0 ... num_seeds - 1 that are finished."""
        rows = self.ledger.finished(self.key)
        return [rows[seed] for seed in range(num_seeds) if seed in rows]

    def build_model(self) -> nn.Module:
        return self.task.build_model(self.pretrained.load(), dropout=self.settings.dropout)

    def run_seed(self, seed: int, data: TaskData, *, report_to: str) -> dict:
        """Trains a seed to its end and enters it into the ledger; returns its row."""
        directory = self.directory / f"seed-{seed}"
        started = time.time()
        history = fit_seed(
            self.build_model, self.task, data, self.settings, seed=seed, directory=directory, report_to=report_to
        )
        best = history[best_index(history, self.task.main_metric)]
        row = {
            "task": self.task.name,
            "model": self.pretrained.name,
            "source": self.pretrained.source,
            "key": self.key,
            "seed": seed,
            "arguments": asdict(self.settings),
            "dev": {name: best[name] for name in best if name not in ("epoch", "loss")},
            "best_epoch": best["epoch"],
            "history": history,
            "data_fingerprint": self.data_fingerprint,
            "model_fingerprint": self.pretrained.fingerprint,
            "directory": str(directory.relative_to(self.ledger.path.parent)),
            "seconds": round(time.time() - started, 1),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        self.pretrained.config.save_pretrained(directory)
        self.pretrained.tokenizer.save_pretrained(directory)
        write_atomically(directory / RUN_FILE, json.dumps(row, ensure_ascii=False, indent=1))
        self.ledger.append(row)
        shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
        (directory / MEMORY_FILE).unlink(missing_ok=True)
        self._drop_weights_of_others()
        return row

    def _drop_weights_of_others(self) -> None:
        rows = list(self.ledger.finished(self.key).values())
        best = best_row(rows, self.task.main_metric)
        for row in rows:
            if row is not best:
                (self.ledger.path.parent / row["directory"] / WEIGHTS).unlink(missing_ok=True)


@dataclass
class Run:
    """A finished seed, opened: its model and tokenizer, and its row of the ledger."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    row: dict

    def predict(self, task: FinetuningTask, records: Sequence[Mapping]) -> list:
        """The model's answers to records of its task, or of one that says `trained_on` it."""
        arguments = self.row["arguments"]
        encoded = task.encode_split(records, self.tokenizer, max_length=arguments["max_length"], training=False)
        collator = task.collator(self.tokenizer)
        precision = arguments["precision"] if torch.cuda.is_available() or arguments["precision"] != "fp16" else "fp32"
        logits = predict_logits(
            self.model, encoded.rows, collator, batch_size=arguments["batch_size"], precision=precision
        )
        return task.predict(logits, encoded, records)


def read_run(directory: Path) -> dict:
    """The row of a finished run. Raises ValueError if the directory holds none."""
    path = directory / RUN_FILE
    if not path.is_file():
        raise InputError(f"{directory}: not the directory of a finished run (there is no {RUN_FILE} in it)")
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(row, dict) or not {"task", "model", "seed", "arguments"} <= row.keys():
        raise InputError(f"{path}: not the row of a run; pass a directory that finetune_mlm.py has written")
    return row


def open_run(directory: Path, task: FinetuningTask) -> Run:
    """Loads a finished run of a task onto the GPU, if there is one. The architecture is read from the directory."""
    row = read_run(directory)
    if row["task"] != task.name:
        raise InputError(f"{directory}: a run of {row['task']}, not of {task.name}")
    if not (directory / WEIGHTS).is_file():
        raise InputError(
            f"{directory / WEIGHTS}: no such file; weights are kept for the best seed only. Pass that one, or remove "
            "the line of this seed from runs.jsonl and run it again"
        )
    weights = read_weights(directory / WEIGHTS)
    encoder = build_encoder(directory, pooler=any("pooler." in name for name in weights))
    model = task.build_model(encoder, dropout=0.0)
    load_weights(model, directory / WEIGHTS, weights)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return Run(model, load_tokenizer(str(directory)), row)


def describe_row(task: FinetuningTask, row: Mapping) -> str:
    scores = ", ".join(f"{name} {row['dev'][name]:.4f}" for name in shown_metrics(task, row["dev"]))
    return (
        f"{task.name} seed {row['seed']}  finished: dev {scores} (epoch {row['best_epoch']:g}, {row['seconds']:.0f} s)"
    )
