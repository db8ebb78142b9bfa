"""What Hugging Face's Trainer must do differently when hivemind owns the optimizer; each change with its reason."""

import logging
import math
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import Trainer

from src.models.transformer import drop_idle_mask
from src.swarm.optimizer import LeanOptimizer

logger = logging.getLogger(__name__)

STOP_PATIENCE_SECONDS = 3.0  # after a stop, a batch that is nearly there is still taken, and the step ended
POLL_SECONDS = 0.2


class NoOptimizer(torch.optim.Optimizer):
    """Stands in for the real optimizer, which steps in `CollaborativeCallback`.

    accelerate copies and casts the state of an optimizer it prepares, which hivemind's background threads use.
    """

    def __init__(self, params):
        super().__init__(params, defaults={"lr": 0.0})

    def step(self, closure=None) -> None:
        """Does nothing."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Does nothing."""


class ReportedSchedule(LRScheduler):
    """Shows Trainer the learning rate of the real optimizer, if this process has it; it never changes one."""

    def __init__(self, optimizer: NoOptimizer, collaborative: LeanOptimizer | None):
        self.collaborative = collaborative
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        rate = 0.0
        if self.collaborative is not None:
            rate = self.collaborative.state_averager.optimizer.param_groups[0]["lr"]
        return [rate for _ in self.optimizer.param_groups]

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state_dict: dict) -> None:
        """There is no state."""


class LossScaler:
    """Dynamic loss scale for float16 (arXiv 1710.03740): halved when gradients overflow, doubled after a long calm.

    torch's GradScaler cannot be used: accelerate hides it from an optimizer that steps outside of Trainer.
    """

    def __init__(self, scale: float = 2.0**16, growth_interval: int = 2000):
        self.scale, self.growth_interval, self.good_steps = scale, growth_interval, 0

    def update(self, finite: bool) -> None:
        """Adapt the scale after a local step whose gradients were ``finite`` or not."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale = max(self.scale / 2, 1.0)
        elif self.good_steps == self.growth_interval:
            self.scale, self.good_steps = self.scale * 2, 0


@dataclass
class LossMeter:
    """Sums over the forward passes of one epoch, and the samples not yet reported to hivemind."""

    loss: float = 0.0
    mlm_loss: float = 0.0
    sop_loss: float = 0.0
    mini_steps: int = 0
    samples: int = 0
    dropped: int = 0
    unreported_samples: int = 0
    unreported_batches: int = 0  # of one local step
    unreported_dropped: int = 0  # of these, batches without a finite loss

    def start_epoch(self) -> None:
        self.loss = self.mlm_loss = self.sop_loss = 0.0
        self.mini_steps = self.samples = self.dropped = 0

    def lose(self, samples: int) -> None:
        """Samples that were counted, and come to nothing after all."""
        self.samples = max(0, self.samples - samples)
        self.dropped += samples

    def take_share(self) -> float:
        """The part of the local step's batches that took part in its gradient, a sum divided by the number of all."""
        batches, dropped = self.unreported_batches, self.unreported_dropped
        self.unreported_batches = self.unreported_dropped = 0
        return (batches - dropped) / batches if batches else 1.0

    def take_samples(self) -> int:
        """Samples since the last call; their gradients lie in the model's buffers."""
        samples, self.unreported_samples = self.unreported_samples, 0
        return samples


class StoppedWaiting(Exception):
    """A stop was asked for while the next batch did not come."""


