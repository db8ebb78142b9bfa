"""A loopback swarm whose peers can be killed, frozen, cut off and started again, each at a chosen moment.

Used by `benchmarks.swarm_faults`. Moments come from what the peers write into their own metrics files.
"""

import contextlib
import json
import os
import random
import re
import resource
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from hivemind.p2p import P2P, PeerID

from src.process.local_swarm import LocalPeer, free_port
from src.trainer.backup import read_backup

RUN_ID = "faults"
ORPHAN_SECONDS = 10.0  # how long after its end a peer may still have processes
POLL_SECONDS = 0.004
KINDS = "gradients", "parameters"
HOOKS = Path(__file__).resolve().parent / "fault_hooks"
HOUR = 3600.0  # by which a peer's clock may be made wrong


class NotSurvived(Exception):
    """The swarm or a peer did not come back from a fault in time."""


def parts_of(program: psutil.Process) -> dict[str, psutil.Process]:
    """Each of hivemind's processes below a peer's program by what it does: dht, p2pd, averagers by kind of round."""
    (p2pd,) = (process for process in program.children(recursive=True) if process.name().startswith("p2pd"))
    dht = p2pd.parent()
    forks = [process for process in program.children() if process.cmdline() == program.cmdline()]
    forks.sort(key=lambda process: process.create_time())  # first a guard, see `supervisor`
    averagers = forks[forks.index(dht) + 1 :]
    return {"dht": dht, "p2pd": p2pd, **dict(zip(("parameters", "gradients"), averagers, strict=True))}


class FaultyPeer:
    """One peer under one identity, one address and one folder, whatever happens to its processes."""

    def __init__(self, name: str, script: str, arguments: list[str], folder: Path, *, host: str, namespace=None):
        self.name, self.script, self.folder, self.namespace = name, script, folder, namespace
        role = "aux" if "aux" in script else "trainer"
        self.metrics = folder / RUN_ID / role / "metrics.jsonl"
        self.backup = folder / RUN_ID / role / "backup.pth"
        folder.mkdir(parents=True)
        identity = folder / "identity.pem"
        P2P.generate_identity(str(identity))
        listen = f"/ip4/{host}/tcp/{free_port()}"
        self.address = f"{listen}/p2p/{PeerID.from_identity(identity.read_bytes())}"
        self.arguments = [*arguments, "--output_dir", str(folder), "--identity_path", str(identity)]
        self.arguments += ["--host_maddrs", listen]
        self.clock, self.clock_errors = folder / "clock_error", set()
        self.set_clock(0.0)
        self.running: LocalPeer | None = None
        self.output: list[str] = []  # of earlier processes
        self.records: list[dict] = []
        self.lives: list[list[float]] = []  # [start, end] of its processes
        self.processes: set[psutil.Process] = set()  # all that belong to the present life
        self._offset = 0

    @property
    def alive(self) -> bool:
        return self.running is not None and self.running.process.poll() is None

    def start(self, initial_peers: list[str], environment: dict[str, str]) -> None:
        """Start the program; it joins those of ``initial_peers`` that can be reached, or begins the run without any."""
        joining = ["--initial_peers", *initial_peers] if initial_peers else []
        prefix = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        self.running = LocalPeer(
            self.name,
            self.script,
            [*self.arguments, *joining],
            echo=False,
            environment={**environment, "LEANALBERT_CLOCK_ERROR": str(self.clock)},
            prefix=prefix,
            own_session=True,
        )
        self.processes = set()
        self.lives.append([time.time(), float("inf")])

    def set_clock(self, error: float) -> None:
        """Make the clock of this peer's processes wrong, see `benchmarks/fault_hooks`; by whole hours."""
        self.clock_errors.add(error)
        with self.clock.open("r+b" if self.clock.exists() else "wb") as file:  # in place: the processes have it mapped
            file.write(struct.pack("d", error))

    def look(self) -> list[dict]:
        """Read what the metrics file has got since the last look; returns all records of this peer.

        Their times are made those of the right clock: a record is read soon after it was written.
        """
        with contextlib.suppress(FileNotFoundError):
            if self.metrics.stat().st_size > self._offset:
                with self.metrics.open("rb") as file:
                    file.seek(self._offset)
                    new = file.read()
                whole = new[: new.rfind(b"\n") + 1]
                self._offset += len(whole)
                for line in whole.splitlines():
                    with contextlib.suppress(json.JSONDecodeError):
                        record = json.loads(line)
                        error = HOUR * round((record["time"] - time.time()) / HOUR)
                        record["time"] -= error if error in self.clock_errors else 0.0
                        self.records.append(record)
        return self.records

    def since(self, moment: float, event: str, **values) -> list[dict]:
        """Records of an event that came after a moment."""
        return [
            record
            for record in self.look()
            if record["time"] > moment
            and record["event"] == event
            and all(record.get(key) == value for key, value in values.items())
        ]

    def phase(self, kind: str) -> str:
        """What the averager of ``gradients`` or ``parameters`` does: averaging, matchmaking or, between steps, idle."""
        steps: dict[int, str] = {}
        for record in self.look():
            if record["event"] == "start":
                steps.clear()
            elif record["event"] == "phase" and record["kind"] == kind and record["phase"] not in ("serving", "served"):
                steps[record["step"]] = record["phase"]
        return next((phase for phase in ("averaging", "matchmaking") if phase in steps.values()), "idle")

    def serving(self) -> bool:
        phases = [r["phase"] for r in self.look() if r["event"] == "phase" and r["phase"] in ("serving", "served")]
        return bool(phases) and phases[-1] == "serving"

    def epoch(self) -> int:
        """The last epoch it has finished; after a restart of all from disk it may be an earlier one than before."""
        return next((record["epoch"] for record in reversed(self.look()) if record["event"] == "epoch"), 0)

    # -- processes ----------------------------------------------------------------------------------------------------

    def family(self) -> list[psutil.Process]:
        """The supervisor, the program and all it has started."""
        try:
            supervisor = psutil.Process(self.running.process.pid)
            family = [supervisor, *supervisor.children(recursive=True)]
        except psutil.NoSuchProcess:
            family = []
        self.processes.update(family)
        return family

    def program(self) -> psutil.Process:
        """The process that runs the script proper, below its supervisor."""
        (program,) = (p for p in self.family() if p.ppid() == self.running.process.pid)
        return program

    def parts(self) -> dict[str, psutil.Process]:
        return parts_of(self.program())

    def signal_all(self, number: int, *, but_supervisor: bool = False) -> None:
        for process in self.family():
            if not (but_supervisor and process.pid == self.running.process.pid):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    def said(self, pattern: str, *, after: int = 0) -> re.Match | None:
        """The first match in what the program has printed, the first lines left out."""
        return re.search(pattern, "\n".join(self.running.lines[after:])) if self.running else None


