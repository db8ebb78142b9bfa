"""The folder ``run`` in which a peer keeps what its run has handed over: pinned by hash, and enough to start again.

``run.json`` (the manifest), ``config.json``, ``tokenizer/``; in a private run the organiser's ``signature``, too.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from src.files import replaced_directory, settle
from src.settings.manifest import CONFIG_FILE, TOKENIZER, Manifest, differences, read_manifest, sha256

FOLDER, MANIFEST, SIGNATURE = "run", "run.json", "signature"
MAX_SIGNATURE_BYTES = 1024
SETTINGS = "settings"  # such a folder that an organiser has signed, looked for beside the token


def folder_of(output_dir: str, run_id: str) -> Path:
    return Path(output_dir).expanduser() / run_id / FOLDER


def read_folder(folder: Path, run_id: str) -> tuple[Manifest, bytes] | None:
    """The manifest and its signature (empty in an open run); None if there is none yet.

    Raises ValueError if it is not as it was written.
    """
    settle(folder)
    try:
        content = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        return None
    try:
        manifest = read_manifest(content, run_id)
        for name, (digest, _) in manifest.files.items():
            if not (folder / name).is_file() or sha256((folder / name).read_bytes()) != digest:
                raise ValueError(f"{name} is missing, or has been changed")
    except ValueError as error:
        raise ValueError(f"{folder} holds no settings of a run: {error}; remove it to take them anew") from error
    signature = folder / SIGNATURE
    return manifest, signature.read_bytes() if signature.exists() else b""


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """``files``: {name: content}, under names that `read_manifest` lets through."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def write_folder(folder: Path, manifest: Manifest, files: Mapping[str, bytes], signature: bytes = b"") -> None:
    """Pin what was checked. Raises ValueError if another process has pinned something else meanwhile."""
    with _locked(folder):
        present = read_folder(folder, manifest.run_id)
        if present is not None:
            require_same(present[0], manifest, folder, "here")
            return
        with replaced_directory(folder) as aside:
            write_files(aside, {name: files[name] for name in manifest.files})
            (aside / MANIFEST).write_bytes(manifest.content())
            if signature:
                (aside / SIGNATURE).write_bytes(signature)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder.with_name(f".{folder.name}.lock"), os.O_CREAT | os.O_RDWR)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def require_same(pinned: Manifest, manifest: Manifest, folder: Path, where: str) -> None:
    """Raises ValueError, with both values, if a run has other settings now than when this peer began with it."""
    found = differences(pinned.fields(), manifest.fields())
    if found:
        raise ValueError(
            "; ".join(f"{name} was {before} when this run was begun ({folder}), and is {now} {where}"
                      for name, before, now in found[:4])
            + f"; to go on with other settings, as all its peers then must, remove {folder}"
        )  # fmt: skip


def paths_in(folder: Path, manifest: Manifest) -> dict[str, str]:
    """{flag: path} of what is read from the folder."""
    tokenizer = {"tokenizer_path": str(folder / TOKENIZER)} if manifest.has_tokenizer else {}
    return {"model_config_path": str(folder / CONFIG_FILE), **tokenizer}


@contextlib.contextmanager
def says_where_settings_came_from(folder: Path, path: str) -> Iterator[None]:
    """Of an error with the model of ``path``: that the run has handed it over, and how to ask for it anew.

    What passes all checks may still not be buildable, and a peer goes on with what lies in the folder at each start.
    """
    try:
        yield
    except ValueError as error:
        if not Path(path).expanduser().is_relative_to(folder):
            raise
        raise ValueError(f"{error}. The run has handed this over: remove {folder} to take it anew, if need be from "
                         "other initial peers") from error  # fmt: skip
