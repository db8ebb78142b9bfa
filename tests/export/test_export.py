"""The directory for the hub: it opens without this repository, tells what it is, and replaces nothing by accident."""

import ast
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import httpx
from safetensors.torch import load_file, save_file
from transformers import pipeline

from src import LeanAlbertConfig, LeanAlbertForMaskedLM, LeanAlbertForPreTraining, files, load_tokenizer
from src.export.export import code_files, main
from src.export.model_card import evenly_spaced

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {
    "vocab_size": 4000, "embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 3, "share_large_matrices": 1,
    "num_attention_heads": 2, "intermediate_size": 64, "adapter_dim": 2, "initializer_range": 0.4,
}  # fmt: skip
TEXTS = ["Ёж пошёл в Йошкар-Олу.", "ЁЛКА, йод и МЕД; съешь ещё", "  и\u0306 🎉 [MASK]м", "Утром мы пошли в [MASK]."]
MASKED = TEXTS[-1]

# What a stranger's program does; it must not find this repository.
STRANGER = """
import importlib.util, json, sys
import torch
from transformers import (AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForPreTraining,
                          AutoModelForSequenceClassification, AutoTokenizer, pipeline)
directory, copy, texts = json.loads(sys.argv[1])
assert importlib.util.find_spec("src") is None
tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
answers = {"config": type(AutoConfig.from_pretrained(directory, trust_remote_code=True)).__name__}
answers["ids"] = [tokenizer(text)["input_ids"] for text in texts]
answers["pair"] = dict(tokenizer("Ёж", "йод"))
inputs = tokenizer(texts[:2], padding=True, return_tensors="pt")
for kind in (AutoModel, AutoModelForMaskedLM, AutoModelForPreTraining, AutoModelForSequenceClassification):
    model = kind.from_pretrained(directory, trust_remote_code=True).eval()
    with torch.no_grad():
        answers[type(model).__name__] = model(**inputs)[0].double().abs().sum().item()
fill = pipeline("fill-mask", model=directory, tokenizer=directory, trust_remote_code=True)
answers["fill"] = [[answer["token"], answer["score"]] for answer in fill(texts[3])]
model.save_pretrained(copy)
again = AutoModelForSequenceClassification.from_pretrained(copy, trust_remote_code=True).eval()
with torch.no_grad():
    answers["again"] = again(**inputs)[0].double().abs().sum().item()
assert not [name for name in sys.modules if name == "src" or name.startswith("src.")]
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LeanAlbertForPreTraining(LeanAlbertConfig(**OPTIONS)).eval()


@pytest.fixture
def checkpoint(model, tmp_path) -> Path:
    """As an auxiliary peer stores it."""
    directory = tmp_path / "run" / "aux" / "checkpoint"
    model.save_pretrained(directory)
    load_tokenizer(ROOT / "demo" / "tokenizer").save_pretrained(directory)
    return directory


def as_strangers_see(directory: Path, folder: Path, texts=TEXTS) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", STRANGER, json.dumps([str(directory), str(folder / "copy"), texts])]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.timeout(300)
def test_export_opens_in_a_process_that_does_not_know_this_repository(model, checkpoint, tmp_path):
    out = tmp_path / "lean"
    assert main([str(checkpoint), str(out)]) == 0
    corpus = (ROOT / "demo" / "heldout.txt").read_text(encoding="utf-8").splitlines()
    texts = [*TEXTS, *corpus, *(line.upper() for line in corpus)]
    answers = as_strangers_see(out, tmp_path, texts)

    tokenizer = load_tokenizer(ROOT / "demo" / "tokenizer")
    assert answers["config"] == "LeanAlbertConfig"
    assert answers["ids"] == [tokenizer(text)["input_ids"] for text in texts]
    assert answers["pair"] == dict(tokenizer("Ёж", "йод"))
    assert answers["pair"]["token_type_ids"][-1] == 1
    inputs = tokenizer(texts[:2], padding=True, return_tensors="pt")
    with torch.no_grad():
        outputs, encoded = model(**inputs), model.albert(**inputs)
    expected = {"LeanAlbertModel": encoded[0], "LeanAlbertForPreTraining": outputs.prediction_logits}
    expected["LeanAlbertForMaskedLM"] = outputs.prediction_logits
    for name, tensor in expected.items():
        assert answers[name] == pytest.approx(tensor.double().abs().sum().item(), rel=1e-6), name
    assert answers["again"] == answers["LeanAlbertForSequenceClassification"] > 0
    own = LeanAlbertForMaskedLM.from_pretrained(checkpoint)
    fill = pipeline("fill-mask", model=own, tokenizer=tokenizer)(MASKED)
    assert answers["fill"] == [[answer["token"], pytest.approx(answer["score"], rel=1e-5)] for answer in fill]


def test_export_code_needs_nothing_but_torch_and_transformers(checkpoint, tmp_path):
    assert main([str(checkpoint), str(tmp_path / "lean")]) == 0
    names = {path.name for path in code_files()}
    assert {"albert.py", "config.py", "transformer.py", "shared_linear.py"} <= names
    assert names == {path.name for path in (tmp_path / "lean").glob("*.py")}
    for name in names:
        for node in ast.walk(ast.parse((tmp_path / "lean" / name).read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and f"{node.module}.py" in names
            elif isinstance(node, ast.Import | ast.ImportFrom):
                modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                allowed = {"torch", "transformers", "safetensors"} | set(sys.stdlib_module_names)
                assert {module.split(".")[0] for module in modules} <= allowed


def exported_logits(directory: Path):
    """What the exported weights answer, through this repository's classes."""
    inputs = load_tokenizer(directory)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return LeanAlbertForPreTraining.from_pretrained(directory).eval()(**inputs)


