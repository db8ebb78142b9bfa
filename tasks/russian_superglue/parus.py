"""PARus: which of two sentences is the cause (or the effect) of the premise? Accuracy over pairs."""

from collections import Counter
from collections.abc import Mapping

from torch import nn

from tasks.finetuning.base import FinetuningTask
from tasks.finetuning.encoding import encode_text, model_inputs, with_label
from tasks.finetuning.models import ChoiceModel, sequence_classifier
from tasks.finetuning.sources import field, integer

CONJUNCTIONS = {"cause": "потому что", "effect": "поэтому"}


class PARus(FinetuningTask):
    """Records: idx, premise, choices (two), question ("cause" or "effect"), label (which choice).

    Both choices are one row and compete in a softmax, so a batch can be shuffled without parting a pair.
    """

    name = "PARus"
    labels = submission_labels = (0, 1)
    hub_config = "parus"
    num_test_records = 500
    published_scores = {
        "human": {"accuracy": 0.982},
        "FRED-T5 1.7B": {"accuracy": 0.842},
        "RuLeanALBERT": {"accuracy": 0.796},
        "ruRoBERTa-large": {"accuracy": 0.722},
        "XLM-R-large": {"accuracy": 0.59},
        "ruBERT-large": {"accuracy": 0.656},
        "ruBERT-base": {"accuracy": 0.476},
        "majority": {"accuracy": 0.478},
        "TF-IDF": {"accuracy": 0.486},
    }

    def parse(self, entry: Mapping, where: str, *, split: str) -> list[dict]:
        question = field(entry, "question", str, where)
        if question not in CONJUNCTIONS:
            raise ValueError(f"{where}: unknown question {question!r}, expected one of {', '.join(CONJUNCTIONS)}")
        record = {
            "idx": integer(entry["idx"], "idx", where),
            "premise": field(entry, "premise", str, where),
            "choices": [field(entry, "choice1", str, where), field(entry, "choice2", str, where)],
            "question": question,
            "label": self.parse_label(entry, where, split=split),
        }
        return [record]

    def encode(self, record: Mapping, tokenizer, *, max_length: int, training: bool, report: Counter) -> list[dict]:
        conjunction = CONJUNCTIONS[record["question"]]
        inputs = [
            model_inputs(
                tokenizer, encode_text(tokenizer, record["premise"], f"{conjunction} {choice}", max_length=max_length)
            )
            for choice in record["choices"]
        ]
        return [with_label({name: [choice[name] for choice in inputs] for name in inputs[0]}, record)]

    def build_model(self, backbone: nn.Module, *, dropout: float) -> nn.Module:
        return ChoiceModel(sequence_classifier(backbone, num_labels=1, dropout=dropout))

    def baseline_texts(self, record: Mapping) -> list[str]:
        return [f"{record['premise']} {CONJUNCTIONS[record['question']]} {choice}" for choice in record["choices"]]

    def baseline_targets(self, record: Mapping) -> list[int]:
        return [int(number == record["label"]) for number in range(len(record["choices"]))]
