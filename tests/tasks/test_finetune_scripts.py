"""finetune_mlm.py and predict_on_lidirus.py from files to a checked submission, and what they say of bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

import finetune_mlm
import predict_on_lidirus
from src.models import LeanAlbertForMaskedLM, load_tokenizer
from tasks import evaluation
from tasks.finetuning.ledger import Ledger
from tasks.registry import TASKS
from tasks.submission import check_directory

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("LEANALBERT_SHARED", ROOT.parent / "shared"))
QUICK = ["--max-steps", "2", "--batch-size", "8", "--max-length", "64", "--learning-rate", "1e-3"]


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def finetune(workplace, data_dir, tiny_checkpoint):
    """Runs finetune_mlm.py on invented data with a tiny model; returns its exit code."""

    def run(*arguments, model=("-c", str(tiny_checkpoint))):
        return finetune_mlm.main([*model, "-d", str(data_dir), *QUICK, *arguments])

    return run


def assert_all_answered(directory: Path, data_dir: Path) -> None:
    report = check_directory(directory, data_dir)
    assert set(report.right) == {task.submission_file for task in TASKS.values()}
    assert not report.wrong and not report.missing
    with zipfile.ZipFile(directory / "submission.zip") as archive:
        assert len(archive.namelist()) == 9


@pytest.mark.timeout(600)
def test_every_task_goes_from_files_to_a_checked_submission_in_one_command(
    workplace, data_dir, tiny_checkpoint_of_words, capsys
):
    """On all real records where they are there (a minute of CPU time), else on the invented ones."""
    data = SHARED / "data" if (SHARED / "data").is_dir() else data_dir
    arguments = ["-t", "ALL", "-c", str(tiny_checkpoint_of_words), "-d", str(data), *QUICK, "--batch-size", "32"]
    assert finetune_mlm.main(arguments) == 0
    (directory,) = (workplace / "preds").iterdir()
    assert_all_answered(directory, data)
    rows = Ledger(workplace / "runs" / "runs.jsonl").rows()
    assert {row["task"] for row in rows} == {task.name for task in TASKS.values() if task.trained_on is None}
    run = workplace / "runs" / rows[0]["directory"]
    assert (run.parent / "dev.png").is_file() and (run.parent / "scores.txt").is_file()
    output = capsys.readouterr().out
    assert "RWSD: " in output and "so it is what gets submitted" in output
    assert "LiDiRus (trained on TERRa): " in output
    assert output.splitlines()[-1].startswith("Next: get the official test files for ")  # of most tasks a part is here


def test_more_seeds_later_add_only_what_is_missing(finetune, workplace, capsys):
    ledger = Ledger(workplace / "runs" / "runs.jsonl")
    assert finetune("-t", "rucola") == 0
    first = ledger.rows()
    assert finetune("-t", "RuCoLA", "--num-seeds", "2") == 0
    assert [row["seed"] for row in ledger.rows()] == [0, 1]
    assert ledger.rows()[:1] == first
    assert "dev scores of 2 seeds" in capsys.readouterr().out
    written = next((workplace / "preds").glob("*/RuCoLA.csv")).read_bytes()
    assert finetune("-t", "RuCoLA", "--num-seeds", "2") == 0
    assert len(ledger.rows()) == 2
    assert next((workplace / "preds").glob("*/RuCoLA.csv")).read_bytes() == written


def test_lidirus_is_answered_by_the_terra_run_of_the_ledger_or_the_one_named(finetune, workplace, data_dir, capsys):
    assert finetune("-t", "TERRa", "--num-seeds", "2") == 0
    rows = Ledger(workplace / "runs" / "runs.jsonl").rows()
    best = max(rows, key=lambda row: (row["dev"]["accuracy"], -row["seed"]))
    file = workplace / "preds" / best["model"] / "LiDiRus.jsonl"
    answers = []
    for name in ([], ["-m", best["model"]], ["-m", best["source"]], ["-m", str(Path("runs") / best["directory"])]):
        file.unlink(missing_ok=True)
        assert predict_on_lidirus.main([*name, "-d", str(data_dir)]) == 0
        answers.append(file.read_text())
    assert finetune("-t", "LiDiRus", "--num-seeds", "2") == 0
    assert {*answers, file.read_text()} == {answers[0]}
    output = capsys.readouterr().out
    assert "Negation" in output and "  all  " in output
    assert len(Ledger(workplace / "runs" / "runs.jsonl").rows()) == 2


def test_rwsd_submits_the_most_frequent_answer_where_the_head_is_no_better(finetune, workplace, monkeypatch, capsys):
    monkeypatch.setattr(TASKS["rwsd"], "score", lambda *_: {"accuracy": 0.5}, raising=False)
    monkeypatch.setattr(evaluation, "open_run", lambda *_: pytest.fail("the model was asked"))
    assert finetune("-t", "RWSD") == 0
    assert "the most frequent answer is as good on dev as the best seed" in capsys.readouterr().out
    lines = next((workplace / "preds").glob("*/RWSD.jsonl")).read_text().splitlines()
    assert len({json.loads(line)["label"] for line in lines}) == 1


@pytest.mark.parametrize("name", ["majority", "TfIdf"])
def test_baselines_answer_every_task(finetune, workplace, data_dir, name):
    assert finetune("-t", "all", model=("-m", name)) == 0
    assert_all_answered(workplace / "preds" / name.lower(), data_dir)


def break_data(data_dir, fault):
    file = data_dir / "TERRa" / "train.jsonl"
    lines = file.read_text().splitlines()
    if fault == "no file":
        (data_dir / "TERRa" / "val.jsonl").unlink()
    elif fault == "no field":
        lines[1] = json.dumps({"premise": "Да.", "idx": 1, "label": "entailment"})
    elif fault == "unknown label":
        lines[0] = lines[0].replace('"entailment"', '"maybe"')
    elif fault == "empty":
        lines = []
    elif fault == "duplicate":
        lines.append(lines[0])
    elif fault == "cut off":
        file.write_text("\n".join(lines)[:-9])
        return
    file.write_text("".join(line + "\n" for line in lines))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no file", "val.jsonl: no such file; expected train.jsonl, val.jsonl, test.jsonl"),
        ("no field", "train.jsonl:2: missing field 'hypothesis'"),
        ("unknown label", 'train.jsonl:1: unknown label "maybe"'),
        ("empty", "train.jsonl: the file holds no records"),
        ("duplicate", "train.jsonl:4: duplicate idx 0"),
        ("cut off", "train.jsonl:3: not valid JSON (the file is cut off here"),
    ],
)
@pytest.mark.parametrize("task", ["TERRa", "all"])
def test_bad_data_is_one_line_and_nothing_is_written(finetune, workplace, data_dir, capsys, task, fault, message):
    break_data(data_dir, fault)
    assert finetune("-t", task) == 2
    output = capsys.readouterr()
    assert output.err.startswith("finetune_mlm.py: error: ") and output.err.count("\n") == 1
    assert message in output.err
    assert list(workplace.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-t", "cola"], "unknown task 'cola'"),
        (["-t", "RuCoLA", "-d", "nowhere"], "nowhere: no such directory (--data-dir)"),
        (["-t", "all", "-d", "."], "-t all: there is no folder of a task in ."),
        (["-t", "RuCoLA", "-m", "bert"], "both name a model"),
        (["-t", "RuCoLA", "--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["-t", "RuCoLA", "--num-seeds", "0"], "--num-seeds 0: must be at least 1"),
    ],
)
def test_bad_arguments_are_one_line(finetune, workplace, capsys, arguments, message):
    assert finetune(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("finetune_mlm.py: error: ") and error.count("\n") == 1
    assert message in error
    assert list(workplace.iterdir()) == []


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (finetune_mlm, [], "the following arguments are required: -t/--task"),
        (finetune_mlm, ["-t", "rcb", "--batch-size", "x"], "argument --batch-size: invalid int value: 'x'"),
        (predict_on_lidirus, ["--task", "rcb"], "unknown arguments: --task rcb"),
    ],
)
def test_wrong_command_line_is_one_line(capsys, script, arguments, message):
    with pytest.raises(SystemExit) as error:
        script.main(arguments)
    assert error.value.code == 2
    assert capsys.readouterr() == ("", f"{script.PROGRAM}: error: {message} (--help lists all flags)\n")


def test_all_says_that_it_leaves_lidirus_out_without_terra(finetune, data_dir, capsys):
    for name in set(TASKS) - {"lidirus", "rwsd"}:
        shutil.rmtree(data_dir / TASKS[name].name)
    assert finetune("-t", "all", model=("-m", "majority")) == 0
    assert "-t all leaves LiDiRus out: its model learns from TERRa" in capsys.readouterr().out


def test_model_with_few_positions_lowers_max_length_and_says_so(finetune, workplace, tiny_tokenizer, capsys):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(**sizes, vocab_size=len(tiny_tokenizer), max_position_embeddings=24)
    BertForMaskedLM(config).save_pretrained(workplace / "short")
    tiny_tokenizer.save_pretrained(workplace / "short")
    assert finetune("-t", "DaNetQA", "--precision", "bf16", model=("-m", "short")) == 0
    assert "--max-length 64 is lowered to 24, the longest input of this model" in capsys.readouterr().out
    (row,) = Ledger(workplace / "runs" / "runs.jsonl").rows()
    assert row["arguments"]["max_length"] == 24 and row["arguments"]["precision"] == "bf16"


def test_lost_weights_and_a_damaged_test_file_of_another_task_are_one_line(finetune, workplace, data_dir, capsys):
    assert finetune("-t", "RWSD") == finetune("-t", "DaNetQA") == 0
    (data_dir / "RWSD" / "test.jsonl").write_text("{")
    assert finetune("-t", "DaNetQA") == 2
    assert "test.jsonl:1: not valid JSON" in capsys.readouterr().err
    next(workplace.glob("runs/*/DaNetQA/*/seed-0/weights.pt")).unlink()
    assert finetune("-t", "DaNetQA") == 2
    error = capsys.readouterr().err
    assert "weights.pt: no such file; weights are kept for the best seed only" in error and error.count("\n") == 1


def test_checkpoint_of_another_size_is_one_line(finetune, workplace, tiny_checkpoint, capsys):
    torch.save({"model": {"albert.pooler.bias": torch.zeros(3)}}, workplace / "state.pth")
    config = ["--model-config", str(tiny_checkpoint / "config.json"), "--tokenizer", str(tiny_checkpoint)]
    assert finetune("-t", "RuCoLA", *config, model=("-c", "state.pth")) == 2
    error = capsys.readouterr().err
    assert "state.pth does not fit LeanAlbertModel: missing: embeddings" in error and error.count("\n") == 1


def test_training_that_diverges_is_one_line_and_nothing_is_predicted(finetune, workplace, capsys):
    assert finetune("-t", "TERRa", "--learning-rate", "1e30", "--batch-size", "1", "--max-steps", "9") == 2
    error = capsys.readouterr().err
    assert error.startswith("finetune_mlm.py: error: TERRa seed 0: ") and error.count("\n") == 1
    assert "pass a lower --learning-rate than 1e+30; the seed is not finished" in error
    assert Ledger(workplace / "runs" / "runs.jsonl").rows() == [] and not (workplace / "preds").exists()


def test_masked_model_without_a_pooler_answers_tasks_of_every_head(workplace, data_dir, tiny_checkpoint, capsys):
    LeanAlbertForMaskedLM.from_pretrained(tiny_checkpoint).save_pretrained(workplace / "mlm")
    load_tokenizer(tiny_checkpoint).save_pretrained(workplace / "mlm")
    for task in ("TERRa", "RUSSE"):
        assert finetune_mlm.main(["-t", task, "-c", "mlm", "-d", str(data_dir), *QUICK]) == 0


def test_lidirus_without_a_terra_run_says_what_to_do(workplace, data_dir, capsys):
    assert predict_on_lidirus.main(["-d", str(data_dir), "-m", "tiny"]) == 2
    error = capsys.readouterr().err
    assert "no TERRa run of tiny in runs/runs.jsonl" in error and "python finetune_mlm.py -t TERRa" in error
    assert error.count("\n") == 1
    assert predict_on_lidirus.main(["-d", "nowhere"]) == 2


@pytest.mark.parametrize("script", ["finetune_mlm.py", "predict_on_lidirus.py"])
def test_help_needs_no_heavy_imports(script):
    code = (
        "import sys, runpy\nsys.modules['torch'] = sys.modules['transformers'] = None\n"
        f"sys.argv = ['{script}', '--help']\nrunpy.run_path('{ROOT / script}', run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "--data-dir" in result.stdout


def test_defaults_are_those_of_the_readme():
    options = vars(finetune_mlm.parse_arguments(["-t", "rcb"]))
    expected = {"batch_size": 32, "grad_acc_steps": 1, "dropout": 0.1, "weight_decay": 0.01, "num_seeds": 1}
    expected |= {"num_epochs": 40, "learning_rate": 1e-5, "max_length": 512, "precision": "auto", "data_dir": Path()}
    assert expected.items() <= options.items()


KILLED_RUN = """
import os, signal, sys
import finetune_mlm
from tasks.finetuning.ledger import Ledger
from tasks.finetuning.progress import EpochLines

