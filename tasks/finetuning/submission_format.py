"""Writes and checks the files that the leaderboards take."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tasks.finetuning import sources


def check_fields(entry: Mapping, names: set[str], where: str) -> None:
    """The object has no other fields than these, and its "idx" is an integer."""
    sources.field(entry, "idx", int, where)
    for name in sorted(entry.keys() - names):
        raise ValueError(f"{where}: field {name!r} does not belong here, expected {', '.join(sorted(names))}")


def check_label_entries(entries: Sequence[tuple[str, Mapping]], labels: tuple) -> list[tuple[str, int]]:
    """Checks lines {"idx": ..., "label": ...}; returns (place, idx) of each."""
    for where, entry in entries:
        check_fields(entry, {"idx", "label"}, where)
        sources.label_index(entry, labels, where, required=True)
    return [(where, entry["idx"]) for where, entry in entries]


def check_ids(path: Path, found: Sequence[tuple[str, object]], *, expected: Iterable, what: str = "idx") -> None:
    """Every expected id occurs exactly once and no other does, in any order."""
    seen = sources.UniqueIds(what)
    expected = list(expected)
    known = set(expected)
    for where, identifier in found:
        seen.add(identifier, where)
        if identifier not in known:
            raise ValueError(f"{where}: {what} {json.dumps(identifier)} is not among the {len(known)} test records")
    missing = [identifier for identifier in expected if identifier not in seen.places]
    if missing:
        shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise ValueError(
            f"{path}:{len(found)}: {len(found)} of {len(expected)} records, "
            f"the file ends without {what} {shown} ({len(missing)} missing)"
        )
