"""Fixtures shared by all tests: where the optional reference data lies, how many threads a test may use, and that no
peer leaves a file behind."""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from src.process.sockets import is_abandoned
from tests import warm_start

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("LEANALBERT_SHARED", REPOSITORY.parent / "shared"))

torch.set_num_threads(1)
os.environ["LEANALBERT_CPU_KERNELS"] = "onednn"  # nothing is measured where other tests run: the same results each time

# Fixtures in which two or more peers meet; modules and tests in which they do otherwise are marked where they stand.
SWARM_FIXTURES = {"group", "joined", "member_and_restart", "members", "running", "start_optimizers", "start_peers",
                  "start_swarm", "swarm", "two_nodes"}  # fmt: skip


# Files of ten seconds and more. They come first, so that no worker is left alone with one of them at the end.
LONG_FILES = [
    "test_finetune_scripts.py", "test_watchdog.py", "test_bad_input.py", "test_readme.py", "test_gpu.py",
    "test_memory.py", "test_training.py", "test_overfit.py", "test_scripts.py", "test_transformer.py",
    "test_callback.py", "test_layering.py", "test_text_ends.py", "test_upload_to_hub.py", "test_history.py",
]  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SWARM_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("swarm")
    items.sort(key=lambda item: LONG_FILES.index(item.path.name) if item.path.name in LONG_FILES else len(LONG_FILES))


def _directory_or_skip(path: Path, what: str) -> Path:
    if not path.is_dir():
        pytest.skip(
            f"{what} not available at {path} (set LEANALBERT_SHARED to the folder that holds golden/ and data/)"
        )
    return path


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Outputs, gradients and optimizer states recorded from the original implementation."""
    return _directory_or_skip(SHARED / "golden", "golden reference files are")


@pytest.fixture(scope="session")
def shared_data_dir() -> Path:
    """Real RuCoLA and Russian SuperGLUE records and a corpus of Russian prose."""
    return _directory_or_skip(SHARED / "data", "real evaluation data is")


@pytest.fixture(scope="session", autouse=True)
def temporary_directory():
    """Where peers make temporary files: TMPDIR of all programs that tests start, and where hivemind makes its sockets
    in this one. Each worker has its own."""
    own = Path(tempfile.gettempdir())  # of this program: Python remembers it
    directory = Path(tempfile.mkdtemp(prefix="peers-", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(directory))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(own / "torchinductor"))
        if "hivemind" in sys.modules:  # after collection: else no test uses it here
            from hivemind import DHT
            from hivemind.p2p import P2P

            from src.process import sockets

            patch.setattr(P2P, "_UNIX_SOCKET_PREFIX", f"/unix{directory}/")
            patch.setattr(sockets, "_own", directory)
            patch.setattr(DHT, "shutdown", shut_down_patiently(DHT.shutdown))
        yield directory
    shutil.rmtree(directory)


def shut_down_patiently(shutdown):
    """A node of this process, behind which no supervisor cleans up, must end by itself. That takes 3 s more when the
    process of an averager has ended with a request under way: hivemind 1.1.12 pauses then (dht/dht.py, `_run`)."""

    def shut_down(node) -> None:
        node.shutdown_timeout = 10.0
        shutdown(node)

    return shut_down


@pytest.fixture(scope="session", autouse=True)
def scripts_start_warm(temporary_directory):
    """Also those that `src.process.local_swarm` starts."""
    with pytest.MonkeyPatch.context() as patch:
        warm_start.install(patch)
        yield


_seen: set[Path] = set()


@pytest.fixture(autouse=True)
def no_file_is_left(request, temporary_directory):
    """After every test, the temporary directory holds nothing whose peer has ended."""
    yield
    if request.node.get_closest_marker("fails_to_start"):
        _seen.update(temporary_directory.glob("p2pd-*"))
    give_up_at = time.monotonic() + 5.0  # torch's helper ends two seconds after its last user
    while (left := left_behind(temporary_directory) - _seen) and time.monotonic() < give_up_at:
        time.sleep(0.1)
    _seen.update(left)
    assert not left, f"left in the temporary directory: {', '.join(sorted(path.name for path in left))}"


def left_behind(directory: Path) -> set[Path]:
    """What lies in a directory, but for sockets on which a process listens, and directories that a process uses."""
    # torchrun's own directories stay after each of its runs
    entries = {path for path in directory.iterdir() if not path.name.startswith("torchelastic_")}
    if not entries:
        return entries
    listening = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()]
    in_use = {path for path in entries if any(f"{name}/".startswith(f"{path}/") for name in listening)}
    return {path for path in entries - in_use if not path.is_dir() or is_abandoned(path)}


@pytest.fixture(autouse=True)
def interrupts_still_work():
    """hivemind makes the process that starts its averagers deaf to Ctrl+C; a test run must not stay so."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def shut_down_at_end():
    """Call it with anything that has ``shutdown()``; the last one started is shut down first."""
    with contextlib.ExitStack() as stack:

        def register(started):
            stack.callback(started.shutdown)
            return started

        yield register