places = {"inside a seed": (EpochLines, "on_step_end", 8), "between seeds": (Ledger, "append", 1)}
owner, name, call = places[sys.argv[1]]
original, calls = getattr(owner, name), []

def killed(*arguments, **keywords):
    original(*arguments, **keywords)
    calls.append(name)
    if len(calls) == call:
        os.kill(os.getpid(), signal.SIGKILL)

setattr(owner, name, killed)
finetune_mlm.main(sys.argv[2:])
"""


@pytest.mark.timeout(400)
def test_run_killed_inside_and_between_seeds_ends_with_the_same_table(tmp_path, monkeypatch, data_dir, tiny_checkpoint):
    """SIGKILL in the second epoch of seed 0, then after seed 0 is in the ledger; seed 1 starts in the third process."""
    texts = ["Кот спит на печи", "Рыба плавать в", "Дом стоит", "Он спел песню громко и", "Да"]
    rows = [f"{n},{texts[n % 5]} {n}.,{int(n % 5 in (0, 2, 4))},0,USE5" for n in range(20)]
    header = "id,sentence,acceptable,error_type,detailed_source"
    (data_dir / "RuCoLA" / "in_domain_train.csv").write_text("\n".join([header, *rows, ""]))
    arguments = [
        "-t",
        "RuCoLA",
        "-c",
        str(tiny_checkpoint),
        "-d",
        str(data_dir),
        "--num-seeds",
        "2",
        "--batch-size",
        "4",
    ]
    arguments += ["--num-epochs", "3", "--learning-rate", "3e-3", "--dropout", "0.2", "--max-length", "32"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for directory in (whole, cut):
        directory.mkdir()
    monkeypatch.chdir(whole)
    assert finetune_mlm.main(arguments) == 0
    monkeypatch.chdir(cut)
    ledger = Ledger(cut / "runs" / "runs.jsonl")
    for place, num_finished in (("inside a seed", 0), ("between seeds", 1)):
        command = [sys.executable, "-c", KILLED_RUN, place, *arguments]
        result = subprocess.run(command, cwd=cut, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
        assert result.returncode == -signal.SIGKILL, result.stderr.decode()
        assert len(ledger.rows()) == num_finished
        assert ("seed 0: goes on after epoch 1" in result.stdout.decode()) == (place == "between seeds")
        assert ("seed 0  epoch 1/3" in result.stdout.decode()) == (place == "inside a seed")
    assert finetune_mlm.main(arguments) == 0
    (table,), (expected,) = ([*place.glob("runs/*/RuCoLA/*/scores.txt")] for place in (cut, whole))
    assert table.read_text() == expected.read_text()
    others = Ledger(whole / "runs" / "runs.jsonl").rows()
    assert [row["seed"] for row in ledger.rows()] == [row["seed"] for row in others] == [0, 1]
    for row, other in zip(ledger.rows(), others, strict=True):
        assert row["dev"] == pytest.approx(other["dev"], abs=1e-6)
        for entry, expected_entry in zip(row["history"], other["history"], strict=True):
            assert entry == pytest.approx(expected_entry, abs=1e-6)
    (csv,), (expected_csv,) = ([*place.glob("preds/*/RuCoLA.csv")] for place in (cut, whole))
    assert csv.read_bytes() == expected_csv.read_bytes()
