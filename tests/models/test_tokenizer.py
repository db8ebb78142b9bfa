"""load_tokenizer: exactly the pipeline of the files, whatever transformers would make of them."""

import gzip
import json
import random
from pathlib import Path

import pytest
import sentencepiece
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AlbertForSequenceClassification,
    BertTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from src.models import tokenizer as tokenizer_module
from src.models.tokenizer import load_tokenizer, raw_tokenizer

SPECIAL = ["[CLS]", "[SEP]", "<unk>", "<pad>", "[MASK]"]  # an order of its own: ids must come from the files
WORDS = ["▁мама", "▁мыла", "▁раму", "▁Мама", "▁МЫЛА", "▁ёж", "▁еж", "▁й", "▁и", "ё", "й", "Й", "Ё", "▁", ".", "!"]
LETTERS = [chr(code) for code in range(0x430, 0x450) if chr(code) not in "й"] + list("МАЫЛabc🎉")
SAMPLES = [
    "",
    " ",
    "мама мыла раму.",
    "Мама МЫЛА раму!",
    "ёж и еж, йод и Йод, ЁЖ",
    "и\u0306 е\u0308",
    "мама\n\nмыла\tраму\r\n",
    "🎉👨‍👩‍👧 мама🎉",
    "мама [MASK] раму[MASK].",
    "<pad> [CLS] текст",
    "▁мама▁▁мыла",
    "аб" * 20_000,
    "мама мыла " * 3000,
]
PARAGRAPHS = [
    "Мама мыла раму, а папа читал газету. Ёжик пил чай с йодом!",
    "Всё это — «старая» история… Ещё йогурт; ПОЕЗД ушёл в 12:30.",
    "Над рекой стоял туман, и лодка медленно плыла к другому берегу.",
]


def build_pipeline() -> Tokenizer:
    pieces = [(token, 0.0) for token in SPECIAL]
    pieces += [(word, -3.0 - 0.1 * number) for number, word in enumerate(WORDS)]
    pieces += [(letter, -8.0 - 1 / (3 + number)) for number, letter in enumerate(LETTERS)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 0), ("[SEP]", 1)],
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, lstrip=token == "[MASK]", normalized=False, special=True) for token in SPECIAL]
    )
    return tokenizer


