"""A backup is complete or absent, and brings back all a trainer needs: parameters, statistics, schedule, epoch."""

import multiprocessing
import os
import signal
import threading
import time
import zipfile
from contextlib import ExitStack

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from arguments import CollaborationArguments, HFTrainerArguments, TrainerPeerArguments
from src import LeanAlbertForMaskedLM, files
from src.models.checkpoint import load_checkpoint
from src.optim.lamb import CPULAMB8Bit
from src.optim.local_steps import DIFFERENCES, AnchoredLAMB, LocalWork
from src.swarm.build import make_collaborative_optimizer
from src.trainer import backup
from src.trainer.backup import (
    load_initial_weights,
    read_backup,
    restore_backup,
    save_backup,
    save_last_backup,
    write_atomically,
)
from tests.reference.fake_swarm import FakeOptimizer, tiny_model
from tests.reference.full_disk import file_size_limit
from tests.reference.node import start_node

EPOCH = 7


@pytest.fixture(scope="module", params=["offloaded", "on the model's device", "muon"])
def lone_peer(request, tmp_path_factory):
    """A model and the real optimizer of a swarm of one, as run_trainer.py makes them."""
    dht, identity = start_node("backup")
    offload = request.param != "on the model's device"
    collaboration = CollaborationArguments(
        target_batch_size=8, matchmaking_time=1.0, next_chunk_timeout=2.0, averaging_timeout=10.0,
        offload_optimizer=offload, delay_optimizer_step=offload, delay_grad_averaging=offload,
    )  # fmt: skip
    training = HFTrainerArguments(
        output_dir=str(tmp_path_factory.mktemp("outputs")), use_cpu=True, min_8bit_size=4096,
        warmup_steps=10, num_zero_lr_steps=0, total_steps=100, optimizer="muon" if request.param == "muon" else "lamb",
    )  # fmt: skip
    model, interrupt_handler = tiny_model(), signal.getsignal(signal.SIGINT)
    optimizer = make_collaborative_optimizer(
        model,
        dht,
        peer=TrainerPeerArguments(run_id="backup"),
        collaboration=collaboration,
        training=training,
        identity=identity,
    )
    signal.signal(signal.SIGINT, interrupt_handler)  # hivemind ignores Ctrl+C
    yield model, optimizer
    optimizer.shutdown()
    dht.shutdown()


def optimized_parameters(optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.state_averager.optimizer.param_groups for p in group["params"]]


def copies_of_parameters(model, optimizer) -> list[list[torch.Tensor]]:
    """The places that hold the parameters, each in the optimizer's order: model, inner optimizer, averager."""
    averager = optimizer.state_averager
    with averager.get_tensors() as tensors:
        averaged = [tensor.clone() for tensor in tensors][: len(averager.main_parameters)]
    return [list(averager.main_parameters), optimized_parameters(optimizer), averaged]


def take_steps(optimizer, count: int, *, seed: int) -> None:
    """Let the inner optimizer and its schedule step on random gradients."""
    generator = torch.Generator().manual_seed(seed)
    averager = optimizer.state_averager
    for _ in range(count):
        for parameter in optimized_parameters(optimizer):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        averager.optimizer.step()
        averager.local_epoch += 1
        averager.scheduler.step()
    if averager.offload_optimizer:
        averager._apply_optimizer_parameters_()


def snapshot(model, optimizer) -> tuple[dict, dict]:
    parameters = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = optimizer.state_averager.optimizer.state_dict()["state"]
    return parameters, {
        index: {k: v.clone() if torch.is_tensor(v) else v for k, v in entry.items()} for index, entry in state.items()
    }


def test_backup_restores_all_copies_of_parameters_statistics_epoch_and_learning_rate(lone_peer, tmp_path):
    model, optimizer = lone_peer
    averager, path = optimizer.state_averager, tmp_path / "backup.pth"
    take_steps(optimizer, EPOCH, seed=1)
    epoch, rate = averager.local_epoch, averager.optimizer.param_groups[0]["lr"]
    parameters, statistics = snapshot(model, optimizer)
    save_backup(path, model, optimizer)
    take_steps(optimizer, 3, seed=2)
    assert averager.optimizer.param_groups[0]["lr"] != rate

    assert restore_backup(path, model, optimizer) == epoch == optimizer.local_epoch
    assert averager.optimizer.param_groups[0]["lr"] == rate
    assert optimizer.tracker.local_progress.epoch == epoch
    restored_parameters, restored_statistics = snapshot(model, optimizer)
    for name, tensor in parameters.items():
        assert torch.equal(tensor, restored_parameters[name]), name
    dtypes = set()
    for index, entry in statistics.items():
        for key, value in entry.items():
            restored = restored_statistics[index][key]
            assert torch.equal(value, restored) if torch.is_tensor(value) else value == restored, (index, key)
            dtypes.add(restored.dtype if torch.is_tensor(restored) else None)
    assert torch.uint8 in dtypes
    of_model, *others = copies_of_parameters(model, optimizer)
    for copies in others:
        for one, other in zip(of_model, copies, strict=True):
            assert torch.equal(one, other)


