"""Does a swarm learn as well as one process? Two trainers and an auxiliary peer against fp32 LAMB on as many samples.

    python -m benchmarks.swarm_on_corpus --train 'corpus/train.jsonl.gz' --held_out 'corpus/valid.jsonl.gz'

Trains a tokenizer of 8,000 pieces and a small model (hidden 256, 4 layers that share their matrices, 128 tokens) on
loopback, then the same model in one process, and writes figures (JSON) and learning curves (PNG). About 25 minutes on
two CPU cores, of which the swarm takes half.
"""

import argparse
import dataclasses
import json
import platform
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from arguments import HFTrainerArguments, PeerArguments
from src.metrics.journal import read_journal
from src.models import LeanAlbertForPreTraining
from src.optim.lamb import CPULAMB8Bit
from src.optim.parameter_groups import parameter_groups
from src.process.local_swarm import LocalSwarm
from src.swarm.build import make_learning_rate
from src.trainer.run_summary import compare_parameters
from tasks.mlm.data import make_training_dataset
from tasks.mlm.evaluate import evaluate, held_out_batches
from tasks.mlm.task import build_model
from tasks.mlm.train_tokenizer import parse_arguments, train_tokenizer
from tasks.mlm.whole_word_mask import DataCollatorForWholeWordMask

HERE = Path(__file__).resolve().parent
VOCAB_SIZE, LENGTH, MICRO_BATCH = 8000, 128, 8
MODEL = {
    "model_type": "lean_albert",
    "vocab_size": VOCAB_SIZE,
    "embedding_size": 256,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "share_large_matrices": 1,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
}
NEVER = 10**12  # more values than any parameter has: all statistics stay 32-bit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", required=True, help="files to train on")
    parser.add_argument("--held_out", nargs="+", required=True, help="files to score on")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/swarm_on_corpus"), help="everything in between")
    parser.add_argument(
        "--results", type=Path, default=HERE / "swarm_on_corpus.json", help="figures; the PNG beside it"
    )
    parser.add_argument("--epochs", type=int, default=300, help="global steps")
    parser.add_argument("--target_batch_size", type=int, default=64, help="samples in a global step")
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--warmup", type=int, default=50, help="epochs in which the learning rate rises")
    options = parser.parse_args()
    options.work_dir.mkdir(parents=True, exist_ok=True)
    run_directory = options.work_dir / time.strftime("run-%Y%m%d-%H%M%S")
    tokenizer_path, config_path = prepare(options)
    schedule = [
        *("--learning_rate", str(options.learning_rate), "--warmup_steps", str(options.warmup)),
        *("--num_zero_lr_steps", "0", "--total_steps", str(options.epochs), "--min_8bit_size", "65536"),
    ]
    model_arguments = ["--model_config_path", str(config_path), "--tokenizer_path", str(tokenizer_path)]

    swarm_seconds = run_swarm(options, run_directory, [*schedule, *model_arguments])
    run = run_directory / "corpus"
    curves = {"swarm": swarm_curve(run)}
    model, tokenizer = build_model(
        PeerArguments(run_id="corpus", model_config_path=str(config_path), tokenizer_path=str(tokenizer_path)), seed=0
    )
    batches = held_out_batches(tokenizer, options.held_out, max_sequence_length=LENGTH)
    swarm_model = LeanAlbertForPreTraining.from_pretrained(run / "aux" / "checkpoint")
    model.load_state_dict(torch.load(run / "trainer" / "backup.pth", weights_only=True)["model"])
    scores = {"swarm": evaluate(model, batches), "swarm, stored by the auxiliary peer": evaluate(swarm_model, batches)}

    samples = sum(point["samples"] for point in curves["swarm"])
    started = time.monotonic()
    model, curves["one process, fp32 LAMB"] = train_alone(options, config_path, tokenizer_path, samples=samples)
    scores["one process, fp32 LAMB"] = evaluate(model, batches)
    write_results(
        options,
        run,
        scores=scores,
        curves=curves,
        seconds={"swarm": swarm_seconds, "one process": time.monotonic() - started},
        samples=samples,
    )
    return 0


def prepare(options) -> tuple[Path, Path]:
    """Train the tokenizer unless an earlier call did, and write the model's configuration."""
    tokenizer_path, config_path = options.work_dir / "tokenizer", options.work_dir / "config.json"
    if not (tokenizer_path / "tokenizer.json").exists():
        arguments = ["--sources", *options.train, "--held_out", *options.held_out]
        arguments += ["--vocab_size", str(VOCAB_SIZE), "--output", str(tokenizer_path)]
        train_tokenizer(parse_arguments(arguments))
    config_path.write_text(json.dumps(MODEL, indent=2), encoding="utf-8")
    return tokenizer_path, config_path