@pytest.mark.parametrize("kind", ["directory", "backup", "state", "tensors"])
def test_export_takes_every_kind_of_checkpoint(model, checkpoint, tmp_path, kind):
    arguments = [str(checkpoint)]
    if kind == "backup":  # config and tokenizer are those of the run's auxiliary peer
        path = tmp_path / "run" / "trainer" / "backup.pth"
        path.parent.mkdir()
        torch.save({"model": model.state_dict(), "optimizer": {}, "scheduler": {}, "epoch": 3}, path)
        arguments = [str(path)]
    elif kind != "directory":  # as the published files lie
        folder = tmp_path / "published"
        shutil.copytree(ROOT / "demo" / "tokenizer", folder / "tokenizer")
        # the published model was resized to its tokenizer, its config.json was not
        (folder / "config.json").write_text(json.dumps({**model.config.to_dict(), "vocab_size": 4321}))
        state = model.state_dict()
        torch.save({"model": state} if kind == "state" else state, folder / "state.pth")
        arguments = [str(folder / "state.pth")]
        if kind == "tensors":
            (folder / "config.json").rename(tmp_path / "elsewhere.json")
            (folder / "tokenizer").rename(tmp_path / "words")
            arguments += ["--model-config", str(tmp_path / "elsewhere.json"), "--tokenizer", str(tmp_path / "words")]
    assert main([*arguments, str(tmp_path / "lean")]) == 0
    inputs = load_tokenizer(ROOT / "demo" / "tokenizer")(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs)
    actual = exported_logits(tmp_path / "lean")
    torch.testing.assert_close(actual.prediction_logits, expected.prediction_logits, rtol=0, atol=0)
    torch.testing.assert_close(actual.sop_logits, expected.sop_logits, rtol=0, atol=0)
    config = json.loads((tmp_path / "lean" / "config.json").read_text())
    assert config["vocab_size"] == 4000 and not config["sparse_prediction"]


