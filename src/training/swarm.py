"""How a peer becomes part of a run: its place in the network first, then its optimizer and its metrics file.

``peer``, ``collaboration`` and ``training`` are a script's parsed argument classes; ``settings`` are those that the
peers of a run compare (`arguments.run_settings`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hivemind
import torch

from src.training.auth import Identity, load_identity
from src.training.dht import start_dht
from src.training.journal import Journal
from src.training.optimizer import LeanOptimizer, make_collaborative_optimizer
from src.training.probe import measure_bandwidth
from src.training.run_card import RunCard, make_run_card


@dataclass(frozen=True)
class Node:
    """A peer's place in the network: its DHT node, the key that signs its records, and who it is in a private run."""

    dht: hivemind.DHT
    public_key: bytes
    identity: Identity | None
    settings: dict


@dataclass(frozen=True)
class Swarm:
    """This peer's handles on the swarm: its DHT node, the key that signs its records, and the optimizer."""

    dht: hivemind.DHT
    public_key: bytes
    optimizer: LeanOptimizer

    def leave(self) -> None:
        """Say goodbye and end the background processes."""
        self.optimizer.shutdown()
        self.dht.shutdown()


def join_run(
    model: torch.nn.Module,
    tokenizer,
    settings: dict,
    *,
    peer,
    trainer: bool,
    say: Callable[[str], None],
) -> Node:
    """Enter the network, compare this peer's settings with the run's, and measure its bandwidth if that is wished.

    Raises ValueError or OSError, with what to do, if the network, the run or this peer's key will not have it so.
    """
    identity = load_identity(peer)
    dht, public_key = start_dht(peer, identity)
    card = make_run_card(model.config, tokenizer, settings, trainer=trainer)
    RunCard(dht, peer.run_id, public_key, card, initial_peers=peer.initial_peers).join_run()
    if peer.bandwidth == "auto":
        peer.bandwidth = measure_bandwidth(dht, peer.initial_peers)
        say(f"measured a bandwidth of {peer.bandwidth:.0f} Mbit/s")
    return Node(dht, public_key, identity, settings)


def start_averaging(
    node: Node,
    model: torch.nn.Module,
    metrics_path: Path,
    *,
    peer,
    collaboration,
    training,
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
        metrics_path=metrics_path,
        identity=node.identity,
    )
    journal = Journal(
        metrics_path,
        wandb_project=peer.wandb_project,
        tensorboard_dir=peer.tensorboard_dir,
        run_name=f"{peer.run_id}-aux" if auxiliary else peer.run_id,
    )
    return Swarm(node.dht, node.public_key, optimizer), journal


def record_start(journal: Journal, settings: dict, *, role: str) -> None:
    """A metrics file's first record; to be written when nothing of the start can fail any more."""
    named = {name: settings[name] for name in ("run_id", "total_steps", "target_batch_size")}
    journal.write("start", role=role, **named, arguments=settings)
