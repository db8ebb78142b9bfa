"""Whatever the repository imports is pinned to an exact version."""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
# names on the package index that differ from the module's
DISTRIBUTIONS = {"sklearn": "scikit-learn", "google": "protobuf"}
FILES = ("requirements.txt", "requirements-dev.txt")
BENCHMARK_FILES = ("requirements.txt", "requirements-bench.txt")


def requirements(*names: str) -> dict[str, str]:
    """{distribution: version} of the lines of these files; other lines must be comments or ``-r``."""
    pins = {}
    for name in names:
        for line in (REPOSITORY / name).read_text().splitlines():
            line = line.partition("#")[0].strip()
            if line and not line.startswith("-r "):
                match = re.fullmatch(r"([A-Za-z0-9_.-]+)==([0-9][A-Za-z0-9.]*)", line)
                assert match, f"{name}: {line!r} is not an exact version"
                pins[match[1].lower().replace("_", "-")] = match[2]
    return pins


def python_files() -> list[Path]:
    folders = ("src", "tasks", "demo", "benchmarks", "tests")
    return [*REPOSITORY.glob("*.py"), *(path for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))]


def imported_modules(path: Path) -> set[str]:
    """First names of everything a file imports, at its top or inside functions; relative imports left out."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules.add(node.module.partition(".")[0])
    return modules


def third_party(paths) -> dict[str, Path]:
    """{module: a file that imports it} without the standard library and this repository."""
    own = {path.stem for path in python_files()} | {path.name for path in REPOSITORY.iterdir() if path.is_dir()}
    found = {module: path for path in paths for module in imported_modules(path)}
    return {module: path for module, path in found.items() if module not in own | set(sys.stdlib_module_names)}


def test_requirements_are_exact_versions():
    assert len(requirements(*FILES)) > 10 and len(requirements(*BENCHMARK_FILES)) > 10


@pytest.mark.parametrize("development", [False, True], ids=["program", "tests"])
def test_requirements_pin_every_package_that_is_imported(development):
    pins = requirements(*FILES) if development else requirements("requirements.txt")
    others = {"benchmarks"} if development else {"benchmarks", "tests"}
    modules = third_party(path for path in python_files() if path.relative_to(REPOSITORY).parts[0] not in others)
    assert {"torch", "transformers", "hivemind"} <= set(modules)
    check_pins(modules, pins)


def test_requirements_pin_every_package_that_benchmarks_import():
    check_pins(third_party((REPOSITORY / "benchmarks").rglob("*.py")), requirements(*BENCHMARK_FILES))


def check_pins(modules: dict[str, Path], pins: dict[str, str]) -> None:
    for module, path in modules.items():
        name = DISTRIBUTIONS.get(module, module).replace("_", "-")
        assert name in pins, f"{path.relative_to(REPOSITORY)} imports {module}, which no requirements file pins"


def test_requirements_stay_below_numpy_2_4():
    # with numpy 2.4 hivemind's 8-bit averaging exchanges nothing and reports success
    assert tuple(map(int, requirements("requirements.txt")["numpy"].split(".")))[:2] < (2, 4)


def test_requirements_are_what_is_installed():
    installed = {name: importlib.metadata.version(name) for name in requirements(*FILES)}
    differing = {name: (installed[name], pin) for name, pin in requirements(*FILES).items()
                 if installed[name].partition("+")[0] != pin}  # fmt: skip
    assert not differing, "installed and pinned versions differ"


def test_requirements_explain_the_odd_pin():
    (line,) = (line for line in (REPOSITORY / "requirements.txt").read_text().splitlines() if "numpy" in line)
    assert "#" in line
