"""A batch of the run's own is timed, within a limit, and whatever goes wrong with it is said instead."""

import itertools
import threading
from types import SimpleNamespace

import pytest
import torch

from src.preflight import pace
from src.preflight.pace import measure_pace
from tests.reference.fake_swarm import stack, tiny_items, tiny_model


def arguments(**options):
    return SimpleNamespace(
        **{"device": torch.device("cpu"), "bf16": False, "fp16": False, "gradient_accumulation_steps": 3,
           "world_size": 2, **options}
    )  # fmt: skip


def batches():
    return itertools.repeat(stack(tiny_items(4)))


@pytest.fixture
def seconds(monkeypatch):
    """What each batch takes, by a clock that stands still otherwise."""
    taken, clock = [], [0.0]

    def compute(model, batch, *, training):
        clock[0] += taken.pop(0)
        return 4

    monkeypatch.setattr(pace, "compute", compute)
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    return taken


def test_the_second_batch_counts_if_the_first_is_short(seconds):
    seconds += [10.0, 2.0, 1000.0]
    found, why = measure_pace(tiny_model(), batches(), training=arguments(), length=12)
    assert (found.samples_per_second, found.step_seconds, found.length, why) == (4.0, 6.0, 12, "")


def test_a_long_batch_is_computed_once(seconds):
    seconds += [20.0, 1000.0]
    found, _ = measure_pace(tiny_model(), batches(), training=arguments(world_size=1), length=12)
    assert (found.samples_per_second, found.step_seconds) == (0.2, 60.0)


def test_a_batch_is_real_and_leaves_no_gradients():
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found, why = measure_pace(model, batches(), training=arguments(bf16=True), length=12)
    assert why == "" and found.samples_per_second > 0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_batch_that_takes_too_long_is_not_waited_for():
    never = threading.Event()
    stuck = (never.wait() for _ in itertools.count())
    found, why = measure_pace(tiny_model(), stuck, training=arguments(), length=12, limit=0.1)
    assert found is None and why == "not measured, a batch takes longer than 0 s"
    never.set()


def test_a_batch_that_fails_says_why(monkeypatch):
    def compute(model, batch, *, training):
        raise RuntimeError("CUDA out of memory.\n Tried to allocate 20 GiB")

    monkeypatch.setattr(pace, "compute", compute)
    found, why = measure_pace(tiny_model(), batches(), training=arguments(), length=12)
    assert found is None and why == "not measured: CUDA out of memory. Tried to allocate 20 GiB"
