"""Paradigm files are read right, whatever wrote them, or refused with their line."""

import dataclasses
import random

import datasets
import pytest

from tasks.rublimp import pairs as pairs_of
from tasks.rublimp.pairs import PARADIGMS, fingerprint, missing_paradigms, read_pairs, read_paradigm, sample

HEADER = "id,source_sentence,target_sentence,level,phenomenon\n"
ROW = "7,Кот спит.,Кот спать.,Syntax,Agreement\n"


def test_paradigm_is_read_with_other_columns_in_any_order_and_whatever_its_line_ends(tmp_path):
    text = (
        "domain,phenomenon,target_sentence,id,level,source_sentence,tree_length\n"
        'wiki,Tense,"Он, да,\nпришёл завтра.",12,Semantics,"Он, да,\nпридёт «завтра»"".",3\n'
        "\n"
        "news,Tense,Вчера будет.,12,Semantics,Вчера было.,1\n"
    )
    path = tmp_path / "single_verb_tense.csv"
    found = []
    for content in (text.encode(), text.encode("utf-8-sig"), text.replace("\n", "\r\n").encode()):
        path.write_bytes(content)
        found.append(list(read_paradigm(path)))
    first, second = found[0]
    assert first.texts == ('Он, да,\nпридёт «завтра»".', "Он, да,\nпришёл завтра.")
    assert (first.paradigm, first.id, first.level, first.phenomenon) == (
        "single_verb_tense",
        "12",
        "Semantics",
        "Tense",
    )
    assert second.texts == ("Вчера было.", "Вчера будет.") and second.id == "12", "ids need not tell pairs apart"
    assert found[1] == found[0]
    assert [pair.texts[0].replace("\r", "") for pair in found[2]] == [pair.texts[0] for pair in found[0]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"x\.csv:1: wrong columns '', expected 'id,source_sentence,"),
        (HEADER.encode(), r"x\.csv: the file holds no records"),
        (b"id,sentence_good,sentence_bad\n1,a,b\n", r"x\.csv:1: wrong columns 'id,sentence_good,.*others may stand"),
        (("id," + HEADER + "1," + ROW).encode(), r"x\.csv:1: wrong columns 'id,id,"),
        (HEADER.replace(",", ";").encode(), r"x\.csv:1: wrong columns"),
        ((HEADER + ROW + "8,Кот.,,Syntax,Agreement\n").encode(), r"x\.csv:3: target_sentence is empty"),
        ((HEADER + ROW + "8,Кот.,Кота.\n").encode(), r"x\.csv:3: 3 values in a row of 5 columns"),
        ((HEADER + ROW + ROW.replace("Syntax", "Tense")).encode(), r"x\.csv:3: Tense, Agreement in a paradigm that"),
        ((HEADER + ROW + '8,"Кот').encode(), r"x\.csv:3: unexpected end of data \(is the file cut off"),
        ((HEADER + ROW + ROW[:-1]).encode(), r"x\.csv:3: the file ends within this line"),
        ((HEADER + ROW).encode("cp1251"), r"x\.csv:2: not UTF-8 text"),
        ((HEADER + ROW).encode("utf-16"), r"x\.csv:1: not UTF-8 text"),
    ],
)
def test_what_is_no_paradigm_is_named_with_its_line(tmp_path, content, message):
    path = tmp_path / "RuBLiMP" / "x.csv"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_pairs(tmp_path, pairs_each=5)


def test_sample_is_fixed_wherever_the_pairs_stand_and_a_larger_one_holds_a_smaller(pairs_dir):
    pairs = read_paradigm(pairs_dir / "RuBLiMP" / "add_verb_prefix.csv")
    shuffled = random.Random(1).sample(pairs, len(pairs))
    assert shuffled != pairs
    assert sample(shuffled, 2) == sample(pairs, 2) == sample(pairs, 3)[:2] == sample(sample(pairs, 3), 2)
    assert len(sample(pairs, 1000)) == 3
    numbered_anew = [dataclasses.replace(pair, id=str(number)) for number, pair in enumerate(pairs[::-1])]
    assert [pair.texts for pair in sample(numbered_anew, 3)] == [pair.texts for pair in sample(pairs, 3)]


def test_paradigms_that_are_not_there_are_named_and_unknown_ones_welcome(pairs_dir):
    file = pairs_dir / "RuBLiMP" / "np_agreement_number.csv"
    file.rename(file.with_name("of_tomorrow.csv"))
    pairs = read_pairs(pairs_dir, pairs_each=2)
    assert len(pairs) == 6 and {pair.paradigm for pair in pairs} == {
        "add_verb_prefix",
        "of_tomorrow",
        "single_verb_tense",
    }
    missing = missing_paradigms(pairs)
    assert len(PARADIGMS) == len(set(PARADIGMS)) == 45 and len(missing) == 43 and "np_agreement_number" in missing


def test_copy_of_the_benchmarks_repository_is_found_and_a_folder_without_files_is_an_error(tmp_path, pairs_dir):
    directory = pairs_dir / "RuBLiMP"
    (tmp_path / "clone").mkdir()
    directory.rename(tmp_path / "clone" / "datasets")
    (tmp_path / "clone").rename(directory)
    assert len(read_pairs(pairs_dir, pairs_each=2)) == 6
    (directory / "datasets").rename(tmp_path / "away")
    with pytest.raises(ValueError, match=r"RuBLiMP: holds no PARADIGM\.csv; get them from https"):
        read_pairs(pairs_dir, pairs_each=2)
    with pytest.raises(ValueError, match="no such directory"):
        read_pairs(tmp_path / "nowhere", pairs_each=2)


def test_without_a_folder_the_hub_is_read(tmp_path, pairs_dir, monkeypatch):
    there = {path.stem: path for path in (pairs_dir / "RuBLiMP").glob("*.csv")}

    def load(repository, paradigm, *, split):
        assert (repository, split) == ("RussianNLP/rublimp", "train")
        return [row for _, row in pairs_of.sources.read_csv(there[paradigm], pairs_of.COLUMNS, others=True)]

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(pairs_of, "PARADIGMS", tuple(sorted(there)))
    found = read_pairs(tmp_path, pairs_each=2)
    assert fingerprint(found) == fingerprint(read_pairs(pairs_dir, pairs_each=2)) != fingerprint(found[:-1])

    def refuse(*arguments, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=r"could not load add_verb_prefix .*\(no route\); or put the files of https"):
        read_pairs(tmp_path, pairs_each=2)


def test_all_real_paradigms_are_read(shared_data_dir):
    if not (shared_data_dir / "RuBLiMP").is_dir():
        pytest.skip("the benchmark's files are not there")
    pairs = read_pairs(shared_data_dir, pairs_each=1000)
    assert len(pairs) == 1000 * (len(PARADIGMS) - len(missing_paradigms(pairs)))
    assert {pair.paradigm for pair in pairs} <= set(PARADIGMS)
    assert {pair.level for pair in pairs} == set(pairs_of.LEVELS)
    assert not any(pair.grammatical == pair.ungrammatical for pair in pairs)
