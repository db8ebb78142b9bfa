"""The command for somebody else's GPU: what cannot run there is named, what hangs is ended, what ran is kept."""

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks import gpu, measure, training_step
from benchmarks.encoder import PEER

VERSION = importlib.metadata.version("torch")
RELEASE = VERSION.partition("+")[0]

REPOSITORY = Path(__file__).resolve().parents[2]
# Parts that need no GPU and take no time, in the place of the real ones.
STAND_INS = """
import sys
from benchmarks import gpu
gpu.GRACE_SECONDS, gpu.LEAST_SECONDS = 0.5, 0.1
gpu.look_at_machine = lambda device: ({"devices": 2}, "")
gpu.required_versions = lambda: {"torch": "9.9", "no-such-package": "1.0"}
figures = '''import sys
from pathlib import Path
row = '{"claim": "speed", "case": "small", "side": "ours", "value": 5, "unit": "tokens/s", "ratio": 2.5, '
row += '"peer": "theirs"}'
folder = sys.argv[sys.argv.index('--results') + 1]
Path(folder, 'x.json').write_text('{"rows": [' + row + '], "notes": ["a note"]}')'''
arguments = "import sys; sys.exit(sys.argv[1] != 'cpu' or float(sys.argv[2]) <= 0)"
PARTS = [
    gpu.Part("good", ("-c", figures), ()),
    gpu.Part("silent", ("-c", "pass"), ()),
    gpu.Part("broken", ("-c", "print('before'); raise RuntimeError('no kernel')"), (), figures=False),
    gpu.Part("lacking", ("-c", "pass"), ("torch", "no-such-package"), figures=False),
    gpu.Part("large", ("-c", "pass"), (), num_devices=9, figures=False),
    gpu.Part("last", ("-c", "print('3 passed');" + arguments, "{device}", "{seconds}"), (), figures=False),
]
gpu.all_parts = lambda device: PARTS
"""
HANGS = """import subprocess, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(subprocess.Popen(["setsid", "sleep", "1000"]).pid, flush=True)
time.sleep(1000)"""


def run(code: str, tmp_path: Path, *flags: str) -> tuple[subprocess.CompletedProcess, dict]:
    """The command with stand-ins as ``code`` changes them; its result and what it has written."""
    results, scratch = tmp_path / "gpu.json", tmp_path / "scratch"
    scratch.mkdir()
    command = f"{STAND_INS}\n{code}\nsys.exit(gpu.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", command, "--device", "cpu", "--results", str(results), *flags],
        cwd=REPOSITORY, env={**os.environ, "TMPDIR": str(scratch)}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    return done, json.loads(results.read_text())


def test_every_part_is_named_with_what_came_of_it(tmp_path):
    done, results = run("", tmp_path)
    assert done.returncode == 1, done.stderr
    assert {part["part"]: (part["state"], part["reason"]) for part in results["parts"]} == {
        "good": ("ran", ""),
        "silent": ("failed", "wrote no figures: it said nothing"),
        "broken": ("failed", "ended with code 1: RuntimeError: no kernel"),
        "lacking": ("skipped", f"torch is {RELEASE}, not 9.9 (--any_version runs it all "
                    "the same); no-such-package 1.0 is not installed"),
        "large": ("not for this machine", "needs 9 devices, there are 2"),
        "last": ("ran", ""),
    }  # fmt: skip
    assert results["is_complete"] and results["machine"] == {"devices": 2}
    assert "before" in results["parts"][2]["output"] and results["parts"][0]["rows"][0]["value"] == 5
    assert re.search(r"speed +small +ours +5 tokens/s +2.5 x theirs\n", done.stdout), done.stdout
    assert (
        "good: a note" in done.stdout
        and "last: 3 passed" in done.stdout
        and "lacking: skipped, torch is" in done.stdout
    )
    assert {path.name for path in tmp_path.rglob("*")} == {"gpu.json", "scratch"}


def test_all_ran_is_code_0_whatever_is_for_other_machines(tmp_path):
    done, results = run("PARTS[:] = PARTS[0], PARTS[4]", tmp_path)
    assert done.returncode == 0, done.stderr
    assert [part["state"] for part in results["parts"]] == ["ran", "not for this machine"]


def test_other_versions_are_run_if_one_says_so(monkeypatch):
    monkeypatch.setattr(gpu, "required_versions", lambda: {"torch": "9.9", "no-such-package": "1.0"})
    packages = ("torch", "no-such-package")
    assert len(gpu.unmet_needs(packages, any_version=False)) == 2
    assert gpu.unmet_needs(packages, any_version=True) == ["no-such-package 1.0 is not installed"]
    monkeypatch.setattr(gpu, "required_versions", lambda: {"torch": RELEASE})
    assert gpu.unmet_needs(("torch",), any_version=False) == []


