"""What faults cost a swarm, from its peers' metrics files: figures, promises kept or broken, a table, a picture.

Used by `benchmarks.swarm_faults`.
"""

import dataclasses
import json
import os
import platform
import time
from pathlib import Path

import torch

from benchmarks.fault_swarm import FaultyPeer, FaultySwarm
from src.trainer.backup import read_backup
from src.trainer.run_summary import compare_parameters

NEXT_CHUNK_TIMEOUT, MATCHMAKING_TIME, BACKUP_EVERY = 8.0, 1.5, 3

OF_ALL = "cold_restart", "all_leave_at_once"  # faults after which everybody goes on from disk
# What is promised
MAX_STALL = NEXT_CHUNK_TIMEOUT + 5.0
MAX_SPREAD = 1e-2
MAX_LOSS_RATIO = 1.03
MAX_EXIT_SECONDS, MAX_EXIT_IN_ROUND = 10.0, 30.0


@dataclasses.dataclass
class Fault:
    """What was done to whom, when, and what it cost; times in seconds since the swarm began."""

    name: str
    victims: str = ""
    detail: str = ""
    at: float = 0.0
    until: float = 0.0
    recovery_seconds: float | None = None
    stall_seconds: float = 0.0
    survived: bool = True
    skipped: bool = False


def stall_of(survivors: list[FaultyPeer], moment: float) -> float:
    """The longest time for which the swarm kept one of the survivors from computing after a fault."""
    return max((r["longest_wait"] for peer in survivors for r in peer.since(moment, "epoch")), default=0.0)


def summarise(swarm: FaultySwarm, options, faults: list[Fault], began: float) -> dict:
    """Figures of the whole run from the peers' metrics files."""
    rounds = [r for peer in swarm.trainers for r in peer.since(0, "round")]
    epochs = [r for peer in swarm.trainers for r in peer.since(0, "epoch")]
    downloads = [r for peer in swarm.trainers for r in peer.since(0, "state_download")]
    last_life = [peer for peer in swarm.trainers if peer.backup.exists()]
    newest = max((read_backup(peer.backup)["epoch"] for peer in last_life), default=0)
    survivors = [peer for peer in last_life if read_backup(peer.backup)["epoch"] == newest]
    spread = max((compare_parameters(survivors[0].backup, p.backup).relative for p in survivors[1:]), default=None)
    happened = [fault for fault in faults if not fault.skipped]
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.time() - began),
        "settings": {"seed": options.seed, "trainers": options.trainers, "matchmaking_time": MATCHMAKING_TIME,
                     "next_chunk_timeout": NEXT_CHUNK_TIMEOUT, "backup_every_epochs": BACKUP_EVERY},
        "epochs": swarm.epoch(),
        "rounds": {
            kind: {
                "attempted": sum(r["kind"] == kind for r in rounds),
                "completed": sum(r["kind"] == kind and r["complete"] for r in rounds),
                "partial": sum(r["kind"] == kind and not r["complete"] and not r["error"] for r in rounds),
                "failed": sum(r["kind"] == kind and bool(r["error"]) for r in rounds),
            }
            for kind in ("gradients", "parameters")
        },
        "samples": {
            "contributed": sum(r["samples"] for r in epochs),
            "lost": sum(r["dropped_samples"] for r in epochs),
            "lost_with_killed_peers_estimate": round(lost_with_killed(swarm)),
        },
        "state_downloads": len(downloads),
        "epoch_errors": [error for peer in swarm.trainers for error in epoch_errors(peer, happened, began)]
        + skipped_epochs(swarm),
        "spread": spread,
        "survivors": [peer.name for peer in survivors],
        "orphans": swarm.orphans,
        "exits": swarm.exits,
        "faults": [dataclasses.asdict(fault) for fault in faults],
    }  # fmt: skip


