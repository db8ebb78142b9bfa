import json
import struct
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from src import LeanAlbertForMaskedLM, LeanAlbertForPreTraining, LeanAlbertForSequenceClassification, LeanAlbertModel
from src.models.checkpoint import fingerprint, load_backbone, load_checkpoint, read_state_dict
from src.models.heads import SpanClassificationModel


@pytest.fixture
def trained(tiny_config, randomise):
    return randomise(LeanAlbertForPreTraining(tiny_config(share_large_matrices=True))).eval()


@pytest.fixture
def empty(tiny_config):
    return LeanAlbertForPreTraining(tiny_config(share_large_matrices=True)).eval()


def assert_equal_states(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("wrap", [lambda state: {"model": state, "optimizer": {"epoch": 3}}, lambda state: state])
def test_load_checkpoint_reads_a_state_file(trained, empty, tmp_path, wrap):
    torch.save(wrap(trained.state_dict()), tmp_path / "state.pth")
    load_checkpoint(empty, tmp_path / "state.pth")
    assert_equal_states(empty.state_dict(), trained.state_dict())


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_load_checkpoint_reads_what_save_pretrained_wrote(trained, empty, tmp_path, name):
    trained.save_pretrained(tmp_path)
    load_checkpoint(empty, tmp_path / name)
    assert_equal_states(empty.state_dict(), trained.state_dict())


def test_load_checkpoint_reads_shards(trained, empty, tmp_path):
    trained.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    load_checkpoint(empty, str(tmp_path))
    assert_equal_states(empty.state_dict(), trained.state_dict())


@pytest.mark.parametrize("shards", [False, True])
def test_load_checkpoint_takes_the_files_that_from_pretrained_takes(trained, empty, tmp_path, shards):
    trained.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if shards else {}))
    stale = {name: torch.full_like(tensor, 7.0) for name, tensor in trained.state_dict().items()}
    unique = {name: stale[name] for name in dict(trained.named_parameters())}
    save_file(unique, tmp_path / "model_old.safetensors", metadata={"format": "pt"})
    save_file(unique, tmp_path / "model-99999-of-99999.safetensors", metadata={"format": "pt"})
    load_checkpoint(empty, tmp_path)
    assert_equal_states(empty.state_dict(), trained.state_dict())


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "absent.safetensors"}}'])
def test_load_checkpoint_of_a_directory_with_a_damaged_index_is_one_line(empty, tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json") as error:
        load_checkpoint(empty, tmp_path)
    assert "\n" not in str(error.value)


def test_fingerprint_is_of_the_weights_not_of_the_file(trained, empty, tiny_config, tmp_path):
    own = fingerprint(trained)
    assert len(own) == 16 and own != fingerprint(empty)
    torch.save({"model": trained.state_dict(), "epoch": 3}, tmp_path / "state.pth")
    trained.save_pretrained(tmp_path / "whole")
    trained.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for path in ("state.pth", "whole", "shards", "whole/model.safetensors"):
        other = LeanAlbertForPreTraining(tiny_config(share_large_matrices=True))
        load_checkpoint(other, tmp_path / path)
        assert fingerprint(other) == own, path
    with torch.no_grad():
        trained.albert.pooler.bias[3] += 1e-6
    assert fingerprint(trained) != own


def test_load_checkpoint_names_keys_that_do_not_fit(trained, empty, tmp_path):
    state = trained.state_dict()
    del state["predictions.dense.bias"]
    state["predictions.extra"] = torch.zeros(1)
    state["albert.pooler.bias"] = torch.zeros(5)
    torch.save(state, tmp_path / "state.pth")
    before = {name: tensor.clone() for name, tensor in empty.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_checkpoint(empty, tmp_path / "state.pth")
    message = str(error.value)
    assert "\n" not in message and str(tmp_path) in message and "LeanAlbertForPreTraining" in message
    assert "missing: predictions.dense.bias" in message
    assert "unexpected: predictions.extra" in message
    assert "albert.pooler.bias ([5], the model has [32])" in message
    assert_equal_states(empty.state_dict(), before)


def test_load_checkpoint_names_only_the_first_of_many_keys(empty, tmp_path):
    torch.save({f"key.{i}": torch.zeros(1) for i in range(9)}, tmp_path / "state.pth")
    with pytest.raises(ValueError, match=r"unexpected: key.0, key.1, key.2 and 6 more"):
        load_checkpoint(empty, tmp_path / "state.pth")


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_load_checkpoint_of_a_truncated_file_is_one_line(trained, empty, tmp_path, suffix, kept):
    trained.save_pretrained(tmp_path)
    torch.save(trained.state_dict(), tmp_path / "model.pth")
    path = tmp_path / f"model{suffix}"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match="not a complete") as error:
        load_checkpoint(empty, path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_load_checkpoint_refuses_other_content(empty, tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"model": {"epoch": 1}}, tmp_path / "no_tensors.pt")
    for path in (tmp_path / "list.pt", tmp_path / "no_tensors.pt", tmp_path):
        with pytest.raises(ValueError, match=str(path)):
            load_checkpoint(empty, path)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(empty, tmp_path / "absent.pth")


class Unpicklable:
    """Stands for anything that `weights_only` must not construct."""


def test_load_checkpoint_does_not_execute_pickles(empty, tmp_path):
    torch.save({"model": {}, "extra": Unpicklable()}, tmp_path / "state.pth")
    with pytest.raises(ValueError, match="not a complete PyTorch checkpoint"):
        load_checkpoint(empty, tmp_path / "state.pth")


def test_conflicting_values_of_one_tensor_are_an_error(tiny_config, randomise, trained, tmp_path):
    untied = randomise(LeanAlbertForPreTraining(tiny_config(share_large_matrices=True, tie_word_embeddings=False)))
    with pytest.raises(RuntimeError, match="tie_word_embeddings=False"):
        trained.load_state_dict(untied.state_dict())
    torch.save(untied.state_dict(), tmp_path / "state.pth")
    with pytest.raises(ValueError, match="tie_word_embeddings=False"):
        load_checkpoint(trained, tmp_path / "state.pth")
    unshared = randomise(LeanAlbertForPreTraining(tiny_config()))
    with pytest.raises(RuntimeError, match="one tensor"):
        trained.load_state_dict(unshared.state_dict())


@pytest.mark.parametrize("pooler", [True, False])
def test_load_backbone_takes_the_encoder_of_a_pretraining_checkpoint(trained, tiny_config, tmp_path, pooler):
    trained.save_pretrained(tmp_path)
    backbone = LeanAlbertModel(tiny_config(share_large_matrices=True), add_pooling_layer=pooler)
    load_backbone(backbone, tmp_path)
    expected = trained.albert.state_dict()
    assert_equal_states(backbone.state_dict(), {name: expected[name] for name in backbone.state_dict()})


def test_load_backbone_works_inside_fine_tuning_models(trained, tiny_config, tmp_path):
    torch.save({"model": trained.state_dict()}, tmp_path / "state.pth")
    config = tiny_config(share_large_matrices=True, num_labels=3)
    classifier = LeanAlbertForSequenceClassification(config)
    spans = SpanClassificationModel(LeanAlbertModel(config))
    for backbone in (classifier.albert, spans.backbone):
        load_backbone(backbone, tmp_path / "state.pth")
        assert torch.equal(backbone.embeddings.word_embeddings.weight, trained.albert.embeddings.word_embeddings.weight)


def test_load_backbone_takes_a_bare_encoder(trained, tiny_config, tmp_path):
    trained.albert.save_pretrained(tmp_path)
    backbone = LeanAlbertModel(tiny_config(share_large_matrices=True))
    load_backbone(backbone, tmp_path)
    assert_equal_states(backbone.state_dict(), trained.albert.state_dict())


def test_load_backbone_wants_every_weight_and_no_unknown_ones(trained, tiny_config, tmp_path):
    config = tiny_config(share_large_matrices=True)
    LeanAlbertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing: pooler.weight, pooler.bias"):
        load_backbone(LeanAlbertModel(config), tmp_path)
    torch.save({**trained.state_dict(), "adapter.weight": torch.zeros(1)}, tmp_path / "state.pth")
    with pytest.raises(ValueError, match=r"unexpected: adapter.weight"):
        load_backbone(LeanAlbertModel(config), tmp_path / "state.pth")


def test_load_backbone_takes_the_encoder_of_a_classifier(tiny_config, randomise, tmp_path):
    config = tiny_config(share_large_matrices=True)
    classifier = randomise(LeanAlbertForSequenceClassification(config))
    classifier.save_pretrained(tmp_path)
    backbone = LeanAlbertModel(config, add_pooling_layer=False)
    load_backbone(backbone, tmp_path)
    assert_equal_states(backbone.state_dict(), classifier.albert.state_dict())


def change_index(change):
    def damage(directory):
        path = directory / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return damage


def move_outside(directory):
    shard = min(directory.glob("model-*"))
    shard.rename(directory.parent / shard.name)
    change_index(lambda names: names.update({k: f"../{v}" for k, v in names.items() if v == shard.name}))(directory)


def double_a_tensor(directory):
    first, *_, last = sorted(directory.glob("model-*"))
    save_file({**load_file(last), min(load_file(first)): torch.zeros(3)}, last, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda directory: max(directory.glob("model-*")).unlink(), r"names model-\S+.safetensors, which is not"),
        (move_outside, r"names '../model-\d+-of-\d+.safetensors', which is no file in"),
        (change_index(lambda names: names.update(x="a\0b")), r"names 'a\\x00b', which is no file in"),
        (change_index(lambda names: names.update(x=7)), "names '7', which is no file in"),
        (change_index(lambda names: names.update(x=min(names.values()))), "says that x is here, and it is not"),
        (change_index(lambda names: names.pop(min(names))), r"says that \S+ is not here"),
        (double_a_tensor, r"says that \S+ is not here"),
        (lambda directory: (directory / "model.safetensors.index.json").write_text("[" * 100_000), "not an index"),
    ],
)  # fmt: skip
def test_shards_that_do_not_agree_with_their_index_are_refused_by_name(trained, empty, tmp_path, damage, message):
    directory = tmp_path / "checkpoint"
    trained.save_pretrained(directory, max_shard_size="20KB")
    damage(directory)
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(empty, directory)
    assert "\n" not in str(error.value) and "model" in str(error.value)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.safetensors", "pytorch_model.bin", "a.pth"])
