import time

import pytest
import torch

from benchmarks import training_step
from benchmarks.encoder import LEVELS, PEER, block_flops, model_flops
from benchmarks.training_step import LABELLED, MODERN, QUICK, Size
from src import LeanAlbertForPreTraining
from tests.benchmarks.test_encoder import CountProducts

HOW = {"dtype": torch.bfloat16, "device": "cpu", "compiled": False}


def test_model_flops_are_those_of_a_block_but_for_what_is_computed_twice():
    assert model_flops(512, 128) == block_flops(512, 128, "default") - 2 * 128 * 512


@pytest.mark.parametrize("name", ["default", PEER, MODERN])
def test_products_of_a_whole_step_are_as_counted(name, monkeypatch):
    """In fp64, where all products are torch's own, and apart from the attention kernel's; with all of the last layer,
    as the count has it."""
    monkeypatch.setattr(LeanAlbertForPreTraining, "_needs_few_positions", lambda *_: False)
    size = Size(hidden=48, layers=3, length=16, vocabulary=200, embedding=16)
    torch.manual_seed(0)
    batch = training_step.make_batch(size, 2, "cpu")
    side = training_step.Side(name, size, batch, **HOW)
    labelled = int((batch["labels"] != -100).sum())
    with CountProducts() as counter:
        side.model.double()(**side.inputs).loss.backward()
    counted = training_step.step_flops(size, name, side.model.config)
    core = size.layers * (model_flops(48, 16) - model_flops(48, 0))
    head = training_step.head_flops(48, 48 if name == MODERN else 16, 200) / LABELLED
    expected = 32 * (counted - core - LABELLED * head) + head * (32 if name == PEER else labelled)
    # beside them: the mapping of embeddings and the pooler of one token a row, which are not counted
    assert expected * 0.99 <= counter.flops <= expected * 1.1


def test_modernbert_attends_to_neighbours_in_two_of_three_layers():
    size = Size(hidden=64, layers=3, length=512)
    config = training_step.make_modern(size).config
    assert config.layer_types.count("sliding_attention") == 2
    blocks = training_step.step_flops(size, MODERN, config) - training_step.head_flops(64, 64, size.vocabulary)
    assert blocks == pytest.approx(model_flops(64, 512) + 2 * model_flops(64, 128))


def test_side_that_cannot_be_made_is_named_and_the_others_go_on(monkeypatch):
    def no_memory(size):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore lines")

    monkeypatch.setitem(training_step.MAKERS, PEER, no_memory)
    batch = training_step.make_batch(QUICK, 2, "cpu")
    sides, left_out = training_step.make_sides(QUICK, batch, give_up_at=time.monotonic() + 100, **HOW)
    assert set(sides) == {*LEVELS, MODERN}
    assert left_out == [f"{PEER} was left out: OutOfMemoryError: CUDA out of memory."]


def test_side_that_takes_too_long_to_begin_is_left_out(monkeypatch):
    def slow(size):
        give_up_at = time.monotonic() + 60
        while time.monotonic() < give_up_at:
            time.sleep(0.01)

    monkeypatch.setattr(training_step, "ORDER", ("default",))
    monkeypatch.setitem(training_step.MAKERS, "default", slow)
    began = time.monotonic()
    sides, left_out = training_step.make_sides(QUICK, {}, give_up_at=began + 0.2, **HOW)
    assert not sides and "TimeoutError: no time left" in left_out[0] and time.monotonic() - began < 30


def test_batch_leaves_half_of_the_memory_free(monkeypatch):
    sizes = []
    for gigabytes in (1, 8, 24, 140):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gigabytes=gigabytes: (gigabytes * 10**9, 0))
        sizes.append(training_step.choose_batch_size(Size(), "cuda"))
    assert sizes == [1, 4, 8, 64]
