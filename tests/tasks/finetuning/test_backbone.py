import json
import os
import shutil

import pytest
import torch
from huggingface_hub.utils import httpx
from transformers import AutoConfig, BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from src.models import LeanAlbertForMaskedLM, LeanAlbertForPreTraining, LeanAlbertForSequenceClassification
from tasks.finetuning import backbone
from tasks.finetuning.backbone import find_checkpoint, find_pretrained, max_positions

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.fixture
def model(tiny_checkpoint):
    return LeanAlbertForPreTraining.from_pretrained(tiny_checkpoint)


@pytest.fixture
def run(tmp_path, tiny_checkpoint, model):
    """What a pretraining run leaves: a trainer's backup and an auxiliary peer's checkpoint."""
    directory = tmp_path / "outputs" / "demo" / "my-run"
    shutil.copytree(tiny_checkpoint, directory / "aux" / "checkpoint")
    (directory / "trainer").mkdir()
    torch.save({"model": model.state_dict(), "optimizer": {}, "epoch": 3}, directory / "trainer" / "backup.pth")
    return directory


@pytest.fixture
def hub_model(tmp_path, tiny_tokenizer):
    directory = tmp_path / "bert"
    BertForMaskedLM(BertConfig(**SMALL, vocab_size=len(tiny_tokenizer))).save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


def assert_encoder_of(model, loaded):
    expected = model.base_model.state_dict()
    state = loaded.state_dict()
    shared = expected.keys() & state.keys()
    assert {name.split(".")[0] for name in expected.keys() ^ state.keys()} <= {"pooler"}
    for name in shared:
        assert torch.equal(expected[name], state[name]), name


def test_directory_gives_weights_and_tokenizer(tiny_checkpoint, tiny_tokenizer, model):
    pretrained = find_pretrained(None, str(tiny_checkpoint))
    assert_encoder_of(model, pretrained.load())
    assert pretrained.tokenizer("Кот спит.")["input_ids"] == tiny_tokenizer("Кот спит.")["input_ids"]
    assert pretrained.name == f"tiny-{pretrained.fingerprint[:6]}"
    assert find_pretrained(str(tiny_checkpoint), None).fingerprint == pretrained.fingerprint


def test_pooler_that_was_never_trained_starts_anew_and_that_is_said(tmp_path, tiny_checkpoint, model, caplog):
    torch.nn.init.zeros_(model.albert.pooler.bias)  # as a run without --sentence_order leaves it
    model.save_pretrained(tmp_path / "run")
    for name in ("tokenizer.json", "config.json", "special_tokens_map.json"):
        if (tiny_checkpoint / name).exists():
            shutil.copy(tiny_checkpoint / name, tmp_path / "run")
    pretrained = find_pretrained(None, str(tmp_path / "run"))
    first, second = pretrained.load(), pretrained.load()
    assert not torch.equal(first.pooler.weight, second.pooler.weight), "as a head, from each run's own seed"
    assert torch.equal(first.embeddings.word_embeddings.weight, model.albert.embeddings.word_embeddings.weight)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith("its pooler was never trained (as with --sentence_order False); fine-tuning starts it anew")


def test_state_file_uses_the_config_and_tokenizer_beside_it(tmp_path, tiny_checkpoint, model):
    torch.save({"model": model.state_dict()}, tmp_path / "state.pth")
    shutil.copy(tiny_checkpoint / "config.json", tmp_path)
    shutil.copytree(
        tiny_checkpoint, tmp_path / "tokenizer", ignore=shutil.ignore_patterns("config.json", "*.safetensors")
    )
    assert_encoder_of(model, find_pretrained(None, str(tmp_path / "state.pth")).load())


def test_backup_uses_the_files_of_the_auxiliary_peer_of_its_run(run, model):
    pretrained = find_pretrained(None, str(run / "trainer" / "backup.pth"))
    assert_encoder_of(model, pretrained.load())
    assert pretrained.name.startswith("my-run-")
    assert any("aux/checkpoint/config.json" in note for note in pretrained.notes)


def test_embeddings_may_have_the_size_of_the_tokenizer_instead_of_the_config(tmp_path, run, tiny_checkpoint, model):
    config = json.loads((tiny_checkpoint / "config.json").read_text()) | {"vocab_size": 9999}
    (tmp_path / "published.json").write_text(json.dumps(config))
    backup = str(run / "trainer" / "backup.pth")
    pretrained = find_pretrained(
        None, backup, model_config=str(tmp_path / "published.json"), tokenizer=str(tiny_checkpoint)
    )
    assert_encoder_of(model, pretrained.load())


