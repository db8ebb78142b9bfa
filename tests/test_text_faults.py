"""Trainers as a person starts them, whose text fails in the middle: one line, a backup, an orderly leave, a code."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from arguments import DEMO
from tests.reference.hub import TOKEN, start_hub

REPOSITORY = DEMO.parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


class Trainer:
    """A trainer of the demo in a folder of its own; what it prints goes to files there."""

    def __init__(self, folder: Path, flags: list[str], **environment: str):
        self.out, self.err, self.backup = folder / "out.log", folder / "err.log", folder / "o/demo/trainer/backup.pth"
        command = [sys.executable, "-u", str(REPOSITORY / "run_trainer.py"), "@demo/trainer.args", "--output_dir", "o",
                   "--host_maddrs", "/ip4/127.0.0.1/tcp/0", "--total_steps", "1000", *flags]  # fmt: skip
        with self.out.open("w") as out, self.err.open("w") as err:
            variables = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", **environment}
            self.process = subprocess.Popen(command, cwd=folder, env=variables, stdout=out, stderr=err)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()  # its supervisor's child ends with it
        self.process.wait()

    def wait_for(self, path: Path, words: str, seconds: float = 120) -> None:
        give_up_at = time.monotonic() + seconds
        while words not in path.read_text():
            assert time.monotonic() < give_up_at and self.process.poll() is None, self.shown()
            time.sleep(0.2)

    def shown(self) -> str:
        return self.out.read_text() + self.err.read_text()

    def end(self, seconds: float) -> tuple[int, list[str]]:
        """Exit code and lines of errors; no traceback, and a backup, in any case."""
        code = self.process.wait(seconds)
        assert "Traceback" not in self.shown() and self.backup.stat().st_size > 1000, self.shown()
        assert "leaving the swarm" in self.out.read_text()
        return code, self.err.read_text().splitlines()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_files_that_are_cut_in_the_middle_of_a_run(tmp_path, num_workers):
    texts = [text for path in sorted(DEMO.glob("corpus/*.txt")) for text in path.read_text().split("\n\n")]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    files = [tmp_path / f"{number}.jsonl.gz" for number in range(20)]
    for number, file in enumerate(files):
        file.write_bytes(gzip.compress("".join(lines[number :: len(files)]).encode()))
    flags = ["--dataset_sources", "*.jsonl.gz", "--dataloader_num_workers", str(num_workers)]
    with Trainer(tmp_path, flags) as trainer:
        trainer.wait_for(trainer.out, "epoch 1/")
        for file in files:
            os.truncate(file, file.stat().st_size * 3 // 4)
        code, errors = trainer.end(240)
    assert code == 2 and len(errors) == 1
    assert re.match(r"run_trainer.py: error: \d+\.jsonl\.gz after line \d+: not a complete gzip file", errors[0])


@pytest.fixture
def hub(tmp_path):
    """A stand-in of the hub for the real clients: its address, and a function that lets requests fail."""
    with start_hub(tmp_path) as server:
        variables = {"HF_ENDPOINT": server.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        yield variables | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}, server.fail


@pytest.mark.parametrize(("fault", "num_workers"), [("403", 0), ("404", 2)])
def test_hub_that_refuses_in_the_middle_of_a_run(tmp_path, hub, fault, num_workers):
    environment, fail = hub
    flags = ["--dataset_sources", "me/texts", "--dataloader_num_workers", str(num_workers)]
    with Trainer(tmp_path, flags, **environment) as trainer:
        trainer.wait_for(trainer.out, "epoch 1/")
        fail(f"{fault} me/texts")
        code, errors = trainer.end(60)
    assert code == 2 and len(errors) == 1 and "me/texts: the hub refused" in errors[0] and fault in errors[0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stop_while_the_hub_does_not_answer(tmp_path, hub, num_workers):
    environment, fail = hub
    flags = ["--dataset_sources", "me/texts", "--dataloader_num_workers", str(num_workers)]
    with Trainer(tmp_path, flags, **environment) as trainer:
        trainer.wait_for(trainer.out, "epoch 1/")
        fail("500 me/texts")
        trainer.wait_for(trainer.err, "me/texts: the hub does not answer (HTTP 500")
        trainer.process.send_signal(signal.SIGTERM)
        code, errors = trainer.end(20)
    assert code == 0 and len(errors) <= max(1, num_workers)


def test_hub_that_comes_back_is_read_on(tmp_path, hub):
    environment, fail = hub
    with Trainer(tmp_path, ["--dataset_sources", "me/texts"], **environment) as trainer:
        trainer.wait_for(trainer.out, "epoch 1/")
        fail("500 me/texts")
        trainer.wait_for(trainer.err, "me/texts: the hub does not answer (HTTP 500")
        fail("ok")
        trainer.wait_for(trainer.err, "me/texts: the hub answers again")
        epoch = trainer.out.read_text().count("\nepoch ")
        trainer.wait_for(trainer.out, f"epoch {epoch + 2}/")
        trainer.process.send_signal(signal.SIGTERM)
        assert trainer.end(20)[0] == 0
