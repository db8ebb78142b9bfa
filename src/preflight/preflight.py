"""Is this machine ready to join the run? `--check` tests all that usually goes wrong and says what to do about it.

Each check gives one line; the last line is the verdict.
"""

import asyncio
import copy
import ipaddress
import math
import os
import resource
import shutil
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from hivemind.proto import crypto_pb2

from src.access.auth import load_identity
from src.models.hub import ASK_SECONDS, LOOK_AT_THE_NETWORK, check_token, give_up_on_silence
from src.models.memory import Memory, largest_batch, predict_memory
from src.swarm.dht import start_dht, visible_addresses
from src.swarm.probe import Knock, Speed, address_of, ask_to_knock, knock, measure_speed, ping
from src.swarm.run_card import RunCard

MIN_OPEN_FILES = 4096
MAX_CLOCK_OFFSET = 3.0  # hivemind's own limit
# Copies of all parameters: the optimizer's own, averaged gradients, and what a round or a download holds; an auxiliary
# peer's also gradients of its own (zeros), and the checkpoint that it scores.
TRAINER_COPIES, AUXILIARY_COPIES = 3, 5
# Copies of all parameters in shared memory: averaged gradients, averaged parameters, and a state that is handed over,
# with its 8-bit statistics.
SHARED_COPIES = 3.5
SHARED_MEMORY = Path("/dev/shm")
LIBRARY_BYTES, GPU_LIBRARY_BYTES = 1.5e9, 0.5e9  # the processes of a trainer of a tiny model share out 1.0 GB
OK, WARNING, FAILED = "ok", "warning", "FAILED"


@dataclass(frozen=True)
class Check:
    """What was tested, how it went, what was found, and what to do if that is not well."""

    name: str
    state: str
    found: str
    fix: str = ""

    def lines(self) -> str:
        first = f"{self.state:>8}  {self.name}: {self.found}"
        return first if not self.fix else f"{first}\n{'':>10}-> {self.fix}"


def check_open_files() -> Check:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < MIN_OPEN_FILES:
        return Check("open files", FAILED, f"at most {hard} are allowed, {MIN_OPEN_FILES} are needed",
                     f"raise it: `ulimit -n {MIN_OPEN_FILES}` as root, or in /etc/security/limits.conf")  # fmt: skip
    return Check("open files", OK, "no limit" if hard == resource.RLIM_INFINITY else f"up to {hard}")


@dataclass(frozen=True)
class Workload:
    """The batches that this peer trains on, of ``length`` tokens; an auxiliary peer has none (``batch_size`` 0)."""

    min_8bit_size: int
    batch_size: int = 0
    length: int = 0
    half_precision: bool = False

    def predict(self, config) -> Memory:
        return predict_memory(config, batch_size=self.batch_size, **self._options())

    def largest(self, config, budget: float) -> int:
        """The largest batch of this kind for which ``budget`` bytes are enough, beside parameters and gradients."""
        return largest_batch(config, budget=budget, **self._options())

    def _options(self) -> dict:
        return {"length": self.length, "bf16": self.half_precision, "min_8bit_size": self.min_8bit_size}


def check_disk(directory: Path, memory: Memory) -> Check:
    """Space for two backups (the new one is written beside the old one), and the right to write there."""
    existing = directory.expanduser().absolute()
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK) or not existing.is_dir():
        return Check("disk", FAILED, f"nothing can be written to {existing}", "choose another --output_dir")
    needed, free = 2 * (memory.parameters + memory.optimizer) + 1e8, shutil.disk_usage(existing).free
    found = f"{free / 1e9:.1f} GB free in {existing}, {needed / 1e9:.1f} GB needed for backups"
    if free < needed:
        return Check("disk", FAILED, found, "free some space, or choose another --output_dir")
    return Check("disk", OK, found)