def test_backup_continues_the_run_it_was_taken_from(lone_peer, tmp_path):
    model, optimizer = lone_peer
    take_steps(optimizer, 2, seed=3)
    save_backup(tmp_path / "backup.pth", model, optimizer)
    take_steps(optimizer, 2, seed=4)
    expected, rate = snapshot(model, optimizer)[0], optimizer.state_averager.optimizer.param_groups[0]["lr"]
    take_steps(optimizer, 1, seed=5)
    restore_backup(tmp_path / "backup.pth", model, optimizer)
    take_steps(optimizer, 2, seed=4)
    assert optimizer.state_averager.optimizer.param_groups[0]["lr"] == rate
    for name, tensor in snapshot(model, optimizer)[0].items():
        assert torch.equal(tensor, expected[name]), name


def test_backup_leaves_the_options_to_the_flags_and_says_what_has_changed(tmp_path, caplog):
    def make(*, epoch=0, rate=0.5, **options):
        model = tiny_model(seed=1)
        optimizer = FakeOptimizer(model, epoch=epoch)
        lamb = CPULAMB8Bit(optimizer.parameters, lr=rate, min_8bit_size=4096, **options)
        lamb._opt_called = True
        schedule = LambdaLR(lamb, lambda epoch: 1.0 / (1.0 + epoch))
        vars(optimizer.state_averager).update(optimizer=lamb, scheduler=schedule)
        for _ in range(epoch):
            schedule.step()
        return model, optimizer

    path = tmp_path / "backup.pth"
    model, optimizer = make(epoch=3, rate=0.5, weight_decay=0.01, betas=(0.9, 0.999))
    save_backup(path, model, optimizer)
    model, same = make(rate=0.5, weight_decay=0.01, betas=(0.9, 0.999))
    restore_backup(path, model, same)
    assert same.state_averager.optimizer.param_groups[0]["lr"] == 0.125 and not caplog.records
    model, changed = make(rate=0.25, weight_decay=0.1, betas=(0.8, 0.95))
    assert restore_backup(path, model, changed) == 3
    (group,) = changed.state_averager.optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.0625, 0.1, (0.8, 0.95))
    for change in ("--learning_rate: 0.5 there, 0.25 now", "--weight_decay: 0.01 there, 0.1 now", "--adam_beta1",
                   "the learning rate of its epoch: 0.125 there, 0.0625 now", "the flags hold"):  # fmt: skip
        assert change in caplog.text
    changed.state_averager.scheduler.step()
    assert group["lr"] == 0.05, "the schedule goes on from there"


def test_backup_that_unpacks_to_more_than_its_file_is_refused(tmp_path):
    save_backup(tmp_path / "plain.pth", tiny_model(), FakeOptimizer(tiny_model()))
    with zipfile.ZipFile(tmp_path / "plain.pth") as old, zipfile.ZipFile(tmp_path / "b.pth", "w", 8) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, bytes(entry.file_size))
    with pytest.raises(ValueError, match=r"--state_path: .*b\.pth is truncated or not a backup; .*\(its parts claim"):
        read_backup(tmp_path / "b.pth")


