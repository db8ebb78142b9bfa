"""Files from outside are parsed in a process of their own first: whatever they do to it costs this peer one line."""

import gzip
import json

import pytest

from src.models.memory import predict_memory
from src.settings import examine as module
from src.settings.examine import examine
from src.settings.manifest import make_files
from tests.settings.test_manifest import CONFIG, TOKENIZER


def write(folder, *, config=None, **tokenizer) -> None:
    """The demo's files, some of them replaced: ``config`` by options, a tokenizer's (name without ending) by bytes."""
    files = make_files(CONFIG, TOKENIZER)
    files["config.json"] = json.dumps({**json.loads(files["config.json"]), **(config or {})}).encode()
    files.update({f"tokenizer/{name}.json": content for name, content in tokenizer.items()})
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def test_demo_is_found_good(tmp_path):
    write(tmp_path)
    memory = predict_memory(CONFIG, batch_size=0, length=0)
    assert examine(tmp_path) == memory.parameters + memory.optimizer


PIPELINE = json.loads((TOKENIZER / "tokenizer.json").read_text())
HOLES = {"type": "WordLevel", "unk_token": "<unk>", "vocab": {
    "[CLS]": 0, "[SEP]": 1, "<unk>": 2, "<pad>": 3, "[MASK]": 4, "a": 4000}}  # fmt: skip
STEERING = {"cls_token": {"content": "\x1b[2J", "special": True}}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"config": {"auto_map": "x"}}, "no option 'auto_map'"),
        ({"config": {"vocab_size": 100}}, "tokens, ids up to 3999, its model 100"),
        ({"tokenizer": json.dumps({**PIPELINE, "model": HOLES}).encode()}, "tokens, ids up to 4000, its model 4000"),
        ({"tokenizer": b"nonsense"}, "does not describe a tokenizer"),
        ({"tokenizer": gzip.compress(bytes(2**24))}, "tokenizer.json"),
        ({"tokenizer": b"[" * 2**22}, "tokenizer.json"),
        ({"tokenizer_config": b'{"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["x--y.z", null]}}'},
         "not of a kind that is handed over"),
        ({"special_tokens_map": json.dumps({"cls_token": "\x1b[2J"}).encode()}, "not in the vocabulary"),
        ({"special_tokens_map": json.dumps(STEERING).encode(),
          "config": {"vocab_size": 4008},
          "tokenizer": json.dumps({**PIPELINE, "added_tokens": [*PIPELINE["added_tokens"], {
              **PIPELINE["added_tokens"][0], "id": 4000, "content": "\x1b[2J"}]}).encode()}, "cannot be printed"),
        ({"special_tokens_map": json.dumps({"cls_token": "A" * 10_000}).encode(), "config": {"vocab_size": 4008},
          "tokenizer": json.dumps({**PIPELINE, "added_tokens": [*PIPELINE["added_tokens"], {
              **PIPELINE["added_tokens"][0], "id": 4000, "content": "A" * 10_000}]}).encode()}, "cannot be printed"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused_in_one_line(tmp_path, change, complaint):
    write(tmp_path, **change)
    try:
        module.parse(tmp_path)
        pytest.fail("it was taken")
    except Exception as error:
        reason = module.reason_of(error, tmp_path)
    assert complaint in reason and str(tmp_path) not in reason
    assert reason.isprintable() and len(reason) <= module.MAX_REASON


def test_parsing_has_an_end(tmp_path):
    write(tmp_path, config={"num_hidden_layers": 4096, "num_hidden_groups": 4096, "num_inner_groups": 4096})
    with pytest.raises(ValueError, match="takes more than 1 s"):
        examine(tmp_path, cpu_seconds=1)


def test_model_is_held_against_this_machines_memory(tmp_path):
    write(tmp_path, config={"intermediate_size": 2**27, "hidden_size": 8192, "num_attention_heads": 8})
    with pytest.raises(ValueError, match=r"its model needs \d{5,}.\d GB at the least, this machine has"):
        examine(tmp_path)
