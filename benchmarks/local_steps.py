"""What local steps cost in samples: a swarm that makes them, and one that averages gradients, simulated in one process.

    python -m benchmarks.local_steps                        # a minute and a half: the demo's model and text, one seed
    python -m benchmarks.local_steps --seeds 3 --epochs 60 --local-steps 8 32

All runs of a seed begin alike, see the same samples at the same learning rates, and are scored on the same held-out
text. A synchronous epoch is one step with the gradients of ``workers x batch`` samples; one with local steps takes as
many samples as ``local steps`` of these. `simulate` is plain torch, and equal to the swarm by a test
(tests/swarm/test_local_steps.py).
"""

import argparse
import copy
import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch.utils.data import DataLoader

from arguments import HFTrainerArguments, PeerArguments
from src.console import quiet_libraries
from src.optim.lamb import CPULAMB8Bit
from src.optim.parameter_groups import parameter_groups
from src.swarm.build import make_learning_rate, make_optimizer
from tasks.mlm.data import make_training_dataset
from tasks.mlm.evaluate import evaluate, held_out_batches
from tasks.mlm.task import build_model
from tasks.mlm.whole_word_mask import DataCollatorForWholeWordMask

LENGTH = 64
ORDER_OF_SOURCES = 7  # the seed of the data, beside that of the run


class Worker:
    """A trainer of the simulated swarm: a model and an inner optimizer of its own."""

    def __init__(self, model: torch.nn.Module, training: HFTrainerArguments):
        self.model = copy.deepcopy(model)
        self.inner: CPULAMB8Bit = make_optimizer(parameter_groups(self.model, training.weight_decay), training)

    def step(self, rate: float) -> None:
        for group in self.inner.param_groups:
            group["lr"] = rate
        self.inner.step()
        for parameter in self.model.parameters():
            parameter.grad.zero_()


@torch.no_grad()
def follow(worker: Worker, anchor: Sequence[torch.Tensor]) -> None:
    for own, common in zip(worker.model.parameters(), anchor, strict=True):
        own.copy_(common)


