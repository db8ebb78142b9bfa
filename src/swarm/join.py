"""How a peer becomes part of a run: its place in the network first, then its optimizer and its metrics file.

``peer``, ``collaboration`` and ``training`` are a script's parsed argument classes; ``settings`` are those that the
peers of a run compare (`arguments.run_settings`).
"""

import os
import shlex
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import hivemind
import torch

from arguments import FLAGS, CollaborationArguments, HFTrainerArguments, PeerArguments, joining_arguments
from src.access.membership import Identity, load_identity
from src.metrics.journal import Journal
from src.metrics.records import Start
from src.process.memory import leave_to_owner
from src.process.same_peer import take_up_identity
from src.settings.folder import SETTINGS, folder_of, write_folder
from src.settings.manifest import Manifest
from src.swarm.build import make_collaborative_optimizer
from src.swarm.dht import find_reach, start_dht
from src.swarm.optimizer import LeanOptimizer
from src.swarm.probe import measure_bandwidth
from src.swarm.reach import LOOPBACK, describe, nearness
from src.swarm.run_card import RunCard, make_run_card
from src.swarm.run_files import hand_over, hand_over_nothing, let_others_wait
from src.swarm.take_up import Network, own_files, settings_of_own, take_up, words_of
from src.version import VERSION

WAIT_FOR_WEIGHTS_SECONDS = 300.0  # the first trainer of a run may still be reading its data; its card lives 150 s


@dataclass(frozen=True)
class Entry:
    """A peer before it has built anything: what its run has handed over, and its place in the network if it joins one.

    ``words``: of a command line, for what the run has handed over; to be put before the peer's own.
    """

    folder: Path
    given: dict
    manifest: Manifest | None = None
    words: Sequence[str] = ()
    identity: Identity | None = None
    dht: hivemind.DHT | None = None
    public_key: bytes = b""
    is_client: bool = False

    @property
    def settings_hash(self) -> str:
        """By which other processes of this peer know the content of the folder; empty if the flags alone count."""
        return "" if self.manifest is None else self.manifest.hash

    def leave(self) -> None:
        """For who only looks."""
        if self.dht is not None:
            self.dht.shutdown()
        if self.identity is not None and self.identity.lock is not None:
            os.close(self.identity.lock)


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


class UnfitSettingsError(ValueError):
    """What the run hands over cannot be taken, or is not what this peer was told."""


def enter(
    peer: PeerArguments, given: dict, *, folder: Path | None = None, reads_text: bool, say: Callable[[str], None]
) -> Entry:
    """Take what the run hands over, from its peers, its organiser, or the folder in which it lies from the last time.

    ``given``: {flag: value} of this peer's own; ``reads_text``: it trains. The node is started if there are initial
    peers to ask. Must be called on the main thread, as `start_averaging`. Raises ValueError or OSError, with what to
    do.
    """
    output_dir = given.get("output_dir", FLAGS["output_dir"].default)
    entry = Entry(folder_of(output_dir, peer.run_id) if folder is None else folder, given)
    if any(place.exists() and not place.is_dir() for place in entry.folder.parents):
        raise ValueError(f"--output_dir: {entry.folder.parent} is no directory; choose another one")
    try:
        if peer.initial_peers or peer.token_file:
            if peer.restart:
                take_up_identity(peer)
            entry = replace(entry, identity=load_identity(peer))
        if peer.initial_peers:
            finds_out = peer.client_mode == "auto" and not peer.check
            has_asked = finds_out and settle_reach(peer, entry.identity, may_be_client=reads_text, say=say)
            dht, public_key = start_dht(peer, entry.identity, is_new=not has_asked)
            entry = replace(entry, dht=dht, public_key=public_key, is_client=peer.is_client)
        return _with_settings(entry, peer, reads_text=reads_text, say=say)
    except BaseException:
        if peer.check:  # else the program ends at once, and its watchdog would take the node's end for an accident
            entry.leave()
        raise


def settle_reach(peer: PeerArguments, identity: Identity, *, may_be_client: bool, say: Callable[[str], None]) -> bool:
    """Find out whether others can connect to this peer, say it, and let ``peer`` be a client if they cannot.

    Returns whether somebody was asked, in the network. Raises ValueError as `start_dht`.
    """
    if all(nearness(address) == LOOPBACK for address in peer.initial_peers):
        say("the initial peers are on this machine: goes on as a peer that others can connect to")
        return False
    reach = find_reach(peer, identity)
    say(describe(reach, may_be_client=may_be_client))
    peer.host_maddrs = reach.with_ports(peer.host_maddrs)
    peer.client_mode = bool(reach.missed) and may_be_client
    peer.announce_maddrs = peer.announce_maddrs or reach.announced()
    return True