def test_load_checkpoint_leaves_other_files_of_a_directory_alone(trained, empty, tmp_path, name):
    trained.save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(b"anything")
    load_checkpoint(empty, tmp_path)
    assert_equal_states(empty.state_dict(), trained.state_dict())


@pytest.mark.parametrize(
    ("value", "dtype"),
    [("nan", torch.float32), ("inf", torch.float16), ("-inf", torch.bfloat16), ("1e300", torch.float64)],
)
def test_weights_that_are_not_finite_are_refused_by_name(trained, empty, tmp_path, value, dtype):
    state = {name: tensor.to(dtype) for name, tensor in trained.state_dict().items()}
    state["albert.pooler.bias"][1] = float(value)
    torch.save(state, tmp_path / "state.pth")
    before = {name: tensor.clone() for name, tensor in empty.state_dict().items()}
    with pytest.raises(ValueError, match=r"state\.pth: values of albert\.pooler\.bias are not finite"):
        load_checkpoint(empty, tmp_path / "state.pth")
    assert_equal_states(empty.state_dict(), before)


def test_quantised_weights_are_refused(trained, empty, tmp_path):
    eight_bit = torch.zeros_like(trained.albert.pooler.weight, dtype=torch.int8)
    state = {**trained.state_dict(), "albert.pooler.weight": eight_bit}
    torch.save(state, tmp_path / "state.pth")
    with pytest.raises(ValueError, match=r"whole numbers: albert\.pooler\.weight"):
        load_checkpoint(empty, tmp_path / "state.pth")


