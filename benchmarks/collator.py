"""Whole-word-mask collator against the original's loop: `python -m benchmarks.collator`."""

import itertools
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.measure import Row, interleave, options, ratio, report
from benchmarks.reference.collator import WholeWordMaskLoop
from src.models.tokenizer import load_tokenizer
from tasks.mlm.data import make_training_dataset
from tasks.mlm.inspect_data import DEMO_TOKENIZER
from tasks.mlm.sources import DEFAULT_SOURCE, iterate_documents
from tasks.mlm.whole_word_mask import DataCollatorForWholeWordMask

CLAIM = "whole-word-mask collator"
BATCH_SIZE = 64
LENGTHS = (512, 2048)


def measure_length(tokenizer, length: int, *, rounds: int) -> list[Row]:
    """Seconds for one batch; ours is run 20 times a round, since one run is below a millisecond."""
    instances = make_full_instances(tokenizer, length)
    as_lists = [{name: to_list(value) for name, value in instance.items()} for instance in instances]
    loop, ours = WholeWordMaskLoop(tokenizer), DataCollatorForWholeWordMask(tokenizer, seed=0)
    repeats = 20
    times = interleave(
        {
            "original": lambda: loop(as_lists),
            "ours": lambda: run_repeatedly(ours, instances, repeats),
            "ours, from lists": lambda: run_repeatedly(ours, as_lists, repeats),
        },
        rounds=rounds,
        warmup=2,
        seconds=15,
    )
    case = f"{BATCH_SIZE} instances of {sum(len(each['input_ids']) for each in instances) // BATCH_SIZE} tokens"
    rows = [Row(CLAIM, case, "original", 1000 * times["original"].median, "ms")]
    for side, target in (("ours", ">= 80"), ("ours, from lists", None)):
        faster = repeats / ratio(times[side], times["original"])
        milliseconds = 1000 * times[side].median / repeats
        rows.append(Row(CLAIM, case, side, milliseconds, "ms", ratio=faster, target=target, peer="original"))
    return rows


def run_repeatedly(collator, instances: list[dict], repeats: int) -> None:
    for _ in range(repeats):
        collator(instances)  # each batch is freed before the next one, as in training


def make_full_instances(tokenizer, length: int) -> list[dict]:
    """Instances of nearly `length` tokens, from the bundled texts joined to longer ones."""
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "long.txt")
        texts = [" ".join(text.split()) for text in iterate_documents(DEFAULT_SOURCE)]
        source.write_text(
            "\n\n".join(" ".join(texts[start : start + 20]) for start in range(0, len(texts), 20)), encoding="utf-8"
        )
        dataset = make_training_dataset(tokenizer, sources=str(source), shuffle_seed=0, max_sequence_length=length)
        full = (instance for instance in dataset if len(instance["input_ids"]) > 0.95 * length)
        return list(itertools.islice(full, BATCH_SIZE))


def to_list(value):
    return value if isinstance(value, int) else list(value)


def main() -> None:
    arguments = options(sys.modules[__name__].__doc__).parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(DEMO_TOKENIZER)
    rounds = 3 if arguments.quick else 15
    rows = [row for length in LENGTHS for row in measure_length(tokenizer, length, rounds=rounds)]
    notes = ["The ratio is how many times faster than the original's loop, one thread, CPU time."]
    report("collator", "Whole-word masking of one batch", rows, notes, arguments.results)


if __name__ == "__main__":
    main()
