"""The schema of ``metrics.jsonl``: one class for each event, its fields with their units.

A line of the file is ``{"event": NAME, "time": seconds since 1970, FIELD: value, ...}``. A number that is not finite is
null. `read_record` makes an object of a line again, whatever it holds: files of other versions lack fields, and anybody
may have written into one. Losses are means over forward passes, in nats.
"""

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import ClassVar

MAX_TEXT_LENGTH = 200
# Of numbers that are worth drawing: sums, differences and coordinates of such stay finite, and tell them apart.
LARGEST, SMALLEST = 1e15, 1e-9
END_OF_TIME = 253_402_300_800.0  # the year 10000, from which on no date can be shown


@dataclass(frozen=True)
class Record:
    """What all events have in common: their name, and how they become a line's fields."""

    event: ClassVar[str]
    computed: ClassVar[tuple[str, ...]] = ()  # properties that the file holds, too, for those who read it by hand

    def values(self) -> dict:
        shown = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        return shown | {name: getattr(self, name) for name in self.computed}


@dataclass(frozen=True)
class Start(Record):
    """A peer has been started; the first record of a file, and again after each restart."""

    event: ClassVar[str] = "start"
    role: str = ""  # "trainer" or "auxiliary peer"
    run_id: str = ""
    total_steps: int = 0  # epochs of the whole run
    target_batch_size: int = 0  # samples of all trainers for one epoch
    arguments: dict = field(default_factory=dict)  # all flags with their values
    version: str = ""  # of this software


@dataclass(frozen=True)
class TrainerEpoch(Record):
    """A trainer has ended an epoch (global step); figures are its own since the epoch before."""

    event: ClassVar[str] = "epoch"
    epoch: int = 0
    loss: float | None = None
    mlm_loss: float | None = None  # of masked tokens
    sop_loss: float | None = None  # of sentence order; None where that is not trained (--sentence_order False)
    samples: int = 0  # that count towards the target
    dropped_samples: int = 0  # computed in vain: not finite, or given up for another peer's state
    samples_per_second: float = 0.0
    num_peers: int = 0  # trainers of the run, this one included
    seconds: float = 0.0  # that the epoch took
    local_steps: int = 0
    inner_steps: int = 0  # of the optimizer, on its own, where --local_batch_size is set
    waited_seconds: float = 0.0  # inside the swarm's optimizer
    longest_wait: float = 0.0  # seconds, in one local step
    failed_rounds: int = 0  # of averaging
    partial_rounds: int = 0
    lone_epochs: int = 0  # since the start, see `LoneEpoch`
    state_downloads: int = 0
    bytes_sent: int = 0  # in rounds of averaging
    bytes_received: int = 0
    learning_rate: float = 0.0
    sequence_length: int = 0  # tokens, at most


@dataclass(frozen=True)
class SwarmEpoch(Record):
    """All trainers' figures of an epoch, summed up by an auxiliary peer."""

    event: ClassVar[str] = "swarm_epoch"
    epoch: int = 0
    loss: float | None = None
    mlm_loss: float | None = None
    sop_loss: float | None = None
    samples: int = 0
    samples_per_second: float = 0.0
    alive_peers: int = 0  # trainers that have reported the epoch
    failed_rounds: int = 0


@dataclass(frozen=True)
class PeerReport(Record):
    """What one trainer reports of its newest epoch, as an auxiliary peer sees it."""

    event: ClassVar[str] = "peer"
    peer: str = ""  # eight digits made from its key
    epoch: int = 0
    samples: int = 0
    total_samples: int = 0  # since its start
    samples_per_second: float = 0.0
    failed_rounds: int = 0
    lone_epochs: int = 0  # since its start
    computing: float | None = None  # share of the time since its start in which it did not wait for the swarm
    bytes_sent: int = 0  # in rounds of averaging, since its start
    bytes_received: int = 0
    failure: str = ""  # the newest one


@dataclass(frozen=True)
class Round(Record):
    """One attempt to average, of which ``seconds`` includes the search for a group, except for an assistant."""

    event: ClassVar[str] = "round"
    computed: ClassVar[tuple[str, ...]] = ("complete",)
    kind: str = ""  # "gradients" or "parameters"
    seconds: float = 0.0
    num_peers: int = 0  # members of the group, this peer included
    received: float = 0.0  # share of the values that came back averaged
    num_lost: int = 0  # members that failed while sending to this peer
    error: str = ""  # why there was no round at all
    reasons: tuple[str, ...] = ()  # what went wrong between this peer and others
    num_refused: int = 0  # members of whose values some were left out as bad
    bytes_sent: int = 0  # values to those who average them, and averages to those who take them
    bytes_received: int = 0
    epoch: int = 0

    @property
    def complete(self) -> bool:
        return not self.error and self.received == 1.0 and self.num_lost == 0


@dataclass(frozen=True)
class LoneEpoch(Record):
    """An epoch that a trainer stepped with its own gradients alone, although others train."""

    event: ClassVar[str] = "lone_epoch"
    epoch: int = 0
    reason: str = ""


