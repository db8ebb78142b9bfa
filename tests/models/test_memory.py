import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from src import LeanAlbertConfig, LeanAlbertForPreTraining
from src.models import memory as subject
from src.models.memory import largest_batch, predict_memory
from src.models.shared_linear import dense_matrices

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": 6}
# A process of its own prints by how many bytes training (two accumulated passes) raises the peak of its memory.
MEASURE = """
import json, re, sys, torch
from pathlib import Path
from src import LeanAlbertConfig, LeanAlbertForPreTraining
options, batch_size, length = json.loads(sys.argv[1])
torch.set_num_threads(1)

def step(model, batch_size):
    ids = torch.randint(5, model.config.vocab_size, (batch_size, length))
    labels = torch.where(torch.rand(ids.shape) < 0.15, ids, -100)
    model(ids, labels=labels, sentence_order_label=torch.zeros(batch_size, dtype=torch.long)).loss.backward()

def status(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

small = {**options, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
step(LeanAlbertForPreTraining(LeanAlbertConfig(**small)).train(), 1)  # libraries, their workspaces
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
before = status("VmRSS")
model = LeanAlbertForPreTraining(LeanAlbertConfig(**options)).train()
step(model, batch_size)
step(model, batch_size)
print(status("VmHWM") - before)
"""


@pytest.mark.parametrize("level", ["default", "lean", "checkpoint"])
def test_predicted_memory_is_within_a_tenth_of_the_measured_peak(level):
    options = {**OPTIONS, "vocab_size": 5000, "sparse_prediction": True, "activation_memory": level}
    predicted = predict_memory(LeanAlbertConfig(**options), batch_size=16, length=256).device
    measured = measure(options)
    if measured > predicted / 0.9:  # whatever else happens in a process only adds to it: not twice
        measured = measure(options)
    assert predicted == pytest.approx(measured, rel=0.1)


def measure(options: dict) -> int:
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps([options, 16, 256])],
        cwd=ROOT,
        # Freed tensors go back to the system at once: what the C library keeps for later is not the model's.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=250,
    )
    return int(result.stdout)


@pytest.mark.gpu
@pytest.mark.parametrize("level", ["default", "lean", "checkpoint"])
def test_predicted_memory_is_within_a_tenth_of_the_peak_of_a_gpu(level):
    config = LeanAlbertConfig(**OPTIONS, vocab_size=20000, sparse_prediction=True, activation_memory=level)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = LeanAlbertForPreTraining(config).train().cuda()
    ids = torch.randint(5, 20000, (32, 512), device="cuda")
    labels = torch.where(torch.rand(ids.shape, device="cuda") < 0.15, ids, -100)
    for _ in range(2):  # the second pass starts with gradients
        model(ids, labels=labels).loss.backward()
    measured = torch.cuda.max_memory_allocated() - before
    assert predict_memory(config, batch_size=32, length=512).device == pytest.approx(measured, rel=0.1)


def test_parameters_and_optimizer_state_are_counted_once_for_shared_matrices(tiny_config):
    config = tiny_config(share_large_matrices=True)
    count = sum(parameter.numel() for parameter in LeanAlbertForPreTraining(config).parameters())
    memory = predict_memory(config, batch_size=1, length=8)
    assert (memory.parameters, memory.gradients) == (4 * count, 4 * count)
    assert memory.optimizer == 8 * count
    all_8bit = predict_memory(config, batch_size=1, length=8, min_8bit_size=1).optimizer
    assert all_8bit == pytest.approx(2.002 * count, rel=1e-3)


def test_muon_keeps_one_moment_of_its_matrices_and_holds_the_next_one_in_a_step(tiny_config):
    config = tiny_config(share_large_matrices=True)
    model = LeanAlbertForPreTraining(config)
    matrices = dense_matrices(model)
    size = sum(weight.numel() for weight in matrices)
    lamb, muon = (predict_memory(config, batch_size=1, length=8, optimizer=name) for name in ("lamb", "muon"))
    assert (lamb.step, lamb.products) == (0, 0)
    assert lamb.optimizer - muon.optimizer == muon.step == 4 * size
    largest = max(4 * (w.numel() // parts + 2 * min(w.shape[0] // parts, w.shape[1]) ** 2 +
                       1024 * min(w.shape[0] // parts, w.shape[1])) for w, parts in matrices.items())  # fmt: skip
    assert muon.products == largest
    held = subject.peer_memory(muon).at_rest - subject.peer_memory(lamb).at_rest
    assert held == pytest.approx(muon.products, abs=2)


@pytest.mark.parametrize(("level", "units"), [("default", 10), ("lean", 2), ("checkpoint", 1)])
def test_block_bytes_are_the_units_of_the_level(level, units):
    config = LeanAlbertConfig(**OPTIONS, activation_memory=level)
    log_sum_exp = 4 * 4 if level != "checkpoint" else 0
    assert subject.block_bytes(config) == units * 4 * 256 + log_sum_exp


def test_peer_holds_four_copies_at_rest_and_takes_one_more_with_its_statistics_to_join(tiny_config):
    """How far that is from measured memory says `benchmarks.published_size`."""
    memory = predict_memory(tiny_config(), batch_size=2, length=8)
    trainer, auxiliary = (subject.peer_memory(memory, trains=trains) for trains in (True, False))
    assert trainer.at_rest == int(4 * memory.parameters + memory.optimizer + subject.TRAINER_LIBRARIES)
    before_its_first_batch = trainer.at_rest - memory.gradients
    assert trainer.joining - before_its_first_batch == memory.parameters + memory.optimizer
    assert trainer.peak == trainer.at_rest + max(trainer.batch, memory.parameters + memory.optimizer)
    assert auxiliary.at_rest == int(3 * memory.parameters + memory.optimizer + subject.AUXILIARY_LIBRARIES)


def test_largest_batch_is_the_last_that_fits():
    config = LeanAlbertConfig(**OPTIONS, vocab_size=2000, sparse_prediction=True)
    budget = 10**9
    batch_size = largest_batch(config, length=512, budget=budget)
    fits = [predict_memory(config, batch_size=batch_size + i, length=512).device <= budget for i in (0, 1)]
    assert fits == [True, False]
    assert largest_batch(config, length=512, budget=1000) == 0


def test_command_prints_a_table_and_refuses_bad_input(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**OPTIONS, "vocab_size": 2000}))
    subject.main([str(path), "--batch-size", "2", "--length", "64", "--budget", "1", "--activation-memory", "lean"])
    printed = capsys.readouterr().out
    assert printed.count("while it joins") == 2
    assert "activation_memory=lean" in printed and "optimizer" in printed and "largest batch for 1 GB: " in printed
    path.write_text('{"hidden_size": -1}')
    for arguments in (["missing.json"], [str(path)], [str(path), "--length", "0"]):
        with pytest.raises(SystemExit) as caught:
            subject.main(
                [*arguments, "--batch-size", "2", *(["--length", "64"] if "--length" not in arguments else [])]
            )
        assert caught.value.code == 2
        assert arguments[0] in capsys.readouterr().err or "--length" in arguments
