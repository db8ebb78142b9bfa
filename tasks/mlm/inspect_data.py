"""A look at the training data before it is used: `python -m tasks.mlm.inspect_data`.

Prints decoded masked instances and the figures that tell whether tokenizer, sources and collator fit each other.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import DataLoader

from src.models.tokenizer import load_tokenizer
from tasks.mlm.data import NO_ORDER, ORDERED, SWAPPED, make_training_dataset
from tasks.mlm.whole_word_mask import IGNORED_LABEL, DataCollatorForWholeWordMask

MEASURED_INSTANCES = 512
DEMO_TOKENIZER = Path(__file__).resolve().parents[2] / "demo" / "tokenizer"
ORDER_NAMES = {ORDERED: "in order", SWAPPED: "swapped", NO_ORDER: "one sentence"}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tasks.mlm.inspect_data", description=__doc__.partition("\n\n")[2])
    parser.add_argument(
        "--tokenizer_path", default=str(DEMO_TOKENIZER), help="directory or hub id (default: the demo's tokenizer)"
    )
    parser.add_argument("--dataset_sources", nargs="+", help="files, globs or name[:config] (default: the demo text)")
    parser.add_argument("--dataset_weights", nargs="+", type=float, help="share of instances from each source")
    parser.add_argument("--max_sequence_length", type=int, default=512, help="tokens per instance (default: 512)")
    parser.add_argument("--num_instances", type=int, default=4, help="instances to print (default: 4)")
    parser.add_argument("--batch_size", type=int, default=32, help="instances padded together (default: 32)")
    parser.add_argument("--pad_to_multiple_of", type=int, help="as the trainer's option; padding counts with it")
    parser.add_argument("--seed", type=int, default=0, help="order of documents, cuts and masks (default: 0)")
    return parser.parse_args(arguments)


def render_instance(tokenizer, row: dict) -> str:
    """Text with what the model sees and, in braces, what it should predict: `[MASK]{слово}`, `{kept}`."""
    pieces = []
    length = int(row["attention_mask"].sum())
    for token_id, label in zip(row["input_ids"][:length].tolist(), row["labels"][:length].tolist(), strict=True):
        seen = tokenizer.convert_ids_to_tokens(token_id)
        if label == IGNORED_LABEL:
            pieces.append(f" {seen} " if token_id in (tokenizer.cls_token_id, tokenizer.sep_token_id) else seen)
        else:
            wanted = tokenizer.convert_ids_to_tokens(label)
            pieces.append(f"{'▁' * wanted.startswith('▁')}{seen.lstrip('▁')}{{{wanted.lstrip('▁')}}}")
    return " ".join("".join(pieces).replace("▁", " ").split())


class Totals:
    """Counts over batches, and the shares made of them."""

    def __init__(self):
        self.counts = Counter()
        self.orders = Counter()

    def add(self, batch: dict, tokenizer) -> None:
        is_real = batch["attention_mask"].bool()
        chosen = batch["labels"] != IGNORED_LABEL
        ids = batch["input_ids"].where(~chosen, batch["labels"])  # as before masking
        is_text = is_real & (ids != tokenizer.cls_token_id) & (ids != tokenizer.sep_token_id)
        self.counts["positions"] += is_real.numel()
        self.counts["real"] += int(is_real.sum())
        self.counts["text"] += int(is_text.sum())
        self.counts["chosen"] += int(chosen.sum())
        self.counts["hidden"] += int(((batch["input_ids"] == tokenizer.mask_token_id) & chosen).sum())
        self.counts["unknown"] += (
            int((ids == tokenizer.unk_token_id).sum()) if tokenizer.unk_token_id is not None else 0
        )
        self.counts["instances"] += len(ids)
        self.orders.update(batch["sentence_order_label"].tolist())

    def lines(self, *, batch_size: int, discarded_share: float) -> list[str]:
        count = self.counts
        orders = ", ".join(
            f"{name} {self.orders[label] / count['instances']:.1%}" for label, name in ORDER_NAMES.items()
        )
        return [
            f"measured over {count['instances']} instances, {count['real'] / count['instances']:.0f} tokens on average",
            f"mask rate: {count['chosen'] / count['text']:.2%} of the text's tokens are predicted, "
            f"{count['hidden'] / count['chosen']:.1%} of these shown as [MASK]",
            f"padding: {1 - count['real'] / count['positions']:.2%} of the positions in batches of {batch_size}",
            f"sentence order: {orders}",
            f"unknown tokens: {count['unknown'] / count['text']:.3%}",
            f"discarded text: {discarded_share:.3%}",
        ]


def inspect(options: argparse.Namespace) -> None:
    if options.num_instances < 0 or options.batch_size < 1:
        raise ValueError("--num_instances should be at least 0 and --batch_size at least 1")
    tokenizer = load_tokenizer(options.tokenizer_path)
    dataset = make_training_dataset(
        tokenizer,
        sources=options.dataset_sources,
        weights=options.dataset_weights,
        shuffle_seed=options.seed,
        max_sequence_length=options.max_sequence_length,
        batch_size=options.batch_size,
    )
    collator = DataCollatorForWholeWordMask(tokenizer, pad_to_multiple_of=options.pad_to_multiple_of, seed=options.seed)
    totals, num_printed = Totals(), 0
    for batch in DataLoader(dataset, batch_size=options.batch_size, collate_fn=collator):
        totals.add(batch, tokenizer)
        for index in range(min(len(batch["input_ids"]), options.num_instances - num_printed)):
            row = {name: values[index] for name, values in batch.items()}
            print(f"--- {ORDER_NAMES[int(row['sentence_order_label'])]}\n{render_instance(tokenizer, row)}\n")
            num_printed += 1
        if totals.counts["instances"] >= MEASURED_INSTANCES and num_printed >= options.num_instances:
            break
    print("\n".join(totals.lines(batch_size=options.batch_size, discarded_share=dataset.discarded_share())))
    for source in dataset.sources:
        if num_left_out := len(source.left_out.places):
            print(f"left out: {num_left_out} documents that cannot be read, the first {source.left_out.first}")


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        inspect(parse_arguments(arguments))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
