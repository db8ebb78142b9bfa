"""The callback steps with the swarm, keeps bad numbers out of it, reports epochs, backs up, and stops when told."""

import dataclasses
import io
import math
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl

from src.metrics.history import THIS_PEER, RunHistory
from src.metrics.journal import read_journal
from src.metrics.records import Round, StateDownload
from src.swarm import join as swarm
from src.swarm.dht import fetch_metrics, store_checkpoint_epoch
from src.swarm.rounds import GIVEN_UP
from src.trainer import backup, hand_over
from src.trainer import callback as callback_module
from src.trainer.backup import read_backup, save_backup
from src.trainer.epoch_report import describe_incomplete
from src.trainer.hf_trainer import LossScaler
from tests.reference.clock import Clock
from tests.reference.fake_swarm import FakeOptimizer, make_trainer, stack, tiny_items, tiny_model

SAMPLES_PER_EPOCH = 8  # two local steps of 4


def journal_of(folder, event: str) -> list[dict]:
    return [record for record in read_journal(folder / "metrics.jsonl") if record["event"] == event]


def said_by(callback) -> str:
    return callback.report.progress.stream.getvalue()


def make_callback(folder, optimizer=None, **options):
    """A callback alone, as it is after the start of training."""
    callback = make_trainer(folder, optimizer or FakeOptimizer(tiny_model()), **options)[1]
    run(callback.on_train_begin)
    return callback


def run(event) -> TrainerControl:
    """Call a callback's event as Trainer does; returns what it wants Trainer to do."""
    control = TrainerControl()
    event(None, None, control)
    return control


def local_step(callback, *, poison: float | None = None, samples: int = 4) -> TrainerControl:
    """What Trainer does in a step: backward, the events around its optimizer, and resetting gradients."""
    model = callback.backups.model
    loss = model(**stack(tiny_items(samples))).loss
    (loss if callback.buffers.scaler is None else loss * callback.buffers.scaler.scale).backward()
    if poison is not None:
        callback.parameters[3].grad.view(-1)[0] = poison
    callback.meter.unreported_samples += samples
    callback.meter.samples += samples
    callback.meter.mini_steps += 1
    run(callback.on_pre_optimizer_step)
    run(callback.on_optimizer_step)
    model.zero_grad(set_to_none=True)
    return run(callback.on_step_end)


# -- steps ------------------------------------------------------------------------------------------------------------


def test_callback_under_the_real_trainer_writes_one_record_an_epoch(tmp_path):
    optimizer = FakeOptimizer(tiny_model(), samples_per_epoch=SAMPLES_PER_EPOCH)
    trainer, callback = make_trainer(tmp_path, optimizer, max_steps=6)
    trainer.train()
    assert [samples for samples, _ in optimizer.steps] == [4] * 6
    records = journal_of(tmp_path, "epoch")
    assert [record["epoch"] for record in records] == [1, 2, 3]
    for record in records:
        assert record["samples"] == SAMPLES_PER_EPOCH
        assert record["dropped_samples"] == 0
        assert 4.0 < record["mlm_loss"] < 8.0, "ln(300) is 5.7"
        assert record["loss"] == pytest.approx(record["mlm_loss"] + record["sop_loss"], rel=1e-4)
    assert [record["learning_rate"] for record in records] == pytest.approx([0.5 / 2, 0.5 / 3, 0.5 / 4])
    assert len(journal_of(tmp_path, "round")) == 3
    assert said_by(callback).count("averaged with 2 peers") == 3
    assert fetch_metrics(callback.swarm.dht, "fake")[b"key"].epoch == 3
    (memory,) = journal_of(tmp_path, "memory")
    assert memory["epoch"] == 1 and memory["main"] > 100, "MB, and not again within 30 s"


def test_callback_stores_sums_over_forward_passes_in_the_dht(tmp_path):
    callback = make_callback(tmp_path)
    callback_round = Round("gradients", 1.0, num_peers=2, received=0.5, bytes_sent=1000, bytes_received=700)
    for loss in (2.0, 4.0):
        callback.meter.loss += loss
        callback.meter.mlm_loss += loss - 0.5
        callback.meter.sop_loss += 0.5
        callback.report.rounds.append(callback_round)
        local_step(callback)
    stored = dict(callback.swarm.dht.records["fake_metrics"][b"key"].value)
    assert 0.0 <= stored.pop("computing") <= 1.0, "how much of it is tested with a clock"
    assert stored == {"epoch": 1, "samples_per_second": 2.5, "samples": 8, "loss": 6.0, "mlm_loss": 5.0,
                      "sop_loss": 1.0, "mini_steps": 2, "failed_rounds": 2, "total_samples": 8, "lone_epochs": 0,
                      "bytes_sent": 2000, "bytes_received": 1400,
                      "failure": describe_incomplete(callback_round)}  # fmt: skip
    (record,) = journal_of(tmp_path, "epoch")
    assert (record["loss"], record["bytes_sent"], record["bytes_received"]) == (3.0, 2000, 1400)
    assert callback.meter.loss == 0.0
    for _ in range(2):
        local_step(callback)
    metrics = fetch_metrics(callback.swarm.dht, "fake")[b"key"]
    assert (metrics.samples, metrics.total_samples, metrics.failure) == (8, 16, "")
    assert (metrics.bytes_sent, metrics.bytes_received) == (2000, 1400), "since the start"


