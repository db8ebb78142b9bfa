"""A peer's sockets lie in a directory of its own, of which nothing is left when the peer has ended, in whatever way."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from src.process.local_swarm import REPOSITORY
from src.process.sockets import MAX_SOCKET_PATH, is_abandoned, remove_abandoned
from tests.conftest import left_behind

PROGRAM = """
import multiprocessing.util, os, socket, sys, time
from src.process.sockets import socket_directory
directory = socket_directory()
sockets = [socket.socket(socket.AF_UNIX) for _ in range(2)]
sockets[0].bind(str(directory / "p2pclient-XXXXXXXXXXX.sock"))
(directory / "torch-shm-dir").mkdir()
sockets[1].bind(str(directory / "torch-shm-dir" / "manager.sock"))
for sock in sockets:
    sock.listen()
assert directory == socket_directory() and multiprocessing.util.get_temp_dir() == str(directory)
if os.fork() == 0:
    # as the supervisor and torch's helper, another program
    os.execvp("sh", ["sh", "-c", f"echo {directory} $TMPDIR; exec sleep 1"])
sys.stdin.read()
"""


class Peer:
    """A program that holds a socket directory, until its standard input is closed or it is killed."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        directory, self.tmpdir = self.process.stdout.readline().split()
        self.directory = Path(directory)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def folder(temporary_directory):
    """A short one: pytest's own are long."""
    folder = temporary_directory / "t"
    folder.mkdir()
    yield folder
    remove_abandoned(folder)
    folder.rmdir()


def test_socket_directory_is_in_tmpdir_and_goes_when_the_program_ends(folder):
    with Peer(folder) as peer:
        assert peer.directory.parent == folder and peer.tmpdir == str(peer.directory)
        assert peer.directory.stat().st_mode & 0o777 == 0o700
        peer.process.communicate()  # closes its input
        assert peer.process.returncode == 0 and not peer.directory.exists()


@pytest.mark.parametrize("name", ["x" * 80, "кириллица"])
def test_socket_directory_is_elsewhere_if_no_socket_can_be_made_in_tmpdir(folder, name):
    with Peer(folder / name) as peer:
        assert peer.directory.parent != folder / name
        assert peer.tmpdir == str(peer.directory), "torch's helper needs a short one, too"
        assert len(str(peer.directory / "torch-shm-dir-XXXXXX" / "manager.sock")) <= MAX_SOCKET_PATH
        peer.process.communicate()
        assert not peer.directory.exists()
    (folder / name).rmdir()


def test_socket_directory_of_a_killed_peer_goes_with_the_next_start_and_that_of_a_living_one_stays(folder):
    with Peer(folder) as living, Peer(folder) as killed:
        os.kill(killed.process.pid, signal.SIGKILL)
        killed.process.wait()
        assert not is_abandoned(killed.directory), "its child still lives"
        killed.process.stdout.read()  # until that has ended, too
        while not is_abandoned(killed.directory):  # its output is closed an instant before its lock
            time.sleep(0.01)
        assert killed.directory.exists()
        assert left_behind(folder) == {killed.directory}
        with Peer(folder) as third:
            assert set(folder.iterdir()) == {living.directory, third.directory}
            assert left_behind(folder) == set()
            third.process.communicate()
        living.process.communicate()


def test_abandoned_directories_lose_nothing_but_sockets(folder):
    thesis, unrelated = folder / "leanalbert-thesis", folder / "other"
    for directory in (thesis, unrelated):
        directory.mkdir()
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(directory / "a.sock"))
    (thesis / "chapter.txt").write_text("ten years")
    remove_abandoned(folder)
    assert (thesis / "chapter.txt").read_text() == "ten years" and (unrelated / "a.sock").exists()
    (thesis / "chapter.txt").unlink()
    (unrelated / "a.sock").unlink()
    unrelated.rmdir()


def test_files_that_are_left_are_found(folder):
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as ended:
        listening.bind(str(folder / "p2pd-a.sock"))
        listening.listen()
        ended.bind(str(folder / "p2pd-b.sock"))
        ended.close()
        (folder / "pymp-c").mkdir()
        assert left_behind(folder) == {folder / "p2pd-b.sock", folder / "pymp-c"}
    for path in folder.iterdir():
        path.rmdir() if path.is_dir() else path.unlink()
