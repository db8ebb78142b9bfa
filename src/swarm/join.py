"""How a peer becomes part of a run: its place in the network first, then its optimizer and its metrics file.

``peer``, ``collaboration`` and ``training`` are a script's parsed argument classes; ``settings`` are those that the
peers of a run compare (`arguments.run_settings`).
"""

import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import hivemind
import torch

from arguments import CollaborationArguments, HFTrainerArguments, PeerArguments
from src.access.membership import Identity, load_identity
from src.metrics.journal import Journal
from src.metrics.records import Start
from src.process.memory import leave_to_owner
from src.swarm.build import make_collaborative_optimizer
from src.swarm.dht import start_dht
from src.swarm.optimizer import LeanOptimizer
from src.swarm.probe import measure_bandwidth
from src.swarm.run_card import RunCard, make_run_card
from src.version import VERSION

WAIT_FOR_WEIGHTS_SECONDS = 300.0  # the first trainer of a run may still be reading its data; its card lives 150 s


@dataclass(frozen=True)
class Node:
    """A peer's place in the network: its DHT node, the key that signs its records, and who it is in a private run."""

    dht: hivemind.DHT
    public_key: bytes
    identity: Identity | None
    settings: dict
    run_card: RunCard


@dataclass(frozen=True)
class Swarm:
    """This peer's handles on the swarm: its DHT node, the key that signs its records, the optimizer, the run's card."""

    dht: hivemind.DHT
    public_key: bytes
    optimizer: LeanOptimizer
    run_card: RunCard | None = None

    def take_state(
        self, *, has_backup: bool, has_checkpoint: bool, say: Callable[[str], None], stop: threading.Event
    ) -> bool:
        """Take the run's state from another peer. False if this peer lacks the weights with which the run began.

        It can go on without another peer's state if it has its own backup, has begun with the weights of its
        --init_checkpoint, or if the run began with those that every peer draws.
        """
        give_up_at, said = time.monotonic() + WAIT_FOR_WEIGHTS_SECONDS, False
        while not self._downloads_state():
            initial = None if self.run_card is None else self.run_card.learn_initial_weights()
            if has_backup or has_checkpoint or initial is None:
                return True
            if stop.is_set() or time.monotonic() > give_up_at:
                say(
                    f"stopping: no peer has handed over the weights with which this run began ({initial}); start this "
                    "trainer when one that accepts connections is there, or with the run's own --init_checkpoint"
                )
                return False
            if not said:
                say(f"waiting for a peer that hands over the weights with which this run began ({initial})")
                said = True
            stop.wait(1.0)
        if has_checkpoint and (self.optimizer.local_epoch > 0 or self.run_card.correct_initial_weights()):
            say("the run has begun already: its state was taken, not the weights of --init_checkpoint")
        return True

    def _downloads_state(self) -> bool:
        self.optimizer.load_state_from_peers()
        return self.optimizer.state_averager.has_taken_state

    def leave(self) -> None:
        """Say goodbye and end the background processes."""
        self.optimizer.shutdown()
        self.dht.shutdown()


def join_run(
    model: torch.nn.Module,
    tokenizer,
    settings: dict,
    *,
    peer: PeerArguments,
    trainer: bool,
    say: Callable[[str], None],
) -> Node:
    """Enter the network, compare this peer's settings with the run's, and measure its bandwidth if that is wished.

    Raises ValueError or OSError, with what to do, if the network, the run or this peer's key will not have it so.
    """
    identity = load_identity(peer)
    leave_to_owner(partial(trained_tensors, weakref.ref(model)))
    dht, public_key = start_dht(peer, identity)
    card = make_run_card(model.config, tokenizer, settings, trainer=trainer)
    run_card = RunCard(dht, peer.run_id, public_key, card, initial_peers=peer.initial_peers)
    run_card.join_run(trains=trainer)
    if run_card.initial_weights:
        settings = {**settings, "init_checkpoint": run_card.initial_weights}
    if peer.bandwidth == "auto":
        peer.bandwidth = measure_bandwidth(dht, peer.initial_peers)
        say(f"measured a bandwidth of {peer.bandwidth:.0f} Mbit/s")
    return Node(dht, public_key, identity, settings, run_card)


def trained_tensors(model: weakref.ref) -> list[torch.Tensor]:
    """A model's parameters and gradients, as long as it exists: no process but this one computes with them."""
    parameters = () if model() is None else model().parameters()
    return [tensor for one in parameters for tensor in (one.detach(), one.grad) if tensor is not None]


def start_averaging(
    node: Node,
    model: torch.nn.Module,
    metrics_path: Path,
    *,
    peer: PeerArguments,
    collaboration: CollaborationArguments,
    training: HFTrainerArguments,
    auxiliary: bool = False,
) -> tuple[Swarm, Journal]:
    """Start this peer's averagers and open its metrics file, see `record_start`.

    Must be called on the main thread, before other threads or data loaders start: hivemind forks its processes.
    """
    optimizer = make_collaborative_optimizer(
        model,
        node.dht,
        peer=peer,
        collaboration=collaboration,
        training=training,
        auxiliary=auxiliary,
        shares_state=False,  # before the backup is restored or a state is taken: a trainer's random weights help nobody
        metrics_path=metrics_path,
        identity=node.identity,
    )
    journal = Journal(
        metrics_path,
        wandb_project=peer.wandb_project,
        tensorboard_dir=peer.tensorboard_dir,
        run_name=f"{peer.run_id}-aux" if auxiliary else peer.run_id,
        config={**node.settings, "version": VERSION},
    )
    return Swarm(node.dht, node.public_key, optimizer, node.run_card), journal


def record_start(journal: Journal, settings: dict, *, role: str) -> None:
    """A metrics file's first record; to be written when nothing of the start can fail any more."""
    named = {name: settings[name] for name in ("run_id", "total_steps", "target_batch_size")}
    journal.record(Start(role=role, **named, arguments=settings, version=VERSION))
