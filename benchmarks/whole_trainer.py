"""Real tokens per CPU second of a whole trainer: text in, updated parameters out.

    python -m benchmarks.whole_trainer

Three sides by turns, same text, tokenizer, sizes, sequence length, sequences in a step and threads; padding is not
counted as tokens:

- ours: the data, collator, model and LAMB of run_trainer.py in transformers' Trainer (without the swarm's processes)
- original: its pipeline restated (`benchmarks/reference`: two tokenisations, mask loop, whole-tensor LAMB) with logits
  at all positions, in a plain loop. It gets our layers, which are faster than its own.
- HF: AlbertForPreTraining, Trainer with its AdamW, and DataCollatorForLanguageModeling on concatenated text

About three minutes.
"""

import gzip
import itertools
import json
import logging
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    AlbertConfig,
    AlbertForPreTraining,
    DataCollatorForLanguageModeling,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from benchmarks.measure import Row, Timing, interleave, options, report
from benchmarks.reference.collator import WholeWordMaskLoop
from benchmarks.reference.instances import make_instances
from benchmarks.reference.whole_tensor_lamb import WholeTensorLAMB8Bit
from src.models import LeanAlbertConfig, LeanAlbertForPreTraining, load_tokenizer
from src.training.lamb_8bit import CPULAMB8Bit
from src.training.optimizer import parameter_groups
from tasks.mlm.data import make_training_dataset
from tasks.mlm.whole_word_mask import DataCollatorForWholeWordMask

REPOSITORY = Path(__file__).resolve().parent.parent
CORPUS = REPOSITORY.parent / "shared" / "data" / "corpus_ru" / "train.jsonl.gz"
DEMO = REPOSITORY / "demo"
MICRO_BATCH, MICRO_STEPS = 4, 2  # sequences in a forward pass, forward passes in a step
LAMB = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-6, "max_grad_norm": 1.0}
SIZES = {
    "vocab_size": 50_000,  # what a real run has; the demo's tokenizer uses 4,000 of them
    "embedding_size": 128,
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "max_position_embeddings": 512,
}


class TokenCount:
    """Wraps a collator and counts the tokens that are not padding."""

    def __init__(self, collator):
        self.collator, self.tokens = collator, 0

    def __call__(self, instances):
        batch = self.collator(instances)
        mask = batch.get("attention_mask")
        self.tokens += int(batch["input_ids"].numel() if mask is None else mask.sum())
        return batch


class Stream(IterableDataset):
    """Goes on where the last reader stopped."""

    def __init__(self, items: Iterator):
        self.items = items

    def __iter__(self):
        return self.items


class OurTrainer(Trainer):
    """As CollaborativeTrainer: a plain loader, and LAMB does the clipping."""

    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=MICRO_BATCH, collate_fn=self.data_collator)

    def _clip_grad_norm(self, model) -> None:
        """LAMB clips."""

    def _get_grad_norm(self, model, grad_norm=None) -> None:
        """Not needed."""


def main() -> int:
    flags = options(__doc__).parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    length = 64 if flags.quick else 512
    sizes = {**SIZES, "vocab_size": 4000, "hidden_size": 64, "num_attention_heads": 1} if flags.quick else SIZES
    tokenizer = load_tokenizer(str(DEMO / "tokenizer"))
    files = [str(CORPUS)] if CORPUS.exists() else sorted(map(str, (DEMO / "corpus").glob("*.txt")))
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "output_dir": folder,
            "max_steps": 1,
            "per_device_train_batch_size": MICRO_BATCH,
            "gradient_accumulation_steps": MICRO_STEPS,
            "use_cpu": True,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "logging_steps": 10**9,
        }
        sides, counts = {}, {}
        for name, make in {"ours": ours, "original": original, "HF": hugging_face}.items():
            torch.manual_seed(0)
            sides[name], counts[name] = make(sizes, tokenizer, files, length, arguments)
        sides = {name: CountedSide(run, counts[name]) for name, run in sides.items()}
        timings = interleave(sides, rounds=1 if flags.quick else 3)
    rows = make_rows(timings, {name: run.tokens for name, run in sides.items()}, length)
    notes = [
        f"Text: {'corpus_ru' if CORPUS.exists() else 'demo/corpus'}; {MICRO_BATCH * MICRO_STEPS} sequences in a step.",
        "The original is given our layers; its own take 1.2 to 1.4 times HF's time.",
    ]
    report("whole_trainer", "Whole trainer, one peer", rows, notes, flags.results)
    return 0


