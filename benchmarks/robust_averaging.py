"""What three liars of ten do to a run, and what `--robust_averaging clip` makes of it: a simulation of rounds.

    python -m benchmarks.robust_averaging        # at most ten minutes, one core

Ten peers train a small model on the demo's text, all with the same batches in each run. Averages are those of the
swarm's own `Judge`, one for each round and all parts, as a peer that is honest and averages all of them. Liars know
what the honest ones send, and agree:

- sign flip: the mean of the honest, turned round, as large as the judge takes it to be possible;
- a little is enough (arXiv 1902.06156): the mean, 1.5 standard deviations of each value away from it, always downwards;
- inner product (arXiv 1903.03936): three times the mean, turned round, which turns the mean of all round as well;
- full-batch claims: the mean turned round, as large as what others send, for which each claims the samples of all.

Not simulated: a liar that averages. What it sends back is checked by those who get it, not clipped.
Ends with code 1 if a target is missed: of the undisturbed drop of the held-out loss clipping keeps 90 % with each
attack, and without liars no more than 1 % less than the mean.
"""

import argparse
import itertools
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from arguments import DEMO, DEMO_CORPUS, PeerArguments
from src.files import write_atomically
from src.optim.lamb import CPULAMB8Bit
from src.optim.parameter_groups import parameter_groups
from src.optim.schedules import learning_rate_factor
from src.swarm.contributions import MAX_NORM_RATIO, Judge
from tasks.mlm.data import make_training_dataset
from tasks.mlm.evaluate import evaluate, held_out_batches
from tasks.mlm.task import build_model
from tasks.mlm.whole_word_mask import DataCollatorForWholeWordMask

HERE = Path(__file__).resolve().parent
NUM_PEERS, NUM_LIARS = 10, 3
EPOCHS, BATCH_SIZE, LENGTH, LEARNING_RATE = 60, 16, 32, 2e-2
NUM_HELD_OUT = 256
MODEL = {"model_type": "lean_albert", "vocab_size": 4000, "embedding_size": 32, "hidden_size": 64,
         "num_attention_heads": 2, "intermediate_size": 128, "num_hidden_layers": 1,
         "classifier_dropout_prob": 0.0}  # fmt: skip
BELOW_LIMIT = 0.99
STANDARD_DEVIATIONS, TIMES = 1.5, 3.0
RULES = {"mean": None, "clip": "clip"}
KEPT_BY_CLIPPING, NOBODY_LIES = 0.9, 0.01  # targets


@dataclass(frozen=True)
class Attack:
    """``lie(honest, limit)``: what all liars send for a part, [size]; ``honest``: [peers, size], ``limit``: a norm."""

    lie: Callable[[torch.Tensor, float], torch.Tensor]
    claims: float = 1.0  # times the samples that it would have

    @staticmethod
    def turned_round(honest: torch.Tensor, norm: float) -> torch.Tensor:
        mean = honest.mean(dim=0)
        return -mean * (norm / float(mean.norm().clamp_min(1e-30)))


ATTACKS = {
    "sign flip": Attack(Attack.turned_round),
    "a little is enough": Attack(lambda honest, limit: honest.mean(0) - STANDARD_DEVIATIONS * honest.std(0)),
    "inner product": Attack(lambda honest, limit: -TIMES * honest.mean(0)),
    "full-batch claims": Attack(
        lambda honest, limit: Attack.turned_round(honest, float(honest.norm(dim=1).median())), claims=NUM_PEERS
    ),
}


@dataclass(frozen=True)
class Outcome:
    """Of one run; losses of held-out text in nats, ``kept``: of the drop without liars and with the mean."""

    attack: str
    rule: str
    first_loss: float
    last_loss: float
    kept: float = 1.0

    @property
    def drop(self) -> float:
        return self.first_loss - self.last_loss


