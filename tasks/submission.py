"""Checks the predictions of a model and packs them for the leaderboard.

    python -m tasks.submission preds/MODEL [--data-dir DIR] [--zip]

Every file that is there must be exactly as the leaderboard wants it; the first fault of each file is named with its
line. Exit code 0: all files that are there are right (missing ones are listed); 1: some file is wrong; 2: wrong usage.
"""

import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from command_line import ArgumentParser
from tasks.finetuning.console import fail
from tasks.registry import TASKS

PROGRAM = "python -m tasks.submission"
ARCHIVE = "submission.zip"
FOLDER_IN_ARCHIVE = "submission"
ARCHIVE_TIME = (2020, 1, 1, 0, 0, 0)  # equal predictions give equal archives


@dataclass
class SubmissionReport:
    """What is in a folder of predictions: right files (with the number of records), wrong ones, missing ones."""

    right: dict[str, int] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_directory(directory: Path, data_dir: Path | None = None) -> SubmissionReport:
    """Checks all files of the leaderboards; with data_dir against the test records there, else official numbers."""
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory; finetune_mlm.py writes predictions to preds/MODEL")
    report = SubmissionReport()
    known = {task.submission_file for task in TASKS.values()} | {ARCHIVE}
    for path in sorted(directory.iterdir()):
        if path.name not in known and path.suffix in (".jsonl", ".csv", ".zip"):
            report.wrong[path.name] = f"{path}: no task has a submission file of this name"
    for task in TASKS.values():
        path = directory / task.submission_file
        if not path.is_file():
            report.missing.append(path.name)
            continue
        records = _test_records(task, data_dir)
        try:
            task.check_submission(path, records)
        except ValueError as error:
            report.wrong[path.name] = str(error)
            continue
        report.right[path.name] = _num_lines(task, records)
        if records is not None and _num_lines(task, records) != task.num_test_records:
            report.notes.append(
                f"{path.name}: the test file in {data_dir} has {_num_lines(task, records)} records, the official one "
                f"{task.num_test_records}; the leaderboard will want all of them"
            )
    report.notes.extend(_stale_archive(directory))
    return report


def _test_records(task, data_dir: Path | None) -> list[dict] | None:
    if data_dir is None or not task.has_local_data(data_dir):
        return None
    return task.load(data_dir, splits=("test",))["test"]


def _num_lines(task, records: list[dict] | None) -> int:
    return task.num_test_records if records is None else len(task.submission_entries(records, [0] * len(records)))


def _archived_files(directory: Path) -> list[Path]:
    names = [task.submission_file for task in TASKS.values() if task.in_russian_superglue]
    return [directory / name for name in names if (directory / name).is_file()]


def _stale_archive(directory: Path) -> list[str]:
    """Differences between submission.zip and the files it should hold."""
    path = directory / ARCHIVE
    if not path.is_file():
        return []
    try:
        with zipfile.ZipFile(path) as archive:
            packed = {name: archive.read(name) for name in archive.namelist()}
    except zipfile.BadZipFile:
        return [f"{ARCHIVE} is damaged; write it anew with --zip"]
    files = {f"{FOLDER_IN_ARCHIVE}/{file.name}": file.read_bytes() for file in _archived_files(directory)}
    if packed == files:
        return []
    return [f"{ARCHIVE} does not hold the files beside it; write it anew with --zip"]


def write_archive(directory: Path) -> list[str]:
    """Packs the Russian SuperGLUE files of a folder into submission.zip, in one step; returns the missing names.

    RuCoLA has a leaderboard of its own, which takes the CSV file as it is. The archive is not written when there is
    nothing to pack.
    """
    files = _archived_files(directory)
    missing = sorted(
        task.submission_file
        for task in TASKS.values()
        if task.in_russian_superglue and directory / task.submission_file not in files
    )
    if not files:
        return missing
    temporary = directory / f".{ARCHIVE}.tmp"
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in files:
                entry = zipfile.ZipInfo(f"{FOLDER_IN_ARCHIVE}/{file.name}", ARCHIVE_TIME)
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, file.read_bytes())
        temporary.replace(directory / ARCHIVE)
    finally:
        temporary.unlink(missing_ok=True)
    return missing


def print_report(report: SubmissionReport) -> None:
    for name, num_records in report.right.items():
        print(f"right    {name} ({num_records} records)")
    for name in report.missing:
        print(f"missing  {name}")
    for message in report.wrong.values():
        print(f"WRONG    {message}")
    for note in report.notes:
        print(f"note     {note}")


def main(arguments: list[str] | None = None) -> int:
    parser = ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("directory", type=Path, help="folder with TASK.jsonl and RuCoLA.csv, preds/MODEL")
    parser.add_argument("--data-dir", type=Path, help="compare ids with the test files there, not official numbers")
    parser.add_argument("--zip", action="store_true", help=f"write {ARCHIVE} if no file is wrong")
    options = parser.parse_args(arguments)
    try:
        report = check_directory(options.directory, options.data_dir)
        if options.zip and not report.wrong:
            write_archive(options.directory)
            report = check_directory(options.directory, options.data_dir)
    except (ValueError, OSError) as error:
        return fail(PROGRAM, error)
    print_report(report)
    if not report.right and not report.wrong:
        return fail(PROGRAM, ValueError(f"{options.directory}: no predictions (TASK.jsonl, RuCoLA.csv) in it"))
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
