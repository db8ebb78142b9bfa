import itertools
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from arguments import DEMO, HFTrainerArguments, PeerArguments, TrainerPeerArguments
from src.models import load_tokenizer
from tasks.mlm.task import build_data, build_model


@pytest.mark.parametrize("level", ["lean", "checkpoint"])
def test_activation_memory_of_the_command_line_reaches_every_block(level):
    demo = {"model_config_path": str(DEMO / "config.json"), "tokenizer_path": str(DEMO / "tokenizer")}
    peer = PeerArguments(run_id="a", **demo)
    model, _ = build_model(peer, seed=0, activation_memory=level)
    blocks = [module for module in model.modules() if type(module).__name__ == "LeanBlock"]
    assert blocks and {block.activation_memory for block in blocks} == {level}
    model, _ = build_model(peer, seed=0)
    assert model.config.activation_memory == "default"


def test_configuration_and_tokenizer_may_begin_with_a_byte_order_mark(tmp_path):
    config, tokenizer = tmp_path / "config.json", tmp_path / "tokenizer"
    config.write_text((DEMO / "config.json").read_text(), encoding="utf-8-sig")
    tokenizer.mkdir()
    for file in (DEMO / "tokenizer").iterdir():
        (tokenizer / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8-sig")
    peer = PeerArguments(run_id="a", model_config_path=str(config), tokenizer_path=str(tokenizer))
    assert len(build_model(peer, seed=0)[1]) == 4000


def test_what_is_left_out_is_said_once_although_the_text_is_tried_first(tmp_path, caplog):
    lines = ['{"text": "Утром мы пошли в лес за грибами. Потом был чай."}', '{"text": null}'] * 5
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    peer = TrainerPeerArguments(run_id="a", dataset_sources=[str(tmp_path / "a.jsonl")])
    training = HFTrainerArguments(max_sequence_length=32, initial_sequence_length=32, warmup_steps=0)
    dataset, _, _ = build_data(load_tokenizer(DEMO / "tokenizer"), peer, training, peer_seed=b"1")
    assert len(list(itertools.islice(dataset, 20))) == 20
    assert len([record for record in caplog.records if "left out" in record.getMessage()]) == 1


def test_cache_dir_counts_although_the_libraries_have_been_imported(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["один"]}), tmp_path / "a.parquet")
    code = (
        "import datasets, huggingface_hub, sys; from tasks.mlm.task import use_cache_dir; use_cache_dir('cache')\n"
        "stream = datasets.load_dataset('parquet', data_files='a.parquet', split='train', streaming=True)\n"
        "print(next(iter(stream))['text'], huggingface_hub.constants.HF_HUB_CACHE)"
    )
    environment = {**os.environ, "HF_HOME": "/proc/none", "PYTHONPATH": str(DEMO.parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["один", str(tmp_path / "cache" / "hub")], done.stderr
    assert (tmp_path / "cache" / "datasets").is_dir()
