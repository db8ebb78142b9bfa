"""Save and restore a trainer's state: parameters, optimizer statistics, schedule and epoch, in one file."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from src.files import write_atomically
from src.models.checkpoint import fingerprint, load_strictly, read_pytorch, read_state_dict
from src.swarm.optimizer import LeanOptimizer
from src.trainer.gradient_buffers import all_finite
from src.version import VERSION

logger = logging.getLogger(__name__)

LOCK_SECONDS = 30.0  # for a lock that is held for an optimizer's step
LAST_SAVE_SECONDS = 10.0  # for a backup that is being written when another one is wanted at once
LAST_LOCK_SECONDS = 10.0  # the same when the program is about to end
WORD_EMBEDDINGS = "albert.embeddings.word_embeddings.weight"


def load_initial_weights(model: torch.nn.Module, path: Path) -> str:
    """Let a model that is about to train begin with the weights of a checkpoint; returns their fingerprint.

    ``path``: a published state.pth, a trainer's backup, a .safetensors file, or a directory that `from_pretrained`
    opens. Statistics and epochs in it are left aside. Raises ValueError, with what to do, unless every weight fits.
    """
    where = f"--init_checkpoint {path}"
    try:
        state_dict = read_state_dict(path)
    except FileNotFoundError as error:
        raise ValueError(f"{where}: there is no such file or directory") from error
    except OSError as error:
        raise ValueError(f"{where}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).removeprefix(f'{path}: ')}") from error
    try:
        load_strictly(model, state_dict, source=f"{where}: this checkpoint")
    except ValueError as error:
        raise ValueError(f"{error}{_hint(model, state_dict)}") from error
    return fingerprint(model)


def _hint(model: torch.nn.Module, state_dict: dict) -> str:
    """What to do about a checkpoint that does not fit in one of two usual ways."""
    rows, own_rows = (
        next(iter(weights[WORD_EMBEDDINGS].shape), None) if WORD_EMBEDDINGS in weights else None
        for weights in (state_dict, model.state_dict())
    )
    if rows is not None and rows != own_rows:
        return f'; for {rows} tokens, set "vocab_size": {rows} in the file of --model_config_path, for all peers'
    if rows is not None and not any(name.startswith("sop_classifier.") for name in state_dict):
        return "; a model without the sentence-order head cannot go on: pass the pretraining checkpoint it came from"
    return ""


@contextmanager
def held(lock, seconds: float) -> Iterator[None]:
    """A lock, of threads or of processes. Raises TimeoutError, an OSError, when it is not free in time."""
    if not lock.acquire(timeout=seconds):
        raise TimeoutError(f"the optimizer's state has been locked for {seconds:.0f} s")
    try:
        yield
    finally:
        lock.release()


@contextmanager
def at_rest(averager, *, alone: bool) -> Iterator[None]:
    """Let no thread change parameters or statistics meanwhile, wherever each of them is. Raises TimeoutError.

    The averager's process holds the tensors' lock throughout a round, and keeps it locked for ever when it is killed
    then. That is as good as having it: no thread of this process has it, nor gets it. ``alone``: the averager's process
    is gone. Then it keeps from its step, for ever, an optimizer that shares its tensors with the averager.
    """
    shared = averager.lock_averaged_tensors
    give_up_at, has_optimizer, has_shared = time.monotonic() + LAST_LOCK_SECONDS, False, False
    try:
        while not has_optimizer and not (alone and averager.reuse_tensors and _is_held_elsewhere(shared)):
            if time.monotonic() > give_up_at:
                raise TimeoutError(f"the optimizer's state has been locked for {LAST_LOCK_SECONDS:.0f} s")
            has_optimizer = averager.lock_optimizer.acquire(timeout=0.1)
        while not (has_shared or _is_held_elsewhere(shared)):
            if time.monotonic() > give_up_at:
                raise TimeoutError(f"the averager's tensors have been locked for {LAST_LOCK_SECONDS:.0f} s")
            has_shared = shared.acquire(timeout=0.1)
        yield
    finally:
        if has_shared:
            shared.release()
        if has_optimizer:
            averager.lock_optimizer.release()


def _is_held_elsewhere(lock) -> bool:
    """Whether a process, living or dead, holds a lock of `multiprocessing`, and it is not this one."""
    return lock._semlock._is_zero() and lock._semlock._count() == 0


def save_backup(path: Path, model: torch.nn.Module, optimizer: LeanOptimizer) -> None:
    """Write ``{"model", "optimizer", "scheduler", "epoch"}``; ``"model"`` loads like a published checkpoint.

    Raises OSError if it cannot be written.
    """
    with held(optimizer.state_averager.lock_optimizer, LOCK_SECONDS):
        _write_backup(path, model, optimizer)


def save_last_backup(path: Path, model: torch.nn.Module, optimizer: LeanOptimizer, *, alone: bool) -> None:
    """The same on a thread of its own, while the main one may be anywhere: in a batch, in a download, or stuck."""
    with at_rest(optimizer.state_averager, alone=alone):
        _write_backup(path, model, optimizer)


def _write_backup(path: Path, model: torch.nn.Module, optimizer: LeanOptimizer) -> None:
    """While a delayed update is under way, the model and the count of epochs do not belong to the statistics.

    The model gets the optimizer's parameters later, and hivemind counts the epoch before. What belongs to them are the
    optimizer's own parameters and its schedule.
    """
    averager = optimizer.state_averager
    optimized = (parameter for group in averager.optimizer.param_groups for parameter in group["params"])
    newest = {id(main): own for main, own in zip(averager.main_parameters, optimized, strict=True)}
    state = {
        "model": {n: newest.get(id(t), t).detach() for n, t in model.state_dict(keep_vars=True).items()},
        "optimizer": averager.optimizer.state_dict(),
        "scheduler": {key: value for key, value in averager.scheduler.state_dict().items() if key != "lr_lambdas"},
        "version": VERSION,
        "epoch": min(averager.local_epoch, averager.scheduler._step_count - 1),
    }
    write_atomically(path, lambda file: torch.save(state, file))


def read_backup(path: Path) -> dict:
    """The content of a backup. Raises ValueError if the file is truncated or something else."""
    if path.is_dir():
        raise ValueError(f"--state_path: {path} is a directory; name the backup's file")
    try:
        state = read_pytorch(path)
    except ValueError as error:
        message = f"--state_path: {path} is truncated or not a backup; move it away to start without it ({error})"
        raise ValueError(message) from error
    missing = {"model", "optimizer", "scheduler", "epoch"} - set(state if isinstance(state, dict) else ())
    if missing:
        raise ValueError(f"--state_path: {path} is not a trainer's backup: it lacks {', '.join(sorted(missing))}")
    return state


# Of an optimizer's options, those that have a flag, and the rate that the schedule gives at an epoch.
FLAGS = {"initial_lr": "--learning_rate", "betas": "--adam_beta1 and --adam_beta2", "eps": "--adam_epsilon",
         "weight_decay": "--weight_decay", "lr": "the learning rate of its epoch"}  # fmt: skip


def _keep_options(optimizer, scheduler, own: list[dict], saved_schedule: dict, path: Path) -> None:
    """Go on at the saved place of the schedule with this peer's ``own`` options, and say which of them are new."""
    for name in ("last_epoch", "_step_count"):
        setattr(scheduler, name, saved_schedule.get(name, getattr(scheduler, name)))
    changes = {}
    rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    for group, options, (base, factor) in zip(optimizer.param_groups, own, rates, strict=True):
        options["lr"] = base * factor(scheduler.last_epoch)
        for name, flag in FLAGS.items():
            if name in options and name in group and group[name] != options[name]:
                changes[flag] = f"{flag}: {group[name]} there, {options[name]} now"
        group.update(options)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
    if changes:
        logger.warning("%s was written with other settings (%s); the flags hold", path, "; ".join(changes.values()))