class CountedSide:
    """A side that notes how many tokens each of its runs took."""

    def __init__(self, run, count: TokenCount):
        self.run, self.count, self.tokens = run, count, []

    def __call__(self):
        before = self.count.tokens
        self.run()
        self.tokens.append(self.count.tokens - before)


def make_rows(timings: dict[str, Timing], tokens: dict[str, list[int]], length: int) -> list[Row]:
    """Tokens over seconds, both summed over the rounds: the token counts of single steps differ."""
    speed = {name: sum(tokens[name][-len(t.samples) :]) / sum(t.samples) for name, t in timings.items()}
    claim, case, unit = "whole trainer: real tokens per CPU second", f"length {length}, 1 thread", "tokens/s"
    rows = [
        Row(claim, case, "ours", speed["ours"], unit, speed["ours"] / speed["original"], ">= 2.5", None, "original")
    ]
    rows += [Row(claim, case, "ours", speed["ours"], unit, speed["ours"] / speed["HF"], ">= 1.35", None, "HF")]
    return rows + [Row(claim, case, name, speed[name], unit) for name in ("original", "HF")]


def lean_model(sizes: dict, *, sparse_prediction: bool) -> LeanAlbertForPreTraining:
    config = LeanAlbertConfig(**sizes, share_large_matrices=1, sparse_prediction=sparse_prediction)
    return LeanAlbertForPreTraining(config).train()


def ours(sizes, tokenizer, files, length, arguments):
    dataset = make_training_dataset(
        tokenizer, sources=files, shuffle_seed=0, max_sequence_length=length, batch_size=MICRO_BATCH
    )
    collator = TokenCount(DataCollatorForWholeWordMask(tokenizer, pad_to_multiple_of=8, seed=0))
    model = lean_model(sizes, sparse_prediction=True)
    lamb = CPULAMB8Bit(parameter_groups(model, 0.01), kernel="auto", reuse_grad_buffers=True, **LAMB)
    schedule = torch.optim.lr_scheduler.LambdaLR(lamb, lambda step: 1.0)
    trainer = OurTrainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=Stream(iter(dataset)),
        data_collator=collator,
        optimizers=(lamb, schedule),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer.train, collator


def original(sizes, tokenizer, files, length, arguments):
    instances = make_instances(documents(files), tokenizer, max_sequence_length=length, generator=random.Random(0))
    collator = TokenCount(WholeWordMaskLoop(tokenizer))
    batches = iter(DataLoader(Stream(instances), batch_size=MICRO_BATCH, collate_fn=collator))
    model = lean_model(sizes, sparse_prediction=False)
    lamb = WholeTensorLAMB8Bit(model.parameters(), weight_decay=0.01, **LAMB)

    def step():
        for _ in range(MICRO_STEPS):
            (model(**next(batches)).loss / MICRO_STEPS).backward()
        lamb.step()
        model.zero_grad()

    return step, collator


def hugging_face(sizes, tokenizer, files, length, arguments):
    config = AlbertConfig(
        **sizes, num_hidden_groups=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0
    )
    collator = TokenCount(DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, pad_to_multiple_of=None))
    trainer = Trainer(
        model=AlbertForPreTraining(config),
        args=TrainingArguments(**arguments),
        train_dataset=Stream(concatenated(documents(files), tokenizer, length)),
        data_collator=collator,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer.train, collator


def concatenated(texts: Iterator[str], tokenizer, length: int) -> Iterator[dict]:
    """Pieces of exactly ``length`` tokens of the texts, put end to end and tokenised a hundred at a time."""
    tokens: list[int] = []
    while batch := list(itertools.islice(texts, 100)):
        for ids in tokenizer(batch)["input_ids"]:
            tokens += ids
        whole = len(tokens) // length * length
        for start in range(0, whole, length):
            yield {"input_ids": tokens[start : start + length], "sentence_order_label": start // length % 2}
        tokens = tokens[whole:]


def documents(files: list[str]) -> Iterator[str]:
    """The texts of .jsonl.gz or .txt files (there between blank lines), again and again."""
    while True:
        for name in files:
            if name.endswith(".gz"):
                with gzip.open(name, "rt", encoding="utf-8") as file:
                    yield from (json.loads(line)["text"] for line in file)
            else:
                yield from Path(name).read_text(encoding="utf-8").split("\n\n")


if __name__ == "__main__":
    sys.exit(main())