def test_backup_holds_its_parts_and_its_model_loads_like_a_published_checkpoint(tmp_path):
    model, path = tiny_model(seed=1), tmp_path / "run" / "backup.pth"
    save_backup(path, model, FakeOptimizer(model, epoch=EPOCH))
    state = torch.load(path, weights_only=True)
    assert set(state) == {"model", "optimizer", "scheduler", "epoch", "version"}
    assert state["epoch"] == EPOCH
    dtypes = [v.dtype for entry in state["optimizer"]["state"].values() for v in entry.values() if torch.is_tensor(v)]
    assert torch.uint8 in dtypes
    fresh = tiny_model(seed=2)
    load_checkpoint(fresh, path)
    for (name, tensor), other in zip(fresh.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


def test_backup_that_fails_while_writing_leaves_the_previous_one(tmp_path):
    path = tmp_path / "backup.pth"
    path.write_bytes(b"previous")

    def fail(file):
        file.write(b"half of")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"previous"
    assert list(tmp_path.iterdir()) == [path]


def test_backup_on_a_full_disk_raises_the_reason_and_leaves_the_previous_one(tmp_path):
    model, path = tiny_model(seed=1), tmp_path / "backup.pth"
    save_backup(path, model, FakeOptimizer(model, epoch=EPOCH))
    with file_size_limit(path.stat().st_size // 2), pytest.raises(OSError, match="File too large"):
        save_backup(path, model, FakeOptimizer(model, epoch=EPOCH + 1))
    assert read_backup(path)["epoch"] == EPOCH
    assert list(tmp_path.iterdir()) == [path]


def test_backup_is_not_visible_before_it_is_complete_on_disk(tmp_path, monkeypatch):
    path, order = tmp_path / "backup.pth", []
    path.write_bytes(b"previous")
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: order.append(("fsync", path.read_bytes())))

    def write(file):
        file.write(b"new")
        order.append(("write", path.read_bytes()))

    write_atomically(path, write)
    assert order[:2] == [("write", b"previous"), ("fsync", b"previous")]
    assert path.read_bytes() == b"new"


@pytest.fixture(scope="module")
def complete_backup(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("complete") / "backup.pth"
    model = tiny_model()
    save_backup(path, model, FakeOptimizer(model))
    return path.read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_backup_that_is_truncated_is_an_error_of_one_line(complete_backup, tmp_path, share):
    path = tmp_path / "backup.pth"
    path.write_bytes(complete_backup[: int(share * len(complete_backup))])
    with pytest.raises(ValueError, match=r"backup\.pth is truncated") as caught:
        read_backup(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"some text\n", "текст".encode(), b"\x00" * 1000, b"\x80\x02}q\x00.", bytes(range(256))]
)
def test_backup_that_is_another_file_is_an_error_of_one_line(tmp_path, content):
    path = tmp_path / "backup.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"--state_path: .*backup\.pth is ") as caught:
        read_backup(path)
    assert "\n" not in str(caught.value)


def test_backup_that_lacks_a_part_is_refused_by_name(tmp_path):
    torch.save({"model": {}, "epoch": 3}, tmp_path / "state.pth")
    with pytest.raises(ValueError, match="lacks optimizer, scheduler"):
        read_backup(tmp_path / "state.pth")


def test_backup_of_another_model_is_refused_and_changes_nothing(tmp_path):
    model, other = tiny_model(), tiny_model()
    path = tmp_path / "backup.pth"
    other.sop_classifier.classifier = torch.nn.Linear(32, 3)
    save_backup(path, other, FakeOptimizer(other, epoch=EPOCH))
    optimizer = FakeOptimizer(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"of another shape: sop_classifier\.classifier\.weight \(\[3, 32\]"):
        restore_backup(path, model, optimizer)
    assert optimizer.local_epoch == 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# -- the weights a run begins with ------------------------------------------------------------------------------------


def save_in_every_form(model, folder) -> list:
    """The same weights as a published checkpoint, bare, as a trainer's backup, and as an auxiliary peer stores them."""
    torch.save({"model": model.state_dict()}, folder / "state.pth")
    torch.save(model.state_dict(), folder / "bare.pth")
    save_backup(folder / "backup.pth", model, FakeOptimizer(model, epoch=EPOCH))
    model.save_pretrained(folder / "checkpoint")
    return [folder / name for name in ("state.pth", "bare.pth", "backup.pth", "checkpoint")]


def test_initial_weights_are_taken_from_every_form_and_have_one_fingerprint(tmp_path):
    saved, fingerprints = tiny_model(seed=1), set()
    for path in save_in_every_form(saved, tmp_path):
        model = tiny_model(seed=2)
        fingerprints.add(load_initial_weights(model, path))
        for (name, tensor), other in zip(model.state_dict().items(), saved.state_dict().values(), strict=True):
            assert torch.equal(tensor, other), (path, name)
    assert len(fingerprints) == 1 and len(fingerprints.pop()) == 16


def without(state: dict, *names: str) -> dict:
    return {name: tensor for name, tensor in state.items() if not name.startswith(names)}


def not_finite(state: dict) -> dict:
    return {**state, "albert.pooler.bias": torch.full_like(state["albert.pooler.bias"], float("nan"))}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: without(state, "albert.pooler.bias"), ["missing: albert.pooler.bias"]),
        (lambda state: {**state, "albert.more": torch.zeros(2)}, ["unexpected: albert.more"]),
        (lambda state: {**state, "albert.pooler.bias": torch.zeros(3)},
         ["of another shape: albert.pooler.bias ([3], the model has [32])"]),
        (lambda state: {}, ["missing: albert.embeddings.word_embeddings.weight", "more"]),
        (lambda state: {**state, "albert.embeddings.word_embeddings.weight": torch.zeros(305, 16)},
         ["of another shape", '"vocab_size": 305', "--model_config_path", "all peers"]),
        (lambda state: without(state, "albert.pooler", "sop_classifier"),
         ["missing: albert.pooler.weight", "sentence-order head", "pretraining checkpoint"]),
        (not_finite, ["values of albert.pooler.bias are not finite"]),
        (lambda state: [1, 2], ["found neither"]),
        (lambda state: {"model": {"epoch": 3}}, ["found neither"]),
    ],
)  # fmt: skip
def test_initial_weights_that_do_not_fit_are_an_error_of_one_line(tmp_path, change, words):
    torch.save(change(dict(tiny_model(seed=1).state_dict())), tmp_path / "state.pth")
    with pytest.raises(ValueError) as caught:
        load_initial_weights(tiny_model(), tmp_path / "state.pth")
    message = str(caught.value)
    assert message.startswith(f"--init_checkpoint {tmp_path / 'state.pth'}: ") and "\n" not in message
    for word in words:
        assert word in message


