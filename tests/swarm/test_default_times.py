"""With the default times, an undisturbed swarm averages every epoch and hardly waits, whoever takes part.

Trainers here sleep instead of computing; averaging, its options and its times are those of `run_trainer.py`, except
that an epoch has few samples.
"""

import asyncio
import contextlib
import threading
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import bitsandbytes.functional  # noqa: F401, takes seconds: before averagers fork, as in a trainer
import hivemind
import pytest
import torch

from arguments import CollaborationArguments, HFTrainerArguments, PeerArguments
from src.access.membership import Identity
from src.metrics.records import Round
from src.swarm.build import make_collaborative_optimizer
from tests.reference.node import start_node
from tests.reference.phantom import PhantomTrainer

DEFAULTS = {"matchmaking_time": 60.0, "next_chunk_timeout": 60.0, "averaging_timeout": 600.0}


@dataclass
class SleepingTrainer:
    """Its batches of two samples take ``batch_seconds``; it trains in a thread until `stop` is set."""

    optimizer: object
    batch_seconds: float
    stop: threading.Event
    rounds: list[Round] = field(default_factory=list)
    epochs: list[tuple[float, float]] = field(default_factory=list)  # (seconds, of which it waited)
    dies: bool = False

    def train(self) -> None:
        parameter = self.optimizer.model.weight
        began, waited, epoch = time.monotonic(), 0.0, self.optimizer.local_epoch
        while not self.stop.wait(self.batch_seconds) and not self.dies:
            if self.optimizer.grad_averager.reuse_grad_buffers:
                parameter.grad += 0.01
            else:
                parameter.grad = torch.full_like(parameter, 0.01)
            before = time.monotonic()
            self.optimizer.step(batch_size=2)
            waited += time.monotonic() - before
            self.rounds += self.optimizer.finished_rounds()
            if self.optimizer.local_epoch != epoch:
                self.epochs.append((time.monotonic() - began, waited))
                began, waited, epoch = time.monotonic(), 0.0, self.optimizer.local_epoch
        self.rounds += self.optimizer.finished_rounds()

    def averaged(self) -> list[Round]:
        return [done for done in self.rounds if done.kind == "gradients" and done.complete]


class SleepingSwarm:
    """Peers of one run in this process; all must be added before `train`, since hivemind forks its processes."""

    def __init__(self, tmp_path, stack: contextlib.ExitStack, **collaboration):
        self.folder, self.stack, self.stop = tmp_path, stack, threading.Event()
        self.run_id = "sleeping-" + "".join(filter(str.isalnum, tmp_path.name))
        self.collaboration = CollaborationArguments(**{"target_batch_size": 64, **collaboration})
        self.nodes, self.trainers, self.assistants = [], [], []

    def add_node(self, client_mode: bool = False) -> tuple[hivemind.DHT, Identity]:
        node, identity = start_node(self.run_id, *self.nodes[:1], client_mode=client_mode)
        self.stack.callback(node.shutdown)
        self.nodes.append(node)
        return node, identity

    def add_peer(self, *, client_mode: bool = False, auxiliary: bool = False):
        torch.manual_seed(0)
        model = torch.nn.Linear(400, 300, bias=False)
        node, identity = self.add_node(client_mode)
        optimizer = make_collaborative_optimizer(
            model,
            node,
            peer=PeerArguments(run_id=self.run_id, min_vector_size=1, client_mode=client_mode),
            collaboration=self.collaboration,
            training=HFTrainerArguments(output_dir=str(self.folder), use_cpu=True, num_zero_lr_steps=0,
                                        warmup_steps=0, total_steps=1000),
            auxiliary=auxiliary,
            identity=identity,
        )  # fmt: skip
        self.stack.callback(optimizer.shutdown)
        optimizer.model = model
        if auxiliary:
            self.assistants.append(optimizer)
        return optimizer

    def add_trainer(self, batch_seconds: float, **kwargs) -> SleepingTrainer:
        self.trainers.append(SleepingTrainer(self.add_peer(**kwargs), batch_seconds, self.stop))
        return self.trainers[-1]

    def train(self, *, epochs: int, timeout: float) -> None:
        """Until each trainer that lives has ended so many epochs."""
        for trainer in self.trainers:
            trainer.optimizer.tracker.announce()
        threads = [threading.Thread(target=trainer.train) for trainer in self.trainers]
        threads += [threading.Thread(target=self._assist, args=(assistant,)) for assistant in self.assistants]
        for thread in threads:
            thread.start()
        give_up_at = time.monotonic() + timeout
        while any(len(t.epochs) < epochs for t in self.trainers if not t.dies) and time.monotonic() < give_up_at:
            time.sleep(0.1)
        self.stop.set()
        for peer in [*(t.optimizer for t in self.trainers), *self.assistants]:
            peer.stop_waiting()
        for thread in threads:
            thread.join()
        counts = [len(trainer.epochs) for trainer in self.trainers]
        assert time.monotonic() < give_up_at, f"only {counts} epochs; {[trainer.rounds for trainer in self.trainers]}"

    def _assist(self, assistant) -> None:
        while not self.stop.wait(0.25):
            if assistant.tracker.global_progress.num_peers > 1:
                assistant.assist()


@pytest.fixture
def start_swarm(tmp_path):
    with contextlib.ExitStack() as stack:
        yield lambda **kwargs: SleepingSwarm(tmp_path, stack, **kwargs)


