import dataclasses
import json

import numpy as np
import pytest
import torch

from tasks.finetuning import training
from tasks.finetuning.backbone import find_pretrained
from tasks.finetuning.experiment import Experiment, open_run
from tasks.finetuning.inference import is_out_of_memory, predict_logits
from tasks.finetuning.ledger import Ledger
from tasks.finetuning.progress import EpochLines, dev_history, out_of_patience
from tasks.finetuning.training import Settings, choose_precision, encode_data, last_complete_checkpoint
from tasks.registry import TASKS

TASK = TASKS["rucola"]
SETTINGS = Settings(batch_size=4, num_epochs=3, learning_rate=3e-3, max_length=32, dropout=0.2)


def sentences(num_records, first=0):
    texts = ["Кот спит на печи", "Рыба плавать в", "Дом стоит", "Он спел песня громко и", "Да"]
    return [
        {"idx": n, "sentence": f"{texts[n % 5]} {n}.", "domain": "in_domain", "label": int(n % 5 in (0, 2, 4))}
        for n in range(first, first + num_records)
    ]


@pytest.fixture
def experiment(tmp_path, tiny_checkpoint):
    def make(name="a", **changes):
        return Experiment(
            TASK,
            find_pretrained(None, str(tiny_checkpoint)),
            {"train": sentences(18), "validation": sentences(10, first=18), "test": sentences(3)},
            dataclasses.replace(SETTINGS, **changes),
            Ledger(tmp_path / name / "runs.jsonl"),
        )

    return make


def run_seeds(experiment, *seeds):
    data = encode_data(TASK, experiment.records, experiment.pretrained.tokenizer, max_length=32)
    return [experiment.run_seed(seed, data, report_to="none") for seed in seeds]


