import pytest

from src.files import write_atomically
from tasks.finetuning.submission_format import check_ids, check_label_entries


def test_submission_leaves_the_old_file_when_the_check_fails(tmp_path):
    path = tmp_path / "new" / "RCB.jsonl"
    write_atomically(path, "first\n", check=lambda temporary: None)

    def refuse(temporary):
        assert temporary.read_text() == "second\n"
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        write_atomically(path, "second\n", check=refuse)
    assert path.read_text() == "first\n"
    assert list(path.parent.iterdir()) == [path]


def entry(idx, label="yes", **extra):
    return {"idx": idx, "label": label, **extra}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (entry(1, "perhaps"), "f:2: unknown label"),
        (entry("1"), "f:2: field 'idx' should be an integer"),
        (entry(True), "f:2: field 'idx' should be an integer"),
        (entry(1, more=1), "f:2: field 'more' does not belong here"),
        ({"idx": 1}, "f:2: missing field 'label'"),
        ({"label": "yes"}, "f:2: missing field 'idx'"),
    ],
)
def test_check_label_entries_names_the_line(wrong, message):
    with pytest.raises(ValueError, match=message):
        check_label_entries([("f:1", entry(0)), ("f:2", wrong)], ("yes", "no"))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 1, 0], "f:3: duplicate idx 0, first seen in f:1"),
        ([0, 1, 7], "f:3: idx 7 is not among the 3 test records"),
        ([2, 0], r"file:2: 2 of 3 records, the file ends without idx 1 \(1 missing\)"),
        ([], r"file:0: 0 of 3 records, the file ends without idx 0, 1, 2 \(3 missing\)"),
    ],
)
def test_check_ids_wants_each_id_once(ids, message):
    found = [(f"f:{line}", idx) for line, idx in enumerate(ids, 1)]
    with pytest.raises(ValueError, match=message):
        check_ids("file", found, expected=range(3))


def test_check_ids_takes_any_order():
    check_ids("file", [("f:1", 2), ("f:2", 0), ("f:3", 1)], expected=range(3))
