"""What averaging costs over ordinary internet connections: bytes, seconds of a round, share of time that computes.

    python -m benchmarks.links --profile home               # one kind of connection, at most nine minutes
    python -m benchmarks.links                              # all of them and a crowd, at most an hour; needs root
    python -m benchmarks.links --part published             # a model of 295 M parameters; needs 20 GB of memory
    python -m benchmarks.links --part bits                  # two trainers, values in 8 and in 4 bits; four minutes

Trainers and an auxiliary peer live in network namespaces with emulated links (`benchmarks.emulated_links`); the figures
are those of the interfaces' counters and of the trainers' own metrics files. Trainers sleep where others compute
(`benchmarks.sleeping_trainer`), so that an epoch would take five seconds if averaging took no time. All flags but those
of the set-up have the values that `run_trainer.py` gives them. Two epochs go by before anything is counted.

A profile has two trainers that can be reached, one client behind a router and a helper, the auxiliary peer, on a
server's line. The crowd is sixteen trainers of a tiny model: what they send is matchmaking and the DHT.
Ends with code 2 and one line where links cannot be emulated.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import torch

from benchmarks.emulated_links import PREFIX, Host, Link, Network, Traffic, is_abandoned, own_name, what_lacks
from benchmarks.measure import number
from benchmarks.sleeping_trainer import BATCH_SIZE
from src.files import write_atomically
from src.metrics.journal import read_journal
from src.models import LeanAlbertConfig, LeanAlbertForPreTraining
from src.process.local_swarm import LocalPeer, LocalSwarm

REPOSITORY = Path(__file__).resolve().parent.parent
RUN_ID, HELPER = "links", "helper"
LINKS = {
    "lan": Link(down=1000, up=1000),
    "fibre": Link(down=100, up=100, delay=20),
    "home": Link(down=100, up=20, delay=40),
    "poor": Link(down=20, up=5, delay=80, loss=0.01),
}
BATCH_SECONDS, EPOCH_SECONDS = 0.5, 5.0
WARMUP_EPOCHS, EPOCHS = 2, 10  # the latter are two rounds of parameters, unless time runs out
START_SECONDS, MEASURE_SECONDS = 180.0, 280.0  # of one part; five profiles, the crowd and the published size: an hour
# Configurations with the demo's tokenizer.
MODEL = {"model_type": "lean_albert", "vocab_size": 4000, "embedding_size": 128, "hidden_size": 1024,
         "num_attention_heads": 16, "intermediate_size": 4864, "num_hidden_layers": 2}  # 30 M parameters  # fmt: skip
SMALL = {**MODEL, "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2432}  # 8 M
PUBLISHED = {**MODEL, "hidden_size": 4096, "intermediate_size": 27_648, "num_hidden_layers": 1}  # 295 M
TINY = {**MODEL, "embedding_size": 2, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 16,
        "num_hidden_layers": 1}  # fmt: skip
PUBLISHED_GIGABYTES = 20.0  # 30 bytes a parameter and peer, as with 30 M, and a little for programs


@dataclass(frozen=True)
class Part:
    """One swarm that is measured; those behind a router are clients."""

    name: str
    links: dict[str, Link]
    model: dict = field(default_factory=lambda: MODEL)
    epoch_seconds: float = EPOCH_SECONDS
    flags: tuple[str, ...] = ()
    epochs: int = EPOCHS

    @property
    def trainers(self) -> list[str]:
        return [name for name in self.links if name != HELPER]

    @property
    def target_batch_size(self) -> int:
        return round(len(self.trainers) * self.epoch_seconds / BATCH_SECONDS) * BATCH_SIZE


def profiles() -> dict[str, Part]:
    helper = {HELPER: LINKS["lan"]}
    parts = {
        name: Part(name, {**helper, "trainer-1": link, "trainer-2": link, "client": replace(link, nat=True)})
        for name, link in LINKS.items()
    }
    behind_routers = {name: replace(LINKS[name], nat=True) for name in ("home", "poor")}
    return {**parts, "mixed": Part("mixed", {**helper, "lan": LINKS["lan"], "fibre": LINKS["fibre"], **behind_routers})}


def published() -> Part:
    links = {"trainer-1": LINKS["fibre"], "trainer-2": LINKS["fibre"]}
    return Part("published", links, model=PUBLISHED, epoch_seconds=30.0)


def crowd() -> Part:
    links = {f"trainer-{number}": LINKS["lan"] for number in range(1, 17)}
    return Part("crowd", links, model=TINY, flags=("--min_vector_size", "1000"))


def bits() -> list[Part]:
    """Equal but for how values travel: as they did before there was a choice, and in 4 bits with its default."""
    links = {"trainer-1": LINKS["lan"], "trainer-2": LINKS["lan"]}
    ways = {"8 bits, parameters every 5": (8, 5), "8 bits": (8, 20), "4 bits": (4, 20)}
    return [
        Part(name, links, model=SMALL, epoch_seconds=3.0, epochs=20, flags=(
            "--averaging_bits", str(bits), "--average_state_every", str(every), "--min_vector_size", "1000"))
        for name, (bits, every) in ways.items()
    ]  # fmt: skip


def role(name: str, link: Link) -> str:
    return "helper" if name == HELPER else "client" if link.nat else "reachable"


# -- running ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """Counters at a moment at which all trainers had ended ``epoch``."""

    time: float
    epoch: int
    traffic: dict[str, Traffic]


def run(part: Part, folder: Path) -> dict:
    """Start a part's swarm, measure it, end it. Raises RuntimeError if a peer fails or no epoch ends in time."""
    began = time.monotonic()
    with Network() as network, LocalSwarm(echo=False) as swarm:
        start_peers(part, folder, network, swarm, give_up_at=began + START_SECONDS)

        def snapshot() -> Snapshot:
            return Snapshot(time.time(), slowest(part, folder), network.traffic())

        wait_for_epoch(WARMUP_EPOCHS, part, folder, swarm, give_up_at=began + START_SECONDS + MEASURE_SECONDS / 2)
        first = snapshot()
        limit = began + START_SECONDS + MEASURE_SECONDS
        wait_for_epoch(first.epoch + part.epochs, part, folder, swarm, give_up_at=limit, least=first.epoch + 1)
        last = snapshot()
    records = {name: read_journal(metrics_of(part, folder, name)) for name in part.trainers}
    return summarise(part, first, last, records)


