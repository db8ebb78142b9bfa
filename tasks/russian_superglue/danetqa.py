"""DaNetQA: yes or no to a question about a passage. Accuracy."""

from collections import Counter
from collections.abc import Mapping

from tasks.finetuning.base import FinetuningTask
from tasks.finetuning.encoding import encode_text, model_inputs, with_label
from tasks.finetuning.sources import field, integer


class DaNetQA(FinetuningTask):
    """Records: idx, question, passage, label."""

    name = "DaNetQA"
    labels = (False, True)
    submission_labels = ("false", "true")
    hub_config = "danetqa"
    num_test_records = 805
    published_scores = {
        "human": {"accuracy": 0.915},
        "FRED-T5 1.7B": {"accuracy": 0.889},
        "RuLeanALBERT": {"accuracy": 0.76},
        "ruRoBERTa-large": {"accuracy": 0.82},
        "XLM-R-large": {"accuracy": 0.757},
        "ruBERT-large": {"accuracy": 0.773},
        "ruBERT-base": {"accuracy": 0.712},
        "majority": {"accuracy": 0.642},
        "TF-IDF": {"accuracy": 0.621},
    }

    def parse(self, entry: Mapping, where: str, *, split: str) -> list[dict]:
        record = {
            "idx": integer(entry["idx"], "idx", where),
            "question": field(entry, "question", str, where),
            "passage": field(entry, "passage", str, where),
            "label": self.parse_label(entry, where, split=split),
        }
        return [record]

    def encode(self, record: Mapping, tokenizer, *, max_length: int, training: bool, report: Counter) -> list[dict]:
        encoding = encode_text(tokenizer, record["question"], record["passage"], max_length=max_length, keep="first")
        return [with_label(model_inputs(tokenizer, encoding), record)]

    def baseline_texts(self, record: Mapping) -> list[str]:
        return [f"{record['question']} {record['passage']}"]