def check_shared_memory(model: torch.nn.Module) -> Check:
    """The processes of a peer exchange tensors through a file system in memory. Docker makes it 64 MB small.

    Where it is full, a process ends with a bus error, or waits for ever, in the middle of the run.
    """
    name, needed = "shared memory", SHARED_COPIES * sum(p.numel() * p.element_size() for p in model.parameters())
    if not SHARED_MEMORY.is_dir():
        return Check(name, OK, f"there is no {SHARED_MEMORY}, so not tested")
    if not os.access(SHARED_MEMORY, os.W_OK):
        return Check(name, FAILED, f"nothing can be written to {SHARED_MEMORY}",
                     f"let this user write there: `chmod 1777 {SHARED_MEMORY}` as root")  # fmt: skip
    free = shutil.disk_usage(SHARED_MEMORY).free
    found = f"{needed / 1e9:.2f} GB are needed in {SHARED_MEMORY}; {free / 1e9:.2f} GB are free"
    if free < needed:
        size = f"{math.ceil(needed / 1e9 + 0.5)}g"
        return Check(name, FAILED, found, f"make it larger: `docker run --shm-size {size}` or `mount -o "
                     f"remount,size={size} {SHARED_MEMORY}`; or use a smaller --model_config_path")  # fmt: skip
    return Check(name, OK, found)


def require_shared_memory(model: torch.nn.Module) -> None:
    """Raises ValueError where `check_shared_memory` fails."""
    check = check_shared_memory(model)
    if check.state == FAILED:
        raise ValueError(f"too little {check.name}: {check.found}; {check.fix}")


def available_memory() -> float:
    """Bytes that this machine, or the container this program runs in, can still give."""
    available = next(int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines()
                     if line.startswith("MemAvailable"))  # fmt: skip
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def check_memory(config, workload: Workload, device: torch.device) -> list[Check]:
    """This machine's memory and, if there is one, the GPU's, against what `predict_memory` says.

    A GPU holds the model and what a batch needs, this machine the rest: the optimizer, and copies for the swarm.
    """
    memory = workload.predict(config)
    num_copies = TRAINER_COPIES if workload.batch_size else AUXILIARY_COPIES
    copies = {"optimizer": memory.optimizer, "copies for averaging": num_copies * memory.parameters}
    computing = {"model and gradients": memory.parameters + memory.gradients}
    if workload.batch_size:
        batch = f"a batch of {workload.batch_size} x {workload.length} tokens"
        computing[batch] = memory.device - memory.parameters - memory.gradients
    on_gpu = device.type == "cuda"
    machine = {**({} if on_gpu else computing), **copies, "libraries": LIBRARY_BYTES}
    checks = [_compare_memory("memory", machine, available_memory(), config, None if on_gpu else workload)]
    if on_gpu:
        needed = {**computing, "libraries": GPU_LIBRARY_BYTES}
        checks.append(_compare_memory("GPU memory", needed, torch.cuda.mem_get_info(device)[0], config, workload))
    return checks


def _compare_memory(name: str, parts: dict, available: float, config, workload: Workload | None) -> Check:
    """``parts``: bytes by what they are for. ``workload``: of the batches among them, if there are any."""
    needed = sum(parts.values())
    found = (
        f"{needed / 1e9:.2f} GB are needed ("
        + ", ".join(f"{what} {size / 1e9:.2f}" for what, size in parts.items())
        + f"); {available / 1e9:.2f} GB are free"
    )
    if available < needed:
        if workload is None or not workload.batch_size:
            return Check(name, FAILED, found, "use a machine with more memory, or a smaller --model_config_path")
        memory = workload.predict(config)
        return Check(name, FAILED, found, smaller_batch(config, workload, available - needed + memory.device))
    if available < 1.1 * needed:  # as exact as the prediction is
        return Check(name, WARNING, found, "that is tight: end other programs, or lower --per_device_train_batch_size")
    return Check(name, OK, found)


def smaller_batch(config, workload: Workload, budget: float) -> str:
    """Which flags make the model and a batch fit into so many bytes."""
    for level in dict.fromkeys((config.activation_memory, "lean", "checkpoint")):
        changed = copy.copy(config)
        changed.activation_memory = level
        size = min(workload.batch_size, workload.largest(changed, budget))
        if size:
            flag = "" if level == config.activation_memory else f"--activation_memory {level} "
            return f"{flag}--per_device_train_batch_size {size} fits (raise --gradient_accumulation_steps instead)"
    return "use a machine with more memory, a smaller --model_config_path, or a lower --max_sequence_length"


def check_uploads(api, repo_id: str) -> Check:
    """Whether this machine's token may upload to the repository."""
    name = f"uploads to {repo_id}"
    give_up_on_silence(ASK_SECONDS)
    try:
        return Check(name, OK, f"the hub knows the token of {check_token(api, repo_id)}")
    except ConnectionError as error:
        return Check(name, WARNING, f"the hub cannot be asked ({error})",
                     f"{LOOK_AT_THE_NETWORK}; each upload is tried again")  # fmt: skip
    except ValueError as error:
        found, _, fix = str(error).partition("; ")
        return Check(name, FAILED, found, fix)