def test_config_of_another_size_is_an_error_that_names_keys(tmp_path, run, tiny_checkpoint):
    config = json.loads((tiny_checkpoint / "config.json").read_text()) | {"hidden_size": 64}
    (tmp_path / "other.json").write_text(json.dumps(config))
    pretrained = find_pretrained(
        None,
        str(run / "trainer" / "backup.pth"),
        model_config=str(tmp_path / "other.json"),
        tokenizer=str(tiny_checkpoint),
    )
    with pytest.raises(ValueError, match=r"does not fit LeanAlbertModel: .*of another shape: .*\[64"):
        pretrained.load()


def test_without_names_the_state_file_here_comes_first_then_the_newest_checkpoint(tmp_path, run):
    backup = run / "trainer" / "backup.pth"
    weights = run / "aux" / "checkpoint" / "model.safetensors"
    for older, newer, expected in ((backup, weights, weights.parent), (weights, backup, backup)):
        os.utime(older, (1000, 1000))
        os.utime(newer, (2000, 2000))
        assert find_checkpoint(tmp_path) == expected
    (tmp_path / "state.pth").touch()
    assert find_checkpoint(tmp_path) == tmp_path / "state.pth"


def test_without_anything_the_error_says_what_to_pass(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no model to fine-tune: .*pass -c CHECKPOINT .* or -m MODEL"):
        find_pretrained(None, None)


def test_hub_models_keep_their_encoder_and_get_a_fresh_pooler_at_most(hub_model):
    assert_encoder_of(BertForMaskedLM.from_pretrained(hub_model), find_pretrained(str(hub_model), None).load())


@pytest.mark.parametrize("damage", ["missing", "unexpected", "of another shape"])
def test_hub_model_with_a_damaged_encoder_is_an_error(hub_model, damage):
    from safetensors.torch import load_file, save_file

    state = load_file(hub_model / "model.safetensors")
    if damage == "missing":
        del state["bert.encoder.layer.1.output.dense.weight"]
    elif damage == "unexpected":
        state["bert.encoder.layer.2.output.dense.weight"] = torch.zeros(2)
    else:
        state["bert.encoder.layer.1.output.dense.weight"] = torch.zeros(2, 2)
    save_file(state, hub_model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"does not fit BertModel: {damage}: .*encoder\.layer\.\d\.output\.dense"):
        find_pretrained(str(hub_model), None).load()


def test_tokenizer_larger_than_the_model_is_an_error(hub_model, demo_tokenizer, tmp_path):
    demo_tokenizer.save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match="do not belong together"):
        find_pretrained(str(hub_model), None, tokenizer=str(tmp_path / "large"))


@pytest.mark.parametrize(
    ("model_name", "checkpoint", "message"),
    [
        ("a", "b", "both name a model"),
        (None, "nowhere.pth", "no such file or directory"),
        (None, "empty", "no config.json in this directory"),
        (None, "cut.pth", "not a complete PyTorch checkpoint"),
    ],
)
def test_what_is_no_model_is_named(tmp_path, monkeypatch, model_name, checkpoint, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=message):
        find_pretrained(model_name, checkpoint)


def test_max_positions_leaves_out_what_roberta_reserves(tiny_checkpoint):
    config = RobertaConfig(**SMALL, vocab_size=50, pad_token_id=1, max_position_embeddings=130)
    assert max_positions(RobertaForMaskedLM(config).base_model) == 128
    assert max_positions(find_pretrained(None, str(tiny_checkpoint)).load()) is None  # rotary


def test_ruroberta_large_is_an_alias():
    assert backbone.ALIASES["ruroberta-large"] == "ai-forever/ruRoberta-large"


@pytest.mark.parametrize("kind", [LeanAlbertForMaskedLM, LeanAlbertForSequenceClassification])
@pytest.mark.parametrize("as_file", [False, True])
def test_models_without_a_pooler_give_their_encoder(tmp_path, tiny_checkpoint, tiny_tokenizer, model, kind, as_file):
    other = kind(model.config)
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    torch.save(other.state_dict(), tmp_path / "other" / "state.pth")
    loaded = find_pretrained(None, str(tmp_path / "other" / ("state.pth" if as_file else ""))).load()
    assert loaded.pooler is None
    assert_encoder_of(other, loaded)