def test_callback_reports_a_long_reason_cut_to_what_the_swarm_accepts(tmp_path):
    callback = make_callback(tmp_path)
    callback.report.rounds.append(Round("gradients", 1.0, error="x" * 1000))
    for _ in range(2):
        local_step(callback)
    assert len(fetch_metrics(callback.swarm.dht, "fake")[b"key"].failure) == 200


def test_callback_gives_gradient_buffers_back_as_they_were(tmp_path):
    callback = make_callback(tmp_path)
    local_step(callback)
    buffers = [parameter.grad for parameter in callback.parameters]
    before = [gradient.clone() for gradient in buffers]
    run(callback.on_optimizer_step)
    assert all(parameter.grad is None for parameter in callback.parameters), "Trainer would reset them"
    run(callback.on_step_end)
    for parameter, buffer, content in zip(callback.parameters, buffers, before, strict=True):
        assert parameter.grad is buffer
        assert torch.equal(buffer, content)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_callback_drops_gradients_that_are_not_finite(tmp_path, poison, caplog):
    optimizer = FakeOptimizer(tiny_model(), samples_per_epoch=12, reuse_grad_buffers=False)
    callback = make_callback(tmp_path, optimizer)
    local_step(callback)
    local_step(callback, poison=poison)
    local_step(callback)
    assert [samples for samples, _ in optimizer.steps] == [4, 4]
    assert callback.meter.dropped == 4
    assert optimizer.grad_averager.local_samples_accumulated == 8
    assert "dropped 4 samples" in caplog.text
    for _, gradients in optimizer.steps:
        assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())


def test_callback_drops_the_whole_epoch_so_far_when_reused_buffers_are_spoilt(tmp_path):
    optimizer = FakeOptimizer(tiny_model(), samples_per_epoch=12)
    callback = make_callback(tmp_path, optimizer)
    local_step(callback)
    clean = {name: gradient.clone() for name, gradient in optimizer.steps[0][1].items()}
    local_step(callback)
    local_step(callback, poison=math.nan)
    assert callback.meter.dropped == 12
    assert optimizer.grad_averager.local_samples_accumulated == 0
    assert optimizer.tracker.reported[-1] == (0, 0), "the swarm must not count on them"
    local_step(callback)
    assert optimizer.local_epoch == 0
    for name, gradient in optimizer.steps[-1][1].items():
        torch.testing.assert_close(gradient, clean[name], msg=name)


def test_callback_counts_what_is_given_up_for_the_state_of_a_peer(tmp_path):
    optimizer = FakeOptimizer(tiny_model(), samples_per_epoch=1000)
    callback = make_callback(tmp_path, optimizer)
    local_step(callback)

    def step_and_download(batch_size):
        optimizer.state_averager.local_epoch = 7
        optimizer.downloads.append(StateDownload(from_epoch=0, to_epoch=7, seconds=1.5, lost_samples=4))

    optimizer.step = step_and_download
    local_step(callback)
    (download,) = journal_of(tmp_path, "state_download")
    assert (download["from_epoch"], download["to_epoch"], download["lost_samples"]) == (0, 7, 8), (
        "the batch is lost, too"
    )
    (epoch,) = journal_of(tmp_path, "epoch")
    assert (epoch["epoch"], epoch["samples"], epoch["dropped_samples"], epoch["state_downloads"]) == (7, 0, 8, 1)
    assert "took its state of epoch 7 in 2 s and gave up 8 samples of epoch 1" in said_by(callback)


def test_callback_says_what_is_given_up_when_another_swarm_is_ahead(tmp_path):
    optimizer = FakeOptimizer(tiny_model(), epoch=4)
    callback = make_callback(tmp_path, optimizer)
    local_step(callback)
    local_step(callback)
    assert optimizer.local_epoch == 5

    def step_and_download(batch_size):
        optimizer.state_averager.local_epoch = 70
        optimizer.downloads.append(StateDownload(5, 70, seconds=1.5, lost_samples=4, was_apart=True))

    optimizer.step = step_and_download
    local_step(callback)
    assert (
        "two swarms of this run have met: took the state of epoch 70 of the one that is ahead, and gave up this one's "
        "epoch 5, with what it had learned apart (epochs: 1 at most; samples since: 8)" in said_by(callback)
    )


def test_callback_says_that_a_newer_state_replaces_the_backup_s(tmp_path):
    optimizer = FakeOptimizer(tiny_model(), epoch=4)
    callback = make_trainer(tmp_path, optimizer)[1]
    callback.peer.initial_peers = ["/ip4/203.0.113.5/tcp/1/p2p/Qm"]

    def download():
        optimizer.state_averager.local_epoch, optimizer.state_averager.has_taken_state = 9, True

    optimizer.load_state_from_peers = download
    run(callback.on_train_begin)
    assert "joined at epoch 9; its state replaces the backup's of epoch 4, 5 behind" in said_by(callback)


