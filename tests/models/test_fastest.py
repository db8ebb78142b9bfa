"""The fastest of several functions is found once on a machine."""

import json
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from src.models import fastest as module
from src.models.fastest import fastest, use_cpu_kernels

PICK = module.pick
FUNCTIONS = {"slow": lambda: time.sleep(0.01), "fast": lambda: None}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "_known", None)
    monkeypatch.setattr(module, "pick", lambda functions, clock: next(name for name in functions if name == "fast"))
    return tmp_path


def refuse():
    raise AssertionError("measured again")


def test_shortest_run_wins(monkeypatch):
    monkeypatch.undo()
    calls = []
    functions = {name: (lambda name=name: calls.append(name)) for name in ("a", "b")}
    moments = [0, 0, 0, 2, 0, 3, 0, 4, 0, 1, 0, 5, 0, 6]
    assert module.pick(functions, lambda: moments.pop(0)) == "b"
    moments = [0, 0, 0, 1.04, 0, 3, 0, 4, 0, 1, 0, 5, 0, 6]
    assert module.pick(functions, lambda: moments.pop(0)) == "a"
    assert calls == ["a", "b"] * 2 * (1 + module.ROUNDS)


def test_what_was_measured_is_read_by_the_next_process(cache, monkeypatch):
    assert fastest("product", FUNCTIONS, lambda: FUNCTIONS) == "fast"
    assert fastest("product", FUNCTIONS, refuse) == "fast"
    monkeypatch.setattr(module, "_known", None)
    assert fastest("product", FUNCTIONS, refuse) == "fast"
    (path,) = (cache / "leanalbert").iterdir()
    assert json.loads(path.read_text()) == {"product": "fast"}


def test_what_another_process_wrote_meanwhile_is_kept(cache, monkeypatch):
    fastest("product", FUNCTIONS, lambda: FUNCTIONS)
    monkeypatch.setattr(module, "_known", {})
    fastest("attention", FUNCTIONS, lambda: FUNCTIONS)
    assert module.read() == {"product": "fast", "attention": "fast"}


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"product": 3}', "\xff", '{"product": "other"}'])
def test_damaged_file_is_written_anew(cache, content):
    module.write({})
    module.cache_file().write_text(content, encoding="latin-1")
    assert fastest("product", FUNCTIONS, lambda: FUNCTIONS) == "fast"
    assert module.read() == {"product": "fast"}


def test_place_that_cannot_be_written_to_is_said(cache, monkeypatch, caplog):
    (cache / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "file"))
    with caplog.at_level("INFO"):
        assert fastest("product", FUNCTIONS, lambda: FUNCTIONS) == "fast"
    assert "cannot be kept" in caplog.text


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_caller_is_not_disturbed(cache, mode):
    """Neither its modes, nor autocast, nor what a checkpoint or a count of operations sees."""
    seen, saved = [], []

    def candidates():
        weight = torch.ones(3, requires_grad=True)
        torch.autograd.grad((weight * weight).sum(), weight)
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return FUNCTIONS

    hooks = torch.autograd.graph.saved_tensors_hooks(saved.append, lambda kept: kept)
    with Dispatched() as dispatched, mode(), torch.autocast("cpu", torch.bfloat16), hooks:
        fastest("product", FUNCTIONS, candidates)
        assert torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
    assert seen == [(False, True)] and not saved and not dispatched.functions


class Dispatched(TorchDispatchMode):
    """Notes what reaches it."""

    def __init__(self):
        super().__init__()
        self.functions = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.functions.append(function)
        return function(*args, **(kwargs or {}))


def test_the_first_that_is_nearly_as_fast_is_taken():
    functions = dict.fromkeys(("slow", "near", "best"), lambda: None)
    seconds = [second for _ in range(module.ROUNDS) for took in (1.2, 1.04, 1.0) for second in (0.0, took)]
    assert PICK(functions, iter([0.0] * len(functions) + seconds).__next__) == "near"


def test_what_is_measured_may_measure_what_it_needs(cache):
    def candidates():
        fastest("product", FUNCTIONS, lambda: FUNCTIONS)
        return FUNCTIONS

    assert fastest("attention", FUNCTIONS, candidates) == "fast"
    assert module.read() == {"product": "fast", "attention": "fast"}


def test_failure_reaches_the_caller(cache):
    with pytest.raises(AssertionError, match="measured again"):
        fastest("product", FUNCTIONS, refuse)


def test_library_can_be_forced(monkeypatch):
    monkeypatch.setenv(module.VARIABLE, "torch")
    assert module.chosen_kernels() == "torch"
    use_cpu_kernels("onednn")
    assert module.chosen_kernels() == "onednn"
    use_cpu_kernels(None)
    monkeypatch.setenv(module.VARIABLE, "mkl")
    with pytest.raises(ValueError, match="LEANALBERT_CPU_KERNELS='mkl' must be one of measure, torch, onednn"):
        module.chosen_kernels()
    with pytest.raises(ValueError, match="must be one of"):
        use_cpu_kernels("mkl")
