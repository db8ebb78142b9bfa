import json
import shutil
import zipfile

import pytest

from tasks.registry import TASKS
from tasks.submission import ARCHIVE, ARCHIVE_TIME, check_directory, main, write_archive

RSG_FILES = sorted(task.submission_file for task in TASKS.values() if task.in_russian_superglue)


@pytest.fixture
def predictions(data_dir, tmp_path):
    """A folder with the majority predictions of all tasks."""
    directory = tmp_path / "preds" / "majority"
    for task in TASKS.values():
        splits = task.load(data_dir)
        answers = task.majority_predictions(splits.get("train", splits["test"]), splits["test"])
        task.write_submission(directory, splits["test"], answers)
    return directory


def test_right_files_of_all_tasks_are_accepted(predictions, data_dir, capsys):
    report = check_directory(predictions, data_dir)
    assert set(report.right) == {task.submission_file for task in TASKS.values()}
    assert report.right["MuSeRC.jsonl"] == report.right["RWSD.jsonl"] == 2
    assert not report.wrong
    assert not report.missing
    assert "RCB.jsonl: the test file in" in "".join(report.notes)  # 3 records of 438
    assert main([str(predictions), "--data-dir", str(data_dir)]) == 0
    assert "right    RCB.jsonl (3 records)" in capsys.readouterr().out


def test_official_numbers_are_wanted_without_a_data_dir(predictions, capsys):
    report = check_directory(predictions)
    assert not report.right
    assert "RCB.jsonl:3: 3 of 438 records" in report.wrong["RCB.jsonl"]
    assert "RuCoLA.csv:2: 2 of 2789 records" in report.wrong["RuCoLA.csv"]
    assert main([str(predictions)]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_full_file_is_accepted_by_official_numbers(tmp_path):
    for name, label in (("RCB", "neutral"), ("RWSD", "True"), ("RuCoS", "Косово"), ("PARus", 1)):
        task = TASKS[name.lower()]
        lines = [json.dumps({"idx": idx, "label": label}) for idx in range(task.num_test_records)]
        (tmp_path / task.submission_file).write_text("\n".join(lines) + "\n")
    report = check_directory(tmp_path)
    assert report.right == {"RCB.jsonl": 438, "PARus.jsonl": 500, "RWSD.jsonl": 154, "RuCoS.jsonl": 7257}
    assert len(report.missing) == 6


@pytest.mark.parametrize(
    ("name", "old", "new", "line"),
    [
        ("RCB", '"label": "entailment"', '"label": "maybe"', "RCB.jsonl:1: unknown label"),
        ("RUSSE", '"label": "false"', '"label": false', "RUSSE.jsonl:1: unknown label false"),
        ("RWSD", '"label": "False"', '"label": "false"', 'RWSD.jsonl:1: unknown label "false"'),
        ("PARus", '"label": 0', '"label": "0"', 'PARus.jsonl:1: unknown label "0"'),
        ("TERRa", '{"idx": 1', '{"idx": "1"', "TERRa.jsonl:2: field 'idx' should be an integer"),
        ("TERRa", '{"idx": 1', '{"idx": 0', "TERRa.jsonl:2: duplicate idx 0"),
        ("TERRa", '{"idx": 1', '{"idx": 3', "TERRa.jsonl:2: idx 3 is not among the 3 test records"),
        ("TERRa", '{"idx": 1', '{"idx": 1', None),
        ("RuCoS", '"label": "Боровска"', '"label": " "', "RuCoS.jsonl:1: the label is empty"),
        ("RuCoS", '"label": "Боровска"', '"label": ["a"]', "RuCoS.jsonl:1: field 'label' should be a string"),
        ("LiDiRus", '"idx": 0, ', "", "LiDiRus.jsonl:1: missing field 'idx'"),
    ],
)
def test_wrong_file_is_refused_with_its_line(predictions, data_dir, name, old, new, line):
    path = predictions / f"{name}.jsonl"
    text = (
        path.read_text()
        .replace("not_entailment", "entailment")
        .replace('"true"', '"false"')
        .replace('"True"', '"False"')
    )
    assert old in text
    path.write_text(text.replace(old, new, 1).replace('"label": 1', '"label": 0'))
    report = check_directory(predictions, data_dir)
    assert line is None or line in report.wrong[path.name]
    assert (path.name in report.wrong) == (line is not None)


def test_file_of_no_task_is_refused(predictions, data_dir):
    (predictions / "Terra.jsonl").write_text("{}")
    assert "no task has a submission file of this name" in check_directory(predictions, data_dir).wrong["Terra.jsonl"]


def test_archive_holds_the_files_in_one_folder_and_lists_what_is_missing(predictions, data_dir):
    assert write_archive(predictions) == []
    with zipfile.ZipFile(predictions / ARCHIVE) as archive:
        assert sorted(archive.namelist()) == [f"submission/{name}" for name in RSG_FILES]
        for name in RSG_FILES:
            assert archive.read(f"submission/{name}") == (predictions / name).read_bytes()
        assert {entry.date_time for entry in archive.infolist()} == {ARCHIVE_TIME}  # equal files, equal archives
    (predictions / "RCB.jsonl").unlink()
    assert write_archive(predictions) == ["RCB.jsonl"]
    with zipfile.ZipFile(predictions / ARCHIVE) as archive:
        assert len(archive.namelist()) == 8


def test_archive_that_differs_from_its_files_is_noticed_and_renewed(predictions, data_dir, capsys):
    write_archive(predictions)
    assert not any(ARCHIVE in note for note in check_directory(predictions, data_dir).notes)
    shutil.copy(predictions / "RCB.jsonl", predictions / "RCB.bak")
    (predictions / "RCB.jsonl").unlink()
    assert any(ARCHIVE in note for note in check_directory(predictions, data_dir).notes)
    assert main([str(predictions), "--data-dir", str(data_dir), "--zip"]) == 0
    assert "missing  RCB.jsonl" in capsys.readouterr().out
    assert not any(ARCHIVE in note for note in check_directory(predictions, data_dir).notes)


def test_damaged_archive_is_noticed(predictions, data_dir):
    (predictions / ARCHIVE).write_bytes(b"PK")
    assert any(f"{ARCHIVE} is damaged" in note for note in check_directory(predictions, data_dir).notes)


def test_archive_is_not_written_from_wrong_files(predictions, data_dir):
    (predictions / "RCB.jsonl").write_text("{}\n")
    assert main([str(predictions), "--data-dir", str(data_dir), "--zip"]) == 1
    assert not (predictions / ARCHIVE).exists()


def test_nothing_to_pack_writes_no_archive(tmp_path):
    assert write_archive(tmp_path) == RSG_FILES
    assert list(tmp_path.iterdir()) == []


def test_missing_and_empty_folders_are_one_error_and_exit_code_2(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 2
    assert "none: no such directory" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "no predictions" in capsys.readouterr().err


def test_wrong_test_file_is_exit_code_2(predictions, data_dir, capsys):
    (data_dir / "RCB" / "test.jsonl").write_text("{")
    assert main([str(predictions), "--data-dir", str(data_dir)]) == 2
    assert "test.jsonl:1: not valid JSON" in capsys.readouterr().err


def test_failed_write_leaves_no_part_of_a_file(data_dir, tmp_path):
    task = TASKS["rcb"]
    records = task.load(data_dir)["test"]
    with pytest.raises(ValueError, match="zip"):
        task.write_submission(tmp_path / "out", records, [0])
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []
