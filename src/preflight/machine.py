"""What this machine has to have: memory, shared memory, disk, open files, a key; and the right to upload."""

import copy
import math
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from hivemind.proto import crypto_pb2

from src.models.hub import ASK_SECONDS, LOOK_AT_THE_NETWORK, check_token, give_up_on_silence
from src.models.memory import (
    AUXILIARY_LIBRARIES,
    TRAINER_LIBRARIES,
    Memory,
    largest_batch,
    peer_memory,
    predict_memory,
)
from src.preflight.check import FAILED, OK, WARNING, Check
from src.process.memory import available_memory

MIN_OPEN_FILES = 4096
# Copies of all parameters in shared memory: averaged gradients, averaged parameters with their 8-bit statistics, and a
# state that is handed over, with its own.
SHARED_COPIES = 4
COPIES_OF_MOMENTUM = 2  # of the outer optimizer, and in a state that is handed over
SHARED_MEMORY = Path("/dev/shm")
GPU_LIBRARY_BYTES = 0.5e9


def check_open_files() -> Check:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < MIN_OPEN_FILES:
        return Check("open files", FAILED, f"at most {hard} are allowed, {MIN_OPEN_FILES} are needed",
                     f"raise it: `ulimit -n {MIN_OPEN_FILES}` as root, or in /etc/security/limits.conf")  # fmt: skip
    return Check("open files", OK, "no limit" if hard == resource.RLIM_INFINITY else f"up to {hard}")


@dataclass(frozen=True)
class Workload:
    """The batches that this peer trains on, of ``length`` tokens; an auxiliary peer has none (``batch_size`` 0)."""

    min_8bit_size: int
    batch_size: int = 0
    length: int = 0
    half_precision: bool = False
    optimizer: str = "lamb"
    local_steps: bool = False  # then there is an outer optimizer, too

    @classmethod
    def of(cls, training, *, local_steps: bool = False) -> "Workload":
        """Of a trainer with these arguments."""
        return cls(
            training.min_8bit_size,
            batch_size=training.per_device_train_batch_size,
            length=training.max_sequence_length,
            half_precision=training.fp16 or training.bf16,
            optimizer=training.optimizer,
            local_steps=local_steps,
        )

    def predict(self, config) -> Memory:
        memory = predict_memory(config, batch_size=self.batch_size, **self._options())
        return replace(memory, optimizer=memory.optimizer + self.local_steps * memory.parameters)  # its momentum

    def largest(self, config, budget: float) -> int:
        """The largest batch of this kind for which ``budget`` bytes are enough, beside parameters and gradients."""
        return largest_batch(config, budget=budget, **self._options())

    def _options(self) -> dict:
        return {
            "length": self.length,
            "bf16": self.half_precision,
            "min_8bit_size": self.min_8bit_size,
            "optimizer": self.optimizer,
        }


def check_disk(directory: Path, memory: Memory, *, num_kept: int = 0) -> Check:
    """Space for two backups (the new one is written beside the old one) and ``num_kept`` checkpoints, and the right to
    write there."""
    existing = directory.expanduser().absolute()
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK) or not existing.is_dir():
        return Check("disk", FAILED, f"nothing can be written to {existing}", "choose another --output_dir")
    needed, free = 2 * (memory.parameters + memory.optimizer) + 1e8, shutil.disk_usage(existing).free
    needed += num_kept * memory.parameters
    what = f"backups and {num_kept} checkpoints that are kept" if num_kept else "backups"
    found = f"{free / 1e9:.1f} GB free in {existing}, {needed / 1e9:.1f} GB needed for {what}"
    if free < needed:
        return Check("disk", FAILED, found, "free some space, or choose another --output_dir")
    return Check("disk", OK, found)


def check_shared_memory(model: torch.nn.Module, *, local_steps: bool = False) -> Check:
    """The processes of a peer exchange tensors through a file system in memory. Docker makes it 64 MB small.

    Where it is full, a process ends with a bus error, or waits for ever, in the middle of the run.
    """
    copies = SHARED_COPIES + COPIES_OF_MOMENTUM * local_steps
    name, needed = "shared memory", copies * sum(p.numel() * p.element_size() for p in model.parameters())
    if not SHARED_MEMORY.is_dir():
        return Check(name, OK, f"there is no {SHARED_MEMORY}, so not tested")
    if not os.access(SHARED_MEMORY, os.W_OK):
        return Check(name, FAILED, f"nothing can be written to {SHARED_MEMORY}",
                     f"let this user write there: `chmod 1777 {SHARED_MEMORY}` as root")  # fmt: skip
    free = shutil.disk_usage(SHARED_MEMORY).free
    found = f"{needed / 1e9:.2f} GB are needed in {SHARED_MEMORY}; {free / 1e9:.2f} GB are free"
    if free < needed:
        size = f"{math.ceil(needed / 1e9 + 0.5)}g"
        return Check(name, FAILED, found, f"make it larger: `docker run --shm-size {size}` or `mount -o "
                     f"remount,size={size} {SHARED_MEMORY}`; or use a smaller --model_config_path")  # fmt: skip
    return Check(name, OK, found)


def require_shared_memory(model: torch.nn.Module, *, local_steps: bool = False) -> None:
    """Raises ValueError where `check_shared_memory` fails."""
    check = check_shared_memory(model, local_steps=local_steps)
    if check.state == FAILED:
        raise ValueError(f"too little {check.name}: {check.found}; {check.fix}")