@pytest.mark.parametrize(
    "options",
    [
        {"position_embedding_type": "absolute", "tie_word_embeddings": False},
        {"block_size": 16, "lowrank_dim": 2, "adapter_dim": 0, "num_inner_groups": 2, "sandwich_norm": True},
    ],
    ids=["absolute, untied", "butterfly, inner groups"],
)
def test_export_keeps_every_weight_of_other_architectures(tmp_path, options):
    model = LeanAlbertForPreTraining(LeanAlbertConfig(**{**OPTIONS, **options}))
    model.save_pretrained(tmp_path / "checkpoint")
    arguments = [str(tmp_path / "checkpoint"), str(tmp_path / "lean"), "--tokenizer", str(ROOT / "demo" / "tokenizer")]
    assert main(arguments) == 0
    exported = LeanAlbertForPreTraining.from_pretrained(tmp_path / "lean").state_dict()
    assert exported.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(exported[name], tensor), name


def test_export_of_a_masked_model_without_order_head(tmp_path):
    model = LeanAlbertForMaskedLM(LeanAlbertConfig(**OPTIONS))
    model.save_pretrained(tmp_path / "checkpoint")
    load_tokenizer(ROOT / "demo" / "tokenizer").save_pretrained(tmp_path / "checkpoint")
    assert main([str(tmp_path / "checkpoint"), str(tmp_path / "lean")]) == 0
    exported = LeanAlbertForMaskedLM.from_pretrained(tmp_path / "lean").state_dict()
    assert all(torch.equal(exported[name], tensor) for name, tensor in model.state_dict().items())


# -- the model card ---------------------------------------------------------------------------------------------------


