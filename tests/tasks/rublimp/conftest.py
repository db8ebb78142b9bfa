"""Invented paradigms in the benchmark's form."""

import csv
from pathlib import Path

import pytest

COLUMNS = ["id", "source_sentence", "target_sentence", "source_word", "target_word", "level", "phenomenon", "PID",
           "subtype", "domain", "tree_depth"]  # fmt: skip
PARADIGMS = {
    "add_verb_prefix": ("Morphology", "Word Formation", [("Кот зашёл в дом.", "Кот взашёл в дом."),
                        ("Пёс убежал к реке.", "Пёс вубежал к реке."), ("Снег выпал утром.", "Снег повыпал утром.")]),
    "np_agreement_number": ("Syntax", "Noun Phrase Agreement", [("Белый кот спит.", "Белые кот спит."),
                            ("Мэр открыл новый мост через реку.", "Мэр открыл новые мост через реку.")]),
    "single_verb_tense": ("Semantics", "Tense", [("Завтра кот придёт.", "Завтра кот пришёл."),
                          ("Вчера был дождь.", "Вчера будет дождь.")]),
}  # fmt: skip


def write_paradigm(path: Path, level: str, phenomenon: str, pairs: list[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for number, (source, target) in enumerate(pairs):
            writer.writerow(
                [900 + number, source, target, "x", "y", level, phenomenon, path.stem, path.stem, "wiki", 2]
            )


@pytest.fixture
def pairs_dir(tmp_path) -> Path:
    """A data directory with three paradigms, seven pairs in all."""
    for name, paradigm in PARADIGMS.items():
        write_paradigm(tmp_path / "data" / "RuBLiMP" / f"{name}.csv", *paradigm)
    return tmp_path / "data"
