import itertools
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from arguments import DEMO, DEMO_CORPUS, HFTrainerArguments, PeerArguments, TrainerPeerArguments
from src.models import load_tokenizer
from tasks.mlm.data import make_training_dataset
from tasks.mlm.task import build_data, build_model, look_at_text


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


def test_without_sentence_order_pooler_and_order_head_stay_untouched_and_are_sent_to_nobody():
    demo = {"model_config_path": str(DEMO / "config.json"), "tokenizer_path": str(DEMO / "tokenizer")}
    peer = TrainerPeerArguments(run_id="a", dataset_sources=[DEMO_CORPUS], **demo)
    training = HFTrainerArguments(max_sequence_length=32, initial_sequence_length=32, warmup_steps=0, total_steps=100,
                                  sentence_order=False, mlm_probability=0.4, final_mlm_probability=0.2)  # fmt: skip
    model, tokenizer = build_model(peer, seed=0, sentence_order=False)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"{part}.{kind}" for part in ("albert.pooler", "sop_classifier.classifier")
                      for kind in ("weight", "bias")}  # fmt: skip
    dataset, collator, schedule = build_data(tokenizer, peer, training, peer_seed=b"1")
    outputs = model(**collator(list(itertools.islice(dataset, 4))))
    outputs.loss.backward()
    assert float(outputs.sop_loss) == 0.0 and outputs.loss == outputs.mlm_loss
    assert all((parameter.grad is None) == (name in frozen) for name, parameter in model.named_parameters())
    shares = []
    for epoch in (0, 50, 100, 200):
        schedule.follow(epoch)
        shares.append(schedule.mlm_probability.value)
    assert shares == pytest.approx([0.4, 0.3, 0.2, 0.2]) and collator.mlm_probability is schedule.mlm_probability


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


def test_a_look_at_the_text_tells_its_size_and_what_the_tokenizer_does_not_know(tmp_path, caplog):
    tokenizer = load_tokenizer(DEMO / "tokenizer")
    (tmp_path / "a.txt").write_text("Утром мы пошли в лес.\n\nТам росло 漢.\n\nПотом был чай.", encoding="utf-8")
    good, bad = '{"text": "Вечером шёл дождь."}\n', '{"text": null}\n'
    (tmp_path / "b.jsonl").write_text(30 * good + bad + 120 * good, encoding="utf-8")
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    dataset = make_training_dataset(tokenizer, sources=[str(tmp_path / name) for name in ("a.txt", "b.jsonl")])
    caplog.clear()
    text = look_at_text(tokenizer, dataset, num_readers=1)
    assert (text.num_bytes, text.num_documents, text.is_all) == (size, 103, False)
    assert 0 < text.unknown_share < 0.01
    text = look_at_text(tokenizer, dataset, num_readers=150)
    assert (text.num_documents, text.is_all) == (153, True)
    assert caplog.records == [], "what cannot be read is said when training comes to it"


def test_a_look_at_damaged_text_is_no_error(tmp_path):
    tokenizer = load_tokenizer(DEMO / "tokenizer")
    (tmp_path / "a.jsonl").write_text('{"text": "Утром мы пошли в лес."}\n' + "no JSON\n" * 300)
    dataset = make_training_dataset(tokenizer, sources=[str(tmp_path / "a.jsonl")])
    assert (text := look_at_text(tokenizer, dataset, num_readers=1)).num_documents == 1 and not text.is_all