class FaultySwarm:
    """Trainers and an auxiliary peer; ``with`` ends them all. No wait outlasts ``deadline``.

    ``remote``: the host end of a link to a network namespace in which the first trainer lives, see `NetworkLink`.
    """

    def __init__(self, folder: Path, *, shared, trainer, auxiliary, trainers: int, deadline: float, link=None):
        self.folder, self.shared, self.trainer_arguments = folder, shared, trainer
        self.deadline, self.link = deadline, link
        self.host = link.host_address if link else "127.0.0.1"
        self.environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HOOKS)}
        self.auxiliary = FaultyPeer("aux", "run_aux_peer.py", [*shared, *auxiliary], folder / "aux", host=self.host)
        self.trainers: list[FaultyPeer] = []
        for number in range(trainers):
            self.add_trainer(remote=link is not None and number == 0)
        self.orphans: list[str] = []
        self.exits: list[dict] = []  # of peers that were asked to end
        self.apart: list[tuple[str, float, float]] = []  # peers that trained in another swarm, from when to when
        self._ended: list[tuple[float, str, set[psutil.Process]]] = []
        self._lock = threading.Lock()

    @property
    def peers(self) -> list[FaultyPeer]:
        return [self.auxiliary, *self.trainers]

    def add_trainer(self, *, remote: bool = False) -> FaultyPeer:
        name = f"trainer-{len(self.trainers) + 1}"
        peer = FaultyPeer(
            name,
            "run_trainer.py",
            [*self.shared, *self.trainer_arguments],
            self.folder / name,
            host=self.link.remote_address if remote else self.host,
            namespace=self.link.namespace if remote else None,
        )
        self.trainers.append(peer)
        return peer

    def __enter__(self) -> "FaultySwarm":
        threading.Thread(target=self._enforce_deadline, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        for peer in self.peers:
            if peer.alive:
                peer.signal_all(signal.SIGKILL)
                peer.running.process.wait(30)
                peer.output += peer.running.lines
            (peer.folder / "output.txt").write_text("\n".join(peer.output), encoding="utf-8")

    def _enforce_deadline(self) -> None:
        """Whatever this program waits for in vain, it and its peers are gone a minute after the deadline."""
        time.sleep(max(0.0, self.deadline + 60 - time.monotonic()))
        print("the fault harness is not finished a minute after its deadline: ending by force", flush=True)
        for peer in self.peers:
            if peer.alive:
                peer.signal_all(signal.SIGKILL)
        os._exit(3)

    # -- starting and waiting -----------------------------------------------------------------------------------------

    def start(self, *peers: FaultyPeer) -> None:
        """Start peers at once, as their owners would: with the addresses of all other peers that are up."""
        up = [peer.address for peer in self.peers if peer.alive and peer not in peers]
        for peer in peers:
            # the auxiliary peer gets the command that it had at first: nobody writes down all trainers' addresses
            peer.start([] if peer is self.auxiliary else up[:3], self.environment)

    def wait_until(self, condition: Callable[[], object], what: str, *, seconds: float, poll: float = 0.1):
        """The first true value of a condition. Raises NotSurvived when time runs out."""
        give_up_at = min(time.monotonic() + seconds, self.deadline)
        while not (value := condition()):
            if time.monotonic() > give_up_at:
                raise NotSurvived(f"waited {seconds:.0f} s in vain: {what}")
            time.sleep(poll)
            self.check_for_orphans()
        return value

    def wait_until_up(self, *peers: FaultyPeer, seconds: float = 90.0) -> None:
        for peer in peers:
            self.wait_until(
                lambda peer=peer: peer.said("--initial_peers /ip4") or not peer.alive,
                f"{peer.name} starts",
                seconds=seconds,
            )
            if not peer.alive:
                raise NotSurvived(f"{peer.name} ended with code {peer.running.process.poll()}: {peer.running.output()}")

    def in_step(self, peer: FaultyPeer, since: float) -> bool:
        """Whether a trainer has averaged gradients with others and finished an epoch with the swarm since a moment."""
        rounds = [r for r in peer.since(since, "round", kind="gradients", complete=True) if r["num_peers"] > 1]
        epochs = [r for r in peer.since(since, "epoch") if rounds and r["time"] >= rounds[0]["time"] - 1]
        return bool(epochs) and peer.epoch() >= self.epoch() - 1

    def wait_until_in_step(self, *peers: FaultyPeer, since: float, seconds: float = 120.0) -> None:
        def dead() -> list[FaultyPeer]:
            return [peer for peer in peers if not peer.alive]

        for peer in peers:
            self.wait_until(
                lambda peer=peer: self.in_step(peer, since) or dead(), f"{peer.name} trains in step", seconds=seconds
            )
        for peer in dead():
            code = peer.running.process.poll()
            raise NotSurvived(f"{peer.name} ended with code {code}:\n{peer.running.output()[-2000:]}")

    def epoch(self) -> int:
        """The newest epoch that any trainer has finished, of those that are up if there are any."""
        return max(peer.epoch() for peer in self.training() or self.trainers)

    def training(self) -> list[FaultyPeer]:
        return [peer for peer in self.trainers if peer.alive]

    def is_apart(self, peer: FaultyPeer, moment: float) -> bool:
        return any(name == peer.name and start < moment < end for name, start, end in self.apart)

    # -- hurting ------------------------------------------------------------------------------------------------------

    def freeze_when(self, peer: FaultyPeer, condition: Callable[[], bool], what: str, *, seconds: float = 60.0) -> None:
        """Stop all processes of a trainer but its supervisor while a condition holds that may be over in no time."""

        def caught() -> bool:
            if not condition():
                return False
            peer.signal_all(signal.SIGSTOP, but_supervisor=True)
            time.sleep(0.02)
            if condition():
                return True
            peer.signal_all(signal.SIGCONT, but_supervisor=True)  # it was over before all of them stood still
            return False

        family = peer.family()  # looking for it takes longer than many a phase
        peer.family = lambda: family
        try:
            self.wait_until(caught, what, seconds=seconds, poll=POLL_SECONDS)
        finally:
            del peer.family

    def kill(self, peer: FaultyPeer, generator: random.Random) -> str:
        """kill -9 of the program alone, or of all processes at once as when a machine dies; returns which."""
        peer.family()
        if generator.random() < 0.5:
            peer.program().kill()
            how = "program"
        else:
            peer.signal_all(signal.SIGKILL)
            how = "all processes"
        self.expect_end(peer, seconds=ORPHAN_SECONDS)
        return how

    def expect_end(self, peer: FaultyPeer, *, seconds: float) -> int:
        """Wait for a peer's first process to end; what it leaves behind is looked at ten seconds later."""
        processes = set(peer.processes)
        self.wait_until(lambda: not peer.alive, f"{peer.name} ends", seconds=seconds, poll=0.02)
        peer.lives[-1][1] = time.time()
        peer.output += peer.running.lines
        self._ended.append((time.monotonic() + ORPHAN_SECONDS, peer.name, processes))
        return peer.running.process.returncode

    def check_for_orphans(self, *, wait: bool = False) -> None:
        """Note processes that a peer has left ten seconds after its end."""
        with self._lock:
            for entry in list(self._ended):
                due, name, processes = entry
                if wait:
                    time.sleep(max(0.0, due - time.monotonic()))
                if time.monotonic() >= due:
                    self._ended.remove(entry)
                    for process in processes:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                                self.orphans.append(f"{name}: {process.name()} ({process.pid})")

    def leave(self, *peers: FaultyPeer, number: int = signal.SIGTERM, group: bool = False) -> float:
        """Ask peers to end, their first process or, as a terminal does, its whole group; returns the slowest's seconds.

        Raises NotSurvived if one ends with an error or without a backup of its last epoch.
        """
        in_round = {peer.name: any(peer.phase(kind) == "averaging" for kind in KINDS) for peer in peers}
        for peer in peers:
            peer.family()
        asked, moment = time.monotonic(), time.time()
        for peer in peers:
            (os.killpg if group else os.kill)(peer.running.process.pid, number)
        for peer in peers:
            code = self.expect_end(peer, seconds=40)
            seconds = time.monotonic() - asked
            # its group may have been complete before it was asked
            inside = in_round[peer.name] or bool(peer.since(moment, "phase", phase="averaging"))
            self.exits.append({"peer": peer.name, "seconds": round(seconds, 2), "inside_a_round": inside})
            if code != 0:
                raise NotSurvived(f"{peer.name} ended with code {code}:\n{peer.running.output()[-2000:]}")
            if peer is not self.auxiliary and read_backup(peer.backup)["epoch"] < peer.epoch():
                raise NotSurvived(f"{peer.name} ended at epoch {peer.epoch()} with an older backup")
        return time.monotonic() - asked


@contextlib.contextmanager
def file_size_limit(peer: FaultyPeer, limit: int):
    """Let a trainer's program write no file longer than ``limit`` bytes: what a full disk does to backups."""
    pid = peer.program().pid
    hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))