def start_peers(part: Part, folder: Path, network: Network, swarm: LocalSwarm, *, give_up_at: float) -> None:
    """One after the other up to the first, all others at once; returns when all have printed their address."""
    config = folder / "config.json"
    config.write_text(json.dumps(part.model), encoding="utf-8")
    hosts = [network.add(name, link) for name, link in part.links.items()]
    initial: list[str] = []
    for host in hosts:
        swarm.peers.append(start_peer(part, host, config, initial))
        if not initial:
            initial = wait_for_address(swarm.peers[0], give_up_at).split()
    for peer in swarm.peers:
        wait_for_address(peer, give_up_at)


def start_peer(part: Part, host: Host, config: Path, initial: list[str]) -> LocalPeer:
    flags = [
        *("--run_id", RUN_ID, "--output_dir", config.parent / host.name, "--model_config_path", config),
        *("--tokenizer_path", REPOSITORY / "demo" / "tokenizer", "--target_batch_size", part.target_batch_size),
        *("--host_maddrs", f"/ip4/{host.address}/tcp/0"),
        *(["--initial_peers", *initial] if initial else []),
        *part.flags,
    ]
    if host.name == HELPER:
        script, arguments = "run_aux_peer.py", ["--assist_in_averaging", *flags]
    else:
        script, arguments = "-m", ["benchmarks.sleeping_trainer", BATCH_SECONDS, *flags]
        arguments += ["--wait_for_peers", len(part.trainers), *(["--client_mode"] if host.link.nat else [])]
    environment = {"OMP_NUM_THREADS": "1"}
    return LocalPeer(
        host.name, script, arguments, echo=False, environment=environment, prefix=host.prefix, own_session=True
    )


