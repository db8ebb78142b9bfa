"""Internet connections of homes on one machine: peers in network namespaces, each at a link of its own to one router.

A link has a rate in each direction (tc's tbf), a delay (`benchmarks.delay`), losses (iptables' statistic match) and
perhaps a home router that translates addresses (iptables' MASQUERADE) and lets nothing in that was not asked for.
Needs root. All interfaces and rules lie in namespaces named after this program, never in the machine's own; they go
with it, or, where it was killed, when the next program makes a network.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from src.process.supervisor import end_with_parent

PREFIX = "leanlinks"
DELAY = Path(__file__).resolve().parent / "delay.py"
BURST_SECONDS, SMALLEST_BURST = 0.01, 16_384  # bytes; what may follow at once when a link was idle
QUEUE_SECONDS = 0.1  # of sending, which a link holds back before it drops; home routers have about that much
QUEUE_PACKETS = 5000  # between the kernel and the program that delays
PROGRAMS = "ip", "tc", "iptables"


@dataclass(frozen=True)
class Link:
    """One peer's connection, as its provider would sell it."""

    down: float  # Mbit/s to the peer
    up: float  # Mbit/s from the peer
    delay: float = 0.0  # milliseconds to the router and back
    loss: float = 0.0  # share of the packets, in each direction
    nat: bool = False  # behind a router that translates addresses: it can call, and not be called

    def __str__(self) -> str:
        rate = f"{self.down:g}/{self.up:g} Mbit/s"
        parts = [rate, f"{self.delay:g} ms" if self.delay else "", f"{self.loss:.0%} loss" if self.loss else ""]
        return " ".join(filter(None, [*parts, "behind a router" if self.nat else ""]))


@dataclass(frozen=True)
class Host:
    """Where a peer lives; ``prefix`` is the command that runs a program there."""

    name: str
    namespace: str
    address: str  # that it knows
    link: Link

    @property
    def prefix(self) -> list[str]:
        return ["ip", "netns", "exec", self.namespace]


@dataclass(frozen=True)
class Traffic:
    """Bytes of IP packets from and to a host, as its interface at the router has counted them."""

    up: int
    down: int
    overruns: int  # packets that this machine was too slow to delay

    def __sub__(self, earlier: "Traffic") -> "Traffic":
        return Traffic(self.up - earlier.up, self.down - earlier.down, self.overruns - earlier.overruns)


def command(*words: object) -> str:
    """Run a program and return its output. Raises OSError with what it says if it fails."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"{' '.join(map(str, words))}: {done.stderr.strip() or 'failed'}")
    return done.stdout


def inside(namespace: str, *words: object) -> str:
    return command("ip", "netns", "exec", namespace, *words)


def what_lacks() -> str:
    """Why this user or this machine cannot emulate links; empty if it can."""
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"there is no {' and no '.join(missing)} (Debian: apt install iproute2 iptables)"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    trial = own_name("trial")
    try:
        command("ip", "netns", "add", trial)
        inside(
            trial, "tc", "qdisc", "add", "dev", "lo", "root", "tbf", "rate", "1mbit", "burst", 16384, "latency", "1s"
        )
        inside(trial, "iptables", "-A", "FORWARD", *losing(0.01))
        inside(trial, "iptables", "-t", "nat", "-A", "POSTROUTING", "-j", "MASQUERADE")
        return ""
    except OSError as error:
        return str(error)
    finally:
        with contextlib.suppress(OSError):
            command("ip", "netns", "del", trial)


def losing(share: float) -> list[str]:
    return ["-m", "statistic", "--mode", "random", "--probability", f"{share:g}", "-j", "DROP"]


def started(pid: int) -> str:
    """When a process was started, in the kernel's ticks: with its id, a name that no other process gets."""
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]


def own_name(what: str) -> str:
    """A name by which others know whether this program still runs."""
    return f"{PREFIX}-{os.getpid()}-{started(os.getpid())}-{what}"


def is_abandoned(name: str) -> bool:
    """Whether the program that has given this name, see `own_name`, has ended."""
    owner = re.match(rf"{PREFIX}-(\d+)-(\d+)-", name)
    if owner is None:
        return False
    try:
        return started(int(owner[1])) != owner[2]
    except OSError:
        return True


def remove(namespaces: list[str]) -> None:
    """Kill what runs in network namespaces, and remove them with all their interfaces and rules."""
    give_up_at = time.monotonic() + 10.0
    while (pids := [pid for name in namespaces for pid in pids_in(name)]) and time.monotonic() < give_up_at:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    for namespace in namespaces:
        command("ip", "netns", "del", namespace)


def pids_in(namespace: str) -> list[int]:
    return [int(pid) for pid in command("ip", "netns", "pids", namespace).split()]


def namespaces_named(prefix: str) -> list[str]:
    names = (line.split()[0] for line in command("ip", "netns", "list").splitlines() if line.strip())
    return [name for name in names if name.startswith(prefix)]