def compress(source, target):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))


def claim(path, size):
    """Let the archive's directory say that its largest part has this size."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    place = content.index(b"PK\x01\x02")
    while content[place + 46 :][: len(largest.filename)] != largest.filename.encode():
        place = content.index(b"PK\x01\x02", place + 4)
    content[place + 24 : place + 28] = struct.pack("<I", size)
    path.write_bytes(content)


@pytest.mark.parametrize("archive", [True, False])
def test_pickle_that_asks_for_memory_is_refused_before_it_is_read(tmp_path, monkeypatch, archive):
    ask = b"\x80\x02cbuiltins\nbytearray\nJ" + struct.pack("<i", 10**9) + b"\x85R."
    path = tmp_path / "state.pth"
    if archive:
        torch.save({"weight": torch.zeros(1000)}, tmp_path / "plain.pth")
        with zipfile.ZipFile(tmp_path / "plain.pth") as old, zipfile.ZipFile(path, "w") as new:
            for entry in old.infolist():
                new.writestr(entry.filename, ask if entry.filename.endswith("data.pkl") else old.read(entry))
    else:
        path.write_bytes(ask)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(ValueError, match=r"state\.pth: not a complete PyTorch checkpoint \(its parts claim"):
        read_state_dict(path)


def test_checkpoints_of_the_format_before_archives_are_read(trained, empty, tmp_path):
    torch.save(trained.state_dict(), tmp_path / "state.pth", _use_new_zipfile_serialization=False)
    load_checkpoint(empty, tmp_path / "state.pth")
    assert_equal_states(empty.state_dict(), trained.state_dict())


@pytest.mark.parametrize("kind", ["compressed", "claims"])
def test_archive_that_unpacks_to_more_than_its_file_is_refused_before_it_is_read(tmp_path, monkeypatch, kind):
    torch.save({"model": {"weight": torch.zeros(1_000_000)}}, tmp_path / "plain.pth")
    if kind == "compressed":
        compress(tmp_path / "plain.pth", tmp_path / "state.pth")
    else:
        (tmp_path / "state.pth").write_bytes((tmp_path / "plain.pth").read_bytes())
        claim(tmp_path / "state.pth", 4_000_000_000)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(ValueError, match=r"state\.pth: not a complete PyTorch checkpoint \(its parts claim"):
        read_state_dict(tmp_path / "state.pth")


@pytest.mark.parametrize(
    "content",
    [struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 20) + b'{"a":{"dtype":"F32"}', struct.pack("<Q", 4) + b"[[[["],
)
def test_safetensors_with_an_impossible_header_are_one_line(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: not a complete safetensors file") as error:
        read_state_dict(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "state",
    [
        {1: torch.zeros(2)},
        {"a": torch.eye(3).to_sparse()},
        {"a": torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)},
        {"a": torch.zeros(2, device="meta")},
    ],
    ids=["number", "sparse", "quantised", "meta"],
)
def test_checkpoint_of_odd_tensors_is_one_line(tmp_path, state):
    torch.save(state, tmp_path / "state.pth")
    with pytest.raises(ValueError, match=r"state\.pth: '(1|a)' is no ordinary tensor with a name") as error:
        read_state_dict(tmp_path / "state.pth")
    assert "\n" not in str(error.value)


def test_tensor_that_repeats_one_value_a_trillion_times_is_refused_by_its_shape(empty, trained, tmp_path):
    state = {**trained.state_dict(), "albert.pooler.bias": torch.zeros(1).expand(10**12)}
    torch.save(state, tmp_path / "state.pth")
    with pytest.raises(ValueError, match=r"of another shape: albert\.pooler\.bias \(\[1000000000000\]"):
        load_checkpoint(empty, tmp_path / "state.pth")
