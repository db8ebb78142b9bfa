"""Does a swarm survive what happens to swarms? Seeded faults against trainers on this machine, and what they cost.

    python -m benchmarks.swarm_faults                 # 20 minutes or, on a slow machine, until there were 30 faults
    python -m benchmarks.swarm_faults --short         # 3 minutes, the schedule that the tests run

Trainers and an auxiliary peer train a tiny model on the demo texts. Peers are killed while computing, in matchmaking,
inside a round and while serving state, frozen, cut off, restarted, started twice at once, and so on. The report (JSON,
a table in Markdown, a picture of the time line) says what each fault cost, and whether the promises below were kept.
Ends with code 0 if they were, 1 if not.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from arguments import HFTrainerArguments, PeerArguments
from benchmarks.fault_report import (
    BACKUP_EVERY,
    MATCHMAKING_TIME,
    NEXT_CHUNK_TIMEOUT,
    Fault,
    describe,
    judge,
    stall_of,
    summarise,
    write_report,
)
from benchmarks.fault_swarm import HOUR, FaultyPeer, FaultySwarm, NetworkLink, NotSurvived, file_size_limit
from benchmarks.local_steps import simulate
from src.console import quiet_libraries
from src.optim.parameter_groups import parameter_groups
from src.swarm.build import make_learning_rate, make_optimizer
from src.trainer.backup import read_backup
from tasks.mlm.data import make_training_dataset
from tasks.mlm.evaluate import evaluate, held_out_batches
from tasks.mlm.task import build_model
from tasks.mlm.whole_word_mask import DataCollatorForWholeWordMask

REPOSITORY = Path(__file__).resolve().parent.parent
TOKENIZER = str(REPOSITORY / "demo" / "tokenizer")
CORPUS, HELD_OUT = str(REPOSITORY / "demo" / "corpus" / "*.txt"), str(REPOSITORY / "demo" / "heldout.txt")
MODEL = {
    "model_type": "lean_albert",
    "vocab_size": 4000,
    "embedding_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "share_large_matrices": 1,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}
LENGTH, MICRO_BATCH, UNDISTURBED_BATCH = 64, 4, 32
WARMUP = 4
# A run of either length ends while the held-out loss still falls. With the rate of a short one, a long one would learn
# the demo texts by heart, and a held-out loss that rises speaks for whoever has trained less.
SHORT_LEARNING_RATE, LONG_LEARNING_RATE = 7e-3, 2e-3
# Of an epoch that nothing disturbs. It must be longer than the search for a group, or there is no moment between the
# end of a round and that of the epoch, at which all trainers have the same parameters.
EPOCH_SECONDS = 3.5
MIN_EPOCHS = 20  # the loss of a model that has learnt next to nothing would say nothing
FROZEN_SECONDS = CUT_SECONDS = 20.0
SLOW_SECONDS = 20.0
STOPPED_SECONDS = CLOCK_SECONDS = 30.0
HANG_SECONDS = 90.0  # in which a peer must notice that one of its processes hangs; without load it takes 60


class Faults:
    """Each method hurts the swarm in one way, repairs what a person would repair, and waits until all train in step.

    A method returns what it did in words. It calls `mark` at the moment of the fault.
    """

    def __init__(self, swarm: FaultySwarm, generator: random.Random):
        self.swarm, self.random = swarm, generator
        self.marked = 0.0
        self.victims: list[FaultyPeer] = []

    def mark(self, *victims: FaultyPeer) -> None:
        self.marked, self.victims = time.time(), list(victims)

    def choose(self, number: int = 1) -> list[FaultyPeer]:
        return self.random.sample(self.swarm.training(), number)

    def _others(self, *peers: FaultyPeer) -> list[FaultyPeer]:
        return [peer for peer in self.swarm.training() if peer not in peers]

    def _restart(self, *peers: FaultyPeer) -> None:
        self.swarm.start(*peers)
        self.swarm.wait_until_up(*peers)
        self.swarm.wait_until_in_step(*self.swarm.training(), since=self.marked)

    def _kill_when(self, victim: FaultyPeer, condition, what: str) -> str:
        self.swarm.freeze_when(victim, condition, f"{victim.name} is {what}")
        self.mark(victim)
        how = self.swarm.kill(victim, self.random)
        time.sleep(self.random.uniform(0, 5))
        self._restart(victim)
        return f"killed ({how}) while {what}, started again"

    def kill_while_computing(self) -> str:
        (victim,) = self.choose()
        idle = lambda: victim.phase("gradients") == victim.phase("parameters") == "idle"  # noqa: E731
        return self._kill_when(victim, idle, "computing")

    def kill_in_matchmaking(self) -> str:
        (victim,) = self.choose()
        return self._kill_when(victim, lambda: victim.phase("gradients") == "matchmaking", "in matchmaking")

    def kill_inside_a_round(self) -> str:
        (victim,) = self.choose()
        kind = self.random.choice(["gradients", "gradients", "parameters"])
        return self._kill_when(victim, lambda: victim.phase(kind) == "averaging", f"averaging {kind}")

    def kill_while_serving_state(self) -> str:
        """The donor of a joining peer dies in mid-download: both must come back."""
        (joiner,) = self.choose()
        self.swarm.leave(joiner)
        donors = self._others(joiner)
        moment = time.time()
        self.swarm.start(joiner)
        donor = None

        def caught() -> bool:
            nonlocal donor
            for peer in donors:
                if peer.since(moment, "phase", phase="serving") and peer.serving():
                    peer.signal_all(signal.SIGSTOP, but_supervisor=True)
                    donor = peer
                    return True
            return bool(joiner.since(moment, "state_download"))

        families = {peer.name: peer.family() for peer in donors}
        for peer in donors:
            peer.family = lambda peer=peer: families[peer.name]
        try:
            self.swarm.wait_until(caught, "somebody serves state", seconds=90, poll=0.002)
        finally:
            for peer in donors:
                del peer.family
        if donor is None:
            self.mark(joiner)
            self.swarm.wait_until_in_step(*self.swarm.training(), since=moment)
            return "missed: the download was over before the donor could be caught"
        self.mark(donor)
        in_the_middle = donor.serving()
        self.swarm.kill(donor, self.random)
        self.swarm.wait_until_up(joiner)
        self._restart(donor)
        return f"{donor.name} killed {'while' if in_the_middle else 'just after'} it handed its state to {joiner.name}"

    def freeze(self) -> str:
        (victim,) = self.choose()
        self.mark(victim)
        victim.signal_all(signal.SIGSTOP)
        try:
            self.swarm.wait_until(lambda: time.time() > self.marked + FROZEN_SECONDS, "frozen", seconds=60)
        finally:
            victim.signal_all(signal.SIGCONT)
        thawed = time.time()
        self.swarm.wait_until_in_step(*self.swarm.training(), since=thawed)
        return f"all its processes stopped for {FROZEN_SECONDS:.0f} s"

    def late_join(self) -> str:
        newcomer = self.swarm.add_trainer()
        self.mark(newcomer)
        epoch = self.swarm.epoch()
        self._restart(newcomer)
        first = min(record["epoch"] for record in newcomer.since(0, "epoch"))
        if first < epoch:
            raise NotSurvived(f"{newcomer.name} began at epoch {first} when the swarm had finished {epoch}")
        (leaver,) = self.random.sample(self._others(newcomer), 1)
        seconds = self.swarm.leave(leaver)
        return f"joined at epoch {first}; {leaver.name} left for it, in {seconds:.1f} s"

    def leave_and_rejoin(self) -> str:
        (victim,) = self.choose()
        self.mark(victim)
        number = self.random.choice([signal.SIGTERM, signal.SIGINT])
        seconds = self.swarm.leave(victim, number=number)
        self._restart(victim)
        return f"left in {seconds:.1f} s after {signal.Signals(number).name}, came back under the same identity"

    def stop_inside_a_round(self) -> str:
        """Ctrl+C in a terminal, which goes to all processes of a group, while the trainer averages."""
        (victim,) = self.choose()
        self.swarm.wait_until(lambda: victim.phase("gradients") == "averaging", "a round", seconds=60, poll=0.002)
        self.mark(victim)
        seconds = self.swarm.leave(victim, number=signal.SIGINT, group=True)
        self._restart(victim)
        return f"left in {seconds:.1f} s after Ctrl+C inside a round, started again"

    def interrupt_twice(self) -> str:
        (victim,) = self.choose()
        victim.family()
        self.mark(victim)
        os.killpg(victim.running.process.pid, signal.SIGINT)
        time.sleep(0.5)
        again = time.time()
        if victim.alive:
            os.killpg(victim.running.process.pid, signal.SIGINT)
        self.swarm.expect_end(victim, seconds=5)
        seconds = time.time() - again
        self._restart(victim)
        return f"gone {seconds:.1f} s after the second Ctrl+C, started again"

    def restart_the_auxiliary_peer(self) -> str:
        auxiliary = self.swarm.auxiliary
        auxiliary.family()
        self.mark(auxiliary)
        self.swarm.kill(auxiliary, self.random)
        time.sleep(self.random.uniform(0, 5))
        self.swarm.start(auxiliary)
        self.swarm.wait_until_up(auxiliary)
        started = time.time()
        count = len(self.swarm.training())
        self.swarm.wait_until(
            lambda: any(r["alive_peers"] >= count for r in auxiliary.since(started, "swarm_epoch")),
            f"the auxiliary peer sees {count} trainers again", seconds=120,
        )  # fmt: skip
        self.swarm.wait_until_in_step(*self.swarm.training(), since=self.marked)
        return "killed, started again with its old command, which names no other peer"

    def cold_restart(self) -> str:
        victims = self.swarm.training()
        epoch = self.swarm.epoch()
        self.mark(*victims)
        for peer in [*victims, self.swarm.auxiliary]:
            peer.family()
        for peer in [*victims, self.swarm.auxiliary]:
            peer.signal_all(signal.SIGKILL)
        for peer in [*victims, self.swarm.auxiliary]:
            self.swarm.expect_end(peer, seconds=10)
        self.swarm.start(self.swarm.auxiliary)
        self.swarm.wait_until_up(self.swarm.auxiliary)
        self._restart(*victims)
        resumed = max(
            int(match.group(1)) for peer in victims if (match := peer.said(r"resumed from .* at epoch (\d+)"))
        )
        if epoch - resumed > BACKUP_EVERY:
            raise NotSurvived(f"lost {epoch - resumed} epochs, more than the {BACKUP_EVERY} between two backups")
        return f"everybody killed at epoch {epoch}, resumed from disk at epoch {resumed}"

    def all_leave_at_once(self) -> str:
        """As before a night: everybody is asked to end in the same second, the auxiliary peer included."""
        victims, auxiliary = self.swarm.training(), self.swarm.auxiliary
        epoch = self.swarm.epoch()
        self.mark(*victims)
        seconds = self.swarm.leave(*victims, auxiliary)
        self.swarm.start(auxiliary)
        self.swarm.wait_until_up(auxiliary)
        self._restart(*victims)
        resumed = min(
            int(match.group(1)) for peer in victims if (match := peer.said(r"resumed from .* at epoch (\d+)"))
        )
        if resumed < epoch - 1:
            raise NotSurvived(f"asked to leave at epoch {epoch}, somebody resumed at epoch {resumed}")
        return f"all left within {seconds:.1f} s at epoch {epoch}, resumed from disk at epoch {resumed} or later"

    def start_two_at_once(self) -> str:
        victims = self.choose(2)
        self.swarm.leave(*victims)
        epoch = self.swarm.epoch()
        self.mark(*victims)
        self._restart(*victims)
        for peer in victims:
            first = min(record["epoch"] for record in peer.since(self.marked, "epoch"))
            if self._others(*victims) and first < epoch:
                raise NotSurvived(f"{peer.name} began a swarm of its own at epoch {first}, the run was at {epoch}")
        return f"both left and started in the same second, at epoch {epoch}"

    def full_disk(self) -> str:
        (victim,) = self.choose()
        self.swarm.wait_until(victim.backup.exists, "a first backup", seconds=60)
        size = victim.backup.stat().st_size
        self.mark(victim)
        with file_size_limit(victim, size // 2):
            said = self.swarm.wait_until(
                lambda: victim.said("backup failed, the previous one is kept: .*") or not victim.alive,
                "a backup fails", seconds=60,
            )  # fmt: skip
        if not victim.alive:
            raise NotSurvived(f"{victim.name} ended: {victim.running.output()[-2000:]}")
        read_backup(victim.backup)
        self.swarm.wait_until_in_step(*self.swarm.training(), since=time.time())
        return said.group(0)[:70] if said is not True else ""

    def truncated_backup(self) -> str:
        """Its owner does what the refusal says: move the file away and start again."""
        (victim,) = self.choose()
        self.swarm.leave(victim)
        self.mark(victim)
        os.truncate(victim.backup, victim.backup.stat().st_size * 2 // 3)
        self.swarm.start(victim)
        code = self.swarm.expect_end(victim, seconds=60)
        if code != 2 or "is truncated or not a backup; move it away" not in victim.running.output():
            raise NotSurvived(f"expected a refusal, got code {code}: {victim.running.output()}")
        victim.backup.rename(victim.backup.with_suffix(".broken"))
        self._restart(victim)
        return "refused in one line, started again without the file"

    # -- single processes of a trainer, which its supervisor starts again

    def _kill_part(self, victim: FaultyPeer, part: str, when: str = "") -> str:
        hurt = self._hurt_part(victim, part, signal.SIGKILL, "has died: ending", seconds=10, inside_a_round=bool(when))
        return f"killed {part}{when}: {hurt}"

    def _hurt_part(
        self, victim: FaultyPeer, part: str, number: int, words: str, *, seconds: float, inside_a_round: bool = False
    ) -> str:
        """Send a signal to one of a trainer's processes; it must say so in time, write its backup, and come back."""
        process, program, lines = victim.parts()[part], victim.program(), len(victim.running.lines)
        if inside_a_round:
            self.swarm.wait_until(lambda: victim.phase(part) == "averaging", "a round", seconds=90, poll=0.002)
        self.mark(victim)
        process.send_signal(number)
        self.swarm.wait_until(
            lambda: victim.said(words, after=lines), f"{victim.name} says what happened", seconds=seconds, poll=0.02
        )
        heard = time.time() - self.marked
        self.swarm.wait_until(lambda: not program.is_running(), f"{victim.name} ends", seconds=40, poll=0.02)
        ended = time.time() - self.marked
        if not victim.said("wrote the backup", after=lines):
            raise NotSurvived(f"{victim.name} wrote no backup: {victim.running.output()[-2000:]}")
        self.swarm.wait_until(
            lambda: victim.since(self.marked, "start"), f"{victim.name} is started again", seconds=150
        )
        self.swarm.wait_until_in_step(*self.swarm.training(), since=self.marked)
        return f"it said so after {heard:.1f} s, had ended after {ended:.1f} s, was started again"

    def kill_the_dht_process(self) -> str:
        return self._kill_part(*self.choose(), "dht")

    def kill_p2pd(self) -> str:
        return self._kill_part(*self.choose(), "p2pd")

    def kill_an_averager(self) -> str:
        return self._kill_part(*self.choose(), self.random.choice(["gradients", "parameters"]))

    def kill_an_averager_inside_a_round(self) -> str:
        return self._kill_part(*self.choose(), self.random.choice(["gradients", "parameters"]), " inside a round")

    def hang_the_dht_process(self) -> str:
        """It lives, and answers nothing any more."""
        (victim,) = self.choose()
        words = "has answered nothing for .*: it hangs: ending"
        hurt = self._hurt_part(victim, "dht", signal.SIGUSR1, words, seconds=HANG_SECONDS)
        return f"the DHT process hangs: {hurt}"

    def stop_p2pd(self) -> str:
        (victim,) = self.choose()
        p2pd = victim.parts()["p2pd"]
        self.mark(victim)
        p2pd.suspend()
        try:
            self.swarm.wait_until(lambda: time.time() > self.marked + STOPPED_SECONDS, "stopped", seconds=60)
        finally:
            p2pd.resume()
        self.swarm.wait_until_in_step(*self.swarm.training(), since=time.time())
        if victim.since(self.marked, "start"):
            raise NotSurvived(f"{victim.name} was started again, although its p2pd was only stopped")
        return f"its p2pd stopped for {STOPPED_SECONDS:.0f} s; it was not started again"

    # -- two swarms

    def two_swarms_meet(self) -> str:
        """Two newcomers have begun the run a second time. The owner of one restarts it with the right addresses; the
        other, which names only that one, is not touched. Both say what they give up."""
        founder, follower = self.swarm.add_trainer(), self.swarm.add_trainer()
        others, began = self._others(), time.time()
        self.mark(founder, follower)
        founder.start([], self.swarm.environment)
        self.swarm.wait_until_up(founder)
        follower.start([founder.address], self.swarm.environment)
        self.swarm.wait_until_up(follower)
        ahead = "their swarm has trained, and is behind the other one"
        self.swarm.wait_until(lambda: self._have_trained_apart(founder, follower, since=began), ahead, seconds=240)
        epochs, lines = {peer.name: peer.epoch() for peer in (founder, follower)}, len(follower.running.lines)
        self.swarm.leave(founder)
        self.mark(founder, follower)
        founder.start([peer.address for peer in others][:3], self.swarm.environment)
        self.swarm.wait_until_up(founder)
        told = [
            (founder, r"joined at epoch (\d+); its state replaces the backup's of epoch (\d+), \d+ behind", 0),
            (follower, r"two swarms of this run have met: .* epoch (\d+) .* gave up this one's epoch (\d+)", lines),
        ]
        words = []
        for peer, pattern, after in told:
            said = self.swarm.wait_until(
                lambda peer=peer, pattern=pattern, after=after: peer.said(pattern, after=after),
                f"{peer.name} says what it gives up", seconds=90,
            )  # fmt: skip
            words.append(f"{peer.name} gave up epoch {said.group(2)} for {said.group(1)}")
            if int(said.group(2)) < epochs[peer.name]:
                raise NotSurvived(f"{peer.name} had finished epoch {epochs[peer.name]}: {said.group(0)}")
        self.swarm.apart += [(peer.name, began, time.time()) for peer in (founder, follower)]
        self.swarm.wait_until_in_step(*self.swarm.training(), since=time.time())
        self.swarm.leave(*self.random.sample(others, min(2, len(others))))
        return f"{', '.join(words)}; two others left for them"

    def _have_trained_apart(self, *peers: FaultyPeer, since: float) -> bool:
        for peer in peers:
            if not peer.alive:
                raise NotSurvived(f"{peer.name} ended: {peer.running.output()[-2000:]}")
            rounds = [r for r in peer.since(since, "round", kind="gradients", complete=True) if r["num_peers"] > 1]
            if len(rounds) < 2 or len(peer.since(since, "epoch")) < 3:
                return False
        return max(peer.epoch() for peer in peers) < self.swarm.epoch() - 8

    # -- clocks

    def clock_an_hour_off(self) -> str:
        """It is told so, nobody else is disturbed, and it goes on in step, with the wrong clock and the right one."""
        (victim,) = self.choose()
        others = [self.swarm.auxiliary, *self._others(victim)]
        wrong = r"clock is 3600 s (ahead of|behind) that of the other peers"
        lines = {peer.name: len(peer.running.lines) for peer in (victim, *others)}
        error = self.random.choice([HOUR, -HOUR])
        self.mark()  # no victim: it must not stand still, either
        victim.set_clock(error)
        try:
            said = self.swarm.wait_until(
                lambda: victim.said(wrong, after=lines[victim.name]), f"{victim.name} hears of it", seconds=30
            )
            heard = time.time() - self.marked
            self.swarm.wait_until(lambda: time.time() > self.marked + CLOCK_SECONDS, "wrong", seconds=60)
            self.swarm.wait_until_in_step(*self.swarm.training(), since=self.marked)
        finally:
            victim.set_clock(0.0)
        self.swarm.wait_until_in_step(*self.swarm.training(), since=time.time())
        for peer in others:
            if refused := [line for line in peer.running.lines[lines[peer.name] :] if "ignored what peer" in line]:
                raise NotSurvived(f"{peer.name} was disturbed: {refused[0]}")
        if said.group(1) != ("ahead of" if error > 0 else "behind"):
            raise NotSurvived(f"{victim.name} was told the opposite: {said.group(0)}")
        return f"{victim.name} heard after {heard:.0f} s: {said.group(0)}"

    # -- with a network namespace

    def slow_link(self) -> str:
        victim = self.swarm.trainers[0]
        self.mark(victim)
        with self.swarm.link.slow("4mbit", "100ms"):
            self.swarm.wait_until(lambda: time.time() > self.marked + SLOW_SECONDS, "slow", seconds=60)
        self.swarm.wait_until_in_step(*self.swarm.training(), since=time.time())
        return f"4 Mbit/s for {SLOW_SECONDS:.0f} s"

    def cut_link(self) -> str:
        victim = self.swarm.trainers[0]
        self.mark(victim)
        with self.swarm.link.cut():
            self.swarm.wait_until(lambda: time.time() > self.marked + CUT_SECONDS, "cut", seconds=60)
        joined = time.time()
        self.swarm.wait_until_in_step(*self.swarm.training(), since=joined)
        return f"no network for {CUT_SECONDS:.0f} s"


