"""Whole runs on loopback, as a person would start them: they train together, stop, resume, and leave nothing behind."""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from src import LeanAlbertConfig, LeanAlbertForMaskedLM, LeanAlbertForPreTraining, load_tokenizer
from src.auxiliary.checkpoints import stored_epoch
from src.metrics.history import read_history
from src.metrics.journal import read_journal
from src.models.checkpoint import read_state_dict
from src.process.local_swarm import REPOSITORY, LocalPeer, LocalSwarm
from src.process.sockets import remove_abandoned
from src.trainer.backup import read_backup
from src.trainer.run_summary import compare_parameters, summarise_run

pytestmark = pytest.mark.swarm


EPOCHS = 8
MODEL = {
    "model_type": "lean_albert",
    "vocab_size": 4000,
    "embedding_size": 32,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "share_large_matrices": 1,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}
SWARM = """
--run_id test --target_batch_size {target_batch_size} --learning_rate 5e-3 --min_8bit_size 65536
--warmup_steps 4 --num_zero_lr_steps 0 --total_steps {total_steps}
--matchmaking_time 1.5 --next_chunk_timeout 12 --averaging_timeout 30 --average_state_every 4 --min_vector_size 1000
--tokenizer_path @demo/tokenizer
"""
TRAINER = """
--per_device_train_batch_size 4 --max_sequence_length 64 --initial_sequence_length 64
--sequence_length_warmup_steps 0 --pad_to_multiple_of 8 --backup_every_epochs 1 --dataset_sources @demo/corpus/*.txt
"""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def swarm_arguments(folder: Path, *, target_batch_size: int, total_steps: int) -> list[str]:
    """Flags that all peers of a run share; the model's configuration is written to ``folder``."""
    (folder / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    own = ["--output_dir", str(folder / "outputs"), "--model_config_path", str(folder / "config.json")]
    return SWARM.format(target_batch_size=target_batch_size, total_steps=total_steps).split() + own


def family(peer: "LocalPeer | LoneTrainer") -> list[psutil.Process]:
    """A peer's process and all it has started (psutil tells a reused process id from the process that had it)."""
    parent = psutil.Process(peer.process.pid)
    return [parent, *parent.children(recursive=True)]


def still_alive(processes, *, timeout: float) -> list[psutil.Process]:
    """Those that have not ended in time; zombies that wait for a reaper have ended."""
    return [
        process
        for process in psutil.wait_procs(processes, timeout)[1]
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    ]


@contextlib.contextmanager
def ending_all(processes: set):
    """Whatever a failing test has left alive is killed, by process id."""
    try:
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


PAIRS = """id,source_sentence,target_sentence,level,phenomenon
1,Завтра кот придёт.,Завтра кот пришёл.,Semantics,Tense
2,Вчера был дождь.,Вчера будет дождь.,Semantics,Tense
"""


@pytest.mark.timeout(600)
def test_swarm_of_two_trainers_and_an_auxiliary_peer_trains_together_and_leaves_nothing_behind(tmp_path):
    shared = swarm_arguments(tmp_path, target_batch_size=256, total_steps=EPOCHS)
    auxiliary_flags = (
        "--assist_in_averaging --assist_refresh 0.25 --refresh_period 0.5 --store_checkpoints --eval_batches 1 "
        f"--eval_sources {REPOSITORY / 'demo' / 'heldout.txt'} --eval_pairs {tmp_path} --eval_pairs_each 2"
    )
    (tmp_path / "RuBLiMP").mkdir()
    (tmp_path / "RuBLiMP" / "single_verb_tense.csv").write_text(PAIRS, encoding="utf-8")
    run = tmp_path / "outputs" / "test"
    with ending_all(set()) as processes, LocalSwarm(echo=False, environment=ONE_THREAD) as swarm:
        auxiliary = swarm.start(
            "aux", "run_aux_peer.py", [*shared, *auxiliary_flags.split(), "--save_checkpoint_epoch_interval", "3"]
        )
        flags = [*shared, *TRAINER.split(), "--wait_for_peers", "2"]
        trainers = [swarm.start(f"trainer {number}", "run_trainer.py", flags) for number in (1, 2)]
        for trainer in trainers:
            trainer.wait_for_line(r"epoch 2/8", timeout=120)
        for peer in swarm.peers:
            processes.update(family(peer))
        assert sum("p2pd" in process.name() for process in processes) == 3
        for trainer in trainers:
            assert trainer.process.wait(240) == 0, trainer.output()
        auxiliary.wait_for_line(r"epoch 8 on held-out text: masked-token loss \d", timeout=60)
        auxiliary.wait_for_line(r"epoch 8 on minimal pairs: \d.*% of 2 right", timeout=30)
        auxiliary.wait_for_line("evaluate it with", timeout=30)
        assert auxiliary.stop() == 0, auxiliary.output()
        assert not still_alive(processes, timeout=10)

    journals = [read_journal(run / name / "metrics.jsonl") for name in ("trainer", "trainer-2")]
    rounds = [[r for r in journal if r["event"] == "round" and r["kind"] == "gradients"] for journal in journals]
    output = "\n".join(trainer.output() for trainer in trainers)
    for journal, own_rounds in zip(journals, rounds, strict=True):
        epochs = [record for record in journal if record["event"] == "epoch"]
        assert [record["epoch"] for record in epochs] == list(range(1, EPOCHS + 1)), output
        assert all(math.isfinite(record["loss"]) and record["samples"] > 0 for record in epochs), epochs
        assert len(own_rounds) >= EPOCHS - 1, own_rounds
        assert all(averaging_round["complete"] for averaging_round in own_rounds[1:]), output
    # groups of equal size on both sides: neither has averaged with the auxiliary peer alone
    sizes = [[averaging_round["num_peers"] for averaging_round in own_rounds][-EPOCHS + 1 :] for own_rounds in rounds]
    assert sizes[0] == sizes[1] and min(sizes[0]) >= 2, sizes

    assert compare_parameters(run / "trainer" / "backup.pth", run / "trainer-2" / "backup.pth").relative < 1e-2
    assert read_backup(run / "trainer" / "backup.pth")["epoch"] == EPOCHS
    assert summarise_run(run / "trainer" / "metrics.jsonl").epochs == EPOCHS

    seen_by_auxiliary = [r for r in read_journal(run / "aux" / "metrics.jsonl") if r["event"] == "swarm_epoch"]
    assert max(record["alive_peers"] for record in seen_by_auxiliary) == 2
    history = read_history(run / "aux" / "metrics.jsonl")
    assert len(history.peers) == 2
    by_trainers = [sum(r["samples"] for r in journal if r["event"] == "epoch") for journal in journals]
    by_auxiliary = sorted(peer.samples for peer in history.peers.values())
    assert sum(by_trainers) * 0.6 < sum(by_auxiliary) <= sum(by_trainers), (by_trainers, by_auxiliary)
    assert history.pairs[-1].num_pairs == 2 and history.pairs[-1].epoch == EPOCHS
    assert 0.0 <= history.held_out[-1].accuracy < history.held_out[-1].loss < 20.0
    report = (run / "aux" / "report.html").read_text(encoding="utf-8")
    assert all(name in report for name in history.peers) and "Held-out" in report
    # the last state has been handed over, whatever the interval of 3, and nothing has failed on the way
    assert stored_epoch(run / "aux" / "checkpoint", "test") == history.last_checkpoint == EPOCHS
    stored = read_state_dict(run / "aux" / "checkpoint")
    backups = [read_backup(run / name / "backup.pth")["model"] for name in ("trainer", "trainer-2")]
    assert any(all(torch.equal(stored[key], backup[key]) for key in stored) for backup in backups)
    last_lines = "\n".join(peer.output().partition(f"epoch {EPOCHS}")[2] for peer in swarm.peers)
    assert not re.search("fail|not complete|try again|no checkpoint", last_lines), last_lines
    tokenizer = load_tokenizer(run / "aux" / "checkpoint")
    model = LeanAlbertForMaskedLM.from_pretrained(run / "aux" / "checkpoint").eval()
    with torch.no_grad():
        logits = model(**tokenizer("Утром мы пошли в [MASK].", return_tensors="pt")).logits
    assert logits.isfinite().all() and logits.shape[-1] == MODEL["vocab_size"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_modern_recipe_trains_in_a_swarm_and_is_handed_over_to_a_trainer_that_joins(tmp_path):
    """Muon in the delayed mode: its state, too, is taken by whoever joins, and all end with the same parameters."""
    shared = swarm_arguments(tmp_path, target_batch_size=1024, total_steps=12)  # time to join in
    shared += ["--optimizer", "muon", "--sentence_order", "False", "--schedule", "wsd", "--mlm_probability", "0.3",
               "--final_mlm_probability", "0.15", "--min_8bit_size", "4096", "--average_state_every", "2"]  # fmt: skip
    # who begins a run hands over what it was told, as a recipe's swarm.args tells it
    shared += ["--max_sequence_length", "64", "--initial_sequence_length", "64", "--sequence_length_warmup_steps", "0",
               "--pad_to_multiple_of", "8"]  # fmt: skip
    auxiliary_flags = "--store_checkpoints --save_checkpoint_epoch_interval 2 --keep_checkpoints 2 --eval_batches 1"
    eval_sources = ["--eval_sources", str(REPOSITORY / "demo" / "heldout.txt")]
    run = tmp_path / "outputs" / "test"
    with ending_all(set()) as processes, LocalSwarm(echo=False, environment=ONE_THREAD) as swarm:
        auxiliary = swarm.start("aux", "run_aux_peer.py", [*shared, *auxiliary_flags.split(), *eval_sources])
        first = swarm.start("first", "run_trainer.py", [*shared, *TRAINER.split()])
        first.wait_for_line(r"epoch 2/12", timeout=120)
        # with a name and an address alone: all else comes from the run
        text = ["--dataset_sources", "@demo/corpus/*.txt", "--per_device_train_batch_size", "4"]
        second = swarm.start("second", "run_trainer.py", ["--run_id", "test", "--output_dir", str(tmp_path / "outputs"),
                                                          "--backup_every_epochs", "1", *text])  # fmt: skip
        for peer in swarm.peers:
            processes.update(family(peer))
        for trainer in (first, second):
            assert trainer.process.wait(240) == 0, trainer.output()
        auxiliary.wait_for_line(r"epoch 12 on held-out text: masked-token loss [\d.]+, accuracy [\d.]+%\n", timeout=60)
        assert auxiliary.stop() == 0, auxiliary.output()
        assert not still_alive(processes, timeout=10)
    assert re.search(r"joined at epoch ([2-9]|10|11)\n", second.output()), second.output()
    assert re.search(r"epoch 12/12  loss [\d.]+  \d+ samples", second.output()), "no order, no loss of it"
    backups = [read_backup(run / name / "backup.pth") for name in ("trainer", "trainer-2")]
    assert [backup["epoch"] for backup in backups] == [12, 12]
    assert compare_parameters(*(run / name / "backup.pth" for name in ("trainer", "trainer-2"))).relative < 1e-2
    for backup in backups:
        matrices = [group for group in backup["optimizer"]["param_groups"] if group["num_parts"]]
        states = [backup["optimizer"]["state"][index] for group in matrices for index in group["params"]]
        assert len(states) == 4 and all(state["step"] == 12 for state in states)
        assert {state["state1"].dtype for state in states} == {torch.uint8}
    assert {path.name for path in (run / "aux" / "checkpoint-epochs").iterdir()} >= {"epoch-12"}
    assert all(not backup["model"]["albert.pooler.bias"].any() for backup in backups)


@pytest.mark.timeout(300)
def test_run_begins_with_the_weights_of_a_checkpoint_and_hands_them_to_a_peer_that_joins(tmp_path):
    shared = swarm_arguments(tmp_path, target_batch_size=32, total_steps=3)
    # a learning rate of zero until the end, and no parameters averaged: whatever weights a peer begins with, it keeps
    shared += ["--num_zero_lr_steps", "3", "--warmup_steps", "3", "--average_state_every", "9"]
    checkpoints = []
    for seed in (11, 12):
        torch.manual_seed(seed)
        model = LeanAlbertForPreTraining(LeanAlbertConfig(**MODEL))
        checkpoints.append(tmp_path / f"state{seed}.pth")
        torch.save({"model": model.state_dict(), "epoch": 77}, checkpoints[-1])
    flags = [*shared, *TRAINER.split(), "--wait_for_peers", "2"]
    with ending_all(set()) as processes, LocalSwarm(echo=False, environment=ONE_THREAD) as swarm:
        auxiliary = swarm.start("aux", "run_aux_peer.py", shared)
        first = swarm.start("first", "run_trainer.py", [*flags, "--init_checkpoint", checkpoints[0]])
        with pytest.raises(RuntimeError, match=r"ended with code 2[^+]*--init_checkpoint is \w{16} here and \w{16} in"):
            swarm.start("other", "run_trainer.py", [*flags, "--init_checkpoint", checkpoints[1]])
        joiner = swarm.start("joiner", "run_trainer.py", [*flags, "--seed", "5"])
        for peer in (first, joiner, auxiliary):
            processes.update(family(peer))
        for trainer in (first, joiner):
            assert trainer.process.wait(120) == 0, trainer.output()
        assert auxiliary.stop() == 0
        assert not still_alive(processes, timeout=10)
    assert "joined at epoch 0" in joiner.output()
    assert "--init_checkpoint" not in first.output().partition("others join with")[2]
    folders = [tmp_path / "outputs" / "test" / name for name in ("trainer", "trainer-2")]
    expected = torch.load(checkpoints[0], weights_only=True)["model"]
    for folder in folders:
        backup = read_backup(folder / "backup.pth")
        assert backup["epoch"] == 3
        for name, tensor in backup["model"].items():
            assert torch.equal(tensor, expected[name]), (folder, name)
    starts = [read_journal(folder / "metrics.jsonl")[0]["arguments"]["init_checkpoint"] for folder in folders]
    assert starts[0] == starts[1] and re.fullmatch(r"[0-9a-f]{16}", starts[0])


class LoneTrainer:
    """A one-peer run with short epochs, in a process group of its own as a shell would start it; `with` ends it."""

    def __init__(self, folder: Path):
        self.output_file = folder / "output.txt"
        flags = [*swarm_arguments(folder, target_batch_size=64, total_steps=10_000), *TRAINER.split()]
        with self.output_file.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "run_trainer.py", *flags, "--host_maddrs", "/ip4/127.0.0.1/tcp/0"],
                cwd=REPOSITORY,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **ONE_THREAD},
                process_group=0,
            )

    def __enter__(self) -> "LoneTrainer":
        return self

    def __exit__(self, *exception) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)

    def output(self) -> str:
        return self.output_file.read_text(encoding="utf-8")

    def wait_for_epoch(self, *, timeout: float = 120.0) -> int:
        """The number of the first epoch that this process has finished."""
        give_up_at = time.monotonic() + timeout
        while not (match := re.search(r"epoch (\d+)/", self.output())):
            assert self.process.poll() is None and time.monotonic() < give_up_at, self.output()
            time.sleep(0.1)
        return int(match.group(1))