def assert_averaged_every_epoch(swarm: SleepingSwarm, *, num_members: int, waiting: float = 0.05) -> None:
    """All epochs but the last, whose round is under way, and hardly any waiting after the first.

    A busy machine may hold up one epoch, or an assistant once, without whom trainers average all the same.
    """
    for trainer in swarm.trainers:
        print([(round(s, 1), round(w, 1)) for s, w in trainer.epochs], trainer.rounds)
        averaged = trainer.averaged()
        assert len(averaged) >= len(trainer.epochs) - 1, trainer.rounds
        complete = [done.num_peers == num_members for done in averaged[1:]]
        assert complete.count(False) <= (1 if swarm.assistants else 0), trainer.rounds
        usual = sorted(trainer.epochs[1:], key=lambda epoch: epoch[1])[:-1]
        seconds, waited = map(sum, zip(*usual, strict=True))
        assert waited <= waiting * seconds, trainer.epochs


@pytest.mark.parametrize("client_mode", [False, True], ids=["both can be reached", "one is a client"])
def test_two_trainers_and_an_assistant_average_every_epoch(start_swarm, client_mode):
    swarm = start_swarm(average_state_every=5)
    swarm.add_peer(auxiliary=True)
    swarm.add_trainer(0.2)
    swarm.add_trainer(0.2, client_mode=client_mode)
    swarm.train(epochs=6, timeout=60)
    assert_averaged_every_epoch(swarm, num_members=3)
    for trainer in swarm.trainers:
        assert all(done.seconds < 3.0 for done in trainer.averaged()[1:]), trainer.rounds
        assert any(done.kind == "parameters" and done.complete for done in trainer.rounds), trainer.rounds


def test_clients_average_where_an_assistant_leads(start_swarm):
    swarm = start_swarm()
    swarm.add_peer(auxiliary=True)
    for _ in range(2):
        swarm.add_trainer(0.2, client_mode=True)
    swarm.train(epochs=5, timeout=60)
    assert_averaged_every_epoch(swarm, num_members=3)


def test_trainers_that_do_not_delay_wait_for_each_other_only(start_swarm):
    swarm = start_swarm(delay_optimizer_step=False, delay_grad_averaging=False)
    swarm.add_peer(auxiliary=True)
    for _ in range(2):
        swarm.add_trainer(0.2)
    swarm.train(epochs=6, timeout=60)
    assert_averaged_every_epoch(swarm, num_members=3, waiting=0.5)
    for trainer in swarm.trainers:
        assert all(waited < 3.0 for _, waited in trainer.epochs[1:]), trainer.epochs


def test_trainer_that_is_four_times_slower_averages_every_epoch(start_swarm):
    swarm = start_swarm()
    swarm.add_trainer(0.2)
    swarm.add_trainer(0.8)
    swarm.train(epochs=5, timeout=90)
    assert_averaged_every_epoch(swarm, num_members=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batches", "samples"),
    [((30.0, 30.0), 8), ((1.0, 30.0), 100), ((2.0, 3.0), 200)],
    ids=["batches of 30 s", "one with batches of 30 s", "epochs of two minutes"],
)
@pytest.mark.timeout(900)
def test_trainers_with_long_batches_or_epochs_average_every_epoch(start_swarm, batches, samples):
    swarm = start_swarm(target_batch_size=samples)
    swarm.add_peer(auxiliary=True)
    for seconds in batches:
        swarm.add_trainer(seconds)
    swarm.train(epochs=4, timeout=800)
    assert_averaged_every_epoch(swarm, num_members=3)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("follows", [True, False], ids=["it reports new epochs", "it never ends its epoch"])
def test_record_of_somebody_who_does_not_come_costs_one_wait(start_swarm, follows):
    swarm = start_swarm()
    swarm.add_trainer(0.2)
    swarm.add_trainer(0.2)
    phantom = PhantomTrainer(*swarm.add_node(), swarm.run_id, stop=swarm.stop, follows=follows)
    phantom.start()
    swarm.train(epochs=8, timeout=240)
    phantom.join()
    for trainer in swarm.trainers:
        print(trainer.rounds)
        long_rounds = [done for done in trainer.rounds if done.seconds > 2.5]
        assert len(long_rounds) == 1 and long_rounds[0].seconds < 66.0, trainer.rounds
        assert len(trainer.averaged()) >= len(trainer.epochs) - 1, trainer.rounds


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_trainer_that_dies_is_not_waited_for_long_and_only_once(start_swarm):
    swarm = start_swarm()
    for _ in range(3):
        swarm.add_trainer(0.2)

    def kill() -> None:
        while len(swarm.trainers[2].epochs) < 3:
            time.sleep(0.05)
        time.sleep(1.0)  # with samples of the next epoch
        swarm.trainers[2].dies = True
        tracker = swarm.trainers[2].optimizer.tracker
        tracker.dht = SimpleNamespace(store=lambda *_, **__: asyncio.sleep(0), get=tracker.dht.get)  # no more reports

    killer = threading.Thread(target=kill)
    killer.start()
    swarm.train(epochs=9, timeout=240)
    killer.join()
    for trainer in swarm.trainers[:2]:
        print(trainer.rounds)
        assert len([done for done in trainer.rounds if done.seconds > 6.0]) <= 1, trainer.rounds
        assert max(done.seconds for done in trainer.rounds) < 35.0, trainer.rounds
        assert len(trainer.averaged()) >= len(trainer.epochs) - 1, trainer.rounds