def check_identity(identity_path: str | None) -> Check:
    if identity_path is None:
        return Check("identity", OK, "a new one at each start; --identity_path would keep this peer's address")
    path = Path(identity_path).expanduser()
    if not path.exists():
        return Check("identity", OK, f"{path} will be made")
    try:
        content = path.read_bytes()
        key = crypto_pb2.PrivateKey.FromString(content)
    except OSError as error:
        return Check("identity", FAILED, f"{path}: {error.strerror}", "make the file readable, or name another one")
    except Exception:  # protobuf's own exception
        key = None
    if key is None or not key.data:
        return Check("identity", FAILED, f"{path} does not hold a private key",
                     "restore it from a copy, or move it away: a new one is made, and the address changes")  # fmt: skip
    return Check("identity", OK, f"{path}")


def check_own_port(address: str) -> Check:
    """Whether this peer can listen where it is told to."""
    host, port = address_of(address)
    name = f"own address {address}"
    if port is None:
        return Check(name, OK, "not a TCP address, so not tested")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            fixes = {
                "Address already in use": f"another program of this machine (an earlier trainer?) listens on TCP port "
                f"{port}: end it (`ss -tlnp 'sport = :{port}'` names it), or choose another port in --host_maddrs",
                "Cannot assign requested address": f"this machine has no address {host}: listen on 0.0.0.0 and give "
                "the address that others see as --announce_maddrs",
            }
            fix = fixes.get(error.strerror, "choose another address in --host_maddrs")
            return Check(name, FAILED, f"cannot listen: {error.strerror}", fix)
    return Check(name, OK, "any free port" if port == 0 else f"TCP port {port} of this machine is free")


