"""A peer's sockets lie in a directory of its own, which is removed when the peer has ended, in whatever way.

hivemind 1.1.12 makes them in /tmp, whatever TMPDIR says, and an averager leaves one behind: its process ends without
closing its connection to p2pd (p2p/p2p_daemon.py:97, averaging/averager.py:354). A peer that is killed leaves all of
them, and those of torch; one that ends at once, as ours do, also those of multiprocessing. The remedy: the supervisor,
which ends last, removes the directory, and the next start of a peer those of peers that were killed with supervisors.
"""

import atexit
import contextlib
import fcntl
import multiprocessing.process
import os
import shutil
import socket
import stat
import tempfile
from pathlib import Path

PREFIX = "leanalbert-"
SCRATCH = "LEANALBERT_SOCKET_DIRECTORY"  # names that of a program's earlier life, see `supervisor`
OWN_FILES = {"identity.key", "listening.json"}  # by which a program that is started again stays the same peer
MAX_SOCKET_PATH = 107  # bytes, for the kernel
LONGEST_NAME = len(f"/{PREFIX}XXXXXXXX/torch-shm-dir-XXXXXX/manager.sock")

_own: Path | None = None


def make_socket_directory() -> Path | None:
    """A new directory for the sockets of this process and of all that it forks from now on.

    It is held by a lock that the kernel drops when the last of them has ended. None if sockets can be made nowhere;
    then `socket_directory` says so.
    """
    with contextlib.suppress(OSError):
        return socket_directory()
    return None


def socket_directory() -> Path:
    """Where this peer makes its sockets. Without a supervisor the directory goes when this program ends.

    Raises OSError, with what to do, if sockets can be made nowhere.
    """
    global _own
    if _own is None and (inherited := os.environ.pop(SCRATCH, "")):  # its supervisor removes it
        _use(Path(inherited))
    if _own is None:
        parents = [*dict.fromkeys((tempfile.gettempdir(), "/tmp", "/dev/shm"))]
        # twice: a peer that starts at the same moment may have taken a new one, not locked yet, for an abandoned one
        made = next(filter(None, map(_make_directory, parents * 2)), None)
        if made is None:
            raise OSError(f"TMPDIR: no sockets can be made in {', '.join(parents)}; set it to a short path on a disk")
        _use(made)
        owner = os.getpid()
        atexit.register(lambda: shutil.rmtree(_own, ignore_errors=True) if os.getpid() == owner else None)
    return _own


def _use(directory: Path) -> None:
    global _own
    _own = directory
    # multiprocessing.util.get_temp_dir looks here; it removes a directory of its own at an ordinary exit only
    multiprocessing.process.current_process()._config["tempdir"] = str(_own)
    # torch's helper for shared memory makes a directory with a socket in TMPDIR, aborts if its path is too long, and
    # leaves it when it is killed. Python's own temporary files stay where `tempfile` has found room for them.
    tempfile.gettempdir()
    os.environ["TMPDIR"] = str(_own)


def _make_directory(parent: str) -> Path | None:
    """A directory that is locked and in which sockets can be made, or None, as in a cluster's long scratch folder."""
    if len(os.fsencode(parent)) + LONGEST_NAME > MAX_SOCKET_PATH or not parent.isascii():
        return None
    with contextlib.suppress(OSError):
        remove_abandoned(parent)
        directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        try:
            # the supervisor, a program of its own, and torch's helper, which ends last, keep it open, too
            os.set_inheritable(_lock(directory, fcntl.LOCK_SH), True)
            with socket.socket(socket.AF_UNIX) as probe:
                probe.bind(str(directory / "probe"))
            (directory / "probe").unlink()
            return directory
        except OSError:  # a file system without locks or sockets
            shutil.rmtree(directory, ignore_errors=True)
    return None


def _lock(directory: str | Path, kind: int) -> int:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def is_abandoned(directory: str | Path) -> bool:
    """Whether all processes of the peer to which a socket directory belongs have ended."""
    try:
        os.close(_lock(directory, fcntl.LOCK_EX))
    except OSError:
        return False
    return True


def remove_abandoned(parent: str | Path) -> None:
    """Remove directories of this user's peers of which no process is left; files of others in them stay."""
    for directory in Path(parent).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if directory.lstat().st_uid == os.getuid() and is_abandoned(directory):
                _remove_sockets(directory)


def _remove_sockets(directory: Path) -> None:
    for path in directory.iterdir():
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            _remove_sockets(path)
        elif stat.S_ISSOCK(mode) or (stat.S_ISREG(mode) and path.name in OWN_FILES):
            path.unlink()
    directory.rmdir()  # fails where something else lies: then it is not, or not only, a peer's
