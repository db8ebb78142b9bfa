"""What is patched and overridden of hivemind is listed once, and is still there."""

import re
import subprocess
import sys
from pathlib import Path

import hivemind
import pytest

from src.swarm.hivemind_fixes import FIXES, OVERRIDES, source_digest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("fix", FIXES, ids=lambda fix: fix.make.__name__)
def test_fix_is_explained_and_its_test_exists(fix):
    assert fix.fault and fix.where and fix.remedy and fix.changes
    path, _, name = fix.test.partition("::")
    assert f"def {name}" in (REPOSITORY / path).read_text() if name else (REPOSITORY / path).is_file()


@pytest.mark.parametrize("owner", OVERRIDES, ids=lambda owner: owner.__name__)
def test_hivemind_still_has_what_we_override(owner):
    for name in OVERRIDES[owner]:
        assert hasattr(owner, name), f"{owner.__module__}.{owner.__name__}.{name} is gone: look for its uses"


def run(code: str) -> subprocess.CompletedProcess:
    code = f"import hivemind\nfrom src.swarm import hivemind_fixes\n{code}"
    return subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


def test_all_are_applied_once_and_change_what_they_say():
    done = run(
        "before = [thing for fix in hivemind_fixes.FIXES for thing in fix.changes]\n"
        "hivemind_fixes.apply()\nhivemind_fixes.apply()\n"
        "assert len(hivemind_fixes._applied) == len(hivemind_fixes.FIXES)\n"
        "from hivemind.averaging.control import StepControl\nassert StepControl.cancel not in before"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ("hivemind.__version__ = '1.1.13'", r"hivemind 1\.1\.13 is installed, .*1\.1\.12 is needed"),
        ("hivemind_fixes.source_digest = lambda thing: 'other'", "of the installed hivemind is not that of"),
    ],
)
def test_another_hivemind_is_refused_before_anything_is_changed(change, error):
    done = run(f"{change}\ntry:\n    hivemind_fixes.apply()\nfinally:\n    assert not hivemind_fixes._applied")
    assert done.returncode == 1 and re.search(error, done.stderr)


def test_digests_are_those_of_sources():
    assert source_digest(hivemind.DHT) != source_digest(hivemind.Optimizer) and len(source_digest(hivemind.DHT)) == 16


# Where the functions stand that a fix calls.
MADE_HERE = (
    "src/swarm/hivemind_fixes.py",
    "src/access/ownership.py",
    "src/access/record_limits.py",
    "src/access/gate.py",
)
# Settings of one start, not faults.
NAMED = {"src/swarm/dht.py": "P2P._UNIX_SOCKET_PREFIX", "src/swarm/clock.py": "module.get_dht_time"}
PATCH = re.compile(
    r"^ +((?:hivemind(?:\.\w+)+|P2P|DHTProtocol|StepControl|GroupKeyManager|module)\.\w+) = ", re.MULTILINE
)


def test_nobody_else_patches_hivemind():
    for path in (REPOSITORY / "src").rglob("*.py"):
        name = path.relative_to(REPOSITORY).as_posix()
        found = set(PATCH.findall(path.read_text())) - {NAMED.get(name)}
        assert not found or name in MADE_HERE, (name, found)
