"""The short schedule of the fault harness: trainers are killed, frozen and restarted, and every promise is kept."""

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.fault_report import MAX_STALL, Fault, epoch_errors, judge
from benchmarks.fault_swarm import FaultyPeer, file_size_limit
from benchmarks.swarm_faults import LONG, SHORT, Faults, schedule

pytestmark = pytest.mark.swarm


REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.mark.timeout(700)
@pytest.mark.parametrize(
    "options", [[], pytest.param(["--local_batch_size", "32"], marks=pytest.mark.slow)], ids=["in step", "local steps"]
)
def test_swarm_keeps_its_promises_while_peers_die_and_freeze(tmp_path, options):
    results = tmp_path / "faults.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.swarm_faults", "--short", *options,
         "--work_dir", str(tmp_path / "work"), "--results", str(results)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=650,
    )  # fmt: skip
    assert results.exists(), done.stdout + done.stderr
    report = json.loads(results.read_text(encoding="utf-8"))
    assert [fault["name"] for fault in report["faults"]] == SHORT, done.stdout
    broken = [promise for promise in report["promises"] if not promise["kept"]]
    assert not broken and len(report["promises"]) == 8, done.stdout
    assert done.returncode == 0
    assert report["rounds"]["gradients"]["completed"] > 10
    fallen = report["loss"]["untrained"] - report["loss"]["swarm"]
    assert fallen > 0.5, f"3 % of a loss that has fallen by {fallen} would say little"
    assert results.with_suffix(".png").stat().st_size > 10_000
    assert "| faults survived | 3 | 3 | yes |" in results.with_suffix(".md").read_text(encoding="utf-8")


# -- what the harness makes of the peers' files


def peer_with(*records) -> FaultyPeer:
    """A peer that is not running and has written these records, a second apart."""
    peer = FaultyPeer.__new__(FaultyPeer)
    peer.name, peer.metrics, peer._offset = "trainer-1", Path("nowhere"), 0
    peer.records = [{"time": second + 1.0, **record} for second, record in enumerate(records)]
    return peer


def epoch(number: int) -> dict:
    return {"event": "epoch", "epoch": number}


def test_harness_finds_epochs_that_were_counted_twice_or_skipped():
    assert epoch_errors(peer_with(epoch(1), epoch(2), epoch(3)), [], 0.0) == []
    assert epoch_errors(peer_with(epoch(1), epoch(2), epoch(2)), [], 0.0) == ["trainer-1 counted epoch 2 after epoch 2"]
    assert epoch_errors(peer_with(epoch(1), epoch(4)), [], 0.0) == ["trainer-1 went from epoch 1 to 4"]
    assert epoch_errors(peer_with(epoch(1), {"event": "state_download"}, epoch(4)), [], 0.0) == []
    assert epoch_errors(peer_with(epoch(3), {"event": "start"}, epoch(3)), [], 0.0) != [], (
        "a restart excuses no repetition"
    )
    assert epoch_errors(peer_with(epoch(3), epoch(2)), [Fault("cold_restart", at=1.5)], 0.0) == [], (
        "unless of all peers"
    )


def test_harness_knows_what_an_averager_does():
    def phase(step, name, kind="gradients"):
        return {"event": "phase", "kind": kind, "step": step, "phase": name}

    assert peer_with().phase("gradients") == "idle"
    begun = [phase(1, "matchmaking"), phase(1, "averaging"), phase(2, "matchmaking"), phase(0, "serving")]
    assert peer_with(*begun[:1]).phase("gradients") == "matchmaking"
    assert peer_with(*begun).phase("gradients") == "averaging"
    assert peer_with(*begun).phase("parameters") == "idle"
    assert peer_with(*begun, phase(1, "idle")).phase("gradients") == "matchmaking", "the second step goes on"
    assert peer_with(*begun, {"event": "start"}).phase("gradients") == "idle", "that was an earlier life"
    assert peer_with(*begun).serving() and not peer_with(*begun, phase(0, "served")).serving()


def results_of_a_good_run() -> dict:
    return {
        "faults": [{"name": "freeze", "skipped": False, "survived": True, "stall_seconds": 2.0}],
        "epoch_errors": [], "orphans": [], "spread": 1e-3, "loss": {"ratio": 1.01},
        "exits": [{"inside_a_round": False, "seconds": 4.0}, {"inside_a_round": True, "seconds": 20.0}],
    }  # fmt: skip


def broken_promises(**changes) -> list[str]:
    results = {**results_of_a_good_run(), **changes}
    judge(results)
    return [promise["promise"] for promise in results["promises"] if not promise["kept"]]


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({}, []),
        ({"faults": []}, ["faults survived"]),
        ({"faults": [{"name": "freeze", "skipped": False, "survived": False, "stall_seconds": 0.0}]},
         ["faults survived"]),
        ({"faults": [{"name": "freeze", "skipped": False, "survived": True, "stall_seconds": MAX_STALL + 0.1}]},
         ["longest stall of a survivor, s"]),
        ({"epoch_errors": ["twice"]}, ["epochs counted twice or skipped"]),
        ({"spread": 0.011}, ["relative spread of parameters at the end"]),
        ({"spread": None}, ["relative spread of parameters at the end"]),
        ({"loss": {"ratio": 1.04}}, ["loss against an undisturbed run"]),
        ({"loss": None}, ["loss against an undisturbed run"]),
        ({"orphans": ["p2pd"]}, ["processes left 10 s after an end"]),
        ({"exits": [{"inside_a_round": False, "seconds": 10.5}]}, ["seconds to leave when asked to"]),
        ({"exits": [{"inside_a_round": True, "seconds": 30.5}]}, ["seconds to leave inside a round"]),
    ],
)  # fmt: skip
def test_harness_says_which_promise_was_broken(changes, broken):
    assert broken_promises(**changes) == broken


def test_schedule_has_every_fault_once_before_any_comes_again_and_depends_on_the_seed_alone():
    names = list(itertools.islice(schedule(random.Random(3), LONG), 2 * len(LONG)))
    assert sorted(names[: len(LONG)]) == sorted(names[len(LONG) :]) == sorted(LONG)
    assert names == list(itertools.islice(schedule(random.Random(3), LONG), 2 * len(LONG)))
    assert names[: len(LONG)] != names[len(LONG) :]
    assert all(callable(getattr(Faults, name)) for name in LONG)


WRITE = """
import sys
print("up", flush=True)
sys.stdin.readline()
try:
    with open(sys.argv[1], "wb") as file:
        file.write(bytes(5000))
except OSError as error:
    print(error, flush=True)
"""


def test_full_disk_makes_a_real_write_fail(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE, str(tmp_path / "file")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "up\n"
    with file_size_limit(SimpleNamespace(program=lambda: process), 1000):
        assert process.communicate("go\n", timeout=20)[0].startswith("[Errno 27]")