def weights_of(row, experiment):
    path = experiment.ledger.path.parent / row["directory"] / "weights.pt"
    return torch.load(path, weights_only=True)


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def kill_at(monkeypatch, event, step):
    original = getattr(EpochLines, event)

    def killed(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise Killed

    monkeypatch.setattr(EpochLines, event, killed)


@pytest.mark.parametrize(("event", "step"), [("on_step_end", 3), ("on_step_end", 8), ("on_evaluate", 10)])
def test_killed_seed_goes_on_to_the_same_result(experiment, monkeypatch, event, step):
    """Killed within the first epoch (of five steps), within the second, and before the second is saved."""
    whole, cut = experiment("whole"), experiment("cut")
    (expected,) = run_seeds(whole, 1)
    with monkeypatch.context() as patch:
        kill_at(patch, event, step)
        with pytest.raises(Killed):
            run_seeds(cut, 1)
    assert cut.ledger.rows() == []
    started_at = []
    original = EpochLines.on_train_begin
    monkeypatch.setattr(
        EpochLines,
        "on_train_begin",
        lambda self, args, state, control, **kw: (
            started_at.append(state.global_step) or original(self, args, state, control, **kw)
        ),
    )
    (row,) = run_seeds(cut, 1)
    assert started_at == [0 if step == 3 else 5]
    assert row["best_epoch"] == expected["best_epoch"]
    for entry, other in zip(row["history"], expected["history"], strict=True):
        assert entry == pytest.approx(other, abs=1e-6)
    weights, others = weights_of(row, cut), weights_of(expected, whole)
    assert weights.keys() == others.keys()
    for name in weights:
        torch.testing.assert_close(weights[name], others[name], rtol=0, atol=1e-6)


def test_seed_killed_after_its_last_epoch_is_only_entered_into_the_ledger(experiment, monkeypatch):
    (expected,) = run_seeds(experiment("whole"), 0)
    cut = experiment("cut")
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            run_seeds(cut, 0)
    monkeypatch.setattr(training.SeedTrainer, "train", lambda *_args, **_kwargs: pytest.fail("trained again"))
    assert run_seeds(cut, 0)[0]["history"] == expected["history"]


def test_seeds_differ_and_one_seed_is_always_the_same(experiment):
    first, second = run_seeds(experiment("a"), 0, 1)
    (again,) = run_seeds(experiment("b"), 0)
    assert again["history"] == first["history"]
    assert second["history"] != first["history"]


def test_max_steps_ends_within_an_epoch_with_a_score(experiment):
    (row,) = run_seeds(experiment(max_steps=7), 0)
    assert [entry["epoch"] for entry in row["history"]] == pytest.approx([1.0, 1.4])


def test_weights_kept_are_those_of_the_best_epoch_and_the_best_seed(experiment):
    subject = experiment(num_epochs=6, learning_rate=1e-2)
    rows = run_seeds(subject, 0, 1)
    best = max(rows, key=lambda row: row["dev"]["mcc"])
    directories = [subject.ledger.path.parent / row["directory"] for row in rows]
    assert [(directory / "weights.pt").is_file() for directory in directories] == [row is best for row in rows]
    assert not list(subject.directory.glob("*/checkpoints"))
    run = open_run(subject.ledger.path.parent / best["directory"], TASK)
    records = subject.records["validation"]
    assert TASK.score(run.predict(TASK, records), records) == pytest.approx(best["dev"])
    worse = directories[1 - rows.index(best)]
    with pytest.raises(ValueError, match="weights are kept for the best seed only"):
        open_run(worse, TASK)


@pytest.mark.parametrize("content", ["{", "[]", "{}", "7", "[" * 100_000])
def test_run_with_a_damaged_row_is_one_line(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json: not (valid JSON|the row of a run)"):
        open_run(tmp_path, TASK)


def test_run_of_another_task_is_refused(experiment, tmp_path):
    (row,) = run_seeds(experiment(num_epochs=1), 0)
    with pytest.raises(ValueError, match="a run of RuCoLA, not of TERRa"):
        open_run(tmp_path / "a" / row["directory"], TASKS["terra"])
    with pytest.raises(ValueError, match=r"not the directory of a finished run \(there is no run\.json in it\)"):
        open_run(tmp_path, TASK)


def test_settings_model_and_data_each_change_the_key(experiment):
    subject = experiment()
    keys = {subject.key, experiment(dropout=0.3).key, experiment(max_steps=3).key}
    other_data = dataclasses.replace(subject, records={**subject.records, "validation": sentences(9, first=18)})
    other_test = dataclasses.replace(subject, records={**subject.records, "test": sentences(9)})
    other_model = dataclasses.replace(subject.pretrained, fingerprint="other")
    keys |= {other_data.key, dataclasses.replace(subject, pretrained=other_model).key}
    assert len(keys) == 5
    assert other_test.key == subject.key  # it has no part in training


def test_out_of_memory_halves_the_batch_and_doubles_accumulation(experiment, monkeypatch, capsys):
    used = []
    original = training.SeedTrainer.training_step

    def limited_memory(self, model, inputs, *args, **kwargs):
        used.append((len(inputs["input_ids"]), self.args.gradient_accumulation_steps))
        if len(inputs["input_ids"]) > 1:
            raise torch.OutOfMemoryError
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(training.SeedTrainer, "training_step", limited_memory)
    (row,) = run_seeds(experiment(max_steps=1), 0)
    assert used[:3] == [(4, 1), (2, 2), (1, 4)] and set(used[2:]) == {(1, 4)}
    assert "--batch-size 2 --grad-acc-steps 2" in capsys.readouterr().out
    assert row["arguments"]["batch_size"] == 4  # of the settings, so that the row is found again


def test_out_of_memory_with_one_row_is_an_error(experiment, monkeypatch):
    def no_memory(*_args, **_kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(training.SeedTrainer, "training_step", no_memory)
    with pytest.raises(MemoryError, match="RuCoLA: out of memory even with one row"):
        run_seeds(experiment(), 0)


def test_out_of_memory_is_told_from_other_errors():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_tensorboard_curves_outlive_the_checkpoints(experiment):
    pytest.importorskip("tensorboard")
    subject = experiment(num_epochs=1)
    data = encode_data(TASK, subject.records, subject.pretrained.tokenizer, max_length=32)
    row = subject.run_seed(0, data, report_to="tensorboard")
    directory = subject.ledger.path.parent / row["directory"]
    assert list(directory.glob("tensorboard/events*")) and not (directory / "checkpoints").exists()


def test_patience_counts_epochs_after_the_first_best_one():
    history = [{"mcc": value} for value in (0.1, 0.3, 0.2, 0.3)]
    assert [out_of_patience(history[:n], "mcc", 2) for n in range(5)] == [False, False, False, False, True]
    assert not out_of_patience(history, "mcc", None)
    assert not out_of_patience(history, "mcc", 3)


def test_early_stopping_ends_training(experiment, monkeypatch):
    monkeypatch.setattr(TASK, "score", lambda *_: {"mcc": 0.0}, raising=False)
    (row,) = run_seeds(experiment(num_epochs=9, early_stopping_patience=2), 0)
    assert [entry["epoch"] for entry in row["history"]] == [1.0, 2.0, 3.0]


def test_dev_history_pairs_scores_with_the_loss_before_them():
    log = [{"loss": 0.7, "epoch": 1.0}, {"eval_mcc": 0.1, "epoch": 1.0}, {"train_runtime": 3, "epoch": 1.0}]
    assert dev_history(log) == [{"epoch": 1.0, "loss": 0.7, "mcc": 0.1}]


def test_half_written_checkpoint_is_removed_and_the_one_before_it_used(tmp_path):
    for step, content in ((5, json.dumps({"global_step": 5})), (10, '{"global_st')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(content)
    (tmp_path / "checkpoint-15").mkdir()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


def test_logits_come_back_in_the_order_of_the_rows(experiment):
    subject = experiment()
    model = subject.build_model()
    encoded = encode_data(TASK, subject.records, subject.pretrained.tokenizer, max_length=32).encoded["train"]
    collator = TASK.collator(subject.pretrained.tokenizer)
    batched = predict_logits(model, encoded.rows, collator, batch_size=4, precision="fp32")
    single = [predict_logits(model, [row], collator, batch_size=1, precision="fp32")[0] for row in encoded.rows]
    np.testing.assert_allclose(batched, single, atol=1e-5)
    assert len({row.tobytes() for row in np.round(single, 4)}) > 5  # the rows do differ


@pytest.mark.parametrize(
    ("change", "flag"),
    [({"batch_size": 0}, "--batch-size 0"), ({"dropout": 1.0}, "--dropout"), ({"learning_rate": -1.0}, "--learn"),
     ({"max_length": 2}, "--max-length 2"), ({"max_steps": -1}, "--max-steps -1")],
)  # fmt: skip
def test_impossible_settings_are_named_as_flags(change, flag):
    with pytest.raises(ValueError, match=flag):
        Settings(**change)


def test_precision_auto_is_fp32_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_precision("auto") == "fp32"
    with pytest.raises(ValueError, match="needs a GPU"):
        choose_precision("fp16")


def spoil(monkeypatch, *, seed, step, weights=False):
    """From this step of a seed on the loss, or a weight after it, is not a number."""
    original = training.SeedTrainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        if self.args.seed == seed and self.state.global_step + 1 >= step:
            with torch.no_grad():
                next(model.parameters()).fill_(float("nan"))
        return original(self, model, inputs, *args, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if args.seed == seed and state.global_step >= step:
            with torch.no_grad():
                next(kwargs["model"].parameters()).fill_(float("nan"))

    if weights:
        monkeypatch.setattr(EpochLines, "on_step_end", on_step_end)
    else:
        monkeypatch.setattr(training.SeedTrainer, "training_step", training_step)


@pytest.mark.parametrize(
    ("step", "weights", "message"),
    [
        (1, False, "the loss of step 1 is nan"),
        (15, False, "the loss of step 15 is nan"),  # the last one
        (15, True, "the model's answers are not finite numbers"),
    ],
)
def test_seed_that_diverges_is_not_finished_and_those_before_it_are(experiment, monkeypatch, step, weights, message):
    subject = experiment()
    spoil(monkeypatch, seed=1, step=step, weights=weights)
    with pytest.raises(ValueError, match=rf"RuCoLA seed 1: {message}.*lower --learning-rate than 0\.003"):
        run_seeds(subject, 0, 1, 2)
    assert [row["seed"] for row in subject.ledger.rows()] == [0]
    assert not list(subject.directory.glob("seed-1/run.json"))


def test_finished_run_whose_weights_are_not_finite_answers_nothing(experiment):
    subject = experiment(num_epochs=1)
    (row,) = run_seeds(subject, 0)
    directory = subject.ledger.path.parent / row["directory"]
    weights = weights_of(row, subject)
    next(iter(weights.values())).fill_(float("inf"))
    torch.save(weights, directory / "weights.pt")
    with pytest.raises(ValueError, match="answers are not finite"):
        open_run(directory, TASK).predict(TASK, subject.records["test"])
