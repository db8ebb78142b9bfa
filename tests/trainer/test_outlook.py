"""A trainer says at its start what its run will take, and the hours once its first local steps have shown its pace."""

from types import SimpleNamespace

import pytest

from src.preflight.check import WARNING, Check
from src.preflight.plan import Circumstances
from src.trainer import outlook as module
from src.trainer.outlook import Outlook
from tests.reference.fake_swarm import FakeOptimizer, make_trainer, tiny_model


@pytest.fixture
def outlook(monkeypatch):
    clock, made, said = [0.0], [], []
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def make(now: Circumstances):
        made.append(now)
        names = ["known at once", *(["slow"] if now.pace else [])]
        return SimpleNamespace(
            lines=lambda: ["all lines"], pace_lines=lambda: ["the pace"],
            warnings=[Check(name, WARNING, "x", "y") for name in names],
        )  # fmt: skip

    tracker = SimpleNamespace(
        global_progress=SimpleNamespace(num_peers=2), global_epoch=7, samples_per_second=30.0,
        performance_ema=SimpleNamespace(samples_per_second=10.0),
    )  # fmt: skip
    it = Outlook(make, Circumstances(bandwidth=50.0), tracker=tracker, length=lambda: 64, say=said.append)

    def step(samples, seconds, waited=0.0):
        clock[0] += seconds
        it.after_step(samples, waited)

    return SimpleNamespace(begin=it.begin, step=step, made=made, said=said)


def test_the_pace_is_that_of_computing_in_the_first_steps_without_the_very_first(outlook):
    outlook.begin()
    outlook.step(8, 100.0, waited=50.0)
    for waited in (0.0, 3.0):
        outlook.step(8, 4.0 + waited, waited)
    assert len(outlook.made) == 1
    for _ in range(3):
        outlook.step(8, 4.0)
    before, after = outlook.made
    assert before.pace is None and (before.num_trainers, before.others_per_second, before.epoch) == (3, 30.0, 7)
    assert (after.pace.samples_per_second, after.pace.step_seconds, after.pace.length) == (2.0, 4.0, 64)
    assert (after.num_trainers, after.others_per_second, after.bandwidth) == (2, 20.0, 50.0)


def test_each_warning_is_said_once(outlook):
    outlook.begin()
    for _ in range(5):
        outlook.step(8, 1.0)
    first, second = outlook.said
    assert first.startswith("all lines\n") and "known at once" in first
    assert second.startswith("the pace\n") and "slow" in second and "known at once" not in second


def test_a_long_step_is_enough(outlook):
    for _ in range(2):
        outlook.step(1, 90.0)
    assert outlook.made[0].pace.step_seconds == 90.0


def test_local_steps_are_told(tmp_path):
    """With the samples that were reported, and the seconds that were not spent on computing them."""
    trainer, callback = make_trainer(tmp_path, FakeOptimizer(tiny_model()), max_steps=3)
    told = []
    callback.after_step = lambda samples, waited: told.append((samples, waited))
    trainer.train()
    assert [samples for samples, _ in told] == [4, 4, 4] and all(0 <= waited < 60 for _, waited in told)
