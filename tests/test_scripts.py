"""The scripts as a person starts them: their help, and one clear line, code 2 and no process left for each mistake."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch

from arguments import AuxiliaryPeerArguments, CollaborationArguments, HFTrainerArguments, TrainerPeerArguments

REPOSITORY = Path(__file__).resolve().parents[1]
TIMEOUT = 240
UNREACHABLE = "/ip4/127.0.0.1/tcp/9/p2p/QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC"
SMALL = [
    *("--run_id", "scripts", "--target_batch_size", "8", "--matchmaking_time", "1", "--averaging_timeout", "5"),
    *("--next_chunk_timeout", "2"),
    *("--max_sequence_length", "64", "--initial_sequence_length", "64", "--pad_to_multiple_of", "8"),
]
MODEL = {
    "model_type": "lean_albert", "vocab_size": 4000, "embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip


def run(script: str, arguments: list, folder: Path) -> subprocess.CompletedProcess:
    """Run a script in ``folder``; its processes are recognised by a variable in their environment."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SCRIPTS_TEST": str(folder)}
    command = [sys.executable, str(REPOSITORY / script), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT)


def left_behind(folder: Path) -> list[psutil.Process]:
    """Processes that were started, directly or not, by `run` in ``folder`` and still live."""
    processes = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SCRIPTS_TEST") == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
        except psutil.Error:
            continue
    return processes


@pytest.mark.parametrize(
    ("script", "kind"), [("run_trainer.py", TrainerPeerArguments), ("run_aux_peer.py", AuxiliaryPeerArguments)]
)
@pytest.mark.timeout(TIMEOUT + 60)
def test_scripts_help_lists_every_own_flag_with_its_default(script, kind, tmp_path):
    result = run(script, ["--help"], tmp_path)
    assert result.returncode == 0, result.stderr
    text = " ".join(result.stdout.partition("options:")[2].split())
    sections = {part.split()[0].rstrip(","): part for part in text.split(" --") if part.strip()}
    hidden = {"logging_steps", "logging_nan_inf_filter", "save_strategy", "disable_tqdm", "remove_unused_columns"}
    for arguments in (kind, CollaborationArguments, HFTrainerArguments):
        own = {name for base in arguments.__mro__ if base.__module__ == "arguments" for name in base.__annotations__}
        for name in own - hidden - {"optim"}:
            assert name in sections, f"--{name}"
            assert "(default: " in text.partition(f"--{name} ")[2], f"--{name}"
    assert "logging_first_step" not in text, "transformers' own flags would bury ours"
    assert left_behind(tmp_path) == []


# -- mistakes ---------------------------------------------------------------------------------------------------------


def small_model(folder: Path) -> list:
    (folder / "small.json").write_text(json.dumps(MODEL), encoding="utf-8")
    return ["--model_config_path", folder / "small.json"]


def missing_config(folder):
    return ["--model_config_path", folder / "nowhere.json"], ["--model_config_path", "nowhere.json"]


def missing_tokenizer(folder):
    return ["--tokenizer_path", folder / "nowhere"], ["tokenizer", "nowhere"]


def large_tokenizer(folder):
    (folder / "config.json").write_text(json.dumps({**MODEL, "vocab_size": 100}), encoding="utf-8")
    return ["--model_config_path", folder / "config.json"], ["4000 tokens", "vocab_size", "100"]


def bad_address(folder):
    return ["--initial_peers", "203.0.113.5:31337"], ["--initial_peers", "203.0.113.5:31337", "multiaddress"]


def unreachable_peer(folder):
    return ["--initial_peers", UNREACHABLE], ["--initial_peers", UNREACHABLE]


def empty_source(folder):
    (folder / "empty.txt").write_text("\n\n")
    return ["--dataset_sources", folder / "empty.txt"], ["empty.txt", "no text"]


def unreadable_source(folder):
    (folder / "windows.txt").write_bytes("Привет, мир. ".encode("cp1251") * 50)
    return ["--dataset_sources", folder / "windows.txt"], ["windows.txt", "not UTF-8"]


def truncated_state(folder):
    torch.save({"model": {"x": torch.zeros(1000)}, "optimizer": {}, "scheduler": {}, "epoch": 1}, folder / "state.pth")
    (folder / "state.pth").write_bytes((folder / "state.pth").read_bytes()[:2000])
    return [*small_model(folder), "--state_path", folder / "state.pth"], ["--state_path", "state.pth", "truncated"]


def state_of_another_model(folder):
    state = {"model": {"albert.foreign.weight": torch.zeros(3)}, "optimizer": {}, "scheduler": {}, "epoch": 1}
    torch.save(state, folder / "state.pth")
    named = ["state.pth", "albert.embeddings.word_embeddings.weight", "albert.foreign.weight"]
    return [*small_model(folder), "--state_path", folder / "state.pth"], named


TRAINER_MISTAKES = [missing_config, missing_tokenizer, large_tokenizer, bad_address, unreachable_peer, empty_source,
                    unreadable_source, truncated_state, state_of_another_model]  # fmt: skip
AUXILIARY_MISTAKES = [missing_config, bad_address]


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    """Every mistake made once, two at a time: {(script, name): (result, folder, files before, words to find)}."""
    outcomes = {}

    def make(script, mistake):
        folder = tmp_path_factory.mktemp(mistake.__name__)
        arguments, words = mistake(folder)
        before = {path: path.read_bytes() for path in folder.iterdir()}
        result = run(script, [*SMALL, *arguments], folder)
        outcomes[script, mistake.__name__] = result, folder, before, words

    cases = [("run_trainer.py", mistake) for mistake in TRAINER_MISTAKES]
    cases += [("run_aux_peer.py", mistake) for mistake in AUXILIARY_MISTAKES]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda case: make(*case), cases))
    return outcomes


def assert_refused(script, result, folder, words):
    lines = result.stderr.splitlines()
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(f"{script}: error: ")
    for word in words:
        assert word in lines[0]
    assert left_behind(folder) == []


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mistake", TRAINER_MISTAKES, ids=lambda mistake: mistake.__name__)
def test_scripts_trainer_explains_a_mistake_in_one_line(mistakes, mistake):
    result, folder, before, words = mistakes["run_trainer.py", mistake.__name__]
    assert_refused("run_trainer.py", result, folder, words)
    for path, content in before.items():
        assert path.read_bytes() == content, path
    assert "started run" not in result.stdout


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mistake", AUXILIARY_MISTAKES, ids=lambda mistake: mistake.__name__)
def test_scripts_auxiliary_peer_explains_a_mistake_in_one_line(mistakes, mistake):
    result, folder, _, words = mistakes["run_aux_peer.py", mistake.__name__]
    assert_refused("run_aux_peer.py", result, folder, words)


@pytest.mark.timeout(TIMEOUT + 60)
def test_scripts_explain_that_a_port_is_taken(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        result = run("run_trainer.py", [*SMALL, *small_model(tmp_path), "--host_maddrs", address], tmp_path)
    assert_refused("run_trainer.py", result, tmp_path, ["--host_maddrs", address, "taken"])


def test_scripts_are_in_the_root_and_import_nothing_heavy_at_the_top():
    # the supervising parent process should stay small
    code = "import sys, runpy; runpy.run_path(sys.argv[1], run_name='x'); assert 'hivemind' not in sys.modules"
    for script in ("run_trainer.py", "run_aux_peer.py"):
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        subprocess.run([sys.executable, "-c", code, str(REPOSITORY / script)], env=environment, check=True, timeout=120)