class Simulation:
    """Runs that differ in attack and rule only: model, batches and held-out text are made once."""

    def __init__(self, *, epochs: int = EPOCHS, batch_size: int = BATCH_SIZE, seed: int = 0):
        self.epochs, self.batch_size = epochs, batch_size
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder) / "config.json"
            config.write_text(json.dumps(MODEL), encoding="utf-8")
            names = PeerArguments(run_id="-", model_config_path=str(config), tokenizer_path=str(DEMO / "tokenizer"))
            self.model, tokenizer = build_model(names, seed=seed)
        self.model.config.sparse_prediction = True
        self.start = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.held_out = held_out_batches(
            tokenizer, [str(DEMO / "heldout.txt")], num_instances=NUM_HELD_OUT, max_sequence_length=LENGTH
        )
        self.batches = [self._batches(tokenizer, NUM_PEERS * seed + peer) for peer in range(NUM_PEERS)]

    def _batches(self, tokenizer, seed: int) -> list[dict[str, torch.Tensor]]:
        dataset = make_training_dataset(
            tokenizer, sources=[DEMO_CORPUS], shuffle_seed=seed, max_sequence_length=LENGTH, batch_size=self.batch_size
        )
        collator = DataCollatorForWholeWordMask(tokenizer, pad_to_multiple_of=8, seed=seed)
        loader = DataLoader(dataset, batch_size=self.batch_size, collate_fn=collator)
        return list(itertools.islice(loader, self.epochs))

    def run(self, rule: str, attack: str = "") -> Outcome:
        """One run; ``attack`` of `ATTACKS`, or nobody lies."""
        parameters = list(self.model.parameters())
        with torch.no_grad():
            for parameter, value in zip(parameters, self.start, strict=True):
                parameter.copy_(value)
        optimizer = CPULAMB8Bit(parameter_groups(self.model, 0.01), lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-6,
                                max_grad_norm=1.0)  # fmt: skip
        judge = Judge(max_weight=float(NUM_PEERS * self.batch_size), robust_averaging=RULES[rule])
        first_loss = evaluate(self.model, self.held_out).loss
        for epoch in range(self.epochs):
            factor = learning_rate_factor(epoch, total_steps=self.epochs, warmup_steps=max(1, self.epochs // 7),
                                          num_zero_steps=0, min_lr_ratio=0.02)  # fmt: skip
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * factor
            num_honest = NUM_PEERS - NUM_LIARS if attack else NUM_PEERS
            honest = [self._gradients(self.batches[peer][epoch]) for peer in range(num_honest)]
            averages = average(judge, honest, float(self.batch_size), ATTACKS.get(attack))
            for parameter, values in zip(parameters, averages, strict=True):
                parameter.grad = values.view_as(parameter)
            optimizer.step()
        return Outcome(attack or "nobody lies", rule, first_loss, evaluate(self.model, self.held_out).loss)

    def _gradients(self, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        self.model.zero_grad(set_to_none=True)
        self.model(**batch).loss.backward()
        return [parameter.grad.flatten() for parameter in self.model.parameters()]


def average(judge: Judge, honest: list[list[torch.Tensor]], weight: float, attack: Attack | None) -> list[torch.Tensor]:
    """Of each part, as `JudgingAllReduce` has it done: the first peer averages, all tensors are one part each."""
    own_norm = float(torch.cat(honest[0]).norm())
    room, before, averages = judge.room_for_whole(own_norm), {}, []
    for number, parts in enumerate(zip(*honest, strict=True)):
        contributions = {peer: (part, weight) for peer, part in enumerate(parts)}
        if attack is not None:
            usual = max(judge.parts[number].norm, float(parts[0].norm()))
            lie = attack.lie(torch.stack(parts), BELOW_LIMIT * MAX_NORM_RATIO * usual)
            liars = range(len(parts), NUM_PEERS)
            contributions.update(dict.fromkeys(liars, (lie, attack.claims * weight)))
        result, refused = judge.combine(
            number, contributions, shape=parts[0].shape, own=0, harmless=0.0, small=room, before=before
        )
        if refused:
            raise RuntimeError(f"an attack that is refused says nothing: {refused}")
        averages.append(result)
    return averages


def all_outcomes(simulation: Simulation, attacks=tuple(ATTACKS), *, say=print) -> list[Outcome]:
    """Of both rules, first without liars, then with each attack; each is said when it is there."""
    outcomes, undisturbed = [], None
    for attack, rule in itertools.product(("", *attacks), RULES):
        outcome = simulation.run(rule, attack)
        undisturbed = undisturbed or outcome.drop
        outcomes.append(Outcome(**{**asdict(outcome), "kept": outcome.drop / undisturbed}))
        say(line(outcomes[-1]))
    return outcomes


def line(outcome: Outcome) -> str:
    return (
        f"{outcome.attack:20s} {outcome.rule:5s} held-out loss {outcome.first_loss:.3f} -> {outcome.last_loss:.3f}, "
        f"{outcome.kept:.1%} of the undisturbed drop"
    )


def missed(outcomes: list[Outcome]) -> list[str]:
    """The targets that are missed, a line each."""
    kept = {(outcome.attack, outcome.rule): outcome.kept for outcome in outcomes}
    lines = []
    for attack in dict.fromkeys(outcome.attack for outcome in outcomes):
        mean, clip = kept[attack, "mean"], kept[attack, "clip"]
        if attack == "nobody lies":
            if clip < mean - NOBODY_LIES:
                lines.append(f"nobody lies: clipping keeps {clip:.1%}, more than {NOBODY_LIES:.0%} less than the mean")
        elif clip < KEPT_BY_CLIPPING:
            lines.append(f"{attack}: clipping keeps {clip:.1%}, not {KEPT_BY_CLIPPING:.0%}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="rounds of a run")
    parser.add_argument("--batch_size", type=int, default=BATCH_SIZE, help="samples of a peer in a round")
    parser.add_argument("--seed", type=int, default=0, help="of the model, the batches and their masks")
    parser.add_argument("--results", type=Path, default=HERE / "robust_averaging.json", help="where figures go")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    simulation = Simulation(epochs=options.epochs, batch_size=options.batch_size, seed=options.seed)
    outcomes = all_outcomes(simulation, say=lambda text: print(text, flush=True))
    results = {
        "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.monotonic() - began),
        "peers": NUM_PEERS, "liars": NUM_LIARS, "epochs": options.epochs, "batch_size": options.batch_size,
        "seed": options.seed,
        "outcomes": [asdict(outcome) for outcome in outcomes],
        "missed": missed(outcomes),
    }  # fmt: skip
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    write_atomically(options.results, text)
    for reason in results["missed"]:
        print(f"missed: {reason}")
    return 1 if results["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