def test_callback_records_how_long_the_swarm_kept_it_waiting(tmp_path, monkeypatch):
    clock, optimizer = Clock(), FakeOptimizer(tiny_model())
    monkeypatch.setattr("src.trainer.callback.time", clock)
    monkeypatch.setattr("src.trainer.epoch_report.time", clock)
    callback, step = make_callback(tmp_path, optimizer), optimizer.step

    def wait_and_step(batch_size):
        clock.advance(0.3 if len(optimizer.steps) % 2 else 0.1)
        step(batch_size)

    optimizer.step = wait_and_step
    for _ in range(4):
        clock.advance(0.3)
        local_step(callback)
    for record in journal_of(tmp_path, "epoch"):
        assert (record["longest_wait"], record["waited_seconds"]) == (0.3, 0.4)
    assert fetch_metrics(callback.swarm.dht, "fake")[b"key"].computing == 0.6


def test_callback_counts_rounds_that_failed_and_rounds_that_were_partial(tmp_path):
    optimizer = FakeOptimizer(tiny_model())
    callback = make_callback(tmp_path, optimizer)
    optimizer.rounds = [Round("gradients", 1.0, error="no group"), Round("parameters", 1.0, num_peers=2, received=0.5)]
    local_step(callback)
    local_step(callback)
    local_step(callback)
    local_step(callback)
    counts = [(record["failed_rounds"], record["partial_rounds"]) for record in journal_of(tmp_path, "epoch")]
    assert counts == [(1, 1), (0, 0)]


def test_callback_reports_nothing_when_no_sample_was_computed(tmp_path):
    callback = make_callback(tmp_path)
    run(callback.on_pre_optimizer_step)
    assert callback.optimizer.steps == []


def test_callback_halves_the_loss_scale_after_an_overflow(tmp_path):
    scaler = LossScaler(scale=1024.0)
    callback = make_callback(tmp_path, scaler=scaler)
    local_step(callback, poison=math.inf)
    assert scaler.scale == 512.0
    assert callback.optimizer.steps == []


# -- the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_steps", [1, 5])
def test_callback_lets_max_steps_stop_the_trainer_and_writes_a_backup(tmp_path, max_steps):
    optimizer = FakeOptimizer(tiny_model())
    make_trainer(tmp_path, optimizer, max_steps=max_steps)[0].train()
    assert len(optimizer.steps) == max_steps
    assert read_backup(tmp_path / "backup.pth")["epoch"] == max_steps // 2


def test_callback_stops_the_trainer_at_total_steps(tmp_path):
    optimizer = FakeOptimizer(tiny_model())
    make_trainer(tmp_path, optimizer, total_steps=3)[0].train()
    assert optimizer.local_epoch == 3
    assert len(optimizer.steps) == 6


def test_callback_stops_the_trainer_when_asked_to(tmp_path):
    optimizer = FakeOptimizer(tiny_model())
    trainer, callback = make_trainer(tmp_path, optimizer)
    step = optimizer.step

    def step_and_stop(batch_size):
        step(batch_size)
        if len(optimizer.steps) == 3:
            callback.stop.set()

    optimizer.step = step_and_stop
    trainer.train()
    assert len(optimizer.steps) == 3
    assert (tmp_path / "backup.pth").exists()


def test_callback_stops_in_the_middle_of_a_long_local_step(tmp_path):
    """With many batches a step it may take longer than the ten seconds that leaving may take."""
    optimizer = FakeOptimizer(tiny_model())
    trainer, callback = make_trainer(tmp_path, optimizer, gradient_accumulation_steps=8)
    batches = []

    def count(*args):
        batches.append(1)
        if len(batches) == 3:
            callback.stop.set()

    optimizer.model.register_forward_pre_hook(count)
    trainer.train()
    assert len(batches) == 3 and not optimizer.steps
    assert (tmp_path / "backup.pth").exists()


def test_callback_that_was_asked_to_stop_begins_no_further_round(tmp_path):
    """The end of an epoch is a wait for partners."""
    callback = make_callback(tmp_path)
    local_step(callback)
    callback.stop.set()
    assert local_step(callback).should_training_stop
    assert len(callback.optimizer.steps) == 1 and callback.optimizer.local_epoch == 0


def test_callback_lets_a_delayed_update_finish_before_the_last_backup(tmp_path):
    callback = make_callback(tmp_path)
    averager = callback.optimizer.state_averager
    averager.pending_updates = {"update"}

    def finish(**kwargs):
        assert kwargs == {"apply_delayed_updates": True}
        averager.pending_updates = set()
        with torch.no_grad():
            callback.backups.model.sop_classifier.classifier.bias.fill_(7.0)

    averager.step = finish
    run(callback.on_train_end)
    assert read_backup(callback.backups.path)["model"]["sop_classifier.classifier.bias"].tolist() == [7.0, 7.0]
    assert callback.optimizer.waits, "the last update of a whole run is averaged, too"


