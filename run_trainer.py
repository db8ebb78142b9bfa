"""Train a masked language model together with the other peers of a run.

Without arguments this starts a one-peer swarm on the bundled demo model and text (the same as `@demo/trainer.args`).
"""

import os
import sys
from pathlib import Path

from src.process.memory import limit_memory
from src.process.sockets import make_socket_directory
from src.process.supervisor import install_stop_handler, leave_at_once, run_supervised, start_deadline

STOP_SECONDS, KILL_SECONDS = 25.0, 28.0  # to leave the swarm in order after a stop; until the supervisor kills


def main() -> int:
    limit_memory()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read once, when torch is loaded
    # Heavy imports come here, not above: the supervising parent process should stay small.
    import shlex
    import threading

    from arguments import (
        ArgumentParser,
        CollaborationArguments,
        HFTrainerArguments,
        TrainerPeerArguments,
        joining_arguments,
    )

    parser = ArgumentParser(TrainerPeerArguments, CollaborationArguments, HFTrainerArguments, description=__doc__)
    if {"-h", "--help"} & set(sys.argv[1:]):
        parser.parse(sys.argv[1:])  # prints and exits: no need to load hivemind for it
    from src.metrics import console
    from src.process.watchdog import Watchdog, may_start_again
    from src.swarm.clock import ClockWatch
    from src.swarm.dht import short_peer_name, visible_addresses
    from src.swarm.reconnect import KeepInTouch

    console.quiet_libraries()
    alone = not set(sys.argv[1:]) - {"--check"}
    argv = ["@demo/trainer.args", *sys.argv[1:]] if alone else sys.argv[1:]
    peer, collaboration, training = parser.parse(argv)
    progress, stop = console.Progress(), threading.Event()
    if training.process_index > 0:
        return 0 if peer.check else follow(peer, training, stop=stop)
    if alone:
        progress.say("no arguments: the bundled demo model on the bundled text (@demo/trainer.args)")
    if peer.check:
        leave_at_once(check(peer, collaboration, training, progress))
    peer.restart = may_start_again(peer.restart)
    try:
        with Watchdog(say=progress.say, stop=stop, start_again=peer.restart, asks=False):
            trainer, callback, swarm, journal = build(peer, collaboration, training, progress=progress, stop=stop)
    except (ValueError, OSError) as error:
        print(f"run_trainer.py: error: {error}", file=sys.stderr)
        leave_at_once(2)
    # now, because hivemind has replaced the handlers
    install_stop_handler(stop.set, swarm.optimizer.stop_waiting, deadline_seconds=STOP_SECONDS)
    handed_on = joining_arguments(parser.read_files(argv, keep_own=True), visible_addresses(swarm.dht))
    joining = shlex.join(["python", "run_trainer.py", *handed_on])
    progress.say(f"{'joining' if peer.initial_peers else 'started'} run {peer.run_id}; others join with\n  {joining}")
    progress.say(f"reports call this trainer {short_peer_name(swarm.public_key)}")
    ClockWatch(swarm.dht, say=progress.say, stop=stop).start()
    if not peer.use_ipfs:
        KeepInTouch(swarm.dht, peer.initial_peers, stop=stop).start()
    with Watchdog(
        say=progress.say,
        stop=stop,
        start_again=peer.restart,
        save=callback.save_last,
        is_late=callback.is_late,
        leave=swarm.leave,
    ):
        code = train(trainer, progress)
    epoch = swarm.optimizer.local_epoch
    how = "trained to the last epoch," if epoch >= training.total_steps else "stopped at epoch"
    progress.say(f"{how} {epoch}, leaving the swarm")
    swarm.leave()
    journal.close()
    leave_at_once(code)  # at an ordinary exit hivemind's futures complain that their event loop is closed


def follow(peer, training, *, stop) -> int:
    """Compute gradients for rank 0 of the same peer, when torchrun has started several processes of this script."""
    from functools import partial

    from transformers import PrinterCallback

    from src.trainer.callback import sequence_length_at
    from src.trainer.hf_trainer import CollaborativeTrainer, LossMeter, LossScaler
    from src.trainer.local_workers import FollowerCallback, LocalWorkers
    from tasks.mlm.task import build_data, build_model

    workers = LocalWorkers(rank=training.process_index, size=training.world_size, device=training.device)
    model, tokenizer = build_model(peer, seed=training.seed, activation_memory=training.activation_memory)
    model.to(training.device)
    peer_seed = workers.share_bytes() + bytes([workers.rank])  # each rank reads data of its own
    dataset, collator, current_length = build_data(tokenizer, peer, training, peer_seed=peer_seed)
    meter, scaler = LossMeter(), LossScaler() if training.fp16 else None
    install_stop_handler(stop.set, deadline_seconds=STOP_SECONDS)
    trainer = CollaborativeTrainer(
        collaborative=None,
        meter=meter,
        scaler=scaler,
        stop=stop,
        model=model,
        args=training,
        train_dataset=dataset,
        data_collator=collator,
        callbacks=[
            FollowerCallback(
                workers,
                model,
                meter=meter,
                scaler=scaler,
                current_length=current_length,
                length_at=partial(sequence_length_at, training=training),
                stop=stop,
            )
        ],
    )
    trainer.remove_callback(PrinterCallback)
    leave_at_once(train(trainer, progress=None))