OF_THE_NETWORK = ["slow_link", "cut_link"]
EVERY = [
    "kill_while_computing", "kill_in_matchmaking", "kill_inside_a_round", "kill_while_serving_state", "freeze",
    "late_join", "leave_and_rejoin", "stop_inside_a_round", "interrupt_twice", "restart_the_auxiliary_peer",
    "cold_restart", "all_leave_at_once", "start_two_at_once", "full_disk", "truncated_backup",
    "kill_the_dht_process", "kill_p2pd", "kill_an_averager", "kill_an_averager_inside_a_round", "stop_p2pd",
    "hang_the_dht_process", "clock_an_hour_off", "two_swarms_meet",
]  # fmt: skip
SHORT = ["kill_inside_a_round", "freeze", "cold_restart"]
LONG = [*EVERY, *OF_THE_NETWORK]


def schedule(generator: random.Random, names: list[str]):
    """Every fault once in random order, then again in another one, without end."""
    while True:
        yield from generator.sample(names, len(names))


def main() -> int:
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that nothing is left behind
    quiet_libraries()
    torch.set_num_threads(1)
    folder = options.work_dir / time.strftime("run-%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    model_options = ["--model_config_path", str(folder / "config.json"), "--tokenizer_path", TOKENIZER]
    target = calibrate(folder, trainers=options.trainers)
    shared = [
        *("--run_id", "faults", "--target_batch_size", str(target), *model_options),
        *("--learning_rate", str(options.learning_rate), "--warmup_steps", str(WARMUP), "--num_zero_lr_steps", "0"),
        *("--min_8bit_size", "65536"),
        *("--total_steps", "100000", "--average_state_every", "2", "--min_vector_size", "1000"),
        *("--matchmaking_time", str(MATCHMAKING_TIME), "--next_chunk_timeout", str(NEXT_CHUNK_TIMEOUT)),
        *("--averaging_timeout", "30", "--local_batch_size", str(options.local_batch_size)),
    ]
    trainer = [
        *("--dataset_sources", CORPUS, "--per_device_train_batch_size", str(MICRO_BATCH)),
        *("--max_sequence_length", str(LENGTH), "--initial_sequence_length", str(LENGTH)),
        *("--sequence_length_warmup_steps", "0", "--pad_to_multiple_of", "8"),
        *("--backup_every_epochs", str(BACKUP_EVERY)),
    ]
    auxiliary = ["--assist_in_averaging", "--assist_refresh", "0.25", "--refresh_period", "1"]
    print(f"files go to {folder}; an epoch has {target} samples; seed {options.seed}", flush=True)
    deadline = time.monotonic() + options.seconds + 420 + 60 * options.min_faults
    link, no_link = None, "not part of the short schedule"
    if not options.short:
        try:
            link = NetworkLink().__enter__()
        except OSError as error:
            no_link = str(error)
    try:
        with FaultySwarm(folder, shared=shared, trainer=trainer, auxiliary=auxiliary, trainers=options.trainers,
                         deadline=deadline, link=link) as swarm:  # fmt: skip
            began = time.time()
            results, faults = run(swarm, options, no_link=no_link, began=began)
    finally:
        if link is not None:
            link.__exit__()
    results["settings"].update(target_batch_size=target, learning_rate=options.learning_rate)
    results["loss"] = compare_with_undisturbed(folder, swarm, results, options)
    judge(results)
    write_report(options.results, results, faults, swarm, began)
    return 0 if all(promise["kept"] for promise in results["promises"]) else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="how long faults go on (default: 1200; with --short: 100)")
    parser.add_argument("--min_faults", type=int, help="however long they take (default: 30; with --short: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of faults, their victims and moments")
    parser.add_argument("--trainers", type=int, help="how many (default: 3; with --short: 2)")
    parser.add_argument("--local_batch_size", type=int, default=0, help="trainers make local steps of so many samples")
    parser.add_argument("--short", action="store_true", help="only: " + ", ".join(SHORT))
    parser.add_argument("--faults", nargs="+", choices=LONG, help="only these, in this order, once")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/swarm_faults"), help="the peers' files")
    parser.add_argument(
        "--results", type=Path, default=REPOSITORY / "benchmarks" / "swarm_faults.json", help="PNG and MD beside it"
    )
    options = parser.parse_args()
    options.seconds = options.seconds or (100.0 if options.short else 1200.0)
    options.learning_rate = SHORT_LEARNING_RATE if options.short or options.faults else LONG_LEARNING_RATE
    options.trainers = options.trainers or (2 if options.short else 3)
    if options.min_faults is None:
        options.min_faults = 0 if options.short or options.faults else 30
    if options.trainers < 2:
        parser.error("--trainers: a swarm has at least two")
    return options


