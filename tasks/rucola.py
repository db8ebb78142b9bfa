"""RuCoLA: is a sentence acceptable? Accuracy and MCC (arXiv 2210.12814)."""

import csv
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tasks.finetuning import metrics, sources
from tasks.finetuning.base import SPLITS, FinetuningTask
from tasks.finetuning.encoding import encode_text, model_inputs, with_label
from tasks.finetuning.sources import integer
from tasks.finetuning.submission_format import check_ids

HUB_REPOSITORY = "RussianNLP/rucola"
LABELLED_COLUMNS = ("id", "sentence", "acceptable", "error_type", "detailed_source")
TEST_COLUMNS = ("id", "sentence")
SUBMISSION_COLUMNS = ("id", "acceptable")
IN_DOMAIN, OUT_OF_DOMAIN = "in_domain", "out_of_domain"
SPLIT_FILES = {
    "train": (("in_domain_train.csv", IN_DOMAIN),),
    "validation": (("in_domain_dev.csv", IN_DOMAIN), ("out_of_domain_dev.csv", OUT_OF_DOMAIN)),
    "test": (("test.csv", None),),
}


class RuCoLA(FinetuningTask):
    """Records: idx (of the file, ids restart in each), sentence, domain (None in test), label.

    The validation split is both dev sets together, as on the leaderboard; the scores of each are reported too.
    """

    name = "RuCoLA"
    labels = submission_labels = (0, 1)
    main_metric = "mcc"
    files = {
        "train": "in_domain_train.csv",
        "validation": "in_domain_dev.csv, out_of_domain_dev.csv",
        "test": "test.csv",
    }
    num_test_records = 2789
    in_russian_superglue = False
    download_url = "https://github.com/RussianNLP/RuCoLA/tree/main/data"
    submission_file = "RuCoLA.csv"
    published_where = "arXiv 2210.12814, split not named; human accuracy: leaderboard of May 2023"
    published_scores = {
        "human": {"accuracy": 0.84},
        "ruRoBERTa-large": {"accuracy": 0.7934, "mcc": 0.53},
        "RemBERT": {"accuracy": 0.7506, "mcc": 0.44},
        "ruBERT-base": {"accuracy": 0.743, "mcc": 0.42},
        "ruGPT-3": {"mcc": 0.30},
        "ruT5": {"mcc": 0.25},
        "mBERT": {"mcc": 0.15},
        "XLM-R": {"mcc": 0.13},
    }

    def load(self, data_dir=None, *, splits: Sequence[str] = SPLITS) -> dict[str, list[dict]]:
        directory = sources.find_task_directory(Path(data_dir), self.name) if data_dir is not None else None
        if directory is None:
            return self._load_from_hub(data_dir, splits=splits)
        expected = ", ".join(self.files.values())

        def local_file(name: str) -> Path:
            return sources.require_file(directory / name, expected=expected, download=self.download_url)

        return read_splits(local_file, splits)

    def load_from_hub(
        self, repository: str = HUB_REPOSITORY, *, splits: Sequence[str] = SPLITS
    ) -> dict[str, list[dict]]:
        """The hub repository holds the same CSV files."""
        return read_splits(lambda name: sources.hub_file(repository, f"data/{name}"), splits)

    def encode(self, record: Mapping, tokenizer, *, max_length: int, training: bool, report: Counter) -> list[dict]:
        encoding = encode_text(tokenizer, record["sentence"], max_length=max_length)
        return [with_label(model_inputs(tokenizer, encoding), record)]

    def score(self, predictions: Sequence[int], records: Sequence[Mapping]) -> dict[str, float]:
        """Accuracy and MCC on all records, and on those of each domain ("in_domain_mcc")."""
        scores = {}
        for domain in (None, IN_DOMAIN, OUT_OF_DOMAIN):
            chosen = [i for i, record in enumerate(records) if domain in (None, record["domain"])]
            if not chosen:
                continue
            labels, answers = [records[i]["label"] for i in chosen], [predictions[i] for i in chosen]
            prefix = f"{domain}_" if domain else ""
            scores[f"{prefix}accuracy"] = metrics.accuracy(labels, answers)
            scores[f"{prefix}mcc"] = metrics.mcc(labels, answers)
        return scores

    def baseline_texts(self, record: Mapping) -> list[str]:
        return [record["sentence"]]

    def submission_text(self, records: Sequence[Mapping], predictions: Sequence[int]) -> str:
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(SUBMISSION_COLUMNS)
        for record, prediction in zip(records, predictions, strict=True):
            writer.writerow((record["idx"], self.submission_labels[prediction]))
        return buffer.getvalue()

    def check_submission(self, path: Path, records: Sequence[Mapping] | None = None) -> None:
        found = []
        for where, row in sources.read_csv(path, SUBMISSION_COLUMNS, ends_in_line_break=False):
            if row["acceptable"] not in ("0", "1"):
                raise ValueError(f"{where}: acceptable is {row['acceptable']!r}, expected 0 or 1")
            found.append((where, integer(row["id"], "id", where)))
        expected = range(self.num_test_records) if records is None else [record["idx"] for record in records]
        check_ids(path, found, expected=expected, what="id")


def read_sentences(path: Path, domain: str | None) -> list[dict]:
    """The records of one CSV file; domain None means the test file, which has no labels."""
    ids = sources.UniqueIds("id")
    records = []
    for where, row in sources.read_csv(path, LABELLED_COLUMNS if domain else TEST_COLUMNS):
        record = {"idx": integer(row["id"], "id", where), "sentence": row["sentence"], "domain": domain, "label": None}
        if domain and row["acceptable"] not in ("0", "1"):
            raise ValueError(f"{where}: unknown label {row['acceptable']!r} in column acceptable, expected 0 or 1")
        if domain:
            record["label"] = int(row["acceptable"])
        ids.add(record["idx"], where)
        records.append(record)
    return records


def read_splits(find_file: Callable[[str], Path], splits: Sequence[str]) -> dict[str, list[dict]]:
    """The records of each split; find_file gives the path of a file name, or raises."""
    paths = {split: [(find_file(name), domain) for name, domain in SPLIT_FILES[split]] for split in splits}
    return {
        split: [record for path, domain in parts for record in read_sentences(path, domain)]
        for split, parts in paths.items()
    }
