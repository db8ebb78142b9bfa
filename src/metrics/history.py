"""What a run's metrics file tells, gathered for people: epochs, peers, held-out scores, and what went wrong when.

The terminal view and the report both show a `RunHistory`, so they cannot disagree with the file or with each other.
"""

import itertools
import statistics
import threading
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path

from src.metrics import records
from src.metrics.journal import records_in
from src.metrics.records import printable

THIS_PEER = "this peer"
KEPT_FAILURES = 1000
MAX_NAME_LENGTH = 40


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


def grown(total: int, before: int) -> int:
    """By how much a count went up since the last report; one that fell is that of a trainer that was started anew."""
    return total - before if total >= before else total


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
    computing: float | None = None  # share of its time in which it did not wait for the swarm
    failure: str = ""
    seconds: float = 0.0  # of this file's own trainer, and those in which it waited
    waited_seconds: float = 0.0
    bytes_sent: int = 0  # in rounds of averaging
    bytes_received: int = 0
    reported_sent: int = 0
    reported_received: int = 0
    reported_total: float = 0.0


@dataclass(frozen=True)
class Scores:
    """Of a stored checkpoint on text that nobody trains on."""

    epoch: int
    time: float
    loss: float
    accuracy: float
    order_accuracy: float | None


@dataclass(frozen=True)
class PairScore:
    """Of a stored checkpoint on minimal pairs: the share that is right, and its 95 % interval."""

    epoch: int
    time: float
    accuracy: float
    low: float
    high: float
    num_pairs: int


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


class RunHistory:
    """Takes a journal's records one by one: `add` can be a listener of a `Journal`.

    Whoever reads it while another thread adds to it, holds ``lock``.
    """

    def __init__(self, lines=()):
        self.lock = threading.RLock()
        self.run_id, self.role, self.target_batch_size, self.total_epochs = "", "", 0, 0
        self.epochs: dict[int, Epoch] = {}
        self.peers: dict[str, Peer] = {}
        self.held_out: list[Scores] = []
        self.pairs: list[PairScore] = []
        self.memory: list[tuple[float, records.MemoryUse]] = []  # with the time of each
        self.failures: deque[Failure] = deque(maxlen=KEPT_FAILURES)
        self.num_failures = self.last_checkpoint = 0
        self.first_time = self.last_time = 0.0
        for line in lines:
            self.add(line)

    @property
    def last_epoch(self) -> Epoch | None:
        return next(reversed(self.epochs.values()), None)

    def add(self, line: object) -> None:
        """Take in a record as the file has it; what is not one of ours is left out."""
        found = records.read_record(line)
        if found is None or (take := getattr(self, f"_add_{found[1].event}", None)) is None:
            return
        time, record = found
        with self.lock:
            take(time, record)
            self.first_time, self.last_time = self.first_time or time, max(self.last_time, time)

    def _add_start(self, time: float, start: records.Start) -> None:
        self.run_id, self.role = printable(start.run_id, MAX_NAME_LENGTH), printable(start.role, MAX_NAME_LENGTH)
        self.target_batch_size, self.total_epochs = start.target_batch_size, start.total_steps

    def _add_swarm_epoch(self, time: float, record: records.SwarmEpoch) -> None:
        self._add_to_curve(time, record, num_peers=record.alive_peers)

    def _add_to_curve(self, time: float, record: records.SwarmEpoch | records.TrainerEpoch, *, num_peers: int) -> None:
        if self.epochs and record.epoch <= self.last_epoch.epoch:  # a trainer went back to its backup
            for later in [other for other in self.epochs if other >= record.epoch]:
                del self.epochs[later]
        self.epochs[record.epoch] = Epoch(
            record.epoch, time, record.loss, record.mlm_loss, record.sop_loss, record.samples,
            record.samples_per_second, num_peers,
        )  # fmt: skip

    def _add_epoch(self, time: float, record: records.TrainerEpoch) -> None:
        """A trainer's own file: the swarm's size is known, the work of the others is not."""
        self._add_to_curve(time, record, num_peers=max(1, record.num_peers))
        peer = self.peers.setdefault(THIS_PEER, Peer(THIS_PEER, time))
        peer.last_seen, peer.epoch = time, record.epoch
        peer.samples += record.samples
        peer.samples_per_second, peer.lone_epochs = record.samples_per_second, record.lone_epochs
        peer.seconds += record.seconds
        peer.waited_seconds += record.waited_seconds
        peer.bytes_sent += record.bytes_sent
        peer.bytes_received += record.bytes_received
        peer.computing = records.share_computing(peer.seconds, peer.waited_seconds)

    def _add_peer(self, time: float, record: records.PeerReport) -> None:
        name = printable(record.peer, MAX_NAME_LENGTH)
        peer = self.peers.setdefault(name, Peer(name, time))
        peer.last_seen, peer.epoch = time, record.epoch
        peer.samples += grown(record.total_samples, peer.reported_total)
        peer.bytes_sent += grown(record.bytes_sent, peer.reported_sent)
        peer.bytes_received += grown(record.bytes_received, peer.reported_received)
        peer.reported_total = record.total_samples
        peer.reported_sent, peer.reported_received = record.bytes_sent, record.bytes_received
        peer.samples_per_second, peer.lone_epochs = record.samples_per_second, record.lone_epochs
        peer.computing = None if record.computing is None else min(1.0, max(0.0, record.computing))
        peer.failed_rounds += record.failed_rounds
        if record.failed_rounds:
            peer.failure = record.failure or "no reason given"
            self._fail(Failure(time, record.epoch, name, peer.failure), record.failed_rounds)

    def _add_round(self, time: float, record: records.Round) -> None:
        if record.complete:
            return
        came = f"{record.received:.0%} of the values came back"
        reason = printable("; ".join([record.error or came, *record.reasons[:2]]))
        self._fail(Failure(time, record.epoch, THIS_PEER, f"{record.kind}: {reason}"), 1)
        if THIS_PEER in self.peers:
            self.peers[THIS_PEER].failed_rounds += 1
            self.peers[THIS_PEER].failure = reason

    def _add_held_out(self, time: float, record: records.HeldOut) -> None:
        if None not in (record.loss, record.accuracy):
            self.held_out.append(Scores(record.epoch, time, record.loss, record.accuracy, record.order_accuracy))

    def _add_minimal_pairs(self, time: float, record: records.MinimalPairs) -> None:
        shares = (record.accuracy, record.low, record.high)
        if None not in shares:
            self.pairs.append(PairScore(record.epoch, time, *shares, record.num_pairs))

    def _add_memory(self, time: float, record: records.MemoryUse) -> None:
        self.memory.append((time, record))

    def _add_checkpoint(self, time: float, record: records.Checkpoint) -> None:
        self.last_checkpoint = record.epoch

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