def test_callback_does_not_wait_for_partners_after_a_stop(tmp_path):
    callback = make_callback(tmp_path)
    averager = callback.optimizer.state_averager
    averager.pending_updates, given_up = {"update"}, []

    def finish(**kwargs):
        given_up.append(not callback.optimizer.waits)
        averager.pending_updates = set()

    averager.step = finish
    callback.stop.set()
    run(callback.on_train_end)
    assert given_up == [True]


def test_callback_lets_the_last_update_of_a_run_take_longer_unless_it_is_stopped(tmp_path, monkeypatch):
    callback = make_callback(tmp_path, FakeOptimizer(tiny_model(), epoch=3), total_steps=3)
    averager, calls = callback.optimizer.state_averager, []
    averager.pending_updates = {"update"}
    monkeypatch.setattr(callback_module, "WAIT_FOR_PENDING_SECONDS", 0.1)

    def finish(**kwargs):
        calls.append(callback.optimizer.waits)
        if len(calls) == 4:
            callback.stop.set()

    averager.step = finish
    run(callback.on_train_end)
    assert 4 < len(calls) < 10, "0.1 s of waiting would have been a single call"
    assert calls[:4] == [True] * 4 and calls[4:] == [False] * (len(calls) - 4), "nobody is searched for after the stop"


def test_callback_writes_the_last_backup_on_another_thread_while_a_batch_goes_on(tmp_path):
    optimizer = FakeOptimizer(tiny_model(), epoch=4)
    trainer, callback = make_trainer(tmp_path, optimizer)
    in_batch, go_on = threading.Event(), threading.Event()

    def take_long(*args):
        in_batch.set()
        go_on.wait(60)

    optimizer.model.register_forward_pre_hook(take_long)
    training = threading.Thread(target=trainer.train)
    training.start()
    assert in_batch.wait(60)
    callback.stop.set()
    callback.save_last(alone=False)
    assert read_backup(callback.backups.path)["epoch"] == 4
    assert "wrote the backup" in callback.report.progress.stream.getvalue()
    callback.backups._saving.acquire()  # the main thread, just now
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backup, "LAST_SAVE_SECONDS", 0.1)
        callback.save_last(alone=False)
    assert "no further backup" in callback.report.progress.stream.getvalue()
    callback.backups._saving.release()
    go_on.set()
    training.join(60)


def test_callback_is_waited_for_longer_in_a_round_than_in_a_batch(tmp_path):
    callback, late_in_round = make_callback(tmp_path), []
    assert [callback.is_late(seconds) for seconds in (7.0, 9.0, 16.0)] == [False, True, True]
    step = callback.optimizer.step

    def ask_and_step(batch_size):
        late_in_round.extend(callback.is_late(seconds) for seconds in (7.0, 9.0, 14.0, 16.0))
        step(batch_size)

    callback.optimizer.step = ask_and_step
    local_step(callback)
    assert late_in_round == [False, False, False, True]
    assert callback.is_late(9.0)
    run(callback.on_train_end)
    assert not callback.is_late(60.0), "its last backup is written"


def test_callback_writes_no_last_backup_of_a_state_that_is_not_the_runs_yet(tmp_path):
    callback = make_trainer(tmp_path, FakeOptimizer(tiny_model()))[1]
    callback.save_last(alone=True)
    assert not callback.backups.path.exists()


# -- the end of a run -------------------------------------------------------------------------------------------------


def at_the_end(folder, *, stored=(), **options):
    """A callback that has trained the last epoch, 3; auxiliary peers have stored the epochs ``stored``."""
    optimizer = FakeOptimizer(tiny_model(), epoch=3)
    callback = make_callback(folder, optimizer, total_steps=3, **options)
    for number, epoch in enumerate(stored):
        store_checkpoint_epoch(callback.swarm.dht, "fake", b"aux %d" % number, epoch, expiration=60.0)
    return callback


def leaving(callback) -> threading.Thread:
    thread = threading.Thread(target=run, args=(callback.on_train_end,), daemon=True)
    thread.start()
    return thread


def test_callback_waits_at_the_end_until_every_auxiliary_peer_has_stored_the_state(tmp_path):
    callback = at_the_end(tmp_path, stored=(2, 0))
    thread = leaving(callback)
    for number in (0, 1):
        thread.join(0.7)
        assert thread.is_alive(), number
        store_checkpoint_epoch(callback.swarm.dht, "fake", b"aux %d" % number, 3, expiration=60.0)
    thread.join(5.0)
    assert not thread.is_alive()
    assert callback.optimizer.tracker.announced >= 1, "also if it has computed nothing since it was started"
    assert read_backup(callback.backups.path)["epoch"] == 3
    waiting, stored = said_by(callback).splitlines()
    assert waiting.startswith("the run is over: waiting until its state is stored, at most 60 s (Ctrl+C")
    assert stored == "the state of epoch 3 is stored"