def _with_settings(entry: Entry, peer: PeerArguments, *, reads_text: bool, say: Callable[[str], None]) -> Entry:
    membership = None if entry.identity is None else entry.identity.membership
    try:
        manifest = take_up(
            peer,
            entry.folder,
            network=None if entry.dht is None else Network(entry.dht),
            organiser=None if membership is None else membership.organiser,
            own_files=own_files(peer.model_config_path, peer.tokenizer_path),
            say=say,
        )
        if manifest is None:
            return entry
        words = words_of(manifest, entry.folder, entry.given, reads_text=reads_text)
    except ValueError as error:
        raise UnfitSettingsError(str(error)) from error
    if entry.dht is not None:
        hand_over(entry.dht, entry.folder, manifest)
    elif not peer.check:
        say(f"goes on with the settings of run {peer.run_id} in {entry.folder}")
    if reads_text and "dataset_sources" not in entry.given:
        say(f"trains on data sets that the run names, from the Hugging Face hub: {' '.join(manifest.data_sets)}")
    return replace(entry, manifest=manifest, words=words)


def join_run(
    model: torch.nn.Module,
    tokenizer,
    settings: dict,
    *,
    entry: Entry,
    peer: PeerArguments,
    trainer: bool,
    say: Callable[[str], None],
) -> Node:
    """Enter the network, compare this peer's settings with the run's, and measure its bandwidth if that is wished.

    Whoever begins a run lets others wait for settings that are new, until `begin_to_hand_over`. Raises ValueError or
    OSError, with what to do, if the network, the run or this peer's key will not have it so.
    """
    leave_to_owner(partial(trained_tensors, weakref.ref(model)))
    identity, dht, public_key = entry.identity, entry.dht, entry.public_key
    if dht is None:
        identity = load_identity(peer) if identity is None else identity
        dht, public_key = start_dht(peer, identity)
        if entry.manifest is None:
            let_others_wait(dht)
        else:  # kept from the last time
            hand_over(dht, entry.folder, entry.manifest)
    card = make_run_card(model.config, tokenizer, settings, trainer=trainer)
    run_card = RunCard(dht, peer.run_id, public_key, card, initial_peers=peer.initial_peers)
    run_card.join_run(trains=trainer)
    peer.client_mode = entry.is_client or peer.is_client
    if run_card.initial_weights:
        settings = {**settings, "init_checkpoint": run_card.initial_weights}
    if peer.bandwidth == "auto":
        peer.bandwidth = measure_bandwidth(dht, peer.initial_peers)
        say(f"measured a bandwidth of {peer.bandwidth:.0f} Mbit/s")
    return Node(dht, public_key, identity, settings, run_card)


def begin_to_hand_over(
    node: Node, entry: Entry, *, peer: PeerArguments, trainer: bool, say: Callable[[str], None]
) -> Manifest | None:
    """Of who begins a run, when nothing of the start can fail any more: keep its settings, and let others have them.

    None, with the reason said, if they cannot be handed over. Does nothing for who has joined.
    """
    if entry.dht is not None:
        return entry.manifest
    manifest = entry.manifest
    if manifest is None and node.identity.membership is not None:
        signed = Path(peer.token_file).expanduser().with_name(SETTINGS)
        say(
            "whoever joins must give all of the run's flags: nobody believes settings that the organiser of a private "
            f"run has not signed (python -m src.access sign {peer.run_id} FLAGS writes them; put them in {signed})"
        )
    elif manifest is None:
        try:
            manifest, files = settings_of_own(peer, node.settings, entry.given, trainer=trainer)
        except ValueError as error:
            say(f"whoever joins must give all of the run's flags: they cannot be handed over ({error})")
        else:
            write_folder(entry.folder, manifest, files)
            if not manifest.has_tokenizer:
                say("whoever joins must give --tokenizer_path: a tokenizer of this kind cannot be handed over")
    if manifest is None:
        hand_over_nothing(node.dht)
    else:
        hand_over(node.dht, entry.folder, manifest)
    return manifest


def how_to_join(peer: PeerArguments, addresses: Sequence[str], manifest: Manifest | None) -> str:
    """The command with which another machine joins the run as a trainer."""
    asks_for_text = manifest is None or not manifest.data_sets
    command = ["python", "run_trainer.py", *joining_arguments(peer, addresses, asks_for_text=asks_for_text)]
    if peer.token_file:
        command += ["--authorize", "THEIR_TOKEN"]
    return shlex.join(command) + ("" if manifest is not None else "\n  and all flags that the run shares")


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