def train(trainer, progress) -> int:
    """Train until the end or a stop. Returns an exit code: 1 if another process was lost, 2 if text cannot be read.

    However it ends, what was learned is in the backup, and the caller can leave the swarm in order.
    """
    import signal

    from src.trainer.hf_trainer import StoppedWaiting
    from src.trainer.local_workers import worker_was_lost
    from tasks.mlm.sources import TextError

    try:
        trainer.train()
        return 0
    except StoppedWaiting:
        code = 0
    except TextError as error:
        print(f"run_trainer.py: error: {error}", file=sys.stderr)
        code = 2
    except RuntimeError as error:
        if not worker_was_lost(error) and "DataLoader worker" not in str(error):
            raise
        if progress is not None:
            what = "another process of this peer" if worker_was_lost(error) else "a process that prepares data"
            progress.say(f"{what} has ended: stopping; start the peer again to go on")
        code = 1
    finally:
        # torch's handler raises wherever this process is when a data worker dies; from now on they may
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    start_deadline(STOP_SECONDS)
    trainer.stop.set()
    if progress is not None:
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)  # writes the backup
    return code


def check(peer, collaboration, training, progress) -> int:
    """Test this machine's set-up without joining in training; returns the exit code."""
    from functools import partial

    from arguments import run_settings
    from src.preflight.preflight import Workload, run_checks
    from src.swarm.run_card import make_run_card
    from src.trainer.backup import load_initial_weights
    from tasks.mlm.task import build_data, build_model, check_sequence_length

    def make_model():
        model, tokenizer = build_model(peer, seed=training.seed, activation_memory=training.activation_memory)
        check_sequence_length(model, training.max_sequence_length)
        if peer.init_checkpoint is not None:
            settings["init_checkpoint"] = load_initial_weights(model, Path(peer.init_checkpoint).expanduser())
        return model, tokenizer

    settings = run_settings(peer, collaboration, training)
    return run_checks(
        peer,
        output_dir=training.output_dir,
        device=training.device,
        workload=Workload(
            training.min_8bit_size,
            batch_size=training.per_device_train_batch_size,
            length=training.max_sequence_length,
            half_precision=training.fp16 or training.bf16,
        ),
        build_model=make_model,
        make_card=partial(make_run_card, settings=settings, trainer=True),
        read_data=lambda tokenizer: build_data(tokenizer, peer, training, peer_seed=b"check"),
        say=progress.say,
    )


def build(peer, collaboration, training, *, progress, stop):
    """All that a trainer consists of. hivemind forks its processes, so it comes before anything that starts threads."""
    from transformers import PrinterCallback

    from arguments import run_settings
    from src.metrics.journal import claim_run_directory, num_starts
    from src.process.same_peer import keep_ports, take_up_identity
    from src.swarm.join import join_run, record_start, start_averaging
    from src.trainer.backup import load_initial_weights
    from src.trainer.callback import CollaborativeCallback
    from src.trainer.hf_trainer import CollaborativeTrainer, LossMeter, LossScaler
    from src.trainer.local_workers import LocalWorkers
    from tasks.mlm.task import build_data, build_model, check_sequence_length

    model, tokenizer = build_model(peer, seed=training.seed, activation_memory=training.activation_memory)
    check_sequence_length(model, training.max_sequence_length)
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
    node = join_run(model, tokenizer, settings, peer=peer, trainer=True, say=progress.say)
    if peer.restart:
        keep_ports(peer, node.dht)
    workers = LocalWorkers(size=training.world_size, device=training.device)
    # A peer that is started again under the same identity goes on with other data than it began with last time.
    start = num_starts(directory / "metrics.jsonl").to_bytes(8, "big")
    peer_seed = workers.share_bytes(node.dht.peer_id.to_bytes() + start)
    dataset, collator, current_length = build_data(tokenizer, peer, training, peer_seed=peer_seed)
    if workers.size > 1:
        # Local gradients are means over all ranks, which the optimizer must not find reset on one of them only.
        collaboration.reuse_grad_buffers = False
    swarm, journal = start_averaging(
        node, model, directory / "metrics.jsonl", peer=peer, collaboration=collaboration, training=training
    )
    meter, scaler = LossMeter(), LossScaler() if training.fp16 else None
    callback = CollaborativeCallback(
        swarm,
        model,
        peer=peer,
        training=training,
        meter=meter,
        scaler=scaler,
        current_length=current_length,
        state_path=state_path,
        journal=journal,
        progress=progress,
        stop=stop,
        workers=workers,
    )
    callback.resume()
    record_start(journal, node.settings, role="trainer")
    trainer = CollaborativeTrainer(
        collaborative=swarm.optimizer,
        meter=meter,
        scaler=scaler,
        stop=stop,
        model=model,
        args=training,
        train_dataset=dataset,
        data_collator=collator,
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, callback, swarm, journal


if __name__ == "__main__":
    sys.exit(run_supervised(main, grace_seconds=KILL_SECONDS, scratch=make_socket_directory()))
