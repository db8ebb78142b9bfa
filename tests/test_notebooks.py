"""The notebooks run from their first cell to the last: one joins a swarm on loopback, the other looks at data."""

import json
import re
from pathlib import Path

import nbclient
import nbformat
import pytest

from src import LeanAlbertConfig, LeanAlbertForPreTraining, load_tokenizer
from src.metrics.journal import read_journal
from src.process.local_swarm import LocalSwarm

REPOSITORY = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
MODEL = {
    "model_type": "lean_albert", "vocab_size": 4000, "embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
SHARED = """
--target_batch_size 1024 --learning_rate 5e-3 --warmup_steps 2 --num_zero_lr_steps 0 --total_steps 3
--matchmaking_time 2 --next_chunk_timeout 20 --averaging_timeout 60 --average_state_every 2 --min_vector_size 1000
--max_sequence_length 64 --initial_sequence_length 64 --sequence_length_warmup_steps 0 --pad_to_multiple_of 8
--delay_optimizer_step False --delay_grad_averaging False
--tokenizer_path @demo/tokenizer --dataset_sources @demo/corpus/*.txt
"""


def run_notebook(name: str, folder: Path, monkeypatch, **variables: str) -> str:
    """Execute a notebook in `folder` of the repository; returns what its cells have printed."""
    for key, value in {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", **variables}.items():
        monkeypatch.setenv(key, value)
    notebook = nbformat.read(REPOSITORY / "notebooks" / name, as_version=4)
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    texts = [output.get("text", "") or str(output.get("data", {}).get("text/html", "")) for output in outputs]
    return "\n".join(texts)


@pytest.mark.swarm
@pytest.mark.timeout(420)
def test_notebook_joins_a_swarm_as_a_client(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    shared = [*SHARED.split(), "--model_config_path", str(tmp_path / "config.json"), "--output_dir", str(tmp_path)]
    with LocalSwarm(echo=False, environment={"OMP_NUM_THREADS": "1"}) as swarm:
        full = ["--run_id", "swarm", *shared, "--per_device_train_batch_size", "4", "--wait_for_peers", "2"]
        trainer = swarm.start("trainer", "run_trainer.py", full)
        printed = run_notebook(
            "join_the_swarm.ipynb", REPOSITORY / "notebooks", monkeypatch, RUN_ID="swarm",
            INITIAL_PEERS=" ".join(swarm.initial_peers), TEXT="@demo/corpus/*.txt", BATCH_SIZE="4", ACCUMULATION="1",
            MACHINE_FLAGS=f"--wait_for_peers 2 --output_dir {tmp_path / 'own'}",
        )  # fmt: skip
        assert trainer.process.wait(60) == 0, trainer.output()
    assert "working in" in printed and "--client_mode" in printed
    assert "epoch 3/3" in printed, printed
    assert re.search(r"\d epochs, \d+ samples computed here: thank you!", printed)
    records = read_journal(tmp_path / "own" / "swarm" / "trainer" / "metrics.jsonl")
    rounds = [record for record in records if record["event"] == "round" and record["kind"] == "gradients"]
    assert any(record["complete"] for record in rounds), "it never averaged with the trainer that was there"


@pytest.mark.timeout(300)
def test_notebook_shows_data_and_predictions(tmp_path, monkeypatch):
    LeanAlbertForPreTraining(LeanAlbertConfig(**MODEL)).save_pretrained(tmp_path)
    load_tokenizer(REPOSITORY / "demo" / "tokenizer").save_pretrained(tmp_path)
    printed = run_notebook("look_at_the_data.ipynb", REPOSITORY, monkeypatch, CHECKPOINT=str(tmp_path))
    shares = [float(share) for share in re.search(r"([\d.]+)% of the tokens .* ([\d.]+)% of these", printed).groups()]
    assert 13 < shares[0] < 17 and 75 < shares[1] < 85
    assert "256 instances" in printed and "background:#ffe08a" in printed
    assert re.search(r"\d+ masked tokens: [\d.]+% right", printed)
    assert "<th>predicted</th>" in printed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and not cell.get("execution_count")
        assert not re.search(r"(?<![\w.])/(home|root|work|Users|mnt|tmp)/", cell.source)
    assert "os.environ.get(" in notebook.cells[1].source, "the settings stand at the top"


def test_notebook_without_an_address_says_so(monkeypatch):
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="fill in RUN_ID and INITIAL_PEERS"):
        run_notebook("join_the_swarm.ipynb", REPOSITORY, monkeypatch)
