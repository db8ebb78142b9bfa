"""What two trainers and an auxiliary peer of the published model take on one machine: memory, seconds, bytes.

    python -m benchmarks.published_size --work_dir outputs/published_size --results benchmarks/published_size.json

A trainer begins; when it has ended an epoch, a second one joins, and they average some epochs. Then that one leaves,
and an auxiliary peer beside the first stores a checkpoint. Memory is the proportional set size (PSS) of all processes
of a peer: what they share counts once. Bytes are those of the loopback interface, in both directions.

Promises: whoever joins takes at most 1.35 times what it holds at rest; `src.models.memory` predicts both within a
tenth; the rounds are complete, and the checkpoint is stored. Ends with code 1 if one is not kept. At published size
that needs 20 GB and half an hour on two cores; smaller models with --model_config_path.
"""

import argparse
import json
import os
import platform
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from benchmarks.soak import processes_of
from src import LeanAlbertConfig
from src.metrics.journal import read_journal
from src.models.memory import PeerMemory, peer_memory, predict_memory
from src.process.local_swarm import LocalPeer, LocalSwarm

REPOSITORY = Path(__file__).resolve().parent.parent
MAX_RATIO, MAX_ERROR = 1.35, 0.1
SAMPLE_SECONDS, POLL_SECONDS = 0.5, 0.5


@dataclass(frozen=True)
class Sample:
    """The memory of each process of each peer at a moment (seconds since 1970), and what loopback has carried."""

    time: float
    loopback_bytes: int
    peers: dict[str, dict[int, int]]  # peer's name -> process id -> bytes

    def total(self, peer: str) -> int:
        return sum(self.peers.get(peer, {}).values())


