"""Files and directories that are whole at any moment, however a program ends: written aside, flushed, put in place."""

import contextlib
import ctypes
import errno
import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)

RENAME_EXCHANGE, AT_FDCWD = 2, -100  # <linux/fs.h>, <fcntl.h>
NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


def write_atomically(
    path: Path, content: bytes | str | Callable[[BinaryIO], None], *, check: Callable[[Path], None] | None = None
) -> None:
    """Write a new file aside and put it in place only when it is complete on disk; ``content`` may also write itself.

    ``check`` sees the new file before and may raise. Raises OSError if it cannot be written. Whatever is raised, what
    was at ``path`` stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with aside.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(aside)
        aside.replace(path)
        flush_to_disk(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None  # torch's archive writer covers up the reason, such as a full disk
        raise


@contextlib.contextmanager
def replaced_directory(path: Path) -> Iterator[Path]:
    """Gives a new directory to fill; when the block ends without an error, it takes the place of ``path`` as a whole.

    A program that is killed leaves the old directory or the new one. Where the file system cannot exchange two names
    (``renameat2``), there is a moment with neither; `settle` ends it, and whoever reads such a directory calls that.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    settle(path)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    lock = _try_lock(aside)  # as long as this program lives, nobody takes it for something left behind
    try:
        yield aside
        os.chmod(aside, 0o777 & ~_umask(aside))
        for entry in (*aside.rglob("*"), aside):
            flush_to_disk(entry)
        _put_in_place(aside, path)
        flush_to_disk(path.parent)
    finally:
        settle(path)
        shutil.rmtree(aside, ignore_errors=True)  # what was written in vain, or what has been replaced
        if lock is not None:
            os.close(lock)


def _umask(folder: Path) -> int:
    """From a new file: asking for the umask itself means setting it, for all threads."""
    probe = folder / ".mode"
    os.close(os.open(probe, os.O_CREAT | os.O_WRONLY, 0o777))
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    return 0o777 & ~mode


def _put_in_place(aside: Path, path: Path) -> None:
    if not path.exists():
        aside.rename(path)
    elif not exchange(aside, path):
        new, old = _waiting(path)
        aside.rename(new)  # this name says that it is complete
        path.rename(old)
        new.rename(path)
        shutil.rmtree(old, ignore_errors=True)


def _waiting(path: Path) -> tuple[Path, Path]:
    """Where the new directory waits, and where the old one goes, while they change places one after the other."""
    return path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")


def exchange(one: Path, other: Path) -> bool:
    """Let two existing paths change names in one step; False where the system cannot (NFS, some FUSE mounts)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in NOT_SUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(other))


def settle(path: Path) -> None:
    """Finish or undo a replacement of a directory in which a program was killed; removes what it left."""
    path = Path(path)
    new, old = _waiting(path)
    with contextlib.suppress(FileNotFoundError):  # another program may be doing the same
        if not path.exists() and new.exists():
            new.rename(path)
        elif not path.exists() and old.exists():
            old.rename(path)
    for rest in (new, old):
        shutil.rmtree(rest, ignore_errors=True)
    for rest in path.parent.glob(f".{_escape(path.name)}.*.part"):
        lock = _try_lock(rest)
        if lock is not None:
            shutil.rmtree(rest, ignore_errors=True)
            os.close(lock)


def _escape(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _try_lock(directory: Path) -> int | None:
    """A descriptor that holds the lock of a directory; None if another program has it, or there are no locks."""
    descriptor = None
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None


def try_lock(descriptor: int, what: Path) -> bool:
    """Lock an open file for this process and its children; False if another process has locked it.

    True, with a notice, on a file system that has no locks (Lustre, some NFS and FUSE mounts): work matters more.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning("%s cannot be locked (%s): make sure that no other process uses it", what, error.strerror)
    return True


def flush_to_disk(path: Path) -> None:
    """A file's content, or a directory's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_lines(path: Path, *records: dict) -> None:
    """Add records to a file of JSON lines: on disk, whole, when this returns. One that a crash cut off is dropped."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:  # another program may be adding to it
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have no locks
            logger.info("%s cannot be locked (%s): write to it with one program at a time", path, error.strerror)
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records))
        file.flush()
        os.fsync(file.fileno())


def open_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. Raises ValueError with the line if it is not."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = Path(path).read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text (byte {error.start})") from error


def read_json_lines(path: Path) -> Iterator[tuple[str, object]]:
    """(place, value) of each line that is not blank; a place is ``file:line``, for messages.

    Raises ValueError with the place for a line that is no JSON.
    """
    lines = open_text(path).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:  # also a number of more than 4300 digits, and deep nesting
            is_cut_off = number == len(lines)  # a whole last line ends in a line break
            reason = "the file is cut off here, take a whole copy" if is_cut_off else getattr(error, "msg", error)
            raise ValueError(f"{where}: not valid JSON ({reason})") from error
