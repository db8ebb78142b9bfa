"""The scripts as a person starts them: their help, and one clear line, code 2 and no process left for each mistake."""

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from arguments import AuxiliaryPeerArguments, CollaborationArguments, HFTrainerArguments, TrainerPeerArguments
from tests import warm_start

REPOSITORY = Path(__file__).resolve().parents[1]
TIMEOUT = 240
SMALL = [
    *("--run_id", "scripts", "--target_batch_size", "8", "--matchmaking_time", "1", "--averaging_timeout", "5"),
    *("--next_chunk_timeout", "2"),
    *("--max_sequence_length", "64", "--initial_sequence_length", "64", "--pad_to_multiple_of", "8"),
    *("--model_config_path", "@demo/config.json", "--dataset_sources", "@demo/corpus/*.txt"),
]


def run(script: str, arguments: list, folder: Path) -> subprocess.CompletedProcess:
    """Run a script in ``folder``; its processes are recognised by a variable in their environment."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SCRIPTS_TEST": str(folder), warm_start.COLD: "1"}
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
    hidden = {"logging_steps", "logging_nan_inf_filter", "save_strategy", "disable_tqdm", "remove_unused_columns",
              "ddp_timeout"}  # fmt: skip
    for arguments in (kind, CollaborationArguments, HFTrainerArguments):
        own = {name for base in arguments.__mro__ if base.__module__ == "arguments" for name in base.__annotations__}
        for name in own - hidden - {"optim"}:
            assert name in sections, f"--{name}"
            assert "(default: " in re.split(rf"--{name}[ ,]", text, maxsplit=1)[1], f"--{name}"
    assert "logging_first_step" not in text, "transformers' own flags would bury ours"
    assert left_behind(tmp_path) == []


def listed_flags(text: str) -> dict[str, tuple[str, str]]:
    """{flag: (heading it stands under, its text)} of what --help prints."""
    flags, heading, flag = {}, "", None
    for line in text.splitlines():
        if line and not line.startswith(" ") and line.endswith(":"):
            heading, flag = line.rstrip(":"), None
        elif found := re.match(r"  (?:-\w(?: \w+)?, )?(--[\w-]+)", line):
            flag = found[1]
            flags[flag] = heading, line
        elif flag and line.startswith("   "):
            flags[flag] = heading, f"{flags[flag][1]} {line.strip()}"
    return flags


@pytest.mark.parametrize("script", ["run_trainer.py", "run_aux_peer.py", "finetune_mlm.py", "predict_on_lidirus.py"])
@pytest.mark.timeout(TIMEOUT + 60)
def test_scripts_help_has_topics_and_for_each_flag_a_sentence_and_its_default(script, tmp_path):
    result = run(script, ["--help"], tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    flags = listed_flags(result.stdout)
    flags.pop("--help")
    assert len(flags) >= 4
    assert len({heading for heading, _ in flags.values()}) >= (6 if script.startswith("run_") else 2)
    for flag, (heading, text) in flags.items():
        assert heading not in ("", "options", "more"), f"{flag}: give it a topic in arguments.py"
        assert "(default: " in text or "(required" in text, f"{flag}: its default is not said"
        words = re.sub(r"\(default: .*?\)|--[\w-]+|[A-Z_]{2,}", "", text).split()
        assert len(words) >= 2, f"{flag}: no sentence"


# -- mistakes: the table is in test_bad_input.py ----------------------------------------------------------------------


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
