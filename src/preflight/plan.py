"""What a run costs: hours, traffic and memory, from its settings and its trainers' pace. Nothing is measured here.

The cost of a sample is taken to grow with its tokens, which makes later epochs slower than those in which sequences are
short. Rounds are taken to share their work out evenly among the trainers; auxiliary peers that help make them cheaper.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from src.console import counted, format_bytes, format_seconds, rate
from src.models.albert import LeanAlbertForPreTraining
from src.models.shared_linear import dense_matrices
from src.optim.muon import newton_schulz_operations
from src.optim.schedules import decay_epochs, sequence_length
from src.preflight.check import WARNING, Check
from src.swarm.allreduce import USUAL_BANDWIDTH
from src.swarm.compression import EIGHT_BIT_THRESHOLD

LONGEST_EPOCH, LONGEST_WITHOUT_LEARNING = 86_400.0, 3600.0  # seconds, beyond which there is a warning
MOST_UNKNOWN = 0.01  # of the text's tokens; the same
COMMON_EPOCH = 600.0  # seconds; what an epoch is suggested to take where it takes too long
NOT_BEGUN = 1e-9  # samples a second: hivemind gives a trainer 1e-20 until its first local step
UNDELAYED_RATIO = 9  # of computing to averaging, where trainers wait for it
NUM_POINTS = 500  # epochs at which a stretch of the schedule is looked at
# Bytes of a value on its way, by bits: a code, and a scale for each 4096 values (8 bits) or 64 (4 bits).
BYTES = {16: 2.0, 8: 1 + 4 / 4096, 4: 1 / 2 + 2 / 64}


@dataclass(frozen=True)
class Text:
    """What was seen of the training text: all of its documents, or the first ones."""

    num_bytes: int | None  # of files; None where some of it comes from the hub
    num_documents: int
    is_all: bool
    unknown_share: float  # of the tokens of these documents

    def describe(self) -> str:
        size = "streamed from the hub" if self.num_bytes is None else format_bytes(self.num_bytes)
        documents = counted(self.num_documents, "document")
        documents = documents if self.is_all else f"more than {documents}"
        return f"{size}, {documents}; {self.unknown_share:.2%} of the tokens of a sample are unknown"


@dataclass(frozen=True)
class Pace:
    """How fast one trainer is, in samples a second and seconds a local step, when sequences are ``length`` long."""

    samples_per_second: float
    step_seconds: float
    length: int


@dataclass(frozen=True)
class Circumstances:
    """All that is not a setting of the run. ``others_per_second``: samples of the other trainers together, at the
    sequence length of ``epoch``, in which the run is; None: each is as fast as this one."""

    num_trainers: int = 1  # with this one, if it is one
    pace: Pace | None = None  # of this trainer
    others_per_second: float | None = None
    bandwidth: float | None = None  # Mbit/s
    epoch: int = 0
    text: Text | None = None
    num_readers: int = 1  # processes that share out the documents
    is_trainer: bool = True
    averages: bool = True  # takes part in rounds
    why_no_pace: str = "not measured"


@dataclass(frozen=True)
class Milestone:
    """An epoch of the schedule, and the hours until then; None where no pace is known, or it is over."""

    what: str
    epoch: int
    hours_alone: float | None
    hours: float | None  # at the pace of the whole swarm

    def describe(self, *, alone: bool) -> str:
        times = [] if self.hours is None else [format_seconds(3600 * self.hours)]
        if alone and self.hours_alone is not None:
            times.append(f"{format_seconds(3600 * self.hours_alone)} alone")
        return f"{self.what} epoch {self.epoch}" + (f" ({', '.join(times)})" if times else "")


@dataclass(frozen=True)
class Plan:
    """Seconds, bytes and epochs; None is what is not known. `lines` say it, ``warnings`` what should be changed."""

    model: str
    parameters: int
    text: str | None
    sample: str | None
    target_batch_size: int
    is_trainer: bool
    num_trainers: int  # this one included
    length: int | None  # tokens of a sequence for which the next three are
    samples_per_second: float | None  # of this trainer
    swarm_samples_per_second: float | None  # of all whose pace is known
    step_seconds: float | None
    epoch_seconds: float | None  # in which sequences have full length, if ``length`` is known
    schedule: tuple[Milestone, ...]
    gradient_bytes: float  # that a peer sends in an epoch, and as many that it gets
    parameter_bytes: float  # the same for parameters: a round's, divided by the epochs from one to the next
    bandwidth: float  # Mbit/s
    is_bandwidth_known: bool
    round_seconds: float  # that an epoch's rounds take on this link at least
    step_operations: int  # floating-point ones of Muon's products in an epoch; 0 with LAMB
    step_samples: float  # samples of full length that cost a trainer as much
    memory: dict[str, dict[str, float]]  # bytes, by where and by what they are for
    warnings: tuple[Check, ...]
    why_no_pace: str = ""
    local_batch_size: int = 0

    def lines(self) -> list[str]:
        return [
            f"model     {self.model}",
            *([] if self.text is None else [f"text      {self.text}"]),
            *([] if self.sample is None else [f"sample    {self.sample}"]),
            f"target    {self.target_batch_size} samples of all trainers together make an epoch{self._local_steps()}",
            *self.pace_lines(),
            *([self._step()] if self.step_operations and self.is_trainer else []),
            f"traffic   {self._traffic()}",
            f"memory    {self._memory()}",
        ]

    def _step(self) -> str:
        return (
            f"muon      {self.step_operations / 1e12:.3g} TFLOP of products an epoch on each trainer, as much as "
            f"{self.step_samples:.2g} of its samples cost: on the GPU if there is one, else on CPU threads"
        )

    def _local_steps(self) -> str:
        if not self.local_batch_size:
            return ""
        number = round(self.target_batch_size / self.num_trainers / self.local_batch_size)
        return f", in which one of {counted(self.num_trainers, 'trainer')} makes {counted(number, 'local step')}"

    def pace_lines(self) -> list[str]:
        """Those that change with the pace."""
        return [f"pace      {self._pace()}", f"schedule  {self._schedule()}"]

    def _pace(self) -> str:
        if self.samples_per_second is not None:
            parts = [f"one trainer {rate(self.samples_per_second)} in steps of {seconds(self.step_seconds)}"]
            who = counted(self.num_trainers, "trainer") if self.num_trainers > 1 else ""
        elif self.is_trainer:
            parts, who = [self.why_no_pace], counted(self.num_trainers - 1, "other trainer")
        else:
            parts, who = [], counted(self.num_trainers, "trainer")
        if self.swarm_samples_per_second is None:
            return self.why_no_pace
        parts += [f"{who} {rate(self.swarm_samples_per_second)}"] if who else []
        if self.length is None:
            return f"{', '.join(parts)}; an epoch takes {seconds(self.epoch_seconds)}"
        pace = f"{', '.join(parts)}, at {self.length} tokens"
        return f"{pace}; an epoch of full length takes {seconds(self.epoch_seconds)}"

    def _schedule(self) -> str:
        alone = self.num_trainers > 1 and self.samples_per_second is not None
        return ", ".join(one.describe(alone=alone) for one in self.schedule)

    def _traffic(self) -> str:
        if not self.gradient_bytes:
            return "none" if self.num_trainers > 1 else "none while there is one trainer"
        known = "" if self.is_bandwidth_known else ", which is what others take for yours without --bandwidth"
        return (
            f"{format_bytes(self.gradient_bytes + self.parameter_bytes)} out and as much in for an epoch, "
            f"{seconds(self.round_seconds)} at {self.bandwidth:g} Mbit/s{known}"
        )

    def _memory(self) -> str:
        places = [
            f"{format_bytes(sum(parts.values()))} of {where} ("
            + ", ".join(f"{what} {format_bytes(size)}" for what, size in parts.items())
            + ")"
            for where, parts in self.memory.items()
        ]
        return "; ".join(places)


def seconds(value: float) -> str:
    return format_seconds(value) if value >= 10 else f"{value:.2g} s"


def make_plan(config, settings: Mapping, now: Circumstances, memory: dict[str, dict[str, float]]) -> Plan:
    """``settings``: flags with their values, as `arguments.run_settings` gives them; ``memory``: see `Plan`.

    Those of an auxiliary peer, which reads no text, say nothing of sequences.
    """
    if not now.is_trainer:
        settings = {**settings, "initial_sequence_length": None, "max_sequence_length": settings["pad_to_multiple_of"]}
    with torch.device("meta"):
        model = LeanAlbertForPreTraining(config)
    sizes = [parameter.numel() for parameter in model.parameters()]
    operations = muon_operations(model) if settings.get("optimizer") == "muon" else 0
    clock = Clock(settings, now, sizes)
    first, full = clock.length(0), settings["max_sequence_length"]
    length = clock.length(now.epoch) if now.pace is None else now.pace.length
    text = "not looked at" if now.text is None else now.text.describe()
    instance = "two stretches of one text" if settings.get("sentence_order", True) else "one stretch of a text"
    sample = ("several texts in a row" if settings.get("pack_sequences") else instance) + (
        f", {first} tokens at most, later {full}" if first < full else f", {full} tokens at most"
    )
    warnings = [
        *warn_of_epochs(clock),
        *warn_of_steps(clock),
        *warn_of_batches(settings),
        *warn_of_zero_rate(clock),
        *warn_of_text(now),
    ]
    return Plan(
        model=f"{sum(sizes) / 1e6:.2f} million parameters, {counted(config.num_hidden_layers, 'layer')}, hidden size "
        f"{config.hidden_size}, {config.vocab_size} words",
        parameters=sum(sizes),
        text=text if now.is_trainer else None,
        sample=sample if now.is_trainer else None,
        target_batch_size=settings["target_batch_size"],
        is_trainer=now.is_trainer,
        num_trainers=now.num_trainers,
        length=length if now.is_trainer else None,
        samples_per_second=None if now.pace is None else now.pace.samples_per_second,
        swarm_samples_per_second=(clock.own + clock.others) * full / length or None,
        step_seconds=None if now.pace is None else now.pace.step_seconds,
        epoch_seconds=clock.epoch_seconds(settings["total_steps"]),
        schedule=clock.milestones(),
        gradient_bytes=clock.gradient_bytes,
        parameter_bytes=clock.parameter_bytes,
        bandwidth=clock.bandwidth,
        is_bandwidth_known=now.bandwidth is not None,
        round_seconds=clock.round_seconds,
        step_operations=operations,
        step_samples=operations / sample_operations(config, full),
        memory=memory,
        warnings=tuple(warnings),
        why_no_pace="" if now.pace is not None else now.why_no_pace,
        local_batch_size=settings.get("local_batch_size", 0),
    )


def muon_operations(model: torch.nn.Module) -> int:
    """Floating-point operations of a step of Muon on the model's large matrices."""
    return sum(
        parts * newton_schulz_operations(weight.shape[0] // parts, weight.shape[1])
        for weight, parts in dense_matrices(model).items()
    )


def sample_operations(config, length: int) -> int:
    """About those of a sample's forward and backward pass: its tokens in all matrices of all layers."""
    first_layers = 2 if config.hidden_act_gated else 1
    block = 4 * config.hidden_size**2 + (first_layers + 1) * config.hidden_size * config.intermediate_size
    return 6 * config.num_hidden_layers * config.num_inner_groups * block * length


class Clock:
    """How long epochs take, and which part of them is averaging."""

    def __init__(self, settings: Mapping, now: Circumstances, sizes: list[int]):
        self.settings, self.now = settings, now
        self.full = settings["max_sequence_length"]
        # samples a second as if all were of full length
        self.own = 0.0 if now.pace is None else now.pace.samples_per_second * now.pace.length / self.full
        if now.others_per_second is None or now.others_per_second < NOT_BEGUN:
            self.others = self.own * (now.num_trainers - now.is_trainer)
        else:
            self.others = now.others_per_second * self.length(now.epoch) / self.full
        share = traffic_share(now.num_trainers, is_trainer=now.is_trainer) if now.averages else 0.0
        of_large = BYTES[settings["averaging_bits"]]
        gradients = sum(size * (of_large if size >= EIGHT_BIT_THRESHOLD else BYTES[16]) for size in sizes)
        self.gradient_bytes = share * gradients
        self.parameter_bytes = share * BYTES[16] * sum(sizes) / settings["average_state_every"]
        bandwidth = now.bandwidth or USUAL_BANDWIDTH
        self.bandwidth = round(bandwidth, 1 if bandwidth < 10 else None) or bandwidth  # a measured one has many digits
        self.round_seconds = 8 * (self.gradient_bytes + self.parameter_bytes) / (1e6 * self.bandwidth)

    def length(self, epoch: int) -> int:
        """Tokens of a sequence."""
        names = ("max_sequence_length", "initial_sequence_length", "sequence_length_warmup_steps", "pad_to_multiple_of")
        return sequence_length(epoch, **{name: self.settings[name] for name in names})

    def computing_seconds(self, epoch: int, speed: float | None = None) -> float | None:
        """Of an epoch, without averaging; ``speed``: full samples a second, by default the swarm's."""
        speed = self.own + self.others if speed is None else speed
        return self.settings["target_batch_size"] * self.length(epoch) / self.full / speed if speed else None

    def epoch_seconds(self, epoch: int, *, alone: bool = False) -> float | None:
        computing = self.computing_seconds(epoch, self.own if alone else None)
        if alone or computing is None:
            return computing
        if self.settings["delay_grad_averaging"]:  # while the next epoch's gradients are computed
            return max(computing, self.round_seconds)
        return computing + self.round_seconds

    def hours_until(self, epoch: int, *, alone: bool = False) -> float | None:
        """From where the run is now."""
        start, growing = self.now.epoch, self.settings["sequence_length_warmup_steps"]
        if epoch < start or self.epoch_seconds(start, alone=alone) is None:
            return None
        middle = min(max(growing, start), epoch)  # from there on all epochs are alike
        points = range(start, middle, max(1, (middle - start) // NUM_POINTS))
        taken = [self.epoch_seconds(point, alone=alone) for point in points]
        seconds_of_growth = (middle - start) * sum(taken) / len(taken) if taken else 0.0
        return (seconds_of_growth + (epoch - middle) * self.epoch_seconds(growing, alone=alone)) / 3600

    def milestones(self) -> tuple[Milestone, ...]:
        settings = self.settings
        zero, total = settings["num_zero_lr_steps"], settings["total_steps"]
        epochs = {
            "learning rate zero until": zero,
            "learning rate at its peak from": max(settings["warmup_steps"], zero),
        }
        if settings.get("schedule") == "wsd":
            falling = decay_epochs(settings["decay_steps"], warmup_steps=settings["warmup_steps"], total_steps=total)
            epochs["learning rate falls from"] = total - falling
        if self.length(0) < self.full:
            epochs["sequences of full length from"] = settings["sequence_length_warmup_steps"]
        known = sorted((epoch, what) for what, epoch in epochs.items() if 0 < epoch <= total)
        return tuple(
            Milestone(what, epoch, self.hours_until(epoch, alone=True), self.hours_until(epoch))
            for epoch, what in [*known, (total, "end at")]
        )


def traffic_share(num_trainers: int, *, is_trainer: bool) -> float:
    """What a peer sends in a round, in units of all values; it gets as much.

    A trainer sends each of the others its values of their part, and each its own part's average. An auxiliary peer,
    which has no values, sends averages only.
    """
    if num_trainers < 2:
        return 0.0
    if not is_trainer:
        return num_trainers / (num_trainers + 1)
    return 2 * (num_trainers - 1) / num_trainers


def warn_of_epochs(clock: Clock) -> list[Check]:
    target, rounds = clock.settings["target_batch_size"], clock.round_seconds
    shortest, longest = clock.computing_seconds(0), clock.computing_seconds(clock.settings["total_steps"])
    warnings = []
    if longest is not None and longest > LONGEST_EPOCH:
        size = round_down(target * COMMON_EPOCH / longest)
        warnings.append(Check("length of an epoch", WARNING, f"one takes {format_seconds(longest)} when sequences "
                              "have full length", f"lower --target_batch_size (for ten minutes: {size}), "
                              "for all peers, or find more trainers"))  # fmt: skip
    if shortest is not None and shortest < rounds:
        size = math.ceil(target * rounds / shortest)
        goes_on = clock.settings.get("local_batch_size") and clock.settings["delay_grad_averaging"]
        then = "epochs will have more samples than that" if goes_on else "most of the time trainers would wait"
        warnings.append(Check("rounds of averaging", WARNING, f"an epoch of {seconds(shortest)} is shorter than its "
                              f"rounds, which take {seconds(rounds)} at {clock.bandwidth:g} Mbit/s: {then}",
                              f"raise --target_batch_size (to {size} or more), for all peers, "
                              f"{advise_local_steps(clock, shortest)}or give --bandwidth if it is higher"))  # fmt: skip
    limit = clock.settings["averaging_timeout"]
    longest_round = 8e-6 * max(clock.gradient_bytes, clock.parameter_bytes * clock.settings["average_state_every"])
    if longest_round / clock.bandwidth > limit:
        warnings.append(Check("time of a round", WARNING, f"one takes {seconds(longest_round / clock.bandwidth)} at "
                              f"{clock.bandwidth:g} Mbit/s, but is given up after {limit:g} s", "raise "
                              "--averaging_timeout, for all peers, or give --bandwidth if it is higher"))  # fmt: skip
    return warnings


def advise_local_steps(clock: Clock, computing: float) -> str:
    """The flags with which rounds would keep nobody waiting; nothing if trainers make local steps already.

    A local step has a trainer's share of what was one step of all; where nothing is averaged in the background, an
    epoch is to take nine times as long as its rounds.
    """
    if clock.settings.get("local_batch_size"):
        return ""
    target, trainers = clock.settings["target_batch_size"], max(1, clock.now.num_trainers)
    longest = clock.round_seconds * (1 if clock.settings["delay_grad_averaging"] else UNDELAYED_RATIO)
    num_steps = math.ceil(longest / computing)
    return (
        f"or make {num_steps} local steps between two averagings (--local_batch_size {math.ceil(target / trainers)} "
        f"--target_batch_size {num_steps * target}, and {num_steps} times fewer epochs: docs/links.md), "
    )


def warn_of_steps(clock: Clock) -> list[Check]:
    pace, settings = clock.now.pace, clock.settings
    if pace is None:
        return []
    longest, limit = pace.step_seconds * clock.full / pace.length, settings["matchmaking_time"]
    if longest <= limit:
        return []
    batches, sequences = settings["gradient_accumulation_steps"], settings["per_device_train_batch_size"]
    fix = f"raise --matchmaking_time to {math.ceil(longest)}, for all peers"
    if sequences > 1:
        fix = f"lower --per_device_train_batch_size, or {fix}"
    if batches > 1:
        fix = f"lower --gradient_accumulation_steps to {max(1, int(batches * limit / longest))}"
    return [Check("local step", WARNING, f"one takes {seconds(longest)} at full length, but at the end of an epoch the "
                  f"others wait for {limit:g} s at most: this peer misses their rounds", fix)]  # fmt: skip


def warn_of_batches(settings: Mapping) -> list[Check]:
    """With local steps: those of this trainer must not be larger than those of others."""
    own = settings.get("per_device_train_batch_size", 0) * settings.get("gradient_accumulation_steps", 1)
    if not 0 < settings.get("local_batch_size", 0) < own:
        return []
    return [Check("local steps", WARNING, f"each takes {own} samples here, where --local_batch_size says "
                  f"{settings['local_batch_size']}", "lower --gradient_accumulation_steps or "
                  "--per_device_train_batch_size")]  # fmt: skip


def warn_of_zero_rate(clock: Clock) -> list[Check]:
    zero, total = clock.settings["num_zero_lr_steps"], clock.settings["total_steps"]
    hours = clock.hours_until(min(zero, total))
    name, fix = "learning rate of zero", "lower --num_zero_lr_steps, for all peers"
    if zero >= total:
        return [Check(name, WARNING, f"it stays zero for all {counted(total, 'epoch')}", fix)]
    if zero and hours is not None and 3600 * hours > LONGEST_WITHOUT_LEARNING:
        found = f"nothing is learned for {format_seconds(3600 * hours)}, until epoch {zero}"
        return [Check(name, WARNING, found, fix)]
    return []


def warn_of_text(now: Circumstances) -> list[Check]:
    warnings, text = [], now.text
    if text is not None and text.is_all and text.num_documents < now.num_readers:
        warnings.append(Check("documents", WARNING, f"{counted(text.num_documents, 'document')} for {now.num_readers} "
                              "processes that read them: some get none", "lower --dataloader_num_workers, cut the text "
                              "into more documents, or give more --dataset_sources"))  # fmt: skip
    if text is not None and text.unknown_share > MOST_UNKNOWN:
        warnings.append(Check("unknown tokens", WARNING, f"{text.unknown_share:.1%} of the text is none that the "
                              "tokenizer knows", "pass a --tokenizer_path that was trained on text like "
                              "this one"))  # fmt: skip
    return warnings


def round_down(value: float) -> int:
    """To two digits, at least 1."""
    digits = max(0, len(str(int(value))) - 2)
    return max(1, int(value) // 10**digits * 10**digits)
