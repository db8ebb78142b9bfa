"""Which recipe makes a better model of the same text: the one of 2022 or a modern one, and which part of it helps?

    python -m benchmarks.recipes --train 'corpus/train.jsonl.gz' --held_out 'corpus/valid.jsonl.gz' --pairs DATA \\
        --recipes faithful modern --seeds 3 --samples 25600 102400
    python -m benchmarks.recipes --short          # three minutes, on the demo's text: does it all work?

Trains the same small model in one process with each recipe, from each seed, which is also another start in the data,
with as many samples as are asked for. It is scored on the way: on held-out text, with the same masked positions in the
layout of two stretches and of one, and with --pairs on minimal pairs (RuBLiMP). Figures go to --results (JSON), a table
(.md) and a picture (.png) beside it. What is finished lies in --work_dir, and a later call goes on from there.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from arguments import DEMO, DEMO_CORPUS, ArgumentParser, HFTrainerArguments, TrainerPeerArguments
from src.files import write_atomically
from src.models import load_tokenizer
from src.swarm.build import make_groups, make_learning_rate, make_optimizer
from tasks.mlm.data import SWAPPED, make_training_dataset
from tasks.mlm.evaluate import evaluate
from tasks.mlm.task import build_data, build_model
from tasks.mlm.train_tokenizer import parse_arguments as parse_tokenizer_arguments
from tasks.mlm.train_tokenizer import train_tokenizer
from tasks.mlm.whole_word_mask import DataCollatorForWholeWordMask

HERE = Path(__file__).resolve().parent
VOCAB_SIZE, WARMUP_SHARE, NUM_SCORES = 8000, 0.15, 8
MODEL = {"model_type": "lean_albert", "num_hidden_layers": 4, "share_large_matrices": 1}
# LAMB's rate for models of this size (docs/performance.md), where `recipes/small` has half of that for a longer run
FAITHFUL = {"learning_rate": 1e-2}
# What is taken out of the modern recipe, once each: flags go back to what they are in the faithful one.
PARTS = {
    "muon": ("optimizer",),
    "masks": ("mlm_probability", "final_mlm_probability"),
    "one_stretch": ("sentence_order",),
    "wsd": ("schedule",),
}
SHORT = {"hidden_size": 64, "length": 64, "batch_size": 16, "seeds": 2, "samples": [480], "held_out_samples": 64}


@functools.cache
def modern_flags() -> dict:
    """The flags of ``recipes/small/modern.args``."""
    parser = ArgumentParser(HFTrainerArguments)
    _, given = parser.parse_first(parser.read_files(["@recipes/small/modern.args"]))
    return given


def recipes() -> dict[str, dict]:
    """{name: flags} of all recipes that can be compared."""
    modern = FAITHFUL | modern_flags()
    without = {
        f"without_{part}": {name: value for name, value in modern.items() if name not in flags}
        for part, flags in PARTS.items()
    }
    return {"faithful": FAITHFUL, "modern": modern, **without}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", default=[DEMO_CORPUS], help="text to train on (default: the demo's)")
    parser.add_argument("--held_out", nargs="+", default=[str(DEMO / "heldout.txt")], help="text to score on")
    parser.add_argument("--pairs", metavar="DATA", help="directory that holds RuBLiMP/PARADIGM.csv")
    parser.add_argument("--pairs_each", type=int, default=10, help="pairs of each paradigm")
    parser.add_argument("--recipes", nargs="+", choices=list(recipes()), default=list(recipes()), metavar="RECIPE",
                        help=f"of {', '.join(recipes())}")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, help="runs of each recipe")
    parser.add_argument("--samples", type=int, nargs="+", default=[25600], help="budgets; each has its own schedule")
    parser.add_argument("--hidden_size", type=int, default=256, help="the intermediate size is four times that")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sample")
    parser.add_argument("--batch_size", type=int, default=64, help="samples of an update")
    parser.add_argument("--held_out_samples", type=int, default=512, help="samples to score on")
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--short", action="store_true", help="a tiny model, two seeds, 30 updates")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/recipes"), help="tokenizer and finished runs")
    parser.add_argument("--results", type=Path, default=HERE / "recipes.json", help="figures; .md and .png beside it")
    options = parser.parse_args(argv)
    if options.short:
        parser.set_defaults(**SHORT)
        options = parser.parse_args(argv)
    if min(options.seeds, options.pairs_each, *options.samples) < 1:
        parser.error("--seeds, --samples and --pairs_each must be positive")
    if min(options.samples) < 10 * options.batch_size:
        parser.error(f"--samples {min(options.samples)}: fewer than ten updates of --batch_size {options.batch_size}")
    if options.pairs is not None and importlib.util.find_spec("tasks.rublimp") is None:
        parser.error("--pairs: this version has no tasks.rublimp that scores them")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    torch.set_num_threads(options.threads)
    try:
        bench = Bench(options)
        runs = [
            bench.run(recipe, samples, seed)
            for samples in options.samples
            for seed in range(options.seeds)  # outside: a bench that is stopped has compared all recipes on some seeds
            for recipe in options.recipes
        ]
    except (ValueError, OSError) as error:
        print(f"benchmarks.recipes: error: {error}", file=sys.stderr)
        return 2
    results = {"machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
               "date": time.strftime("%Y-%m-%d"), "settings": bench.settings, "runs": runs}  # fmt: skip
    write_atomically(options.results, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    table = describe(runs)
    write_atomically(options.results.with_suffix(".md"), table)
    draw(runs, options.results.with_suffix(".png"))
    print(table)
    return 0


class Bench:
    """Everything that the runs have in common, and the folder in which they are kept."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.folder = options, options.work_dir
        self.folder.mkdir(parents=True, exist_ok=True)
        compared = ("train", "held_out", "hidden_size", "length", "batch_size", "held_out_samples", "bf16", "threads")
        self.settings = {name: getattr(options, name) for name in (*compared, "pairs", "pairs_each")}
        self._require_same_settings()
        self.tokenizer_path = self._make_tokenizer()
        self.tokenizer = load_tokenizer(self.tokenizer_path)
        width = options.hidden_size
        config = MODEL | {"vocab_size": len(self.tokenizer), "hidden_size": width, "intermediate_size": 4 * width,
                          "embedding_size": min(width, 256), "num_attention_heads": max(1, width // 64)}  # fmt: skip
        self.config_path = self.folder / "config.json"
        write_atomically(self.config_path, json.dumps(config, indent=2))
        self.held_out = held_out_layouts(
            self.tokenizer, options.held_out, num_samples=options.held_out_samples, length=options.length
        )
        self.score_pairs = self._pair_scorer()

    def _require_same_settings(self) -> None:
        path, text = self.folder / "settings.json", json.dumps(self.settings, indent=1, ensure_ascii=False)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise ValueError(f"--work_dir {self.folder} holds runs with other settings ({path}); name another folder")
        write_atomically(path, text)

    def _make_tokenizer(self) -> Path:
        if self.options.train == [DEMO_CORPUS]:
            return DEMO / "tokenizer"
        path = self.folder / "tokenizer"
        if not (path / "tokenizer.json").exists():
            words = ["--sources", *self.options.train, "--held_out", *self.options.held_out]
            train_tokenizer(parse_tokenizer_arguments([*words, "--vocab_size", str(VOCAB_SIZE), "--output", str(path)]))
        return path

    def _pair_scorer(self) -> Callable[[Path], dict] | None:
        if self.options.pairs is None:
            return None
        from tasks.rublimp.checkpoints import pair_scorer

        return pair_scorer(self.tokenizer, self.options.pairs, pairs_each=self.options.pairs_each)

    def run(self, recipe: str, samples: int, seed: int) -> dict:
        """One run's scores; from the folder if it is finished there."""
        name = f"{recipe}-{samples}-{seed}"
        path = self.folder / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        run = Run(self, name, recipes()[recipe], samples=samples, seed=seed)
        result = {"recipe": recipe, "samples": samples, "seed": seed, "flags": recipes()[recipe], "curve": run.train()}
        write_atomically(path, json.dumps(result, indent=1) + "\n")
        run.forget()
        return result


class Run:
    """One model in training, as a trainer that is alone would train it; its state is kept after each score."""

    def __init__(self, bench: Bench, name: str, flags: dict, *, samples: int, seed: int):
        options = bench.options
        self.bench, self.name, self.batch_size = bench, name, options.batch_size
        self.num_updates = samples // options.batch_size
        self.training = HFTrainerArguments(
            output_dir=str(bench.folder), use_cpu=True, per_device_train_batch_size=options.batch_size,
            total_steps=self.num_updates, warmup_steps=round(WARMUP_SHARE * self.num_updates), num_zero_lr_steps=0,
            max_sequence_length=options.length, initial_sequence_length=options.length, pad_to_multiple_of=8,
            **flags,
        )  # fmt: skip
        peer = TrainerPeerArguments(
            run_id="recipes",
            model_config_path=str(bench.config_path),
            tokenizer_path=str(bench.tokenizer_path),
            dataset_sources=options.train,
        )
        self.model, _ = build_model(peer, seed=seed, sentence_order=self.training.sentence_order)
        self.optimizer = make_optimizer(make_groups(self.model, self.training), self.training)
        start = f"data {seed}".encode()
        self.dataset, self.collator, self.schedule = build_data(bench.tokenizer, peer, self.training, peer_seed=start)
        self.state_path = bench.folder / f"{name}.pth"
        self.curve, self.update, self.seconds = [], 0, 0.0
        if self.state_path.exists():
            self._restore()

    def train(self) -> list[dict]:
        """The scores on the way, the last one at the end."""
        factor, batches = make_learning_rate(self.training), self._batches()
        due = {round(self.num_updates * part / NUM_SCORES) for part in range(1, NUM_SCORES + 1)}
        self.model.train()
        while self.update < self.num_updates:
            began = time.process_time()
            for group in self.optimizer.param_groups:
                group["lr"] = self.training.learning_rate * factor(self.update)
            self.schedule.follow(self.update)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bench.options.bf16):
                loss = self.model(**next(batches)).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.update += 1
            self.seconds += time.process_time() - began
            if self.update in due:
                self._score()
        return self.curve

    def _batches(self) -> Iterator[dict]:
        return iter(DataLoader(self.dataset, batch_size=self.batch_size, collate_fn=self.collator))

    def _score(self) -> None:
        layout = "two stretches" if self.training.sentence_order else "one stretch"
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bench.options.bf16):
            score = evaluate(self.model, self.bench.held_out[layout])
        point = {"samples": self.update * self.batch_size, "cpu_seconds": round(self.seconds, 2),
                 "loss": score.loss, "accuracy": score.accuracy}  # fmt: skip
        if self.bench.score_pairs is not None:
            point["pairs"] = self.bench.score_pairs(self._saved_model())["accuracy"]
        self.curve.append(point)
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "curve": self.curve,
                 "update": self.update, "seconds": self.seconds, "dataset": self.dataset.state_dict(),
                 "collator": self.collator.state_dict()}  # fmt: skip
        write_atomically(self.state_path, lambda file: torch.save(state, file))
        values = "  ".join(f"{key} {value:.4g}" for key, value in point.items())
        print(f"{self.name}: {values}", flush=True)

    def _saved_model(self) -> Path:
        folder = self.bench.folder / "scored"
        self.model.save_pretrained(folder)
        return folder

    def _restore(self) -> None:
        state = torch.load(self.state_path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.dataset.load_state_dict(state["dataset"])
        self.collator.load_state_dict(state["collator"])
        self.curve, self.update, self.seconds = state["curve"], state["update"], state["seconds"]
        print(f"{self.name}: going on at {self.update * self.batch_size} samples", flush=True)

    def forget(self) -> None:
        """Its state is of no use any more."""
        self.state_path.unlink(missing_ok=True)


# -- held-out text


def held_out_layouts(
    tokenizer, sources: Sequence[str], *, num_samples: int, length: int
) -> dict[str, list[dict[str, torch.Tensor]]]:
    """The same text with the same tokens hidden, in batches of either layout; 15 % are masked, see `evaluate`."""
    dataset = make_training_dataset(tokenizer, sources=sources, shuffle_seed=0, max_sequence_length=length)
    collator = DataCollatorForWholeWordMask(tokenizer, seed=0)
    rows = [collator([item]) for item in itertools.islice(dataset, num_samples)]
    rows = [{name: value.squeeze(0) for name, value in row.items()} for row in rows]
    rows.sort(key=lambda row: len(row["input_ids"]))
    layouts = {"two stretches": rows, "one stretch": [in_one_stretch(row) for row in rows]}
    fillers = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "token_type_ids": 0, "labels": -100}
    return {name: [make_batch(rows[start : start + 32], fillers) for start in range(0, len(rows), 32)]
            for name, rows in layouts.items()}  # fmt: skip


