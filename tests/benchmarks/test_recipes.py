"""What the bench of recipes compares, how it reads its curves, and whether it runs and goes on."""

import json
import math
import subprocess
import sys

import pytest
import torch

from arguments import DEMO, REPOSITORY
from benchmarks import recipes as subject
from src.models import load_tokenizer
from tasks.mlm.data import SWAPPED

CURVE = [
    {"samples": 10, "cpu_seconds": 1.0, "loss": 8.0, "accuracy": 0.0, "pairs": 0.5},
    {"samples": 20, "cpu_seconds": 3.0, "loss": 6.0, "accuracy": 0.1, "pairs": 0.6},
    {"samples": 30, "cpu_seconds": 4.0, "loss": 5.0, "accuracy": 0.2, "pairs": 0.7},
]


def test_each_part_is_taken_out_of_the_modern_recipe_once():
    recipes = subject.recipes()
    modern, faithful = recipes.pop("modern"), recipes.pop("faithful")
    assert set(modern) == {"optimizer", "learning_rate", "mlm_probability", "final_mlm_probability", "sentence_order",
                           "schedule"}  # fmt: skip
    taken_out = [name for flags in recipes.values() for name in modern.keys() - flags.keys()]
    assert sorted([*taken_out, *faithful]) == sorted(modern)


def test_both_layouts_hide_the_same_tokens_of_the_same_text():
    tokenizer = load_tokenizer(DEMO / "tokenizer")
    layouts = subject.held_out_layouts(tokenizer, [str(DEMO / "heldout.txt")], num_samples=48, length=48)
    pairs = list(zip(layouts["two stretches"], layouts["one stretch"], strict=True))
    assert len(pairs) == 2
    num_masked = num_swapped = 0
    for two, one in pairs:
        for row in range(len(two["labels"])):
            of_two, of_one = ({name: value[row] for name, value in batch.items()} for batch in (two, one))
            length = int(of_two["attention_mask"].sum())
            has_second = bool(of_two["token_type_ids"].any())
            assert int(of_one["attention_mask"].sum()) == length - has_second
            assert not of_one["token_type_ids"].any() and int(of_one["sentence_order_label"]) == -100
            text = of_two["input_ids"][1 : length - 1].tolist()
            labels = of_two["labels"][1 : length - 1].tolist()
            if has_second:
                cut = int((of_two["token_type_ids"] == 0)[:length].sum()) - 2
                halves = [(text[:cut], labels[:cut]), (text[cut + 1 :], labels[cut + 1 :])]
                if int(of_two["sentence_order_label"]) == SWAPPED:
                    halves.reverse()
                    num_swapped += 1
                text, labels = ([*halves[0][part], *halves[1][part]] for part in (0, 1))
            assert of_one["input_ids"][1 : 1 + len(text)].tolist() == text
            assert of_one["labels"][1 : 1 + len(text)].tolist() == labels
            num_masked += sum(label != -100 for label in labels)
    total = sum(int(two["attention_mask"].sum()) for two, _ in pairs)
    assert 0.1 < num_masked / total < 0.2 and num_swapped > 3


def test_scores_are_read_off_the_line_between_two_points():
    assert subject.value_at(CURVE, 2.0, "loss") == 7.0
    assert subject.value_at(CURVE, 9.0, "pairs") == 0.7
    assert math.isnan(subject.value_at(CURVE, 0.5, "loss"))
    assert subject.seconds_until(CURVE, 7.0) == 2.0
    assert subject.seconds_until(CURVE, 8.5) == 1.0
    assert math.isnan(subject.seconds_until(CURVE, 4.9))


def test_page_says_the_noise_before_the_result():
    def run(recipe, seed, better):
        curve = [{**point, "loss": point["loss"] - better} for point in CURVE]
        return {"recipe": recipe, "samples": 30, "seed": seed, "curve": curve}

    runs = [("faithful", 0, 0.0), ("faithful", 1, 0.5), ("modern", 0, 1.0), ("modern", 1, 1.5)]
    page = subject.describe([run(*one) for one in runs])
    assert page.index("standard deviation of faithful's held-out loss is 0.354 nats") < page.index("| recipe |")
    (row,) = [line for line in page.splitlines() if line.startswith("| modern |")]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "modern", "3.750 ± 0.354", "0.200 ± 0.000", "0.700 ± 0.000", "4", "3.750 ± 0.354", "0.75 (2 of 2)",
    ]  # fmt: skip


def options_for(folder, *words):
    return ["--short", "--work_dir", str(folder / "work"), "--results", str(folder / "results.json"), *words]


@pytest.mark.slow
def test_short_bench_runs_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    words = options_for(tmp_path, "--recipes", "faithful", "modern", "--seeds", "1")
    done = subprocess.run([sys.executable, "-m", "benchmarks.recipes", *words], cwd=REPOSITORY, capture_output=True,
                          text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(run["recipe"], len(run["curve"])) for run in results["runs"]] == [("faithful", 8), ("modern", 8)]
    assert (tmp_path / "results.md").is_file() and (tmp_path / "results.png").is_file()
    assert all(run["curve"][-1]["loss"] < run["curve"][0]["loss"] for run in results["runs"])

    # stopped in the middle of a run: the scores are those of one that was not
    (tmp_path / "work" / "modern-480-0.json").unlink()
    score = subject.Run._score

    def score_and_stop(run):
        score(run)
        if len(run.curve) == 4:
            raise OSError("stopped")

    monkeypatch.setattr(subject.Run, "_score", score_and_stop)
    assert subject.main(words) == 2
    monkeypatch.setattr(subject.Run, "_score", score)
    assert subject.main(words) == 0
    assert "modern-480-0: going on at 240 samples" in capsys.readouterr().out
    again = json.loads((tmp_path / "results.json").read_text())["runs"][1]["curve"]
    expected = results["runs"][1]["curve"]
    assert [point["samples"] for point in again] == [point["samples"] for point in expected]
    for one, other in zip(again, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)

    assert subject.main([*words, "--length", "32"]) == 2
    assert "holds runs with other settings" in capsys.readouterr().err


def test_wrong_options_end_with_code_2(tmp_path, capsys):
    for words, message in (
        (["--samples", "100"], "fewer than ten updates"),
        (["--seeds", "0"], "must be positive"),
        (["--recipes", "best"], "invalid choice"),
    ):
        with pytest.raises(SystemExit) as end:
            subject.parse_arguments(options_for(tmp_path, *words))
        assert end.value.code == 2 and message in capsys.readouterr().err


def test_batches_of_one_stretch_are_padded_alike():
    rows = [
        {"input_ids": torch.tensor([2, 5, 3]), "sentence_order_label": torch.tensor(-100)},
        {"input_ids": torch.tensor([2, 3]), "sentence_order_label": torch.tensor(-100)},
    ]
    batch = subject.make_batch(rows, {"input_ids": 0})
    assert batch["input_ids"].tolist() == [[2, 5, 3], [2, 3, 0]]
