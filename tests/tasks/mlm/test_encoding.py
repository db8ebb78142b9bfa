"""Sentences encoded word by word: the ids are those of the tokenizer, whatever the text and the pipeline."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from src.models.tokenizer import load_tokenizer, raw_tokenizer
from tasks.mlm import encoding
from tasks.mlm.encoding import SentenceEncoder, find_plain_characters, words_are_independent
from tasks.mlm.sentences import split_sentences
from tasks.mlm.sources import DEFAULT_SOURCE, iterate_documents

REPOSITORY = Path(__file__).resolve().parents[3]
METASPACE = {"replacement": "▁", "prepend_scheme": "always", "split": True}
STRANGE = [
    *"\u0301\u0306\u00ad\u200b\ufeff\u00a0\u2003\u3000\u0085\x1f\x1c\x00\t\n▁ЁёЙй№…",
    *(
        "и\u0306",
        "[MASK]",
        "[CLS]",
        "<unk>",
        "<pad>",
        " [MASK] ",
        "``",
        "  ",
        " ",
        " ",
        "ﬁ",
        "ß",
        "İ",
        "𝔄",
        "😀",
        "日本",
    ),
]


@pytest.fixture(scope="module")
def raw() -> Tokenizer:
    return raw_tokenizer(load_tokenizer(REPOSITORY / "demo" / "tokenizer"))


def demo_sentences() -> list[str]:
    return [sentence for document in iterate_documents(DEFAULT_SOURCE) for sentence in split_sentences(document)]


def strange_sentences(count: int) -> list[str]:
    generator, words = random.Random(0), " ".join(demo_sentences()[:300]).split()
    return [
        "".join(generator.choice([generator.choice(STRANGE), generator.choice(words), " "]) for _ in range(12))
        for _ in range(count)
    ]


def encode_whole(tokenizer: Tokenizer, sentences: list[str]) -> list[list[int]]:
    return [each.ids for each in tokenizer.encode_batch(sentences, add_special_tokens=False)]


def assert_equal_ids(tokenizer: Tokenizer, sentences: list[str], *, by_words: bool = True, batch_size: int = 100):
    encoder = SentenceEncoder(tokenizer)
    assert encoder.by_words == by_words
    for start in range(0, len(sentences), batch_size):
        batch = sentences[start : start + batch_size]
        for sentence, ids, expected in zip(batch, encoder.encode(batch), encode_whole(tokenizer, batch), strict=True):
            assert list(ids) == expected, repr(sentence)
    return encoder


def change(tokenizer: Tokenizer, **parts) -> Tokenizer:
    """A copy of the pipeline with other parts."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    for name, part in parts.items():
        setattr(copy, name, part)
    return copy


def test_ids_of_the_demo_text_are_those_of_the_tokenizer(raw):
    encoder = assert_equal_ids(raw, demo_sentences())
    assert len(encoder.known) > 3000


def test_ids_of_real_text_are_those_of_the_tokenizer(raw, shared_data_dir):
    source = str(shared_data_dir / "corpus_ru" / "valid.jsonl.gz")
    documents = list(iterate_documents(source))[:20]
    assert_equal_ids(raw, [sentence for document in documents for sentence in split_sentences(document)])


def test_ids_of_strange_text_are_those_of_the_tokenizer(raw):
    assert_equal_ids(raw, strange_sentences(3000))


@pytest.mark.parametrize(
    "normalizer",
    [
        None,
        normalizers.NFKC(),
        normalizers.Sequence([normalizers.Replace("``", '"'), normalizers.NFKD(), normalizers.StripAccents()]),
        normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(" {2,}"), " ")]),
        normalizers.Sequence([normalizers.Replace("ло", ""), normalizers.Replace(Regex("[аеё]"), " ")]),
    ],
)
def test_ids_are_those_of_the_tokenizer_with_other_normalizers(raw, normalizer):
    assert_equal_ids(change(raw, normalizer=normalizer), strange_sentences(600) + demo_sentences()[:300])


def test_known_words_are_forgotten_when_they_are_many(raw, monkeypatch):
    monkeypatch.setattr(encoding, "MAX_KNOWN_CHARACTERS", 3000)
    encoder = assert_equal_ids(raw, demo_sentences()[:400], batch_size=20)
    assert 0 < encoder.num_characters < 6000 and len(encoder.known) < 1200


@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": pre_tokenizers.Metaspace(**METASPACE)},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])},
        {
            "pre_tokenizer": pre_tokenizers.Sequence(
                [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace("▁", prepend_scheme="first")]
            )
        },
        {"normalizer": normalizers.Replace("а б", "в")},
        {"normalizer": normalizers.Replace(Regex("а.б"), "в")},
        {"normalizer": normalizers.Prepend("▁")},
    ],
)
def test_sentences_are_encoded_whole_where_words_may_depend_on_neighbours(raw, parts):
    assert_equal_ids(change(raw, **parts), [*demo_sentences()[:100], "а б", "а б в"], by_words=False)


def test_special_tokens_with_a_blank_and_dropout_need_whole_sentences(raw):
    with_blank = change(raw)
    with_blank.add_tokens([AddedToken("два слова")])
    assert_equal_ids(with_blank, ["вот два слова тут"], by_words=False)
    pipeline = json.loads(raw.to_str())
    pipeline["model"] = json.loads(Tokenizer(models.BPE(dropout=0.1)).to_str())["model"]
    assert not words_are_independent(pipeline)


def test_plain_characters_are_those_that_nothing_touches(raw):
    plain = find_plain_characters(raw, json.loads(raw.to_str()))
    assert set("АяёЙ09az,.!»—") <= set(plain) and not set("[<▁ \u0301") & set(plain)
    lower = change(raw, normalizer=normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("ло", "л")]))
    plain = find_plain_characters(lower, json.loads(lower.to_str()))
    assert set("яё09az") <= set(plain) and not set("АяZло") & set(plain) - {"я"}
