"""RCB: entailment, contradiction or neither. Three classes, mean of macro F1 and accuracy."""

from collections.abc import Mapping, Sequence

from tasks.finetuning import metrics
from tasks.russian_superglue.terra import TERRa


class RCB(TERRa):
    """Records as in TERRa. Verb, negation and genre are not used (the hub has no genre)."""

    name = "RCB"
    labels = submission_labels = ("entailment", "contradiction", "neutral")
    main_metric = "score"
    hub_config = "rcb"
    num_test_records = 438
    published_scores = {
        "human": {"macro_f1": 0.68, "accuracy": 0.702},
        "FRED-T5 1.7B": {"macro_f1": 0.497, "accuracy": 0.541},
        "RuLeanALBERT": {"macro_f1": 0.361, "accuracy": 0.413},
        "ruRoBERTa-large": {"macro_f1": 0.357, "accuracy": 0.518},
        "XLM-R-large": {"macro_f1": 0.328, "accuracy": 0.457},
        "ruBERT-large": {"macro_f1": 0.356, "accuracy": 0.5},
        "ruBERT-base": {"macro_f1": 0.333, "accuracy": 0.509},
        "majority": {"macro_f1": 0.4, "accuracy": 0.438},
        "TF-IDF": {"macro_f1": 0.301, "accuracy": 0.441},
    }

    def score(self, predictions: Sequence[int], records: Sequence[Mapping]) -> dict[str, float]:
        labels = [record["label"] for record in records]
        f1 = metrics.macro_f1(labels, predictions, num_classes=len(self.labels))
        accuracy = metrics.accuracy(labels, predictions)
        return {"macro_f1": f1, "accuracy": accuracy, "score": (f1 + accuracy) / 2}
