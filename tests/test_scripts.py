"""The scripts as a person starts them: their help, and one clear line, code 2 and no process left for each mistake."""

import json
import os
import socket
import subprocess
import sys
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


def port_taken(folder, taken):
    address = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
    return [*small_model(folder), "--host_maddrs", address], ["--host_maddrs", address, "taken"]


TRAINER_MISTAKES = [
    missing_config, missing_tokenizer, large_tokenizer, bad_address, unreachable_peer, port_taken, empty_source,
    unreadable_source, truncated_state, state_of_another_model,
]  # fmt: skip
AUXILIARY_MISTAKES = [missing_config, bad_address]


# Runs a script once for each case, in a fork of a program that has imported the libraries, which takes seconds.
WARM = """
import json, os, runpy, sys
import torch, transformers, hivemind, datasets, bitsandbytes, huggingface_hub
from transformers import HfArgumentParser, PrinterCallback, Trainer, TrainingArguments
for script, arguments, folder in json.load(sys.stdin):
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.chdir(folder)
        for descriptor, name in ((1, "stdout.log"), (2, "stderr.log")):
            os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY), descriptor)
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with open(os.path.join(folder, "code.log"), "w") as file:
        file.write(str(code))
"""


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    """Every mistake made once: {(script, name): (code, stdout, stderr, changed files, words to find)}, and a folder."""
    root = tmp_path_factory.mktemp("mistakes")
    cases = {}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for script, name in [*(("run_trainer.py", mistake.__name__) for mistake in TRAINER_MISTAKES),
                             *(("run_aux_peer.py", mistake.__name__) for mistake in AUXILIARY_MISTAKES)]:  # fmt: skip
            folder = root / f"{script}-{name}"
            folder.mkdir()
            arguments, words = globals()[name](folder, *([taken] if name == "port_taken" else []))
            before = {path: path.read_bytes() for path in folder.iterdir()}
            cases[script, name] = folder, [*SMALL, *map(str, arguments)], words, before
        orders = [(str(REPOSITORY / script), arguments, str(folder))
                  for (script, _), (folder, arguments, *_) in cases.items()]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "SCRIPTS_TEST": str(root), "PYTHONPATH": str(REPOSITORY)}
        subprocess.run([sys.executable, "-c", WARM], input=json.dumps(orders), text=True, env=environment, check=True,
                       timeout=900)  # fmt: skip
    outcomes = {}
    for key, (folder, _, words, before) in cases.items():
        code, out, err = ((folder / f"{name}.log").read_text() for name in ("code", "stdout", "stderr"))
        changed = [path.name for path, content in before.items() if path.read_bytes() != content]
        outcomes[key] = int(code), out, err, changed, words
    return outcomes, root


@pytest.mark.timeout(1000)
@pytest.mark.parametrize(
    ("script", "mistake"),
    [*(("run_trainer.py", mistake) for mistake in TRAINER_MISTAKES),
     *(("run_aux_peer.py", mistake) for mistake in AUXILIARY_MISTAKES)],
)  # fmt: skip
def test_scripts_explain_a_mistake_in_one_line(mistakes, script, mistake):
    code, out, err, changed, words = mistakes[0][script, mistake.__name__]
    assert code == 2, err
    assert len(err.splitlines()) == 1, err
    assert err.startswith(f"{script}: error: ")
    for word in words:
        assert word in err
    assert changed == []
    assert "others join" not in out
    assert "listens on" not in out


@pytest.mark.timeout(1000)
def test_scripts_leave_no_process_behind_after_mistakes(mistakes):
    assert left_behind(mistakes[1]) == []


@pytest.mark.timeout(TIMEOUT + 60)
def test_scripts_explain_a_mistake_when_started_cold(tmp_path):
    result = run("run_trainer.py", [*SMALL, "--tokenizer_path", tmp_path / "nowhere"], tmp_path)
    assert (result.returncode, result.stdout, left_behind(tmp_path)) == (2, "", [])
    assert result.stderr.startswith("run_trainer.py: error: ")
    assert result.stderr.count("\n") == 1


def test_scripts_import_hivemind_only_in_the_supervised_child():
    # the supervising parent process should stay small
    code = "import sys, runpy; runpy.run_path(sys.argv[1], run_name='x'); assert 'hivemind' not in sys.modules"
    for script in ("run_trainer.py", "run_aux_peer.py"):
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        subprocess.run([sys.executable, "-c", code, str(REPOSITORY / script)], env=environment, check=True, timeout=120)
