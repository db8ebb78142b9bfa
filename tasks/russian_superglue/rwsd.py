"""RWSD: does the pronoun refer to the noun? Accuracy; no published fine-tuned model beats the majority class."""

import re
from collections import Counter
from collections.abc import Mapping

from torch import nn

from src.models.heads import SpanClassificationModel
from tasks.finetuning.base import FinetuningTask
from tasks.finetuning.encoding import encode_text, model_inputs, with_label
from tasks.finetuning.sources import field, integer
from tasks.finetuning.spans import Span, clamp_span, find_text, find_word, mask_of_span


def words_span(text: str, part: str, word_index: int) -> Span:
    """Characters of a part of the text that starts at a word (split at spaces) of that index.

    An index that does not point at the part is mended by looking for the nearest occurrence, of a single word in any
    form; without one the words at the index are taken.
    """
    words = [match.span() for match in re.finditer(r"\S+", text)]
    first = max(0, min(word_index, len(words) - 1))
    last = min(first + max(1, len(part.split())), len(words)) - 1
    span = clamp_span(text, words[first][0], words[last][1]) if words else (0, 0)
    if text[slice(*span)].lower() == part.strip(" .,;:!?").lower():
        return span
    part = part.strip(" .,;:!?")
    mended = find_text(text, part, span[0])
    if mended is None and " " not in part:
        mended = find_word(text, part, span)
    return mended or span


class RWSD(FinetuningTask):
    """Records: idx, text, spans (noun and pronoun, (start, end) in characters), label."""

    name = "RWSD"
    labels = (False, True)
    submission_labels = ("False", "True")
    hub_config = "rwsd"
    num_test_records = 154
    majority_if_better = True
    published_scores = {
        "human": {"accuracy": 0.84},
        "FRED-T5 1.7B": {"accuracy": 0.669},
        "RuLeanALBERT": {"accuracy": 0.669},
        "ruRoBERTa-large": {"accuracy": 0.669},
        "XLM-R-large": {"accuracy": 0.669},
        "ruBERT-large": {"accuracy": 0.669},
        "ruBERT-base": {"accuracy": 0.669},
        "majority": {"accuracy": 0.669},
        "TF-IDF": {"accuracy": 0.662},
    }

    def parse(self, entry: Mapping, where: str, *, split: str) -> list[dict]:
        text, target = field(entry, "text", str, where), field(entry, "target", dict, where)
        parts = [field(target, f"span{i}_text", str, where) for i in (1, 2)]
        indices = [field(target, f"span{i}_index", int, where) for i in (1, 2)]
        record = {
            "idx": integer(entry["idx"], "idx", where),
            "text": text,
            "parts": parts,
            "spans": [list(words_span(text, part, index)) for part, index in zip(parts, indices, strict=True)],
            "label": self.parse_label(entry, where, split=split),
        }
        return [record]

    def from_hub(self, rows) -> list[tuple[str, dict]]:
        target = ("span1_text", "span1_index", "span2_text", "span2_index")
        return [
            (where, {**entry, "target": {name: entry[name] for name in target}})
            for where, entry in super().from_hub(rows)
        ]

    def encode(self, record: Mapping, tokenizer, *, max_length: int, training: bool, report: Counter) -> list[dict]:
        encoding = encode_text(tokenizer, record["text"], max_length=max_length)
        row = model_inputs(tokenizer, encoding)
        for name, span in zip(("e1_mask", "e2_mask"), record["spans"], strict=True):
            row[name], found = mask_of_span(encoding, 0, span)
            report["span lost to truncation"] += not found
        return [with_label(row, record)]

    def build_model(self, backbone: nn.Module, *, dropout: float) -> nn.Module:
        return SpanClassificationModel(backbone, num_labels=len(self.labels), dropout_prob=dropout)

    def baseline_texts(self, record: Mapping) -> list[str]:
        return [" ".join([*record["parts"], record["text"]])]