class Network:
    """Hosts around one router, one network at a time; ``with`` removes it. Raises OSError if it cannot be made.

    ``addresses``: what those of hosts begin with. libp2p treats private ones as such, so that what it does for the
    internet's needs others; they exist within these namespaces only.
    """

    def __init__(self, addresses: str = "10.77"):
        self.addresses, self.hosts = addresses, list[Host]()
        self.router = own_name("router")
        self._relays: list[subprocess.Popen] = []

    def __enter__(self) -> "Network":
        remove([name for name in namespaces_named(f"{PREFIX}-") if is_abandoned(name)])
        try:
            self._add_namespace(self.router, forwards=True)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        remove(namespaces_named(own_name("")))
        for relay in self._relays:
            relay.wait()
            relay.stdin.close()
            relay.stdout.close()

    def _add_namespace(self, namespace: str, *, forwards: bool = False) -> None:
        command("ip", "netns", "add", namespace)
        command("ip", "-n", namespace, "link", "set", "dev", "lo", "up")
        if forwards:
            inside(namespace, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")

    def add(self, name: str, link: Link) -> Host:
        """A host at the router; its name has at most twelve letters, as those of network interfaces are short."""
        number, namespace = len(self.hosts) + 1, own_name(name)
        near, far = f"{self.addresses}.{number}.1", f"{self.addresses}.{number}.2"
        at_link = own_name(f"{name}-home") if link.nat else namespace
        self._add_namespace(namespace)
        if link.nat:
            self._add_namespace(at_link, forwards=True)
        self._connect(name, at_link, link)
        for where, device, address, rate in ((self.router, name, near, link.down), (at_link, "wan", far, link.up)):
            command("ip", "-n", where, "addr", "add", f"{address}/30", "dev", device)
            burst = max(SMALLEST_BURST, round(rate * 1e6 / 8 * BURST_SECONDS))
            limit = ["burst", burst, "latency", f"{QUEUE_SECONDS}s"]
            command("tc", "-n", where, "qdisc", "add", "dev", device, "root", "tbf", "rate", f"{rate}mbit", *limit)
        command("ip", "-n", at_link, "route", "add", "default", "via", near)
        if link.loss:
            for direction in "-i", "-o":
                inside(self.router, "iptables", "-A", "FORWARD", direction, name, *losing(link.loss))
        if link.nat:
            self._translate(namespace, at_link)
        self.hosts.append(Host(name, namespace, "192.168.1.2" if link.nat else far, link))
        return self.hosts[-1]

    def _connect(self, name: str, namespace: str, link: Link) -> None:
        """A cable from the router's device ``name`` to the device "wan" of a namespace."""
        if not link.delay:
            there = ["type", "veth", "peer", "name", "wan", "netns", namespace]
            command("ip", "-n", self.router, "link", "add", "name", name, *there)
            for where, device in ((self.router, name), (namespace, "wan")):
                # packets of ordinary size, so that each is lost and counted by itself
                command("ip", "-n", where, "link", "set", "dev", device, "up", "gso_max_segs", 1)
            return
        far = f"{name}-up"
        relay = subprocess.Popen(
            ["ip", "netns", "exec", self.router, sys.executable, "-I", str(DELAY), name, far, str(link.delay / 2)],
            stdout=subprocess.PIPE,
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        self._relays.append(relay)
        if relay.stdout.readline().strip() != "ready":
            raise OSError(f"the program that delays packets ended with code {relay.wait()}")
        command("ip", "-n", self.router, "link", "set", "dev", far, "netns", namespace, "name", "wan")
        for where, device in ((self.router, name), (namespace, "wan")):
            command("ip", "-n", where, "link", "set", "dev", device, "up", "txqueuelen", QUEUE_PACKETS)
        relay.stdin.write("go\n")
        relay.stdin.flush()

    @staticmethod
    def _translate(namespace: str, home: str) -> None:
        """Put a host behind the router ``home``: its own address is nowhere known, and nobody calls it."""
        command(
            "ip", "-n", home, "link", "add", "name", "lan", "type", "veth", "peer", "name", "eth0", "netns", namespace
        )
        for where, device, address in ((home, "lan", "192.168.1.1"), (namespace, "eth0", "192.168.1.2")):
            command("ip", "-n", where, "addr", "add", f"{address}/24", "dev", device)
            command("ip", "-n", where, "link", "set", "dev", device, "up", "gso_max_segs", 1)
        command("ip", "-n", namespace, "route", "add", "default", "via", "192.168.1.1")
        inside(home, "iptables", "-t", "nat", "-A", "POSTROUTING", "-o", "wan", "-j", "MASQUERADE")
        for chain in "INPUT", "FORWARD":
            asked_for = ["-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED", "-j", "ACCEPT"]
            inside(home, "iptables", "-A", chain, "-i", "wan", *asked_for)
            inside(home, "iptables", "-A", chain, "-i", "wan", "-j", "DROP")

    def traffic(self) -> dict[str, Traffic]:
        """Of each host since it was added, by name. Lost packets count for who has sent them."""
        devices = json.loads(command("ip", "-n", self.router, "-j", "-s", "link"))
        names = {host.name for host in self.hosts}
        return {device["ifname"]: read_counters(device) for device in devices if device["ifname"] in names}


def read_counters(device: dict) -> Traffic:
    """Of one interface of the router, as ``ip -j -s link`` describes it: what it receives, the host has sent."""
    counters = device["stats64"]
    return Traffic(counters["rx"]["bytes"], counters["tx"]["bytes"], counters["tx"]["dropped"])
