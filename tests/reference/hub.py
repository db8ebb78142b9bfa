"""A stand-in of the Hugging Face hub, which the real clients talk to."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, SHARED

TOKEN = "hf_dummy"


@dataclass(frozen=True)
class Hub:
    """``root/mode`` says which requests fail and how, ``root/repos.json`` what the repositories hold."""

    address: str
    root: Path

    def fail(self, fault: str) -> None:
        """``fault``: what happens, and the regular expression of the requests to which it does; "ok": nothing."""
        (self.root / "mode").write_text(fault)


@contextlib.contextmanager
def start_hub(folder: Path):
    """Runs the stand-in, with a few repositories, as long as the block lasts; skips the test where it is not there."""
    files = SHARED / "cases" / "hub"
    if not (files / "hub.py").is_file():
        pytest.skip("needs the stand-in of the hub: set LEANALBERT_SHARED to the folder that holds cases/hub")
    root = folder / "root"
    root.mkdir()
    environment = {**os.environ, "PROJECT": str(REPOSITORY)}
    subprocess.run([sys.executable, files / "seed.py", root], env=environment, check=True, capture_output=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, files / "hub.py", str(port), root])
    try:
        wait_for_port(port)
        yield Hub(f"http://127.0.0.1:{port}", root)
    finally:
        server.kill()
        server.wait()


def wait_for_port(port: int, *, seconds: float = 60.0) -> None:
    give_up_at = time.monotonic() + seconds
    while True:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        assert time.monotonic() < give_up_at, "the stand-in of the hub did not start"
        time.sleep(0.05)
