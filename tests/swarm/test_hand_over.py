"""A run's name, an address and one's own text are enough to join: with an auxiliary peer alone, under torchrun, in a
private run; and whatever does not fit is refused in one line."""

import os
import subprocess
import sys
from unittest.mock import Mock

import pytest

from src.access.organiser import make_parser
from src.access.organiser import run as organise
from src.metrics.journal import read_journal
from src.process.local_swarm import REPOSITORY, LocalPeer, LocalSwarm, free_port
from src.swarm import join
from tests.settings.test_manifest import manifest_of_demo
from tests.swarm.test_join import ONE_THREAD

pytestmark = pytest.mark.swarm

TEXT = ["--dataset_sources", str(REPOSITORY / "demo" / "corpus" / "city.txt")]
LOOPBACK = ["--host_maddrs", "/ip4/127.0.0.1/tcp/0"]
DIVERGENT = ["--learning_rate", "0.5"]


def newcomer(folder, *flags) -> list[str]:
    return ["--run_id", "demo", *TEXT, "--output_dir", str(folder), *flags]


def ended(*arguments, script="run_trainer.py") -> tuple[int, str]:
    """Exit code and output of a program that ends by itself."""
    result = subprocess.run(
        [sys.executable, script, *LOOPBACK, *arguments], cwd=REPOSITORY, env={**os.environ, **ONE_THREAD}, text=True,
        capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    return result.returncode, result.stdout + result.stderr


def settings_in(folder) -> bytes:
    return (folder / "demo" / "run" / "run.json").read_bytes()


@pytest.mark.timeout(900)
def test_newcomer_needs_a_name_an_address_and_text(tmp_path):
    with LocalSwarm(echo=False, environment=ONE_THREAD) as swarm:
        swarm.start("aux", "run_aux_peer.py", ["@demo/aux.args", "--output_dir", str(tmp_path / "aux")])
        joining = ["--initial_peers", *swarm.initial_peers]
        code, output = ended("--check", *newcomer(tmp_path / "check", *joining))
        assert code == 0 and "took the settings of run demo" in output and "READY" in output, output
        assert not (tmp_path / "check").exists()
        code, output = ended(*newcomer(tmp_path / "new", *joining, *DIVERGENT))
        assert code == 2 and "--learning_rate is 0.5 here and 0.01 in the run" in output, output
        code, output = ended("--run_id", "demo", "--output_dir", str(tmp_path / "new"), *joining)
        assert code == 2 and "--dataset_sources is missing: this run names no data sets" in output, output
        trainer = swarm.start("new", "run_trainer.py", newcomer(tmp_path / "new"))
        trainer.wait_for_line(r"epoch 1/100", timeout=200)
        assert settings_in(tmp_path / "new") == settings_in(tmp_path / "aux")
        # it hands over what it has taken
        address = trainer.wait_for_line(r"--initial_peers (/ip4/127\S+)").group(1)
        second = ["--run_id", "demo", "--output_dir", str(tmp_path / "aux 2"), "--initial_peers", address, *LOOPBACK]
        helper = LocalPeer("aux 2", "run_aux_peer.py", second, echo=False, environment=ONE_THREAD)
        swarm.peers.append(helper)
        helper.wait_for_line(r"this auxiliary peer listens", timeout=200)
        assert settings_in(tmp_path / "aux 2") == settings_in(tmp_path / "aux")
    # nobody is left to ask
    code, output = ended(*newcomer(tmp_path / "new", "--total_steps", "50"))
    assert code == 2 and "--total_steps is 50 here and 100 in the run" in output, output
    with LocalSwarm(echo=False, environment=ONE_THREAD) as swarm:
        again = swarm.start("again", "run_trainer.py", newcomer(tmp_path / "new"))
        assert "goes on with the settings of run demo in" in again.output() and "resumed from" in again.output()


@pytest.mark.parametrize("manifest", [None, manifest_of_demo()])
def test_others_wait_for_new_settings_only(monkeypatch, tmp_path, manifest):
    """A peer of a large model takes minutes to start again; whoever joins meanwhile is not kept waiting."""
    calls = []

    def stop(*arguments, **options):
        raise InterruptedError

    monkeypatch.setattr(join, "start_dht", lambda peer, identity: ("node", b"key"))
    monkeypatch.setattr(join, "load_identity", lambda peer: None)
    monkeypatch.setattr(join, "let_others_wait", lambda dht: calls.append("wait"))
    monkeypatch.setattr(join, "hand_over", lambda dht, folder, manifest: calls.append(manifest))
    monkeypatch.setattr(join, "make_run_card", stop)
    monkeypatch.setattr(join, "leave_to_owner", lambda tensors: None)
    entry, model = join.Entry(tmp_path, {}, manifest), Mock()
    with pytest.raises(InterruptedError):
        join.join_run(model, None, {}, entry=entry, peer=None, trainer=True, say=print)
    assert calls == [manifest or "wait"]


@pytest.mark.timeout(600)
def test_initial_peers_that_disagree_are_named(tmp_path):
    addresses = []
    with LocalSwarm(echo=False, environment=ONE_THREAD) as one, LocalSwarm(echo=False, environment=ONE_THREAD) as two:
        for swarm, flags in ((one, []), (two, DIVERGENT)):
            directory = ["--output_dir", str(tmp_path / f"run {len(addresses)}")]
            swarm.start("aux", "run_aux_peer.py", ["@demo/aux.args", *flags, *directory])
            addresses += swarm.initial_peers
        code, output = ended(*newcomer(tmp_path / "new"), "--initial_peers", *addresses)
    assert code == 2 and "--initial_peers disagree about the run: --learning_rate is 0." in output, output
    assert all(address.rsplit("/", 1)[1] in output for address in addresses)
    assert not (tmp_path / "new" / "demo" / "run").exists()


@pytest.mark.timeout(600)
def test_both_ranks_under_torchrun_take_what_the_first_one_has_fetched(tmp_path):
    with LocalSwarm(echo=False, environment=ONE_THREAD) as swarm:
        swarm.start("aux", "run_aux_peer.py", ["@demo/aux.args", "--output_dir", str(tmp_path / "aux")])
        launch = ["torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}", "run_trainer.py"]
        ranks = swarm.start("ranks", "-m", [*launch, *newcomer(tmp_path / "new")])
        ranks.wait_for_line(r"epoch 1/100", timeout=250)
        assert ranks.output().count("took the settings of run demo") == 1
    assert settings_in(tmp_path / "new") == settings_in(tmp_path / "aux")


def organised(access, *settings: str, names=("aux", "ivan")) -> dict[str, list[str]]:
    """A private run in the folder ``access``: the flags of each member."""
    for command in (["init", "demo"], *(["issue", "demo", name] for name in names), ["sign", "demo", *settings]):
        organise(make_parser().parse_args(["--directory", str(access), *command]))
    return {name: ["--authorize", str(access / "demo" / f"{name}.token")] for name in names}


@pytest.mark.timeout(600)
def test_members_of_a_private_run_take_what_its_organiser_has_signed(tmp_path, capsys):
    access = tmp_path / "access"
    tokens = organised(access, "@demo/swarm.args")
    assert "settings: put a copy of this folder beside the token" in capsys.readouterr().out
    with LocalSwarm(echo=False, environment=ONE_THREAD) as swarm:
        swarm.start(
            "aux", "run_aux_peer.py", ["--run_id", "demo", "--output_dir", str(tmp_path / "aux"), *tokens["aux"]]
        )
        trainer = swarm.start("ivan", "run_trainer.py", newcomer(tmp_path / "new", *tokens["ivan"]))
        assert "took the settings of run demo" in trainer.output()
    assert (tmp_path / "new" / "demo" / "run" / "signature").read_bytes()
    # unsigned settings, as an open run has them, are refused
    (access / "demo" / "settings" / "signature").unlink()
    code, output = ended(*newcomer(tmp_path / "other", *tokens["ivan"]))
    assert code == 2 and "the run's organiser has not signed this" in output, output


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_members_of_a_private_run_make_local_steps_together(tmp_path):
    epochs, settings = 5, tmp_path / "local.args"
    settings.write_text(f"@demo/swarm.args\n--local_batch_size 32 --total_steps {epochs} --warmup_steps 2\n")
    tokens = organised(tmp_path / "access", f"@{settings}", names=("aux", "ivan", "olga"))
    with LocalSwarm(echo=False, environment=ONE_THREAD) as swarm:
        flags = ["--run_id", "demo", "--output_dir", str(tmp_path / "aux"), "--assist_in_averaging", *tokens["aux"]]
        swarm.start("aux", "run_aux_peer.py", flags)
        trainers = [
            swarm.start(name, "run_trainer.py", newcomer(tmp_path / name, *tokens[name], "--wait_for_peers", "2"))
            for name in ("ivan", "olga")
        ]
        for trainer in trainers:
            assert trainer.process.wait(300) == 0, trainer.output()
    for name in ("ivan", "olga"):
        records = read_journal(tmp_path / name / "demo" / "trainer" / "metrics.jsonl")
        ended_epochs = [record for record in records if record["event"] == "epoch"]
        rounds = [record for record in records if record["event"] == "round" and record["kind"] == "gradients"]
        assert [record["epoch"] for record in ended_epochs] == list(range(1, epochs + 1))
        assert sum(record["inner_steps"] for record in ended_epochs) >= epochs, "its own optimizer has stepped"
        assert len(rounds) >= epochs - 1 and all(record["complete"] for record in rounds[1:]), rounds