def simulate(  # noqa: PLR0913 (the settings of a run)
    model: torch.nn.Module,
    compute: Callable[[torch.nn.Module, int, int, int], None],
    *,
    training: HFTrainerArguments,
    num_steps: Callable[[int], Sequence[int]],
    num_workers: int,
    epochs: int,
    outer_learning_rate: float = 0.7,
    outer_momentum: float = 0.5,
    synchronous_epochs: int = 0,
    learning_rate: Callable[[int], float] | None = None,
    after_epoch: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Train ``model``, the common parameters, as a swarm would in which nothing is delayed, rounded or lost.

    ``compute(model, worker, epoch, step)`` adds the mean gradient of a batch to the parameters' gradients.
    ``num_steps(epoch)``: those of each worker, by which the average is weighted. In the first ``synchronous_epochs``
    gradients are averaged, for one step. ``learning_rate(epoch)``: by default that of the schedule.
    """
    anchor = [parameter for parameter in model.parameters() if parameter.requires_grad]
    workers, factor = [Worker(model, training) for _ in range(num_workers)], make_learning_rate(training)
    rate_of = learning_rate or (lambda epoch: training.learning_rate * factor(epoch))
    outer = torch.optim.SGD(anchor, lr=outer_learning_rate, momentum=outer_momentum, nesterov=outer_momentum > 0)
    for epoch in range(epochs):
        rate, counts = rate_of(epoch), num_steps(epoch)
        is_synchronous = epoch < synchronous_epochs
        for number, (worker, count) in enumerate(zip(workers, counts, strict=True)):
            for step in range(count):
                compute(worker.model, number, epoch, step)
                if not is_synchronous:
                    worker.step(rate)
        if is_synchronous:
            average_gradients(workers, counts)
            for worker in workers:
                worker.step(rate)
            follow_first(anchor, workers)
        else:
            step_anchor(outer, anchor, workers, counts)
        for worker in workers:
            follow(worker, anchor)
        after_epoch(epoch + 1)


@torch.no_grad()
def average_gradients(workers: Sequence[Worker], num_steps: Sequence[int]) -> None:
    """Each worker's gradients are sums of ``num_steps`` means; all get the mean of all of them."""
    for parameters in zip(*(worker.model.parameters() for worker in workers), strict=True):
        mean = sum(parameter.grad for parameter in parameters) / sum(num_steps)
        for parameter in parameters:
            parameter.grad.copy_(mean)


@torch.no_grad()
def follow_first(anchor: Sequence[torch.Tensor], workers: Sequence[Worker]) -> None:
    for common, own in zip(anchor, workers[0].model.parameters(), strict=True):
        common.copy_(own)


@torch.no_grad()
def step_anchor(outer, anchor: Sequence[torch.Tensor], workers: Sequence[Worker], num_steps: Sequence[int]) -> None:
    total = sum(num_steps)
    for common, *own in zip(anchor, *(worker.model.parameters() for worker in workers), strict=True):
        differences = zip(own, num_steps, strict=True)
        common.grad = sum((common - parameter) * (steps / total) for parameter, steps in differences)
    outer.step()


def endless_batches(tokenizer, seed: int, batch_size: int):
    """Masked batches of the demo's text."""
    collator = DataCollatorForWholeWordMask(tokenizer, seed=seed)
    for number in itertools.count():
        dataset = make_training_dataset(
            tokenizer,
            sources=["demo/corpus/*.txt"],
            shuffle_seed=1000 * seed + ORDER_OF_SOURCES + number,
            max_sequence_length=LENGTH,
            batch_size=batch_size,
        )
        yield from DataLoader(dataset, batch_size=batch_size, collate_fn=collator)


def held_out_losses(flags, seed: int, local_steps: int) -> list[tuple[int, float]]:
    """(samples, held-out loss) after every tenth of a run; ``local_steps`` 1 is the synchronous one."""
    peer = PeerArguments(run_id="simulated", model_config_path="demo/config.json", tokenizer_path="demo/tokenizer")
    model, tokenizer = build_model(peer, seed=seed)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    held_out = held_out_batches(tokenizer, ["demo/heldout.txt"], num_instances=256, max_sequence_length=LENGTH)
    streams = [endless_batches(tokenizer, 100 * seed + number, flags.batch) for number in range(flags.workers)]
    in_step = flags.epochs if local_steps == 1 else min(flags.synchronous_epochs, flags.epochs)
    epochs, found = in_step + (flags.epochs - in_step) // local_steps, []
    training = HFTrainerArguments(
        output_dir="outputs/local_steps",
        learning_rate=flags.learning_rate,
        total_steps=flags.epochs,
        warmup_steps=flags.epochs // 8,
        num_zero_lr_steps=0,
        min_8bit_size=65536,
        use_cpu=True,
    )

    factor = make_learning_rate(training)

    def compute(model: torch.nn.Module, worker: int, epoch: int, step: int) -> None:
        model(**next(streams[worker])).loss.backward()

    def position(epoch: int) -> int:
        """In steps of the synchronous run."""
        return min(epoch, in_step) + max(0, epoch - in_step) * local_steps

    def score(epoch: int) -> None:
        every = max(1, flags.epochs // 10)
        if position(epoch) // every > position(epoch - 1) // every or epoch == epochs:
            found.append((position(epoch) * flags.workers * flags.batch, evaluate(model, held_out).loss))

    simulate(
        model,
        compute,
        training=training,
        num_steps=lambda epoch: [1 if epoch < in_step else local_steps] * flags.workers,
        num_workers=flags.workers,
        epochs=epochs,
        outer_learning_rate=flags.outer_learning_rate,
        outer_momentum=flags.outer_momentum,
        synchronous_epochs=in_step,
        learning_rate=lambda epoch: training.learning_rate * factor(position(epoch)),
        after_epoch=score,
    )
    return found


def samples_until(loss: float, curve: list[tuple[int, float]]) -> float | None:
    """Samples after which a curve has come down to a loss, in a straight line between two points; None if never."""
    before, higher = 0, None
    for samples, value in curve:
        if value <= loss:
            share = 1.0 if higher is None else (higher - loss) / (higher - value)
            return before + share * (samples - before)
        before, higher = samples, value
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local-steps", type=int, nargs="+", default=[8], help="between two averagings")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16, help="samples of a worker's step")
    parser.add_argument("--epochs", type=int, default=80, help="of the synchronous run")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--outer-learning-rate", type=float, default=0.7)
    parser.add_argument("--outer-momentum", type=float, default=0.5)
    parser.add_argument("--synchronous-epochs", type=int, default=0, help="before the first local steps")
    flags = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    print(f"{'seed':>4} {'local steps':>11} {'held-out loss':>13} {'synchronous':>11} {'samples, times':>14}")
    for seed in range(flags.seeds):
        run = functools.partial(held_out_losses, flags, seed)
        synchronous = run(1)
        for local_steps in flags.local_steps:
            curve = run(local_steps)
            samples, loss = curve[-1]
            needed = samples_until(loss, synchronous)
            ratio = "under 1" if needed is None else f"{samples / needed:.2f}"
            print(f"{seed:>4} {local_steps:>11} {loss:>13.3f} {synchronous[-1][1]:>11.3f} {ratio:>14}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
