"""Several processes of one peer, one a GPU: rank 0 speaks to the swarm, the others compute gradients and follow it.

Started by ``torchrun --nproc_per_node=N run_trainer.py ...``. DistributedDataParallel gives every rank the mean of all
gradients; rank 0 reports it for the samples of all ranks. After each local step the ranks agree on the epoch and on
whether to stop, and when rank 0's parameters have changed the others get them before their next forward pass.
"""

import os
import threading
from datetime import timedelta

import torch
import torch.distributed
from torch.distributed.rendezvous import rendezvous
from transformers import TrainerCallback, TrainingArguments

from src.trainer.data_schedule import DataSchedule
from src.trainer.gradient_buffers import GradientBuffers
from src.trainer.hf_trainer import LossMeter

METER_FIELDS = ("loss", "mlm_loss", "sop_loss", "mini_steps", "samples", "dropped", "unreported_samples")
MAX_SEED_BYTES = 256


SETTINGS_KEY, LONG = "LeanALBERT settings", timedelta(days=100)  # rank 0 may be waiting for the swarm

_store = None


def _rendezvous():
    """The store through which torchrun's processes find each other, before they have a process group."""
    global _store
    if _store is None:  # rank 0 may be the one that serves it
        _store, _, _ = next(rendezvous("env://", timeout=LONG))
    return _store


def share_settings(settings_hash: str) -> None:
    """On rank 0: tell the other ranks, if there are any, which settings lie in the run's folder now; empty: none."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _rendezvous().set(SETTINGS_KEY, settings_hash)


def await_settings() -> str:
    """On the other ranks: what rank 0 says."""
    return _rendezvous().get(SETTINGS_KEY).decode()


class LocalWorkers:
    """What the ranks of one peer tell each other. All of them must make the same calls in the same order.

    With a ``size`` of one nothing is exchanged and every method returns what it was given.
    """

    def __init__(self, *, rank: int = 0, size: int = 1, device: torch.device | str = "cpu"):
        self.rank, self.size, self.device = rank, size, device
        self._versions: list[int] = []
        self._epoch = -1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def _sum(self, values: list[float]) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)
        return tensor.tolist()

    def share_bytes(self, data: bytes = b"") -> bytes:
        """Up to 256 bytes of rank 0, on all ranks."""
        if self.size == 1:
            return data
        assert len(data) <= MAX_SEED_BYTES, len(data)
        padded = data.ljust(MAX_SEED_BYTES, b"\0") if self.is_main else bytes(MAX_SEED_BYTES)
        length, *shared = self._sum([float(len(data) if self.is_main else 0), *map(float, padded)])
        return bytes(int(byte) for byte in shared)[: int(length)]

    def collect(self, meter: LossMeter) -> None:
        """Move what the other ranks have counted since the last call into rank 0's meter."""
        if self.size == 1:
            return
        values = [0.0 if self.is_main else getattr(meter, name) for name in METER_FIELDS]
        for name, value in zip(METER_FIELDS, self._sum(values), strict=True):
            own = getattr(meter, name)
            setattr(meter, name, type(own)(own + value) if self.is_main else type(own)(0))

    def agree(self, parameters: list[torch.nn.Parameter], *, epoch: int, stop: bool) -> tuple[int, bool, list[float]]:
        """Rank 0's epoch, whether any rank wants to stop, and, if parameters had to follow, a checksum of each rank's.

        They follow when rank 0 has changed them, by operations in place that torch counts, and with each epoch. The
        others' ``epoch`` is ignored.
        """
        if self.size == 1:
            return epoch, stop, []
        versions = [parameter._version for parameter in parameters]
        changed = self.is_main and (versions, epoch) != (self._versions, self._epoch)
        self._versions, self._epoch = versions, epoch
        epoch, changed, stop = self._sum([epoch if self.is_main else 0, changed, stop])
        return int(epoch), stop > 0, self._follow(parameters) if changed else []

    @torch.no_grad()
    def _follow(self, parameters: list[torch.nn.Parameter]) -> list[float]:
        for parameter in parameters:
            torch.distributed.broadcast(parameter.data, src=0)
        checksum = float(sum(parameter.double().abs().sum() for parameter in parameters))
        return self._sum([checksum if rank == self.rank else 0.0 for rank in range(self.size)])


def worker_was_lost(error: Exception) -> bool:
    """Whether an exchange failed because another rank's process is gone."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


class FollowerCallback(TrainerCallback):
    """What a rank other than 0 does beside computing gradients: tell rank 0 its counts, and do as rank 0 does."""

    def __init__(
        self,
        workers: LocalWorkers,
        buffers: GradientBuffers,
        *,
        meter: LossMeter,
        schedule: DataSchedule,
        stop: threading.Event,
    ):
        self.workers, self.buffers, self.meter, self.stop = workers, buffers, meter, stop
        self.schedule = schedule

    def on_train_begin(self, args: TrainingArguments, state, control, **kwargs):
        return self._follow(control)

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Adapt the loss scale as rank 0 does, which sees the same gradients, and report what was computed."""
        if self.buffers.scaler is not None:
            self.buffers.are_finite()
        self.workers.collect(self.meter)

    def on_step_end(self, args, state, control, **kwargs):
        return self._follow(control)

    def _follow(self, control):
        epoch, stop, _ = self.workers.agree(self.buffers.parameters, epoch=0, stop=self.stop.is_set())
        self.schedule.follow(epoch)
        control.should_training_stop = control.should_training_stop or stop
        return control
