"""Who starts a swarm and joins it by the very commands of a page trains the recipe that it names, averaged with others.

The commands are taken from the pages as they stand. Replaced are addresses, ports and the size of the tokenizer, for
which a test has too little text; added are flags that make an epoch short. Texts and tokenizer lie in the folder where
the commands are given, as the pages say.
"""

import contextlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from src.metrics.journal import read_journal
from src.process.local_swarm import REPOSITORY, LocalPeer, free_port
from tests.test_readme import TOO_LARGE, normalise, read_blocks, split_commands

pytestmark = pytest.mark.swarm

# (page that starts a swarm, page that joins it)
PAGES = [
    ("README.md", "README.md"),
    pytest.param("docs/swarm.md", "docs/join.md", marks=pytest.mark.slow),
    ("docs/ru/operator.md", "docs/ru/volunteer.md"),
]
SHORT = """
--target_batch_size 4 --per_device_train_batch_size 2 --initial_sequence_length 32 --max_sequence_length 32
--total_steps 1000 --warmup_steps 1 --next_chunk_timeout 60 --averaging_timeout 150 --output_dir outputs
"""


def commands(page: str) -> list[list[str]]:
    """What a page tells to type, block by block."""
    blocks = [block for block in read_blocks(REPOSITORY / page) if block.language == "bash"]
    return [words for block in blocks for words in map(normalise, split_commands(block.text)) if words]


def first(page: str, *beginning: str, without: str = "--check") -> list[str]:
    found = [words for words in commands(page) if words[: len(beginning)] == [*beginning] and without not in words]
    assert found, f"{page} has no command {' '.join(beginning)}"
    return found[0][1:]


def adapt(words: list[str], variables: dict[str, str]) -> list[str]:
    """The words as the shell would make them, on loopback and with a tokenizer that the test's texts allow."""
    found = []
    for word in words:
        word = re.sub(r"\$(\w+)", lambda match: variables[match[1]], TOO_LARGE.get(word, word))
        word = re.sub(r"^/ip4/0\.0\.0\.0/tcp/\d+$", f"/ip4/127.0.0.1/tcp/{variables['PORT']}", word)
        found += word.split() if word == variables.get("INITIAL_PEERS") else [word]
    return found


def start(name: str, script: str, arguments: list[str], folder: Path) -> LocalPeer:
    return LocalPeer(
        name, str(REPOSITORY / script), [*arguments, *SHORT.split()], echo=False, environment={"OMP_NUM_THREADS": "1"},
        prefix=["env", "-C", str(folder)],
    )  # fmt: skip


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("page_that_starts", "page_that_joins"), PAGES, ids=["README.md", "docs/swarm.md", "docs/ru/operator.md"]
)
def test_commands_of_the_pages_lead_to_an_averaged_epoch(tmp_path, page_that_starts, page_that_joins):
    for folder in ("texts", "heldout"):
        shutil.copytree(REPOSITORY / "demo" / "corpus", tmp_path / folder)
    variables = {"MY_IP": "127.0.0.1", "PORT": str(free_port()), "BANDWIDTH": "100"}
    make_tokenizer = adapt(first(page_that_starts, "python", "-m", "tasks.mlm.train_tokenizer"), variables)
    subprocess.run(
        ["env", "-C", tmp_path, f"PYTHONPATH={REPOSITORY}", sys.executable, *make_tokenizer],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:

        def run(name: str, page: str, script: str) -> LocalPeer:
            _, *arguments = adapt(first(page, "python", script), variables)
            peer = start(name, script, arguments, tmp_path)
            stack.callback(peer.stop, timeout=60)
            return peer

        auxiliary = run("aux", page_that_starts, "run_aux_peer.py")
        address = auxiliary.wait_for_line(r"--initial_peers (\S+)", timeout=200)[1]
        for number in (1, 2):
            variables |= {"INITIAL_PEERS": address, "PORT": str(free_port())}
            trainer = run(f"trainer {number}", page_that_joins, "run_trainer.py")
        trainer.wait_for_line(r"averaged with [23] peers", timeout=400)
    journal = read_journal(tmp_path / "outputs" / "my-exp" / "trainer-2" / "metrics.jsonl")
    rounds = [record for record in journal if record["event"] == "round" and record["kind"] == "gradients"]
    assert any(record["complete"] and record["num_peers"] >= 2 for record in rounds), rounds
    assert journal[0]["arguments"]["dataset_sources"] == ["texts/*.txt"]
    assert journal[0]["arguments"]["learning_rate"] == 5e-3, "the recipe's"
