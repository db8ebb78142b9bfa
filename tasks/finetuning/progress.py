"""Dev scores by epoch, read from the Trainer's log, and what the terminal shows of them."""

import time
from collections.abc import Mapping, Sequence

from tqdm import tqdm
from transformers import TrainerCallback

from src.console import format_seconds
from tasks.finetuning.base import FinetuningTask


def dev_history(log_history: Sequence[Mapping]) -> list[dict]:
    """One entry an epoch: epoch, training loss, and the dev scores by their names."""
    history, loss = [], None
    for entry in log_history:
        loss = entry.get("loss", loss)
        scores = {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
        if scores:
            history.append({"epoch": entry["epoch"], "loss": loss, **scores})
    return history


def best_index(history: Sequence[Mapping], metric: str) -> int:
    """The first of the best epochs."""
    return max(range(len(history)), key=lambda i: (history[i][metric], -i))


def out_of_patience(history: Sequence[Mapping], metric: str, patience: int | None) -> bool:
    return patience is not None and bool(history) and len(history) - 1 - best_index(history, metric) >= patience


class EpochLines(TrainerCallback):
    """A progress bar, one line an epoch, and the early stop; all from the state, so it goes on after a resume."""

    def __init__(self, task: FinetuningTask, *, seed: int, patience: int | None):
        self.task, self.seed, self.patience, self.bar = task, seed, patience, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=f"{self.task.name} seed {self.seed}",
                        unit="step", leave=False, disable=None)  # fmt: skip
        self.started, self.first_step = time.monotonic(), state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_evaluate(self, args, state, control, **kwargs):
        history, metric = dev_history(state.log_history), self.task.main_metric
        best = best_index(history, metric)
        entry = history[-1]
        scores = ", ".join(f"{name} {entry[name]:.4f}" for name in shown_metrics(self.task, entry))
        spent = time.monotonic() - self.started
        left = spent / max(1, state.global_step - self.first_step) * (state.max_steps - state.global_step)
        tqdm.write(
            f"{self.task.name} seed {self.seed}  epoch {entry['epoch']:.3g}/{args.num_train_epochs:g}  "
            f"loss {entry['loss']:.4f}  dev {scores}  (best {metric} {history[best][metric]:.4f}, "
            f"epoch {history[best]['epoch']:.3g})  {format_seconds(left)} left"
        )
        control.should_training_stop |= out_of_patience(history, metric, self.patience)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def shown_metrics(task: FinetuningTask, scores: Mapping) -> list[str]:
    """The metrics worth a place in a line: the main one and two others."""
    names = [name for name in scores if name not in ("epoch", "loss", task.main_metric) and "/" not in name]
    return [task.main_metric, *names[:2]]
