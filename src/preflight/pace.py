"""How fast this machine trains: a batch of the run's own, computed and timed."""

import queue
import threading
import time
from collections.abc import Iterator

import torch

from src.preflight.plan import Pace

LONGEST_MEASUREMENT = 60.0  # seconds
SHORT_BATCH = 15.0  # seconds up to which a second batch is timed: the first one also sets up what later ones use


def measure_pace(
    model: torch.nn.Module,
    batches: Iterator[dict],
    *,
    training,
    length: int,
    limit: float = LONGEST_MEASUREMENT,
) -> tuple[Pace | None, str]:
    """The pace of a trainer with these arguments on ``batches`` of texts of up to ``length`` tokens; or why there is
    none. The model's gradients are used up, and what takes longer than ``limit`` seconds goes on in a thread: this is
    for a program that ends afterwards.
    """
    answers = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put(time_batch(model, batches, training=training))
        except Exception as error:  # of the text, of memory, of the device; the run itself would say more
            answers.put(error)

    threading.Thread(target=work, name="timing of a batch", daemon=True).start()
    try:
        answer = answers.get(timeout=limit)
    except queue.Empty:
        return None, f"not measured, a batch takes longer than {limit:.0f} s"
    if isinstance(answer, Exception):
        return None, f"not measured: {' '.join(str(answer).split())[:200]}"
    samples, seconds = answer
    samples *= training.world_size
    return Pace(samples / seconds, seconds * training.gradient_accumulation_steps, length), ""


def time_batch(model: torch.nn.Module, batches: Iterator[dict], *, training) -> tuple[int, float]:
    """Samples of one batch, and seconds to get and compute it."""
    model.train()
    for is_last in (False, True):
        started = time.monotonic()
        samples = compute(model, next(batches), training=training)
        seconds = time.monotonic() - started
        model.zero_grad()
        if is_last or seconds > SHORT_BATCH:
            break
    return samples, seconds


def compute(model: torch.nn.Module, batch: dict, *, training) -> int:
    """Gradients of a batch; returns its samples."""
    device = training.device
    batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
    precision = torch.bfloat16 if training.bf16 else torch.float16
    with torch.autocast(device.type, dtype=precision, enabled=training.bf16 or training.fp16):
        loss = model(**batch).loss
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return len(batch["sentence_order_label"])  # packed rows hold several
