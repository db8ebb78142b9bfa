"""python -m tasks.rublimp from files to a ledger's row, again after an interruption, and on what is wrong."""

import csv
import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

from src.models import LeanAlbertConfig, LeanAlbertForSequenceClassification
from tasks.finetuning.ledger import Ledger
from tasks.rublimp import __main__ as program
from tasks.rublimp import experiment
from tasks.rublimp.checkpoints import pair_scorer
from tasks.rublimp.experiment import read_finished
from tasks.rublimp.pseudo_likelihood import PseudoLikelihood


@pytest.fixture
def run(tmp_path, pairs_dir, tiny_checkpoint, monkeypatch):
    """Runs the program on invented pairs with a tiny model; returns its exit code. Four pairs between two writes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiment, "PAIRS_AT_ONCE", 2)

    def run(*arguments, model=("-c", str(tiny_checkpoint))):
        return program.main([*map(str, model), "-d", str(pairs_dir), *map(str, arguments)])

    return run


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The sentences that models are asked for."""
    texts, original = [], PseudoLikelihood.__call__

    def call(self, given):
        texts.extend(given)
        return original(self, given)

    monkeypatch.setattr(PseudoLikelihood, "__call__", call)
    return texts


def run_directory(number: int = -1) -> Path:
    return Path("runs") / Ledger(Path("runs/runs.jsonl")).rows()[number]["directory"]


