"""LiDiRus: TERRa's question on sentences picked to show what a model understands. A test set only; MCC."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from tasks.finetuning import metrics
from tasks.finetuning.sources import field, integer
from tasks.russian_superglue.terra import TERRa

TAGS = ("knowledge", "lexical-semantics", "logic", "predicate-argument-structure")


class LiDiRus(TERRa):
    """Records as in TERRa, plus tags: for each linguistic category that applies, the phenomena in it.

    The model is one trained on TERRa (same labels, same encoding).
    """

    name = "LiDiRus"
    main_metric = "mcc"
    files = {"test": "LiDiRus.jsonl"}
    hub_config = "lidirus"
    num_test_records = 1104
    trained_on = "TERRa"
    published_scores = {
        "human": {"mcc": 0.626},
        "FRED-T5 1.7B": {"mcc": 0.497},
        "RuLeanALBERT": {"mcc": 0.403},
        "ruRoBERTa-large": {"mcc": 0.343},
        "XLM-R-large": {"mcc": 0.369},
        "ruBERT-large": {"mcc": 0.235},
        "ruBERT-base": {"mcc": 0.224},
        "majority": {"mcc": 0.147},
        "TF-IDF": {"mcc": 0.06},
    }

    def parse(self, entry: Mapping, where: str, *, split: str) -> list[dict]:
        tags = {tag: field(entry, tag, str, where) for tag in TAGS if entry.get(tag)}  # the hub has "" for none
        record = {
            "idx": integer(entry["idx"], "idx", where),  # a string in the official file
            "premise": field(entry, "sentence1", str, where),
            "hypothesis": field(entry, "sentence2", str, where),
            "tags": {tag: [part.strip() for part in value.split(";")] for tag, value in tags.items()},
            "label": self.parse_label(entry, where, split=split),
        }
        return [record]

    def score(self, predictions: Sequence[int], records: Sequence[Mapping]) -> dict[str, float]:
        """MCC overall, of each category ("mcc/logic") and of each phenomenon ("mcc/logic/Negation")."""
        groups = defaultdict(list)
        for number, record in enumerate(records):
            groups["mcc"].append(number)
            for tag, phenomena in record["tags"].items():
                groups[f"mcc/{tag}"].append(number)
                for phenomenon in dict.fromkeys(phenomena):
                    groups[f"mcc/{tag}/{phenomenon}"].append(number)
        return {
            name: metrics.mcc([records[i]["label"] for i in group], [predictions[i] for i in group])
            for name, group in sorted(groups.items())
        }