class StoppableLoader(DataLoader):
    """A DataLoader that a stop does not wait for: text may come from a server that does not answer for minutes.

    Batches are made in a thread of their own, each when it is asked for and none ahead, so that they are those that a
    DataLoader gives at that time. Errors come out as they are.
    """

    def __init__(self, *arguments, stop: threading.Event, **options):
        self.stop = stop
        super().__init__(*arguments, **options)

    def __iter__(self) -> Iterator[dict]:
        batches = super().__iter__()  # on this thread: data workers are forked here
        device = torch.cuda.current_device() if self.pin_memory else None
        requests, answers = queue.SimpleQueue(), queue.SimpleQueue()
        threading.Thread(target=self._fetch, args=(batches, requests, answers, device), daemon=True).start()
        try:
            while True:
                requests.put(True)
                batch, error = self._wait_for(answers)
                if isinstance(error, StopIteration):
                    return
                if error is not None:
                    raise error
                yield batch
        finally:
            requests.put(False)

    @staticmethod
    def _fetch(batches: Iterator[dict], requests: queue.SimpleQueue, answers: queue.SimpleQueue, device) -> None:
        if device is not None:
            torch.cuda.set_device(device)  # each thread has its own; pinned memory belongs to a device
        while requests.get():
            try:
                answers.put((next(batches), None))
            except BaseException as error:  # whatever it is, the thread that trains has to see it
                answers.put((None, error))

    def _wait_for(self, answers: queue.SimpleQueue) -> tuple:
        give_up_at = float("inf")
        while True:
            try:
                return answers.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if self.stop.is_set():
                    give_up_at = min(give_up_at, time.monotonic() + STOP_PATIENCE_SECONDS)
            if time.monotonic() > give_up_at:
                raise StoppedWaiting


class CollaborativeTrainer(Trainer):
    """Computes gradients; everything that concerns the swarm happens in `CollaborativeCallback`.

    ``collaborative`` is None in a process that only follows another one, see `src.trainer.local_workers`. ``stop`` ends
    the wait for a batch, with `StoppedWaiting`.
    """

    def __init__(
        self,
        *,
        collaborative: LeanOptimizer | None,
        meter: LossMeter,
        scaler: LossScaler | None,
        stop: threading.Event | None = None,
        **kwargs,
    ):
        self.meter, self.scaler, self.stop = meter, scaler, stop or threading.Event()
        optimizer = NoOptimizer(kwargs["model"].parameters())
        super().__init__(optimizers=(optimizer, ReportedSchedule(optimizer, collaborative)), **kwargs)
        # the model's loss is a mean over its own batch; Trainer would pass it the sum over several and not divide
        self.model_accepts_loss_kwargs = False
        self.accelerator.scaler = None  # see LossScaler

    def get_train_dataloader(self) -> DataLoader:
        """A plain loader: accelerate's would read the stream once for each process and drop the other's part."""
        return StoppableLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            stop=self.stop,
        )

    def _prepare_inputs(self, inputs: dict) -> dict:
        """On the device, but for a mask that hides nothing, which is looked at here: there one would have to wait."""
        return super()._prepare_inputs(drop_idle_mask(inputs))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The batch's loss; one that is not finite is counted and replaced by zero, so that nothing of it is sent."""
        outputs = model(**inputs)
        loss = outputs.loss
        batch_size = len(inputs.get("sentence_order_label", inputs["input_ids"]))  # packed rows hold several instances
        self.meter.unreported_batches += 1
        parts = (part for part in (loss, outputs.mlm_loss, outputs.sop_loss) if part is not None)
        # All at once: for each number that is asked for, the host waits until the device has nothing left to do.
        value, mlm_loss, *sop_loss = torch.stack([part.detach() for part in parts]).tolist()
        if math.isfinite(value):
            self.meter.loss += value
            self.meter.mlm_loss += mlm_loss
            self.meter.sop_loss += sum(sop_loss)
            self.meter.mini_steps += 1
            self.meter.samples += batch_size
            self.meter.unreported_samples += batch_size
            loss = loss if self.scaler is None else loss * self.scaler.scale
        else:
            self.meter.dropped += batch_size
            self.meter.unreported_dropped += 1
            logger.warning("dropped a batch of %d samples: its loss is %s", batch_size, value)
            if self.args.world_size == 1:
                loss = torch.zeros((), device=loss.device, requires_grad=True)
            # else all ranks must take part in the backward pass; its gradients are not finite on any, and are dropped
        return (loss, outputs) if return_outputs else loss

    def _clip_grad_norm(self, model) -> None:
        """Nothing: the optimizer clips the average over the swarm, and local buffers hold sums over several steps."""

    def _get_grad_norm(self, model, grad_norm=None) -> None:
        """Nothing: Trainer would pass over all gradients, clipping them at infinity, only to log a number."""
