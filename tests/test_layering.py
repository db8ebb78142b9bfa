"""Who may import whom (see docs/architecture.md), and that the models need nothing but torch and transformers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - {"arguments", "command_line"}
ARGUMENTS_READERS = {
    "tasks/mlm/task.py",
    "src/access/membership.py",
    "src/access/settings.py",
    "src/auxiliary/build.py",
    "src/preflight/__main__.py",
    "src/preflight/network.py",
    "src/preflight/run.py",
    "src/process/same_peer.py",
    "src/settings/manifest.py",
    "src/swarm/at_work.py",
    "src/swarm/build.py",
    "src/swarm/join.py",
    "src/swarm/dht.py",
    "src/swarm/run_card.py",
    "src/swarm/take_up.py",
    "src/trainer/build.py",
    "src/trainer/callback.py",
    "src/trainer/data_schedule.py",
    "src/trainer/hf_trainer.py",
}
# room of src -> rooms that its files may import from; what stands beside the rooms, in COMMON, imports no other
ROOMS = {
    "models": (),
    "process": (),
    "metrics": (),
    "optim": (),
    "settings": ("models", "process"),
    "access": ("metrics", "models", "settings"),
    "export": ("metrics", "models"),
    "swarm": ("access", "metrics", "models", "optim", "process", "settings"),
    "preflight": ("access", "metrics", "models", "optim", "process", "settings", "swarm"),
    "trainer": ("access", "metrics", "models", "optim", "preflight", "process", "settings", "swarm"),
    "auxiliary": ("access", "export", "metrics", "models", "preflight", "process", "settings", "swarm"),
}
COMMON = {"files", "compiled", "console", "version"}
STANDARD_LIBRARY = set(sys.stdlib_module_names)
PRETRAINING = {f"src.{room}" for room in ROOMS if room != "models"}
# path prefix -> modules (and all below them) that files there must not import
FORBIDDEN = {
    "command_line.py": {"torch", "transformers", "arguments", "src", "tasks"},
    "arguments.py": {"src", "tasks", "hivemind", "bitsandbytes", "datasets"},
    "src/": {"tasks", "command_line"},
    "src/models/": {"arguments", "hivemind", "bitsandbytes", "datasets"},
    "tasks/finetuning/": {*PRETRAINING, "tasks.mlm"},
    "tasks/russian_superglue/": {*PRETRAINING, "tasks.mlm"},
    "tasks/rucola.py": {*PRETRAINING, "tasks.mlm"},
}
# The last two (google is protobuf) are imported by the functions that read a sentencepiece model, and only there.
MODEL_DEPENDENCIES = {
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "sentencepiece",
    "google",
}


def source_files():
    paths = [*ROOT.glob("*.py"), *ROOT.glob("src/**/*.py"), *ROOT.glob("tasks/**/*.py")]
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def imported_modules(name):
    """Absolute names of all modules a file imports, wherever in the file the import stands; and relative levels."""
    package = Path(name).with_suffix("").parts[:-1]
    modules, levels = set(), set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            levels.add(node.level)
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, node.module] if node.module else base)
            modules |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return modules, levels


@pytest.mark.parametrize("name", [name for name in source_files() if name.count("/") == 2 and name.startswith("src/")])
def test_rooms_import_only_from_those_they_may(name):
    room = name.split("/")[1]
    modules = {module.split(".")[1] for module in imported_modules(name)[0] if module.startswith("src.")}
    allowed = {room, *COMMON, *ROOMS[room]}
    assert modules <= allowed | ({"models"} if room == "models" else set())


def test_rooms_form_no_circle():
    done = set()
    while len(done) < len(ROOMS):
        ready = {room for room, others in ROOMS.items() if room not in done and done >= set(others)}
        assert ready, f"a circle among {set(ROOMS) - done}"
        done |= ready


def test_what_all_rooms_use_uses_none():
    for name in COMMON:
        assert not {module for module in imported_modules(f"src/{name}.py")[0] if is_below(module, "src")}


def is_below(module, parent):
    return module == parent or module.startswith(f"{parent}.")


@pytest.mark.parametrize("name", source_files())
def test_imports_point_one_way(name):
    modules, levels = imported_modules(name)
    forbidden = set().union(*(names for prefix, names in FORBIDDEN.items() if name.startswith(prefix)))
    if "/" in name:
        forbidden |= SCRIPTS
    if "/" in name and name not in ARGUMENTS_READERS:
        forbidden.add("arguments")
    assert not {module for module in modules for parent in forbidden if is_below(module, parent)}
    if name.startswith("src/models/"):
        outside = {module.split(".")[0] for module in modules} - {"src"} - STANDARD_LIBRARY
        assert outside <= MODEL_DEPENDENCIES
        assert not {module for module in modules if is_below(module, "src") and not is_below(module, "src.models")}
    relative = name.startswith("src/models/") or name == "src/__init__.py"
    assert relative or levels <= {0}, "relative imports are for src/models alone"


@pytest.mark.parametrize("name", [name for name in source_files() if name.startswith("src/models/")])
def test_models_import_each_other_relatively(name):
    tree = ast.parse((ROOT / name).read_text())
    absolute = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0]
    assert not [module for module in absolute if is_below(module, "src")]


@pytest.mark.parametrize("name", source_files())
def test_nobody_edits_the_module_search_path(name):
    assert "sys.path" not in (ROOT / name).read_text()


PUBLIC_NAMES = (
    "LeanAlbertConfig, LeanAlbertModel, LeanAlbertForPreTraining, LeanAlbertForMaskedLM, "
    "LeanAlbertForSequenceClassification, load_tokenizer"
)
BUILD = "LeanAlbertModel(LeanAlbertConfig(hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=9))"


def run_python(code, directory):
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=directory, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr


def test_models_import_with_training_packages_blocked_and_have_no_names_but_those_listed():
    blocked = ("hivemind", "bitsandbytes", "datasets", "wandb", "sklearn", "razdel", "sentencepiece", "google.protobuf")
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\nfrom src import {PUBLIC_NAMES}\n{BUILD}"
    run_python(f"{code}\nimport src\nassert not hasattr(src, 'nothing') and src.LeanAlbertConfig.model_type", ROOT)


def test_package_works_in_a_sub_folder_of_another_project(tmp_path):
    (tmp_path / "thirdparty").mkdir()
    (tmp_path / "thirdparty" / "lean").symlink_to(ROOT, target_is_directory=True)
    code = f"from thirdparty.lean.src import {PUBLIC_NAMES}\n{BUILD}\nimport sys\nassert 'src' not in sys.modules"
    run_python(code, tmp_path)


def test_help_of_the_trainer_loads_neither_models_nor_hivemind():
    code = (
        "import sys, run_trainer\n"
        "sys.argv = ['run_trainer.py', '--help']\n"
        "try:\n    run_trainer.main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'hivemind', 'src.models', 'wandb', 'datasets'} & set(sys.modules)"
    )
    run_python(code, ROOT)
