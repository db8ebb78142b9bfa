import pytest

from tasks.registry import TASKS, get_task, tasks_with_data


def test_table_holds_every_task_under_its_lower_case_name():
    assert set(TASKS) == {
        "rcb",
        "terra",
        "lidirus",
        "danetqa",
        "parus",
        "muserc",
        "russe",
        "rwsd",
        "rucos",
        "rucola",
    }


@pytest.mark.parametrize("name", ["RuCoLA", "rucola", "RUCOLA", "Terra", "LiDiRus", "MUSERC"])
def test_names_are_accepted_in_any_case(name):
    assert get_task(name) is TASKS[name.lower()]


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown task 'cola', expected one of LiDiRus, .*RuCoLA"):
        get_task("cola")


def test_tasks_with_data_are_those_whose_folder_is_there(data_dir, shared_data_dir):
    assert tasks_with_data(data_dir) == list(TASKS.values())
    assert tasks_with_data(shared_data_dir) == list(TASKS.values())
    (data_dir / "RCB").rename(data_dir / "rest")
    assert tasks_with_data(data_dir) == [task for task in TASKS.values() if task.name != "RCB"]


def test_official_numbers_of_test_records():
    """One line of the submission each (notes, section 3)."""
    assert {task.name: task.num_test_records for task in TASKS.values()} == {
        "RCB": 438,
        "TERRa": 3198,
        "LiDiRus": 1104,
        "DaNetQA": 805,
        "RUSSE": 18892,
        "RWSD": 154,
        "PARus": 500,
        "RuCoS": 7257,
        "MuSeRC": 322,
        "RuCoLA": 2789,
    }


def test_published_scores_give_the_published_totals():
    """The mean of the nine task scores is the published total, so no score was copied wrongly."""
    totals = {"human": 0.811, "FRED-T5 1.7B": 0.762, "RuLeanALBERT": 0.698, "ruRoBERTa-large": 0.684}
    totals |= {"XLM-R-large": 0.654, "ruBERT-large": 0.620, "ruBERT-base": 0.578, "majority": 0.468, "TF-IDF": 0.434}
    tasks = [task for task in TASKS.values() if task.in_russian_superglue]
    assert len(tasks) == 9
    for model, total in totals.items():
        scores = [sum(task.published_scores[model].values()) / len(task.published_scores[model]) for task in tasks]
        assert sum(scores) / 9 == pytest.approx(total, abs=0.0011), model
