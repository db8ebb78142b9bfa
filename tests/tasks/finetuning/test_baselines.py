import pytest

from tasks.finetuning.baselines import tfidf_predictions
from tasks.registry import TASKS


@pytest.mark.parametrize("name", [name for name in TASKS if name != "lidirus"])
def test_baselines_give_a_valid_prediction_for_every_record(name, data_dir, tmp_path):
    task = TASKS[name]
    splits = task.load(data_dir)
    for baseline in (tfidf_predictions(task, splits["train"], splits["test"]),):
        task.write_submission(tmp_path, splits["test"], baseline)
    majority = task.majority_predictions(splits["train"], splits["test"])
    task.write_submission(tmp_path, splits["test"], majority)
    assert len(majority) == len(baseline) == len(splits["test"])
    task.score(task.majority_predictions(splits["train"], splits["validation"]), splits["validation"])


def test_tfidf_learns_a_word_that_tells_the_classes_apart():
    task = TASKS["terra"]
    records = [
        {"premise": f"предложение {n}", "hypothesis": "да" if n % 2 else "нет", "label": n % 2} for n in range(40)
    ]
    assert tfidf_predictions(task, records[:30], records[30:]) == [n % 2 for n in range(30, 40)]


def test_tfidf_chooses_among_the_texts_of_a_record():
    task = TASKS["parus"]
    records = [
        {
            "premise": f"предложение {n}",
            "question": "cause",
            "choices": ["верно", "ложно"] if n % 3 else ["ложно", "верно"],
            "label": 0 if n % 3 else 1,
        }
        for n in range(60)
    ]
    assert tfidf_predictions(task, records[:40], records[40:]) == [record["label"] for record in records[40:]]


def test_tfidf_reproduces_the_measured_floor_of_rucola(shared_data_dir):
    """.6796 accuracy and .1156 MCC on both dev sets, measured independently; word splitting may differ a little."""
    task = TASKS["rucola"]
    splits = task.load(shared_data_dir)
    scores = task.score(tfidf_predictions(task, splits["train"], splits["validation"]), splits["validation"])
    assert scores["accuracy"] == pytest.approx(0.6796, abs=0.005)
    assert scores["mcc"] == pytest.approx(0.1156, abs=0.005)


def test_majority_floor_of_rucola_is_the_measured_one(shared_data_dir):
    task = TASKS["rucola"]
    splits = task.load(shared_data_dir)
    scores = task.score(task.majority_predictions(splits["train"], splits["validation"]), splits["validation"])
    expected = {"accuracy": 0.6753, "in_domain_accuracy": 0.7457, "out_of_domain_accuracy": 0.6369}
    assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=5e-5)
    assert scores["mcc"] == scores["in_domain_mcc"] == scores["out_of_domain_mcc"] == 0