@pytest.mark.parametrize(
    ("why", "options"),
    [("nobody stores", {}), ("all is stored", {"stored": (3, 4)})],
)  # fmt: skip
def test_callback_leaves_at_once_at_the_end_when_there_is_nothing_to_wait_for(tmp_path, why, options):
    callback = at_the_end(tmp_path, **options)
    started = time.monotonic()
    run(callback.on_train_end)
    assert time.monotonic() - started < 30, "waiting would take a minute"
    assert "waiting" not in said_by(callback)


def test_callback_that_is_stopped_waits_for_no_checkpoint(tmp_path):
    callback = at_the_end(tmp_path, stored=(0,))
    thread = leaving(callback)
    thread.join(0.7)
    assert thread.is_alive()
    callback.stop.set()
    thread.join(1.0)
    assert not thread.is_alive()
    assert len(said_by(callback).splitlines()) == 1


def test_callback_waits_for_no_checkpoint_before_the_last_epoch(tmp_path):
    callback = make_callback(tmp_path)
    store_checkpoint_epoch(callback.swarm.dht, "fake", b"aux", 0, expiration=60.0)
    started = time.monotonic()
    run(callback.on_train_end)
    assert time.monotonic() - started < 30 and said_by(callback) == "", "waiting would take a minute"


def test_callback_gives_up_waiting_for_a_checkpoint_and_says_where_the_state_is(tmp_path, monkeypatch):
    monkeypatch.setattr(hand_over, "HAND_OVER_SECONDS", 0.2)
    callback = at_the_end(tmp_path, stored=(0,))
    run(callback.on_train_end)
    assert f"nobody has stored the state of the last epoch within 0 s; it is in {callback.backups.path}" in said_by(
        callback
    )


def test_callback_does_not_wait_for_an_auxiliary_peer_that_has_gone(tmp_path):
    callback = at_the_end(tmp_path, stored=(0,))
    thread = leaving(callback)
    thread.join(0.7)
    callback.swarm.dht.records.clear()
    thread.join(5.0)
    assert not thread.is_alive()
    assert "nobody is left to store the state of the last epoch" in said_by(callback)


def test_callback_waits_longer_for_a_larger_state_and_a_slower_connection(tmp_path):
    callback = at_the_end(tmp_path)
    millions = sum(parameter.numel() for parameter in callback.parameters) / 1e6
    swarm, parameters = callback.swarm, callback.parameters
    assert hand_over.hand_over_seconds(swarm, parameters, 0.001) >= 60 + 3 * millions * 4 * 8 / 0.001  # Mbit/s
    assert 60 < hand_over.hand_over_seconds(swarm, parameters, None) < 61


def test_callback_at_the_end_of_a_run_begins_no_round_and_waits_for_no_partner(tmp_path):
    """As when a trainer is started once more to hand the last state over."""
    callback = at_the_end(tmp_path, wait_for_peers=2)
    assert local_step(callback).should_training_stop
    assert callback.optimizer.steps == []


# -- backups and rollback ---------------------------------------------------------------------------------------------


def test_callback_backs_up_every_so_many_epochs_but_never_between_the_halves_of_an_update(tmp_path):
    callback = make_callback(tmp_path)  # every 2 epochs of 2 local steps
    epochs = []
    for number in range(12):
        callback.optimizer.state_averager.pending_updates = {"update"} if number == 3 else set()
        local_step(callback)
        epochs.append(read_backup(callback.backups.path)["epoch"] if callback.backups.path.exists() else None)
    assert epochs == [None, None, None, None, 2, 2, 2, 4, 4, 4, 4, 6]


def test_callback_backs_up_before_an_epoch_ends_when_updates_were_under_way_all_the_time(tmp_path):
    callback = make_callback(tmp_path)
    averager = callback.optimizer.state_averager
    averager.pending_updates = {"update"}
    for _ in range(6):  # epochs of 2 local steps, a backup is due every 2 epochs
        local_step(callback)
    assert not callback.backups.path.exists() and callback.optimizer.local_epoch == 3
    averager.pending_updates = set()
    callback.optimizer.before_epoch_ends()
    assert read_backup(callback.backups.path)["epoch"] == 3


def test_callback_keeps_training_and_the_previous_backup_when_the_disk_is_full(tmp_path, monkeypatch):
    callback = make_callback(tmp_path)
    callback.backups.path.write_bytes(b"previous")

    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(backup, "save_backup", fail)
    for _ in range(4):
        local_step(callback)
    assert callback.backups.path.read_bytes() == b"previous"
    assert said_by(callback).count("backup failed, the previous one is kept: No space left on device") == 1


def test_callback_rolls_parameters_that_are_not_finite_back_to_the_backup(tmp_path):
    optimizer = FakeOptimizer(tiny_model())
    callback = make_callback(tmp_path, optimizer)
    save_backup(callback.backups.path, callback.backups.model, optimizer)
    before = {name: tensor.clone() for name, tensor in callback.backups.model.state_dict().items()}
    local_step(callback)
    spoil_at_next_step(optimizer)
    local_step(callback)
    for name, tensor in callback.backups.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert optimizer.local_epoch == 0
    assert optimizer.num_downloads == 0
    assert "went back to the backup of epoch 0" in said_by(callback)
    assert journal_of(tmp_path, "epoch")[-1]["epoch"] == 1
    local_step(callback)
    local_step(callback)
    assert optimizer.local_epoch == 1, "training goes on"


