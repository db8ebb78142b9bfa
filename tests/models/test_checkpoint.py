import pytest
import torch
from safetensors.torch import save_file

from src import LeanAlbertForMaskedLM, LeanAlbertForPreTraining, LeanAlbertForSequenceClassification, LeanAlbertModel
from src.models.checkpoint import fingerprint, load_backbone, load_checkpoint
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
    torch.save({**trained.state_dict(), "classifier.weight": torch.zeros(1)}, tmp_path / "state.pth")
    with pytest.raises(ValueError, match=r"unexpected: classifier.weight"):
        load_backbone(LeanAlbertModel(config), tmp_path / "state.pth")
