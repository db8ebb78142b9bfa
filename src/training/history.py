"""What a run's metrics file tells, gathered for people: epochs, peers, held-out scores, and what went wrong when.

The terminal view and the report both show a `RunHistory`, so they cannot disagree with the file or with each other.
"""

import itertools
import statistics
import threading
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from src.training.journal import printable, records_in

THIS_PEER = "this peer"
KEPT_FAILURES = 1000
MAX_NAME_LENGTH = 40
# Of numbers that are worth drawing: sums, differences and coordinates of such stay finite, and tell them apart.
LARGEST, SMALLEST = 1e15, 1e-9
END_OF_TIME = 253_402_300_800.0  # the year 10000, from which on no date can be shown


@dataclass
class Epoch:
    """One global step. Losses are means, None where they were not finite."""

    epoch: int
    time: float
    loss: float | None
    mlm_loss: float | None
    sop_loss: float | None
    samples: float
    samples_per_second: float
    num_peers: int


@dataclass
class Peer:
    """A trainer as far as this file has seen it; ``samples`` are of all its reports, ``failure`` the newest one."""

    name: str
    last_seen: float
    epoch: int = 0
    samples: float = 0.0
    samples_per_second: float = 0.0
    failed_rounds: int = 0
    lone_epochs: int = 0  # stepped with its own gradients alone, although others trained
    failure: str = ""
    reported_total: float = 0.0


@dataclass(frozen=True)
class HeldOut:
    """Scores of a stored checkpoint on text that nobody trains on."""

    epoch: int
    time: float
    loss: float
    accuracy: float
    order_accuracy: float


@dataclass(frozen=True)
class Failure:
    """A round of averaging that was not complete: ``who`` reported it."""

    time: float
    epoch: int
    who: str
    reason: str


@dataclass(frozen=True)
class Stall:
    """A pause in which no epoch ended, more than three times as long as usual, and what was reported meanwhile."""

    time: float
    seconds: float
    epoch: int
    reasons: tuple[str, ...]


def number(value: object, otherwise: float | None = 0.0) -> float | None:
    """A number from a file that anything may stand in: ``otherwise`` if it is none, or larger than anything real."""
    if not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
        return otherwise
    return float(value) if abs(value) >= SMALLEST else 0.0


def count(value: object) -> int:
    return max(0, int(number(value)))


