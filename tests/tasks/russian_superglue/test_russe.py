from collections import Counter

import pytest

from tasks.finetuning.spans import is_form_of
from tasks.registry import TASKS

TASK = TASKS["russe"]


def masked_words(tokenizer, row):
    return [tokenizer.decode(row["input_ids"][row[name] == 1]).strip() for name in ("e1_mask", "e2_mask")]


def test_spans_follow_the_conventions_of_the_splits(data_dir):
    """The end is one past an exclusive one in train and val, inclusive in test."""
    for records in TASK.load(data_dir).values():
        words = [[s[slice(*span)] for s, span in zip(r["sentences"], r["spans"], strict=True)] for r in records]
        assert words == [["Ключ", "ключ"], ["косы", "косу"]]


def test_masks_decode_to_the_word_in_each_sentence(data_dir, tiny_tokenizer):
    for records in TASK.load(data_dir).values():
        encoded = TASK.encode_split(records, tiny_tokenizer, max_length=64, training=False)
        assert [masked_words(tiny_tokenizer, row) for row in encoded.rows] == [["Ключ", "ключ"], ["косы", "косу"]]
        assert not encoded.report


def test_wrong_span_is_mended_and_a_hopeless_one_counted(tiny_tokenizer):
    record = {
        "word": "ключ",
        "sentences": ["Лежал ключ и замок", "Ничего похожего тут"],
        "spans": [[13, 18], [0, 6]],
        "label": 0,
    }
    encoded = TASK.encode_split([record], tiny_tokenizer, max_length=64, training=True)
    row = encoded.rows[0]
    assert masked_words(tiny_tokenizer, row) == ["ключ", "Ничего похожего тут"]
    assert encoded.report == {"annotated span was elsewhere": 1, "word not found in the sentence": 1}


def test_span_lost_to_truncation_is_counted_and_replaced_by_its_sentence(tiny_tokenizer):
    record = {
        "word": "ключ",
        "sentences": ["Кот спит", "Кот и пёс и лиса и мышь и ключ"],
        "spans": [[0, 3], [26, 30]],
        "label": 1,
    }
    encoded = TASK.encode_split([record], tiny_tokenizer, max_length=16, training=True)
    assert encoded.report["span lost to truncation"] == 1
    row = encoded.rows[0]
    assert row["e2_mask"].sum() == (row["token_type_ids"] == 1).sum() - 1  # all but the last [SEP]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_real_spans_decode_to_the_target_word(split, shared_data_dir, demo_tokenizer):
    """In at least 99 % of all real records the marked tokens of both sentences are a form of the word."""
    records = TASK.load(shared_data_dir)[split]
    encoded = TASK.encode_split(records, demo_tokenizer, max_length=512, training=False)
    outcomes = Counter()
    for record, row in zip(records, encoded.rows, strict=True):
        outcomes[
            all(
                is_form_of(word, record["word"]) and word.lower() in sentence.lower()
                for word, sentence in zip(masked_words(demo_tokenizer, row), record["sentences"], strict=True)
            )
        ] += 1
    assert outcomes[True] / len(records) >= 0.99, outcomes


@pytest.mark.slow
def test_all_real_spans_are_found(shared_data_dir):
    report = Counter()
    records = [record for split in TASK.load(shared_data_dir).values() for record in split]
    for record in records:
        TASK.word_spans(record, report)
    assert report["word not found in the sentence"] == 0
