import pytest

from arguments import DEMO, PeerArguments
from tasks.mlm.task import build_model


@pytest.mark.parametrize("level", ["lean", "checkpoint"])
def test_activation_memory_of_the_command_line_reaches_every_block(level):
    peer = PeerArguments(run_id="a", model_config_path=str(DEMO / "config.json"))
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
