"""Put a trainer together: the model and the data come from its task, all else from here.

``peer``, ``collaboration`` and ``training`` are the parsed arguments of `run_trainer.py`; ``task`` is `tasks.mlm.task`,
or a module with the same functions.
"""

import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback

from arguments import FLAGS, CollaborationArguments, HFTrainerArguments, TrainerPeerArguments, run_settings
from src.metrics.console import Progress
from src.metrics.journal import Journal, claim_run_directory, num_starts
from src.models.fastest import use_cpu_kernels
from src.preflight.check import OK, WARNING
from src.preflight.machine import Workload, check_memory, needed_memory, require_shared_memory
from src.preflight.network import Seen
from src.preflight.pace import measure_pace
from src.preflight.plan import Circumstances, Plan, make_plan
from src.preflight.run import run_checks
from src.process.same_peer import keep_ports, take_up_identity
from src.process.supervisor import install_stop_handler, start_deadline
from src.settings.folder import folder_of, read_folder, says_where_settings_came_from
from src.settings.manifest import Manifest
from src.swarm.at_work import STOP_SECONDS
from src.swarm.join import Entry, Swarm, begin_to_hand_over, join_run, record_start, start_averaging
from src.swarm.run_card import make_run_card
from src.swarm.take_up import words_of
from src.trainer.backup import Backups, load_initial_weights
from src.trainer.callback import CollaborativeCallback
from src.trainer.data_schedule import DataSchedule
from src.trainer.epoch_report import EpochReport
from src.trainer.gradient_buffers import GradientBuffers
from src.trainer.hf_trainer import CollaborativeTrainer, LossMeter, LossScaler, StoppedWaiting
from src.trainer.local_workers import FollowerCallback, LocalWorkers, await_settings, worker_was_lost
from src.trainer.outlook import Outlook


@dataclass
class TrainerProgram:
    """All that a running trainer consists of."""

    trainer: CollaborativeTrainer
    callback: CollaborativeCallback
    swarm: Swarm
    journal: Journal
    outlook: Outlook
    manifest: Manifest | None


def check(
    peer: TrainerPeerArguments, collaboration: CollaborationArguments, training: HFTrainerArguments, *, task, say
) -> int:
    """Test this machine's set-up without joining in training; returns the exit code."""

    def make_model():
        model, tokenizer = build_model(peer, training, task)
        task.check_sequence_length(model, training.max_sequence_length)
        if peer.init_checkpoint is not None:
            settings["init_checkpoint"] = load_initial_weights(model, Path(peer.init_checkpoint).expanduser())
        return model, tokenizer

    def plan(built, data, seen: Seen, fits: bool) -> Plan:
        model, tokenizer = built
        pace, why = None, "not measured, since it does not fit into memory"
        text = None if data is None else task.look_at_text(tokenizer, data[0], num_readers=num_readers(training))
        if data is not None and fits:
            dataset, collator, schedule = data
            schedule.length.value = training.max_sequence_length
            model.to(training.device)
            batches = iter(DataLoader(dataset, training.per_device_train_batch_size, collate_fn=collator))
            pace, why = measure_pace(model, batches, training=training, length=training.max_sequence_length)
        now = Circumstances(
            num_trainers=1 + seen.num_trainers,
            pace=pace,
            others_per_second=seen.samples_per_second,
            bandwidth=peer.bandwidth if isinstance(peer.bandwidth, float) else seen.bandwidth,
            epoch=seen.epoch,
            text=text,
            num_readers=num_readers(training),
            why_no_pace=why,
        )
        return plan_for(model.config, settings, training)(now)

    settings = run_settings(peer, collaboration, training)
    return run_checks(
        peer,
        output_dir=training.output_dir,
        device=training.device,
        workload=workload_of(settings, training),
        build_model=make_model,
        make_card=partial(make_run_card, settings=settings, trainer=True),
        read_data=lambda tokenizer: task.build_data(tokenizer, peer, training, peer_seed=b"check"),
        plan=plan,
        fastest=collaboration.target_batch_size,
        say=say,
    )


def build_model(peer: TrainerPeerArguments, training: HFTrainerArguments, task) -> tuple:
    """The model that this trainer begins with, and its tokenizer."""
    use_cpu_kernels(training.cpu_kernels)
    with says_where_settings_came_from(folder_of(training.output_dir, peer.run_id), peer.model_config_path):
        return task.build_model(
            peer,
            seed=training.seed,
            activation_memory=training.activation_memory,
            sentence_order=training.sentence_order,
        )


