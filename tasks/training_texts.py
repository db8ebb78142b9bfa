"""Texts of the benchmarks' training splits, as text to pretrain on: `python -m tasks.training_texts`.

    python -m tasks.training_texts -d DATA --output superglue.jsonl

Passages, premises and sentences of the training records, each once, without labels, questions and answers; nothing of
the validation and test splits. `python -m tasks.overlap` tells whether a sentence of those stands in it all the same.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from command_line import ArgumentParser
from src.files import write_atomically
from tasks.finetuning.console import fail
from tasks.registry import get_task

PROGRAM = "python -m tasks.training_texts"
# The field of a record that holds running text; PARus and RWSD have single short sentences, LiDiRus is a test alone.
FIELDS = {"MuSeRC": "passage", "RuCoS": "text", "DaNetQA": "passage", "TERRa": "premise", "RCB": "premise",
          "RUSSE": "sentences"}  # fmt: skip
SENTENCE_NUMBER = re.compile(r"\(\d+\)\s*")  # MuSeRC numbers its sentences
STRESS = "\u0301"  # encyclopaedias mark it on their headwords


def texts_of(records: Iterable[Mapping], task: str) -> Iterator[str]:
    """The running text of a task's records; RUSSE's have two."""
    for record in records:
        value = record[FIELDS[task]]
        for text in value if isinstance(value, list) else [value]:
            text = SENTENCE_NUMBER.sub("", text) if task == "MuSeRC" else text
            yield text.replace(STRESS, "").strip()


def collect(data_dir: Path, tasks: Iterable[str]) -> dict[str, list[str]]:
    """{task: its texts}, none of them twice. Raises ValueError for a task without files, or with wrong ones."""
    seen: set[str] = set()
    found: dict[str, list[str]] = {}
    for name in tasks:
        records = get_task(name).load(data_dir, splits=("train",))["train"]
        new = dict.fromkeys(text for text in texts_of(records, name) if text and text not in seen)
        seen.update(new)
        found[name] = list(new)
    return found


def parse_arguments(argv: list[str] | None = None):
    parser = ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("-d", "--data-dir", type=Path, default=Path(), help="holds TASK/train.jsonl (default: .)")
    parser.add_argument("--tasks", nargs="+", choices=list(FIELDS), default=list(FIELDS), metavar="TASK",
                        help=f"of {', '.join(FIELDS)} (default: all of them)")  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, help=".jsonl file to write, for --dataset_sources")
    options = parser.parse_args(argv)
    if options.output.suffix != ".jsonl":
        parser.error(f"--output {options.output}: name a file that ends in .jsonl, by which it is read again")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    try:
        found = collect(options.data_dir, options.tasks)
        texts = [text for some in found.values() for text in some]
        write_atomically(options.output, "".join(f"{json.dumps({'text': text}, ensure_ascii=False)}\n"
                                                 for text in texts))  # fmt: skip
    except (ValueError, OSError) as error:
        return fail(PROGRAM, error)
    for name, some in found.items():
        print(f"{name:8} {len(some):6} texts  {sum(len(text.encode()) for text in some) / 1e6:.2f} MB")
    print(f"{options.output}: text for --dataset_sources, beside others, weighed with --dataset_weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
