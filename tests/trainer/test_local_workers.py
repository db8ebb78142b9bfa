"""torchrun starts two processes of one peer: equal parameters every epoch, samples of both, and they end together."""

import math
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from src.metrics.journal import read_journal
from src.process.local_swarm import REPOSITORY, LocalPeer, LocalSwarm, free_port
from src.trainer.backup import read_backup
from src.trainer.hf_trainer import LossMeter
from src.trainer.local_workers import SETTINGS_KEY, LocalWorkers
from tests.swarm.test_join import ONE_THREAD, TRAINER, ending_all, family, still_alive, swarm_arguments

pytestmark = pytest.mark.swarm


BATCH, RANKS = 4, 2


def test_one_process_exchanges_nothing():
    workers = LocalWorkers()
    meter = LossMeter(loss=2.5, samples=8, unreported_samples=8)
    workers.collect(meter)
    assert (meter.loss, meter.samples, meter.take_samples()) == (2.5, 8, 8)
    parameter = torch.nn.Parameter(torch.ones(3))
    assert workers.agree([parameter], epoch=7, stop=False) == (7, False, [])
    assert workers.agree([parameter], epoch=7, stop=True) == (7, True, [])
    assert workers.share_bytes(b"\x00seed\xff") == b"\x00seed\xff"


def in_two_processes(function, *arguments) -> list:
    """What ``function(workers, *arguments)`` returns on each of two ranks."""
    port = free_port()
    with torch.multiprocessing.get_context("fork").Pool(RANKS) as pool:
        pending = [pool.apply_async(run_rank, (rank, port, function, arguments)) for rank in range(RANKS)]
        return [result.get(60) for result in pending]


def run_rank(rank, port, function, arguments):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    try:
        return function(LocalWorkers(rank=rank, size=RANKS), *arguments)
    finally:
        torch.distributed.destroy_process_group()


def exchange(workers):
    rank = workers.rank
    meter = LossMeter(loss=1.5 + rank, mini_steps=2, samples=8 * (rank + 1), dropped=rank, unreported_samples=8)
    workers.collect(meter)
    parameters = [torch.nn.Parameter(torch.full((3,), float(rank)))]
    seen = [workers.agree(parameters, epoch=5 * (1 - rank), stop=False)]
    values = [parameters[0].tolist()]
    seen.append(workers.agree(parameters, epoch=5 * (1 - rank), stop=rank == 1))
    with torch.no_grad():
        parameters[0].add_(4.0)  # what rank 1 does to its parameters does not count
    seen.append(workers.agree(parameters, epoch=5 * (1 - rank), stop=False))
    values.append(parameters[0].tolist())
    seen.append(workers.agree(parameters, epoch=6 * (1 - rank), stop=False))
    seed = workers.share_bytes(b"\x00id\xff" if rank == 0 else b"")
    return vars(meter), seen, values, seed


def test_two_processes_agree_and_the_second_follows():
    (main_meter, main_seen, main_values, main_seed), (meter, seen, values, seed) = in_two_processes(exchange)
    assert (main_meter["loss"], main_meter["mini_steps"], main_meter["samples"]) == (4.0, 4, 24)
    assert (main_meter["dropped"], main_meter["unreported_samples"]) == (1, 16)
    assert set(meter.values()) == {0}
    # parameters follow at first, after they have changed and with each epoch, and any rank may ask to stop
    assert main_seen == seen == [
        (5, False, [0.0, 0.0]), (5, True, []), (5, False, [12.0, 12.0]), (6, False, [12.0, 12.0])
    ]  # fmt: skip
    assert main_values == values == [[0.0] * 3, [4.0] * 3]
    assert main_seed == seed == b"\x00id\xff"


def torchrun(*arguments) -> list[str]:
    return ["torch.distributed.run", f"--nproc_per_node={RANKS}", f"--master_port={free_port()}", "run_trainer.py",
            *arguments]  # fmt: skip


def test_rank_that_does_not_find_what_the_first_one_keeps_says_so(tmp_path):
    port = free_port()
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    store.set(SETTINGS_KEY, "0" * 64)
    rank = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    result = subprocess.run(
        [sys.executable, "run_trainer.py", "--run_id", "test", "--output_dir", str(tmp_path)], cwd=REPOSITORY,
        env={**os.environ, **ONE_THREAD, **rank}, text=True, capture_output=True, timeout=200, check=False,
    )  # fmt: skip
    assert result.returncode == 2 and result.stderr == (
        f"run_trainer.py: error: {tmp_path}/test/run does not hold the settings that rank 0 keeps: give all ranks the "
        "same --output_dir\n"
    )


