import json
import random

import pytest

from tasks.registry import TASKS

TASK = TASKS["muserc"]


@pytest.fixture
def splits(data_dir):
    return TASK.load(data_dir)


def test_records_are_single_answers_in_the_order_of_the_file(splits):
    ids = [(r["passage_idx"], r["question_idx"], r["answer_idx"]) for r in splits["train"]]
    assert ids == [
        (0, 0, 0),
        (0, 0, 1),
        (0, 0, 2),
        (0, 1, 3),
        (0, 1, 4),
        (1, 2, 5),
        (1, 2, 6),
        (1, 2, 7),
        (1, 3, 8),
        (1, 3, 9),
    ]
    assert [r["label"] for r in splits["train"]] == [1, 0, 1, 0, 1] * 2


def test_question_and_answer_are_joined_by_a_space_and_survive_truncation(splits, tiny_tokenizer):
    encoded = TASK.encode_split(splits["train"][:1], tiny_tokenizer, max_length=20, training=True)
    text = tiny_tokenizer.decode(encoded.rows[0]["input_ids"])
    assert "Что сторожил пёс? Лодки." in text
    assert "любил рыбаков" not in text


def test_scores_group_by_question_and_not_by_passage(splits):
    predictions = [record["label"] for record in splits["train"]]
    predictions[0] = 0  # one answer of the first of four questions
    scores = TASK.score(predictions, splits["train"])
    assert scores["em"] == pytest.approx(3 / 4)
    assert scores["f1a"] == pytest.approx(2 * 5 / (5 + 6))
    assert scores["score"] == pytest.approx((scores["em"] + scores["f1a"]) / 2)


def test_submission_has_the_nesting_of_the_test_file(splits, tmp_path):
    predictions = [1, 0, 0, 1, 0, 0, 0, 1, 1, 1]
    path = TASK.write_submission(tmp_path, splits["test"], predictions)
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first == {
        "idx": 0,
        "passage": {
            "questions": [
                {"idx": 0, "answers": [{"idx": 0, "label": 1}, {"idx": 1, "label": 0}, {"idx": 2, "label": 0}]},
                {"idx": 1, "answers": [{"idx": 3, "label": 1}, {"idx": 4, "label": 0}]},
            ]
        },
    }
    assert second["passage"]["questions"][1] == {"idx": 3, "answers": [{"idx": 8, "label": 1}, {"idx": 9, "label": 1}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["questions"][0]["answers"][0].update(label=True), ":2: unknown label true"),
        (lambda p: p["questions"][0]["answers"][0].update(label="1"), ':2: unknown label "1"'),
        (lambda p: p["questions"][0]["answers"][0].update(idx=0), r":2: \[passage, question, answer\] .* is not among"),
        (lambda p: p["questions"][0]["answers"].pop(), r"ends without \[passage, question, answer\]"),
        (lambda p: p["questions"][0]["answers"].append({"idx": 5, "label": 0}), r":2: duplicate \[passage, question"),
        (lambda p: p["questions"].pop(), r"ends without \[passage, question, answer\]"),
        (lambda p: p.pop("questions"), ":2: missing field 'questions'"),
    ],
)
def test_wrong_submission_is_refused_with_its_line(splits, tmp_path, change, message):
    path = TASK.write_submission(tmp_path, splits["test"], [0] * 10)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    change(entries[1]["passage"])
    path.write_text("\n".join(map(json.dumps, entries)))
    with pytest.raises(ValueError, match=message):
        TASK.check_submission(path, splits["test"])


def test_official_numbers_are_wanted_without_the_test_file(tmp_path):
    """322 passages and 7614 answers."""
    answers = [[] for _ in range(322)]
    for number in range(7614):
        answers[number % 322].append({"idx": number, "label": 0})
    lines = [{"idx": n, "passage": {"questions": [{"idx": n, "answers": a}]}} for n, a in enumerate(answers)]
    path = tmp_path / "MuSeRC.jsonl"
    random.Random(0).shuffle(lines)
    path.write_text("\n".join(map(json.dumps, lines)))
    TASK.check_submission(path)
    lines[0]["passage"]["questions"][0]["answers"].pop()
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=r"MuSeRC\.jsonl:322: 7613 answers, expected 7614"):
        TASK.check_submission(path)