def workload_of(settings: dict, training: HFTrainerArguments) -> Workload:
    return Workload.of(training, local_steps=bool(settings["local_batch_size"]))


def num_readers(training: HFTrainerArguments) -> int:
    """Processes of this peer that read text."""
    return max(1, training.dataloader_num_workers) * training.world_size


def plan_for(config, settings: dict, training: HFTrainerArguments) -> Callable[[Circumstances], Plan]:
    """What makes plans for this trainer."""
    memory = needed_memory(config, workload_of(settings, training), on_gpu=training.device.type == "cuda")
    return lambda now: make_plan(config, settings, now, memory)


def build(
    peer: TrainerPeerArguments,
    collaboration: CollaborationArguments,
    training: HFTrainerArguments,
    *,
    entry: Entry,
    task,
    progress: Progress,
    stop: threading.Event,
) -> TrainerProgram:
    """hivemind forks its processes here, so this comes before threads are started. Raises ValueError and OSError.

    ``entry``: from `src.swarm.join.enter`.
    """
    model, tokenizer = build_model(peer, training, task)
    task.check_sequence_length(model, training.max_sequence_length)
    workload = Workload.of(training, local_steps=bool(collaboration.local_batch_size))
    require_shared_memory(model, local_steps=workload.local_steps)
    for found in check_memory(model.config, workload, training.device):
        if found.state != OK:  # it is a prediction, so the run may go on
            progress.say(replace(found, state=WARNING).lines())
    model.to(training.device)
    directory = claim_run_directory(training.output_dir, peer.run_id, "trainer")
    state_path = Path(peer.state_path) if peer.state_path else directory / "backup.pth"
    settings = run_settings(peer, collaboration, training)
    if peer.init_checkpoint is not None and state_path.exists():
        progress.say(f"there is a backup, {state_path}: --init_checkpoint is not read")
    elif peer.init_checkpoint is not None:
        settings["init_checkpoint"] = load_initial_weights(model, Path(peer.init_checkpoint).expanduser())
        progress.say(f"begins with the weights of {peer.init_checkpoint} ({settings['init_checkpoint']})")
    if peer.restart:
        take_up_identity(peer)
    node = join_run(model, tokenizer, settings, entry=entry, peer=peer, trainer=True, say=progress.say)
    if peer.restart:
        keep_ports(peer, node.dht)
    workers = LocalWorkers(size=training.world_size, device=training.device)
    # A peer that is started again under the same identity goes on with other data than it began with last time.
    start = num_starts(directory / "metrics.jsonl").to_bytes(8, "big")
    peer_seed = workers.share_bytes(node.dht.peer_id.to_bytes() + start)
    dataset, collator, schedule = task.build_data(tokenizer, peer, training, peer_seed=peer_seed)
    if workers.size > 1:
        # Local gradients are means over all ranks, which the optimizer must not find reset on one of them only.
        collaboration.reuse_grad_buffers = False
    swarm, journal = start_averaging(
        node, model, directory / "metrics.jsonl", peer=peer, collaboration=collaboration, training=training
    )
    meter, scaler = LossMeter(), LossScaler() if training.fp16 else None
    callback = make_callback(
        swarm,
        model,
        journal,
        peer=peer,
        training=training,
        meter=meter,
        scaler=scaler,
        schedule=schedule,
        state_path=state_path,
        progress=progress,
        stop=stop,
        workers=workers,
    )
    callback.resume()
    manifest = begin_to_hand_over(node, entry, peer=peer, trainer=True, say=progress.say)
    record_start(journal, node.settings, role="trainer")
    trainer = make_trainer(model, dataset, collator, callback, training=training, optimizer=swarm.optimizer)
    outlook = Outlook(
        plan_for(model.config, settings, training),
        Circumstances(
            bandwidth=peer.bandwidth,
            text=task.look_at_text(tokenizer, dataset, num_readers=num_readers(training)),
            num_readers=num_readers(training),
        ),
        tracker=swarm.optimizer.tracker,
        length=lambda: schedule.length.value,
        say=progress.say,
    )
    callback.after_step = outlook.after_step
    return TrainerProgram(trainer, callback, swarm, journal, outlook, manifest)