def wait_for_address(peer: LocalPeer, give_up_at: float) -> str:
    match = peer.wait_for_line(r"--initial_peers((?: /ip4/\S+)*)", timeout=max(1.0, give_up_at - time.monotonic()))
    return match.group(1)


def metrics_of(part: Part, folder: Path, name: str) -> Path:
    return folder / name / RUN_ID / ("aux" if name == HELPER else "trainer") / "metrics.jsonl"


def slowest(part: Part, folder: Path) -> int:
    """The last epoch that all trainers have ended."""
    ended = []
    for name in part.trainers:
        records = read_journal(metrics_of(part, folder, name))
        ended.append(max((record["epoch"] for record in records if record["event"] == "epoch"), default=0))
    return min(ended)


def wait_for_epoch(epoch: int, part: Part, folder: Path, swarm: LocalSwarm, *, give_up_at: float, least=None) -> None:
    """Until all trainers have ended it. When time runs out, ``least`` must have been reached."""
    while (now_in := slowest(part, folder)) < epoch:
        for peer in swarm.peers:
            if peer.process.poll() is not None:
                tail = "\n".join(peer.lines[-10:])
                raise RuntimeError(f"{peer.name} ended with code {peer.process.returncode}:\n{tail}")
        if time.monotonic() > give_up_at:
            if now_in >= (epoch if least is None else least):
                return
            raise RuntimeError(f"{part.name}: after the longest time allowed, trainers are in epoch {now_in} only")
        time.sleep(0.25)


# -- figures ----------------------------------------------------------------------------------------------------------


def summarise(part: Part, first: Snapshot, last: Snapshot, records: dict[str, list[dict]]) -> dict:
    """Figures of a part between two snapshots; ``records``: all of each trainer's metrics file."""
    epochs, seconds = last.epoch - first.epoch, last.time - first.time
    recent = {name: [one for one in lines if first.time < one["time"] <= last.time] for name, lines in records.items()}
    samples = sum(one["samples"] for lines in recent.values() for one in lines if one["event"] == "epoch")
    peers = {}
    for name, link in part.links.items():
        used = last.traffic[name] - first.traffic[name]
        peers[name] = {
            "role": role(name, link),
            "link": str(link),
            **traffic_figures(used, link, seconds=seconds, epochs=epochs, samples=samples),
            **(trainer_figures(records[name], recent[name]) if name in records else {}),
        }
    return {
        "parameters": num_parameters(part.model),
        "epochs": epochs,
        "samples": samples,
        "seconds": round(seconds, 1),
        "seconds_an_epoch": round(seconds / epochs, 2),
        "seconds_a_sample": round(seconds / samples, 5) if samples else None,
        "seconds_an_epoch_without_averaging": part.epoch_seconds,
        "rounds_of_parameters": max(count(lines, kind="parameters") for lines in recent.values()),
        "groups_an_epoch": None if HELPER in part.links else groups(recent),
        "busiest": max(peers, key=lambda name: peers[name]["up_bytes"] + peers[name]["down_bytes"]),
        "overruns": sum(last.traffic[name].overruns - first.traffic[name].overruns for name in part.links),
        "peers": peers,
    }


def traffic_figures(used: Traffic, link: Link, *, seconds: float, epochs: int, samples: int) -> dict:
    at_full_rate = max(used.up * 8e-6 / link.up, used.down * 8e-6 / link.down)
    return {
        "up_bytes": used.up,
        "down_bytes": used.down,
        "up_bytes_an_epoch": round(used.up / epochs),
        "down_bytes_an_epoch": round(used.down / epochs),
        "up_bytes_a_second": round(used.up / seconds),
        "down_bytes_a_second": round(used.down / seconds),
        "up_bytes_a_sample": round(used.up / samples, 1) if samples else None,
        "down_bytes_a_sample": round(used.down / samples, 1) if samples else None,
        "seconds_an_epoch_at_full_rate": round(at_full_rate / epochs, 2),
    }