def calibrate(folder: Path, *, trainers: int) -> int:
    """A target batch size with which an epoch of so many trainers takes a few seconds on this machine."""
    model, tokenizer = tiny_model(folder)
    batches = training_batches(tokenizer)
    model(**next(batches)).loss.backward()
    began, count = time.monotonic(), 0
    while time.monotonic() < began + 2:
        model(**next(batches)).loss.backward()
        count += 1
    rate = count * MICRO_BATCH / (time.monotonic() - began)
    # the auxiliary peer, p2p daemons and averagers want their share of the cores, and steps are tiny
    return max(64, round(rate * EPOCH_SECONDS * 0.65 * min(trainers, os.cpu_count() or 1) / MICRO_BATCH) * MICRO_BATCH)


def tiny_model(folder: Path):
    config = str(folder / "config.json")
    return build_model(PeerArguments(run_id="faults", model_config_path=config, tokenizer_path=TOKENIZER), seed=0)


def training_batches(tokenizer, *, size: int = MICRO_BATCH):
    dataset = make_training_dataset(
        tokenizer, sources=[CORPUS], shuffle_seed=1, max_sequence_length=LENGTH, batch_size=size
    )
    collator = DataCollatorForWholeWordMask(tokenizer, pad_to_multiple_of=8, seed=1)
    return iter(DataLoader(dataset, batch_size=size, collate_fn=collator))


