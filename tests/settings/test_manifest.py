"""What a run hands over, and what is refused of it: no flag, file or data set that a peer should choose for itself."""

import json
from pathlib import Path

import pytest

from arguments import (
    FLAGS,
    ArgumentParser,
    CollaborationArguments,
    HFTrainerArguments,
    TrainerPeerArguments,
    handed_over_flags,
)
from src import LeanAlbertConfig
from src.settings import manifest as module
from src.settings.manifest import contradictions, make_files, make_manifest, read_config, read_manifest

REPOSITORY = Path(__file__).resolve().parents[2]
TOKENIZER = REPOSITORY / "demo" / "tokenizer"
CONFIG = LeanAlbertConfig.from_dict(json.loads((REPOSITORY / "demo" / "config.json").read_text()))
DEFAULTS = {name: FLAGS[name].default for name in handed_over_flags()}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HASH = "a" * 64


def manifest_of_demo(**changes):
    return make_manifest("run", {**DEFAULTS, **changes}, make_files(CONFIG, TOKENIZER))


def changed(**changes) -> bytes:
    """A manifest of which some fields are not as this version would write them."""
    values = json.loads(manifest_of_demo().content())
    values.update(changes)
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def test_manifest_is_read_as_it_was_made():
    made = make_manifest("run", DEFAULTS, make_files(CONFIG, TOKENIZER), sources=[f"me/text:ru@{COMMIT}"], weights=[2])
    read = read_manifest(made.content(), "run")
    assert read == made and read.hash == made.hash and read.has_tokenizer
    assert read.data_sets == (f"me/text:ru@{COMMIT}",) and read.weights == (2.0,)
    assert set(read.flags) == set(handed_over_flags())


def test_parser_does_not_change_what_is_taken():
    ArgumentParser(TrainerPeerArguments, CollaborationArguments, HFTrainerArguments)
    assert manifest_of_demo().flags["min_learning_rate"] is None


def test_nothing_of_a_machine_or_a_person_is_handed_over():
    local = {"output_dir", "initial_peers", "identity_path", "model_config_path", "tokenizer_path", "bf16", "authorize",
             "per_device_train_batch_size", "activation_memory", "cache_dir", "run_id", "dataset_sources", "bandwidth",
             "repo_url", "init_checkpoint", "state_path", "host_maddrs", "wandb_project"}  # fmt: skip
    assert not local & set(handed_over_flags())
    assert set(make_manifest("run", {**DEFAULTS, "output_dir": "/x"}, make_files(CONFIG, TOKENIZER)).flags) == set(
        DEFAULTS
    )


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"\x00" * (2**16 + 1), "larger than 65536 bytes"),
        (b"[" * 60_000, "no JSON"),
        (b"nonsense", "no JSON"),
        (b"[1]", "no manifest"),
        (changed(format=2), "format is 2, this version reads 1: update"),
        (changed(format=True), "no manifest"),
        (changed(run_id="other"), "not of the run run"),
        (changed(extra=1), "not of the run"),
        (changed(flags=[1]), "no flags"),
        (changed(flags={"output_dir": "/etc"}), "--output_dir is for each peer to choose"),
        (changed(flags={"init_checkpoint": "x"}), "--init_checkpoint is for each peer to choose"),
        (changed(flags={"model_config_path": "/etc/passwd"}), "--model_config_path is for each peer"),
        (changed(flags={"sharded_\x1b[2Jlamb": 1}), r"--'sharded_\x1b[2Jlamb' is no flag of this version; update"),
        (changed(flags={"learning_rate": "0.1 --output_dir /etc"}), "is of the wrong type"),
        (changed(flags={"learning_rate": True}), "is of the wrong type"),
        (changed(flags={"delay_grad_averaging": 1}), "is of the wrong type"),
        (changed(flags={"total_steps": 1.5}), "is of the wrong type"),
        (changed(flags={"total_steps": None}), "is of the wrong type"),
        (changed(flags={"total_steps": 10**30}), "is of the wrong type"),
        (changed(flags={"optimizer": 1}), "is of the wrong type"),
        (changed(flags={"schedule": None}), "is of the wrong type"),
        (changed(flags={"optimizer": "muon --output_dir /etc"}), "is none of lamb, muon"),
        (changed(flags={"learning_rate": "lamb"}), "is of the wrong type"),
        (changed(flags={"mlm_probability": 1.0}), "--mlm_probability 1.0 must lie between 0 and 1"),
        (changed(flags={"schedule": "wsd", "decay_steps": 10**6}), "--decay_steps 1000000 must lie between 1 and"),
        (changed(flags={"learning_rate": -1.0}), "--learning_rate must be positive"),
        (changed(flags={"adam_beta1": 2.0}), "--adam_beta1 2.0: must be in [0, 1)"),
        (changed(flags={"min_vector_size": 0}), "--min_vector_size must be positive"),
        (changed(flags={"matchmaking_time": -5.0}), "matchmaking_time"),
        (changed(flags={"max_sequence_length": 2**40}), "--max_sequence_length 1099511627776: must be in"),
        (changed(flags={"pad_to_multiple_of": 2**40}), "--pad_to_multiple_of 1099511627776: must be in"),
        (changed(flags={"averaging_timeout": 1e18}), "--averaging_timeout 1e+18: must be in"),
        (changed(flags={"warmup_steps": 10**6}), "--warmup_steps 1000000 must lie between"),
        (changed().replace(b'"learning_rate":0.0025', b'"learning_rate":NaN'), "no JSON"),
        (changed().replace(b'"learning_rate":0.0025', b'"learning_rate":1e999'), "wrong type"),
        (changed().replace(b'"learning_rate"', b'"learning_rate":1.0,"learning_rate"'), "not written as"),
        (changed() + b" ", "not written as"),
        (changed(files={}), "names no config.json"),
        (changed(files={"config.json": [HASH, 2**20]}), "config.json would have 1048576 bytes"),
        (changed(files={"config.json": [HASH, -1]}), "config.json would have -1 bytes"),
        (changed(files={"config.json": ["zz", 1]}), "hash and size"),
        (changed(files={"config.json": [HASH, 1], "../../.bashrc": [HASH, 1]}), "'../../.bashrc', which no run"),
        (changed(files={"config.json": [HASH, 1], "/etc/passwd": [HASH, 1]}), "'/etc/passwd', which no run"),
        (changed(files={"config.json": [HASH, 1], "tokenizer/../x": [HASH, 1]}), "which no run hands over"),
        (changed(files={"config.json": [HASH, 1], "tokenizer/tokenizer.json": [HASH, 2**30]}), "1073741824 bytes"),
        (changed(files={"config.json": [HASH, 1], "tokenizer/tokenizer.json": [HASH, 2**25],
                        "tokenizer/spiece.model": [HASH, 2**25]}), "larger than 32 MiB"),
        (changed(data_sets=["/etc/passwd"]), "no data set of the hub"),
        (changed(data_sets=["me/text"]), "no data set of the hub at a fixed commit"),
        (changed(data_sets=[f"../text@{COMMIT}"]), "no data set of the hub"),
        (changed(data_sets=[f"a/b/c@{COMMIT}"]), "no data set of the hub"),
        (changed(data_sets=[f"me/text:..@{COMMIT}"]), "no data set of the hub"),
        (changed(data_sets=[f"--output_dir/x@{COMMIT}"]), "no data set of the hub"),
        (changed(data_sets=[f"me/text@{COMMIT}\n"]), "no data set of the hub"),
        (changed(data_sets=[f"me/t{i}@{COMMIT}" for i in range(65)]), "list of data sets"),
        (changed(data_sets=[f"me/text@{COMMIT}"], weights=[1.0, 2.0]), "weights"),
        (changed(data_sets=[f"me/text@{COMMIT}"], weights=["x"]), "weights"),
    ],
)  # fmt: skip
def test_what_is_no_manifest_is_refused(content, complaint):
    with pytest.raises(ValueError) as caught:
        read_manifest(content, "run")
    assert complaint in str(caught.value) and "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_flags_by_hand_contradict_only_where_peers_must_agree():
    manifest = manifest_of_demo(learning_rate=0.01, averaging_timeout=300.0)
    assert contradictions({"learning_rate": 0.01, "bf16": True, "output_dir": "x"}, manifest) == []
    assert contradictions({"averaging_timeout": 600.0}, manifest) == []  # of the run, but peers may differ
    (found,) = contradictions({"learning_rate": 0.1}, manifest)
    assert found == "--learning_rate is 0.1 here and 0.01 in the run"