def test_one_command_writes_scores_table_picture_and_the_ledgers_row(run, asked, capsys):
    assert run("--pairs", 2) == 0
    directory = run_directory()
    assert {path.name for path in directory.iterdir()} == {"pairs.jsonl", "paradigms.csv", "rublimp.png", "run.json"}
    (row,) = Ledger(Path("runs/runs.jsonl")).rows()
    assert (row["task"], row["seed"], row["arguments"]) == ("RuBLiMP", 0, {"form": "mean", "pairs": 2})
    with (directory / "paradigms.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [one["paradigm"] for one in table] == ["add_verb_prefix", "np_agreement_number", "single_verb_tense"]
    assert all(0 <= float(one["low"]) <= float(one["accuracy"]) <= float(one["high"]) <= 1 for one in table)
    lines = [json.loads(line) for line in (directory / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 6 and len(asked) == 12
    right = [a / m > b / n for (a, b), (m, n) in ((line["log_likelihood"], line["tokens"]) for line in lines)]
    assert row["dev"]["accuracy"] == sum(right) / 6
    whole = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    assert whole["all"]["accuracy"] == row["dev"]["accuracy"] and whole["interval"] == "95 % interval of Wilson"
    assert set(whole["phenomena"]) == {"Word Formation", "Noun Phrase Agreement", "Tense"}
    assert len(whole["missing"]) == 42
    output = capsys.readouterr().out
    assert "42 of 45 paradigms are not in the data: add_new_suffix, " in output and f"kept in {directory}" in output
    assert run("--pairs", 2) == 0 and len(asked) == 12, "nothing is scored twice"
    assert len(Ledger(Path("runs/runs.jsonl")).rows()) == 1


def test_interrupted_run_goes_on_after_the_last_whole_line(run, asked, capsys):
    assert run() == 0
    path = run_directory() / "pairs.jsonl"
    whole, table = path.read_bytes(), (run_directory() / "paradigms.csv").read_bytes()
    finished = list(read_finished(path).items())
    for length in range(0, len(whole), 5):  # killed at any moment
        path.write_bytes(whole[:length])
        assert list(read_finished(path).items()) == finished[: whole[:length].count(b"\n")]
    asked.clear()
    path.write_bytes(whole[: whole.index(b"\n", whole.index(b"\n") + 1) + 30])  # two pairs and a part of the third
    assert run() == 0
    assert len(asked) == 2 * (7 - 2) and "7 pairs of 3 paradigms, 2 of them scored before" in capsys.readouterr().out
    assert path.read_bytes() == whole and (run_directory() / "paradigms.csv").read_bytes() == table
    path.write_bytes(b"{}\n" + whole)
    assert run() == 2
    assert "pairs.jsonl:1: not the scores of a pair; remove the line" in capsys.readouterr().err


def test_scores_stay_those_of_their_pairs_when_the_file_is_sorted_anew(run, asked, pairs_dir):
    assert run() == 0
    path = run_directory() / "paradigms.csv"
    before = path.read_bytes()
    for file in (pairs_dir / "RuBLiMP").glob("*.csv"):
        header, *lines = file.read_text(encoding="utf-8").splitlines()
        file.write_text("\n".join([header, *lines[::-1], ""]), encoding="utf-8")
    asked.clear()
    assert run() == 0 and asked == [] and path.read_bytes() == before
    assert len(Ledger(Path("runs/runs.jsonl")).rows()) == 1


def test_interrupt_keeps_what_is_done(run, asked, monkeypatch, capsys):
    lines, append = [], experiment.append_lines

    def append_and_stop(path, *records):
        append(path, *records)
        lines.extend(records)
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "append_lines", append_and_stop)
    assert run() == 130 and len(lines) == 2
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(experiment, "append_lines", append)
    assert run() == 0 and len(asked) == 14


def test_other_options_and_models_have_other_folders_and_sums_take_the_means_scores(
    run, asked, tiny_checkpoint_of_words
):
    assert run() == 0
    assert run("--form", "sum") == 0
    assert len(asked) == 14, "they are made of the same scores"
    assert run_directory(0) != run_directory(1)
    assert (run_directory(0) / "pairs.jsonl").read_bytes() == (run_directory(1) / "pairs.jsonl").read_bytes()
    assert run("--form", "word") == 0 and len(asked) == 28
    assert (run_directory(2) / "pairs.jsonl").read_bytes() != (run_directory(0) / "pairs.jsonl").read_bytes()
    assert run("--pairs", 1) == 0 and len(asked) == 34
    assert run(model=("-c", str(tiny_checkpoint_of_words))) == 0 and len(asked) == 48
    rows = Ledger(Path("runs/runs.jsonl")).rows()
    assert len({row["key"] for row in rows}) == len(rows) == 5


def test_tokens_at_once_change_no_answer(run):
    assert run() == 0
    first = read_finished(run_directory() / "pairs.jsonl")
    (run_directory() / "pairs.jsonl").unlink()
    assert run("--tokens-at-once", 16) == 0
    for place, likelihoods in read_finished(run_directory() / "pairs.jsonl").items():
        assert [one.total for one in likelihoods] == pytest.approx([one.total for one in first[place]], abs=1e-4)


def test_masked_models_of_other_families_and_baselines_are_scored_by_the_same_command(
    run, tmp_path, tiny_tokenizer, capsys
):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tiny_tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16, max_position_embeddings=20)  # fmt: skip
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    tiny_tokenizer.save_pretrained(tmp_path / "bert")
    assert run(model=("-m", tmp_path / "bert")) == 0
    output = capsys.readouterr().out
    left_out = 7 - Ledger(Path("runs/runs.jsonl")).rows()[0]["num_pairs"]
    assert left_out > 0 and f"{left_out} pairs are longer than the model reads, and left out" in output
    (tmp_path / "text.txt").write_text("Кот зашёл в дом. Белый кот спит.", encoding="utf-8")
    for name in ("unigram", "trigram"):
        assert run("--text", tmp_path / "text.txt", model=("-m", name)) == 0
    assert {path.name for path in Path("runs").iterdir()} >= {"unigram", "trigram", "runs.jsonl"}
    for kind, message in ((BertModel, "missing: cls."), (BertForSequenceClassification, "missing: cls.")):
        kind(config).save_pretrained(tmp_path / "headless")
        tiny_tokenizer.save_pretrained(tmp_path / "headless")
        capsys.readouterr()
        assert run(model=("-m", tmp_path / "headless")) == 2
        assert message in capsys.readouterr().err


def test_own_classifier_has_no_masked_head(run, tmp_path, tiny_tokenizer, capsys):
    config = LeanAlbertConfig(hidden_size=16, intermediate_size=16, num_attention_heads=2, embedding_size=16,
                              num_hidden_layers=1, vocab_size=len(tiny_tokenizer))  # fmt: skip
    LeanAlbertForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    tiny_tokenizer.save_pretrained(tmp_path / "classifier")
    assert run(model=("-c", tmp_path / "classifier")) == 2
    assert "does not fit LeanAlbertForMaskedLM: missing: predictions." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments -c/--checkpoint -m/--model-name is required"),
        (["-c", "a", "-m", "b"], "not allowed with argument"),
        (["-m", "unigram"], "-m unigram needs --text"),
        (["-c", "a", "--text", "t"], "--text is for -m unigram and -m trigram"),
        (["-m", "trigram", "--text", "t", "--form", "word"], "masks nothing"),
        (["-m", "trigram", "--text", "nowhere.txt"], "nowhere.txt"),
        (["-c", "a", "--pairs", "0"], "--pairs 0: must be at least 1"),
        (["-c", "nowhere"], "no such file or directory"),
        (["-c", "nowhere", "--output-dir", "file"], "--output-dir file: this is a file"),
        (["-c", "nowhere", "-d", "nowhere"], "nowhere: no such directory"),
    ],
)
def test_what_is_wrong_is_one_line(run, arguments, message, capsys):
    Path("file").touch()
    try:
        code = run(*arguments, model=())
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and len(error.splitlines()) == 1, error


def test_checkpoints_are_scored_on_a_fixed_sample(run, pairs_dir, tiny_checkpoint, tiny_tokenizer, caplog):
    score = pair_scorer(tiny_tokenizer, str(pairs_dir), pairs_each=2)
    assert "42 paradigms of RuBLiMP are not in" in caplog.text
    found = score(tiny_checkpoint)
    assert run("--pairs", 2) == 0
    (row,) = Ledger(Path("runs/runs.jsonl")).rows()
    assert (found["num_pairs"], found["num_paradigms"]) == (6, 3)
    assert {name: found[name] for name in ("accuracy", "morphology", "syntax", "semantics")} == {
        name: row["dev"][name] for name in ("accuracy", "morphology", "syntax", "semantics")
    }
    assert found["low"] < found["accuracy"] + 1e-9 < found["high"] + 2e-9
