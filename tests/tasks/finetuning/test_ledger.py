import errno
import fcntl

import pytest

from tasks.finetuning.ledger import Ledger, best_row, settings_key


def row(**values):
    return {"task": "RCB", "model": "m", "source": "dir/m", "key": "k", "seed": 0, "dev": {"score": 0.5}} | values


def test_rows_come_back_in_order_and_by_seed(tmp_path):
    ledger = Ledger(tmp_path / "new" / "runs.jsonl")
    assert ledger.rows() == [] and ledger.finished("k") == {}
    rows = [row(seed=0), row(seed=2), row(key="other", seed=1)]
    for entry in rows:
        ledger.append(entry)
    assert Ledger(ledger.path).rows() == rows
    assert ledger.finished("k") == {0: rows[0], 2: rows[1]}


def test_row_cut_off_by_a_crash_does_not_count_and_is_replaced(tmp_path):
    ledger = Ledger(tmp_path / "runs.jsonl")
    ledger.append(row(seed=0))
    with ledger.path.open("a") as file:
        file.write('{"task": "RCB", "key": "k", "se')
    assert [entry["seed"] for entry in ledger.rows()] == [0]
    ledger.append(row(seed=1))
    assert [entry["seed"] for entry in ledger.rows()] == [0, 1]


@pytest.mark.parametrize("line", ["{", "[]", '{"seed": 1}', "7", "[" * 100_000, "1" * 5000])
def test_damaged_line_is_named(tmp_path, line):
    ledger = Ledger(tmp_path / "runs.jsonl")
    ledger.append(row())
    with ledger.path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"runs\.jsonl:2: not a row of the ledger"):
        ledger.rows()


def test_key_depends_on_every_setting():
    settings = {"task": "RCB", "batch_size": 32, "learning_rate": 1e-5}
    key = settings_key(**settings)
    assert key == settings_key(**dict(reversed(settings.items())))
    assert len({key, *(settings_key(**settings | {name: "other"}) for name in settings)}) == 4


def test_newest_are_all_seeds_of_the_last_settings_of_a_task(tmp_path):
    ledger = Ledger(tmp_path / "runs.jsonl")
    entries = [row(key="a"), row(key="b"), row(key="a", seed=1), row(key="c", task="TERRa"), row(key="d", model="n")]
    for entry in entries:
        ledger.append(entry)
    assert ledger.newest("RCB", "m") == [entries[0], entries[2]]
    assert ledger.newest("RCB") == [entries[4]]
    assert ledger.newest("RUSSE") == []


def test_best_row_is_the_first_of_equals():
    rows = [row(seed=seed, dev={"mcc": score}) for seed, score in [(0, 0.1), (1, 0.4), (2, 0.4)]]
    assert best_row(rows[::-1], "mcc")["seed"] == 1


def test_ledger_on_a_file_system_without_locks_is_written_with_a_notice(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    ledger = Ledger(tmp_path / "runs.jsonl")
    with caplog.at_level("INFO"):
        ledger.append(row(seed=0))
    assert len(ledger.rows()) == 1 and "runs.jsonl cannot be locked (No locks available)" in caplog.text