def lost_with_killed(swarm: FaultySwarm) -> float:
    """Samples that killed peers had computed since their last epoch, from their rate."""
    lost = 0.0
    for peer in swarm.trainers:
        for start, end in peer.lives:
            records = [r for r in peer.since(start, "epoch") if r["time"] < end]
            if records and end < float("inf"):
                last = records[-1]
                lost += min(end - last["time"], last["seconds"]) * last["samples"] / max(last["seconds"], 0.1)
    return lost


def epoch_errors(peer: FaultyPeer, faults: list[Fault], began: float) -> list[str]:
    """Epochs that a trainer has counted twice or skipped. A restart of all from disk may repeat some."""
    restarts = [began + fault.at for fault in faults if fault.name in OF_ALL]
    errors, last = [], None
    excused = [r["time"] for r in peer.since(0, "state_download")] + [r["time"] for r in peer.since(0, "start")]
    for record in peer.since(0, "epoch"):
        if last is not None and not any(last["time"] < restart < record["time"] for restart in restarts):
            step = record["epoch"] - last["epoch"]
            joined_anew = any(last["time"] <= moment <= record["time"] for moment in excused)
            if step <= 0:
                errors.append(f"{peer.name} counted epoch {record['epoch']} after epoch {last['epoch']}")
            elif step > 1 and not joined_anew:
                errors.append(f"{peer.name} went from epoch {last['epoch']} to {record['epoch']}")
        last = record
    return errors


def skipped_epochs(swarm: FaultySwarm) -> list[str]:
    finished = {record["epoch"] for peer in swarm.trainers for record in peer.since(0, "epoch")}
    return [f"nobody finished epoch {epoch}" for epoch in range(1, swarm.epoch() + 1) if epoch not in finished]


def judge(results: dict) -> None:
    """Add each promise with what was measured and whether it was kept."""
    faults = [fault for fault in results["faults"] if not fault["skipped"]]
    stall = max((fault["stall_seconds"] for fault in faults), default=0.0)
    not_survived = [fault["name"] for fault in faults if not fault["survived"]]
    spread, loss = results["spread"], results["loss"]
    slowest = {
        inside: max((exit["seconds"] for exit in results["exits"] if exit["inside_a_round"] is inside), default=0.0)
        for inside in (False, True)
    }
    results["promises"] = [
        {"promise": name, "limit": limit, "measured": measured, "kept": bool(kept)}
        for name, limit, measured, kept in (
            ("faults survived", len(faults), len(faults) - len(not_survived), faults and not not_survived),
            ("longest stall of a survivor, s", MAX_STALL, stall, stall <= MAX_STALL),
            ("epochs counted twice or skipped", 0, len(results["epoch_errors"]), not results["epoch_errors"]),
            ("relative spread of parameters at the end", MAX_SPREAD, spread,
             spread is not None and spread <= MAX_SPREAD),
            ("loss against an undisturbed run", MAX_LOSS_RATIO, loss and loss["ratio"],
             loss is not None and loss["ratio"] <= MAX_LOSS_RATIO),
            ("processes left 10 s after an end", 0, len(results["orphans"]), not results["orphans"]),
            ("seconds to leave when asked to", MAX_EXIT_SECONDS, slowest[False], slowest[False] <= MAX_EXIT_SECONDS),
            ("seconds to leave inside a round", MAX_EXIT_IN_ROUND, slowest[True], slowest[True] <= MAX_EXIT_IN_ROUND),
        )
    ]  # fmt: skip


def describe(fault: Fault) -> str:
    if fault.skipped:
        return f"{fault.name}: {fault.detail}"
    verdict = "" if fault.survived else "NOT SURVIVED: "
    return (
        f"{fault.at:6.0f} s  {fault.name} ({fault.victims}): {verdict}{fault.detail}; others stalled "
        f"{fault.stall_seconds:.1f} s, all in step after {fault.recovery_seconds or 0.0:.0f} s"
    )