class RunHistory:
    """Takes a journal's records one by one: `add` can be a listener of a `Journal`.

    Whoever reads it while another thread adds to it, holds ``lock``.
    """

    def __init__(self, records=()):
        self.lock = threading.RLock()
        self.run_id, self.role, self.target_batch_size, self.total_epochs = "", "", 0, 0
        self.epochs: dict[int, Epoch] = {}
        self.peers: dict[str, Peer] = {}
        self.held_out: list[HeldOut] = []
        self.failures: deque[Failure] = deque(maxlen=KEPT_FAILURES)
        self.num_failures = self.last_checkpoint = 0
        self.first_time = self.last_time = 0.0
        for record in records:
            self.add(record)

    @property
    def last_epoch(self) -> Epoch | None:
        return next(reversed(self.epochs.values()), None)

    def add(self, record: object) -> None:
        """Take in a record; what is not one of ours is left out."""
        if not isinstance(record, dict) or not isinstance(record.get("event"), str):
            return
        take, time = getattr(self, f"_add_{record['event']}", None), number(record.get("time"), None)
        if take is None or time is None or not 0 <= time < END_OF_TIME:
            return
        with self.lock, suppress(RecursionError):  # a text is made of nested lists in whose place one should be
            take(time, count(record.get("epoch")), record)
            self.first_time, self.last_time = self.first_time or time, max(self.last_time, time)

    def _add_start(self, time: float, epoch: int, record: dict) -> None:
        self.run_id = printable(record.get("run_id", ""), MAX_NAME_LENGTH)
        self.role = printable(record.get("role", ""), MAX_NAME_LENGTH)
        self.target_batch_size = count(record.get("target_batch_size"))
        self.total_epochs = count(record.get("total_steps"))

    def _add_swarm_epoch(self, time: float, epoch: int, record: dict, num_peers: str = "alive_peers") -> None:
        if self.epochs and epoch <= self.last_epoch.epoch:  # a trainer went back to its backup and does them again
            for later in [other for other in self.epochs if other >= epoch]:
                del self.epochs[later]
        losses = {name: number(record.get(name), None) for name in ("loss", "mlm_loss", "sop_loss")}
        self.epochs[epoch] = Epoch(
            epoch, time, **losses, samples=number(record.get("samples")),
            samples_per_second=number(record.get("samples_per_second")), num_peers=count(record.get(num_peers)),
        )  # fmt: skip

    def _add_epoch(self, time: float, epoch: int, record: dict) -> None:
        """A trainer's own file: the swarm's size is known, the work of the others is not."""
        self._add_swarm_epoch(time, epoch, record, num_peers="num_peers")
        self.epochs[epoch].num_peers = max(1, self.epochs[epoch].num_peers)
        peer = self.peers.setdefault(THIS_PEER, Peer(THIS_PEER, time))
        peer.last_seen, peer.epoch = time, epoch
        peer.samples += max(0.0, self.epochs[epoch].samples)
        peer.samples_per_second = self.epochs[epoch].samples_per_second
        peer.lone_epochs = count(record.get("lone_epochs"))

    def _add_peer(self, time: float, epoch: int, record: dict) -> None:
        name = printable(record.get("peer"), MAX_NAME_LENGTH)
        peer = self.peers.setdefault(name, Peer(name, time))
        peer.last_seen, peer.epoch = time, epoch
        peer.samples_per_second = number(record.get("samples_per_second"))
        total = max(0.0, number(record.get("total_samples")))
        # a total that fell is that of a trainer that was started anew
        peer.samples += total - peer.reported_total if total >= peer.reported_total else total
        peer.reported_total = total
        peer.lone_epochs = count(record.get("lone_epochs"))
        failed = count(record.get("failed_rounds"))
        peer.failed_rounds += failed
        if failed:
            peer.failure = printable(record.get("failure") or "no reason given")
            self._fail(Failure(time, epoch, name, peer.failure), failed)

    def _add_round(self, time: float, epoch: int, record: dict) -> None:
        if record.get("complete"):
            return
        kind = printable(record.get("kind", ""), MAX_NAME_LENGTH)
        reasons = record.get("reasons") if isinstance(record.get("reasons"), list) else []
        came = f"{number(record.get('received')):.0%} of the values came back"
        reason = printable("; ".join(map(str, [record.get("error") or came, *reasons[:2]])))
        self._fail(Failure(time, epoch, THIS_PEER, f"{kind}: {reason}"), 1)
        if THIS_PEER in self.peers:
            self.peers[THIS_PEER].failed_rounds += 1
            self.peers[THIS_PEER].failure = reason

    def _add_held_out(self, time: float, epoch: int, record: dict) -> None:
        scores = [number(record.get(name), None) for name in ("loss", "accuracy", "order_accuracy")]
        if None not in scores:
            self.held_out.append(HeldOut(epoch, time, *scores))

    def _add_checkpoint(self, time: float, epoch: int, record: dict) -> None:
        self.last_checkpoint = epoch

    def _fail(self, failure: Failure, count: int) -> None:
        self.failures.append(failure)
        self.num_failures += count

    def shares(self) -> list[tuple[Peer, float]]:
        """Peers with their part of all samples, the greatest first."""
        total = sum(peer.samples for peer in self.peers.values()) or 1.0
        ranked = sorted(self.peers.values(), key=lambda peer: (-peer.samples, peer.name))
        return [(peer, peer.samples / total) for peer in ranked]

    def epoch_seconds(self) -> float | None:
        """How long an epoch usually takes: the median over the last hundred."""
        gaps = [seconds for *_, seconds in self._gaps(list(self.epochs.values())[-101:])]
        return statistics.median(gaps) if gaps else None

    @staticmethod
    def _gaps(epochs: list[Epoch]) -> list[tuple[Epoch, Epoch, float]]:
        """Neighbours with the seconds per epoch between them; looks may have missed epochs."""
        return [(before, after, (after.time - before.time) / max(1, after.epoch - before.epoch))
                for before, after in itertools.pairwise(epochs)]  # fmt: skip

    def epoch_durations(self) -> list[tuple[Epoch, float]]:
        """Epochs with the seconds they took, from the second one on."""
        return [(after, seconds) for _, after, seconds in self._gaps(list(self.epochs.values()))]

    def stalls(self, *, factor: float = 3.0, at_least: float = 10.0) -> list[Stall]:
        gaps = self._gaps(list(self.epochs.values()))
        if len(gaps) < 3:
            return []
        usual = statistics.median(seconds for *_, seconds in gaps)
        stalls = []
        for before, after, seconds in gaps:
            if seconds > max(factor * usual, at_least):
                within = Counter(f.reason for f in self.failures if before.time <= f.time <= after.time + 1.0)
                reasons = tuple(reason for reason, _ in within.most_common(2))
                stalls.append(Stall(before.time, after.time - before.time, after.epoch, reasons))
        return stalls


def read_history(metrics: Path) -> RunHistory:
    """Raises ValueError if the file is not there, cannot be read, or holds no epoch and no peer of a run."""
    try:
        history = RunHistory(records_in(metrics))  # a running peer does this again and again, and the file grows
    except OSError as error:
        raise ValueError(
            f"{metrics}: {error.strerror}; a run's file is OUTPUT_DIR/RUN_ID/ROLE/metrics.jsonl"
        ) from error
    if not history.epochs and not history.peers and not history.run_id:
        raise ValueError(f"{metrics}: no record of a run; a run's file is OUTPUT_DIR/RUN_ID/ROLE/metrics.jsonl")
    return history