def in_one_stretch(row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """[CLS] A [SEP] B [SEP] as [CLS] A B [SEP], or B A where they are swapped."""
    types = row["token_type_ids"]
    first, second = (types == 0).nonzero().flatten().tolist(), (types == 1).nonzero().flatten().tolist()
    cls, *first, first_sep = first
    if second:
        *second, _ = second
        first, second = (second, first) if int(row["sentence_order_label"]) == SWAPPED else (first, second)
    order = torch.tensor([cls, *first, *second, first_sep])
    texts = {name: row[name][order] for name in ("input_ids", "attention_mask", "labels")}
    return texts | {"token_type_ids": torch.zeros_like(order), "sentence_order_label": torch.tensor(-100)}


def make_batch(rows: list[dict[str, torch.Tensor]], fillers: dict[str, int]) -> dict[str, torch.Tensor]:
    batch = {
        name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=filler)
        for name, filler in fillers.items()
    }
    return batch | {"sentence_order_label": torch.stack([row["sentence_order_label"] for row in rows])}


# -- what came out


def by_recipe(runs: Sequence[dict], samples: int) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for run in runs:
        if run["samples"] == samples:
            found.setdefault(run["recipe"], []).append(run)
    return found


def value_at(curve: Sequence[dict], cpu_seconds: float, name: str) -> float:
    """A score after so much CPU time, on the line between the two nearest ones; nan before the first."""
    for before, after in itertools.pairwise(curve):
        if before["cpu_seconds"] <= cpu_seconds <= after["cpu_seconds"]:
            share = (cpu_seconds - before["cpu_seconds"]) / max(1e-9, after["cpu_seconds"] - before["cpu_seconds"])
            return before[name] + share * (after[name] - before[name])
    return curve[-1][name] if cpu_seconds > curve[-1]["cpu_seconds"] else math.nan