def test_callback_takes_the_state_of_a_peer_when_there_is_no_backup(tmp_path):
    optimizer = FakeOptimizer(tiny_model(), samples_per_epoch=4)
    callback = make_callback(tmp_path, optimizer)
    optimizer.downloaded_value = 0.25
    spoil_at_next_step(optimizer)
    local_step(callback)
    assert optimizer.num_downloads == 1
    assert all(bool((parameter == 0.25).all()) for parameter in callback.parameters)
    assert "took the state of another peer" in said_by(callback)


def test_callback_never_backs_up_parameters_that_are_not_finite(tmp_path, caplog):
    callback = make_callback(tmp_path)
    save_backup(callback.backups.path, callback.backups.model, callback.optimizer)
    good = callback.backups.path.read_bytes()
    with torch.no_grad():
        callback.parameters[0].view(-1)[5] = math.inf
    run(callback.on_train_end)
    assert callback.backups.path.read_bytes() == good
    assert "no backup written" in caplog.text


def spoil_at_next_step(optimizer) -> None:
    step = optimizer.step

    def step_and_spoil(batch_size):
        step(batch_size)
        optimizer.step = step
        with torch.no_grad():
            optimizer.parameters[0].view(-1)[5] = math.nan

    optimizer.step = step_and_spoil


# -- the start --------------------------------------------------------------------------------------------------------