def trainer_figures(records: list[dict], recent: list[dict]) -> dict:
    """From a trainer's metrics file: ``recent`` are the records that count."""
    epochs = [one for one in recent if one["event"] == "epoch"]
    total = sum(one["seconds"] for one in epochs)
    rounds = [one for one in recent if one["event"] == "round" and one["kind"] == "gradients"]
    searches, averagings = phases(records, since=recent[0]["time"] if recent else 0.0)
    return {
        "computing": round(1 - sum(one["waited_seconds"] for one in epochs) / total, 4) if total else None,
        "rounds": len(rounds),
        "complete_rounds": sum(one["complete"] for one in rounds),
        "group_size": median([one["num_peers"] for one in rounds if not one["error"]]),
        "matchmaking_seconds": median(searches),
        "averaging_seconds": median(averagings),
    }


def phases(records: list[dict], *, since: float, kind: str = "gradients") -> tuple[list[float], list[float]]:
    """Seconds in which a trainer looked for a group, and in which it averaged, of each round that ended since then."""
    began: dict[int, dict[str, float]] = {}
    searches, averagings = [], []
    for one in records:
        if one["event"] != "phase" or one["kind"] != kind or one["phase"] not in ("matchmaking", "averaging", "idle"):
            continue
        step = began.setdefault(one["step"], {})
        step[one["phase"]] = one["time"]
        if one["phase"] == "idle" and one["time"] >= since and "averaging" in step and "matchmaking" in step:
            searches.append(step["averaging"] - step["matchmaking"])
            averagings.append(one["time"] - step["averaging"])
    return searches, averagings


def count(records: list[dict], *, kind: str) -> int:
    return sum(one["event"] == "round" and one["kind"] == kind and one["complete"] for one in records)


def groups(records: dict[str, list[dict]]) -> float | None:
    """How many groups averaged gradients in an epoch, on average: each of a group's k trainers counts for 1 / k."""
    sizes: dict[int, list[int]] = {}
    for lines in records.values():
        for one in lines:
            if one["event"] == "round" and one["kind"] == "gradients" and not one["error"] and one["num_peers"]:
                sizes.setdefault(one["epoch"], []).append(one["num_peers"])
    whole = [sum(1 / size for size in members) for members in sizes.values() if len(members) == len(records)]
    return round(statistics.mean(whole), 2) if whole else None


def num_parameters(model: dict) -> int:
    with torch.device("meta"):
        return sum(one.numel() for one in LeanAlbertForPreTraining(LeanAlbertConfig.from_dict(model)).parameters())


def median(values: list[float]) -> float | None:
    return round(statistics.median(values), 2) if values else None


def mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


COLUMNS: list[tuple[str, Callable[[dict], float | None]]] = [
    ("up, MB an epoch", lambda peer: peer["up_bytes_an_epoch"] / 1e6),
    ("down, MB an epoch", lambda peer: peer["down_bytes_an_epoch"] / 1e6),
    ("up, B a sample", lambda peer: peer["up_bytes_a_sample"]),
    ("down, B a sample", lambda peer: peer["down_bytes_a_sample"]),
    ("at full rate, s", lambda peer: peer["seconds_an_epoch_at_full_rate"]),
    ("search, s", lambda peer: peer.get("matchmaking_seconds")),
    ("averaging, s", lambda peer: peer.get("averaging_seconds")),
    ("group", lambda peer: peer.get("group_size")),
    ("computing, %", lambda peer: None if peer.get("computing") is None else 100 * peer["computing"]),
]


def table(results: dict) -> str:
    """By part and role, the mean over its peers, and the busiest peer; last what the swarm as a whole did."""
    head = ["part", "who", *(name for name, _ in COLUMNS)]
    lines = [f"| {' | '.join(head)} |", "| --- | --- |" + " --- |" * len(COLUMNS)]
    for name, part in results["parts"].items():
        rows = {
            kind: [peer for peer in part["peers"].values() if peer["role"] == kind]
            for kind in ("reachable", "client", "helper")
        }
        rows[f"busiest: {part['busiest']}"] = [part["peers"][part["busiest"]]]
        for who, peers in rows.items():
            if peers:
                cells = [mean([figure(peer) for peer in peers]) for _, figure in COLUMNS]
                shown = ["-" if cell is None else number(cell) for cell in cells]
                lines.append(f"| {name} | {who} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", *(described(name, part) for name, part in results["parts"].items())])