def check_memory(config, workload: Workload, device: torch.device) -> list[Check]:
    """This machine's memory and, if there is one, the GPU's, against what `predict_memory` and `peer_memory` say.

    A GPU holds the model and what a batch needs, this machine the rest: the optimizer, and copies for the swarm. A
    state is taken between two batches.
    """
    needed, available = needed_memory(config, workload, on_gpu=device.type == "cuda"), available_memory()
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        advice = _smaller_batch_for(config, workload, needed["GPU memory"], free)
        return [
            _compare_memory("memory", needed["memory"], available),
            _compare_memory("GPU memory", needed["GPU memory"], free, fix=advice),
        ]
    peer = peer_memory(workload.predict(config), trains=bool(workload.batch_size))
    # a smaller batch helps if what is left of it when a state is taken would fit
    helps = peer.batch > peer.taken and sum(needed["memory"].values()) - peer.batch + peer.taken <= available
    advice = _smaller_batch_for(config, workload, needed["memory"], available) if helps else None
    return [_compare_memory("memory", needed["memory"], available, fix=advice)]


def needed_memory(config, workload: Workload, *, on_gpu: bool) -> dict[str, dict[str, float]]:
    """Bytes at the peak by where ("memory", "GPU memory") and by what they are for."""
    memory, trains = workload.predict(config), bool(workload.batch_size)
    peer = peer_memory(memory, trains=trains)
    computing = {"model and gradients" if trains else "model": memory.parameters + trains * memory.gradients}
    batch = {f"a batch of {workload.batch_size} x {workload.length} tokens": peer.batch} if trains else {}
    libraries = TRAINER_LIBRARIES if trains else AUXILIARY_LIBRARIES
    step = trains * (memory.step + (0 if on_gpu else memory.products))
    copies = 2 + (workload.local_steps and trains)  # one more, from which local steps are measured
    machine = {
        "optimizer": memory.optimizer + step,
        "copies for averaging": copies * memory.parameters,
        "libraries": libraries,
    }
    taken = {"a state that is taken" if trains else "the start, or a checkpoint that is scored": peer.taken}
    if on_gpu:
        on_device = {**computing, **batch, **({"Muon's products": memory.products} if memory.products else {})}
        return {"memory": machine | taken, "GPU memory": {**on_device, "libraries": GPU_LIBRARY_BYTES}}
    return {"memory": {**computing, **(batch if trains and peer.batch > peer.taken else taken), **machine}}


def _smaller_batch_for(config, workload: Workload, parts: dict, available: float) -> Callable[[], str]:
    budget = available - sum(parts.values()) + workload.predict(config).device
    return lambda: smaller_batch(config, workload, budget)


def _compare_memory(name: str, parts: dict, available: float, *, fix: Callable[[], str] | None = None) -> Check:
    """``parts``: bytes by what they are for; ``fix()`` says what to do, if it is not a larger machine."""
    needed = sum(parts.values())
    found = (
        f"{needed / 1e9:.2f} GB are needed ("
        + ", ".join(f"{what} {size / 1e9:.2f}" for what, size in parts.items())
        + f"); {available / 1e9:.2f} GB are free"
    )
    if available < needed:
        other = "use a machine with more memory, or a smaller --model_config_path"
        return Check(name, FAILED, found, other if fix is None else fix())
    if available < 1.1 * needed:  # as exact as the prediction is
        return Check(name, WARNING, found, "that is tight: end other programs, or lower --per_device_train_batch_size")
    return Check(name, OK, found)


def smaller_batch(config, workload: Workload, budget: float) -> str:
    """Which flags make the model and a batch fit into so many bytes."""
    for level in dict.fromkeys((config.activation_memory, "lean", "checkpoint")):
        changed = copy.copy(config)
        changed.activation_memory = level
        size = min(workload.batch_size, workload.largest(changed, budget))
        if size:
            flag = "" if level == config.activation_memory else f"--activation_memory {level} "
            return f"{flag}--per_device_train_batch_size {size} fits (raise --gradient_accumulation_steps instead)"
    return "use a machine with more memory, a smaller --model_config_path, or a lower --max_sequence_length"


def check_uploads(api, repo_id: str) -> Check:
    """Whether this machine's token may upload to the repository."""
    name = f"uploads to {repo_id}"
    give_up_on_silence(ASK_SECONDS)
    try:
        return Check(name, OK, f"the hub knows the token of {check_token(api, repo_id)}")
    except ConnectionError as error:
        return Check(name, WARNING, f"the hub cannot be asked ({error})",
                     f"{LOOK_AT_THE_NETWORK}; each upload is tried again")  # fmt: skip
    except ValueError as error:
        found, _, fix = str(error).partition("; ")
        return Check(name, FAILED, found, fix)


def check_identity(identity_path: str | None) -> Check:
    if identity_path is None:
        return Check("identity", OK, "a new one at each start; --identity_path would keep this peer's address")
    path = Path(identity_path).expanduser()
    if not path.exists():
        return Check("identity", OK, f"{path} will be made")
    try:
        content = path.read_bytes()
        key = crypto_pb2.PrivateKey.FromString(content)
    except OSError as error:
        return Check("identity", FAILED, f"{path}: {error.strerror}", "make the file readable, or name another one")
    except Exception:  # protobuf's own exception
        key = None
    if key is None or not key.data:
        return Check("identity", FAILED, f"{path} does not hold a private key",
                     "restore it from a copy, or move it away: a new one is made, and the address changes")  # fmt: skip
    return Check("identity", OK, f"{path}")
