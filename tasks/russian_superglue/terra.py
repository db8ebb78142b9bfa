"""TERRa: does the hypothesis follow from the premise? Two classes, accuracy."""

from collections import Counter
from collections.abc import Mapping

from tasks.finetuning.base import FinetuningTask
from tasks.finetuning.encoding import encode_text, model_inputs, with_label
from tasks.finetuning.sources import field, integer


class TERRa(FinetuningTask):
    """Records: idx, premise, hypothesis, label."""

    name = "TERRa"
    labels = submission_labels = ("entailment", "not_entailment")
    hub_config = "terra"
    num_test_records = 3198
    published_scores = {
        "human": {"accuracy": 0.92},
        "FRED-T5 1.7B": {"accuracy": 0.871},
        "RuLeanALBERT": {"accuracy": 0.812},
        "ruRoBERTa-large": {"accuracy": 0.801},
        "XLM-R-large": {"accuracy": 0.798},
        "ruBERT-large": {"accuracy": 0.704},
        "ruBERT-base": {"accuracy": 0.703},
        "majority": {"accuracy": 0.549},
        "TF-IDF": {"accuracy": 0.471},
    }

    def parse(self, entry: Mapping, where: str, *, split: str) -> list[dict]:
        record = {
            "idx": integer(entry["idx"], "idx", where),
            "premise": field(entry, "premise", str, where),
            "hypothesis": field(entry, "hypothesis", str, where),
            "label": self.parse_label(entry, where, split=split),
        }
        return [record]

    def encode(self, record: Mapping, tokenizer, *, max_length: int, training: bool, report: Counter) -> list[dict]:
        encoding = encode_text(tokenizer, record["premise"], record["hypothesis"], max_length=max_length, keep="second")
        return [with_label(model_inputs(tokenizer, encoding), record)]

    def baseline_texts(self, record: Mapping) -> list[str]:
        return [f"{record['premise']} {record['hypothesis']}"]
