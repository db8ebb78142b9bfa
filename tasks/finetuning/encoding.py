"""Texts to the inputs of a model: truncation that keeps what matters, rows small enough to keep a whole split."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass
class EncodedSplit:
    """The model inputs of one split.

    rows: one dictionary of numpy arrays (and integer labels) per model input, as the collator takes them.
    owners: for each row, the index of its record; a record can have several rows, one, or none.
    training: whether the rows were made for training (RuCoS adds the gold answers to the candidates).
    report: how often something worth knowing happened, such as a span lost to truncation.
    """

    rows: list[dict] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    training: bool = False
    report: Counter = field(default_factory=Counter)

    def rows_of_records(self, num_records: int) -> list[list[int]]:
        """For each record, the indices of its rows."""
        indices = [[] for _ in range(num_records)]
        for row, owner in enumerate(self.owners):
            indices[owner].append(row)
        return indices


def encode_text(tokenizer, first: str, second: str | None = None, *, max_length: int, keep: str | None = None):
    """Tokenizes one text or a pair to at most max_length tokens, with offsets.

    keep ("first" or "second") names the text of a pair that stays whole as long as it leaves the other at least one
    token; otherwise the longer one is cut first. Returns the tokenizer's BatchEncoding.
    """
    strategy = "longest_first"
    if second is not None and keep is not None:
        kept, shortened = {"first": (first, "only_second"), "second": (second, "only_first")}[keep]
        num_kept = len(tokenizer(kept, add_special_tokens=False, verbose=False)["input_ids"])
        if num_kept + tokenizer.num_special_tokens_to_add(pair=True) < max_length:
            strategy = shortened
    return tokenizer(first, second, truncation=strategy, max_length=max_length, return_offsets_mapping=True)


def model_inputs(tokenizer, encoding) -> dict[str, np.ndarray]:
    """The fields that the model of this tokenizer reads, as compact arrays of shape [length]."""
    return {
        name: np.asarray(encoding[name], dtype=np.int32) for name in tokenizer.model_input_names if name in encoding
    }


def with_label(row: dict, record: Mapping) -> dict:
    """The row, with "labels" if the record's label is known."""
    return row if record["label"] is None else {**row, "labels": record["label"]}
