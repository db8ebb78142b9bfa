"""Fine-tunes one seed with the Hugging Face Trainer: resumes where it was killed, keeps the best epoch by dev score."""

import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import get_last_checkpoint

from src.files import write_atomically
from tasks.finetuning.base import FinetuningTask
from tasks.finetuning.console import InputError
from tasks.finetuning.encoding import EncodedSplit
from tasks.finetuning.inference import (
    Diverged,
    free_memory,
    is_out_of_memory,
    load_weights,
    predict_logits,
    save_weights,
)
from tasks.finetuning.progress import EpochLines, dev_history, out_of_patience

logger = logging.getLogger(__name__)

WEIGHTS, STATE = "weights.pt", "trainer_state.json"
CHECKPOINTS = "checkpoints"
MEMORY_FILE = "batch.json"
WARMUP_SHARE = 0.1


@dataclass(frozen=True)
class Settings:
    """Everything on the command line that decides the result of a seed, and nothing else."""

    batch_size: int = 32
    grad_acc_steps: int = 1
    dropout: float = 0.1
    weight_decay: float = 0.01
    num_epochs: int = 40
    learning_rate: float = 1e-5
    max_length: int = 512
    early_stopping_patience: int | None = None
    max_steps: int | None = None
    precision: str = "fp32"

    def __post_init__(self):
        for name in ("batch_size", "grad_acc_steps", "num_epochs", "early_stopping_patience", "max_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if self.max_length < 8:
            raise ValueError(f"--max-length {self.max_length}: must be at least 8")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout {self.dropout}: must be in [0, 1)")
        for name in ("weight_decay", "learning_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"--{name.replace('_', '-')} {value}: must not be negative")


def choose_precision(wanted: str) -> str:
    """auto: bf16 where the GPU computes in it, else fp16 on a GPU, else fp32."""
    has_gpu = torch.cuda.is_available()
    if wanted == "fp16" and not has_gpu:
        raise ValueError("--precision fp16: needs a GPU; pass fp32 or bf16")
    if wanted != "auto":
        return wanted
    if not has_gpu:
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def check_reporting(report_to: str) -> None:
    if report_to != "none" and not find_spec(report_to):
        raise ValueError(f"--report-to {report_to}: pip install {report_to} first, or pass none")


@dataclass
class TaskData:
    """The records of a task by split, and the model rows made of them."""

    records: Mapping[str, Sequence[Mapping]]
    encoded: Mapping[str, EncodedSplit]
    collator: Callable


def encode_data(task: FinetuningTask, records: Mapping[str, Sequence[Mapping]], tokenizer, *, max_length: int):
    """Rows of the training and validation splits; those of the test split are made when they are needed."""
    encoded = {
        split: task.encode_split(records[split], tokenizer, max_length=max_length, training=split == "train")
        for split in ("train", "validation")
    }
    if not encoded["train"].rows:
        raise InputError(f"{task.name}: no training record could be encoded")
    return TaskData(records, encoded, task.collator(tokenizer))


class SeedTrainer(Trainer):
    """Trainer that scores with the task's own metrics and can save models whose tensors have several names."""

    def __init__(self, *, task: FinetuningTask, data: TaskData, precision: str, best_path: Path, **options):
        super().__init__(
            train_dataset=data.encoded["train"].rows,
            eval_dataset=data.encoded["validation"].rows,  # Trainer insists on one
            data_collator=data.collator,
            **options,
        )
        self.task, self.data, self.precision, self.best_path = task, data, precision, best_path
        # The models average their loss over the batch they see, whatever their forward's **kwargs suggest.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Trainer would go on with a loss that is not a number, and with weights that it has spoilt, to the end."""
        result = super().compute_loss(model, inputs, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        if not bool(torch.isfinite(loss)):
            raise Diverged(f"the loss of step {self.state.global_step + 1} is {loss.item()}")
        return result

    def evaluate(self, *_args, **_kwargs) -> dict[str, float]:
        """Official metrics on the validation split; keeps the weights if they are the best so far."""
        encoded, records = self.data.encoded["validation"], self.data.records["validation"]
        batch_size = self.args.per_device_eval_batch_size
        logits = predict_logits(
            self.model, encoded.rows, self.data.collator, batch_size=batch_size, precision=self.precision
        )
        scores = self.task.score(self.task.predict(logits, encoded, records), records)
        history = dev_history(self.state.log_history)
        if scores[self.task.main_metric] > max((e[self.task.main_metric] for e in history), default=-math.inf):
            save_weights(self.model, self.best_path)
        metrics = {f"eval_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Trainer writes safetensors, which cannot hold shared matrices of a model that is no PreTrainedModel."""
        save_weights(self.model, Path(output_dir) / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(model or self.model, Path(resume_from_checkpoint) / WEIGHTS)


def last_complete_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint whose last file was written whole; one that a kill has cut short is removed."""
    while (name := get_last_checkpoint(str(directory)) if directory.is_dir() else None) is not None:
        try:
            json.loads((Path(name) / STATE).read_text())
            return Path(name)
        except (OSError, ValueError):
            shutil.rmtree(name)
    return None


def training_arguments(
    settings: Settings, directory: Path, *, seed: int, batch_size: int, grad_acc_steps: int, report_to: str
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(directory / CHECKPOINTS),
        run_name=str(directory),
        seed=seed,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=grad_acc_steps,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        num_train_epochs=settings.num_epochs,
        max_steps=settings.max_steps or -1,
        warmup_steps=WARMUP_SHARE,
        train_sampling_strategy="group_by_length",
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        logging_nan_inf_filter=False,
        save_total_limit=1,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),  # bf16 is refused on a CPU unless it is asked for
        dataloader_pin_memory=torch.cuda.is_available(),
        bf16=settings.precision == "bf16",
        fp16=settings.precision == "fp16",
        disable_tqdm=True,
        report_to="none" if report_to == "tensorboard" else report_to,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # Trainer would multiply the batch by the number of visible GPUs
    return arguments


def fit_seed(
    model_factory: Callable[[], nn.Module],
    task: FinetuningTask,
    data: TaskData,
    settings: Settings,
    *,
    seed: int,
    directory: Path,
    report_to: str = "none",
) -> list[dict]:
    """Trains one seed in its directory, from its last checkpoint if there is one; returns the dev scores by epoch.

    Afterwards the directory holds `weights.pt`, those of the best epoch. Raises MemoryError if not even a batch of one
    row fits, ValueError if training diverges.
    """
    batch_size, grad_acc_steps = _read_batch(directory, settings)
    while True:
        try:
            return _fit(model_factory, task, data, settings, seed=seed, directory=directory, report_to=report_to,
                        batch_size=batch_size, grad_acc_steps=grad_acc_steps)  # fmt: skip
        except Diverged as error:
            raise InputError(
                f"{task.name} seed {seed}: {error}; pass a lower --learning-rate than {settings.learning_rate:g}"
                + (" or --precision fp32" if settings.precision != "fp32" else "")
                + "; the seed is not finished, and nothing is predicted"
            ) from error
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if batch_size == 1:
                raise MemoryError(f"{task.name}: out of memory even with one row; lower --max-length") from error
        free_memory()
        batch_size, grad_acc_steps = (batch_size + 1) // 2, grad_acc_steps * 2
        tqdm.write(
            f"{task.name} seed {seed}: out of memory, starting it again with --batch-size {batch_size} "
            f"--grad-acc-steps {grad_acc_steps}"
        )
        shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / MEMORY_FILE, json.dumps([batch_size, grad_acc_steps]))


def _read_batch(directory: Path, settings: Settings) -> tuple[int, int]:
    """The batch size and accumulation that fitted into memory before, or those of the settings."""
    try:
        batch_size, grad_acc_steps = map(int, json.loads((directory / MEMORY_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return settings.batch_size, settings.grad_acc_steps
    return batch_size, grad_acc_steps


def tensorboard_callback(directory: Path) -> TensorBoardCallback:
    """Trainer's own would write among the checkpoints, which go when the seed is finished."""
    from torch.utils.tensorboard import SummaryWriter

    return TensorBoardCallback(SummaryWriter(str(directory)))


def _fit(model_factory, task, data, settings, *, seed, directory, report_to, batch_size, grad_acc_steps) -> list[dict]:  # noqa: PLR0913 (options of a training)
    arguments = training_arguments(
        settings, directory, seed=seed, batch_size=batch_size, grad_acc_steps=grad_acc_steps, report_to=report_to
    )
    checkpoint = last_complete_checkpoint(directory / CHECKPOINTS)
    if checkpoint is not None:
        state = json.loads((checkpoint / STATE).read_text())
        history = dev_history(state["log_history"])
        if not all(math.isfinite(entry["loss"] or 0.0) for entry in history):
            raise Diverged("its loss was not a finite number before it was interrupted")
        done = state["global_step"] >= state["max_steps"]
        if done or out_of_patience(history, task.main_metric, settings.early_stopping_patience):
            return history
        tqdm.write(f"{task.name} seed {seed}: goes on after epoch {history[-1]['epoch']:g}")
    callbacks = [EpochLines(task, seed=seed, patience=settings.early_stopping_patience)]
    if report_to == "tensorboard":
        callbacks.append(tensorboard_callback(directory / "tensorboard"))
    set_seed(seed)
    trainer = SeedTrainer(
        model=model_factory(),
        args=arguments,
        task=task,
        data=data,
        precision=settings.precision,
        best_path=directory / WEIGHTS,
        callbacks=callbacks,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return dev_history(trainer.state.log_history)
