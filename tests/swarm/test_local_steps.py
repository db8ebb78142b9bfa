"""A swarm that makes local steps computes what a simulation in one process does, and goes on when rounds fail."""

import threading
import time

import pytest
import torch
from hivemind.compression import NoCompression

from arguments import CollaborationArguments, HFTrainerArguments, PeerArguments
from benchmarks.local_steps import simulate
from src.swarm import build
from src.swarm.build import make_collaborative_optimizer
from src.swarm.local_steps import LocalStepsOptimizer
from tests.reference.node import start_node

BATCH = 4


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))


def compute(model: torch.nn.Module, worker: int, epoch: int, step: int) -> None:
    """Add the gradients of a batch that no other worker, epoch or step has."""
    generator = torch.Generator().manual_seed(1000 * worker + 100 * epoch + step)
    inputs = torch.randn(BATCH, 6, generator=generator)
    targets = torch.randn(BATCH, 3, generator=generator)
    (model(inputs) - targets).square().mean().backward()


def settings(tmp_path, **options) -> dict:
    options = {"local_batch_size": BATCH, "target_batch_size": 2**20, **options}
    return {
        "collaboration": CollaborationArguments(
            matchmaking_time=3.0,
            next_chunk_timeout=8,
            averaging_timeout=30,
            **{"delay_optimizer_step": False, "delay_grad_averaging": False, **options},
        ),
        "training": HFTrainerArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            learning_rate=0.05,
            warmup_steps=2,
            num_zero_lr_steps=0,
            total_steps=20,
        ),
    }


@pytest.fixture
def start_optimizers(tmp_path, shut_down_at_end, monkeypatch):
    """Starts trainers of one run, without rounding on the way; each with a model of its own that begins alike."""
    monkeypatch.setattr(build, "gradient_compression", NoCompression)
    monkeypatch.setattr(build, "parameter_compression", NoCompression)

    def start(count: int, **options) -> list[LocalStepsOptimizer]:
        nodes, optimizers = [], []
        for _ in range(count):
            node, identity = start_node("local", *nodes)
            nodes.append(shut_down_at_end(node))
            model = make_model()
            arguments = settings(tmp_path, **options)
            optimizer = make_collaborative_optimizer(
                model, node, peer=PeerArguments(run_id="local", min_vector_size=1), identity=identity, **arguments
            )
            optimizer.model = model
            optimizers.append(shut_down_at_end(optimizer))
        meet(optimizers)
        return optimizers

    return start


def meet(optimizers) -> None:
    give_up_at = time.monotonic() + 20
    while any(optimizer.tracker.global_progress.num_peers < len(optimizers) for optimizer in optimizers):
        assert time.monotonic() < give_up_at, "the trainers do not find each other"
        for optimizer in optimizers:
            optimizer.tracker.announce()
        time.sleep(0.1)


def train_epoch(optimizers, num_steps, epoch: int) -> None:
    """As many steps as each has to make, then all end the epoch together."""

    def train(number: int) -> None:
        optimizer = optimizers[number]
        for step in range(num_steps[number]):
            compute(optimizer.model, number, epoch, step)
            optimizer.step(batch_size=BATCH)
            assert optimizer.local_epoch == epoch, "no epoch ends by itself"
        optimizer._update_global_epoch(None)

    threads = [threading.Thread(target=train, args=(number,)) for number in range(len(optimizers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [optimizer.local_epoch for optimizer in optimizers] == [epoch + 1] * len(optimizers)


def parameters_of(optimizer) -> torch.Tensor:
    return torch.cat([parameter.detach().view(-1) for parameter in optimizer.model.parameters()])


@pytest.mark.parametrize(
    ("num_steps", "options"),
    [([3, 3], {}), ([3, 1], {"outer_momentum": 0.9, "local_steps_after": 2}), ([2], {})],
    ids=["two trainers", "of unequal speed, after synchronous epochs", "alone"],
)
@pytest.mark.swarm
def test_swarm_in_lockstep_equals_the_simulation(tmp_path, start_optimizers, num_steps, options):
    epochs = 5
    optimizers, common = start_optimizers(len(num_steps), **options), make_model()
    for parameter in common.parameters():
        parameter.grad = torch.zeros_like(parameter)
    expected = []
    simulate(
        common,
        compute,
        training=settings(tmp_path)["training"],
        num_steps=num_steps,
        epochs=epochs,
        outer_momentum=options.get("outer_momentum", 0.5),
        synchronous_epochs=options.get("local_steps_after", 0),
        after_epoch=lambda epoch: expected.append(
            torch.cat([p.detach().view(-1).clone() for p in common.parameters()])
        ),
    )
    assert float((expected[-1] - expected[0]).abs().max()) > 0.02
    for epoch in range(epochs):
        train_epoch(optimizers, num_steps, epoch)
        for optimizer in optimizers:
            assert all(one.complete for one in optimizer.finished_rounds())
            torch.testing.assert_close(parameters_of(optimizer), expected[epoch], rtol=0, atol=1e-5)
    local_epochs = epochs - options.get("local_steps_after", 0)
    assert [optimizer.inner_steps for optimizer in optimizers] == [steps * local_epochs for steps in num_steps]
