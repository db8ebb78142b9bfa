"""A trainer that sleeps where others compute, so that two cores carry a swarm; all else is as in `run_trainer.py`.

    python -m benchmarks.sleeping_trainer SECONDS --run_id RUN ...      # the flags of run_trainer.py

Each batch of 16 samples takes so many seconds. Used by `benchmarks.links`.
"""

import os
import sys
import threading
import time
from dataclasses import replace

from src.process.memory import limit_memory
from src.process.sockets import make_socket_directory
from src.process.supervisor import install_stop_handler, leave_at_once, run_supervised

BATCH_SIZE, GRADIENT = 16, 0.01
STOP_SECONDS, KILL_SECONDS = 15.0, 18.0  # to leave the swarm in order after a stop; until the supervisor kills


def main() -> int:
    limit_memory()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from arguments import ArgumentParser, CollaborationArguments, HFTrainerArguments, TrainerPeerArguments, run_settings
    from src.console import quiet_libraries

    quiet_libraries()  # before they are loaded
    from src.metrics.journal import claim_run_directory
    from src.swarm.dht import visible_addresses
    from src.swarm.join import Entry, join_run, record_start, start_averaging
    from tasks.mlm import task

    parser = ArgumentParser(TrainerPeerArguments, CollaborationArguments, HFTrainerArguments, description=__doc__)
    peer, collaboration, training = parser.parse(sys.argv[2:])
    stop = threading.Event()
    try:
        model, tokenizer = task.build_model(peer, seed=training.seed)
        metrics = claim_run_directory(training.output_dir, peer.run_id, "trainer") / "metrics.jsonl"
        settings = run_settings(peer, collaboration, training)
        entry = Entry(metrics.parent, {})  # all flags are its own: it asks nobody for the run's settings
        node = join_run(model, tokenizer, settings, entry=entry, peer=peer, trainer=True, say=print)
        swarm, journal = start_averaging(
            node, model, metrics, peer=peer, collaboration=collaboration, training=training
        )
    except (ValueError, OSError) as error:
        print(f"sleeping_trainer.py: error: {error}", file=sys.stderr)
        leave_at_once(2)
    install_stop_handler(stop.set, swarm.optimizer.stop_waiting, deadline_seconds=STOP_SECONDS)
    print(f"--initial_peers {' '.join(visible_addresses(swarm.dht))}", flush=True)
    record_start(journal, node.settings, role="trainer")
    swarm.optimizer.share_state()
    wait_for_peers(swarm.optimizer.tracker, peer.wait_for_peers, stop)
    train(swarm.optimizer, list(model.parameters()), float(sys.argv[1]), journal=journal, stop=stop)
    swarm.leave()
    leave_at_once(0)


def wait_for_peers(tracker, number: int, stop: threading.Event) -> None:
    while not stop.is_set() and tracker.num_present() < number:
        tracker.announce()
        stop.wait(0.5)


def train(optimizer, parameters, seconds: float, *, journal, stop: threading.Event) -> None:
    """Until ``stop``; epochs and rounds go to the journal, of epochs only what is told of samples and seconds."""
    import torch

    from src.metrics.records import TrainerEpoch

    epoch, began, samples, waits = optimizer.local_epoch, time.monotonic(), 0, []
    while not stop.wait(seconds):
        with torch.no_grad():
            for parameter in parameters:
                if optimizer.grad_averager.reuse_grad_buffers:
                    parameter.grad += GRADIENT
                else:
                    parameter.grad = torch.full_like(parameter, GRADIENT)
        called = time.monotonic()
        optimizer.step(batch_size=BATCH_SIZE)
        now = time.monotonic()
        waits.append(now - called)
        samples += BATCH_SIZE
        for done in optimizer.finished_rounds():
            journal.record(replace(done, epoch=optimizer.local_epoch))
        for download in optimizer.finished_downloads():
            journal.record(download)
        for _, reason in optimizer.take_refusals():
            print(f"refused: {reason}", flush=True)
        if optimizer.local_epoch != epoch:
            epoch = optimizer.local_epoch
            journal.record(
                TrainerEpoch(
                    epoch, samples=samples, seconds=now - began, local_steps=len(waits), waited_seconds=sum(waits)
                )
            )
            began, samples, waits = now, 0, []


if __name__ == "__main__":
    sys.exit(run_supervised(main, grace_seconds=KILL_SECONDS, scratch=make_socket_directory()))
