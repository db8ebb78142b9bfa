import pytest

from tasks.finetuning import sources

COLUMNS = ("id", "sentence")


def test_find_task_directory_knows_three_layouts(tmp_path):
    for folder in ("combined/RCB", "RussianSuperGLUE/RCB", "RCB"):
        (tmp_path / folder).mkdir(parents=True)
        assert sources.find_task_directory(tmp_path, "RCB") == tmp_path / folder
    assert sources.find_task_directory(tmp_path, "TERRa") is None


def test_find_task_directory_names_a_missing_data_directory(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no such directory \(--data-dir\); it should hold RCB/"):
        sources.find_task_directory(tmp_path / "nowhere", "RCB")


def test_require_file_says_where_to_get_it(tmp_path):
    with pytest.raises(ValueError, match=r"val\.jsonl: no such file; expected a\.jsonl.*Get them from http://x"):
        sources.require_file(tmp_path / "val.jsonl", expected="a.jsonl", download="http://x")


def test_json_lines_may_begin_with_a_byte_order_mark_and_hold_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"idx": 0}\r\n\n{"idx": 1, "text": "a\u2028b"}'.encode())
    assert [(where.rsplit(":", 1)[1], entry["idx"]) for where, entry in sources.read_json_lines(path)] == [
        ("1", 0),
        ("3", 1),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"idx": 0}\n{"idx": 1, "te', r"a\.jsonl:2: not valid JSON \(the file is cut off here, take a whole copy\)"),
        ('{"idx": 0}\n{"idx": 1,}\n', r"a\.jsonl:2: not valid JSON \((?!the file is cut)"),
        ('{"idx": 0}\n[1]\n', r"a\.jsonl:2: expected a JSON object, found a list"),
        ("", r"a\.jsonl: the file holds no records"),
        ("\n\n", r"a\.jsonl: the file holds no records"),
    ],
)
def test_json_lines_errors_name_the_line(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        sources.read_json_lines(path)


def test_json_lines_in_another_encoding_are_an_error_with_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"idx": 0}\n' + '{"text": "Кот"}'.encode("cp1251"))
    with pytest.raises(ValueError, match=r"a\.jsonl:2: not UTF-8 text"):
        sources.read_json_lines(path)


def test_half_of_a_character_in_a_json_line_is_replaced(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "x\\ud83d", "b": ["\\ud83d\\ude00", "\\\\ud83d", 1.5]}\n')
    assert sources.read_json_lines(path)[0][1] == {"a": "x\ufffd", "b": ["😀", "\\ud83d", 1.5]}


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
def test_csv_sentence_may_hold_what_str_splitlines_takes_for_a_line_break(tmp_path, mark):
    path = tmp_path / "a.csv"
    path.write_bytes(f"id,sentence\r\n0,Кот{mark}спит.\r\n1,два\r\n".encode())
    rows = sources.read_csv(path, COLUMNS)
    assert [row["sentence"] for _, row in rows] == [f"Кот{mark}спит.", "два"]
    assert [where.rsplit(":", 1)[1] for where, _ in rows] == ["2", "3"]


def test_csv_lines_are_counted_over_quoted_line_breaks(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes('\ufeffid,sentence\n0,"один\nдва, ""три"""\n1,четыре\n'.encode())
    rows = sources.read_csv(path, COLUMNS)
    assert [row["sentence"] for _, row in rows] == ['один\nдва, "три"', "четыре"]
    assert [where.rsplit(":", 1)[1] for where, _ in rows] == ["2", "4"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,text\n0,a\n", r"a\.csv:1: wrong columns 'id,text', expected 'id,sentence'"),
        ("sentence,id\na,0\n", r"a\.csv:1: wrong columns"),
        ("", r"a\.csv:1: wrong columns"),
        ("id,sentence\n", r"a\.csv: the file holds no records"),
        ("id,sentence\n0,a\n1\n", r"a\.csv:3: 1 values in a row of 2 columns"),
        ("id,sentence\n0,a,b\n", r"a\.csv:2: 3 values in a row of 2 columns"),
        ('id,sentence\n0,a\n1,"b', r"a\.csv:3: .*cut off"),
    ],
)
def test_csv_errors_name_the_line(tmp_path, content, message):
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        sources.read_csv(path, COLUMNS)


def test_csv_that_ends_within_a_line_is_an_error_unless_allowed(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,sentence\n0,a\n1,b")
    with pytest.raises(ValueError, match=r"a\.csv:3: the file ends within this line; download it again"):
        sources.read_csv(path, COLUMNS)
    assert len(sources.read_csv(path, COLUMNS, ends_in_line_break=False)) == 2


def test_field_tells_booleans_from_integers():
    assert sources.field({"a": 1}, "a", int, "f:1") == 1
    for entry, kind, message in (
        ({}, int, "f:1: missing field 'a'"),
        ({"a": True}, int, "f:1: field 'a' should be an integer, found True"),
        ({"a": None}, str, "f:1: field 'a' should be a string, found None"),
        ("text", str, "f:1: expected an object with the field 'a'"),
    ):
        with pytest.raises(ValueError, match=message):
            sources.field(entry, "a", kind, "f:1")


def test_label_index_is_strict_about_kinds_and_missing_labels():
    assert sources.label_index({"label": True}, (False, True), "f:1", required=True) == 1
    assert sources.label_index({}, (False, True), "f:1", required=False) is None
    with pytest.raises(ValueError, match="f:1: missing field 'label'"):
        sources.label_index({}, (False, True), "f:1", required=True)
    for label in (1, "true", None):
        with pytest.raises(ValueError, match=r"f:1: unknown label .*, expected one of false, true"):
            sources.label_index({"label": label}, (False, True), "f:1", required=False)


def test_unique_ids_name_both_places():
    ids = sources.UniqueIds()
    ids.add(1, "f:1")
    ids.add(2, "f:2")
    with pytest.raises(ValueError, match="f:3: duplicate idx 1, first seen in f:1"):
        ids.add(1, "f:3")
    with pytest.raises(ValueError, match="f:2: duplicate idx 2, first seen in f:2"):
        ids.add(2, "f:2")  # twice in one line


def test_fingerprint_depends_on_the_records_alone():
    record = {"idx": 0, "text": "кот"}
    first = sources.fingerprint({"train": [record], "test": []})
    assert first == sources.fingerprint({"test": [], "train": [dict(reversed(record.items()))]})
    for other in ({"train": [{**record, "idx": 1}], "test": []}, {"train": [], "test": [record]}):
        assert sources.fingerprint(other) != first


@pytest.mark.parametrize("odd", ["[" * 100_000 + "]" * 100_000, "1" * 5000])
def test_json_that_python_does_not_read_is_an_error_with_its_line(tmp_path, odd):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": ' + odd + "}\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:2: not valid JSON"):
        sources.read_json_lines(tmp_path / "a.jsonl")
