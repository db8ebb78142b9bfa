"""Texts to pretrain on come from the training splits alone, and can be read as a source."""

import json

import pytest

from tasks.mlm.sources import iterate_documents
from tasks.training_texts import FIELDS, collect, main


def write(path, *entries: dict) -> None:
    path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), encoding="utf-8")


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_text_of_the_training_split_and_nothing_of_the_others(data_dir, tmp_path):
    """Validation and test are filled with words of their own; labels, questions and answers are no text."""
    for task in FIELDS:
        for name in ("val", "test"):
            path = data_dir / task / f"{name}.jsonl"
            path.write_text("this is no record and must not be read", encoding="utf-8")
    output = tmp_path / "texts.jsonl"
    assert main(["-d", str(data_dir), "--output", str(output)]) == 0
    documents = list(iterate_documents(str(output)))
    assert len(documents) == len(set(documents)) > len(FIELDS)
    premises = {entry["premise"].strip() for entry in read(data_dir / "TERRa" / "train.jsonl")}
    sentences = {entry[name].strip() for entry in read(data_dir / "RUSSE" / "train.jsonl")
                 for name in ("sentence1", "sentence2")}  # fmt: skip
    assert premises <= set(documents) and sentences <= set(documents)
    hypotheses = {entry["hypothesis"] for entry in read(data_dir / "TERRa" / "train.jsonl")} - premises
    assert hypotheses and not hypotheses & set(documents)


def test_sentence_numbers_and_stress_marks_are_no_text_and_repeated_texts_come_once(data_dir):
    entries = read(data_dir / "MuSeRC" / "train.jsonl")
    entries[0]["passage"]["text"] = "(1) Кот спал. (12) Он (кот) спал 3 часа."
    write(data_dir / "MuSeRC" / "train.jsonl", entries[0])
    entries = read(data_dir / "DaNetQA" / "train.jsonl")[:2]
    for entry in entries:
        entry["passage"] = " Вы\u0301ставка за\u0301мков. "
    write(data_dir / "DaNetQA" / "train.jsonl", *entries)
    found = collect(data_dir, ["MuSeRC", "DaNetQA"])
    assert found == {"MuSeRC": ["Кот спал. Он (кот) спал 3 часа."], "DaNetQA": ["Выставка замков."]}


def test_wrong_input_is_one_line_and_what_was_there_stays(data_dir, tmp_path, capsys):
    output = tmp_path / "texts.jsonl"
    output.write_text("old")
    (data_dir / "TERRa" / "train.jsonl").write_text('{"idx": 0, "premise": 5}\n')
    assert main(["-d", str(data_dir), "--output", str(output)]) == 2
    assert "TERRa/train.jsonl:1" in capsys.readouterr().err
    assert output.read_text() == "old"
    with pytest.raises(SystemExit) as stopped:
        main(["-d", str(data_dir), "--output", str(tmp_path / "texts.txt")])
    assert stopped.value.code == 2 and "ends in .jsonl" in capsys.readouterr().err