def run_swarm(options, run_directory: Path, arguments: list[str]) -> float:
    """Train with an auxiliary peer and two trainers until the last epoch; returns the seconds it took."""
    shared = [
        *("--run_id", "corpus", "--output_dir", str(run_directory), *arguments),
        *("--target_batch_size", str(options.target_batch_size), "--average_state_every", "5"),
        *("--matchmaking_time", "1.2", "--next_chunk_timeout", "20", "--averaging_timeout", "60"),
        *("--min_vector_size", "1000"),
        # Steps wait for the average: at four times the usual learning rate, gradients that are a step old diverge.
        *("--delay_optimizer_step", "False", "--delay_grad_averaging", "False"),
    ]
    auxiliary = [
        *("--assist_in_averaging", "--assist_refresh", "0.25", "--refresh_period", "1"),
        *("--store_checkpoints", "--save_checkpoint_epoch_interval", "20"),
    ]
    trainer = [
        *("--dataset_sources", *options.train, "--per_device_train_batch_size", str(MICRO_BATCH)),
        *("--max_sequence_length", str(LENGTH), "--initial_sequence_length", str(LENGTH)),
        *("--sequence_length_warmup_steps", "0", "--pad_to_multiple_of", "8"),
        *("--backup_every_epochs", "50", "--wait_for_peers", "2"),
    ]
    with LocalSwarm(environment={"OMP_NUM_THREADS": "1"}) as swarm:
        swarm.start("aux", "run_aux_peer.py", [*shared, *auxiliary])
        trainers = [swarm.start(f"trainer {i}", "run_trainer.py", [*shared, *trainer]) for i in (1, 2)]
        started = time.monotonic()
        codes = [peer.process.wait() for peer in trainers]
        seconds = time.monotonic() - started
    if any(codes):
        raise RuntimeError(f"a trainer ended with code {max(codes)}")
    return seconds


def swarm_curve(run: Path) -> list[dict]:
    """Loss and samples of both trainers together, by epoch."""
    epochs: dict[int, list[dict]] = {}
    for name in ("trainer", "trainer-2"):
        for record in read_journal(run / name / "metrics.jsonl"):
            if record["event"] == "epoch":
                epochs.setdefault(record["epoch"], []).append(record)
    return [
        {
            "epoch": epoch,
            "samples": sum(record["samples"] for record in records),
            "loss": sum(r["mlm_loss"] * r["samples"] for r in records) / max(1, sum(r["samples"] for r in records)),
        }
        for epoch, records in sorted(epochs.items())
    ]


def train_alone(options, config_path: Path, tokenizer_path: Path, *, samples: int):
    """The same model, data and schedule in one process with unquantised LAMB and no delay; returns model and curve."""
    torch.set_num_threads(2)
    peer = PeerArguments(run_id="alone", model_config_path=str(config_path), tokenizer_path=str(tokenizer_path))
    model, tokenizer = build_model(peer, seed=0)
    dataset = make_training_dataset(
        tokenizer, sources=options.train, shuffle_seed=1, max_sequence_length=LENGTH, batch_size=MICRO_BATCH
    )
    collator = DataCollatorForWholeWordMask(tokenizer, pad_to_multiple_of=8, seed=1)
    batches = iter(DataLoader(dataset, batch_size=MICRO_BATCH, collate_fn=collator))
    training = HFTrainerArguments(
        output_dir=str(options.work_dir),
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup,
        num_zero_lr_steps=0,
        total_steps=options.epochs,
    )
    optimizer = CPULAMB8Bit(
        parameter_groups(model, training.weight_decay),
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        clamp_value=training.clamp_value,
        max_grad_norm=training.max_grad_norm,
        min_8bit_size=NEVER,
    )
    factor, curve, used = make_learning_rate(training), [], 0
    for epoch in range(options.epochs):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * factor(epoch)
        target = round(samples * (epoch + 1) / options.epochs)  # in the end as many samples as the swarm has seen
        micro_batches = max(1, round((target - used) / MICRO_BATCH))
        losses = []
        for _ in range(micro_batches):
            outputs = model(**next(batches))
            (outputs.loss / micro_batches).backward()
            losses.append(float(outputs.mlm_loss))
        optimizer.step()
        optimizer.zero_grad()
        used += micro_batches * MICRO_BATCH
        curve.append({"epoch": epoch + 1, "samples": micro_batches * MICRO_BATCH, "loss": sum(losses) / len(losses)})
        if epoch % 20 == 19:
            print(f"one process: epoch {epoch + 1}/{options.epochs}  loss of words {curve[-1]['loss']:.3f}", flush=True)
    return model, curve


def write_results(options, run: Path, *, scores, curves, seconds, samples) -> None:
    """Print the verdict, write the figures and draw the curves."""
    rounds = [
        record
        for name in ("trainer", "trainer-2")
        for record in read_journal(run / name / "metrics.jsonl")
        if record["event"] == "round"
    ]
    swarm, alone = scores["swarm"], scores["one process, fp32 LAMB"]
    difference = compare_parameters(run / "trainer" / "backup.pth", run / "trainer-2" / "backup.pth")
    results = {
        "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
        "epochs": len(curves["swarm"]),
        "samples": samples,
        "seconds": {name: round(value) for name, value in seconds.items()},
        "scores": {name: dataclasses.asdict(score) for name, score in scores.items()},
        "nats_below_unigram_entropy": swarm.unigram_entropy - swarm.loss,
        "loss_relative_to_one_process": swarm.loss / alone.loss,
        "rounds": {
            kind: {
                "attempted": sum(r["kind"] == kind for r in rounds),
                "complete": sum(r["kind"] == kind and r["complete"] for r in rounds),
            }
            for kind in ("gradients", "parameters")
        },
        "parameter_difference": dataclasses.asdict(difference),
    }
    print(json.dumps(results, indent=2, ensure_ascii=False))
    options.results.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draw(curves, swarm.unigram_entropy, options.results.with_suffix(".png"))


def draw(curves: dict[str, list[dict]], unigram_entropy: float, picture: Path) -> None:
    """Training loss by samples seen, with the plateau of a model that ignores context."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, curve in curves.items():
        seen = torch.tensor([point["samples"] for point in curve]).cumsum(0)
        axes.plot(seen, [point["loss"] for point in curve], label=name)
    axes.axhline(unigram_entropy, color="gray", linestyle="--", label="unigram entropy of the masked tokens")
    axes.set_xlabel("samples")
    axes.set_ylabel("loss of masked tokens, nats")
    axes.legend()
    figure.savefig(picture, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
