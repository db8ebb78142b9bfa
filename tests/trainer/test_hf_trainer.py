"""transformers' Trainer computes gradients and nothing else: it neither clips, resets, rescales nor steps."""

import copy
import math

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import Trainer

from src.trainer.hf_trainer import CollaborativeTrainer, LossMeter, LossScaler, NoOptimizer, ReportedSchedule
from tests.reference.fake_swarm import FakeOptimizer, make_trainer, stack, tiny_items, tiny_model


def gradients_of(model, items) -> dict[str, torch.Tensor]:
    """By plain autograd, for the mean over these rows."""
    model = copy.deepcopy(model)
    model.zero_grad(set_to_none=True)
    model(**stack(items)).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_gradients_close(actual, expected, *, factor=1.0):
    for name, gradient in expected.items():
        scale = float(gradient.abs().max()) * factor
        torch.testing.assert_close(actual[name], gradient * factor, rtol=0, atol=2e-6 * max(scale, 1e-3), msg=name)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (4, 2), (2, 4)])
def test_hf_trainer_reports_mean_gradient_however_the_batch_is_split(tmp_path, batch_size, accumulation):
    optimizer, items = FakeOptimizer(tiny_model()), tiny_items(8)
    split = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    trainer, _ = make_trainer(tmp_path, optimizer, items=items, max_steps=2, max_grad_norm=1e-3, **split)
    trainer.train()
    assert [samples for samples, _ in optimizer.steps] == [8, 8]
    for _, gradients in optimizer.steps:
        assert_gradients_close(gradients, gradients_of(optimizer.model, items))


def test_hf_trainer_adds_up_gradients_of_local_steps_in_reused_buffers(tmp_path):
    optimizer, items = FakeOptimizer(tiny_model(), samples_per_epoch=12), tiny_items(4)
    make_trainer(tmp_path, optimizer, items=items, max_steps=4)[0].train()
    expected = gradients_of(optimizer.model, items)
    for (samples, gradients), factor in zip(optimizer.steps, (1, 2, 3, 1), strict=True):  # 3 x 4 samples: an epoch
        assert samples == 4
        assert_gradients_close(gradients, expected, factor=factor)


def test_hf_trainer_starts_each_local_step_at_zero_without_reused_buffers(tmp_path):
    optimizer, items = FakeOptimizer(tiny_model(), samples_per_epoch=12, reuse_grad_buffers=False), tiny_items(4)
    make_trainer(tmp_path, optimizer, items=items, max_steps=3)[0].train()
    expected = gradients_of(optimizer.model, items)
    for _, gradients in optimizer.steps:
        assert_gradients_close(gradients, expected)


@pytest.mark.parametrize("reuse_grad_buffers", [True, False])
def test_hf_trainer_loss_scale_does_not_show_in_what_is_reported(tmp_path, reuse_grad_buffers):
    model, items = tiny_model(), tiny_items(4)
    optimizer = FakeOptimizer(model, samples_per_epoch=12, reuse_grad_buffers=reuse_grad_buffers)
    scaler = LossScaler(scale=1024.0, growth_interval=2)
    make_trainer(tmp_path, optimizer, items=items, max_steps=4, scaler=scaler)[0].train()
    assert scaler.scale == 4096.0, "the scale grew while gradients were being added up"
    expected = gradients_of(model, items)
    for (_, gradients), factor in zip(optimizer.steps, (1, 2, 3, 1), strict=True):
        assert_gradients_close(gradients, expected, factor=factor if reuse_grad_buffers else 1)


def test_hf_trainer_does_not_change_parameters(tmp_path):
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    make_trainer(tmp_path, FakeOptimizer(model), max_steps=3, learning_rate=1.0)[0].train()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_hf_trainer_overrides_methods_that_transformers_still_calls():
    for name in ("_clip_grad_norm", "_get_grad_norm", "get_train_dataloader", "compute_loss",
                 "_prepare_inputs"):  # fmt: skip
        assert name in vars(CollaborativeTrainer)
        assert callable(getattr(Trainer, name))


def test_hf_trainer_shows_the_learning_rate_of_the_real_optimizer():
    collaborative = FakeOptimizer(tiny_model())
    schedule = ReportedSchedule(NoOptimizer(collaborative.model.parameters()), collaborative)
    assert schedule.get_last_lr() == [0.5]
    collaborative.state_averager.scheduler.step()
    schedule.step()
    assert schedule.get_last_lr() == [0.25]
    assert collaborative.state_averager.optimizer.param_groups[0]["lr"] == 0.25