def write_lines(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def metrics(tmp_path) -> Path:
    arguments = {"run_id": "my-exp", "target_batch_size": 4096, "learning_rate": 0.0025, "min_learning_rate": None}
    arguments["dataset_sources"] = ["/home/somebody/corpus/*.txt", "org/prose:ru"]
    records = [{"event": "start", "arguments": arguments}]
    records += [{"event": "epoch", "epoch": e, "mlm_loss": 8.0 - e / 100} for e in range(1, 201)]
    return write_lines(tmp_path / "metrics.jsonl", records)


@pytest.fixture
def ledger(tmp_path, checkpoint) -> Path:
    row = {"model": "run-ab12cd", "source": str(checkpoint), "arguments": {}}
    rows = [
        {**row, "task": "RCB", "key": "old", "seed": 0, "dev": {"f1": 0.1}},
        *({**row, "task": "RCB", "key": "new", "seed": s, "dev": {"f1": 0.25 + 0.5 * s, "f1/x": 1.0}} for s in (0, 1)),
        {**row, "task": "TERRa", "key": "a", "seed": 0, "dev": {"accuracy": 0.625}},
        {**row, "task": "TERRa", "key": "b", "model": "other", "source": "other", "seed": 0, "dev": {"accuracy": 0.9}},
    ]
    return write_lines(tmp_path / "runs.jsonl", rows)


SVG = "{http://www.w3.org/2000/svg}"


def test_model_card_says_what_the_files_say(checkpoint, metrics, ledger, tmp_path):
    aux = [{"event": "swarm_epoch", "epoch": e, "mlm_loss": 7.0 - e / 100} for e in (1, 2, 300)]
    aux += [{"event": "held_out", "epoch": e, "loss": 5.0 - e, "accuracy": 0.25, "order_accuracy": 0.5} for e in (1, 2)]
    pairs = {"event": "minimal_pairs", "low": 0.55, "high": 0.65, "syntax": 0.7, "semantics": None, "num_pairs": 450}
    aux += [{**pairs, "epoch": 1, "accuracy": 0.5}, {**pairs, "epoch": 2, "accuracy": 0.6}, {**pairs, "epoch": 3}]
    arguments = ["--metrics", str(metrics), str(write_lines(tmp_path / "aux.jsonl", aux)), "--ledger", str(ledger)]
    arguments += ["--data", "Prose of the 19th century.", "--license", "apache-2.0", "--name", "org/lean"]
    assert main([str(checkpoint), str(tmp_path / "lean"), *arguments]) == 0
    card = (tmp_path / "lean" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlanguage: ru\n") and "\nlicense: apache-2.0\n---\n\n# lean\n" in card
    assert 'mask_token: "[MASK]"' in card and 'name = "org/lean"' in card
    assert "3 layers, whose large matrices come from 1 shared set, hidden size 32, 4000 tokens" in card
    assert "Prose of the 19th century.\n\nSources: `corpus/*.txt`, `org/prose:ru`." in card
    assert "/home/somebody" not in card
    assert "| `--target_batch_size` | 4096 |" in card and "min_learning_rate" not in card
    assert "| 1 | 6.990 |\n| 2 | 6.980 |\n| 300 | 4.000 |" in card, "the swarm's curve comes before one trainer's"
    assert "After epoch 2:" in card and "| loss of masked tokens, nats | 3.000 |" in card
    assert "After epoch 2, on 450 pairs of RuBLiMP" in card and "without fine-tuning" not in card
    assert "| all | 0.600 (0.550 to 0.650) |\n| syntax | 0.700 |\n" in card, "and no level without a score"
    assert "| RCB | f1 0.500 ± 0.354 | 2 |" in card, "the newest settings, mean and deviation over seeds"
    assert "| TERRa | accuracy 0.625 | 1 |" in card, "not the score of another model"
    picture = xml.etree.ElementTree.parse(tmp_path / "lean" / "learning_curve.svg").getroot()
    lines = [element.get("d").replace("M", "L").split("L")[1:] for element in picture.iter(f"{SVG}path")]
    assert [len(line) for line in lines] == [3, 2]
    assert lines[0][-1] == "348.0 137.5", "4 on a scale from 7 (10 below the top) to 3 (180)"
    assert "".join(picture.find(f"{SVG}text").itertext()) == "masked-token loss, natstrainingheld-out text"


@pytest.mark.parametrize("odd", ["1e308", "NaN", "1" * 400, '"x"', "[]", "null", "0"])
@pytest.mark.parametrize(
    "field", ["epoch", "mlm_loss", "loss", "arguments", "dataset_sources", "accuracy", "num_pairs"]
)
def test_model_card_leaves_out_what_no_run_can_have(checkpoint, tmp_path, odd, field):
    records = [{"event": "start", "arguments": {"dataset_sources": ["a.txt"], "seed": 1}}]
    records += [{"event": "epoch", "epoch": epoch, "mlm_loss": 4.0} for epoch in (1, 2)]
    records += [{"event": "held_out", "epoch": 2, "loss": 4.0}]
    records += [{"event": "minimal_pairs", "epoch": 2, "accuracy": 0.6, "low": 0.5, "high": 0.7, "num_pairs": 9}]
    for record in (records[0], records[0]["arguments"], *records[2:]):
        record.update({field: "ODD"} if field in record else {})
    write_lines(tmp_path / "m.jsonl", records)
    (tmp_path / "m.jsonl").write_text((tmp_path / "m.jsonl").read_text().replace('"ODD"', odd))
    assert main([str(checkpoint), str(tmp_path / "lean"), "--metrics", str(tmp_path / "m.jsonl")]) == 0


def test_model_card_thins_a_long_curve_out(checkpoint, metrics, tmp_path):
    assert main([str(checkpoint), str(tmp_path / "lean"), "--metrics", str(metrics)]) == 0
    card = (tmp_path / "lean" / "README.md").read_text(encoding="utf-8")
    rows = [line for line in card.partition("nats |")[2].splitlines() if line[2:3].isdigit()]
    assert len(rows) == 12 and rows[0] == "| 1 | 7.990 |" and rows[-1] == "| 200 | 6.000 |"
    assert evenly_spaced([1, 2, 3], 12) == [1, 2, 3]


def test_model_card_takes_the_ledgers_rows_of_a_model_by_name(checkpoint, ledger, tmp_path, capsys):
    arguments = [str(checkpoint), str(tmp_path / "lean"), "--ledger", str(ledger), "--ledger-model"]
    assert main([*arguments, "other"]) == 0
    card = (tmp_path / "lean" / "README.md").read_text(encoding="utf-8")
    assert "accuracy 0.900" in card and "RCB" not in card
    assert main([*arguments, "third"]) == 2
    assert "no run of third in it; name one of its models (other, run-ab12cd) with --ledger-model" in (
        capsys.readouterr().err
    )


# -- where it goes ----------------------------------------------------------------------------------------------------


class FakeHub:
    """Stands for HfApi: notes what it is asked to do."""

    def __init__(self, error: Exception | None = None, files: Sequence[str] = ()):
        self.calls, self.error, self.files = [], error, [".gitattributes", *files]

    def list_repo_files(self, repo_id):
        return self.files

    def create_repo(self, repo_id, **options):
        self.calls.append(("create", repo_id, options))

    def upload_folder(self, **options):
        if self.error:
            raise self.error
        self.calls.append(("upload", options["repo_id"], sorted(os.listdir(options["folder_path"]))))


def test_push_lists_what_it_would_send_and_sends_it_only_when_told(checkpoint, tmp_path, capsys):
    hub, out = FakeHub(), tmp_path / "lean"
    assert main([str(checkpoint), str(out), "--push", "org/lean", "--dry-run"], api=hub) == 0
    printed = capsys.readouterr().out
    assert hub.calls == [] and "nothing was sent" in printed
    files = sorted(path.name for path in out.iterdir())
    assert f"would send {len(files)} files" in printed and all(f"  {name}\n" in printed for name in files)
    assert main([str(checkpoint), str(out), "--push", "org/lean"], api=hub) == 0
    assert hub.calls == [("create", "org/lean", {"exist_ok": True}), ("upload", "org/lean", files)]
    assert capsys.readouterr().out.endswith("https://huggingface.co/org/lean\n")


def hub_error(status, said):
    """As huggingface_hub raises it: the reason stands in the third line."""
    request = httpx.Request("POST", "https://huggingface.co/api/repos/create")
    text = f"Client error '{status}' for url (Request ID: Root=1-2)\n\n{said}\nmore lines"
    return HfHubHTTPError(text, response=httpx.Response(status, request=request), server_message=said)


def unreachable():
    try:
        try:
            raise httpx.ConnectError("[Errno 111] Connection refused")
        except httpx.ConnectError as error:
            raise LocalEntryNotFoundError("An error happened while trying to locate the files on the Hub.") from error
    except LocalEntryNotFoundError as error:
        return error


@pytest.mark.parametrize(
    ("error", "reason", "advice"),
    [
        (hub_error(401, "Invalid username or password."), "401: Invalid username or password.", "hf auth login"),
        (
            hub_error(403, "You don't have the rights to create a model under org"),
            "403: You don't have the ri",
            "token",
        ),
        (hub_error(500, "Internal Error"), "500: Internal Error", "try again later"),
        (httpx.ConnectError("[Errno 111] Connection refused"), "[Errno 111] Connection refused", "the network"),
        (unreachable(), "[Errno 111] Connection refused", "the network"),
        (LocalTokenNotFoundError("Token is required"), "this machine has no token", "hf auth login"),
        (OfflineModeIsEnabled("Cannot reach"), "HF_HUB_OFFLINE is set", "unset it"),
    ],
)
def test_push_that_fails_says_why_and_what_to_do_in_one_line(checkpoint, tmp_path, capsys, error, reason, advice):
    assert main([str(checkpoint), str(tmp_path / "lean"), "--push", "org/lean"], api=FakeHub(error)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"({reason}" in said and "Request ID" not in said
    assert advice in said.partition(" is complete: ")[2]
    assert ("log in" in said) == ("hf auth login" in advice)
    assert (tmp_path / "lean" / "model.safetensors").is_file()


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_push_mentions_what_the_repository_holds_besides(checkpoint, tmp_path, capsys, flags):
    hub = FakeHub(files=["README.md", "pytorch_model.bin", "tokenizer/tokenizer.json"])
    assert main([str(checkpoint), str(tmp_path / "lean"), "--push", "org/lean", *flags], api=hub) == 0
    said = capsys.readouterr().out
    assert "org/lean holds other files, which stay there: pytorch_model.bin, tokenizer/tokenizer.json\n" in said


def test_export_replaces_an_earlier_export_and_nothing_else(checkpoint, tmp_path, capsys):
    out = tmp_path / "lean"
    assert main([str(checkpoint), str(out), "--data", "first"]) == 0
    assert main([str(checkpoint), str(out), "--data", "second"]) == 0
    assert "second" in (out / "README.md").read_text()
    (out / "notes.txt").write_text("mine")
    kept = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main([str(checkpoint), str(out), "--data", "third"]) == 2
    assert "is not empty and it holds notes.txt" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == kept


def test_export_that_cannot_be_written_leaves_the_earlier_one(checkpoint, tmp_path, monkeypatch, capsys):
    out = tmp_path / "lean"
    assert main([str(checkpoint), str(out), "--data", "first"]) == 0
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "flush_to_disk", full)
    assert main([str(checkpoint), str(out), "--data", "second"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert "first" in (out / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("killed", [False, True])
def test_export_interrupted_within_the_swap_is_whole(checkpoint, tmp_path, monkeypatch, capsys, killed):
    out, original = tmp_path / "lean", Path.rename
    assert main([str(checkpoint), str(out), "--data", "first"]) == 0

    def rename(self, target):
        if self.suffix == ".new":
            raise KeyboardInterrupt
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(files, "exchange", lambda one, other: False)  # as on a file system that cannot
        if killed:  # nothing is tidied up
            patch.setattr(files, "settle", lambda path: None)
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(Path, "rename", rename if killed else interrupted_once(rename, original))
        assert main([str(checkpoint), str(out), "--data", "second"]) == 130
    assert out.exists() is not killed
    if killed:
        assert main([str(checkpoint / "nowhere"), str(out)]) == 2
    assert "second" in (out / "README.md").read_text(), "it was complete before the names were changed"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".lean")] == []
    assert "stopped" in capsys.readouterr().err


def interrupted_once(rename, original):
    calls = iter([rename])

    def call(self, target):
        return (next(calls, original) if self.suffix == ".new" else original)(self, target)

    return call


def test_export_leaves_out_a_pooler_that_no_head_uses(model, checkpoint, tmp_path):
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("sop_classifier.")}
    torch.save({"model": state}, checkpoint / "state.pth")
    assert main([str(checkpoint / "state.pth"), str(tmp_path / "lean")]) == 0
    exported = LeanAlbertForMaskedLM.from_pretrained(tmp_path / "lean")
    assert torch.equal(exported.predictions.bias, model.predictions.bias)


def not_finite(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    weights["predictions.bias"][0] = float("nan")
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})


ROW = '{"task": "RCB", "model": "m", "source": "s", "key": "k", "seed": 0, "dev": {"f1": 0.5}}\n'


def lack(name):
    return lambda checkpoint: (checkpoint / name).unlink()


def cut_weights(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-500])


