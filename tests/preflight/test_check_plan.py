"""`--check` of both programs ends with a plan, and names each thing that should be changed, with the flag."""

import pytest

from arguments import (
    DEMO,
    WHAT_TO_TRAIN,
    AuxiliaryPeerArguments,
    CollaborationArguments,
    HFTrainerArguments,
    TrainerPeerArguments,
)
from src.auxiliary import build as auxiliary_build
from src.preflight import machine
from src.preflight import run as preflight_run
from src.preflight.network import Seen
from src.preflight.plan import Pace
from src.trainer import build as trainer_build
from tasks.mlm import task

QUIET = {"max_sequence_length": 64, "initial_sequence_length": 64, "sequence_length_warmup_steps": 0,
         "pad_to_multiple_of": 8, "warmup_steps": 15, "total_steps": 100, "num_zero_lr_steps": 0,
         "per_device_train_batch_size": 4}  # fmt: skip
NOBODY = Seen()


DEMO_S = {
    "model_config_path": str(DEMO / "config.json"),
    "tokenizer_path": str(DEMO / "tokenizer"),
    "dataset_sources": [str(DEMO / "corpus" / "*.txt")],
}


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Exit code and lines of a trainer's check, on a machine of the given ``pace`` that has ``seen`` such a swarm."""

    def check(*, pace=None, seen=NOBODY, peer=(), collaboration=(), training=(), auxiliary=False):
        lines = []
        monkeypatch.setattr(preflight_run, "check_network", lambda *arguments, **options: seen)
        if pace is not None:
            monkeypatch.setattr(trainer_build, "measure_pace", lambda *arguments, **options: (pace, ""))
        arguments = HFTrainerArguments(output_dir=str(tmp_path), use_cpu=True, **{**QUIET, **dict(training)})
        kind, module = TrainerPeerArguments, trainer_build
        options = {"task": task, "say": lines.append}
        if auxiliary:
            kind, module, options["make_scorers"] = AuxiliaryPeerArguments, auxiliary_build, None
        what = {name: DEMO_S[name] for name in WHAT_TO_TRAIN if name in kind.__dataclass_fields__}
        known = kind(run_id="a", **{**what, **dict(peer)})
        code = module.check(known, CollaborationArguments(**dict(collaboration)), arguments, **options)
        return code, "\n".join(lines)

    return check


def warnings_in(output: str) -> dict[str, str]:
    """What to do, by the name of the check."""
    found, lines = {}, output.splitlines()
    for number, line in enumerate(lines):
        if line.startswith((" warning", "  FAILED")):
            found[line[8:].strip().partition(":")[0]] = lines[number + 1].strip()
    return found


def test_check_measures_a_batch_and_plans_with_it(check):
    code, output = check(collaboration={"matchmaking_time": 500.0})
    assert code == 0, output
    plan = output[output.index("what the run will take:") :].splitlines()
    assert [line.split()[0] for line in plan[1:9]] == ["model", "text", "sample", "target", "pace", "schedule",
                                                       "traffic", "memory"]  # fmt: skip
    assert "text      234 kB, more than 100 documents; 0.00% of the tokens of a sample are unknown" in output
    assert "pace      one trainer " in output and "end at epoch 100 (" in output


def test_check_plans_with_what_it_sees_of_the_swarm(check):
    seen = Seen(bandwidth=8.0, num_trainers=3, samples_per_second=30.0, epoch=50)
    _, output = check(pace=Pace(10.0, 1.0, 64), seen=seen, collaboration={"target_batch_size": 400})
    assert "one trainer 10.0/s in steps of 1 s, 4 trainers 40.0/s" in output
    assert "end at epoch 100 (8 min, 33 min alone)" in output
    assert "at 8 Mbit/s" in output and "without --bandwidth" not in output
    code, output = check(auxiliary=True, peer={"assist_in_averaging": True}, seen=seen)
    assert code == 0 and "3 trainers 30.0/s" in output and "text " not in output


def test_check_names_what_is_too_slow(check):
    _, output = check(
        pace=Pace(0.05, 80.0, 64), collaboration={"target_batch_size": 100_000}, training={"num_zero_lr_steps": 10}
    )
    found = warnings_in(output)
    assert "--target_batch_size" in found["length of an epoch"]
    assert "--per_device_train_batch_size" in found["local step"]
    assert "--num_zero_lr_steps" in found["learning rate of zero"]
    assert output.splitlines()[-1] == "READY: 8 checks passed, 3 warnings".replace(
        "8", output.splitlines()[-1].split()[1]
    )


def test_check_names_epochs_that_are_shorter_than_their_rounds(check):
    seen = Seen(num_trainers=3, samples_per_second=1e5)
    _, output = check(pace=Pace(100.0, 0.1, 64), seen=seen, peer={"bandwidth": "1"})
    assert "--target_batch_size" in warnings_in(output)["rounds of averaging"]


def test_check_names_too_few_documents_and_unknown_tokens(check, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("漢字 漢字 漢字. 漢字 漢字.\n\n漢字 漢字 漢字 漢字. 漢字.", encoding="utf-8")
    _, output = check(
        pace=Pace(100.0, 0.1, 64), peer={"dataset_sources": [str(text)]}, training={"dataloader_num_workers": 3}
    )
    found = warnings_in(output)
    assert "--dataloader_num_workers" in found["documents"] and "--tokenizer_path" in found["unknown tokens"]
    assert "documents: 2 documents for 3 processes" in output


def test_check_names_memory_that_is_too_small_and_computes_nothing_then(check, monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda: 1e8)
    code, output = check()
    assert code == 2 and "memory" in warnings_in(output)
    assert "pace      not measured, since it does not fit into memory" in output
    monkeypatch.setattr(machine, "available_memory", lambda: 1e12)
    monkeypatch.setattr(machine, "SHARED_COPIES", 1e9)
    code, output = check()
    assert code == 2 and "--shm-size" in warnings_in(output)["shared memory"]