def run(swarm: FaultySwarm, options, *, no_link: str, began: float) -> tuple[dict, list[Fault]]:
    """Start the swarm, let the faults happen, end it in order; returns what can be said without further computing."""
    faults: list[Fault] = []
    methods = Faults(swarm, random.Random(options.seed))
    names = schedule(random.Random(options.seed), LONG)
    if options.short or options.faults:
        names = iter(options.faults or SHORT)
    try:
        swarm.start(swarm.auxiliary)
        swarm.wait_until_up(swarm.auxiliary)
        swarm.start(*swarm.trainers)  # all in the same second: they must not found two swarms
        swarm.wait_until_up(*swarm.trainers)
        swarm.wait_until_in_step(*swarm.trainers, since=began)
        print(f"{len(swarm.trainers)} trainers are in step after {time.time() - began:.0f} s", flush=True)
        end = time.time() + options.seconds
        for name in names:
            if time.time() > end and len(faults) >= options.min_faults:
                break
            if name in OF_THE_NETWORK and swarm.link is None:
                if not any(fault.name == name for fault in faults):
                    faults.append(Fault(name, detail=f"skipped: {no_link}", skipped=True))
                continue
            faults.append(one_fault(swarm, methods, name, began))
            print(describe(faults[-1]), flush=True)
            if not faults[-1].survived:
                break
        if all(fault.survived for fault in faults):
            swarm.wait_until(lambda: swarm.epoch() >= MIN_EPOCHS, f"{MIN_EPOCHS} epochs", seconds=180)
            leave_in_step(swarm)
    except NotSurvived as reason:
        faults.append(Fault("start" if not faults else "end", detail=str(reason), survived=False))
        print(describe(faults[-1]), flush=True)
    swarm.check_for_orphans(wait=True)
    return summarise(swarm, options, faults, began), faults