class NanLossNow(torch.nn.Module):
    """Gives a NaN loss, and with it NaN gradients, for batches whose first token is 4."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, **inputs):
        outputs = self.model(**inputs)
        if inputs["input_ids"][0, 0] == 4:
            outputs.loss = outputs.loss * math.nan
        return outputs


def poisoned(items, *rows: int):
    for row in rows:
        items[row]["input_ids"][0] = 4
    return items


def test_hf_trainer_never_contributes_a_loss_that_is_not_finite(tmp_path):
    model, items = tiny_model(), poisoned(tiny_items(16), 4)  # the second of four batches
    optimizer = FakeOptimizer(NanLossNow(model), samples_per_epoch=10**6)
    trainer, callback = make_trainer(tmp_path, optimizer, items=items, max_steps=4)
    trainer.train()
    assert [samples for samples, _ in optimizer.steps] == [4, 4, 4]
    assert (callback.meter.samples, callback.meter.dropped, callback.meter.mini_steps) == (12, 4, 3)
    expected = {name: torch.zeros_like(parameter) for name, parameter in optimizer.model.named_parameters()}
    for (_, gradients), start in zip(optimizer.steps, (0, 8, 12), strict=True):
        for name, gradient in gradients_of(optimizer.model, items[start : start + 4]).items():
            expected[name] += gradient
        assert_gradients_close(gradients, expected)


def test_hf_trainer_counts_only_finite_parts_of_an_accumulated_step(tmp_path):
    items = poisoned(tiny_items(16), 4, 8, 12)  # step 1: good, bad; step 2: bad, bad
    optimizer = FakeOptimizer(NanLossNow(tiny_model()), samples_per_epoch=10**6)
    trainer, callback = make_trainer(tmp_path, optimizer, items=items, max_steps=2, gradient_accumulation_steps=2)
    trainer.train()
    assert [samples for samples, _ in optimizer.steps] == [4]
    assert (callback.meter.samples, callback.meter.dropped) == (4, 12)


@pytest.mark.parametrize("reuse_grad_buffers", [True, False])
def test_hf_trainer_dropped_part_of_a_step_does_not_scale_the_rest_down(tmp_path, reuse_grad_buffers):
    items = poisoned(tiny_items(16), 4)  # step 1: good, bad; step 2: good, good
    model = NanLossNow(tiny_model())
    optimizer = FakeOptimizer(model, samples_per_epoch=10**6, reuse_grad_buffers=reuse_grad_buffers)
    make_trainer(tmp_path, optimizer, items=items, max_steps=2, gradient_accumulation_steps=2)[0].train()
    assert [samples for samples, _ in optimizer.steps] == [4, 8]
    first, second = gradients_of(optimizer.model, items[:4]), gradients_of(optimizer.model, items[8:])
    (_, gradients), (_, later) = optimizer.steps
    if not reuse_grad_buffers:
        assert_gradients_close(gradients, first)
        assert_gradients_close(later, second)
        return
    times = optimizer.grad_averager.local_times_accumulated  # by which the sum in the buffers is divided
    assert times == 1.5
    mean = {name: (4 * first[name] + 8 * second[name]) / 12 for name in first}
    assert_gradients_close({name: gradient / times for name, gradient in later.items()}, mean)


def test_hf_trainer_losses_in_the_meter_are_those_of_the_model(tmp_path):
    model, items = tiny_model(), tiny_items(8)
    trainer, callback = make_trainer(tmp_path, FakeOptimizer(model, samples_per_epoch=10**6), items=items, max_steps=2)
    trainer.train()
    with torch.no_grad():
        outputs = [model(**stack(items[:4])), model(**stack(items[4:]))]
    for name, total in (("loss", callback.meter.loss), ("mlm_loss", callback.meter.mlm_loss),
                        ("sop_loss", callback.meter.sop_loss)):  # fmt: skip
        assert total == pytest.approx(sum(float(getattr(output, name)) for output in outputs), rel=1e-5), name


class CountWaits(TorchFunctionMode):
    """Counts how often numbers are asked for, for which the host would wait until a GPU has nothing left to do."""

    ASKING = {getattr(torch.Tensor, name) for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu",
                                                       "numpy")}  # fmt: skip

    def __init__(self):
        super().__init__()
        self.waits = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.waits += function in self.ASKING
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [4, 5, 6, 7]], ids=["finite", "dropped"])
def test_hf_trainer_waits_for_the_device_once_in_a_forward_pass(tmp_path, rows):
    items = poisoned(tiny_items(16), 4)
    optimizer = FakeOptimizer(NanLossNow(tiny_model()))
    trainer, callback = make_trainer(tmp_path, optimizer, items=items)
    outputs = optimizer.model(**stack([items[row] for row in rows]))
    with CountWaits() as counter:
        trainer.compute_loss(lambda **inputs: outputs, stack([items[row] for row in rows]))
    assert counter.waits == 1
    assert callback.meter.samples + callback.meter.dropped == 4


def test_hf_trainer_leaves_out_a_mask_that_hides_nothing_before_it_is_on_the_device(tmp_path):
    trainer, _ = make_trainer(tmp_path, FakeOptimizer(tiny_model()))
    batch = stack(tiny_items(2))
    mask = torch.ones_like(batch["input_ids"])
    assert trainer._prepare_inputs({**batch, "attention_mask": mask}).keys() == batch.keys()
    padded = mask.clone()
    padded[1, 7:] = 0
    assert torch.equal(trainer._prepare_inputs({**batch, "attention_mask": padded})["attention_mask"], padded)


def test_loss_meter_gives_out_samples_once_and_starts_epochs_at_zero():
    meter = LossMeter(loss=3.0, mlm_loss=2.0, sop_loss=1.0, mini_steps=2, samples=8, dropped=4, unreported_samples=8)
    assert (meter.take_samples(), meter.take_samples()) == (8, 0)
    meter.unreported_samples = 4
    meter.start_epoch()
    assert meter == LossMeter(unreported_samples=4)


@pytest.mark.parametrize(
    ("outcomes", "scale"),
    [
        ("", 1024.0),
        ("gg", 1024.0),
        ("ggg", 2048.0),
        ("gggggg", 4096.0),
        ("ggb", 512.0),
        ("ggbgg", 512.0),
        ("ggbggg", 1024.0),
        ("gggb", 1024.0),
        ("b" * 9, 2.0),
        ("b" * 10, 1.0),
        ("b" * 30, 1.0),
    ],
)
def test_loss_scaler_halves_on_overflow_and_doubles_after_calm(outcomes, scale):
    scaler = LossScaler(scale=1024.0, growth_interval=3)
    for outcome in outcomes:
        scaler.update(outcome == "g")
    assert scaler.scale == scale
