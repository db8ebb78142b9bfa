"""train_tokenizer: a directory load_tokenizer opens, that keeps Russian letters and splits text at whitespace."""

import gzip
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from src.models.tokenizer import load_tokenizer, raw_tokenizer
from tasks.mlm import train_tokenizer as training

REPOSITORY = Path(__file__).resolve().parents[3]
ALPHABET = (
    "АБВГДЕЁЖЗИЙКЛМНОПРСТУФХЦЧШЩЪЫЬЭЮЯабвгдеёжзийклмнопрстуфхцчшщъыьэюяABCXYZabcxyz0123456789«»—…„“.,!?:;-()\"'%№"
)
SYLLABLES = [
    "ма",
    "мы",
    "ла",
    "ра",
    "му",
    "чит",
    "ёж",
    "йо",
    "од",
    "га",
    "зе",
    "ту",
    "По",
    "ЕЗД",
    "ре",
    "ко",
    "вы",
    "й",
]


def invent_documents(number: int = 60) -> list[str]:
    generator = random.Random(0)
    words = ["".join(generator.choices(SYLLABLES, k=generator.randint(1, 4))) for _ in range(3000)]
    return [" ".join(generator.choices(words, k=80)) + "!" for _ in range(number)]


def run(*arguments) -> None:
    training.train_tokenizer(training.parse_arguments([str(argument) for argument in arguments]))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("\n\n".join(invent_documents()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "deep" / "tokenizer"
    run("--sources", corpus, "--vocab_size", 400, "--output", output)
    return output


@pytest.fixture(scope="module")
def tokenizer(trained):
    return load_tokenizer(trained)


def test_train_tokenizer_writes_the_files_of_the_published_one(trained):
    assert sorted(path.name for path in trained.iterdir()) == [
        "config.json",
        "special_tokens_map.json",
        "tokenizer.json",
    ]
    assert [path.name for path in trained.parent.iterdir()] == ["tokenizer"]  # nothing left aside
    assert json.loads((trained / "config.json").read_text())["vocab_size"] == 400


def test_trained_tokenizer_has_the_size_asked_for_and_the_special_ids_of_the_model(tokenizer):
    assert len(tokenizer) == tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False) == 400
    specials = tokenizer.convert_tokens_to_ids(["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"])
    assert specials == [0, 1, 2, 3, 4]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 2, 3)
    assert (tokenizer.unk_token_id, tokenizer.mask_token_id) == (1, 4)
    assert tokenizer.added_tokens_decoder[4].lstrip


def test_trained_tokenizer_knows_every_letter_and_mark(tokenizer):
    assert 1 not in tokenizer(ALPHABET)["input_ids"]
    assert 1 not in tokenizer(" ".join(ALPHABET))["input_ids"]


def test_trained_tokenizer_keeps_case_and_composes_letters(tokenizer):
    text = "Ёжик и йод, ПОЕЗД № 5…"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer("и\u0306 е\u0308")["input_ids"] == tokenizer("й ё")["input_ids"]
    assert tokenizer("ма\u00adма\u200b")["input_ids"] == tokenizer("мама")["input_ids"]


def test_trained_tokenizer_treats_all_whitespace_alike(tokenizer):
    assert tokenizer("мама \n\n\tмыла\u00a0раму\r\n\x01ёж ")["input_ids"] == tokenizer("мама мыла раму ёж")["input_ids"]


def test_trained_tokenizer_segments_words_one_by_one(tokenizer):
    raw = raw_tokenizer(tokenizer)
    words = ["Мама,", "ёж", "«ПОЕЗД»", "—", "й", "кот!"]
    separate = [raw.encode(word, add_special_tokens=False) for word in words]
    together = raw.encode(" ".join(words), add_special_tokens=False)
    assert together.ids == [index for encoding in separate for index in encoding.ids]
    assert sum(token.startswith("▁") for token in together.tokens) == len(words)
    assert all(encoding.tokens[0].startswith("▁") for encoding in separate)


def test_trained_tokenizer_wraps_pairs(tokenizer):
    words = (
        tokenizer("мама", add_special_tokens=False)["input_ids"],
        tokenizer("ёж", add_special_tokens=False)["input_ids"],
    )
    pair = tokenizer("мама", "ёж")
    assert pair["input_ids"] == [2, *words[0], 3, *words[1], 3]
    assert pair["token_type_ids"] == [0] * (len(words[0]) + 2) + [1] * (len(words[1]) + 1)


def test_train_tokenizer_is_deterministic(corpus, trained, tmp_path):
    run("--sources", corpus, "--vocab_size", 400, "--output", tmp_path / "again")
    for path in trained.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_train_tokenizer_weights_words_by_their_count():
    counts = training.count_words(invent_documents())
    plain = dict(training.train_pieces(counts, 400))
    weighted = dict(training.train_pieces(counts + training.Counter({"ЕЗД": 10_000}), 400))
    assert weighted["▁ЕЗД"] > plain["▁ЕЗД"] + 1  # log probabilities