def test_part_that_hangs_is_ended_with_all_it_started_and_the_others_still_run(tmp_path):
    code = f"PARTS[:] = gpu.Part('hangs', ('-c', {HANGS!r}), (), share=20.0, figures=False), PARTS[5]"
    began = time.monotonic()
    done, results = run(code, tmp_path, "--minutes", "0.15")
    hung, last = results["parts"]
    assert done.returncode == 1 and last["state"] in ("ran", "skipped"), done.stderr
    assert "was ended" in hung["reason"] and time.monotonic() - began < 100
    if hung["output"]:  # else it was ended before it had begun, on a very slow machine
        assert not psutil.pid_exists(int(hung["output"][0]))


def test_stopping_the_command_ends_its_part(tmp_path):
    begun = tmp_path / "begun"
    hangs = HANGS.replace("time.sleep", f"open({str(begun)!r}, 'w').close(); time.sleep")
    command = f"{STAND_INS}\nPARTS[:] = [gpu.Part('hangs', ('-c', {hangs!r}), (), figures=False)]\n"
    flags = ["--device", "cpu", "--results", str(tmp_path / "gpu.json")]
    process = subprocess.Popen(
        [sys.executable, "-c", f"{command}sys.exit(gpu.main(sys.argv[1:]))", *flags],
        cwd=REPOSITORY, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    give_up_at = time.monotonic() + 100
    while not begun.exists() and time.monotonic() < give_up_at:
        time.sleep(0.05)
    below = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    assert process.wait(100) == 128 + signal.SIGTERM and below
    assert not [each for each in below if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def test_what_needs_only_torch_and_transformers_imports_nothing_else():
    blocked = ("hivemind", "bitsandbytes", "numba", "datasets", "razdel", "sentencex", "psutil", "matplotlib", "wandb")
    modules = (
        "benchmarks.training_step, benchmarks.encoder, benchmarks.mlm_head, tests.conftest, tests.models.test_memory, "
        "tests.models.test_transformer"
    )
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\nimport {modules}"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_figures_are_kept_when_the_command_is_killed_in_a_later_part(tmp_path):
    kill = "import os, signal; os.kill(os.getppid(), signal.SIGKILL)"
    done, results = run(f"PARTS[1] = gpu.Part('kills', ('-c', {kill!r}), ())", tmp_path)
    assert done.returncode == -9
    assert [part["part"] for part in results["parts"]] == ["good"] and not results["is_complete"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--results", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert "no GPU" in done.stderr and VERSION in done.stderr and done.stderr.count("\n") == 1


def test_without_torch_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "PROBE", "import no_such_module")
    assert gpu.main([]) == 2
    assert "torch cannot be used: ModuleNotFoundError: No module named 'no_such_module'" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "value", "named"), [("--minutes", "-1", "-1.0: must"), ("--only", "x", "'x': there")])
def test_bad_flags_are_named_with_their_values(flag, value, named, capsys):
    with pytest.raises(SystemExit) as caught:
        gpu.main([flag, value])
    assert caught.value.code == 2 and f"error: {flag} {named}" in capsys.readouterr().err


def test_machine_is_described_where_packages_are_missing(monkeypatch):
    monkeypatch.setattr(measure, "PACKAGES", (*measure.PACKAGES, "no-such-package"))
    assert measure.machine()["no-such-package"] is None and measure.machine()["torch"] == VERSION


def test_parts_are_programs_that_exist_and_need_packages_that_are_required():
    versions = gpu.required_versions()
    for part in gpu.all_parts("cuda"):
        assert set(part.needs) <= set(versions), part.name
        for word in part.command:
            if word.startswith("benchmarks."):
                assert (REPOSITORY / f"{word.replace('.', '/')}.py").is_file(), part.name
    assert {"tests/models/test_memory.py", "tests/models/test_transformer.py"} <= set(gpu.gpu_tests("cuda").command)


@pytest.mark.parametrize(("visible", "devices"), [(None, "0"), ("3,5", "3"), ("GPU-1,GPU-2,GPU-3", "GPU-1")])
def test_part_sees_one_device_unless_it_needs_two(monkeypatch, visible, devices):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", visible)
    assert gpu.environment(1)["CUDA_VISIBLE_DEVICES"] == devices
    assert gpu.environment(2)["CUDA_VISIBLE_DEVICES"].count(",") == 1


def test_real_part_runs_here_in_small(tmp_path):
    flags = ["--device", "cpu", "--quick", "--only", "training step, fp16", "--any_version", "--results"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *flags, str(tmp_path / "gpu.json")],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["machine"]["torch"] == VERSION and results["machine"]["devices"] == 2
    ratios = {row["side"]: row["ratio"] for row in results["parts"][0]["rows"] if row["claim"].endswith("speed")}
    assert set(ratios) == set(training_step.ORDER) and ratios[PEER] == 1
    assert "training step, fp16: model FLOP utilisation" in done.stdout