def number(value) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def write_report(path: Path, results: dict, faults: list[Fault], swarm: FaultySwarm, began: float) -> None:
    """The figures as JSON, a table in Markdown, and the picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    table = markdown(results)
    path.with_suffix(".md").write_text(table, encoding="utf-8")
    draw(path.with_suffix(".png"), faults, swarm, began)
    print("\n" + table + f"\nwritten to {path}, {path.with_suffix('.md').name}, {path.with_suffix('.png').name}")


def markdown(results: dict) -> str:
    lines = ["| promise | limit | measured | kept |", "| --- | --- | --- | --- |"]
    for promise in results["promises"]:
        kept = "yes" if promise["kept"] else "**no**"
        lines.append(f"| {promise['promise']} | {number(promise['limit'])} | {number(promise['measured'])} | {kept} |")
    rounds, samples = results["rounds"], results["samples"]
    lines += ["", f"{results['seconds']} s, {results['epochs']} epochs, seed {results['settings']['seed']}, "
              f"{results['machine']}.", ""]  # fmt: skip
    for kind, counts in rounds.items():
        lines.append(f"Rounds of {kind}: {counts['attempted']} attempted, {counts['completed']} completed, "
                     f"{counts['partial']} partial, {counts['failed']} failed.")  # fmt: skip
    lines.append(
        f"Samples: {samples['contributed']} contributed, {samples['lost']} given up by peers that fell behind, about "
        f"{samples['lost_with_killed_peers_estimate']} lost with killed peers."
    )
    lines += ["", "| fault | times | longest stall of others, s | longest recovery, s | survived |",
              "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for name in dict.fromkeys(fault["name"] for fault in results["faults"]):
        same = [fault for fault in results["faults"] if fault["name"] == name]
        if same[0]["skipped"]:
            lines.append(f"| {name.replace('_', ' ')} | 0 | | | {same[0]['detail']} |")
            continue
        lines.append(
            f"| {name.replace('_', ' ')} | {len(same)} | {max(f['stall_seconds'] for f in same):.1f} | "
            f"{max(f['recovery_seconds'] or 0 for f in same):.0f} | "
            f"{sum(f['survived'] for f in same)} of {len(same)} |"
        )
    return "\n".join([*lines, *(f"- {error}" for error in results["epoch_errors"]), ""])


def draw(picture: Path, faults: list[Fault], swarm: FaultySwarm, began: float) -> None:
    """One row a peer: when it lived, its epochs, its waits; faults across all rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    now = time.time()
    figure, axes = plt.subplots(figsize=(14, 1.5 + 0.8 * len(swarm.peers)), layout="constrained")
    for row, peer in enumerate(swarm.peers):
        for start, end in peer.lives:
            axes.barh(row, min(end, now) - start, left=start - began, height=0.5, color="tab:blue", alpha=0.25)
        epochs = [record["time"] - began for record in peer.since(0, "epoch")]
        axes.vlines(epochs, row - 0.25, row + 0.25, color="tab:blue", linewidth=0.8)
        for record in peer.since(0, "epoch"):
            if record["longest_wait"] > 2.0:
                end = record["time"] - began
                axes.barh(row, record["longest_wait"], left=end - record["longest_wait"], height=0.25, color="tab:red")
        incomplete = [r["time"] - began for r in peer.since(0, "round") if not r["complete"]]
        axes.plot(incomplete, [row] * len(incomplete), "x", color="black", markersize=5)
    for position, fault in enumerate(fault for fault in faults if not fault.skipped):
        axes.axvline(fault.at, color="tab:orange", linewidth=1)
        axes.text(fault.at, len(swarm.peers) - 0.4 + 0.35 * (position % 3), fault.name.replace("_", " "), fontsize=6)
    axes.set_yticks(range(len(swarm.peers)), [peer.name for peer in swarm.peers])
    axes.set_ylim(-0.6, len(swarm.peers) + 0.7)
    axes.set_xlabel("seconds; thin lines: epochs, red: a trainer waited for the swarm (more than 2 s), "
                    "x: rounds not complete, orange: faults")  # fmt: skip
    figure.savefig(picture, dpi=110)
    plt.close(figure)
