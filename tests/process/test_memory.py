"""Memory that is free goes back to the system, and garbage is found, in a process and in those that it forks."""

import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from src.process import memory
from src.process.local_swarm import REPOSITORY
from src.swarm import join

PROGRAM = """
import os, sys, threading, time
from src.process import memory

def anonymous_megabytes():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon:")).split()[1]) / 1024

def leave_holes():
    "100 MB of which the tenth part stays in use, all over the place."
    pieces = [bytes(5000) for _ in range(20_000)]
    kept = pieces[::10]
    before = anonymous_megabytes()
    del pieces
    time.sleep(2)
    print(before, anonymous_megabytes(), flush=True)
    return kept

memory.TRIM_SECONDS = 0.2
memory.limit_memory()
if sys.argv[1] == "forked" and os.fork() != 0:
    os.wait()
    sys.exit()
thread = threading.Thread(target=leave_holes)  # in an arena of its own
thread.start()
thread.join()
"""


@pytest.mark.parametrize("where", ["here", "forked"])
def test_free_memory_goes_back_in_every_process(where):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, where], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True
    )
    before, after = map(float, done.stdout.split())
    assert before > 100 and after < 0.5 * before, "glibc keeps pages between pieces that are in use, unless asked"


COLLECTING = """
import gc, os, sys, weakref
from src.process import memory

class Ring:
    def __init__(self):
        self.itself = self

lasting = [[] for _ in range(500_000)]  # the imports of a trainer leave a million objects
gc.collect()
if sys.argv[1] == "limited":
    memory.limit_memory()
if os.fork() != 0:
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
ring = Ring()
kept = [[] for _ in range(20_000)]  # until then it is in use, and so no young garbage, which is found at once
ring = weakref.ref(ring)
kept += [[] for _ in range(100_000)]
print("freed" if ring() is None else "kept", flush=True)
"""


PLAINLY = pytest.param(
    "plainly", "kept", marks=pytest.mark.skipif(sys.version_info >= (3, 13), reason="Python 3.13 looks by itself")
)


@pytest.mark.parametrize(("how", "found"), [("limited", "freed"), PLAINLY])
def test_garbage_is_searched_for_among_what_is_newer_than_the_process(how, found):
    done = subprocess.run(
        [sys.executable, "-c", COLLECTING, how], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == found


def test_shared_memory_counts_in_parts():
    """Two processes that share 50 MB have half of it each."""
    code = """
import mmap, os, time
from src.process.memory import memory_of
before = memory_of({"own": os.getpid()})[1]["own"]
shared = mmap.mmap(-1, 50_000_000)
shared.write(b"x" * 50_000_000)
alone = memory_of({"own": os.getpid()})[1]["own"] - before
read, write = os.pipe()
if (child := os.fork()) == 0:
    sum(shared[place] for place in range(0, 50_000_000, 4096))
    os.write(write, b"x")
    time.sleep(60)
os.read(read, 1)
measure, sizes = memory_of({"own": os.getpid(), "child": child, "gone": 2**30})
os.kill(child, 9)
os.wait()
print(measure, *sizes, alone, before + alone - sizes["own"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    measure, *names, alone, given_away = done.stdout.split()
    assert (measure, names) == ("PSS", ["own", "child"])
    assert 45 < float(alone) < 60 and 20 < float(given_away) < 40, done.stdout


def test_process_that_is_dead_and_not_taken_note_of_yet_has_no_memory():
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    try:
        assert memory.memory_of({"own": os.getpid(), "child": child.pid})[0] == "PSS"
        assert list(memory.memory_of({"own": os.getpid(), "child": child.pid})[1]) == ["own"]
    finally:
        child.wait()


def test_memory_is_told_in_full_where_the_kernel_has_no_better(monkeypatch):
    read = memory._read

    def old_kernel(pid, file, field):
        if file == "smaps_rollup":
            raise PermissionError(file)
        return read(pid, file, field)

    monkeypatch.setattr(memory, "_read", old_kernel)
    measure, sizes = memory.memory_of({"own": os.getpid()})
    assert measure == "RSS" and sizes["own"] == pytest.approx(psutil.Process().memory_info().rss / 1e6, rel=0.1)


LEAVING = """
import os, sys, time
import torch
from src.process import memory

def private_megabytes(pid):
    lines = open(f"/proc/{pid}/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) / 1024

large, small, shared = torch.ones(10_000_000), torch.ones(10), torch.ones(1000).share_memory_()
if sys.argv[1] == "left":
    memory.leave_to_owner(lambda: [large, small, shared])
asked = os.pipe()
pid = os.fork()
if pid == 0:
    os.read(asked[0], 1)
    print(float(large.mean()), float(small.sum()), float(shared.sum()), flush=True)
    os._exit(0)
large.add_(1)  # a page of which another process holds the old content is a new one from now on
print(private_megabytes(os.getpid()) + private_megabytes(pid), flush=True)
os.write(asked[1], b".")
os.wait()
assert float(large.mean()) == 2.0
"""


def test_forked_process_keeps_no_old_copy_of_what_its_owner_trains():
    def run(how: str) -> tuple[float, list[float]]:
        done = subprocess.run(
            [sys.executable, "-c", LEAVING, how],
            cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        megabytes, read = done.stdout.splitlines()
        return float(megabytes), [float(value) for value in read.split()]

    kept, left = run("kept"), run("left")
    assert kept[1] == [1.0, 10.0, 1000.0]
    assert left[1][0] < 0.01, "but for the first and last page, which may hold other data"
    assert left[1][1:] == [10.0, 1000.0]
    assert kept[0] - left[0] == pytest.approx(40.0 / 1.048576, abs=4.0)


def test_what_a_peer_trains_is_left_to_it_from_before_its_first_process_is_forked(tmp_path, monkeypatch):
    left = []

    def start_dht(*arguments):
        assert len(left) == 1
        raise ValueError("far enough")

    monkeypatch.setattr(join, "load_identity", lambda peer: None)
    monkeypatch.setattr(join, "leave_to_owner", left.append)
    monkeypatch.setattr(join, "start_dht", start_dht)
    model = torch.nn.Linear(3, 2)
    model.weight.grad = torch.ones(2, 3)
    entry = join.Entry(tmp_path, {})
    with pytest.raises(ValueError, match="far enough"):
        join.join_run(model, None, {}, entry=entry, peer=SimpleNamespace(), trainer=True, say=print)
    places = {tensor.data_ptr() for tensor in left[0]()}
    assert places == {tensor.data_ptr() for tensor in (model.weight, model.bias, model.weight.grad)}
    del model
    assert left[0]() == [], "it is not kept alive for it"