def test_initial_weights_of_a_masked_model_alone_are_refused_with_what_to_do(tmp_path):
    LeanAlbertForMaskedLM(tiny_model().config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^--init_checkpoint .*missing: .*pooler.*sentence-order head cannot go on"):
        load_initial_weights(tiny_model(), tmp_path)


@pytest.mark.parametrize("name", ["state.pth", "checkpoint/model.safetensors", "checkpoint"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_initial_weights_in_a_truncated_file_are_an_error_of_one_line(tmp_path, name, share):
    save_in_every_form(tiny_model(), tmp_path)
    path = tmp_path / name
    file = path / "model.safetensors" if path.is_dir() else path
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(ValueError, match="not a complete") as caught:
        load_initial_weights(tiny_model(), path)
    assert str(caught.value).startswith(f"--init_checkpoint {path}: ") and "\n" not in str(caught.value)


def test_initial_weights_that_are_not_there_are_an_error_of_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"^--init_checkpoint .*none\.pth: there is no such file"):
        load_initial_weights(tiny_model(), tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"no model\.safetensors in this directory"):
        load_initial_weights(tiny_model(), tmp_path)


# -- the last backup, on a thread of its own --------------------------------------------------------------------------


def die_holding(lock) -> None:
    """As an averager that is killed in a round."""

    def take():
        lock.acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=take)
    process.start()
    process.join(20)


@pytest.mark.parametrize("reuses_tensors", [True, False])
def test_last_backup_needs_no_lock_that_a_dead_process_holds(tmp_path, reuses_tensors):
    model, path = tiny_model(), tmp_path / "backup.pth"
    optimizer = FakeOptimizer(model, epoch=EPOCH)
    averager = optimizer.state_averager
    averager.reuse_tensors = reuses_tensors
    die_holding(averager.lock_averaged_tensors)

    def step():  # as hivemind's, which locks the tensors, too, if they are the averager's own
        with averager.lock_optimizer, averager.lock_averaged_tensors:
            pass

    if reuses_tensors:
        threading.Thread(target=step, daemon=True).start()
        while not averager.lock_optimizer.locked():
            time.sleep(0.01)
    began = time.monotonic()
    save_last_backup(path, model, optimizer, alone=True)
    assert time.monotonic() - began < backup.LAST_LOCK_SECONDS and read_backup(path)["epoch"] == EPOCH


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    "locks", [["lock_optimizer"], ["lock_averaged_tensors"], ["lock_optimizer", "lock_averaged_tensors"]]
)
def test_last_backup_waits_for_a_thread_that_changes_the_state_but_not_for_ever(tmp_path, monkeypatch, locks, alone):
    monkeypatch.setattr(backup, "LAST_LOCK_SECONDS", 1.0)
    model, path, order = tiny_model(), tmp_path / "backup.pth", []
    optimizer = FakeOptimizer(model, epoch=EPOCH)
    monkeypatch.setattr(backup, "write_atomically", lambda path, write: order.append("written"))
    held, release = threading.Event(), threading.Event()

    def change():
        with ExitStack() as stack:
            for lock in locks:
                stack.enter_context(getattr(optimizer.state_averager, lock))
            held.set()
            release.wait(20)
            order.append("changed")

    threading.Thread(target=change, daemon=True).start()
    held.wait(20)
    with pytest.raises(OSError, match="locked for 1 s"):
        save_last_backup(path, model, optimizer, alone=alone)
    threading.Timer(0.3, release.set).start()
    save_last_backup(path, model, optimizer, alone=alone)
    assert order == ["changed", "written"]