def described(name: str, part: dict) -> str:
    trainers = [peer for peer in part["peers"].values() if "rounds" in peer]
    complete, rounds = (sum(peer[key] for peer in trainers) for key in ("complete_rounds", "rounds"))
    text = (
        f"{name}: {number(part['parameters'])} parameters, {part['epochs']} epochs of {part['seconds_an_epoch']:g} s "
        f"({part['seconds_an_epoch_without_averaging']:g} s of computing), {part['samples']} samples, "
        f"{1000 * (part['seconds_a_sample'] or 0):.3g} ms a sample; {complete} of {rounds} gradient rounds complete, "
        f"{part['rounds_of_parameters']} of parameters"
    )
    if part["groups_an_epoch"] is not None:
        text += f"; groups an epoch: {part['groups_an_epoch']:g}"
    busiest = part["peers"][part["busiest"]]
    mean_up = mean([peer["up_bytes_a_second"] for peer in part["peers"].values()])
    text += f"; a peer sends {number(mean_up / 1e3)} kB/s, the busiest {number(busiest['up_bytes_a_second'] / 1e3)}"
    if part["overruns"]:
        text += f"; NOT FAITHFUL: this machine was too slow to delay {part['overruns']} packets"
    return text + "."


# -- the program ------------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(profiles())
    parser.add_argument("--profile", nargs="+", choices=names, help="kinds of connections (all of them, and the crowd)")
    parser.add_argument("--part", nargs="+", choices=["published", "crowd", "bits"], help="instead: these parts")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "links.json", help="figures")
    return parser.parse_args(argv)


def chosen_parts(options: argparse.Namespace) -> list[Part]:
    if options.profile is None and options.part is None:
        return [*profiles().values(), crowd()]
    extra = {"published": lambda: [published()], "crowd": lambda: [crowd()], "bits": bits}
    return [profiles()[name] for name in options.profile or []] + [
        part for name in options.part or [] for part in extra[name]()
    ]


def connections(part: Part) -> str:
    """Who has which link, equal ones together."""
    names: dict[Link, list[str]] = {}
    for name, link in part.links.items():
        names.setdefault(link, []).append(name)
    return "; ".join(f"{', '.join(who)}: {link}" for link, who in names.items())


def why_not(parts: list[Part]) -> str:
    available = psutil.virtual_memory().available / 1e9
    if any(part.model is PUBLISHED for part in parts) and available < PUBLISHED_GIGABYTES:
        return f"the published size needs {PUBLISHED_GIGABYTES:g} GB of memory, {available:.0f} are available"
    lacking = what_lacks()
    return lacking and f"links cannot be emulated: {lacking}"


def remove_folders_of_killed_runs() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}-*"):
        if is_abandoned(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    options = parse_arguments()
    parts = chosen_parts(options)
    if reason := why_not(parts):
        print(f"benchmarks.links: skipped: {reason}", file=sys.stderr)
        return 2
    try:
        options.results.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"benchmarks.links: error: --results {options.results}: {error.strerror}", file=sys.stderr)
        return 2
    for signum in (signal.SIGINT, signal.SIGTERM):  # whatever has been begun is removed on the way out
        signal.signal(signum, lambda signum, frame: sys.exit(128 + signum))
    remove_folders_of_killed_runs()
    results = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
        "parts": {},
    }
    failed = []
    for part in parts:
        print(f"{part.name}: {connections(part)}", flush=True)
        try:
            with tempfile.TemporaryDirectory(prefix=own_name("")) as folder:
                results["parts"][part.name] = run(part, Path(folder))
            results["load"] = round(os.getloadavg()[0], 2)
            write_atomically(options.results, json.dumps(results, indent=1) + "\n")
        except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
            failed.append(part.name)
            print(f"{part.name} failed: {error}", file=sys.stderr, flush=True)
    if results["parts"]:
        print(table(results))
    if len(failed) < len(parts):
        print(f"written to {options.results}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