def one_fault(swarm: FaultySwarm, methods: Faults, name: str, began: float) -> Fault:
    """Let a fault happen and wait until everybody trains in step again."""
    fault = Fault(name)
    methods.mark()
    before = {peer.name for peer in swarm.training()}
    try:
        fault.detail = getattr(methods, name)()
    except NotSurvived as reason:
        fault.survived, fault.detail = False, str(reason)
    except Exception:  # of the harness itself; the report of what happened until then is still wanted
        fault.survived, fault.detail = False, traceback.format_exc()
    fault.at, fault.until = methods.marked - began, time.time() - began
    fault.victims = ", ".join(peer.name for peer in methods.victims)
    fault.recovery_seconds = round(fault.until - fault.at, 1)
    survivors = [p for p in swarm.trainers if p.name in before and p not in methods.victims]
    fault.stall_seconds = round(stall_of(survivors, methods.marked), 1)
    return fault


def leave_in_step(swarm: FaultySwarm) -> None:
    """Once all have averaged parameters, end all trainers at once, then the auxiliary peer."""
    trainers = swarm.training()
    moment = time.time()
    swarm.wait_until(
        lambda: all(peer.since(moment, "round", kind="parameters", complete=True) for peer in trainers)
        and len({peer.epoch() for peer in trainers}) == 1
        and all(peer.phase("gradients") == peer.phase("parameters") == "idle" for peer in trainers),
        "parameters are averaged once more", seconds=120, poll=0.02,
    )  # fmt: skip
    swarm.leave(*trainers)
    swarm.leave(swarm.auxiliary)