def test_files_beside_the_weights_change_neither_the_model_nor_its_name(tmp_path, tiny_checkpoint, model):
    shutil.copytree(tiny_checkpoint, tmp_path / "tiny")
    before = find_pretrained(None, str(tmp_path / "tiny"))
    stale = LeanAlbertForPreTraining(model.config)
    stale.save_pretrained(tmp_path / "stale")
    shutil.copy(tmp_path / "stale" / "model.safetensors", tmp_path / "tiny" / "model_old.safetensors")
    after = find_pretrained(None, str(tmp_path / "tiny"))
    assert after.fingerprint == before.fingerprint
    assert_encoder_of(model, after.load())


def test_weights_that_are_not_finite_are_an_error_of_any_family(tmp_path, tiny_checkpoint, hub_model):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_checkpoint, tmp_path / "tiny")
    for directory in (tmp_path / "tiny", hub_model):
        weights = load_file(directory / "model.safetensors")
        name = next(name for name in weights if name.endswith("embeddings.word_embeddings.weight"))
        weights[name][3, 2] = float("nan")
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"values of embeddings\.word_embeddings\.weight are not finite"):
            find_pretrained(None, str(directory)).load()


@pytest.mark.parametrize("weights", ["model.safetensors", "state.pth"])
def test_leanalbert_of_the_hub_is_found_by_its_name(tmp_path, monkeypatch, tiny_checkpoint, model, weights):
    repository = tmp_path / "repository"
    ignored = shutil.ignore_patterns("model.safetensors")
    shutil.copytree(tiny_checkpoint, repository, ignore=ignored if weights == "state.pth" else None)
    if weights == "state.pth":
        torch.save({"model": model.state_dict()}, repository / "state.pth")
    asked = []

    def snapshot_download(hub_id, *, revision=None, allow_patterns):
        asked.append((hub_id, revision))
        return str(repository)

    config = AutoConfig.from_pretrained(repository)
    config._commit_hash = "0" * 40
    monkeypatch.setattr(backbone.AutoConfig, "from_pretrained", lambda *_: config)
    monkeypatch.setattr(backbone.PreTrainedConfig, "get_config_dict", lambda *_: (config.to_dict(), {}))
    monkeypatch.setattr("src.models.hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("src.models.tokenizer.snapshot_download", snapshot_download)
    pretrained = find_pretrained("me/lean", None)
    assert (pretrained.name, pretrained.source) == ("me--lean", "me/lean")
    assert_encoder_of(model, pretrained.load())
    assert ("me/lean", "0" * 40) in asked


def test_leanalbert_of_the_hub_that_cannot_be_fetched_is_one_line(monkeypatch, tiny_checkpoint):
    def snapshot_download(*_, **__):
        raise httpx.ConnectError("[Errno 111] Connection refused")

    config = AutoConfig.from_pretrained(tiny_checkpoint)
    monkeypatch.setattr(backbone.AutoConfig, "from_pretrained", lambda *_: config)
    monkeypatch.setattr(backbone.PreTrainedConfig, "get_config_dict", lambda *_: (config.to_dict(), {}))
    monkeypatch.setattr("src.models.hub.snapshot_download", snapshot_download)
    with pytest.raises(
        ValueError, match=r"^me/lean: its weights could not be fetched .*refused\); look at the network"
    ):
        find_pretrained("me/lean", None)


@pytest.mark.parametrize(
    "change", [{"intermediate_size": 10**8}, {"hidden_size": 10**12}, {"num_hidden_layers": 10**9}]
)
@pytest.mark.parametrize("family", ["own", "bert"])
def test_sizes_that_the_weights_do_not_have_take_no_memory(tmp_path, tiny_checkpoint, hub_model, change, family):
    directory = tmp_path / "absurd"
    shutil.copytree(tiny_checkpoint if family == "own" else hub_model, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=r"must not exceed|does not fit its configuration|far more than its weights"):
        find_pretrained(None, str(directory)).load()


def test_byte_order_mark_in_a_configuration_is_named(tmp_path, tiny_checkpoint):
    shutil.copytree(tiny_checkpoint, tmp_path / "marked")
    path = tmp_path / "marked" / "config.json"
    path.write_text("\ufeff" + path.read_text())
    with pytest.raises(ValueError, match=r"config\.json begins with a byte order mark"):
        find_pretrained(None, str(tmp_path / "marked"))
