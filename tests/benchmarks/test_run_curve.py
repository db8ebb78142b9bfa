"""The table of a run is that of its records, whatever was not seen or was scored twice."""

import json

from benchmarks.run_curve import main, table
from src.metrics.history import RunHistory


def epoch(number: int, time: float, samples: int = 100) -> dict:
    return {"event": "swarm_epoch", "time": time, "epoch": number, "loss": 5.0, "mlm_loss": 5.0, "samples": samples}


def held_out(number: int, time: float, loss: float) -> dict:
    return {"event": "held_out", "time": time, "epoch": number, "loss": loss, "accuracy": 0.25, "order_accuracy": None}


def pairs(number: int, time: float) -> dict:
    return {"event": "minimal_pairs", "time": time, "epoch": number, "accuracy": 0.6, "low": 0.5, "high": 0.7,
            "num_pairs": 90}  # fmt: skip


RECORDS = [
    epoch(1, 3600.0), epoch(2, 3960.0, samples=140), held_out(2, 4000.0, 6.0), pairs(2, 4001.0),
    held_out(2, 90000.0, 6.0),  # started again a day later
    epoch(4, 90360.0, samples=120), held_out(4, 90400.0, 5.5),
]  # fmt: skip


def test_table_counts_epochs_that_were_not_seen_and_not_the_time_in_which_a_run_stood_still():
    _, _, *rows = table(RunHistory(RECORDS)).splitlines()
    assert rows == [
        "| 2 | 240 | 0.10 | 6.000 | 0.250 | 0.600 (0.500 to 0.700) |",
        "| 4 | 480 | 0.27 | 5.500 | 0.250 |  |",
    ]


def test_program_draws_a_picture_and_says_what_is_missing(tmp_path, capsys):
    metrics, picture = tmp_path / "metrics.jsonl", tmp_path / "curve.png"
    metrics.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    assert main([str(metrics), "--picture", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and "| 5.500 |" in capsys.readouterr().out
    metrics.write_text(json.dumps(epoch(1, 3600.0)) + "\n")
    assert main([str(metrics)]) == 2
    assert "no checkpoint was scored (--store_checkpoints" in capsys.readouterr().err