def write_directory(directory: Path, tokenizer: Tokenizer) -> Path:
    """The three files of the published tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    mask = {"content": "[MASK]", "lstrip": True, "normalized": False, "rstrip": False, "single_word": False}
    roles = {"bos_token": "[CLS]", "cls_token": "[CLS]", "eos_token": "[SEP]", "sep_token": "[SEP]"}
    roles |= {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": mask}
    (directory / "special_tokens_map.json").write_text(json.dumps(roles))
    (directory / "config.json").write_text(json.dumps({"model_type": "albert", "vocab_size": 100}))
    return directory


@pytest.fixture
def directory(tmp_path) -> Path:
    return write_directory(tmp_path / "published", build_pipeline())


def invent_sentences() -> list[str]:
    """Text of invented words with common syllables, enough for a few hundred pieces."""
    generator = random.Random(0)
    syllables = ["ма", "мы", "ла", "ра", "му", "чит", "ёж", "йо", "од", "га", "зе", "ту", "По", "ЕЗД", "ре", "ко", "й"]
    words = ["".join(generator.choices(syllables, k=generator.randint(1, 3))) for _ in range(300)]
    sentences = [" ".join(generator.choices(words, k=8)) + "." for _ in range(200)]
    return PARAGRAPHS + sentences + ["мама мыла " + sentence for sentence in sentences[:50]]


def train_sentencepiece(directory: Path, sentences=None, **options) -> sentencepiece.SentencePieceProcessor:
    directory.mkdir(parents=True, exist_ok=True)
    options = {"vocab_size": 150, "control_symbols": ["[CLS]", "[SEP]", "[MASK]"]} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences or invent_sentences()),
        model_prefix=str(directory / "spiece"),
        pad_id=0,
        unk_id=1,
        bos_id=-1,
        eos_id=-1,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(directory / "spiece.model"))


def spell(tokenizer, text: str) -> list[int]:
    return raw_tokenizer(tokenizer).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", SAMPLES, ids=range(len(SAMPLES)))
def test_load_tokenizer_gives_the_ids_of_tokenizer_json(directory, text):
    expected = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer = load_tokenizer(directory)
    assert tokenizer(text)["input_ids"] == expected.encode(text).ids
    assert tokenizer(text, "мама")["input_ids"] == expected.encode(text, "мама").ids
    assert tokenizer([text])["input_ids"] == [expected.encode(text).ids]
    assert raw_tokenizer(tokenizer).encode(text).ids == expected.encode(text).ids


def test_load_tokenizer_keeps_case_and_composed_letters(directory):
    tokenizer = load_tokenizer(directory)
    assert tokenizer.unk_token_id not in tokenizer("Мама МЫЛА ёж еж й и Й Ё")["input_ids"]
    assert tokenizer("ёж й")["input_ids"] != tokenizer("еж и")["input_ids"]
    assert tokenizer("Мама")["input_ids"] != tokenizer("мама")["input_ids"]
    assert tokenizer.decode(tokenizer("Мама МЫЛА ёж й")["input_ids"], skip_special_tokens=True) == "Мама МЫЛА ёж й"


def test_load_tokenizer_sets_the_special_tokens(directory):
    tokenizer = load_tokenizer(directory)
    assert sorted(tokenizer.all_special_tokens) == sorted(SPECIAL)
    ids = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id)
    assert (*ids, tokenizer.mask_token_id) == (0, 1, 2, 3, 4)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.added_tokens_decoder[4].lstrip and not tokenizer.added_tokens_decoder[0].lstrip
    assert len(tokenizer) == len(SPECIAL) + len(WORDS) + len(LETTERS)


def test_load_tokenizer_returns_token_type_ids(directory):
    tokenizer = load_tokenizer(directory)
    assert tokenizer("мама мыла")["token_type_ids"] == [0, 0, 0, 0]
    assert tokenizer("мама мыла", "раму")["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    padded = tokenizer(["мама мыла", "раму"], padding=True, return_tensors="pt")
    assert padded["token_type_ids"].shape == padded["input_ids"].shape == (2, 4)
    assert padded["input_ids"][1, -1] == 3 and padded["attention_mask"][1].tolist() == [1, 1, 1, 0]


def test_load_tokenizer_takes_only_the_directory_without_special_tokens_map(directory):
    (directory / "special_tokens_map.json").unlink()
    (directory / "config.json").unlink()
    tokenizer = load_tokenizer(str(directory))
    assert (tokenizer.mask_token_id, tokenizer.pad_token_id) == (4, 3)
    assert tokenizer.added_tokens_decoder[4].lstrip


def test_load_tokenizer_reads_what_it_saved(directory, tmp_path):
    tokenizer = load_tokenizer(directory)
    tokenizer("мама", padding="max_length", truncation=True, max_length=8)
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    for text in SAMPLES:
        assert loaded(text, "мама") == tokenizer(text, "мама")
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.added_tokens_decoder == tokenizer.added_tokens_decoder


@pytest.mark.parametrize("name", ["AlbertTokenizer", "AlbertTokenizerFast"])
def test_load_tokenizer_keeps_the_pipeline_when_the_class_is_albert(directory, name):
    settings = {"tokenizer_class": name, "do_lower_case": True, "keep_accents": False, "model_max_length": 512}
    settings |= {"model_input_names": ["input_ids", "attention_mask"]}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(directory)
    expected = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer("Ёж МЫЛА й")["input_ids"] == expected.encode("Ёж МЫЛА й").ids
    assert "token_type_ids" in tokenizer("мама")
    assert tokenizer.model_max_length == 512


def test_load_tokenizer_leaves_other_families_to_auto_tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "мама", "##м"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, BertTokenizer)
    assert tokenizer("мамам")["input_ids"] == [2, 5, 6, 3]


def test_load_tokenizer_finds_the_tokenizer_folder_of_a_repository(directory, tmp_path):
    write_directory(tmp_path / "repository" / "tokenizer", build_pipeline())
    (tmp_path / "repository" / "config.json").write_text("{}")
    assert load_tokenizer(tmp_path / "repository").mask_token_id == 4


def test_load_tokenizer_downloads_only_tokenizer_files(directory, monkeypatch):
    calls = []
    monkeypatch.setattr(
        tokenizer_module, "snapshot_download", lambda name, **rest: calls.append((name, rest)) or directory
    )
    assert load_tokenizer("somebody/some-model").mask_token_id == 4
    ((name, rest),) = calls
    assert name == "somebody/some-model"
    assert {"tokenizer.json", "tokenizer/tokenizer.json", "spiece.model"} <= set(rest["allow_patterns"])
    assert not any("*" in pattern or pattern.endswith((".bin", ".safetensors")) for pattern in rest["allow_patterns"])


def test_load_tokenizer_does_not_use_padding_or_truncation_of_the_file(directory):
    stored = build_pipeline()
    stored.enable_padding(length=50, pad_id=3, pad_token="<pad>")
    stored.enable_truncation(3)
    stored.save(str(directory / "tokenizer.json"))
    tokenizer = load_tokenizer(directory)
    assert tokenizer.backend_tokenizer.padding is None and tokenizer.backend_tokenizer.truncation is None
    assert len(tokenizer("мама мыла раму")["input_ids"]) == 5


def test_load_tokenizer_warns_without_post_processor_and_adds_nothing(directory, caplog):
    content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    content["post_processor"] = None
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    tokenizer = load_tokenizer(directory)
    expected = Tokenizer.from_file(str(directory / "tokenizer.json")).encode("мама мыла", "раму")
    assert tokenizer("мама мыла", "раму")["input_ids"] == expected.ids
    assert "no post_processor" in caplog.text


def test_load_tokenizer_warns_about_a_special_token_that_is_an_ordinary_piece(directory, caplog):
    content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "[MASK]"]
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    tokenizer = load_tokenizer(directory)
    assert "[MASK]" in caplog.text
    assert tokenizer("мама [MASK]")["input_ids"] == [0, 5, 4, 1]
    assert tokenizer.added_tokens_decoder[4].lstrip


def test_raw_tokenizer_is_not_affected_by_later_calls(directory):
    tokenizer = load_tokenizer(directory)
    tokenizer(["мама", "мама мыла раму"], padding="max_length", truncation=True, max_length=4)
    raw = raw_tokenizer(tokenizer)
    assert [len(encoding.ids) for encoding in raw.encode_batch(["мама", "мама мыла раму"])] == [3, 5]
    tokenizer(["мама", "мама мыла раму"], padding="max_length", truncation=True, max_length=4)
    assert [len(encoding.ids) for encoding in raw.encode_batch(["мама", "мама мыла раму"])] == [3, 5]
    assert tokenizer.backend_tokenizer.padding is not None  # the trap: still on in the shared object


def test_tokenizer_works_in_a_fill_mask_pipeline(directory):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "embedding_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    tokenizer = load_tokenizer(directory)
    model = AlbertForMaskedLM(AlbertConfig(vocab_size=len(tokenizer), num_hidden_layers=1, **sizes)).eval()
    answers = pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")("Мама мыла [MASK].", top_k=3)
    assert len(answers) == 3
    assert all(answer["sequence"].startswith("Мама мыла") for answer in answers)


def test_tokenizer_serves_as_processing_class_of_a_trainer(directory, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "embedding_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    tokenizer = load_tokenizer(directory)
    model = AlbertForSequenceClassification(AlbertConfig(vocab_size=len(tokenizer), num_hidden_layers=1, **sizes))
    examples = [dict(tokenizer(text), labels=0) for text in ("мама", "мама мыла раму", "ёж")]
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=3, use_cpu=True, report_to="none", save_steps=1
    )
    Trainer(model, arguments, train_dataset=examples, processing_class=tokenizer).train()
    saved = load_tokenizer(tmp_path / "run" / "checkpoint-1")
    assert saved("мама ёж")["input_ids"] == tokenizer("мама ёж")["input_ids"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalization_rule_name": "identity"},
        {"normalization_rule_name": "nmt_nfkc_cf"},
        {"remove_extra_whitespaces": False},
        {"add_dummy_prefix": False},
        {"split_by_whitespace": False},
        {"user_defined_symbols": ["чит", "аё"]},
        {"user_defined_symbols": ["№", "…", "ﬁ", "№…", "дом №", "Й", "²я"]},
        {"user_defined_symbols": ["№", "Ём", "..."], "normalization_rule_name": "nmt_nfkc_cf"},
        {"user_defined_symbols": ["№", "  "], "remove_extra_whitespaces": False},
        {"byte_fallback": True, "vocab_size": 400},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_sentencepiece_model_gives_the_ids_of_sentencepiece(tmp_path, options):
    expected = train_sentencepiece(tmp_path, **options)
    raw = raw_tokenizer(load_tokenizer(tmp_path))
    generator = random.Random(0)
    alphabet = [
        *"абвёйЁЙМам  .,—«»№…²ﬁя",
        "и\u0306",
        "е\u0308",
        "чит",
        "аё",
        "и\u0306\u0301",
        "мама мыла ",
        "▁",
        "🎉",
        "\n",
        "日",
        "\u00a0",
        "раму",
        "дом №",
        "№ ",
    ]
    texts = ["".join(generator.choices(alphabet, k=generator.randint(0, 12))) for _ in range(500)]
    for text in ["", "  ", *PARAGRAPHS, *texts]:
        ids, pieces = raw.encode(text, add_special_tokens=False).ids, expected.encode(text)
        assert ids == pieces or is_equally_good(expected, ids, pieces), text


def is_equally_good(model, ids: list[int], pieces: list[int]) -> bool:
    """Two spellings of one text whose scores sentencepiece, in single precision, cannot tell apart."""
    same_text = "".join(map(model.id_to_piece, ids)) == "".join(map(model.id_to_piece, pieces))
    return same_text and abs(sum(map(model.get_score, ids)) - sum(map(model.get_score, pieces))) < 1e-3


def test_sentencepiece_model_keeps_every_bit_of_its_scores(tmp_path):
    model = train_sentencepiece(tmp_path, vocab_size=220)
    tokenizer = load_tokenizer(tmp_path)
    expected = [[model.id_to_piece(index), model.get_score(index)] for index in range(len(model))]
    for backend in (tokenizer.backend_tokenizer, raw_tokenizer(tokenizer)):
        assert json.loads(backend.to_str())["model"]["vocab"] == expected


def test_sentencepiece_model_gets_albert_special_tokens_and_template(tmp_path):
    train_sentencepiece(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id) == (
        0,
        1,
        2,
        3,
    )
    encoded = tokenizer("Мама [MASK]", "раму")
    assert encoded["input_ids"] == [2, *spell(tokenizer, "Мама"), 4, 3, *spell(tokenizer, "раму"), 3]
    first = len(spell(tokenizer, "Мама")) + 3
    assert encoded["token_type_ids"] == [0] * first + [1] * (len(encoded["input_ids"]) - first)
    assert tokenizer.added_tokens_decoder[4].lstrip


def test_sentencepiece_model_lower_cases_only_when_told_to(tmp_path, caplog):
    expected = train_sentencepiece(tmp_path)
    text = "Мама ПОЕЗД Ёжик ЙОД"
    for settings in (None, {}, {"tokenizer_class": "AlbertTokenizer"}, {"do_lower_case": False, "keep_accents": True}):
        if settings is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        assert spell(load_tokenizer(tmp_path), text) == expected.encode(text)
    assert not caplog.records
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    assert spell(load_tokenizer(tmp_path), text) == expected.encode(text.lower())
    assert "do_lower_case=True" in caplog.text


def test_sentencepiece_model_survives_save_pretrained(tmp_path):
    expected = train_sentencepiece(tmp_path / "model")
    load_tokenizer(tmp_path / "model").save_pretrained(tmp_path / "saved")
    for text in PARAGRAPHS:
        assert spell(load_tokenizer(tmp_path / "saved"), text) == expected.encode(text)


@pytest.mark.parametrize("path", ["/no/such/place", "./place", "~/no-such-place", "place/with/parts", Path("place")])
def test_load_tokenizer_names_a_missing_path(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no such directory; pass a directory that holds") as error:
        load_tokenizer(path)
    assert repr(str(path)) in str(error.value)


def test_load_tokenizer_takes_a_path_with_a_typing_error_for_a_path(monkeypatch, tmp_path):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokenizer_module, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match="demo/tokeniser"):
        load_tokenizer("demo/tokeniser")


def test_load_tokenizer_explains_a_failed_download(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network\nand more lines")

    monkeypatch.setattr(tokenizer_module, "snapshot_download", refuse)
    with pytest.raises(
        ValueError, match=r"'somebody/gone'.*no such directory.*no network\); look at the network.* pass"
    ) as error:
        load_tokenizer("somebody/gone")
    assert "\n" not in str(error.value)


def test_load_tokenizer_says_what_it_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"looked for tokenizer\.json, spiece\.model") as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is a file; pass the directory"):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("name", ["tokenizer.json", "special_tokens_map.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ['{"version": ', "[]"])
def test_load_tokenizer_names_a_damaged_file(directory, name, content):
    (directory / name).write_text(content)
    with pytest.raises(ValueError, match=name) as error:
        load_tokenizer(directory)
    assert str(directory) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not a model"])
def test_load_tokenizer_names_a_damaged_sentencepiece_model(tmp_path, content):
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"spiece\.model is not a sentencepiece model"):
        load_tokenizer(tmp_path)


def test_load_tokenizer_refuses_sentencepiece_models_it_cannot_follow(tmp_path):
    train_sentencepiece(tmp_path / "bpe", model_type="bpe")
    with pytest.raises(ValueError, match="is not a Unigram model"):
        load_tokenizer(tmp_path / "bpe")
    train_sentencepiece(tmp_path / "bare", control_symbols=[])
    with pytest.raises(ValueError, match=r"has no \[CLS\] and \[SEP\]"):
        load_tokenizer(tmp_path / "bare")


def test_load_tokenizer_refuses_a_special_token_without_id(directory):
    roles = json.loads((directory / "special_tokens_map.json").read_text())
    (directory / "special_tokens_map.json").write_text(json.dumps(roles | {"mask_token": "<mask>"}))
    with pytest.raises(ValueError, match="mask_token is '<mask>'"):
        load_tokenizer(directory)


def test_sentencepiece_model_gives_the_ids_of_sentencepiece_on_prose(tmp_path, shared_data_dir):
    with gzip.open(shared_data_dir / "corpus_ru" / "valid.jsonl.gz", "rt", encoding="utf-8") as lines:
        paragraphs = [line for record in lines for line in json.loads(record)["text"].split("\n")]
    expected = train_sentencepiece(tmp_path, [text[:1000] for text in paragraphs[:1500]], vocab_size=2000)
    raw = raw_tokenizer(load_tokenizer(tmp_path))
    different = 0
    for text in paragraphs:
        ids, pieces = raw.encode(text, add_special_tokens=False).ids, expected.encode(text)
        if ids != pieces:
            different += 1
            assert is_equally_good(expected, ids, pieces), text
    assert different <= len(paragraphs) / 1000