def is_private(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return False


def explain_knock(name: str, tried: Knock) -> Check:
    """Whose side is wrong when an initial peer cannot be reached over TCP, and what that side has to do."""
    where = f"{tried.host} TCP port {tried.port}"
    near = " (a private address: it works in that peer's own network only)" if is_private(tried.host) else ""
    if tried.is_peer:
        return Check(name, OK, f"{where} answers after {1000 * tried.seconds:.0f} ms")
    if tried.open:
        return Check(name, FAILED, f"{where} is open, but what answers there is no hivemind peer",
                     "the other side: another program has that port; take the address the peer prints")  # fmt: skip
    reasons = {
        "refused": (
            f"{where} refuses: the machine answers, but nothing listens on that port",
            "the other side: the peer has ended, or was started anew with another port (give it a fixed one in "
            "--host_maddrs and an --identity_path); if it runs, its router must forward this port",
        ),
        "timeout": (
            f"{where} does not answer within some seconds{near}",
            "the other side: the machine is off, or a firewall there drops the port (open it for TCP); this side: a "
            "firewall that lets no connection out (try another network)",
        ),
        "unknown host": (f"no address is known for the name {tried.host}", "correct the name, or use the IP address"),
    }
    found, fix = reasons.get(
        tried.error, (f"{where}: {tried.error}{near}", "this side: check the network and its route to that address")
    )
    return Check(name, FAILED, found, fix)


def split_address(address: str) -> tuple[str, str]:
    """The way to a peer, and its id."""
    way, _, peer_id = address.rpartition("/p2p/")
    return way, peer_id


def check_initial_peer(address: str) -> Check:
    host, port = address_of(split_address(address)[0])
    name = f"initial peer {address}"
    if port is None:
        return Check(name, OK, "not a TCP address: tested by joining only")
    return explain_knock(name, asyncio.run(knock(host, port)))


def check_contact(address: str, dht) -> list[Check]:
    """Whether the peer with this id answers, how fast, and whether its clock agrees with ours."""
    way, peer_id = split_address(address)
    answer, name = ping(dht, peer_id) if peer_id else None, f"round trip to {address}"
    if answer is None:
        return [
            Check(name, FAILED, f"a peer listens at {way}, but it is not {peer_id}, or does not let this peer in",
                  "the other side: its id changes at each start without --identity_path; take the newest line that it "
                  "prints; with --authorize, check that this peer is admitted")
        ]  # fmt: skip
    checks = [Check(name, OK, f"{1000 * answer.seconds:.0f} ms")]
    offset = answer.clock_offset
    if abs(offset) > MAX_CLOCK_OFFSET:
        direction = "behind" if offset > 0 else "ahead of"
        checks.append(Check("clock", FAILED, f"this machine's is {abs(offset):.0f} s {direction} that of {way}",
                            "set it: `timedatectl set-ntp true`; if it is right, the other side must"))  # fmt: skip
    else:
        checks.append(Check("clock", OK, f"within {max(0.1, abs(offset)):.1f} s of that of {way}"))
    return checks


def check_reachability(dht, address: str, *, announced: Sequence[str]) -> Check:
    """Let an initial peer try this peer's port from outside."""
    name, (way, peer_id) = "own port from outside", split_address(address)
    visible = visible_addresses(dht)
    listening = {address_of(split_address(one)[0])[1] for one in visible}
    ports = sorted((listening | {address_of(one)[1] for one in announced}) - {None, 0})
    tried = ask_to_knock(dht, peer_id, ports) or []
    if not tried:
        return Check(name, WARNING, f"{way} could not test it", "only other peers can tell whether your port is open")
    opened = [one for one in tried if one.is_peer]
    if opened:
        return Check(name, OK, f"{way} reaches {opened[0].host} TCP port {opened[0].port}")
    ways = ", ".join(f"{one.host} TCP port {one.port} ({one.error or 'another program answers'})" for one in tried)
    missing = missing_protocol(tried, [*visible, *announced])
    if missing:
        return Check(name, FAILED, f"{way} cannot reach this machine at {ways}", f"this side: {missing}")
    return Check(name, FAILED, f"{way} cannot reach this machine at {ways}",
                 "this side: open the port in the firewall and forward it in the router (--host_maddrs with a fixed "
                 "port, --announce_maddrs with the public address), or run a trainer with --client_mode")  # fmt: skip


def missing_protocol(tried: Sequence[Knock], own: Sequence[str]) -> str:
    """What to do where this peer was called under an address of the kind, IPv4 or IPv6, that it does not listen on."""
    called = {"ip6" if ":" in one.host else "ip4" for one in tried}
    listens = {address.strip("/").partition("/")[0] for address in own}
    if len(called) != 1 or not listens <= {"ip4", "ip6"} or called & listens:
        return ""
    (kind,) = called
    name, everywhere = ("IPv6", "::") if kind == "ip6" else ("IPv4", "0.0.0.0")
    return (
        f"it is reached over {name}, but listens on the other kind of addresses only: add "
        f"/{kind}/{everywhere}/tcp/PORT to --host_maddrs"
    )


def describe_speed(speed: Speed | None, way: str, given) -> Check:
    if speed is None:
        return Check("bandwidth", WARNING, f"{way} did not take part in a measurement",
                     "pass the lower of your download and upload speed in Mbit/s as --bandwidth")  # fmt: skip
    found = f"{speed.download:.0f} Mbit/s from {way}, {speed.upload:.0f} Mbit/s to it"
    if isinstance(given, float) and given > 2 * speed.bandwidth:
        return Check("bandwidth", WARNING, f"{found}, but --bandwidth is {given:.0f}",
                     "others would wait for this peer: give what was measured, or `auto`")  # fmt: skip
    return Check("bandwidth", OK, found + ("" if given else f"; use --bandwidth {speed.bandwidth:.0f}, or auto"))


def attempt(name: str, action: Callable[[], object], describe: Callable[[object], str]) -> tuple[Check, object]:
    """Do what the run itself would do; its own error message says what to change."""
    try:
        result = action()
    except (ValueError, OSError) as error:
        return Check(name, FAILED, " ".join(str(error).split()), "change what the message names"), None
    return Check(name, OK, describe(result)), result


def join(peer):
    """As the run would, in a private one with this peer's token; but a key that the run would make is not made here."""
    if peer.token_file is None and peer.identity_path and not Path(peer.identity_path).expanduser().exists():
        peer = copy.copy(peer)
        peer.identity_path = None
    return start_dht(peer, load_identity(peer))


def check_run_card(dht, peer, owner: bytes, card: dict[str, str]) -> Check:
    """Whether the run would take this peer: all settings that peers must have in common."""
    found = RunCard(dht, peer.run_id, owner, card, initial_peers=peer.initial_peers).differences()
    if found:
        return Check("settings of the run", FAILED, "; ".join(found), "take the flags and files of the other peers")
    return Check("settings of the run", OK, "as those of the other peers")


def check_network(peer, say: Callable[[Check], None], card: dict[str, str] | None = None) -> None:
    """Ports first, one by one, so that the answer names the one that is wrong; then join as the run would."""
    listening = [] if peer.client_mode else [check_own_port(address) for address in peer.host_maddrs]
    knocks = [check_initial_peer(address) for address in peer.initial_peers]
    reached = [address for address, check in zip(peer.initial_peers, knocks, strict=True) if check.state == OK]
    for check in listening:
        say(check)
    for check in knocks:  # one of several that is away does not matter
        say(Check(check.name, WARNING, check.found, check.fix) if reached and check.state == FAILED else check)
    if any(check.state == FAILED for check in listening) or (peer.initial_peers and not reached):
        return
    joining, started = attempt("peer-to-peer daemon", lambda: join(peer), lambda _: "it starts")
    if started is None:
        if reached and "cannot reach" in joining.found:  # TCP answers, libp2p does not: it is the id
            for address in reached:
                say(check_wrong_id(address))
        else:
            say(joining)
        return
    dht, owner = started
    try:
        say(joining)
        contacts = [(address, check_contact(address, dht)) for address in reached]
        met = [address for address, checks in contacts if checks[0].state == OK]
        for _, checks in contacts:
            for check in checks:
                say(check)
        if met:
            if not peer.client_mode:
                say(check_reachability(dht, met[0], announced=peer.announce_maddrs))
            say(describe_speed(measure_speed(dht, split_address(met[0])[1]), split_address(met[0])[0], peer.bandwidth))
            if card is not None:
                say(check_run_card(dht, peer, owner, card))
        elif not peer.initial_peers:
            say(Check("bandwidth, clock", OK, "no initial peer to compare with: this peer begins a run"))
    finally:
        dht.shutdown()


def check_wrong_id(address: str) -> Check:
    way, peer_id = split_address(address)
    return Check(f"joining through {address}", FAILED, f"a peer listens at {way}, but it does not answer as {peer_id}",
                 "the other side: its id changes at each start without --identity_path; take the newest line that it "
                 "prints")  # fmt: skip


def run_checks(
    peer,
    *,
    output_dir: str,
    device: torch.device,
    workload: Workload,
    build_model: Callable[[], tuple],
    make_card: Callable[[object, object], dict[str, str]],
    read_data: Callable[[object], object] | None,
    check_uploads: Callable[[], Check] | None = None,
    say: Callable[[str], None],
) -> int:
    """All checks, each one's lines as soon as they are known, then the verdict. Returns the exit code, 0 or 2.

    ``build_model()`` gives model and tokenizer, ``make_card(config, tokenizer)`` the run card, ``read_data(tokenizer)``
    reads a first instance; the first and the last raise ValueError. ``check_uploads()`` is for who uploads.
    """
    checks: list[Check] = []

    def report(check: Check) -> None:
        checks.append(check)
        say(check.lines())

    report(check_open_files())
    report(check_identity(peer.identity_path))
    model_check, built = attempt("model and tokenizer", build_model, describe_model)
    report(model_check)
    if built is not None:
        for check in check_memory(built[0].config, workload, device):
            report(check)
        report(check_shared_memory(built[0]))
        report(check_disk(Path(output_dir), workload.predict(built[0].config)))
    if check_uploads is not None:
        report(check_uploads())
    card = None if built is None else make_card(built[0].config, built[1])
    check_network(peer, report, card)  # before data are read: hivemind's processes come before other threads
    if built is not None and read_data is not None:
        report(attempt("data", lambda: read_data(built[1]), lambda _: "the first instance was read")[0])
    return verdict(checks, say)


def describe_model(built: tuple) -> str:
    model, tokenizer = built
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters, {len(tokenizer)} tokens"


def verdict(checks: Sequence[Check], say: Callable[[str], None]) -> int:
    failed = [check for check in checks if check.state == FAILED]
    warnings = sum(check.state == WARNING for check in checks)
    more = f", {warnings} warnings" if warnings else ""
    if failed:
        names = "; ".join(check.name for check in failed)
        say(f"NOT READY: {len(failed)} of {len(checks)} checks failed{more}: {names}")
        return 2
    say(f"READY: {len(checks)} checks passed{more}")
    return 0