@pytest.mark.timeout(300)
def test_trainer_that_waits_for_a_dead_partner_leaves_at_once_when_asked_to(tmp_path, temporary_directory):
    shared = swarm_arguments(tmp_path, target_batch_size=64, total_steps=10_000)
    flags = [*shared, *TRAINER.split(), "--wait_for_peers", "2"]
    flags += ["--delay_optimizer_step", "False", "--delay_grad_averaging", "False"]
    flags += ["--next_chunk_timeout", "45", "--averaging_timeout", "100"]  # so that it would wait for half a minute
    metrics = tmp_path / "outputs" / "test" / "trainer" / "metrics.jsonl"
    with ending_all(set()) as processes, LocalSwarm(echo=False, environment=ONE_THREAD) as swarm:
        trainer, partner = (swarm.start(f"trainer {number}", "run_trainer.py", flags) for number in (1, 2))
        trainer.wait_for_line(r"epoch 1/", timeout=120)
        for peer in swarm.peers:
            processes.update(family(peer))
        for process in family(partner):
            process.kill()
        give_up_at = time.monotonic() + 60
        while True:  # until it has been looking for a while
            last = [record for record in read_journal(metrics) if record["event"] == "phase"][-1]
            if (last["kind"], last["phase"]) == ("gradients", "matchmaking") and time.time() - last["time"] > 0.7:
                break
            assert time.monotonic() < give_up_at, trainer.output()
            time.sleep(0.05)
        asked = time.monotonic()
        assert trainer.stop() == 0, trainer.output()
        assert time.monotonic() - asked < 10, trainer.output()
        assert not still_alive(processes, timeout=5)
    remove_abandoned(temporary_directory)  # the partner's, as the next start of a peer does