def compare_with_undisturbed(folder: Path, swarm: FaultySwarm, results: dict, options) -> dict | None:
    """Held-out loss of the last survivor against one process that nothing happened to, with as many samples.

    With local steps that process simulates as many trainers.
    """
    survivors = [peer for peer in swarm.trainers if peer.name in results["survivors"]]
    if not survivors:
        return None
    final = {r["epoch"]: 0 for peer in swarm.trainers for r in peer.since(0, "epoch")}
    for peer in swarm.trainers:
        epochs = [r for r in peer.since(0, "epoch") if not swarm.is_apart(peer, r["time"])]  # their work was given up
        latest = {r["epoch"]: r["samples"] for r in epochs}  # a repeated epoch counts once
        for epoch, samples in latest.items():
            final[epoch] += samples
    model, tokenizer = tiny_model(folder)
    batches = held_out_batches(tokenizer, [HELD_OUT], num_instances=512, max_sequence_length=LENGTH)
    untrained = evaluate(model, batches).loss
    print(f"now one process learns from {sum(final.values())} samples undisturbed, for comparison", flush=True)
    train_undisturbed(folder, model, tokenizer, [final[epoch] for epoch in sorted(final)], options)
    undisturbed = evaluate(model, batches)
    model.load_state_dict(read_backup(survivors[0].backup)["model"])
    swarm_loss = evaluate(model, batches).loss
    return {
        "untrained": untrained,
        "unigram_entropy": undisturbed.unigram_entropy,
        "undisturbed": undisturbed.loss,
        "swarm": swarm_loss,
        "ratio": swarm_loss / undisturbed.loss,
        "samples": sum(final.values()),
    }


