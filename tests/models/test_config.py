import json
import math

import pytest

from src import LeanAlbertConfig
from src.models.config import LEGACY_OPTIONS

# What the configuration file of the published RuLeanALBERT holds.
PUBLISHED = {
    "model_type": "lean_albert",
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 32,
    "num_hidden_groups": 32,
    "num_attention_heads": 64,
    "embedding_size": 128,
    "vocab_size": 50005,
    "share_large_matrices": 1,
    "hidden_act": "gelu_fused",
    "hidden_act_gated": True,
    "position_embedding_type": "rotary",
    "initializer_range": 0.02,
    "inner_group_num": 1,
    "num_memory_blocks": 16,
}


def test_config_defaults():
    config = LeanAlbertConfig()
    expected = {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_hidden_groups": 32,
        "num_inner_groups": 1,
        "share_large_matrices": 0,
        "num_inner_matrices": 1,
        "adapter_dim": 0,
        "num_attention_heads": 64,
        "intermediate_size": 16384,
        "block_size": 0,
        "lowrank_dim": 0,
        "hidden_act": "gelu_fused",
        "hidden_act_gated": False,
        "attn_qkv_bias": True,
        "out_proj_bias": True,
        "sandwich_norm": False,
        "hidden_dropout_prob": 0,
        "attention_probs_dropout_prob": 0,
        "layer_norm_eps": 1e-12,
        "position_embedding_type": "rotary",
        "max_position_embeddings": 512,
        "rotary_embedding_base": 10000,
        "initializer_range": math.sqrt(2 / (5 * 4096)),
        "vocab_size": 30000,
        "embedding_size": 128,
        "classifier_dropout_prob": 0.1,
        "type_vocab_size": 2,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "tie_word_embeddings": True,
        "activation_memory": "default",
        "sparse_prediction": False,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.model_type == "lean_albert"


def test_config_output_bias_defaults_to_the_opposite_of_sandwich_norm():
    assert LeanAlbertConfig(sandwich_norm=True).out_proj_bias is False
    assert LeanAlbertConfig(sandwich_norm=True, out_proj_bias=True).out_proj_bias is True
    assert LeanAlbertConfig(out_proj_bias=False).out_proj_bias is False


def test_config_reads_the_published_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PUBLISHED))
    config = LeanAlbertConfig.from_pretrained(path)
    kept = PUBLISHED.keys() - LEGACY_OPTIONS
    assert {name: getattr(config, name) for name in kept} == {name: PUBLISHED[name] for name in kept}
    assert not any(hasattr(config, name) for name in LEGACY_OPTIONS)
    assert config.num_inner_groups == 1


@pytest.mark.parametrize("sharing", [0, False, 1, True, 2, 3])
def test_config_sharing_survives_save_and_load(tiny_config, tmp_path, sharing):
    tiny_config(share_large_matrices=sharing).save_pretrained(tmp_path)
    loaded = LeanAlbertConfig.from_pretrained(tmp_path)
    assert int(loaded.share_large_matrices) == int(sharing)


def test_config_all_options_survive_save_and_load(tiny_config, tmp_path):
    config = tiny_config(
        num_inner_groups=2, num_hidden_groups=3, adapter_dim=4, out_proj_bias=False, tie_word_embeddings=False
    )
    config.save_pretrained(tmp_path)
    loaded = LeanAlbertConfig.from_pretrained(tmp_path).to_dict()
    assert {name: loaded[name] for name in config.to_dict()} == config.to_dict()


def test_config_override_on_loading_moves_what_depends_on_it(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}))
    config = LeanAlbertConfig.from_pretrained(path, num_hidden_layers=3, hidden_size=32)
    assert config.num_hidden_groups == 3
    assert config.initializer_range == math.sqrt(2 / (5 * 32))
    with pytest.raises(ValueError, match="num_attention_heads=7"):
        LeanAlbertConfig.from_pretrained(path, num_attention_heads=7)


@pytest.mark.parametrize(
    "options",
    [
        {"num_attention_heads": 3},
        {"num_attention_heads": 32},  # heads of size 1 cannot be rotated
        {"hidden_size": 0},
        {"hidden_size": "32"},
        {"num_hidden_groups": 4},
        {"share_large_matrices": 4},
        {"share_large_matrices": -1},
        {"num_inner_matrices": 0},
        {"adapter_dim": -1},
        {"lowrank_dim": -1},
        {"hidden_dropout_prob": 1.0},
        {"attention_probs_dropout_prob": -0.1},
        {"position_embedding_type": "relative"},
        {"hidden_act": "gelu_fussed"},
        {"activation_memory": "leaner"},
        {"pad_token_id": 61},
        {"layer_norm_eps": 0},
        {"vocab_size": 0},
        {"rotary_embedding_base": float("inf")},
    ],
)
def test_config_refuses_impossible_values_by_name(tiny_config, options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"^{name}={value!r}"):
        tiny_config(**options)


def test_config_refuses_blocks_that_do_not_fit(tiny_config):
    with pytest.raises(ValueError, match="block_size"):
        tiny_config(block_size=5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("hidden_size", 64 * 10**12), ("hidden_size", 10**4200), ("num_hidden_layers", 10**9), ("num_labels", 10**9),
     ("vocab_size", 10**15), ("share_large_matrices", 10**12), ("rotary_embedding_base", 10**400)],
)  # fmt: skip
def test_config_refuses_sizes_that_no_model_has(name, value):
    with pytest.raises(ValueError, match=f"{name}.* must not exceed"):
        LeanAlbertConfig(**{name: value})


def test_config_refuses_half_a_layer():
    with pytest.raises(ValueError, match=r"num_hidden_layers=2\.5 must be a whole number"):
        LeanAlbertConfig(num_hidden_layers=2.5)