@pytest.mark.timeout(200)
def test_trainer_leaves_although_none_of_its_processes_answers(tmp_path):
    with ending_all(set()) as processes, LoneTrainer(tmp_path) as trainer:
        trainer.wait_for_epoch()
        relatives = family(trainer)
        processes.update(relatives)
        program = next(process for process in relatives if process.ppid() == trainer.process.pid)
        for process in program.children(recursive=True):
            if "torch_shm_manager" not in process.name():  # without it torch itself cannot go on
                process.suspend()
        asked = time.monotonic()
        trainer.process.terminate()
        assert trainer.process.wait(30) == 0, trainer.output()
        assert time.monotonic() - asked < 10
        assert not still_alive(processes, timeout=5)
        assert "stopped at epoch" in trainer.output()
    assert read_backup(tmp_path / "outputs" / "test" / "trainer" / "backup.pth")["epoch"] >= 1


@pytest.mark.timeout(200)
@pytest.mark.parametrize("way", ["interrupt", "kill the program", "kill p2pd"])
def test_trainer_that_ends_in_any_way_leaves_no_file_in_the_temporary_directory(tmp_path, temporary_directory, way):
    before = set(temporary_directory.iterdir())
    with ending_all(set()) as processes, LoneTrainer(tmp_path) as trainer:
        trainer.wait_for_epoch()
        relatives = family(trainer)
        processes.update(relatives)
        (sockets,) = set(temporary_directory.glob("leanalbert-*")) - before
        assert {path.name.partition("-")[0] for path in sockets.iterdir()} >= {"p2pd", "p2pclient", "torch"}
        if way == "interrupt":
            trainer.process.send_signal(signal.SIGINT)
        elif way == "kill the program":
            next(process for process in relatives if process.ppid() == trainer.process.pid).kill()
        else:
            next(process for process in relatives if process.name() == "p2pd").kill()
            time.sleep(1)
            trainer.process.terminate()
        trainer.process.wait(60)
        assert not still_alive(processes, timeout=5)
        assert set(temporary_directory.iterdir()) == before


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trainer_stops_resumes_and_dies_without_leaving_processes(tmp_path):
    backup = tmp_path / "outputs" / "test" / "trainer" / "backup.pth"
    with ending_all(set()) as processes:
        with LoneTrainer(tmp_path) as trainer:
            trainer.wait_for_epoch()
            processes.update(family(trainer))
            asked = time.monotonic()
            os.killpg(trainer.process.pid, signal.SIGTERM)
            assert trainer.process.wait(60) == 0, trainer.output()
            assert time.monotonic() - asked < 30
            assert not still_alive(processes, timeout=5)
            stopped_at = int(re.search(r"stopped at epoch (\d+)", trainer.output()).group(1))
        assert stopped_at >= 1 and read_backup(backup)["epoch"] == stopped_at

        with LoneTrainer(tmp_path) as trainer:
            first = trainer.wait_for_epoch()
            assert f"resumed from {backup} at epoch {stopped_at}" in trainer.output()
            assert first == stopped_at + 1
            relatives = family(trainer)
            processes.update(relatives)
            program = next(process for process in relatives if process.ppid() == trainer.process.pid)
            program.kill()
            assert trainer.process.wait(10) == 128 + signal.SIGKILL
            assert not still_alive(processes, timeout=10)
        assert read_backup(backup)["epoch"] >= stopped_at
