"""Killed at any moment, a file or directory is the old one or the new one, whole."""

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from src import files

REPOSITORY = Path(__file__).resolve().parents[1]
# In a process of its own, which ends without any clean-up at the given call of one of the functions that touch names.
KILLED = """
import os, sys
from pathlib import Path
from src import files

path, last, can_exchange = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
calls = 0

def counted(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == last:
            os._exit(9)
        return function(*args, **kwargs)
    return call

for name in ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir"):
    setattr(os, name, counted(getattr(os, name)))
for name in ("rename", "replace", "unlink", "rmdir"):
    setattr(Path, name, counted(getattr(Path, name)))
files.exchange = counted(files.exchange) if can_exchange else (lambda one, other: False)
if sys.argv[4] == "directory":
    with files.replaced_directory(path) as folder:
        for name in ("a", "b"):
            (folder / name).write_text("new")
else:
    files.write_atomically(path, "new")
"""


def run_killed(path: Path, last: int, *, what: str, can_exchange: bool = True) -> int:
    command = [sys.executable, "-c", KILLED, str(path), str(last), str(can_exchange), what]
    return subprocess.run(command, cwd=REPOSITORY, timeout=60, check=False).returncode


def content(directory: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in directory.iterdir()}


@pytest.mark.parametrize("can_exchange", [True, False], ids=["exchange", "two renames"])
def test_directory_is_old_or_new_whenever_its_writer_is_killed(tmp_path, can_exchange):
    path = tmp_path / "model [1]"
    outcomes = []
    for last in range(1, 60):
        path.mkdir(exist_ok=True)
        for file in path.iterdir():
            file.unlink()
        (path / "a").write_text("old")
        code = run_killed(path, last, what="directory", can_exchange=can_exchange)
        if can_exchange:
            assert path.exists(), last  # without anybody's help
        files.settle(path)
        outcomes.append("new" if content(path) == {"a": "new", "b": "new"} else "old")
        assert outcomes[-1] == "new" or content(path) == {"a": "old"}, last
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name], last
        if code == 0:
            break
    assert (
        code == 0 and outcomes[0] == "old" and outcomes.count("old") > 3 and outcomes == sorted(outcomes, reverse=True)
    )


def test_file_is_old_or_new_whenever_its_writer_is_killed(tmp_path):
    path = tmp_path / "file"
    seen = set()
    for last in range(1, 20):
        path.write_text("old")
        code = run_killed(path, last, what="file")
        seen.add(path.read_text())
        if code == 0:
            break
    assert code == 0 and seen == {"old", "new"}


def test_directory_is_kept_when_filling_the_new_one_fails(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "a").write_text("old")
    with pytest.raises(OSError, match="full"), files.replaced_directory(path) as folder:
        (folder / "a").write_text("new")
        raise OSError(errno.ENOSPC, "full")
    assert content(path) == {"a": "old"} and [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_new_directory_may_be_read_by_whoever_may_read_new_ones(tmp_path):
    with files.replaced_directory(tmp_path / "model"):
        pass
    (tmp_path / "usual").mkdir()
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def test_nobody_clears_away_what_another_program_is_writing(tmp_path):
    path = tmp_path / "model"
    with files.replaced_directory(path) as folder:
        (folder / "a").write_text("new")
        code = f"from src.files import settle\nfrom pathlib import Path\nsettle(Path({str(path)!r}))"
        subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=60)
    assert content(path) == {"a": "new"}


def test_exchange_says_when_it_fails_for_another_reason(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.exchange(tmp_path / "nothing", tmp_path / "neither")


@pytest.mark.parametrize("written", [b"new", "new", lambda file: file.write(b"new")], ids=["bytes", "text", "function"])
def test_file_is_written_in_one_go(tmp_path, written):
    path = tmp_path / "folder" / "file"
    files.write_atomically(path, written)
    assert path.read_bytes() == b"new" and os.listdir(path.parent) == ["file"]


def test_file_that_its_check_refuses_is_not_put_in_place(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def refuse(aside: Path) -> None:
        assert aside.read_text() == "new"
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        files.write_atomically(path, "new", check=refuse)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_lines_are_added_whole_after_one_that_was_cut_off(tmp_path):
    path = tmp_path / "lines.jsonl"
    files.append_lines(path, {"a": "ё"})
    with path.open("ab") as file:
        file.write(b'{"a": ')
    files.append_lines(path, {"a": 2})
    assert [value for _, value in files.read_json_lines(path)] == [{"a": "ё"}, {"a": 2}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [("{", "Expecting property name"), ("[" * 100_000, ""), ("9" * 5000, "4300"), ("nonsense", "Expecting value")],
    ids=["open", "deep", "long number", "text"],
)
def test_line_that_is_no_json_is_named_with_its_place(tmp_path, line, reason):
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps({"a": 1}) + "\n\n" + line + "\n" + "{}\n")
    with pytest.raises(ValueError, match=f"lines.jsonl:3: not valid JSON .*{reason}"):
        list(files.read_json_lines(path))


def test_cut_off_and_foreign_files_are_named_with_their_place(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a": ')
    with pytest.raises(
        ValueError, match=r"lines.jsonl:2: not valid JSON \(the file is cut off here, take a whole copy\)"
    ):
        list(files.read_json_lines(path))
    path.write_bytes(b'{"a": 1}\n' + "ё".encode("cp1251"))
    with pytest.raises(ValueError, match=r"lines\.jsonl:2: not UTF-8 text"):
        list(files.read_json_lines(path))
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    assert list(files.read_json_lines(path)) == [(f"{path}:1", {"a": 1})]
