"""Start peers of a run on this machine as separate programs, show what they print, and end them together.

Used by the demo, the benchmarks and the tests; peers on different machines are started by hand.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from src.process.supervisor import end_with_parent

REPOSITORY = Path(__file__).resolve().parents[2]


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


class LocalPeer:
    """One running script; its output goes to ``lines`` and, behind the peer's name, to the terminal.

    ``prefix``: a command that runs the script, such as ``ip netns exec NAME``. ``own_session``: signals to this
    program's group do not reach the peer, nor those that the kernel sends to a group with stopped processes in it; the
    peer still ends with this program.
    """

    def __init__(
        self,
        name: str,
        script: str,
        arguments: list[str],
        *,
        echo: bool = True,
        environment: dict[str, str] | None = None,
        prefix=(),
        own_session: bool = False,
    ):
        self.name, self.echo, self.lines = name, echo, []
        self.process = subprocess.Popen(
            [*prefix, sys.executable, script, *map(str, arguments)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
            start_new_session=own_session,
            preexec_fn=end_with_parent if own_session else None,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if self.echo:
                print(f"{self.name:>10} | {self.lines[-1]}", flush=True)

    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_for_line(self, pattern: str, *, timeout: float = 120.0) -> re.Match:
        """The first match of a pattern in the output. Raises RuntimeError if the peer ends or time runs out before."""
        give_up_at = time.monotonic() + timeout
        while True:
            ended = self.process.poll() is not None
            if ended:
                self._reader.join(5)
            match = re.search(pattern, self.output())
            if match:
                return match
            if ended or time.monotonic() > give_up_at:
                code = self.process.returncode
                what = f"ended with code {code}" if ended else f"printed no {pattern!r} in {timeout} s"
                raise RuntimeError(f"{self.name} {what}:\n" + "\n".join(self.lines[-20:]))
            time.sleep(0.1)

    def stop(self, *, timeout: float = 40.0) -> int:
        """Ask the peer to end, wait until it has, return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout)
        self._reader.join(5)
        return code


class LocalSwarm:
    """An auxiliary peer and trainers on loopback; ``with`` ends them all, also when this program gets SIGTERM."""

    def __init__(self, *, echo: bool = True, environment: dict[str, str] | None = None):
        self.echo, self.environment, self.peers, self.initial_peers = echo, environment, [], []

    def __enter__(self) -> "LocalSwarm":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):  # programs started with & in a script ignore SIGINT
                signal.signal(signum, lambda number, frame: sys.exit(128 + number))
        return self

    def __exit__(self, *exception) -> None:
        for peer in reversed(self.peers):
            if peer.process.poll() is None:
                peer.process.send_signal(signal.SIGTERM)
        for peer in self.peers:
            peer.stop()

    def start(self, name: str, script: str, arguments: list[str]) -> LocalPeer:
        """Start a peer that joins those before it; returns when it has printed its address."""
        loopback = ["--host_maddrs", "/ip4/127.0.0.1/tcp/0"]
        joining = ["--initial_peers", *self.initial_peers] if self.initial_peers else []
        peer = LocalPeer(name, script, [*arguments, *loopback, *joining], echo=self.echo, environment=self.environment)
        self.peers.append(peer)
        match = peer.wait_for_line(r"--initial_peers ((?:/ip4/127\S+ ?)+)")
        self.initial_peers = self.initial_peers or match.group(1).split()
        return peer
