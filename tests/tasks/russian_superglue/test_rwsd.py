import pytest

from tasks.registry import TASKS
from tasks.russian_superglue.rwsd import words_span

TASK = TASKS["rwsd"]


@pytest.mark.parametrize(
    ("text", "part", "index", "expected"),
    [
        ("Чемодан не влез, он был велик.", "он был", 3, "он был"),
        ("Чемодан не влез, он был велик.", "Чемодан", 0, "Чемодан"),
        ("Сказал, что он тут. И он там.", "он", 5, "он"),
        ("Он влез, потому что он был мал.", "он был", 1, "он был"),  # wrong index: looked for
        ("Грузовик приехал раньше автобуса", "автобус", 2, "автобуса"),  # in another form
        ("Стол стоял", "Стол ", 0, "Стол"),
        ("Мод и Дора ушли", "Нет такого", 2, "Дора ушли"),
        ("Один", "два", 99, "Один"),
    ],
)
def test_words_span_covers_the_part(text, part, index, expected):
    assert text[slice(*words_span(text, part, index))] == expected


def test_words_span_prefers_the_word_at_the_index():
    text = "он знал, что он прав"
    assert words_span(text, "он", 3) == (13, 15)
    assert words_span(text, "он", 0) == (0, 2)


def test_masks_decode_to_noun_and_pronoun(data_dir, tiny_tokenizer):
    records = TASK.load(data_dir)["train"]
    encoded = TASK.encode_split(records, tiny_tokenizer, max_length=64, training=True)
    words = [
        [tiny_tokenizer.decode(row["input_ids"][row[name] == 1]).strip() for name in ("e1_mask", "e2_mask")]
        for row in encoded.rows
    ]
    assert words == [["Чемодан", "он был"], ["шкаф", "он был"]]
    assert [row["labels"] for row in encoded.rows] == [1, 0]


def test_real_spans_are_the_annotated_texts(shared_data_dir):
    records = [record for split in TASK.load(shared_data_dir).values() for record in split]
    right = [
        record["text"][slice(*span)].lower() == part.strip().lower()
        for record in records
        for part, span in zip(record["parts"], record["spans"], strict=True)
    ]
    assert sum(right) / len(right) >= 0.99


def test_majority_may_replace_the_model():
    assert TASK.majority_if_better