@dataclass(frozen=True)
class StateDownload(Record):
    """A state taken from another peer."""

    event: ClassVar[str] = "state_download"
    from_epoch: int = 0  # where this peer was
    to_epoch: int = 0
    seconds: float = 0.0
    lost_samples: int = 0  # had been accumulated, and were given up for it
    was_apart: bool = False  # it is that of another swarm, and the epochs that led to `from_epoch` are given up, too


@dataclass(frozen=True)
class WorkerChecksums(Record):
    """The processes of a peer on several devices have agreed on new parameters."""

    event: ClassVar[str] = "local_workers"
    epoch: int = 0
    checksums: tuple[float, ...] = ()  # of each process's parameters


@dataclass(frozen=True)
class Checkpoint(Record):
    """An auxiliary peer has stored a state."""

    event: ClassVar[str] = "checkpoint"
    epoch: int = 0
    path: str = ""


@dataclass(frozen=True)
class HeldOut(Record):
    """Scores of a stored checkpoint on text that nobody trains on."""

    event: ClassVar[str] = "held_out"
    epoch: int = 0
    loss: float | None = None
    accuracy: float | None = None  # share of masked tokens predicted
    order_accuracy: float | None = None  # share of sentence orders predicted; None where none are trained
    unigram_entropy: float | None = None  # nats; the plateau of a model that ignores the context
    num_masked: int = 0  # tokens


@dataclass(frozen=True)
class MinimalPairs(Record):
    """How often a stored checkpoint takes the grammatical sentence of a pair (RuBLiMP) for the likelier one."""

    event: ClassVar[str] = "minimal_pairs"
    epoch: int = 0
    accuracy: float | None = None  # share of pairs; chance is a half
    low: float | None = None  # of its 95 % interval
    high: float | None = None
    morphology: float | None = None  # the same share of a level's pairs
    syntax: float | None = None
    semantics: float | None = None
    num_pairs: int = 0
    num_paradigms: int = 0


@dataclass(frozen=True)
class Refusal(Record):
    """Something that another peer sent was not believed."""

    event: ClassVar[str] = "refusal"
    peer: str = ""
    reason: str = ""


@dataclass(frozen=True)
class MemoryUse(Record):
    """Memory of a peer's processes at the end of an epoch, in MB; 0 for one that is not there."""

    event: ClassVar[str] = "memory"
    epoch: int = 0
    measure: str = ""  # "PSS": shared memory counts in parts; "RSS": in full for each process that shares it
    main: float = 0.0
    dht: float = 0.0
    p2pd: float = 0.0  # the network daemon
    gradients: float = 0.0  # the process that averages them
    parameters: float = 0.0  # the same


@dataclass(frozen=True)
class Phase(Record):
    """What an averager of this peer is about to do, as it happens; for tests, where a flag asks for it."""

    event: ClassVar[str] = "phase"
    kind: str = ""  # as `Round.kind`
    step: int = 0
    phase: str = ""  # matchmaking, averaging, idle; serving, served
    num_peers: int = 0
    peer: str = ""


RECORDS: dict[str, type[Record]] = {kind.event: kind for kind in Record.__subclasses__()}
_TYPES = {kind: typing.get_type_hints(kind) for kind in RECORDS.values()}


def read_record(line: object) -> tuple[float, Record] | None:
    """Time and record of a line's JSON value; None for what is none of ours, or has no time.

    Fields that are missing or make no sense have their defaults, so that whatever shows a record may rely on its types.
    """
    if not isinstance(line, dict) or not isinstance(line.get("event"), str):
        return None
    kind, time = RECORDS.get(line["event"]), number(line.get("time"), None)
    if kind is None or time is None or not 0 <= time < END_OF_TIME:
        return None
    names = [one.name for one in dataclasses.fields(kind) if one.name in line]
    return time, kind(**{name: _sane(_TYPES[kind][name], line[name]) for name in names})


def _sane(kind: object, value: object) -> object:
    if kind is int:
        return count(value)
    if kind is float:
        return number(value)
    if kind == float | None:
        return number(value, None)
    if kind is bool:
        return value is True
    if kind is str:
        return printable("" if value is None else value)
    if kind == tuple[str, ...]:
        return tuple(printable(one) for one in value[:100]) if isinstance(value, list) else ()
    if kind == tuple[float, ...]:
        return tuple(number(one) for one in value[:1000]) if isinstance(value, list) else ()
    return value if isinstance(value, dict) else {}


def number(value: object, otherwise: float | None = 0.0) -> float | None:
    """A number from a file that anything may stand in: ``otherwise`` if it is none, or larger than anything real."""
    if not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
        return otherwise
    return float(value) if abs(value) >= SMALLEST else 0.0


def count(value: object) -> int:
    return max(0, int(number(value)))


def printable(text: object, limit: int = MAX_TEXT_LENGTH) -> str:
    """Text of a stranger on one line, without characters that steer a terminal or turn the writing direction."""
    try:
        text = str(text)
    except RecursionError:  # nested lists where a text should be
        return ""
    shown = "".join(letter if letter.isprintable() else " " for letter in text[: 4 * limit])
    shown = " ".join(shown.split())
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def share_computing(seconds: float, waited_seconds: float) -> float | None:
    """Of a trainer's time that in which it did not wait for the swarm; None before any has passed."""
    return round(min(1.0, max(0.0, 1.0 - waited_seconds / seconds)), 4) if seconds > 0 else None
