"""How much of their time two trainers wait for averaging, and what the second one adds.

    python -m benchmarks.averaging_wait            # about two minutes
    python -m benchmarks.averaging_wait --growth   # instead: 1, 2, 4 and 8 trainers of a tiny model

Trainers on loopback with one thread each, gradients averaged and applied in the background (`--delay_optimizer_step
--delay_grad_averaging`), 10 M parameters, epochs of about 20 seconds. The waiting time is what their journals say:
seconds inside the swarm's optimizer. The first epoch of each run is left out.
"""

import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import Row, options, report
from src.metrics.journal import read_journal
from src.process.local_swarm import LocalSwarm

CLAIM = "waiting for averaging"
MODEL = {
    "model_type": "lean_albert",
    "vocab_size": 4000,  # of the demo's tokenizer
    "embedding_size": 128,
    "hidden_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
}
TINY = {**MODEL, "hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 256}
SHARED = [
    *("--learning_rate", "1e-4", "--warmup_steps", "0", "--num_zero_lr_steps", "0", "--min_8bit_size", "65536"),
    *("--min_vector_size", "1000", "--average_state_every", "2"),
    *("--max_sequence_length", "128", "--initial_sequence_length", "128", "--sequence_length_warmup_steps", "0"),
    *("--pad_to_multiple_of", "8", "--backup_every_epochs", "1000000"),
    *("--delay_optimizer_step", "True", "--delay_grad_averaging", "True"),
    *("--tokenizer_path", "@demo/tokenizer", "--dataset_sources", "@demo/corpus/*.txt"),
]
RUN_SECONDS = 170.0  # a run that takes longer is an error


@dataclasses.dataclass(frozen=True)
class Run:
    """What the journals of all trainers of a run say about its epochs after the first."""

    samples_per_second: float
    waited_share: float
    epoch_seconds: float
    incomplete_rounds: int


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--growth", action="store_true", help="a table of 1 to 8 trainers of a tiny model")
    flags = parser.parse_args()
    if flags.growth:
        return measure_growth(flags)
    seconds = 3.0 if flags.quick else 20.0
    model = TINY if flags.quick else MODEL
    alone = train(1, model, samples=80, epochs=3, matchmaking=3.0)
    samples = max(8, round(2 * seconds * alone.samples_per_second / 8) * 8)
    pair = train(2, model, samples=samples, epochs=3, matchmaking=min(5.0, seconds))
    case = f"{'tiny model' if flags.quick else '10 M parameters'}, epochs of {pair.epoch_seconds:.0f} s"
    rows = [
        Row(CLAIM, case, "share of wall time, 2 trainers", pair.waited_share, "share", target="<= 0.05"),
        Row(CLAIM, case, "1 trainer", alone.samples_per_second, "samples/s"),
        Row(CLAIM, case, "2 trainers", pair.samples_per_second, "samples/s",
            ratio=pair.samples_per_second / alone.samples_per_second, target=">= 1.8", peer="1 trainer"),
    ]  # fmt: skip
    notes = [f"Rounds of averaging that were not complete: {pair.incomplete_rounds}. One thread for each trainer."]
    report("averaging_wait", "Two trainers on loopback", rows, notes, flags.results)
    return 0


def measure_growth(flags) -> int:
    """Trainers share the cores, so the sum of their speeds can grow only until the cores are busy. Epochs of 10 s."""
    num_cores = len(os.sched_getaffinity(0))
    rows, alone = [], train(1, TINY, samples=1000, epochs=3, matchmaking=3.0)
    for num_trainers in (1, 2, 4, 8):
        samples = round(10.0 * alone.samples_per_second * min(num_trainers, num_cores))
        run = alone if num_trainers == 1 else train(num_trainers, TINY, samples=samples, epochs=3, matchmaking=3.0)
        case = f"{num_trainers} trainers"
        rows += [
            Row("growth with trainers", case, "all trainers together", run.samples_per_second, "samples/s"),
            Row("growth with trainers", case, "expected", alone.samples_per_second * min(num_trainers, num_cores),
                "samples/s"),
            Row("growth with trainers", case, "waiting", run.waited_share, "share"),
            Row("growth with trainers", case, "rounds not complete", run.incomplete_rounds, "rounds"),
        ]  # fmt: skip
    notes = [
        f"{num_cores} cores: expected is growth in proportion until each core has a trainer, and no more after that.",
        "Beyond that the trainers' other processes, and averaging among more peers, take their share of the cores.",
    ]
    report("averaging_growth", "1 to 8 trainers of a tiny model", rows, notes, flags.results)
    return 0


def train(num_trainers: int, model: dict, *, samples: int, epochs: int, matchmaking: float) -> Run:
    """Run trainers with one thread each to the end; ``samples`` make an epoch."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(model))
        arguments = [
            *("--run_id", "wait", "--output_dir", folder, "--model_config_path", str(config), *SHARED),
            *("--target_batch_size", str(samples), "--total_steps", str(epochs), "--wait_for_peers", str(num_trainers)),
            *("--per_device_train_batch_size", "4", "--matchmaking_time", str(matchmaking)),
            *("--next_chunk_timeout", "10", "--averaging_timeout", "40"),
        ]
        with LocalSwarm(echo=False, environment={"OMP_NUM_THREADS": "1"}) as swarm:
            trainers = [swarm.start(f"trainer {i}", "run_trainer.py", arguments) for i in range(num_trainers)]
            for trainer in trainers:
                if trainer.process.wait(RUN_SECONDS) != 0:
                    raise RuntimeError(f"{trainer.name} failed:\n{trainer.output()}")
        return summarise(sorted((Path(folder) / "wait").glob("trainer*/metrics.jsonl")))


def summarise(journals: list[Path]) -> Run:
    records = [record for path in journals for record in read_journal(path)]
    epochs = [record for record in records if record["event"] == "epoch" and record["epoch"] > 1]
    seconds = sum(record["seconds"] for record in epochs)
    return Run(
        samples_per_second=sum(record["samples"] for record in epochs) / seconds * len(journals),
        waited_share=sum(record["waited_seconds"] for record in epochs) / seconds,
        epoch_seconds=seconds / len(epochs),
        incomplete_rounds=sum(record["event"] == "round" and not record["complete"] for record in records),
    )


if __name__ == "__main__":
    sys.exit(main())