def test_train_tokenizer_replaces_an_older_tokenizer_only(corpus, tmp_path):
    output = tmp_path / "tokenizer"
    for size in (400, 300):
        run("--sources", corpus, "--vocab_size", size, "--output", output)
        assert len(load_tokenizer(output)) == size
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]
    (output / "weights.pth").write_text("precious")
    with pytest.raises(ValueError, match=r"holds other files \(weights.pth\)"):
        run("--sources", corpus, "--vocab_size", 300, "--output", output)


def test_train_tokenizer_leaves_the_older_tokenizer_when_it_fails(corpus, tmp_path, monkeypatch):
    run("--sources", corpus, "--vocab_size", 300, "--output", tmp_path / "tokenizer")
    monkeypatch.setattr(training.json, "dumps", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        run("--sources", corpus, "--vocab_size", 400, "--output", tmp_path / "tokenizer")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]
    assert len(load_tokenizer(tmp_path / "tokenizer")) == 300


def test_train_tokenizer_measures_held_out_documents(corpus, tmp_path, capsys):
    (tmp_path / "other.jsonl").write_text('{"text": "мама 日本"}\n{"text": "мыла 日"}', encoding="utf-8")
    run("--sources", corpus, "--vocab_size", 400, "--output", tmp_path / "a", "--held_out", tmp_path / "other.jsonl")
    output = capsys.readouterr().out
    tokens = [load_tokenizer(tmp_path / "a").tokenize(text) for text in ("мама 日本", "мыла 日")]
    num_tokens = sum(map(len, tokens))
    assert f"400 pieces from {sum(len(text.split()) for text in invent_documents())} words" in output
    assert f"2 held-out documents: {2 / num_tokens:.4%} unknown tokens, {(7 + 6) / num_tokens:.3f} characters" in output


def test_train_tokenizer_does_not_train_on_what_it_holds_out():
    held_out = []
    kept = list(training.hold_out(map(str, range(100)), held_out))
    assert held_out == ["1", "21", "41", "61", "81"]
    assert sorted(kept + held_out, key=int) == [str(number) for number in range(100)]


@pytest.mark.parametrize(
    ("text", "size", "message"),
    [
        ("мама мыла\n\nраму", 8000, r"--vocab_size 8000: a text of 2 different words gives at most \d+ pieces"),
        ("мама мыла\n\nраму", 50, r"--vocab_size 50: the single characters .* need more than \d+ pieces"),
        ("мама мыла\n\nраму", 0, "--vocab_size 0 is not a positive number"),
        ("мама мыла", 200, "a single document, none is left to measure on; give --held_out"),
        ("\u200b\n\n\u200b", 200, "the text to train on is empty"),
    ],
)
def test_train_tokenizer_explains_texts_that_do_not_do(tmp_path, text, size, message):
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        run("--sources", tmp_path / "text.txt", "--vocab_size", size, "--output", tmp_path / "tokenizer")
    assert not (tmp_path / "tokenizer").exists()


def test_train_tokenizer_at_most_so_many_pieces_is_exact(tmp_path):
    counts = training.count_words(["мама мыла раму"] * 3)
    with pytest.raises(ValueError, match="at most") as error:
        training.train_pieces(counts, 8000)
    most = int(re.search(r"at most (\d+)", str(error.value))[1])
    assert len(training.train_pieces(counts, most)) == most


@pytest.mark.parametrize(("content", "message"), [(None, "no such file"), ("", "holds no text")])
def test_train_tokenizer_script_ends_with_one_line_and_code_2(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_text(content)
    command = [sys.executable, "-m", "tasks.mlm.train_tokenizer", "--sources", path, "--vocab_size", "300"]
    result = subprocess.run([*command, "--output", tmp_path / "out"], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 2
    assert re.fullmatch(rf"error: .*text\.txt.*{message}.*\n", result.stderr)


def test_trained_tokenizer_rarely_meets_unknown_tokens_in_prose(tmp_path, shared_data_dir):
    folder = shared_data_dir / "corpus_ru"
    with gzip.open(folder / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        documents = [json.loads(line)["text"] for number, line in enumerate(lines) if number % 30 == 0]
    with gzip.open(folder / "valid.jsonl.gz", "rt", encoding="utf-8") as lines:
        held_out = [json.loads(line)["text"] for line in lines]
    tokenizer = training.build_tokenizer(training.train_pieces(training.count_words(documents), 2000))
    figures = training.measure(tokenizer, held_out)
    assert tokenizer.get_vocab_size() == 2000
    assert figures["unknown_share"] < 0.001
    assert figures["characters_per_token"] > 2.4
    frequent = [word for word, _ in training.count_words(documents).most_common(20) if word.isalpha()]
    assert {"▁" + word for word in frequent} <= set(tokenizer.get_vocab())
