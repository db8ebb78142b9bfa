import copy
import re

import numpy as np
import pytest

from tasks.registry import TASKS
from tasks.russian_superglue.rucos import answer_text, shorten_query

TASK = TASKS["rucos"]
CANDIDATES = ["Боровска", "Анна Лисицына", "Клинку", "Боровске", "Лисицына"]


@pytest.fixture
def splits(data_dir):
    return TASK.load(data_dir)


def encode(records, tokenizer, max_length=64, training=False):
    return TASK.encode_split(records, tokenizer, max_length=max_length, training=training)


def candidate_texts(record, *, training=False):
    return [answer_text(record["text"], span) for span in TASK.candidates(record, training=training)]


def test_candidates_are_the_entities_of_the_text_also_of_its_highlights(splits):
    for records in splits.values():
        assert candidate_texts(records[0]) == CANDIDATES


def test_gold_answers_become_candidates_in_training_only(splits):
    record = copy.deepcopy(splits["train"][0])
    record["candidates"] = record["candidates"][1:3]
    assert candidate_texts(record) == CANDIDATES[1:3]
    assert candidate_texts(record, training=True) == [*CANDIDATES[1:3], "Боровска", "Боровске"]


def test_spans_are_trimmed_and_a_trimmed_answer_equals_its_entity(official):
    entry = official["RuCoS"]["train"][0]
    text = entry["passage"]["text"].replace("Клинку", "\u200bКлинку ")
    start = text.index("\u200b")
    entry["passage"] = {
        "text": text,
        "entities": [{"start": start, "end": start + 8}, {"start": start + 1, "end": start + 7}],
    }
    entry["qas"][0]["answers"] = [{"start": start, "end": start + 8, "text": "Клинку "}]
    (record,) = TASK.parse(entry, "f:1", split="train")
    assert TASK.candidates(record, training=True) == [(start + 1, start + 7)]
    assert TASK.is_answer(record, (start + 1, start + 7))


@pytest.mark.parametrize("max_length", [32, 64, 512])
def test_every_candidate_is_scored_and_decodes_to_itself(splits, tiny_tokenizer, max_length):
    record = splits["validation"][0]
    encoded = encode([record], tiny_tokenizer, max_length)
    assert len(encoded.rows) > 1 or max_length == 512
    seen = set()
    for row in encoded.rows:
        for number, (first, last) in zip(row["candidates"], row["entity_spans"], strict=True):
            seen.add(number)
            assert tiny_tokenizer.decode(row["input_ids"][first : last + 1]).strip(" .,:") == CANDIDATES[number]
            assert row["labels"][row["candidates"].index(number)] == (CANDIDATES[number] in ("Боровска", "Боровске"))
    assert seen == set(range(len(CANDIDATES)))


def test_every_window_holds_the_query_with_a_mask(splits, tiny_tokenizer):
    for row in encode(splits["test"][:1], tiny_tokenizer).rows:
        text = tiny_tokenizer.decode(row["input_ids"])
        assert re.sub(" ", "", text).startswith("[CLS]Жители[MASK]ждалиновогомоста")


@pytest.mark.parametrize("gap", ["@placeholder", "[MASK]"])
@pytest.mark.parametrize("position", [0, 25, 50])
def test_long_query_keeps_the_surroundings_of_its_gap(tiny_tokenizer, gap, position):
    words = ["слово"] * 50
    words.insert(position, gap)
    short = shorten_query(tiny_tokenizer, " ".join(words), gap=gap, max_tokens=30)
    assert gap in short
    assert 28 <= len(tiny_tokenizer(short, add_special_tokens=False)["input_ids"]) <= 32
    assert shorten_query(tiny_tokenizer, f"мал {gap}", gap=gap, max_tokens=30) == f"мал {gap}"


def test_long_query_leaves_half_of_the_input_to_the_text(splits, tiny_tokenizer):
    record = {**splits["test"][0], "query": "слово " * 200 + "@placeholder" + " слово" * 200}
    for row in encode([record], tiny_tokenizer, 64).rows:
        assert tiny_tokenizer.mask_token_id in row["input_ids"]
    assert len(encode([record], tiny_tokenizer, 64).rows) <= len(encode(splits["test"][:1], tiny_tokenizer, 32).rows)


