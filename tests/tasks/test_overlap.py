"""A benchmark's sentence in the training text is found however it is written there, and nothing else is."""

import json

import pytest

from tasks.overlap import Overlap, main, search, words_of

SENTENCE = "Ещё вчера кот спал на печи."


def found_in(document: str, *sentences: str) -> Overlap:
    overlap = Overlap.of(sentences)
    search([document], [overlap])
    return overlap


@pytest.mark.parametrize("document", [
    SENTENCE,
    "Было тихо. — Еще вчера кот\nспал на печи, — сказал он.",
    "ЕЩЁ  ВЧЕРА «КОТ» СПАЛ НА ПЕЧИ",
])  # fmt: skip
def test_sentence_is_found_whatever_stands_around_and_between(document):
    assert found_in(document, SENTENCE).found == {words_of(SENTENCE)}


@pytest.mark.parametrize("document", [
    "Ещё вчера кот спал на печь.",
    "Ещё вчера кот спал на",
    "Ещё вчера кот не спал на печи.",
    "",
])  # fmt: skip
def test_what_differs_in_a_word_is_not_found(document):
    assert not found_in(document, SENTENCE).found


def test_sentences_that_begin_alike_are_told_apart_and_short_ones_counted():
    longer = "Ещё вчера кот спал на печи у нас."
    overlap = found_in("Ещё вчера кот спал на печи у них", SENTENCE, longer, SENTENCE, "Кот спал.", "Кот, спал!")
    assert overlap.found == {words_of(SENTENCE)}
    assert overlap.line("RCB").endswith("1 of 2 sentences (50.00%), 1 with fewer than 5 words not looked for")


def test_program_looks_in_what_is_scored_and_not_in_the_training_split(tmp_path, data_dir, capsys):
    split = {name: data_dir / "TERRa" / f"{name}.jsonl" for name in ("train", "val")}
    premise = {}
    for name, path in split.items():
        records = [json.loads(line) for line in path.read_text().splitlines()]
        premise[name] = f"На {name} пришли {name} люди из города."
        records[0]["premise"] = premise[name]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    text = tmp_path / "text.txt"
    arguments = ["--sources", str(text), "-d", str(data_dir), "--tasks", "TERRa"]
    text.write_text(premise["train"])
    assert main(arguments) == 0 and "TERRa    0 of" in capsys.readouterr().out
    text.write_text(f"Начало. {premise['val']} Конец.")
    assert main(arguments) == 1
    out = capsys.readouterr().out
    assert "TERRa    1 of" in out and premise["val"] in out


def test_both_sentences_of_a_minimal_pair_are_looked_for(tmp_path, capsys):
    (tmp_path / "RuBLiMP").mkdir()
    row = "1,Мы вчера видели нового учителя.,Мы вчера видели новый учителя.,Syntax,Agreement\n"
    (tmp_path / "RuBLiMP" / "np.csv").write_text(f"id,source_sentence,target_sentence,level,phenomenon\n{row}")
    text = tmp_path / "text.txt"
    text.write_text("мы вчера видели новый учителя")
    assert main(["--sources", str(text), "-d", str(tmp_path)]) == 1
    assert "RuBLiMP  1 of 2 sentences" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "complaint"), [
    (["--sources", "nowhere/*.txt", "-d", "{data}"], "nowhere"),
    (["--sources", "{text}", "-d", "{text}"], "no such directory"),
    (["--sources", "{text}", "-d", "{empty}"], "holds no benchmark"),
    (["--sources", "{text}", "-d", "{empty}", "--tasks", "RuBLiMP"], "RuBLiMP"),
])  # fmt: skip
def test_what_cannot_be_read_is_one_line(tmp_path, data_dir, monkeypatch, capsys, arguments, complaint):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    places = {"data": data_dir, "text": tmp_path / "text.txt", "empty": tmp_path / "empty"}
    places["text"].write_text("Слово.")
    places["empty"].mkdir()
    if arguments[-1] == "RuBLiMP":
        (places["empty"] / "RuBLiMP").mkdir()
    assert main([word.format(**places) for word in arguments]) == 2
    assert complaint in capsys.readouterr().err
