"""The text of a trainer fails or does not come: one line, a backup, an exit code, and no waiting."""

import os
import signal
import threading
import time

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from src.trainer import build, hf_trainer
from src.trainer.hf_trainer import StoppableLoader, StoppedWaiting
from tasks.mlm.text_errors import TextError
from tests.reference.fake_swarm import FakeOptimizer, make_trainer, tiny_items, tiny_model


class Text(IterableDataset):
    """Good items, then what ``end`` does."""

    def __init__(self, items, end=lambda: None):
        self.items, self.end = items, end

    def __iter__(self):
        yield from self.items
        self.end()


def fail():
    raise TextError("a.jsonl, line 7: the file is damaged")


def hang():
    time.sleep(3600)


def end_process():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_gives_what_a_data_loader_gives(num_workers):
    options = {"batch_size": 2, "num_workers": num_workers}
    loader = StoppableLoader(Text(range(7)), stop=threading.Event(), **options)
    for _ in range(2):
        torch.manual_seed(0)
        expected = [batch.tolist() for batch in DataLoader(Text(range(7)), **options)]
        torch.manual_seed(0)
        assert [batch.tolist() for batch in loader] == expected


def test_loader_makes_no_batch_ahead():
    taken = []
    loader = StoppableLoader(Text(taken.append(item) or item for item in range(9)), stop=threading.Event())
    batches = iter(loader)
    for number in range(3):
        next(batches)
        time.sleep(0.05)
        assert taken == list(range(number + 1))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loader_gives_up_a_batch_that_does_not_come_soon_after_a_stop(monkeypatch, num_workers):
    monkeypatch.setattr(hf_trainer, "STOP_PATIENCE_SECONDS", 0.5)
    stop = threading.Event()
    batches = iter(StoppableLoader(Text([1, 2], hang), stop=stop, num_workers=num_workers))
    assert [int(next(batches)) for _ in range(2)] == [1, 2]
    threading.Timer(0.3, stop.set).start()
    started = time.monotonic()
    with pytest.raises(StoppedWaiting):
        next(batches)
    assert 0.7 < time.monotonic() - started < 60, "the text comes after an hour"


def test_loader_still_takes_a_batch_that_comes_right_after_a_stop():
    stop = threading.Event()
    stop.set()
    loader = StoppableLoader(Text([1], lambda: time.sleep(0.5)), stop=stop)
    assert [int(batch) for batch in loader] == [1]


@pytest.mark.parametrize(
    ("end", "num_workers", "code", "said"),
    [
        (fail, 0, 2, "run_trainer.py: error: a.jsonl, line 7: the file is damaged\n"),
        (fail, 1, 2, "run_trainer.py: error: a.jsonl, line 7: the file is damaged\n"),
        (hang, 0, 0, ""),
        (hang, 1, 0, ""),
        (end_process, 1, 1, ""),
    ],
    ids=["error", "error in a worker", "stop", "stop with a worker", "worker killed"],
)
def test_trainer_without_text_writes_a_backup_and_ends(tmp_path, monkeypatch, capfd, end, num_workers, code, said):
    monkeypatch.setattr(hf_trainer, "STOP_PATIENCE_SECONDS", 0.5)
    deadlines = []
    monkeypatch.setattr(build, "start_deadline", deadlines.append)
    optimizer = FakeOptimizer(tiny_model())
    trainer, callback = make_trainer(tmp_path, optimizer, dataloader_num_workers=num_workers)
    trainer.train_dataset = Text(tiny_items(12), end)
    assert callback.stop is trainer.stop
    if end is hang:
        threading.Timer(3.0, trainer.stop.set).start()
    assert build.train(trainer, text_error=TextError, say=callback.say) == code
    assert len(optimizer.steps) == 3, "what was read before is used"
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL, "data workers are killed when the trainer leaves"
    assert (tmp_path / "backup.pth").exists() and trainer.stop.is_set() and len(deadlines) == 1
    assert capfd.readouterr().err == said
    what = "a process that prepares data has ended: stopping"
    assert (what in callback.report.progress.stream.getvalue()) == (end is end_process)
