"""From official files and from the hub's Parquet files to one schema, and what is said about wrong files."""

import copy
import json
import re
import shutil

import pytest

from tasks.finetuning import sources
from tasks.registry import TASKS

RSG = [task for task in TASKS.values() if task.in_russian_superglue]
names = pytest.mark.parametrize("task", RSG, ids=[task.name for task in RSG])
REAL_COUNTS = {
    "LiDiRus": {"test": 5},
    "RCB": {"train": 140, "validation": 46, "test": 429},
    "PARus": {"train": 103, "validation": 104, "test": 500},
    "MuSeRC": {"train": 10111, "validation": 1313, "test": 6316},  # answers
    "TERRa": {"train": 2616, "validation": 307, "test": 3198},
    "RUSSE": {"train": 5098, "validation": 1670, "test": 765},
    "RWSD": {"train": 103, "validation": 104, "test": 134},
    "DaNetQA": {"train": 819, "validation": 600, "test": 607},
    "RuCoS": {"train": 48, "validation": 22, "test": 20},
}
MUSERC_ANSWERS = [1, 0, 1, 0, 1]


def first_split(task):
    return next(iter(task.files))


def path_of(task, data_dir, split=None):
    return data_dir / task.name / task.files[split or first_split(task)]


def rewrite(path, change):
    """Applies a function to the list of records of a file."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    change(records)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


@names
def test_real_records_load(task, shared_data_dir):
    splits = task.load(shared_data_dir)
    assert {split: len(records) for split, records in splits.items()} == REAL_COUNTS[task.name]


@names
def test_all_layouts_give_the_same_records(task, data_dir, tmp_path):
    expected = task.load(data_dir)
    assert expected.keys() == task.files.keys()
    for collection in ("RussianSuperGLUE", "combined"):
        other = tmp_path / collection
        shutil.copytree(data_dir, other / collection)
        for path in (other / collection).rglob("*.jsonl"):  # and with a byte order mark
            path.write_text(path.read_text(), encoding="utf-8-sig")
        assert task.load(other) == expected


@names
def test_test_records_have_no_labels_and_others_do(task, data_dir):
    for split, records in task.load(data_dir).items():
        answers = [record["answers"] if task.name == "RuCoS" else record["label"] for record in records]
        known = split != "test" or task.name == "LiDiRus"
        assert all((answer is not None) == known for answer in answers)
        assert task.is_labelled(records) == known


@names
def test_missing_file_is_named_with_its_source(task, data_dir):
    path = path_of(task, data_dir)
    path.unlink()
    with pytest.raises(ValueError, match=re.escape(f"{path}: no such file; expected ")) as error:
        task.load(data_dir)
    assert f"russiansuperglue.com/tasks/download/{task.name}" in str(error.value)


@names
def test_truncated_last_line_is_named(task, data_dir):
    path = path_of(task, data_dir)
    text = path.read_text().rstrip("\n")
    path.write_text(text[:-10])
    with pytest.raises(
        ValueError, match=re.escape(f"{path}:{text.count(chr(10)) + 1}: not valid JSON (the file is cut")
    ):
        task.load(data_dir)


@names
def test_empty_split_is_named(task, data_dir):
    path_of(task, data_dir).write_text("")
    with pytest.raises(ValueError, match=re.escape(f"{path_of(task, data_dir)}: the file holds no records")):
        task.load(data_dir)


@names
def test_duplicate_idx_is_named_with_both_lines(task, data_dir):
    path = path_of(task, data_dir)
    rewrite(path, lambda records: records[1].update(idx=records[0]["idx"]))
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: duplicate idx 0, first seen in {path}:1")):
        task.load(data_dir)


@names
def test_every_missing_field_is_named(task, data_dir):
    path = path_of(task, data_dir)
    original = path.read_text()
    entry = json.loads(original.splitlines()[1])
    optional = {"verb", "negation", "genre", "gold_sense1", "gold_sense2", "logic", "knowledge"}
    if task.name == "LiDiRus":  # a test set: labels are welcome there
        optional.add("label")
    for field in entry.keys() - optional:
        rewrite(path, lambda records, field=field: records[1].pop(field))
        with pytest.raises(ValueError, match=re.escape(f"{path}:2: missing field '{field}'")):
            task.load(data_dir)
        path.write_text(original)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("MuSeRC", lambda r: r["passage"].pop("text"), "missing field 'text'"),
        ("MuSeRC", lambda r: r["passage"]["questions"][0].pop("answers"), "missing field 'answers'"),
        ("MuSeRC", lambda r: r["passage"]["questions"][0]["answers"][0].pop("label"), "missing field 'label'"),
        ("MuSeRC", lambda r: r["passage"]["questions"][0]["answers"][0].update(label=True), "unknown label true"),
        ("MuSeRC", lambda r: r["passage"]["questions"][1].update(idx=2), "duplicate question idx 2"),
        ("MuSeRC", lambda r: r["passage"]["questions"][0]["answers"][1].update(idx=5), "duplicate answer idx 5"),
        ("MuSeRC", lambda r: r["passage"].update(questions=[]), "a passage without questions"),
        ("MuSeRC", lambda r: r["passage"].update(questions=["?"]), "expected an object with the field 'answers'"),
        ("RWSD", lambda r: r["target"].pop("span2_index"), "missing field 'span2_index'"),
        ("RUSSE", lambda r: r.update(start1="4"), "field 'start1' should be an integer"),
        ("PARus", lambda r: r.update(question="why"), "unknown question 'why', expected one of cause, effect"),
        ("PARus", lambda r: r.update(label=True), "unknown label true, expected one of 0, 1"),
        ("DaNetQA", lambda r: r.update(label="true"), 'unknown label "true", expected one of false, true'),
        ("RCB", lambda r: r.update(label="not_entailment"), 'unknown label "not_entailment"'),
        ("TERRa", lambda r: r.update(label="neutral"), 'unknown label "neutral"'),
        ("TERRa", lambda r: r.update(idx="two"), "field 'idx' should be a whole number, found 'two'"),
        ("TERRa", lambda r: r.update(premise=None), "field 'premise' should be a string, found None"),
        ("RuCoS", lambda r: r["passage"]["entities"][0].pop("end"), "missing field 'end'"),
        ("RuCoS", lambda r: r["qas"].clear(), "expected one query in 'qas', found 0"),
        ("RuCoS", lambda r: r["qas"][0].pop("answers"), "missing field 'answers'"),
        ("RuCoS", lambda r: r["qas"][0].update(answers=[]), "the query has no answers"),
        ("RuCoS", lambda r: r["qas"][0].update(query="Где?"), "the query has no @placeholder"),
    ],
)
def test_wrong_record_is_named_with_its_line(name, change, message, data_dir):
    task = TASKS[name.lower()]
    path = path_of(task, data_dir)
    rewrite(path, lambda records: change(records[1]))
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: {message}")):
        task.load(data_dir)


def hub_rows(name, entry, *, labels):
    """The official entry as the hub has it: labels are numbers (-1 unknown), nested fields are flat."""
    row = {key: value for key, value in entry.items() if key not in ("label", "genre", "target", "passage")}
    row["label"] = labels.index(entry["label"]) if "label" in entry else -1
    if name == "LiDiRus":
        tags = ("knowledge", "lexical-semantics", "logic", "predicate-argument-structure")
        return [{**row, "idx": int(entry["idx"]), **{tag: entry.get(tag, "") for tag in tags}}]
    if name == "RUSSE":
        return [{**row, "gold_sense1": entry.get("gold_sense1", -1), "gold_sense2": entry.get("gold_sense2", -1)}]
    if name == "RWSD":
        return [{**row, **entry["target"]}]
    if name == "DaNetQA":
        return [{**row, "passage": entry["passage"]}]
    if name != "MuSeRC":
        return [row]
    return [
        {
            "paragraph": entry["passage"]["text"],
            "question": question["question"],
            "answer": answer["text"],
            "idx": {"paragraph": entry["idx"], "question": question["idx"], "answer": answer["idx"]},
            "label": answer.get("label", -1),
        }
        for question in entry["passage"]["questions"]
        for answer in question["answers"]
    ]


@pytest.mark.parametrize("task", [t for t in RSG if t.hub_config], ids=[t.name for t in RSG if t.hub_config])
def test_hub_files_give_the_same_records(task, official, data_dir, tmp_path, monkeypatch):
    """A local copy of the layout of the hub's refs/convert/parquet, read by the same load_dataset call."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    for split, file in task.files.items():
        entries = official[task.name][file.removesuffix(".jsonl")]
        rows = [row for entry in entries for row in hub_rows(task.name, entry, labels=task.labels)]
        folder = tmp_path / "hub" / task.hub_config / split
        folder.mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "0000.parquet")
    from_hub = task.load_from_hub(str(tmp_path / "hub"))
    assert from_hub == task.load(data_dir)
    assert sources.fingerprint(from_hub) == sources.fingerprint(task.load(data_dir))