class MemoryWatch(threading.Thread):
    """Samples all peers of a swarm until `stop` is called."""

    def __init__(self, swarm: LocalSwarm):
        super().__init__(name="memory watch", daemon=True)
        self.swarm, self.samples, self._over = swarm, [], threading.Event()

    def run(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            peers = {peer.name: proportional_bytes(peer) for peer in list(self.swarm.peers)}
            self.samples.append(Sample(time.time(), psutil.net_io_counters(pernic=True)["lo"].bytes_sent, peers))

    def stop(self) -> None:
        self._over.set()
        self.join()

    def between(self, since: float, until: float) -> list[Sample]:
        return [sample for sample in self.samples if since <= sample.time <= until]

    def bytes_between(self, since: float, until: float) -> int:
        """What loopback has carried in that time, as exactly as it was sampled."""
        before = [sample.loopback_bytes for sample in self.samples if sample.time <= since]
        within = [sample.loopback_bytes for sample in self.between(since, until + SAMPLE_SECONDS)]
        return within[-1] - before[-1] if within and before else 0


def proportional_bytes(peer: LocalPeer) -> dict[int, int]:
    """PSS of a peer's processes by process id; those that end meanwhile are left out."""
    memory = {}
    try:
        program = psutil.Process(peer.process.pid)
        for process in (program, *program.children(recursive=True)):
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
            memory[process.pid] = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    except (psutil.Error, OSError):
        pass
    return memory


def flags_of(options: argparse.Namespace, folder: Path) -> tuple[list[str], list[str]]:
    """Those of all peers, and those of trainers."""
    shared = [
        *("--run_id", "published", "--output_dir", str(folder), "--model_config_path", str(options.model_config_path)),
        *("--target_batch_size", str(options.target_batch_size), "--total_steps", "1000000"),
        *("--matchmaking_time", "60", "--next_chunk_timeout", "60", "--averaging_timeout", "300"),
        *("--learning_rate", "1e-4", "--warmup_steps", "0", "--num_zero_lr_steps", "0", "--average_state_every", "2"),
        *("--tokenizer_path", str(REPOSITORY / "demo" / "tokenizer")),
    ]
    length = str(options.length)
    trainer = [
        *("--dataset_sources", str(REPOSITORY / "demo" / "corpus" / "*.txt")),
        *("--per_device_train_batch_size", str(options.batch_size), "--max_sequence_length", length),
        *("--initial_sequence_length", length, "--sequence_length_warmup_steps", "0", "--pad_to_multiple_of", "8"),
        *("--backup_every_epochs", "1000000"),
    ]
    return [*shared, *options.peer_flags], trainer


def wait_until(condition, what: str, *, peers: list[LocalPeer], seconds: float) -> None:
    """Raises RuntimeError with the peers' last lines when it takes longer, or a peer ends."""
    give_up_at = time.monotonic() + seconds
    while not condition():
        ended = [peer.name for peer in peers if peer.process.poll() is not None]
        if ended or time.monotonic() > give_up_at:
            tail = "\n".join(f"{peer.name} | {line}" for peer in peers for line in peer.lines[-10:])
            reason = f"{', '.join(ended)} ended" if ended else f"not within {seconds / 60:.0f} minutes"
            raise RuntimeError(f"{what}: {reason}\n{tail}")
        time.sleep(POLL_SECONDS)


def full_rounds(journal: Path, kind: str) -> list[dict]:
    """Complete rounds of two trainers, in a metrics file."""
    rounds = [one for one in read_journal(journal) if one["event"] == "round"] if journal.exists() else []
    return [one for one in rounds if one["kind"] == kind and one["complete"] and one["num_peers"] > 1]


def run(options: argparse.Namespace, folder: Path) -> dict:
    """Let the peers meet; returns the figures."""
    shared, training = flags_of(options, folder)
    home, limit = folder / "published", 60 * options.minutes
    journals = [home / name / "metrics.jsonl" for name in ("trainer", "trainer-2")]
    with LocalSwarm(echo=not options.quiet, environment={"OMP_NUM_THREADS": "1"}) as swarm:
        watch = MemoryWatch(swarm)
        watch.start()
        first = swarm.start("trainer-1", "run_trainer.py", [*shared, *training])
        wait_until(
            lambda: any(one["event"] == "epoch" for one in read_journal(journals[0])),
            "the first trainer's first epoch", peers=[first], seconds=limit,
        )  # fmt: skip
        second_began = time.time()
        second = swarm.start("trainer-2", "run_trainer.py", [*shared, *training])
        second.wait_for_line(r"joined at epoch", timeout=limit)
        joined = time.time()
        wait_until(
            lambda: len(full_rounds(journals[1], "gradients")) >= options.epochs,
            f"{options.epochs} averaged epochs", peers=[first, second], seconds=limit,
        )  # fmt: skip
        time.sleep(options.rest_seconds)
        figures = {"trainer": describe(watch, second, since=second_began, joined=joined)}
        figures["rounds"] = describe_rounds(watch, journals[1])
        second.stop()
        aux_began = time.time()
        flags = ["--store_checkpoints", "--save_checkpoint_epoch_interval", "1", "--refresh_period", "2"]
        aux = swarm.start("auxiliary", "run_aux_peer.py", [*shared, *flags])
        aux.wait_for_line(r"stored the state of epoch", timeout=limit)
        stored = time.time()
        time.sleep(options.rest_seconds)
        figures["auxiliary"] = describe(watch, aux, since=aux_began, joined=stored)
        figures["donor"] = describe_donor(watch, journals[0], first)
        watch.stop()
    return figures


def describe(watch: MemoryWatch, peer: LocalPeer, *, since: float, joined: float) -> dict:
    """Of a peer: while it joined, at rest (the least of what came after), and at most, in bytes, by process."""
    roles = {process.pid: name.removeprefix(f"{peer.name}: ") for name, process in processes_of(peer).items()}
    settled = watch.between(joined + SAMPLE_SECONDS, time.time())
    joining = max(watch.between(since, joined + SAMPLE_SECONDS), key=lambda sample: sample.total(peer.name))
    at_rest = min(settled, key=lambda sample: sample.total(peer.name))
    most = max(settled, key=lambda sample: sample.total(peer.name))

    def by_role(sample: Sample) -> dict[str, int]:
        memory: dict[str, int] = {}
        for pid, size in sample.peers[peer.name].items():
            role = roles.get(pid, "others")
            memory[role] = memory.get(role, 0) + size
        return memory

    totals = {"at_rest": at_rest, "joining": joining, "most": most}
    return {
        **{name: sample.total(peer.name) for name, sample in totals.items()},
        "processes": {name: by_role(sample) for name, sample in totals.items()},
        "seconds_to_join": round(joined - since, 1),
    }


def describe_rounds(watch: MemoryWatch, journal: Path) -> list[dict]:
    rounds = sorted((one for kind in ("gradients", "parameters") for one in full_rounds(journal, kind)),
                    key=lambda one: one["time"])  # fmt: skip
    return [
        {
            "kind": one["kind"],
            "seconds": round(one["seconds"], 1),
            "bytes": watch.bytes_between(one["time"] - one["seconds"], one["time"]),
        }
        for one in rounds
    ]


def describe_donor(watch: MemoryWatch, journal: Path, peer: LocalPeer) -> list[dict]:
    """How long each download took the donor, and by how much it rose above what it had held at most until then."""
    downloads, began = [], None
    for one in read_journal(journal):
        if one["event"] == "phase" and one["phase"] == "serving":
            began = one["time"]
        elif one["event"] == "phase" and one["phase"] == "served" and began is not None:
            before = max((sample.total(peer.name) for sample in watch.between(began - 60, began)), default=0)
            during = max((sample.total(peer.name) for sample in watch.between(began, one["time"])), default=before)
            downloads.append({"seconds": round(one["time"] - began, 1), "rise": max(0, during - before)})
    return downloads


def judge(figures: dict, predicted: dict[str, PeerMemory], *, epochs: int) -> list[tuple[str, bool]]:
    """Each promise in words, and whether it was kept."""
    promises = []
    for peer, memory in predicted.items():
        found = figures[peer]
        ratio = found["joining"] / found["at_rest"]
        promises.append((f"{peer}: joining takes {ratio:.2f} times what it holds at rest (<= {MAX_RATIO})",
                         ratio <= MAX_RATIO))  # fmt: skip
        for name, value in (("at_rest", memory.at_rest), ("joining", memory.joining)):
            error = value / found[name] - 1
            what = f"{peer}, {name.replace('_', ' ')}: predicted {value / 1e9:.2f} GB, measured {found[name] / 1e9:.2f}"
            promises.append((f"{what}, off by {error:+.0%} (within {MAX_ERROR:.0%})", abs(error) <= MAX_ERROR))
    complete = sum(one["kind"] == "gradients" for one in figures["rounds"])
    promises.append((f"{complete} complete rounds of gradients (>= {epochs})", complete >= epochs))
    return promises


def table(figures: dict) -> str:
    lines = ["| peer | process | at rest, MB | most while joining, MB | most afterwards, MB |", "|" + " --- |" * 5]
    for peer in ("trainer", "auxiliary"):
        columns = [figures[peer]["processes"][name] for name in ("at_rest", "joining", "most")]
        for role in sorted(set().union(*columns)):
            lines.append(
                f"| {peer} | {role} | " + " | ".join(f"{one.get(role, 0) / 1e6:.0f}" for one in columns) + " |"
            )
        totals = [figures[peer][name] for name in ("at_rest", "joining", "most")]
        lines.append(f"| {peer} | all | " + " | ".join(f"{total / 1e6:.0f}" for total in totals) + " |")
    lines += ["", "| round | seconds, with the search | MB on loopback |", "| --- | --- | --- |"]
    lines += [f"| {one['kind']} | {one['seconds']:.1f} | {one['bytes'] / 1e6:.0f} |" for one in figures["rounds"]]
    lines += ["", "| a state is handed out | seconds | donor's rise, MB |", "| --- | --- | --- |"]
    lines += [f"| {n} | {one['seconds']:.1f} | {one['rise'] / 1e6:.0f} |" for n, one in enumerate(figures["donor"], 1)]
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model_config_path", type=Path, default=REPOSITORY / "recipes" / "ruleanalbert" / "config.json"
    )
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/published_size"), help="the peers' files")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "published_size.json")
    parser.add_argument("--epochs", type=int, default=3, help="that both trainers average")
    parser.add_argument("--target_batch_size", type=int, default=8, help="samples of an epoch")
    parser.add_argument("--batch_size", type=int, default=1, help="of a trainer's local step")
    parser.add_argument("--length", type=int, default=16, help="tokens of a sequence")
    parser.add_argument("--minutes", type=float, default=30.0, help="that each step may take")
    parser.add_argument("--rest_seconds", type=float, default=15.0, help="watched after each step")
    parser.add_argument("--quiet", action="store_true", help="do not show what the peers print")
    parser.add_argument("--peer_flags", nargs=argparse.REMAINDER, default=[], help="further flags of all peers, last")
    options = parser.parse_args(argv)
    if not options.model_config_path.is_file():
        parser.error(f"--model_config_path {options.model_config_path}: there is no such file")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    config = LeanAlbertConfig.from_dict(json.loads(options.model_config_path.read_text(encoding="utf-8-sig")))
    config.sparse_prediction = True  # as in the trainer
    memory = predict_memory(config, batch_size=options.batch_size, length=options.length)
    predicted = {"trainer": peer_memory(memory), "auxiliary": peer_memory(memory, trains=False)}
    folder = options.work_dir / time.strftime("run-%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    try:
        figures = run(options, folder)
    except RuntimeError as error:
        print(f"published_size: {error}", file=sys.stderr)
        return 1
    promises = judge(figures, predicted, epochs=options.epochs)
    results = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
        "parameters": memory.parameters // 4,
        "length": options.length,
        "promises": [{"promise": text, "kept": kept} for text, kept in promises],
        **figures,
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"{memory.parameters / 4e6:.0f} M parameters, sequences of {options.length} tokens, {results['machine']}\n")
    print(table(figures) + "\n")
    for text, kept in promises:
        print(f"{'kept    ' if kept else 'NOT KEPT'}  {text}")
    print(f"written to {options.results}")
    return 0 if all(kept for _, kept in promises) else 1


if __name__ == "__main__":
    sys.exit(main())
