"""TERRa, RCB, LiDiRus, DaNetQA and PARus on invented records."""

import json

import numpy as np
import pytest

from tasks.registry import TASKS


def decode(tokenizer, ids):
    return tokenizer.decode(np.asarray(ids))


def submitted(task, records, predictions, tmp_path):
    path = task.write_submission(tmp_path, records, predictions)
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("RCB", ["entailment", "contradiction", "neutral"]),
        ("TERRa", ["entailment", "not_entailment"]),
        ("LiDiRus", ["entailment", "not_entailment"]),
        ("DaNetQA", ["false", "true"]),
        ("RUSSE", ["false", "true"]),
        ("RWSD", ["False", "True"]),
        ("PARus", [0, 1]),
    ],
)
def test_submission_lines_have_the_leaderboards_labels(name, labels, tmp_path):
    records = [{"idx": 10 + number} for number in range(len(labels))]
    lines = submitted(TASKS[name.lower()], records, list(range(len(labels))), tmp_path)
    assert lines == [{"idx": 10 + number, "label": label} for number, label in enumerate(labels)]


def test_predictions_are_positions_of_the_largest_logit(data_dir, tiny_tokenizer):
    task = TASKS["rcb"]
    records = task.load(data_dir)["test"]
    encoded = task.encode_split(records, tiny_tokenizer, max_length=64, training=False)
    logits = [np.array(row) for row in ([0.1, 2, 1], [3, 2, 1], [-5, -4, -3])]
    assert task.predict(logits, encoded, records) == [1, 0, 2]


def test_rcb_score_is_the_mean_of_macro_f1_and_accuracy():
    records = [{"label": label} for label in (0, 1, 1, 2)]
    scores = TASKS["rcb"].score([0, 1, 0, 0], records)
    # F1: class 0 2*(1/3)/(1/3+1) = 1/2, class 1 2/3, class 2 0
    assert scores == pytest.approx({"macro_f1": 7 / 18, "accuracy": 0.5, "score": (7 / 18 + 0.5) / 2})


@pytest.mark.parametrize(
    ("name", "kept", "cut"),
    [("terra", "hypothesis", "premise"), ("rcb", "hypothesis", "premise"), ("danetqa", "question", "passage")],
)
def test_the_long_text_of_a_pair_is_cut_and_the_other_kept_whole(name, kept, cut, tiny_tokenizer):
    record = {kept: "Мышь поймали в лесу у реки?", cut: "Лиса поймала мышь. " * 20, "label": 1}
    max_length = len(tiny_tokenizer(record[kept])["input_ids"]) + 6
    row = TASKS[name].encode_split([record], tiny_tokenizer, max_length=max_length, training=True).rows[0]
    assert len(row["input_ids"]) == max_length
    assert record[kept] in decode(tiny_tokenizer, row["input_ids"])
    assert row["labels"] == 1
    second = decode(tiny_tokenizer, row["input_ids"][row["token_type_ids"] == 1])
    assert (record[kept] in second) == (kept == "hypothesis")


def test_lidirus_scores_every_tag_by_itself(data_dir):
    task = TASKS["lidirus"]
    records = task.load(data_dir)["test"]
    assert records[1]["tags"] == {"logic": ["Universal", "Negation"]}
    assert [record["idx"] for record in records] == [0, 1, 2]
    assert [record["label"] for record in records] == [1, 0, 1]
    scores = task.score([1, 0, 0], records)
    assert scores["mcc"] == pytest.approx(0.5)  # tp 1 tn 1 fp 0 fn 1: 1 / sqrt(1 * 2 * 1 * 2)
    assert scores["mcc/logic"] == scores["mcc/logic/Negation"] == 1
    assert scores["mcc/knowledge"] == scores["mcc/knowledge/World knowledge"] == scores["mcc/logic/Universal"] == 0
    assert len(scores) == 6


def test_lidirus_reads_records_as_the_terra_model_does(tiny_tokenizer):
    record = {"premise": "Кот спит.", "hypothesis": "Кот не спит.", "label": 1}
    rows = [
        TASKS[name].encode_split([record], tiny_tokenizer, max_length=32, training=False).rows[0]
        for name in ("terra", "lidirus")
    ]
    assert rows[0]["input_ids"].tolist() == rows[1]["input_ids"].tolist()
    assert TASKS["lidirus"].labels == TASKS["terra"].labels
    assert TASKS["lidirus"].trained_on == "TERRa"


def test_parus_row_holds_both_choices_with_the_right_conjunction(data_dir, tiny_tokenizer):
    task = TASKS["parus"]
    records = task.load(data_dir)["train"]
    encoded = task.encode_split(records, tiny_tokenizer, max_length=64, training=True)
    assert encoded.owners == [0, 1]
    texts = [[decode(tiny_tokenizer, ids) for ids in row["input_ids"]] for row in encoded.rows]
    for row, record in zip(texts, records, strict=True):
        conjunction = {"cause": "потому что", "effect": "поэтому"}[record["question"]]
        for text, choice in zip(row, record["choices"], strict=True):
            assert record["premise"] in text
            assert f"{conjunction} {choice}" in text
    assert [row["labels"] for row in encoded.rows] == [0, 1]
    batch = task.collator(tiny_tokenizer)(encoded.rows)
    assert batch["input_ids"].shape[:2] == (2, 2)


def test_parus_baseline_targets_mark_the_right_choice():
    assert TASKS["parus"].baseline_targets({"choices": ["a", "b"], "label": 1}) == [0, 1]