class NetworkLink:
    """A virtual cable between this machine and a network namespace; it can be made slow and cut. Needs root."""

    def __init__(self):
        suffix = f"{os.getpid() % 100_000}"
        self.namespace, self.near, self.far = f"lean{suffix}", f"leana{suffix}", f"leanb{suffix}"
        self.host_address, self.remote_address = "10.213.77.1", "10.213.77.2"

    def __enter__(self) -> "NetworkLink":
        """Raises OSError with the reason if this user or this kernel cannot do it."""
        try:
            for command in (
                f"ip netns add {self.namespace}",
                f"ip link add {self.near} type veth peer name {self.far}",
                f"ip link set {self.far} netns {self.namespace}",
                f"ip addr add {self.host_address}/30 dev {self.near}",
                f"ip link set {self.near} up",
                f"ip netns exec {self.namespace} ip addr add {self.remote_address}/30 dev {self.far}",
                f"ip netns exec {self.namespace} ip link set {self.far} up",
                f"ip netns exec {self.namespace} ip link set lo up",
            ):
                self._run(command)
        except OSError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        for command in (f"ip netns del {self.namespace}", f"ip link del {self.near}"):
            with contextlib.suppress(OSError):
                self._run(command)

    @staticmethod
    def _run(command: str) -> None:
        done = subprocess.run(command.split(), capture_output=True, text=True)
        if done.returncode != 0:
            raise OSError(f"{command}: {done.stderr.strip() or 'failed'}")

    @contextlib.contextmanager
    def cut(self):
        self._run(f"ip link set {self.near} down")
        try:
            yield
        finally:
            self._run(f"ip link set {self.near} up")

    @contextlib.contextmanager
    def slow(self, rate: str, delay: str):
        """Limit the rate and add a delay; without netem in the kernel, the rate alone."""
        slow_down = f"tc qdisc add dev {self.near} root"
        try:
            self._run(f"{slow_down} netem rate {rate} delay {delay}")
        except OSError:
            self._run(f"{slow_down} tbf rate {rate} burst 16kb latency 2s")
        try:
            yield
        finally:
            self._run(f"tc qdisc del dev {self.near} root")