@torch.no_grad()
def restore_backup(path: Path, model: torch.nn.Module, optimizer: LeanOptimizer) -> int:
    """Load a backup into the model, the optimizer and the averagers' copies of the parameters; returns its epoch.

    Learning rate, weight decay and the like stay those of the flags, which the run card has told the others.
    """
    state = read_backup(path)
    averager = optimizer.state_averager
    with held(averager.lock_optimizer, LOCK_SECONDS), held(averager.lock_averaged_tensors, LOCK_SECONDS):
        load_strictly(model, state["model"], source=f"--state_path: {path}")
        optimized = (parameter for group in averager.optimizer.param_groups for parameter in group["params"])
        for main_parameter, offloaded in zip(averager.main_parameters, optimized, strict=True):
            if offloaded is not main_parameter:
                offloaded.copy_(main_parameter)
        own = [{name: value for name, value in group.items() if name != "params"}
               for group in averager.optimizer.param_groups]  # fmt: skip
        try:
            averager.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise ValueError(
                f"--state_path: {path}: {error}. Was it written with another --optimizer? Go on with that, or begin "
                "another --run_id with --init_checkpoint"
            ) from error
        _keep_options(averager.optimizer, averager.scheduler, own, state["scheduler"], path)
        averager.local_epoch = state["epoch"]
        optimizer.forget_local_work()
    if not averager.reuse_tensors:
        averager._load_local_tensors_into_averager_()
    optimizer.tracker.report_local_progress(state["epoch"], samples_accumulated=0)
    if not optimizer.client_mode:
        averager.state_sharing_priority = state["epoch"]
        optimizer.grad_averager.state_sharing_priority = state["epoch"]
    return state["epoch"]


class Backups:
    """A trainer's one backup: read at the start, written every ``every`` epochs and at the end.

    ``has_weights``: whether the model holds weights of the run; others are not worth a backup.
    """

    def __init__(self, path: Path, model: torch.nn.Module, optimizer: LeanOptimizer, *, every: int, say: Callable):
        self.path, self.model, self.optimizer, self.every, self.say = path, model, optimizer, every, say
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.has_weights, self.last_epoch = True, -1
        self._saving = threading.Lock()

    def exists(self) -> bool:
        return self.path.exists()

    def restore(self) -> int:
        """Load it; returns its epoch. Raises ValueError if it is damaged or of another model."""
        return restore_backup(self.path, self.model, self.optimizer)

    def save_if_due(self) -> None:
        due = self.optimizer.local_epoch >= self.last_epoch + self.every
        if due and not self.optimizer.state_averager.pending_updates:  # else parameters and epoch would not agree
            self.save()

    @torch.no_grad()
    def save(self) -> None:
        with self._saving:
            self._write(save_backup)

    @torch.no_grad()
    def save_last(self, alone: bool) -> None:
        """On another thread, when the main one may be stuck; see `save_last_backup`."""
        try:
            with held(self._saving, LAST_SAVE_SECONDS):
                self._write(partial(save_last_backup, alone=alone))
        except TimeoutError:
            self.say("no further backup: one was just being written")

    def _write(self, save: Callable) -> None:
        if not self.has_weights:  # the next start would go on from it
            return
        if not all_finite(self.parameters):
            logger.warning("no backup written: parameters are not finite")
            return
        try:
            save(self.path, self.model, self.optimizer)
            if save is not save_backup:
                self.say(f"wrote the backup {self.path}")
        except OSError as error:
            self.say(f"backup failed, the previous one is kept: {error}")
        self.last_epoch = self.optimizer.local_epoch