def seconds_until(curve: Sequence[dict], loss: float) -> float:
    """CPU time until the held-out loss is no higher; nan if it never is."""
    if curve[0]["loss"] <= loss:
        return curve[0]["cpu_seconds"]
    for before, after in itertools.pairwise(curve):
        if after["loss"] <= loss:
            share = (before["loss"] - loss) / (before["loss"] - after["loss"])
            return before["cpu_seconds"] + share * (after["cpu_seconds"] - before["cpu_seconds"])
    return math.nan


def spread(values: Sequence[float]) -> str:
    """Mean, and the standard deviation where there are several."""
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def describe(runs: Sequence[dict]) -> str:
    """A page: for each budget the noise first, then what each recipe reaches with equal samples and CPU time."""
    lines = ["# Recipes compared", "", "`python -m benchmarks.recipes`; mean ± standard deviation over seeds, each of "
             "which is another start in the data, too.", ""]  # fmt: skip
    for samples in dict.fromkeys(run["samples"] for run in runs):
        lines += describe_budget(by_recipe(runs, samples), samples)
    return "\n".join(lines)


def table_row(*cells: str, is_head: bool = False) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in ([cells, ["---"] * len(cells)] if is_head else [cells])]


def describe_budget(found: dict[str, list[dict]], samples: int) -> list[str]:
    finals = {recipe: [run["curve"][-1] for run in some] for recipe, some in found.items()}
    shortest = min(point["cpu_seconds"] for points in finals.values() for point in points)
    has_pairs = all("pairs" in point for points in finals.values() for point in points)
    base = "faithful" if "faithful" in found else next(iter(found))
    losses = [point["loss"] for point in finals[base]]
    noise = f"{statistics.stdev(losses):.3f} nats" if len(losses) > 1 else "unknown: there is one seed"
    lines = [f"## {samples} samples", "", f"Noise: the standard deviation of {base}'s held-out loss is {noise}.",
             f"Equal CPU time: after {shortest:.0f} s, which the fastest run took.", "",
             *table_row("recipe", "held-out loss", "accuracy", *["RuBLiMP"] * has_pairs, "CPU seconds",
                        "loss at equal CPU time", f"share of {base}'s CPU time", is_head=True)]  # fmt: skip
    goal = {run["seed"]: run["curve"][-1] for run in found[base]}
    for recipe, some in found.items():
        points = finals[recipe]
        cells = [recipe, spread([p["loss"] for p in points]), spread([p["accuracy"] for p in points])]
        cells += [spread([p["pairs"] for p in points])] if has_pairs else []
        cells += [f"{statistics.mean(p['cpu_seconds'] for p in points):.0f}"]
        cells += [spread([value_at(run["curve"], shortest, "loss") for run in some])]
        shares = [
            seconds_until(run["curve"], goal[run["seed"]]["loss"]) / goal[run["seed"]]["cpu_seconds"]
            for run in some
            if run["seed"] in goal
        ]
        reached = [share for share in shares if not math.isnan(share)]
        cells += [f"{statistics.mean(reached):.2f} ({len(reached)} of {len(shares)})" if reached else "not reached"]
        lines += table_row(*cells)
    return [*lines, ""]


def draw(runs: Sequence[dict], picture: Path) -> None:
    """Held-out loss by samples and by CPU time, and with pairs their accuracy, of the largest budget."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = by_recipe(runs, max(run["samples"] for run in runs))
    has_pairs = all("pairs" in point for some in found.values() for run in some for point in run["curve"])
    panels = [("samples", "loss", "samples"), ("cpu_seconds", "loss", "CPU seconds")]
    panels += [("cpu_seconds", "pairs", "CPU seconds")] if has_pairs else []
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 4), layout="constrained")
    for (x, y, label), axis in zip(panels, axes, strict=True):
        for number, (recipe, some) in enumerate(found.items()):
            for run in some:
                axis.plot([p[x] for p in run["curve"]], [p[y] for p in run["curve"]], color=f"C{number}", alpha=0.7,
                          label=recipe if run is some[0] else None)  # fmt: skip
        axis.set_xlabel(label)
        axis.set_ylabel("held-out loss, nats" if y == "loss" else "RuBLiMP, share right")
    axes[0].legend()
    figure.savefig(picture, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
