"""The weights of a fine-tuned model on disk, and its logits for the rows of a split."""

import contextlib
import gc
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from src.models.checkpoint import read_pytorch
from tasks.finetuning.console import InputError

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Diverged(InputError):
    """A loss or an answer that is not a finite number: nothing that follows from it means anything."""


def save_weights(model: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    torch.save(model.state_dict(), aside)
    aside.replace(path)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Raises ValueError where the file is missing or holds something else."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        return read_pytorch(path)
    except ValueError as error:
        raise InputError(f"{path}: not the weights of a model ({error})") from error


def load_weights(model: nn.Module, path: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Raises ValueError where the file is missing or does not fit the model. weights: what `read_weights` has read."""
    try:
        model.load_state_dict(read_weights(path) if weights is None else weights)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"{path}: not the weights of this model ({' '.join(str(error).split())[:300]})") from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the GPU or, as far as it says so, the CPU had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def free_memory() -> None:
    """Gives memory back: a trainer and its callbacks hold one another, so the model would outlive its last name."""
    gc.collect()
    torch.cuda.empty_cache()


@torch.no_grad()
def predict_logits(
    model: nn.Module, rows: Sequence[dict], collator, *, batch_size: int, precision: str
) -> list[np.ndarray]:
    """The logits of each row, with the padding of its batch; batches of similar length, the longest first.

    Where a batch does not fit into the GPU's memory, smaller ones are tried, down to one row. Raises ValueError if a
    logit is not finite: the largest of such is an answer that means nothing.
    """
    while True:
        try:
            return _predict_logits(model, rows, collator, batch_size=batch_size, precision=precision)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if batch_size == 1:
                raise MemoryError("out of memory even with one row; lower --max-length") from error
        free_memory()
        batch_size = (batch_size + 1) // 2


def _predict_logits(model, rows, collator, *, batch_size, precision) -> list[np.ndarray]:
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: -max_row_length(rows[i]))
    logits: list = [None] * len(rows)
    model.eval()
    for start in range(0, len(rows), batch_size):
        chosen = order[start : start + batch_size]
        batch = collator([{k: v for k, v in rows[i].items() if k != "labels"} for i in chosen])
        with autocast(device, precision):
            outputs = model(**{name: value.to(device) for name, value in batch.items()}).logits
        if not bool(torch.isfinite(outputs).all()):
            raise Diverged("the model's answers are not finite numbers: its weights are damaged, or have diverged")
        for i, row_logits in zip(chosen, outputs.float().cpu().numpy(), strict=True):
            logits[i] = row_logits
    return logits


def max_row_length(row: Mapping) -> int:
    tokens = row["input_ids"]
    return max(map(len, tokens)) if isinstance(tokens, list) else len(tokens)


def autocast(device: torch.device, precision: str):
    dtype = DTYPES[precision]
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)