def test_hub_failure_says_what_to_put_where(tmp_path, monkeypatch):
    def no_hub(*_):
        raise ValueError("could not load rcb/train from the hub: offline")
        yield

    monkeypatch.setattr(sources, "hub_rows", no_hub)
    with pytest.raises(ValueError, match="offline") as error:
        TASKS["rcb"].load(tmp_path)
    assert f"there is no folder RCB in {tmp_path}" in str(error.value)
    assert "train.jsonl, val.jsonl, test.jsonl from https://russiansuperglue.com/tasks/download/RCB" in str(error.value)


def test_hub_errors_of_any_kind_are_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="could not load rcb/train from the hub repository"):
        TASKS["rcb"].load_from_hub(str(tmp_path))


def test_rucos_is_local_only(tmp_path):
    with pytest.raises(ValueError, match=r"RuCoS is read from local files only.*tasks/download/RuCoS"):
        TASKS["rucos"].load(tmp_path)


def test_lidirus_does_not_read_other_files_of_its_folder(data_dir, write_jsonl):
    write_jsonl(data_dir / "LiDiRus" / "human_majority.jsonl", [{"idx": "0"}])
    assert len(TASKS["lidirus"].load(data_dir)["test"]) == 3


def test_loading_twice_gives_equal_records(data_dir):
    for task in RSG:
        first = task.load(data_dir)
        assert copy.deepcopy(first) == task.load(data_dir)


@names
def test_only_the_wanted_splits_are_read(task, data_dir):
    expected = task.load(data_dir)["test"]
    for split, file in task.files.items():
        if split != "test":
            (data_dir / task.name / file).unlink()
    assert task.load(data_dir, splits=("test",)) == {"test": expected}
