"""Reads the official evaluation files and their copies on the hub; every error names the file and the line.

A task turns entries in the official form into records of its own schema; here are the parts that all tasks share:
where the files lie, how a line becomes a dictionary, and what is wrong with a line.
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from src.files import open_text
from src.files import read_json_lines as json_lines_of
from tasks.surrogates import SURROGATE, replace_lone_surrogates

RUSSIAN_SUPERGLUE_HUB = "RussianNLP/russian_super_glue"
RUSSIAN_SUPERGLUE_REVISION = "refs/convert/parquet"
COLLECTION_FOLDERS = ("", "RussianSuperGLUE", "combined")
KIND_NAMES = {str: "a string", int: "an integer", bool: "true or false", dict: "an object", list: "a list"}


def find_task_directory(data_dir: Path, task_name: str) -> Path | None:
    """DATA_DIR/TASK, DATA_DIR/RussianSuperGLUE/TASK or DATA_DIR/combined/TASK, the first that exists."""
    if not data_dir.is_dir():
        raise ValueError(
            f"{data_dir}: no such directory (--data-dir); it should hold {task_name}/ with the official files"
        )
    for collection in COLLECTION_FOLDERS:
        if (data_dir / collection / task_name).is_dir():
            return data_dir / collection / task_name
    return None


def require_file(path: Path, *, expected: str, download: str) -> Path:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected {expected} in {path.parent}. Get them from {download}")
    return path


def read_json_lines(path: Path) -> list[tuple[str, dict]]:
    """(place for error messages, object) of each line; blank lines are skipped, an empty file is an error."""
    entries = []
    for where, value in json_lines_of(path):
        text = json.dumps(value, ensure_ascii=False)
        entry = json.loads(replace_lone_surrogates(text)) if SURROGATE.search(text) else value
        if not isinstance(entry, dict):
            raise ValueError(
                f"{where}: expected a JSON object, found {KIND_NAMES.get(type(entry), 'a number or null')}"
            )
        entries.append((where, entry))
    if not entries:
        raise ValueError(f"{path}: the file holds no records")
    return entries


def read_csv(
    path: Path, columns: tuple[str, ...], *, others: bool = False, ends_in_line_break: bool = True
) -> list[tuple[str, dict]]:
    """(place for error messages, row) of each data row; the header must be exactly the given columns.

    With ``others`` it may hold more, in any order, and blank lines are passed over.
    A last line without a line break is an error unless it is allowed: cut off inside a sentence, it would look whole.
    """
    text = open_text(path)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)  # str.splitlines cuts at U+2028 and others, too
    rows = []
    try:
        header = next(reader, [])
        is_right = set(columns) <= set(header) and len(set(header)) == len(header) if others else header == [*columns]
        if not is_right:
            more = " (others may stand beside these)" if others else ""
            raise ValueError(f"{path}:1: wrong columns {','.join(header)!r}, expected {','.join(columns)!r}{more}")
        first_line = reader.line_num + 1  # a quoted field may run over several lines
        for values in reader:
            if len(values) != len(header) and (values or not others):
                raise ValueError(f"{path}:{first_line}: {len(values)} values in a row of {len(header)} columns")
            if values:
                rows.append((f"{path}:{first_line}", dict(zip(header, values, strict=True))))
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: {error} (is the file cut off? download it again)") from error
    if not rows:
        raise ValueError(f"{path}: the file holds no records")
    if ends_in_line_break and not text.endswith("\n"):
        raise ValueError(
            f"{rows[-1][0]}: the file ends within this line; download it again (if it is whole, add a line break)"
        )
    return rows


def field(entry: Mapping, name: str, kind: type, where: str):
    """entry[name] if it is there and of that kind (True is no integer here), else an error."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: expected an object with the field {name!r}, found {entry!r:.60}")
    if name not in entry:
        raise ValueError(f"{where}: missing field {name!r}")
    value = entry[name]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where}: field {name!r} should be {KIND_NAMES[kind]}, found {value!r:.60}")
    return value


def integer(text, name: str, where: str) -> int:
    """An integer, or its decimal string as LiDiRus and CSV files have it."""
    if isinstance(text, bool) or not (isinstance(text, int) or (isinstance(text, str) and text.strip().isdecimal())):
        raise ValueError(f"{where}: field {name!r} should be a whole number, found {text!r:.60}")
    return int(text)


def label_index(entry: Mapping, labels: tuple, where: str, *, required: bool) -> int | None:
    """Position of entry["label"] in labels; None for an unlabelled record where that is allowed."""
    if "label" not in entry and not required:
        return None
    if "label" not in entry:
        raise ValueError(f"{where}: missing field 'label'")
    value = entry["label"]
    for index, label in enumerate(labels):
        if label == value and type(label) is type(value):  # 1 == True, but they are different labels
            return index
    known = ", ".join(json.dumps(label) for label in labels)
    raise ValueError(f"{where}: unknown label {json.dumps(value, ensure_ascii=False)}, expected one of {known}")


class UniqueIds:
    """Remembers where each id was first seen."""

    def __init__(self, what: str = "idx"):
        self.what = what
        self.places: dict = {}

    def add(self, identifier, where: str) -> None:
        if identifier in self.places:
            raise ValueError(f"{where}: duplicate {self.what} {identifier!r}, first seen in {self.places[identifier]}")
        self.places[identifier] = where


def hub_rows(repository: str, config: str, split: str) -> Iterator[tuple[str, dict]]:
    """Rows of one Parquet split of a hub repository (or of a local copy of its layout: config/split/*.parquet).

    `load_dataset(repository, config)` cannot work: the repository holds a loading script, which datasets >= 4 refuses,
    and the converted branch has no README that would declare the configs. Files named one by one do work.
    """
    import datasets

    try:
        rows = datasets.load_dataset(
            repository,
            data_files={split: f"{config}/{split}/*.parquet"},
            revision=RUSSIAN_SUPERGLUE_REVISION,
            split=split,
        )
    except Exception as error:  # the hub client raises its own, httpx's and datasets' errors
        raise ValueError(
            f"could not load {config}/{split} from the hub repository {repository}: {type(error).__name__}: {error}"
        ) from error
    for number, row in enumerate(rows):
        yield f"{repository}/{config}/{split}, row {number}", row


def hub_file(repository: str, path: str) -> Path:
    """A file of a hub dataset repository, downloaded to the local cache."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, path, repo_type="dataset"))
    except Exception as error:  # as above
        raise ValueError(
            f"could not download {path} from the hub repository {repository}: {type(error).__name__}: {error}"
        ) from error


def fingerprint(splits: Mapping[str, list[dict]]) -> str:
    """SHA-256 of all records of all splits: equal for equal data, wherever it was read from."""
    digest = hashlib.sha256()
    for split in sorted(splits):
        digest.update(split.encode())
        for record in splits[split]:
            digest.update(json.dumps(record, sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()