def test_wrong_candidate_with_the_tokens_of_a_right_one_is_left_out_of_training(splits, tiny_tokenizer):
    record = copy.deepcopy(splits["train"][0])
    start, end = record["candidates"][0]
    record["candidates"] = [[start, end], [start, end - 1], *record["candidates"][1:]]  # "Боровск" within "Боровска"
    (row,) = encode([record], tiny_tokenizer, 512, training=True).rows
    assert row["candidates"] == [0, 2, 3, 4, 5] and row["labels"] == [1, 0, 0, 1, 0]
    (row,) = encode([record], tiny_tokenizer, 512).rows
    assert row["candidates"] == [0, 1, 2, 3, 4, 5] and row["entity_spans"][0] == row["entity_spans"][1]


def test_answer_annotated_elsewhere_is_looked_for(splits):
    record = copy.deepcopy(splits["train"][0])
    record["candidates"] = []
    record["answers"] = [{"span": [0, 3], "text": "Клинку"}, {"span": [0, 3], "text": "нет такого"}]
    assert candidate_texts(record, training=True) == ["Клинку"]


def test_best_mention_over_all_windows_wins_and_padding_is_ignored(splits, tiny_tokenizer):
    records = splits["validation"]
    encoded = encode(records, tiny_tokenizer)
    logits = []
    for row, owner in zip(encoded.rows, encoded.owners, strict=True):
        best = 2 if owner == 0 else 4
        scores = [5.0 if number == best else -20000.0 for number in row["candidates"]]
        logits.append(np.array([*scores, 99.0, 99.0]))  # columns of padding may hold anything
    assert TASK.predict(logits, encoded, records) == ["Клинку", "Лисицына"]


def test_predictions_of_training_rows_may_be_added_answers(splits, tiny_tokenizer):
    record = copy.deepcopy(splits["train"][0])
    record["candidates"] = record["candidates"][1:3]
    encoded = encode([record], tiny_tokenizer, training=True)
    logits = [np.array(row["labels"], dtype=float) for row in encoded.rows]
    assert TASK.predict(logits, encoded, [record])[0] in ("Боровска", "Боровске")


def test_record_without_entities_gets_a_fallback_answer(splits, tiny_tokenizer):
    record = {**splits["test"][0], "candidates": []}
    encoded = encode([record], tiny_tokenizer)
    assert encoded.rows == []
    assert encoded.report["record without candidates"] == 1
    assert TASK.predict([], encoded, [record]) == ["Мэр Боровска Анна Лисицына"]
    assert TASK.choose({**record, "text": ""}, np.array([])) == "?"


def test_scores_compare_texts_of_answers(splits):
    scores = TASK.score(["боровска", "Анна"], splits["validation"])
    assert scores == {"f1": 0.5, "em": 0.5, "score": 0.5}


def test_majority_is_the_entity_mentioned_most_often(splits):
    record = copy.deepcopy(splits["test"][0])
    assert TASK.majority_predictions([], [record]) == ["Боровска"]
    last = record["candidates"][-1]
    record["candidates"].append([last[0] - 0, last[1]])
    assert TASK.majority_predictions([], [record]) == ["Лисицына"]
    assert TASK.majority_predictions([], [{**record, "candidates": []}]) == ["Мэр Боровска Анна Лисицына"]


def test_real_answers_decode_to_their_text(shared_data_dir, demo_tokenizer):
    """All answers of real records are in some window as candidates in training, and their tokens are their text."""
    for split in ("train", "validation"):
        records = TASK.load(shared_data_dir)[split]
        for max_length in (128, 512):
            encoded = encode(records, demo_tokenizer, max_length, training=True)
            for record, rows in zip(records, encoded.rows_of_records(len(records)), strict=True):
                spans = TASK.candidates(record, training=True)
                found = {
                    spans[number]: demo_tokenizer.decode(encoded.rows[i]["input_ids"][first : last + 1]).strip()
                    for i in rows
                    for number, (first, last) in zip(
                        encoded.rows[i]["candidates"], encoded.rows[i]["entity_spans"], strict=True
                    )
                }
                right = [span for span in spans if TASK.is_answer(record, span)]
                for start, end in set(spans) - found.keys():  # only wrong ones that lie upon a right one
                    assert (start, end) not in right and any(start < r[1] and r[0] < end for r in right)
                for answer in record["answers"]:
                    decoded = found[tuple(answer["span"])].replace("<unk>", "")
                    assert answer["text"] in decoded or "<unk>" in found[tuple(answer["span"])], (answer, decoded)
                assert any(label for i in rows for label in encoded.rows[i]["labels"])