def program_of(peer, *, rank: int) -> psutil.Process:
    """The process below a rank's supervisor, which torchrun has started."""
    supervisors = psutil.Process(peer.process.pid).children()
    (supervisor,) = (process for process in supervisors if process.environ().get("RANK") == str(rank))
    (program,) = supervisor.children()
    return program


@pytest.mark.timeout(600)
def test_two_ranks_and_a_second_peer_train_together_and_end_together(tmp_path):
    flags = [*swarm_arguments(tmp_path, target_batch_size=768, total_steps=10_000), *TRAINER.split()]
    run = tmp_path / "outputs" / "test"
    with ending_all(set()) as processes, LocalSwarm(echo=False, environment=ONE_THREAD) as swarm:
        ranks = swarm.start("ranks", "-m", torchrun(*flags))
        single = swarm.start("single", "run_trainer.py", flags)
        for peer in (ranks, single):
            peer.wait_for_line(r"(?s)(averaged with 2 peers.*){3}", timeout=150)
        processes.update(family(ranks))
        single.stop()
        # a dying rank ends the others
        program_of(ranks, rank=1).kill()
        asked = time.monotonic()
        assert ranks.process.wait(60) != 0
        assert time.monotonic() - asked < 40
        assert not still_alive(processes, timeout=10)
    assert "another process of this peer has ended" in ranks.output()
    assert "Traceback" not in ranks.output().split("another process")[0]

    of_ranks, of_single = (read_journal(run / name / "metrics.jsonl") for name in ("trainer", "trainer-2"))
    epochs = [record for record in of_ranks if record["event"] == "epoch"]
    assert len(epochs) >= 3
    for record in epochs:
        counted = record["samples"] + record["dropped_samples"]  # one that takes the other's state gives up a batch
        assert counted == record["local_steps"] * BATCH * RANKS, "the samples of both ranks"
        assert math.isfinite(record["loss"]) and 4 < record["mlm_loss"] < 9
    for record in of_single:
        assert (
            record["event"] != "epoch" or record["samples"] + record["dropped_samples"] == record["local_steps"] * BATCH
        )
    checked = {record["epoch"]: record["checksums"] for record in of_ranks if record["event"] == "local_workers"}
    followed, last = set(checked), epochs[-1]["epoch"]
    # within the last epoch the other rank may have been killed before it could follow
    assert followed | {last} >= {record["epoch"] for record in epochs}, "parameters followed within every epoch"
    for record in of_ranks:
        if record["event"] == "local_workers":
            assert len(record["checksums"]) == RANKS and len(set(record["checksums"])) == 1, record
    assert len({tuple(checksums) for checksums in checked.values()}) >= 3, "they do change"
    assert read_backup(run / "trainer" / "backup.pth")["epoch"] == epochs[-1]["epoch"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl+C to the group", "SIGTERM to torchrun"])
def test_ranks_end_in_order_when_their_launcher_is_asked_to(tmp_path, number):
    flags = [*swarm_arguments(tmp_path, target_batch_size=128, total_steps=10_000), *TRAINER.split()]
    with ending_all(set()) as processes:
        ranks = LocalPeer("ranks", "-m", torchrun(*flags, "--host_maddrs", "/ip4/127.0.0.1/tcp/0"), echo=False,
                          environment=ONE_THREAD, own_session=True)  # fmt: skip
        processes.add(psutil.Process(ranks.process.pid))
        ranks.wait_for_line(r"epoch 2/", timeout=150)
        processes.update(family(ranks))
        asked = time.monotonic()
        if number == signal.SIGINT:
            os.killpg(ranks.process.pid, number)  # a terminal sends it to all of them
        else:
            ranks.process.send_signal(number)
        ranks.process.wait(60)
        assert not still_alive(processes, timeout=10)
        assert time.monotonic() - asked < 30
    run = tmp_path / "outputs" / "test" / "trainer"
    last = [record["epoch"] for record in read_journal(run / "metrics.jsonl") if record["event"] == "epoch"][-1]
    assert read_backup(run / "backup.pth")["epoch"] >= last >= 2
    assert "leaving the swarm" in ranks.output()