def test_local_text_is_not_named_to_others(tmp_path, monkeypatch):
    files = make_files(CONFIG, TOKENIZER)
    for sources in (["corpus/*.txt"], ["me/text"], [f"me/text@{COMMIT}", "own.txt"]):
        assert make_manifest("run", DEFAULTS, files, sources=sources, weights=[1] * len(sources)).data_sets == ()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "text").mkdir(parents=True)  # datasets would read it instead of the hub's
    assert make_manifest("run", DEFAULTS, files, sources=[f"me/text@{COMMIT}"]).data_sets == ()


def test_configuration_is_handed_over_whole():
    content = make_files(CONFIG, None)["config.json"]
    read = read_config(content)
    assert all(getattr(read, name) == getattr(CONFIG, name) for name in LeanAlbertConfig.__annotations__)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"auto_map": {"AutoModel": "evil--x.y"}}, "no option 'auto_map'"),
        ({"sparse_prediction": True}, "no option"),
        ({"model_type": "bert"}, "model_type"),
        ({"hidden_size": "x" * 100}, "numbers and switches"),
        ({"sandwich_norm": "\x1b[2J"}, "numbers and switches"),
        ({"hidden_size": 10**12}, "must not exceed"),
        ({"hidden_act": "rm -rf"}, "hidden_act"),
        ({"hidden_act": ["a"]}, "config.json"),
    ],
)
def test_configuration_with_anything_else_is_refused(options, complaint):
    values = json.loads(make_files(CONFIG, None)["config.json"])
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        read_config(json.dumps({**values, **options}).encode())
    assert complaint in str(caught.value)


def test_configuration_is_read_as_it_will_be_from_its_file():
    with pytest.raises(ValueError, match=r"config\.json"):
        read_config(make_files(CONFIG, None)["config.json"].decode().encode("utf-16"))


def test_signature_holds_for_one_run_and_one_content():
    from hivemind.utils.crypto import RSAPrivateKey

    organiser, other, manifest = RSAPrivateKey(), RSAPrivateKey(), manifest_of_demo()
    signature = module.sign_manifest(organiser, manifest)
    assert module.is_signed(organiser.get_public_key(), manifest, signature)
    assert not module.is_signed(other.get_public_key(), manifest, signature)
    assert not module.is_signed(organiser.get_public_key(), manifest_of_demo(learning_rate=0.5), signature)
    assert not module.is_signed(organiser.get_public_key(), manifest, b"")
    assert not module.is_signed(organiser.get_public_key(), manifest, b"\xff\x00nonsense")
