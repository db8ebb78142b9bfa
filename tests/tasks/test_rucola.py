import shutil
from pathlib import Path

import pytest

from tasks.finetuning import sources
from tasks.rucola import RuCoLA

TASK = RuCoLA()


def test_validation_is_both_dev_sets_with_their_domains(data_dir):
    splits = TASK.load(data_dir)
    assert {split: len(records) for split, records in splits.items()} == {"train": 3, "validation": 5, "test": 2}
    domains = [record["domain"] for record in splits["validation"]]
    assert domains == ["in_domain"] * 2 + ["out_of_domain"] * 3
    assert [record["label"] for record in splits["validation"]] == [1, 0, 1, 0, 1]
    assert splits["test"][1] == {"idx": 1, "sentence": "Там, где кто?", "domain": None, "label": None}


def test_real_files_load(shared_data_dir):
    splits = TASK.load(shared_data_dir)
    assert {split: len(records) for split, records in splits.items()} == {
        "train": 7869,
        "validation": 2787,
        "test": 2789,
    }
    assert sum(record["label"] for record in splits["train"]) == 5864
    assert sum(record["label"] for record in splits["validation"]) == 733 + 1149


def test_byte_order_mark_is_accepted(data_dir):
    expected = TASK.load(data_dir)
    for path in (data_dir / "RuCoLA").iterdir():
        path.write_text(path.read_text(), encoding="utf-8-sig")
    assert TASK.load(data_dir) == expected


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("in_domain_train.csv", "acceptable", "label", r"in_domain_train\.csv:1: wrong columns"),
        ("in_domain_dev.csv", "плавает.,1", "плавает.,2", r"in_domain_dev\.csv:2: unknown label '2'"),
        ("in_domain_dev.csv", "1,Рыба", "0,Рыба", r"in_domain_dev\.csv:3: duplicate id 0, first seen in .*csv:2"),
        ("out_of_domain_dev.csv", "2,Да.,1,0,Tatoeba", "2,Да.", r"out_of_domain_dev\.csv:4: 2 values in a row of 5"),
        ("out_of_domain_dev.csv", "2,Да", "x,Да", r"out_of_domain_dev\.csv:4: field 'id' should be a whole number"),
        ("test.csv", 'кто?"\n', "кто", r"test\.csv:3: .*cut off"),
        ("test.csv", "id,sentence", "id,sentence,acceptable", r"test\.csv:1: wrong columns"),
    ],
)
def test_wrong_file_is_named_with_its_line(data_dir, file, old, new, message):
    path = data_dir / "RuCoLA" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        TASK.load(data_dir)


def test_empty_and_missing_files_are_named(data_dir):
    path = data_dir / "RuCoLA" / "out_of_domain_dev.csv"
    path.write_text("id,sentence,acceptable,error_type,detailed_source\n")
    with pytest.raises(ValueError, match=r"out_of_domain_dev\.csv: the file holds no records"):
        TASK.load(data_dir)
    path.unlink()
    with pytest.raises(
        ValueError, match=r"out_of_domain_dev\.csv: no such file; expected .* Get them from https://github"
    ):
        TASK.load(data_dir)


def test_hub_files_are_the_same_csv_files(data_dir, tmp_path, monkeypatch):
    shutil.copytree(data_dir / "RuCoLA", tmp_path / "hub" / "data")
    monkeypatch.setattr(sources, "hub_file", lambda repository, path: Path(tmp_path) / "hub" / path)
    assert TASK.load(tmp_path / "hub") == TASK.load(data_dir)


def test_scores_are_given_jointly_and_by_domain(data_dir):
    records = TASK.load(data_dir)["validation"]
    scores = TASK.score([1, 0, 1, 1, 0], records)
    assert scores == pytest.approx(
        {
            "accuracy": 3 / 5,
            "mcc": (2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5,
            "in_domain_accuracy": 1,
            "in_domain_mcc": 1,
            "out_of_domain_accuracy": 1 / 3,
            "out_of_domain_mcc": (1 * 0 - 1 * 1) / (2 * 2 * 1 * 1) ** 0.5,
        }
    )
    assert TASK.main_metric == "mcc"


def test_submission_is_the_leaderboards_csv(data_dir, tmp_path, shared_data_dir):
    records = TASK.load(data_dir)["test"]
    path = TASK.write_submission(tmp_path, records, [1, 0])
    assert path.name == "RuCoLA.csv"
    assert path.read_bytes() == b"id,acceptable\n0,1\n1,0\n"
    sample = shared_data_dir / "RuCoLA" / "sample_submission.csv"
    TASK.check_submission(sample)
    TASK.check_submission(sample, TASK.load(shared_data_dir)["test"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,label\n0,1\n1,0\n", ":1: wrong columns"),
        ("id,acceptable\n0,1\n1,yes\n", ":3: acceptable is 'yes', expected 0 or 1"),
        ("id,acceptable\n0,1\n0,1\n", ":3: duplicate id 0"),
        ("id,acceptable\n0,1\n5,1\n", ":3: id 5 is not among the 2 test records"),
        ("id,acceptable\n0,1\n", ":1: 1 of 2 records, the file ends without id 1"),
        ("id,acceptable\n0,1\n-1,1\n", ":3: field 'id' should be a whole number, found '-1'"),
    ],
)
def test_wrong_submission_is_refused_with_its_line(data_dir, tmp_path, text, message):
    path = tmp_path / "RuCoLA.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        TASK.check_submission(path, TASK.load(data_dir)["test"])
