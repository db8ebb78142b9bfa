"""What the benchmark of the published size makes of its samples, and whether it runs."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks.published_size import MemoryWatch, Sample, describe_donor, full_rounds, judge, parse_arguments
from src.models.memory import PeerMemory
from src.process.local_swarm import REPOSITORY

GIGABYTE = 10**9
PREDICTED = PeerMemory(at_rest=6 * GIGABYTE, batch=0, taken=2 * GIGABYTE)


def figures_of(*, at_rest: float, joining: float, rounds: int = 3) -> dict:
    return {
        "trainer": {"at_rest": at_rest * GIGABYTE, "joining": joining * GIGABYTE},
        "rounds": [{"kind": "gradients"}] * rounds + [{"kind": "parameters"}],
    }


@pytest.mark.parametrize(
    ("figures", "broken"),
    [
        ({"at_rest": 6.2, "joining": 8.1}, []),
        ({"at_rest": 7.4, "joining": 12.9}, ["1.74 times", "at rest: predicted", "joining: predicted"]),
        ({"at_rest": 5.4, "joining": 8.0}, ["1.48 times", "off by +11%"]),
        ({"at_rest": 6.2, "joining": 8.1, "rounds": 2}, ["2 complete rounds"]),
    ],
)
def test_promises_are_judged(figures, broken):
    promises = judge(figures_of(**figures), {"trainer": PREDICTED}, epochs=3)
    missed = [text for text, kept in promises if not kept]
    assert len(missed) == len(broken) and all(part in text for part, text in zip(broken, missed, strict=True))


def watch_of(readings: list[int]) -> MemoryWatch:
    watch = MemoryWatch(SimpleNamespace(peers=[]))
    watch.samples = [Sample(float(t), 1000 * t, {"one": {1: size, 2: 5}}) for t, size in enumerate(readings)]
    return watch


def test_bytes_of_a_round_and_the_rise_of_a_donor_follow_from_samples(tmp_path):
    watch = watch_of([100, 110, 100, 150, 160, 100])
    assert watch.bytes_between(1.2, 3.4) == 2000
    assert watch.bytes_between(90.0, 95.0) == 0
    journal = tmp_path / "metrics.jsonl"
    phases = [{"event": "phase", "phase": "serving", "time": 2.5}, {"event": "phase", "phase": "served", "time": 4.5}]
    journal.write_text("".join(json.dumps(one) + "\n" for one in phases), encoding="utf-8")
    assert describe_donor(watch, journal, SimpleNamespace(name="one")) == [{"seconds": 2.0, "rise": 50}]


def test_only_complete_rounds_of_several_trainers_count(tmp_path):
    assert full_rounds(tmp_path / "none", "gradients") == []
    journal = tmp_path / "metrics.jsonl"
    rounds = [("gradients", True, 2), ("gradients", False, 2), ("gradients", True, 1), ("parameters", True, 2)]
    journal.write_text(
        "".join(
            json.dumps({"event": "round", "kind": kind, "complete": complete, "num_peers": peers}) + "\n"
            for kind, complete, peers in rounds
        ),
        encoding="utf-8",
    )
    assert len(full_rounds(journal, "gradients")) == 1


def test_model_that_is_not_there_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--model_config_path", str(tmp_path / "none.json")])
    assert caught.value.code == 2 and "there is no such file" in capsys.readouterr().err


@pytest.mark.swarm
@pytest.mark.slow
@pytest.mark.timeout(500)
def test_benchmark_runs_with_a_tiny_model(tmp_path):
    """Two trainers and an auxiliary peer; what is predicted for large models says little of this one."""
    results = tmp_path / "results.json"
    options = [
        *("--model_config_path", str(REPOSITORY / "demo" / "config.json"), "--work_dir", str(tmp_path)),
        *("--results", str(results), "--epochs", "2", "--batch_size", "8", "--target_batch_size", "256"),
        *("--length", "32", "--rest_seconds", "2", "--minutes", "2"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.published_size", *options],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=480, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1) and results.exists(), done.stdout + done.stderr
    found = json.loads(results.read_text(encoding="utf-8"))
    kept = {
        one["promise"].partition(":")[0]: one["kept"] for one in found["promises"] if "predicted" not in one["promise"]
    }
    assert kept["trainer"] and kept["auxiliary"] and len([one for one in found["rounds"] if one["bytes"] > 0]) >= 2
    assert {"main", "dht", "p2pd", "parameters", "gradients"} <= set(found["trainer"]["processes"]["at_rest"])
    assert "| auxiliary | all |" in done.stdout and "is handed out" in done.stdout
