"""What every fine-tuning task says about itself; scripts ask the task and never look at its name.

The life of a task: `load` the splits, `encode_split` them for a tokenizer, pad with the `collator`, train what
`build_model` made of a backbone, `predict` from the logits, `score`, `write_submission`.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import nn
from tqdm import tqdm

from src.files import write_atomically
from tasks.finetuning import metrics, sources
from tasks.finetuning.collator import PaddingCollator
from tasks.finetuning.console import InputError
from tasks.finetuning.encoding import EncodedSplit
from tasks.finetuning.models import sequence_classifier
from tasks.finetuning.submission_format import check_ids, check_label_entries

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")


class FinetuningTask:
    """Classification of records, one model row and one integer prediction each; tasks that differ override a part.

    A record is a dictionary of plain values in the schema of its task, the same from local files and from the hub,
    with the label as a position in `labels` under "label" (None where unknown).
    """

    name: str  # as in file names: "RCB"
    labels: tuple  # label values of the official files, in the order of the logits
    submission_labels: tuple  # the same labels as the leaderboard wants them
    main_metric: str = "accuracy"  # the key of `score` that chooses the best model; higher is better
    files: Mapping[str, str] = {"train": "train.jsonl", "validation": "val.jsonl", "test": "test.jsonl"}
    hub_config: str | None = None  # config of RussianNLP/russian_super_glue, None where the hub has no usable copy
    num_test_records: int  # of the official test file, one line of the submission each
    trained_on: str | None = None  # another task whose model answers this one, which has no training set
    majority_if_better: bool = False  # submit the majority class where it beats the model on validation
    published_scores: Mapping[str, Mapping[str, float]] = {}  # model -> official test scores, keys as in `score`
    published_where: str = "test set, leaderboard of May 2023"
    in_russian_superglue: bool = True  # goes into submission.zip

    @property
    def download_url(self) -> str:
        return f"https://russiansuperglue.com/tasks/download/{self.name}"

    def has_local_data(self, data_dir) -> bool:
        return sources.find_task_directory(Path(data_dir), self.name) is not None

    def load(self, data_dir=None, *, splits: Sequence[str] = SPLITS) -> dict[str, list[dict]]:
        """Records by split ("train", "validation", "test"), from the task's folder in data_dir or else from the hub.

        Splits that the task does not have are left out. Raises ValueError naming file and line for anything that is
        not as the official files are.
        """
        directory = sources.find_task_directory(Path(data_dir), self.name) if data_dir is not None else None
        if directory is None:
            return self._load_from_hub(data_dir, splits=splits)
        expected = ", ".join(self.files.values())
        paths = {
            split: sources.require_file(directory / file, expected=expected, download=self.download_url)
            for split, file in self.files.items()
            if split in splits
        }
        return {split: self.read_split(path, split) for split, path in paths.items()}

    def read_split(self, path: Path, split: str) -> list[dict]:
        return self.parse_entries(sources.read_json_lines(path), split)

    def _load_from_hub(self, data_dir, *, splits: Sequence[str]) -> dict[str, list[dict]]:
        try:
            return self.load_from_hub(splits=splits)
        except ValueError as error:
            looked = "no --data-dir was given" if data_dir is None else f"there is no folder {self.name} in {data_dir}"
            raise ValueError(
                f"{self.name}: {looked} (nor in its RussianSuperGLUE/ or combined/), and {str(error).rstrip('.')}. "
                f"Put {', '.join(self.files.values())} from {self.download_url} into DATA_DIR/{self.name}/"
            ) from error

    def load_from_hub(
        self, repository: str = sources.RUSSIAN_SUPERGLUE_HUB, *, splits: Sequence[str] = SPLITS
    ) -> dict[str, list[dict]]:
        if self.hub_config is None:
            raise ValueError(f"{self.name} is read from local files only")
        return {
            split: self.parse_entries(self.from_hub(sources.hub_rows(repository, self.hub_config, split)), split)
            for split in self.files
            if split in splits
        }

    def from_hub(self, rows) -> list[tuple[str, dict]]:
        """Rows of the hub's Parquet files as entries of the official files; the hub numbers labels, -1 is unknown."""
        entries = []
        for where, row in rows:
            entry = {key: value for key, value in row.items() if key != "label"}
            if row["label"] >= 0:
                entry["label"] = self.labels[row["label"]]
            entries.append((where, entry))
        return entries

    def parse_entries(self, entries: list[tuple[str, dict]], split: str) -> list[dict]:
        """Checks all entries of a split, including that no idx occurs twice, and turns them into records."""
        ids = sources.UniqueIds()
        records = []
        for where, entry in entries:
            if "idx" not in entry:
                raise ValueError(f"{where}: missing field 'idx'")
            ids.add(sources.integer(entry["idx"], "idx", where), where)
            records.extend(self.parse(entry, where, split=split))
        if not records:
            raise ValueError(f"{self.name}: the {split} split is empty")
        return records

    def parse(self, entry: Mapping, where: str, *, split: str) -> list[dict]:
        """The records of one entry in the official form; `where` opens every error message."""
        raise NotImplementedError

    def parse_label(self, entry: Mapping, where: str, *, split: str) -> int | None:
        return sources.label_index(entry, self.labels, where, required=split != "test")

    def encode(self, record: Mapping, tokenizer, *, max_length: int, training: bool, report: Counter) -> list[dict]:
        """The model rows of one record, none longer than max_length; "labels" only where the label is known."""
        raise NotImplementedError

    def encode_split(self, records: Sequence[Mapping], tokenizer, *, max_length: int, training: bool) -> EncodedSplit:
        if not tokenizer.is_fast:
            raise InputError(f"{self.name} needs a fast tokenizer (one with offsets), got {type(tokenizer).__name__}")
        encoded = EncodedSplit(training=training)
        # Tokenizing the long texts of MuSeRC or RuCoS takes minutes; a bar that is shown on a terminal alone.
        bar = tqdm(records, desc=f"{self.name}: reading", unit="record", leave=False, disable=None, delay=2)
        for index, record in enumerate(bar):
            rows = self.encode(record, tokenizer, max_length=max_length, training=training, report=encoded.report)
            encoded.rows.extend(rows)
            encoded.owners.extend([index] * len(rows))
        encoded.report = +encoded.report  # drops zeros
        if encoded.report:
            counts = ", ".join(f"{what}: {count}" for what, count in sorted(encoded.report.items()))
            logger.info("%s, %d records: %s", self.name, len(records), counts)
        return encoded

    def collator(self, tokenizer, *, pad_to_multiple_of: int | None = None) -> PaddingCollator:
        return PaddingCollator(tokenizer, pad_to_multiple_of=pad_to_multiple_of)

    def build_model(self, backbone: nn.Module, *, dropout: float) -> nn.Module:
        """The backbone with a fresh head; its forward takes the collator's batch and returns loss and logits."""
        return sequence_classifier(backbone, num_labels=len(self.labels), dropout=dropout)

    def predict(self, row_logits: Sequence[np.ndarray], encoded: EncodedSplit, records: Sequence[Mapping]) -> list:
        """One prediction a record from the logits of all rows, in the order of encoded.rows; padding is ignored."""
        return [
            self.choose(record, self.record_scores(record, [(encoded.rows[i], row_logits[i]) for i in rows], encoded))
            for record, rows in zip(records, encoded.rows_of_records(len(records)), strict=True)
        ]

    def record_scores(self, record: Mapping, rows: list[tuple[dict, np.ndarray]], encoded: EncodedSplit) -> np.ndarray:
        """Scores of a record's answers from (row, logits) of each of its rows."""
        ((_, logits),) = rows
        return logits

    def choose(self, record: Mapping, scores: np.ndarray):
        """The prediction for a record: the position of its best score."""
        return int(np.argmax(scores))

    def score(self, predictions: Sequence, records: Sequence[Mapping]) -> dict[str, float]:
        """The official metrics on labelled records, and main_metric among them."""
        return {"accuracy": metrics.accuracy([record["label"] for record in records], predictions)}

    def is_labelled(self, records: Sequence[Mapping]) -> bool:
        """Whether the right answers are known, so that `score` can be asked."""
        return all(record["label"] is not None for record in records)

    def majority_predictions(self, train: Sequence[Mapping], records: Sequence[Mapping]) -> list:
        """The most frequent training answer for every record."""
        (most_common, _), *_ = Counter(record["label"] for record in train).most_common(1)
        return [most_common] * len(records)

    def baseline_texts(self, record: Mapping) -> list[str]:
        """What a bag-of-words model sees: one text to classify, or one text for each answer to choose from."""
        raise NotImplementedError

    def baseline_targets(self, record: Mapping) -> list[int]:
        """The class of each baseline text."""
        return [record["label"]]

    @property
    def submission_file(self) -> str:
        return f"{self.name}.jsonl"

    def submission_entries(self, records: Sequence[Mapping], predictions: Sequence) -> list[dict]:
        """The lines of the submission file, one for each record."""
        pairs = zip(records, predictions, strict=True)
        return [{"idx": record["idx"], "label": self.submission_labels[prediction]} for record, prediction in pairs]

    def submission_text(self, records: Sequence[Mapping], predictions: Sequence) -> str:
        lines = (json.dumps(entry, ensure_ascii=False) for entry in self.submission_entries(records, predictions))
        return "\n".join(lines) + "\n"

    def write_submission(self, directory, records: Sequence[Mapping], predictions: Sequence) -> Path:
        """Writes the submission file into a directory: afterwards it is there, whole and checked, or not at all."""
        text = self.submission_text(records, predictions)
        path = Path(directory) / self.submission_file
        write_atomically(path, text, check=lambda aside: self.check_submission(aside, records))
        return path

    def check_submission(self, path: Path, records: Sequence[Mapping] | None = None) -> None:
        """Raises ValueError with the line of the first fault: form, labels, ids and number of records.

        The ids are those of the given test records, or without them 0, 1, ... of the official test file.
        """
        entries = sources.read_json_lines(path)
        found = check_label_entries(entries, self.submission_labels)
        check_ids(path, found, expected=range(self.num_test_records) if records is None else _ids(records))


def _ids(records: Sequence[Mapping]) -> list[int]:
    return [record["idx"] for record in records]