def test_no_backup_waits_for_a_lock_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(backup, "LOCK_SECONDS", 0.2)
    model, path = tiny_model(), tmp_path / "backup.pth"
    optimizer = FakeOptimizer(model, epoch=EPOCH)
    save_backup(path, model, optimizer)
    die_holding(optimizer.state_averager.lock_averaged_tensors)
    with pytest.raises(TimeoutError):
        restore_backup(path, model, optimizer)
    with optimizer.state_averager.lock_optimizer, pytest.raises(TimeoutError):
        save_backup(path, model, optimizer)


@pytest.mark.parametrize("has_stepped", [False, True])
def test_backup_during_a_delayed_update_is_of_one_epoch(lone_peer, tmp_path, has_stepped):
    model, optimizer = lone_peer
    averager, path = optimizer.state_averager, tmp_path / "backup.pth"
    take_steps(optimizer, 2, seed=6)
    epoch, of_epoch = averager.local_epoch, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    averager.local_epoch += 1  # hivemind counts at once, steps later, and copies the result to the model at last
    if has_stepped:
        for parameter in optimized_parameters(optimizer):
            parameter.grad = torch.ones_like(parameter)
        averager.optimizer.step()
        averager.scheduler.step()
    save_last_backup(path, model, optimizer, alone=False)
    state, optimized = read_backup(path), optimized_parameters(optimizer)
    averager.local_epoch = averager.scheduler._step_count - 1
    assert state["epoch"] == epoch + has_stepped
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for main, newest in zip(averager.main_parameters, optimized, strict=True):
        saved = state["model"][names[id(main)]]
        assert torch.equal(saved, newest)
        assert torch.equal(saved, of_epoch[names[id(main)]]) != has_stepped


def test_backup_of_local_steps_holds_the_common_parameters_and_both_optimizers(tmp_path):
    """What was learned since the last common parameters is given up, as gradients are in the other mode."""

    def start(seed: int):
        model = tiny_model(seed)
        optimizer, parameters = FakeOptimizer(model, epoch=3), list(model.parameters())
        anchor = [parameter.detach().clone() for parameter in parameters]
        lamb = AnchoredLAMB(anchor, lr=0.5, outer_learning_rate=0.7, outer_momentum=0.5, min_8bit_size=4096)
        lamb._opt_called = True
        optimizer.state_averager.optimizer = lamb
        optimizer.state_averager.scheduler = LambdaLR(lamb, lambda epoch: 1.0)
        optimizer.state_averager.scheduler._step_count = 4
        optimizer.work = LocalWork(parameters, anchor)
        optimizer.forget_local_work = optimizer.work.forget
        return model, optimizer, lamb, anchor

    model, optimizer, lamb, anchor = start(0)
    for tensor, parameter in zip(anchor, model.parameters(), strict=True):
        tensor.grad = parameter.grad = torch.ones_like(tensor)
    lamb.inner_step(list(model.parameters()))
    optimizer.work.samples += 4
    lamb.contents = DIFFERENCES
    lamb.step()
    save_backup(tmp_path / "backup.pth", model, optimizer)
    other_model, other, other_lamb, other_anchor = start(1)
    with torch.no_grad():
        for parameter in other_model.parameters():
            parameter.add_(1.0)
    other.work.samples += 4
    assert restore_backup(tmp_path / "backup.pth", other_model, other) == 3
    own = zip(anchor, other_anchor, other_model.parameters(), other.work.base, strict=True)
    for number, (tensor, restored, parameter, base) in enumerate(own):
        assert torch.equal(tensor, restored) and torch.equal(tensor, parameter) and torch.equal(tensor, base)
        for name in ("momentum", "state1", "state2"):
            saved, found = lamb.state[tensor][name], other_lamb.state[restored][name]
            assert torch.equal(saved, found) and saved.any(), (number, name)
    assert other.work.weight == 0
