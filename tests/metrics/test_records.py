"""The schema of metrics.jsonl: what is written can be read again, and whatever else stands in a file does no harm."""

import dataclasses
import json
import math

import pytest

from src.metrics import records
from src.metrics.journal import Journal, read_journal
from src.metrics.records import RECORDS, read_record

SAMPLES = {int: 7, float: 2.5, float | None: 2.5, str: "text", bool: True, dict: {"a": [1]}}
SAMPLES |= {tuple[str, ...]: ("a", "b"), tuple[float, ...]: (1.0, 2.0)}


def filled(kind):
    types = records._TYPES[kind]
    return kind(**{one.name: SAMPLES[types[one.name]] for one in dataclasses.fields(kind)})


@pytest.mark.parametrize("kind", RECORDS.values(), ids=RECORDS)
def test_every_record_can_be_written_and_read_again(tmp_path, kind):
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.record(filled(kind))
    (line,) = read_journal(tmp_path / "metrics.jsonl")
    time, found = read_record(line)
    assert found == filled(kind) and time == line["time"] and line["event"] == kind.event


@pytest.mark.parametrize("kind", RECORDS.values(), ids=RECORDS)
def test_a_record_that_lacks_every_field_can_still_be_read(kind):
    assert read_record({"event": kind.event, "time": 1.0}) == (1.0, kind())


@pytest.mark.parametrize("kind", RECORDS.values(), ids=RECORDS)
@pytest.mark.parametrize(
    "nonsense", [None, [], {}, "text", True, -1e300, math.nan, [["a"]], "\x1b[2J" + "x" * 10_000], ids=repr
)
def test_nonsense_becomes_something_of_the_fields_type(kind, nonsense):
    line = {"event": kind.event, "time": 1.0, **{one.name: nonsense for one in dataclasses.fields(kind)}}
    _, found = read_record(line)
    for name, of_type in records._TYPES[kind].items():
        if name in ("event", "computed"):
            continue
        value = getattr(found, name)
        assert isinstance(value, (int, float) if of_type is float else dataclasses_type(of_type)), (name, value)
        assert not isinstance(value, str) or (value.isprintable() and len(value) <= records.MAX_TEXT_LENGTH)
        assert not isinstance(value, float) or math.isfinite(value)
    json.dumps(found.values(), allow_nan=False)


def dataclasses_type(of_type):
    if of_type == float | None:
        return (float, type(None))
    return tuple if of_type in (tuple[str, ...], tuple[float, ...]) else of_type


@pytest.mark.parametrize("line", [None, [], {}, {"event": 3}, {"event": "epoch"}, {"event": "unknown", "time": 1.0},
                                  {"event": "epoch", "time": math.nan}, {"event": "epoch", "time": 1e20}])  # fmt: skip
def test_what_is_no_record_is_none(line):
    assert read_record(line) is None