def other_width(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))


def write(name, text):
    return lambda checkpoint: (checkpoint.parent / name).write_text(text)


@pytest.mark.parametrize(
    ("fault", "arguments", "message"),
    [
        (None, ["CHECKPOINT/nowhere", "OUT"], "nowhere: no such file or directory; pass state.pth"),
        (lack("model.safetensors"), ["CHECKPOINT", "OUT"], "no model.safetensors in this directory"),
        (lack("config.json"), ["CHECKPOINT", "OUT"], "no config.json with it; pass --model-config FILE"),
        (lack("tokenizer.json"), ["CHECKPOINT", "OUT"], "no tokenizer with it; pass --tokenizer DIRECTORY"),
        (not_finite, ["CHECKPOINT", "OUT"], "values of predictions.bias and 1 more are not finite"),
        (cut_weights, ["CHECKPOINT", "OUT"], "model.safetensors: not a complete safetensors file"),
        (other_width, ["CHECKPOINT", "OUT"], "does not fit LeanAlbertForPreTraining: of another shape: albert.transfo"),
        (write("c.json", "{"), ["CHECKPOINT", "OUT", "--model-config", "AUX/c.json"], "c.json: not a LeanALBERT conf"),
        (write("c.json", "[" * 100_000), ["CHECKPOINT", "OUT", "--model-config", "AUX/c.json"], "c.json: not a Lean"),
        (write("c.json", "[]"), ["CHECKPOINT", "OUT", "--model-config", "AUX/c.json"], "c.json: not a LeanALBERT conf"),
        (None, ["CHECKPOINT", "OUT", "--model-config", "AUX/none.json"], "none.json: no such file"),
        (None, ["CHECKPOINT", "OUT", "--tokenizer", "AUX/none"], "there is no such directory"),
        (None, ["CHECKPOINT", "CHECKPOINT"], "is the checkpoint itself"),
        (None, ["CHECKPOINT/model.safetensors", "AUX"], "is not empty and it holds checkpoint; name a new directory"),
        (write("file", ""), ["CHECKPOINT", "AUX/file"], "is a file; name a directory to make"),
        (None, ["CHECKPOINT", "OUT", "--dry-run"], "pass --push ORGANISATION/NAME as well"),
        (None, ["CHECKPOINT", "OUT", "--push", "a/b/c"], "a/b/c"),
        (None, ["CHECKPOINT", "OUT", "--metrics", "AUX/none.jsonl"], "none.jsonl: no such file"),
        (write("m.jsonl", "{}\nnot json\n"), ["CHECKPOINT", "OUT", "--metrics", "AUX/m.jsonl"], "m.jsonl:2: not a"),
        (write("m.jsonl", ""), ["CHECKPOINT", "OUT", "--metrics", "AUX/m.jsonl"], "--metrics: there is no record in"),
        (write("m.jsonl", "[" * 100_000 + "\n{}"), ["CHECKPOINT", "OUT", "--metrics", "AUX/m.jsonl"], "l:1: not"),
        (write("r.jsonl", ROW.replace("0.5", "1e999")), ["CHECKPOINT", "OUT", "--ledger", "AUX/r.jsonl"], "dev scores"),
        (write("r.jsonl", ROW.replace("0.5", "[]")), ["CHECKPOINT", "OUT", "--ledger", "AUX/r.jsonl"], "dev scores"),
        (write("r.jsonl", ROW.replace('"k"', "[]")), ["CHECKPOINT", "OUT", "--ledger", "AUX/r.jsonl"], "lacks task"),
        (write("r.jsonl", "{}\n"), ["CHECKPOINT", "OUT", "--ledger", "AUX/r.jsonl"], "--ledger: not a ledger"),
    ],
)  # fmt: skip
def test_export_explains_bad_input_in_one_line_and_writes_nothing(
    checkpoint, tmp_path, capsys, fault, arguments, message
):
    if fault is not None:
        fault(checkpoint)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    folders = {"CHECKPOINT": str(checkpoint), "OUT": str(tmp_path / "lean"), "AUX": str(checkpoint.parent)}
    words = []
    for word in arguments:
        for placeholder, folder in folders.items():
            word = word.replace(placeholder, folder) if word.startswith(placeholder) else word
        words.append(word)
    assert main(words, api=FakeHub()) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m src.export: error: ") and error.count("\n") == 1
    assert message in error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_export_may_be_read_by_whoever_may_read_new_files(checkpoint, tmp_path):
    before = os.umask(0o027)
    try:
        assert main([str(checkpoint), str(tmp_path / "out")]) == 0
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [({"intermediate_size": 10**8}, "does not fit its configuration"), ({"hidden_size": 10**15}, "must not exceed")],
)
def test_export_takes_no_memory_for_sizes_that_the_weights_do_not_have(checkpoint, tmp_path, capsys, change, complaint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | change))
    assert main([str(checkpoint), str(tmp_path / "lean")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and complaint in said
