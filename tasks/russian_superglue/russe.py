"""RUSSE: is a word used in the same sense in two sentences? Accuracy."""

from collections import Counter
from collections.abc import Mapping

from torch import nn

from src.models.heads import SpanClassificationModel
from tasks.finetuning.base import FinetuningTask
from tasks.finetuning.encoding import encode_text, model_inputs, with_label
from tasks.finetuning.sources import field, integer
from tasks.finetuning.spans import clamp_span, find_word, grow_to_words, mask_of_span

# What to add to the annotated end for an exclusive end. In train and val it lies one past it (it takes in the next
# space or mark, often beyond the sentence), in test it is inclusive.
END_CORRECTION = {"train": -1, "validation": -1, "test": 1}


class RUSSE(FinetuningTask):
    """Records: idx, word, sentences (two), spans (two (start, end), end exclusive, a hint only), label."""

    name = "RUSSE"
    labels = (False, True)
    submission_labels = ("false", "true")
    hub_config = "russe"
    num_test_records = 18892
    published_scores = {
        "human": {"accuracy": 0.805},
        "FRED-T5 1.7B": {"accuracy": 0.823},
        "RuLeanALBERT": {"accuracy": 0.789},
        "ruRoBERTa-large": {"accuracy": 0.748},
        "XLM-R-large": {"accuracy": 0.765},
        "ruBERT-large": {"accuracy": 0.707},
        "ruBERT-base": {"accuracy": 0.706},
        "majority": {"accuracy": 0.595},
        "TF-IDF": {"accuracy": 0.57},
    }

    def parse(self, entry: Mapping, where: str, *, split: str) -> list[dict]:
        spans = [
            [field(entry, f"start{i}", int, where), field(entry, f"end{i}", int, where) + END_CORRECTION[split]]
            for i in (1, 2)
        ]
        record = {
            "idx": integer(entry["idx"], "idx", where),
            "word": field(entry, "word", str, where),
            "sentences": [field(entry, "sentence1", str, where), field(entry, "sentence2", str, where)],
            "spans": spans,
            "label": self.parse_label(entry, where, split=split),
        }
        return [record]

    def word_spans(self, record: Mapping, report: Counter) -> list[tuple[int, int] | None]:
        """The span of the word in each sentence, None (counted) where no form of it is found."""
        spans = []
        for sentence, hint in zip(record["sentences"], record["spans"], strict=True):
            span = find_word(sentence, record["word"], hint)
            if span is None:
                report["word not found in the sentence"] += 1
            elif span != grow_to_words(sentence, clamp_span(sentence, *hint)):
                report["annotated span was elsewhere"] += 1
            spans.append(span)
        return spans

    def encode(self, record: Mapping, tokenizer, *, max_length: int, training: bool, report: Counter) -> list[dict]:
        spans = self.word_spans(record, report)
        encoding = encode_text(tokenizer, *record["sentences"], max_length=max_length)
        row = model_inputs(tokenizer, encoding)
        for sequence, name in enumerate(("e1_mask", "e2_mask")):
            row[name], found = mask_of_span(encoding, sequence, spans[sequence])
            report["span lost to truncation"] += spans[sequence] is not None and not found
        return [with_label(row, record)]

    def build_model(self, backbone: nn.Module, *, dropout: float) -> nn.Module:
        return SpanClassificationModel(backbone, num_labels=len(self.labels), dropout_prob=dropout)

    def baseline_texts(self, record: Mapping) -> list[str]:
        return [" ".join([record["word"], *record["sentences"]])]