def train_undisturbed(folder: Path, model, tokenizer, samples_by_epoch: list[int], options) -> None:
    training = HFTrainerArguments(
        output_dir=str(folder),
        learning_rate=options.learning_rate,
        warmup_steps=WARMUP,
        num_zero_lr_steps=0,
        total_steps=100_000,
        min_8bit_size=65536,
        use_cpu=True,
    )
    if options.local_batch_size:
        simulate_undisturbed(model, tokenizer, samples_by_epoch, training, options)
        return
    optimizer = make_optimizer(parameter_groups(model, training.weight_decay), training)
    factor, batches = make_learning_rate(training), training_batches(tokenizer, size=UNDISTURBED_BATCH)
    for epoch, samples in enumerate(samples_by_epoch):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * factor(epoch)
        micro_batches = max(1, round(samples / UNDISTURBED_BATCH))
        for _ in range(micro_batches):
            (model(**next(batches)).loss / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
        if (epoch + 1) % 50 == 0:
            print(f"  {epoch + 1} of {len(samples_by_epoch)} epochs", flush=True)


def simulate_undisturbed(model, tokenizer, samples_by_epoch: list[int], training, options) -> None:
    batches, size = training_batches(tokenizer, size=options.local_batch_size), options.trainers
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def num_steps(epoch: int) -> list[int]:
        return [max(1, round(samples_by_epoch[epoch] / size / options.local_batch_size))] * size

    simulate(
        model,
        lambda model, worker, epoch, step: model(**next(batches)).loss.backward(),
        training=training,
        num_steps=num_steps,
        num_workers=size,
        epochs=len(samples_by_epoch),
    )


if __name__ == "__main__":
    sys.exit(main())
