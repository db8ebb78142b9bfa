"""An organiser signs what members will believe, and nothing that they would refuse."""

import json

import pytest

from src.access.keys import load_key
from src.access.organiser import make_parser
from src.access.organiser import run as organise
from src.settings.folder import read_folder
from src.settings.manifest import is_signed


@pytest.fixture
def organiser(tmp_path):
    def command(*words):
        organise(make_parser().parse_args(["--directory", str(tmp_path), *words]))

    command("init", "run")
    return command


def test_signed_settings_hold_all_that_peers_share(organiser, tmp_path, capsys):
    organiser("sign", "run", "@demo/swarm.args", "--learning_rate", "0.02")
    assert "settings: put a copy of this folder beside the token" in capsys.readouterr().out
    manifest, signature = read_folder(tmp_path / "run" / "settings", "run")
    assert manifest.flags["learning_rate"] == 0.02 and manifest.flags["max_sequence_length"] == 64
    assert manifest.flags["adam_beta2"] == 0.95 and manifest.has_tokenizer
    assert is_signed(load_key(tmp_path / "run" / "organiser.key").get_public_key(), manifest, signature)
    organiser("sign", "run", "@demo/swarm.args")  # other settings now
    assert read_folder(tmp_path / "run" / "settings", "run")[0].flags["learning_rate"] == 0.01


def test_signing_again_mends_a_signature(organiser, tmp_path):
    folder = tmp_path / "run" / "settings"
    organiser("sign", "run", "@demo/swarm.args")
    for damage in (None, b"of a key that was lost"):
        (folder / "signature").unlink()
        if damage:
            (folder / "signature").write_bytes(damage)
        organiser("sign", "run", "@demo/swarm.args")
        manifest, found = read_folder(folder, "run")
        assert is_signed(load_key(tmp_path / "run" / "organiser.key").get_public_key(), manifest, found)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--learning_rate", "1"], "--model_config_path is missing"),
        (["@demo/swarm.args", "--learning_rate", "-1"], "--learning_rate must be positive"),
        (["@demo/swarm.args", "--dataset_sources", "me/text"], "only data sets of the hub at a fixed commit"),
        (["@demo/swarm.args", "--tokenizer_path", "nowhere/x/y"], "no tokenizer 'nowhere/x/y'"),
        (["@demo/swarm.args", "--model_config_path", "small.json"], "tokens, ids up to 3999, its model 100"),
    ],
)
def test_what_members_would_refuse_is_not_signed(organiser, tmp_path, monkeypatch, words, complaint):
    monkeypatch.chdir(tmp_path)
    model = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 100}
    (tmp_path / "small.json").write_text(json.dumps(model))
    with pytest.raises(ValueError, match=complaint):
        organiser("sign", "run", *words)
    assert not (tmp_path / "run" / "settings").exists()