def test_callback_resumes_from_the_backup(tmp_path):
    saved = tiny_model(seed=1)
    optimizer = FakeOptimizer(tiny_model(seed=2), epoch=0)
    callback = make_trainer(tmp_path, optimizer)[1]
    save_backup(callback.backups.path, saved, FakeOptimizer(saved, epoch=9))
    callback.resume()
    run(callback.on_train_begin)
    assert optimizer.local_epoch == 9
    assert f"resumed from {callback.backups.path} at epoch 9" in said_by(callback)
    for one, other in zip(optimizer.model.state_dict().values(), saved.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert optimizer.num_downloads == 0


@pytest.mark.parametrize(("of_peers", "downloads"), [(8, 0), (9, 1), (10, 1)])
def test_callback_takes_the_state_of_peers_unless_the_backup_is_newer(tmp_path, of_peers, downloads):
    optimizer = FakeOptimizer(tiny_model(), epoch=9)
    callback = make_trainer(tmp_path, optimizer)[1]
    callback.peer.initial_peers = ["/ip4/203.0.113.5/tcp/1/p2p/Qm"]
    optimizer.tracker.global_epoch = of_peers
    run(callback.on_train_begin)
    assert optimizer.num_downloads == downloads


def test_callback_shares_its_state_from_the_start_of_training_on(tmp_path):
    optimizer = FakeOptimizer(tiny_model())
    callback = make_trainer(tmp_path, optimizer)[1]
    callback.resume()
    assert not optimizer.shares_state
    run(callback.on_train_begin)
    assert optimizer.shares_state


class Card:
    """What a run's card says of the weights it began with, and what the others of the run say."""

    def __init__(self, named: str | None, *, confirmed: bool = True):
        self.named, self.confirmed = named, confirmed

    def learn_initial_weights(self) -> str | None:
        return self.named

    def correct_initial_weights(self) -> bool:
        return not self.confirmed


def make_joining(folder, card: Card, **peer):
    optimizer = FakeOptimizer(tiny_model())
    callback = make_trainer(folder, optimizer)[1]
    callback.swarm = dataclasses.replace(callback.swarm, run_card=card)
    vars(callback.peer).update(initial_peers=["/ip4/203.0.113.5/tcp/1/p2p/Qm"], **peer)
    return optimizer, callback


def test_trainer_that_joins_at_the_first_epoch_waits_for_the_weights_the_run_began_with(tmp_path):
    optimizer, callback = make_joining(tmp_path, Card("0123456789abcdef"))
    joining = threading.Thread(target=run, args=(callback.on_train_begin,), daemon=True)
    joining.start()
    joining.join(1.5)
    assert joining.is_alive() and not optimizer.shares_state
    optimizer.downloaded_value = 0.25  # the first trainer has read its data
    joining.join(5.0)
    assert not joining.is_alive() and optimizer.shares_state and not callback.stop.is_set()
    assert optimizer.parameters[0].flatten()[0] == 0.25
    assert said_by(callback).count("waiting for a peer that hands over the weights") == 1


def test_trainer_that_gets_no_weights_stops_and_leaves_no_backup_of_random_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(swarm, "WAIT_FOR_WEIGHTS_SECONDS", 0.0)
    optimizer, callback = make_joining(tmp_path, Card("0123456789abcdef"))
    control = run(callback.on_train_begin)
    run(callback.on_train_end)
    assert control.should_training_stop and not optimizer.shares_state
    assert "no peer has handed over the weights with which this run began (0123456789abcdef)" in said_by(callback)
    assert not callback.backups.path.exists()


@pytest.mark.parametrize("peer", [{}, {"init_checkpoint": "state.pth"}, "backup"])
def test_trainer_that_has_the_weights_of_the_run_waits_for_nobody(tmp_path, peer):
    optimizer, callback = make_joining(tmp_path, Card("0123456789abcdef" if peer else None))
    if peer == "backup":
        save_backup(callback.backups.path, optimizer.model, optimizer)
    else:
        vars(callback.peer).update(peer)
    assert not run(callback.on_train_begin).should_training_stop
    assert optimizer.num_downloads == 1 and optimizer.shares_state


@pytest.mark.parametrize(("epoch", "confirmed", "said"), [(0, True, False), (0, False, True), (5, True, True)])
def test_trainer_with_a_checkpoint_takes_the_state_of_a_run_that_has_begun_and_says_so(
    tmp_path, epoch, confirmed, said
):
    optimizer, callback = make_joining(
        tmp_path, Card("0123456789abcdef", confirmed=confirmed), init_checkpoint="state.pth"
    )
    optimizer.downloaded_value, optimizer.state_averager.local_epoch = 0.25, epoch
    optimizer.tracker.global_epoch = epoch
    run(callback.on_train_begin)
    assert optimizer.parameters[0].flatten()[0] == 0.25
    assert ("its state was taken, not the weights of --init_checkpoint" in said_by(callback)) is said


def test_callback_waits_for_the_trainers_it_was_told_to_wait_for(tmp_path):
    optimizer = FakeOptimizer(tiny_model())
    callback = make_trainer(tmp_path, optimizer, wait_for_peers=2)[1]
    waiting = threading.Thread(target=run, args=(callback.on_train_begin,), daemon=True)
    waiting.start()
    waiting.join(0.7)
    assert waiting.is_alive()
    assert optimizer.tracker.announced >= 1
    optimizer.tracker.global_progress.num_peers = 2
    waiting.join(5.0)
    assert not waiting.is_alive()
    assert said_by(callback).count("waiting for 2 trainers") == 1


@pytest.mark.parametrize("reason", ["stop", "run has begun"])
def test_callback_does_not_wait_longer_than_needed(tmp_path, reason):
    optimizer = FakeOptimizer(tiny_model())
    callback = make_trainer(tmp_path, optimizer, wait_for_peers=2)[1]
    if reason == "stop":
        callback.stop.set()
    else:
        optimizer.tracker.global_epoch = 4
    waiting = threading.Thread(target=run, args=(callback.on_train_begin,), daemon=True)
    waiting.start()
    waiting.join(5.0)
    assert not waiting.is_alive()


def test_callback_lets_the_sequence_length_grow_with_the_epoch(tmp_path):
    callback = make_callback(tmp_path)  # from 16 to 64 in 3 epochs, in multiples of 8
    lengths = [callback.schedule.length.value]
    for _ in range(8):
        local_step(callback)
        lengths.append(callback.schedule.length.value)
    assert lengths == [16, 16, 32, 32, 48, 48, 64, 64, 64]
    assert [record["sequence_length"] for record in journal_of(tmp_path, "epoch")] == [16, 32, 48, 64]


def test_callback_starts_with_the_sequence_length_of_the_epoch_it_resumes_at(tmp_path):
    assert make_callback(tmp_path, FakeOptimizer(tiny_model(), epoch=2)).schedule.length.value == 48


# -- rounds of averaging ----------------------------------------------------------------------------------------------


def test_callback_reports_rounds_that_are_not_complete(tmp_path):
    callback = make_callback(tmp_path)
    callback.optimizer.rounds = [
        Round("gradients", 1.5, num_peers=3, received=0.5, num_lost=1),
        Round("parameters", 30.0, error="no group found"),
        Round("gradients", 1.5, num_peers=3, received=1.0),
        Round("gradients", 1.5, num_peers=3, received=1.0, num_refused=1, reasons=("left out 2 of 2 parts of 12D3",)),
    ]
    local_step(callback)
    assert [record["complete"] for record in journal_of(tmp_path, "round")] == [False, False, True, True]
    assert [record["num_refused"] for record in journal_of(tmp_path, "round")] == [0, 0, 0, 1]
    partial, failed, refused = said_by(callback).splitlines()
    assert refused == "averaging gradients: left out 2 of 2 parts of 12D3"
    assert partial.startswith("averaging gradients was partial: 50.0% of the values came back from 3 peers, 1 failed")
    assert failed == "averaging parameters failed after 30 s: no group found"
    assert describe_incomplete(SimpleNamespace(error="x", kind="gradients", seconds=2.4)).endswith("after 2 s: x")


def test_callback_counts_no_lone_epoch_when_a_search_was_given_up_for_anothers_state(tmp_path):
    optimizer = FakeOptimizer(tiny_model())
    callback = make_callback(tmp_path, optimizer)
    optimizer.rounds = [Round("gradients", 0.1, error=GIVEN_UP), Round("parameters", 0.1, error=GIVEN_UP)]
    for _ in range(2):  # an epoch
        local_step(callback)
    assert journal_of(tmp_path, "lone_epoch") == [] and "alone" not in said_by(callback)
    assert [epoch["failed_rounds"] for epoch in journal_of(tmp_path, "epoch")] == [0]
    assert [one["error"] for one in journal_of(tmp_path, "round")][:2] == [GIVEN_UP, GIVEN_UP]


def test_callback_says_and_counts_epochs_that_were_stepped_alone_although_others_train(tmp_path):
    optimizer = FakeOptimizer(tiny_model())
    callback = make_callback(tmp_path, optimizer)
    optimizer.rounds = [Round("gradients", 65.0, error="no other trainer was ready within 65 s")]
    for _ in range(4):  # two epochs
        local_step(callback)
    (record,) = journal_of(tmp_path, "lone_epoch")
    assert (record["epoch"], record["reason"]) == (0, "no other trainer was ready within 65 s")
    assert "epoch 0 was stepped with this trainer's own gradients alone: no other trainer was ready" in said_by(
        callback
    )
    lines = [line for line in said_by(callback).splitlines() if line.startswith("epoch 1/")]
    assert len(lines) == 1 and "own gradients alone" in lines[0]
    assert [epoch["lone_epochs"] for epoch in journal_of(tmp_path, "epoch")] == [1, 1], "since the start"
    assert callback.swarm.dht.records["fake_metrics"][b"key"].value["lone_epochs"] == 1
    assert RunHistory(read_journal(tmp_path / "metrics.jsonl")).peers[THIS_PEER].lone_epochs == 1


def test_callback_says_that_with_local_steps_nothing_is_lost_where_nothing_was_averaged(tmp_path):
    optimizer = FakeOptimizer(tiny_model())
    callback = make_callback(tmp_path, optimizer)
    optimizer.makes_local_steps, optimizer.inner_steps = True, 5
    optimizer.rounds = [Round("gradients", 65.0, error="no other trainer was ready within 65 s")]
    for _ in range(2):
        local_step(callback)
    assert "epoch 0 was not averaged, what this trainer has learned in it goes into the next round: no" in said_by(
        callback
    )
    (line,) = [line for line in said_by(callback).splitlines() if line.startswith("epoch 1/")]
    assert "samples here in 5 steps" in line and ", not averaged " in line
    assert [epoch["inner_steps"] for epoch in journal_of(tmp_path, "epoch")] == [5]


def test_callback_says_whose_claims_were_not_believed(tmp_path):
    callback = make_callback(tmp_path)
    callback.optimizer.refusals = [("12D3", "it claims epoch 7; at most 2 is possible")]
    local_step(callback)
    (record,) = journal_of(tmp_path, "refusal")
    assert (record["peer"], record["reason"]) == ("12D3", "it claims epoch 7; at most 2 is possible")
    assert said_by(callback).strip() == "ignored what peer 12D3 sent: it claims epoch 7; at most 2 is possible"


PEER = "QmXNjm5MtCwkQxkgxw4AVx3DVPZEmERqvsBixoj4ePPYKd"


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (f"Caught TimeoutError() when communicating to {PEER}", "peer ...ePPYKd returned no averages in time"),
        (f"Caught TimeoutError() when communicating with {PEER}", "sent nothing in time"),
        (f"Caught AllreduceException('{PEER} sent BAD_GROUP_ID') when communicating to {PEER}", "shorten local steps"),
        (f"Caught AllreduceException('peer {PEER} sent 0 parts, but we expected 1') when communicating to {PEER}",
         "ended in the middle of the round"),
        (f"Caught BrokenPipeError(32, 'Broken pipe') when communicating to {PEER}", "lost the connection to peer"),
        (f"Caught ControlFailure('Connect failed. msg=failed to dial') when communicating to {PEER}",
         "lost the connection to peer ...ePPYKd"),
        ("left out 2 of 2 parts of 12D3: not finite", "left out 2 of 2 parts of 12D3: not finite"),
        (f"Caught ValueError('new') when communicating to {PEER}", "ValueError('new')"),
    ],
)  # fmt: skip
def test_callback_explains_a_partial_round_once_in_words(tmp_path, reason, expected):
    callback = make_callback(tmp_path)
    callback.optimizer.rounds = [Round("gradients", 1.5, num_peers=3, received=0.5, reasons=(reason, reason))]
    local_step(callback)
    assert said_by(callback).count(expected) == 1
    assert journal_of(tmp_path, "round")[0]["reasons"] == [reason, reason], "the file has the error itself"


def test_callback_writes_nothing_to_the_terminal_between_epochs_when_output_is_a_file(tmp_path):
    callback = make_callback(tmp_path)
    callback.report.progress.stream = io.StringIO()
    local_step(callback)
    assert said_by(callback) == ""
