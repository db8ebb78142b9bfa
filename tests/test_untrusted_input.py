"""Nothing that comes from a file or from the network is unpickled: whoever sends it could run code here."""

import ast
import pickle
from pathlib import Path

import hivemind
import pytest
import torch

from src.models.checkpoint import read_state_dict
from src.trainer.backup import read_backup

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for folder in ("src", "tasks", "demo", "benchmarks") for path in ROOT.glob(f"{folder}/**/*.py"))
SOURCES += sorted(ROOT.glob("*.py"))


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def plant(kind: str, path: Path, mark: Path) -> None:
    content = {"model": {"weight": Bomb(mark)}, "optimizer": Bomb(mark), "scheduler": {}, "epoch": 1}
    if kind == "torch":
        torch.save(content, path)
    elif kind == "legacy torch":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("kind", ["torch", "legacy torch", "pickle"])
@pytest.mark.parametrize(
    ("load", "name"),
    [
        (read_state_dict, "state.pth"),
        (read_state_dict, "pytorch_model.bin"),
        (read_state_dict, "model.safetensors"),
        (read_backup, "backup.pth"),
    ],
    ids=["state.pth", "fine-tuned .bin", "safetensors", "backup"],
)
def test_malicious_pickle_runs_nothing(tmp_path, load, name, kind):
    mark = tmp_path / "executed"
    plant(kind, tmp_path / name, mark)
    with pytest.raises(ValueError, match=name):
        load(tmp_path / name)
    assert not mark.exists()


def test_malicious_pickle_would_run_if_it_were_unpickled(tmp_path):
    mark = tmp_path / "executed"
    plant("torch", tmp_path / "state.pth", mark)
    torch.load(tmp_path / "state.pth", weights_only=False)
    assert mark.exists()


def calls(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_source_unpickles_nothing(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unpicklers = {f"{module}.{name}" for module in ("pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
                  for name in ("load", "loads", "Unpickler", "open")}  # fmt: skip
    for call in calls(tree):
        assert ast.unparse(call.func) not in unpicklers, call.lineno
        if ast.unparse(call.func) in ("torch.load", "np.load", "numpy.load"):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert options.get("weights_only") == "True" or options.get("allow_pickle") == "False", call.lineno


@pytest.mark.parametrize("folder", ["averaging", "optim", "dht", "p2p", "compression", "utils"])
def test_hivemind_reads_the_network_without_pickle(folder):
    """It takes messages apart with protobuf, msgpack and numpy; pipes between its own processes are another matter."""
    for path in (Path(hivemind.__file__).parent / folder).glob("**/*.py"):
        imports = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        names = {alias.name for node in imports for alias in node.names} | {getattr(n, "module", None) for n in imports}
        assert "pickle" not in names and "torch.load" not in path.read_text(), path
