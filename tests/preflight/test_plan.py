"""What a run will cost is said beforehand, with each thing that should be changed and the flag for it."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from src import LeanAlbertConfig, LeanAlbertForPreTraining
from src.preflight.__main__ import main
from src.preflight.machine import Workload, needed_memory
from src.preflight.plan import Circumstances, Pace, Text, make_plan, muon_operations, sample_operations
from src.swarm.compression import gradient_compression, parameter_compression

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = LeanAlbertConfig(
    hidden_size=256, num_attention_heads=4, intermediate_size=512, embedding_size=64, vocab_size=4000,
    num_hidden_layers=2,
)  # fmt: skip
SETTINGS = {
    "target_batch_size": 16_384, "matchmaking_time": 60.0, "averaging_timeout": 600.0, "average_state_every": 5,
    "averaging_bits": 8, "delay_grad_averaging": True, "num_zero_lr_steps": 50, "warmup_steps": 3_000,
    "total_steps": 15_000,
    "max_sequence_length": 512, "initial_sequence_length": 512, "sequence_length_warmup_steps": 0,
    "pad_to_multiple_of": 8, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
    "pack_sequences": False,
}  # fmt: skip
GROWING = {"initial_sequence_length": 128, "sequence_length_warmup_steps": 7_000}


def planned(settings=(), **now):
    memory = needed_memory(CONFIG, Workload(2**20, batch_size=4, length=512), on_gpu=False)
    return make_plan(CONFIG, SETTINGS | dict(settings), Circumstances(**now), memory)


def pace(samples_per_second: float, *, step_seconds: float = 1.0, length: int = 512) -> Pace:
    return Pace(samples_per_second, step_seconds, length)


def warned(plan) -> dict[str, str]:
    """What to do, by what is wrong."""
    assert all(check.state == "warning" for check in plan.warnings)
    return {check.name: check.fix for check in plan.warnings}


# -- the figures ------------------------------------------------------------------------------------------------------


def test_hours_follow_from_the_pace_of_all_trainers():
    plan = planned(num_trainers=20, pace=pace(40.0), bandwidth=1000.0)
    hours = {one.what: (one.epoch, one.hours, one.hours_alone) for one in plan.schedule}
    seconds = 16_384 / 800
    for what, epoch in (
        ("learning rate zero until", 50),
        ("learning rate at its peak from", 3_000),
        ("end at", 15_000),
    ):
        assert hours[what] == pytest.approx((epoch, epoch * seconds / 3600, 20 * epoch * seconds / 3600)), what
    assert plan.epoch_seconds == pytest.approx(seconds)
    assert plan.swarm_samples_per_second == pytest.approx(800.0)


def test_plan_of_a_modern_recipe_says_when_the_rate_falls_and_what_a_sample_is():
    plan = planned({"schedule": "wsd", "decay_steps": None, "sentence_order": False}, pace=pace(40.0))
    epochs = {one.what: one.epoch for one in plan.schedule}
    assert epochs["learning rate falls from"] == 12_000 and "one stretch of a text" in plan.sample
    given = planned({"schedule": "wsd", "decay_steps": 1_000}).schedule
    assert {one.what: one.epoch for one in given}["learning rate falls from"] == 14_000


def test_plan_tells_what_the_products_of_muon_cost_in_samples():
    lamb, muon = planned(), planned({"optimizer": "muon"})
    assert not [line for line in lamb.lines() if line.startswith("muon")]
    (line,) = [line for line in muon.lines() if line.startswith("muon")]
    with torch.device("meta"):
        model = LeanAlbertForPreTraining(CONFIG)
    # two blocks: queries, keys, values and output 256 x 256 each, two of 256 x 512; five steps of 4 m^2 n + 2 m^3
    operations = 2 * 5 * 256**3 * (4 * 6 + 2 * (4 * 2 + 2))
    assert muon.step_operations == muon_operations(model) == operations
    assert sample_operations(CONFIG, 512) == 6 * 512 * 2 * (4 * 256**2 + 2 * 256 * 512)
    assert f"as much as {operations / sample_operations(CONFIG, 512):.2g} of its samples" in line


def test_epochs_of_short_sequences_take_less_time():
    always, growing = planned(pace=pace(40.0)), planned(GROWING, pace=pace(40.0))
    (end,), (earlier,) = ([one.hours for one in plan.schedule if one.what == "end at"] for plan in (always, growing))
    # from 128 to 512 tokens in 7000 of 15000 epochs: 320 on average, rounded down to multiples of 8
    assert earlier == pytest.approx(end * (1 - 7 / 15 * (1 - 316.5 / 512)), rel=0.003)
    assert "128 tokens at most, later 512" in growing.sample
    assert [one.epoch for one in growing.schedule] == [50, 3_000, 7_000, 15_000]


def test_a_pace_measured_with_short_sequences_is_that_of_short_sequences():
    short, full = planned(GROWING, pace=pace(160.0, length=128)), planned(GROWING, pace=pace(40.0))
    assert short.epoch_seconds == pytest.approx(full.epoch_seconds)
    assert "one trainer 160.0/s" in short.lines()[4] and "at 128 tokens" in short.lines()[4]


def test_others_count_as_they_are_seen():
    plan = planned(num_trainers=3, pace=pace(10.0), others_per_second=90.0, bandwidth=1000.0)
    assert plan.epoch_seconds == pytest.approx(163.84)


def test_an_auxiliary_peer_knows_the_pace_of_the_trainers_but_not_their_sequences():
    plan = planned(GROWING, num_trainers=2, others_per_second=100.0, is_trainer=False, bandwidth=1000.0)
    assert plan.epoch_seconds == pytest.approx(163.84) and plan.samples_per_second is None
    assert [line.split()[0] for line in plan.lines()] == ["model", "target", "pace", "schedule", "traffic", "memory"]
    assert plan.pace_lines()[0] == "pace      2 trainers 100.0/s; an epoch takes 3 min"
    assert planned(num_trainers=2, is_trainer=False, averages=False).gradient_bytes == 0


@pytest.mark.parametrize(("measured", "shown"), [(626.382, "626 Mbit/s"), (1.26, "1.3 Mbit/s"), (0.02, "0.02 Mbit/s")])
def test_a_measured_bandwidth_is_shown_without_its_noise(measured, shown):
    assert shown in "\n".join(planned(num_trainers=2, bandwidth=measured).lines())


def test_before_its_own_pace_is_known_that_of_the_others_is():
    plan = planned(num_trainers=3, others_per_second=100.0, why_no_pace="follows", bandwidth=1000.0)
    assert plan.pace_lines()[0].startswith("pace      follows, 2 other trainers 100.0/s, at 512 tokens; an epoch")


def test_hours_count_from_where_the_run_is():
    plan = planned(pace=pace(16.384), epoch=14_640)
    assert {one.what: one.hours for one in plan.schedule} == {
        "learning rate zero until": None, "learning rate at its peak from": None, "end at": pytest.approx(100.0)
    }  # fmt: skip


def test_without_a_pace_nothing_is_claimed():
    plan = planned()
    assert [line.split(maxsplit=1)[1] for line in plan.pace_lines()] == [
        "not measured",
        "learning rate zero until epoch 50, learning rate at its peak from epoch 3000, end at epoch 15000",
    ]
    assert plan.warnings == ()


@pytest.mark.parametrize(("num_trainers", "share", "bits"), [(1, 0.0, 8), (2, 1.0, 8), (20, 1.9, 8), (20, 1.9, 4)])
def test_bytes_are_those_that_travel(num_trainers, share, bits):
    """A trainer sends its values for the parts of the others, and the averages of its own: 2 (n - 1) / n of all."""
    parameters = [p.detach() for p in LeanAlbertForPreTraining(CONFIG).parameters()]
    gradients, averages = gradient_compression(bits), parameter_compression()
    sizes = [[len(how.compress(p, info(p)).buffer) for p in parameters] for how in (gradients, averages)]
    plan = planned({"averaging_bits": bits}, num_trainers=num_trainers, bandwidth=8.0)
    assert plan.gradient_bytes == pytest.approx(share * sum(sizes[0]), rel=0.02)
    assert plan.parameter_bytes == pytest.approx(share * sum(sizes[1]) / 5, rel=0.02)
    assert plan.round_seconds == pytest.approx((plan.gradient_bytes + plan.parameter_bytes) / 1e6)


def info(tensor: torch.Tensor):
    from hivemind.compression import CompressionInfo

    return CompressionInfo.from_tensor(tensor)


def test_rounds_in_the_background_cost_no_time_unless_they_are_longer():
    options = {"num_trainers": 2, "pace": pace(1000.0), "bandwidth": 1.0}
    (rounds,) = {planned(GROWING, **options).round_seconds}
    assert planned(**options).epoch_seconds == pytest.approx(max(rounds, 8.192))
    assert planned({"delay_grad_averaging": False}, **options).epoch_seconds == pytest.approx(rounds + 8.192)


def test_the_plan_is_less_than_ten_lines_and_json():
    plan = planned(
        GROWING, num_trainers=20, pace=pace(0.01), bandwidth=1.0, text=Text(2_300_000_000, 100, False, 0.0123)
    )
    assert len(plan.lines()) < 10
    text = "\n".join(plan.lines())
    for part in ("layers, hidden size 256, 4000 words", "2.3 GB, more than 100 documents; 1.23%", "16384 samples",
                 "at 1 Mbit/s", "GB of memory (model and gradients", "alone"):  # fmt: skip
        assert part in text, part
    assert json.loads(json.dumps(dataclasses.asdict(plan)))["target_batch_size"] == 16_384


# -- warnings ---------------------------------------------------------------------------------------------------------


def test_no_warning_where_all_is_well():
    text = Text(10**9, 100, False, 0.001)
    assert warned(planned(num_trainers=20, pace=pace(40.0), bandwidth=100.0, text=text, num_readers=8)) == {}


def test_warns_of_epochs_longer_than_a_day():
    assert "--target_batch_size (for ten minutes: 60)" in warned(planned(pace=pace(0.1)))["length of an epoch"]
    assert "length of an epoch" not in warned(planned(pace=pace(0.2)))


def test_warns_of_epochs_shorter_than_their_rounds():
    slow = {"num_trainers": 2, "pace": pace(10_000.0)}
    fix = warned(planned(bandwidth=1.0, **slow))["rounds of averaging"]
    size = int(fix.partition("(to ")[2].split()[0])
    enough = warned(planned({"target_batch_size": size}, bandwidth=1.0, **slow))
    assert size > 16_384 and "--target_batch_size" in fix and "rounds of averaging" not in enough
    assert "rounds of averaging" not in warned(planned(bandwidth=100.0, **slow))


def test_warns_of_rounds_that_are_given_up():
    slow = {"num_trainers": 2, "pace": pace(0.2), "bandwidth": 0.1}
    assert "--averaging_timeout" in warned(planned({"averaging_timeout": 30.0}, **slow))["time of a round"]
    assert "time of a round" not in warned(planned({"averaging_timeout": 3000.0}, **slow))


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"gradient_accumulation_steps": 8}, "lower --gradient_accumulation_steps to 4"),
        ({"gradient_accumulation_steps": 1}, "lower --per_device_train_batch_size, or raise --matchmaking_time to 100"),
        ({"gradient_accumulation_steps": 1, "per_device_train_batch_size": 1}, "raise --matchmaking_time to 100"),
    ],
)
def test_warns_of_local_steps_that_nobody_waits_for(settings, fix):
    found = warned(planned({**GROWING, **settings}, pace=pace(0.2, step_seconds=25.0, length=128)))
    assert found["local step"].startswith(fix)
    assert "local step" not in warned(planned(pace=pace(0.2, step_seconds=59.0)))


def test_warns_of_hours_in_which_nothing_is_learned():
    assert "--num_zero_lr_steps" in warned(planned(pace=pace(200.0)))["learning rate of zero"]
    assert "learning rate of zero" not in warned(planned(pace=pace(300.0)))
    assert "learning rate of zero" in warned(planned({"num_zero_lr_steps": 15_000}))


def test_warns_of_fewer_documents_than_processes():
    def text(num_documents, *, is_all=True):
        return Text(1000, num_documents, is_all, 0.0)

    assert "--dataloader_num_workers" in warned(planned(text=text(7), num_readers=8))["documents"]
    assert "documents" not in warned(planned(text=text(8), num_readers=8))
    assert "documents" not in warned(planned(text=text(7, is_all=False), num_readers=8))


def test_warns_of_text_that_the_tokenizer_does_not_know():
    assert "--tokenizer_path" in warned(planned(text=Text(1000, 100, True, 0.05)))["unknown tokens"]


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_plans_a_run_that_does_not_exist(tmp_path, capsys):
    flags = ["--peers", "20", "--samples_per_second", "40", "--bandwidth", "50"]
    assert main(["plan", "@demo/trainer.args", *flags, "--json", str(tmp_path / "plan.json")]) == 0
    output = capsys.readouterr().out
    assert "20 trainers 800.0/s" in output and "warning  rounds of averaging" in output
    written = json.loads((tmp_path / "plan.json").read_text())
    assert (written["num_trainers"], written["parameters"]) == (20, 750_242)
    assert written["warnings"][0]["name"] == "rounds of averaging"
    assert main(["plan", "@demo/trainer.args"]) == 0
    assert "pace      not measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "usage: python -m src.preflight plan @FILE"),
        (["plan", "@none.args"], "none.args"),
        (["plan", "--peers", "3"], "which model? Name a recipe"),
        (["plan", "--peers", "0"], "--peers must be positive"),
        (["plan", "--samples_per_second", "-1"], "--samples_per_second must be positive"),
        (["plan", "--model_config_path", "none.json"], "--model_config_path: none.json: No such file"),
        (["plan", "--peer", "3"], "did you mean --peers"),
    ],
)
def test_the_command_says_what_is_wrong(words, told, capsys):
    try:
        code = main(words)
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and told in capsys.readouterr().err


def test_the_command_is_a_module():
    command = [sys.executable, "-m", "src.preflight", "plan", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True)
    assert "--samples_per_second" in done.stdout


def test_trainers_that_have_not_begun_to_compute_tell_no_pace():
    """hivemind gives them 1e-20 samples a second."""
    plan = planned(num_trainers=2, others_per_second=1e-20, why_no_pace="follows")
    assert (plan.swarm_samples_per_second, plan.epoch_seconds) == (None, None) and plan.pace_lines()[0][
        10:
    ] == "follows"
    assert "length of an epoch" not in warned(plan)
    assert planned(num_trainers=2, others_per_second=1e-20, pace=pace(10.0)).swarm_samples_per_second == 20.0


@pytest.mark.parametrize(("delayed", "steps"), [(True, 14), (False, 121)])
def test_plan_recommends_local_steps_where_rounds_take_longer_than_epochs(delayed, steps):
    settings = {"target_batch_size": 400, "delay_grad_averaging": delayed}
    plan = planned(settings, num_trainers=4, pace=pace(1000.0), bandwidth=20.0)
    assert plan.round_seconds == pytest.approx(1.333, rel=0.01), "beside 0.1 s of computing"
    fix = warned(plan)["rounds of averaging"]
    assert f"make {steps} local steps" in fix
    assert f"--local_batch_size 100 --target_batch_size {steps * 400}," in fix
    settings |= {"local_batch_size": 100, "target_batch_size": steps * 400}
    done = planned(settings, num_trainers=4, pace=pace(1000.0), bandwidth=20.0)
    assert "rounds of averaging" not in warned(done)
    assert f"one of 4 trainers makes {steps} local steps" in "\n".join(done.lines())
    again = planned({**settings, "target_batch_size": 400}, num_trainers=4, pace=pace(1000.0), bandwidth=20.0)
    assert "local steps" not in warned(again)["rounds of averaging"], "it makes them"


@pytest.mark.parametrize(("local_batch_size", "warns"), [(0, False), (8, False), (7, True)])
def test_plan_warns_of_batches_larger_than_a_local_step(local_batch_size, warns):
    assert ("local steps" in warned(planned({"local_batch_size": local_batch_size}))) is warns