def make_callback(  # noqa: PLR0913 (where all parts of a trainer come together)
    swarm: Swarm,
    model: torch.nn.Module,
    journal: Journal,
    *,
    peer: TrainerPeerArguments,
    training: HFTrainerArguments,
    meter: LossMeter,
    scaler: LossScaler | None,
    schedule: DataSchedule,
    state_path: Path,
    progress: Progress,
    stop: threading.Event,
    workers: LocalWorkers,
) -> CollaborativeCallback:
    """The callback with its parts."""
    backups = Backups(state_path, model, swarm.optimizer, every=peer.backup_every_epochs, say=progress.say)
    reused = swarm.optimizer.grad_averager.reuse_grad_buffers
    report = EpochReport(
        swarm,
        meter,
        run_id=peer.run_id,
        total_steps=training.total_steps,
        expiration=peer.statistics_expiration,
        journal=journal,
        progress=progress,
    )
    return CollaborativeCallback(
        swarm,
        GradientBuffers(backups.parameters, scaler=scaler, reused=reused),
        report,
        backups,
        peer=peer,
        training=training,
        schedule=schedule,
        stop=stop,
        workers=workers,
    )


def make_trainer(model, dataset, collator, callback, *, training, optimizer) -> CollaborativeTrainer:
    """``callback``: of a peer, or of a process that follows it, whose ``optimizer`` is None."""
    trainer = CollaborativeTrainer(
        collaborative=optimizer,
        meter=callback.meter,
        scaler=callback.buffers.scaler,
        stop=callback.stop,
        model=model,
        args=training,
        train_dataset=dataset,
        data_collator=collator,
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def follow_settings(peer: TrainerPeerArguments, given: dict) -> list[str]:
    """Words of a command line, as rank 0 has them from `src.swarm.join.enter`: the run's settings in its folder.

    Raises ValueError if something else lies there than rank 0 has seen.
    """
    settings_hash = await_settings()
    if not settings_hash:
        return []
    folder = folder_of(given.get("output_dir", FLAGS["output_dir"].default), peer.run_id)
    found = read_folder(folder, peer.run_id)
    if found is None or found[0].hash != settings_hash:
        raise ValueError(f"{folder} does not hold the settings that rank 0 keeps: give all ranks the same --output_dir")
    return words_of(found[0], folder, given, reads_text=True)


def follow(parser, words: list[str], *, task, text_error: type[Exception], stop: threading.Event) -> int:
    """All that a process does that torchrun has started beside rank 0, from its command line to its exit code."""
    peer, given = parser.parse_first(words)
    if peer.check:
        return 0
    try:
        handed_over = follow_settings(peer, given)
    except ValueError as error:
        print(f"run_trainer.py: error: {error}", file=sys.stderr)
        return 2
    peer, _, training = parser.parse([*handed_over, *words])
    follower = build_follower(peer, training, task=task, stop=stop)
    install_stop_handler(stop.set, deadline_seconds=STOP_SECONDS)
    return train(follower, text_error=text_error)


def build_follower(peer: TrainerPeerArguments, training: HFTrainerArguments, *, task, stop) -> CollaborativeTrainer:
    """A process that computes gradients for rank 0 of the same peer, when torchrun has started several."""
    workers = LocalWorkers(rank=training.process_index, size=training.world_size, device=training.device)
    model, tokenizer = build_model(peer, training, task)
    model.to(training.device)
    peer_seed = workers.share_bytes() + bytes([workers.rank])  # each rank reads data of its own
    dataset, collator, schedule = task.build_data(tokenizer, peer, training, peer_seed=peer_seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    callback = FollowerCallback(
        workers,
        GradientBuffers(parameters, scaler=LossScaler() if training.fp16 else None),
        meter=LossMeter(),
        schedule=schedule,
        stop=stop,
    )
    return make_trainer(model, dataset, collator, callback, training=training, optimizer=None)


def train(trainer: CollaborativeTrainer, *, text_error: type[Exception], say=None) -> int:
    """Train until the end or a stop. Returns an exit code: 1 if another process was lost, 2 if text cannot be read.

    However it ends, what was learned is in the backup, and the caller can leave the swarm in order.
    """
    try:
        trainer.train()
        return 0
    except StoppedWaiting:
        code = 0
    except text_error as error:
        print(f"run_trainer.py: error: {error}", file=sys.stderr)
        code = 2
    except RuntimeError as error:
        if not worker_was_lost(error) and "DataLoader worker" not in str(error):
            raise
        if say is not None:
            what = "another process of this peer" if worker_was_lost(error) else "a process that prepares data"
            say(f"{what} has ended: stopping; start the peer again to go on")
        code = 1
    finally:
        # torch's handler raises wherever this process is when a data worker dies; from now on they may
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    start_deadline(STOP_SECONDS)
    trainer.stop.set()
    if say is not None:
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)  # writes the backup
    return code
