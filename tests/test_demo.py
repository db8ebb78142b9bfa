"""The demo fits its flags to a short run, and says what is missing when it is stopped before there is a model."""

import json
from pathlib import Path

import pytest

from arguments import ArgumentParser, AuxiliaryPeerArguments, CollaborationArguments, HFTrainerArguments
from demo.run_demo import newest_model, parse_arguments, run_arguments, what_is_missing
from src.export import export
from src.trainer import backup


@pytest.mark.parametrize(("total_steps", "warmup_steps"), [(1, 0), (6, 1), (16, 2), (20, 3), (100, 15), (400, 60)])
def test_demo_warms_up_for_a_part_of_the_run_however_short(total_steps, warmup_steps):
    flags = run_arguments(parse_arguments(["--total_steps", str(total_steps)]), Path("somewhere"))
    parser = ArgumentParser(AuxiliaryPeerArguments, CollaborationArguments, HFTrainerArguments)
    _, _, training = parser.parse(["@demo/aux.args", *flags])
    assert (training.total_steps, training.warmup_steps) == (total_steps, warmup_steps)


def test_demo_without_flags_trains_as_its_files_say():
    assert run_arguments(parse_arguments([]), Path("somewhere")) == ["--output_dir", "somewhere"]


@pytest.mark.parametrize("flags", ["--total_steps 0", "--total_steps -3", "--minutes 0", "--minutes nan", "--epochs 3"])
def test_demo_refuses_what_it_cannot_do_in_one_line(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(flags.split())
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_demo_names_what_a_run_lacks_that_was_stopped_early(tmp_path):
    assert what_is_missing(tmp_path) == "no epoch was finished"
    for name in ("trainer", "trainer-2", "aux"):
        (tmp_path / name).mkdir()
    metrics = tmp_path / "trainer" / "metrics.jsonl"
    metrics.write_text(json.dumps({"event": "start"}) + "\n")
    assert what_is_missing(tmp_path) == "no epoch was finished"
    metrics.write_text(json.dumps({"event": "epoch", "epoch": 8, "mlm_loss": 9.0}) + "\n")
    assert "one of the trainers" in what_is_missing(tmp_path)
    for name in ("trainer", "trainer-2"):
        (tmp_path / name / "backup.pth").touch()
    assert what_is_missing(tmp_path) == ""


@pytest.mark.parametrize(("stored", "of_backup"), [(0, 8), (5, 8), (8, 8), (9, 8)])
def test_demo_shows_the_newest_model_that_any_peer_has(tmp_path, monkeypatch, stored, of_backup):
    exported = []
    monkeypatch.setattr(export, "main", lambda arguments: exported.append(arguments[:2]))
    monkeypatch.setattr(backup, "read_backup", lambda path: {"epoch": of_backup})
    checkpoint = tmp_path / "aux" / "checkpoint"
    if stored:
        checkpoint.mkdir(parents=True)
        (checkpoint / "checkpoint.json").write_text(json.dumps({"run_id": "demo", "epoch": stored}))
    if stored >= of_backup:
        assert newest_model(tmp_path) == (checkpoint, stored) and exported == []
    else:
        assert newest_model(tmp_path) == (tmp_path / "model", of_backup)
        assert exported == [[str(tmp_path / "trainer" / "backup.pth"), str(tmp_path / "model")]]
