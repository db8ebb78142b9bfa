"""Does a benchmark's sentence stand in the training text? `python -m tasks.overlap`.

    python -m tasks.overlap --sources 'texts/*.txt' -d DATA --tasks RuBLiMP RuCoLA

Looks for each sentence of the validation and test splits (of RuBLiMP's pairs: both sentences) word by word in the
documents of the text; case, punctuation and ё are made equal first. Sentences of fewer than five words prove nothing
and are counted apart. Exits with code 1 if any was found.
"""

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from command_line import ArgumentParser
from tasks.finetuning import sources as task_files
from tasks.finetuning.console import fail
from tasks.mlm.sentences import split_sentences
from tasks.mlm.sources import iterate_documents
from tasks.registry import TASKS, get_task
from tasks.rublimp.pairs import TASK as RUBLIMP
from tasks.rublimp.pairs import read_pairs

PROGRAM = "python -m tasks.overlap"
NAMES = [RUBLIMP, *(task.name for task in TASKS.values())]
ALL_PAIRS = 10**6  # more than a paradigm has
FEWEST_WORDS = 5
WORD = re.compile(r"\w+")
Words = tuple[str, ...]


def words_of(text: str) -> Words:
    """The words of a text without what editions differ in: case, ё, punctuation."""
    return tuple(WORD.findall(text.lower().replace("ё", "е")))


def texts_in(value) -> Iterator[str]:
    """Every text that a record holds, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from texts_in(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from texts_in(item)


def sentences_of(task: str, data_dir: Path) -> Iterator[str]:
    """What a model is scored on."""
    if task == RUBLIMP:
        for pair in read_pairs(data_dir, pairs_each=ALL_PAIRS):
            yield from pair.texts
        return
    splits = get_task(task).load(data_dir, splits=("validation", "test"))
    for text in texts_in(list(splits.values())):
        yield from split_sentences(text)


@dataclass
class Overlap:
    """What was looked for of one benchmark, and what was found."""

    sentences: dict[Words, str] = field(default_factory=dict)
    num_short: int = 0
    found: set[Words] = field(default_factory=set)

    @classmethod
    def of(cls, sentences: Iterable[str]) -> "Overlap":
        overlap, short = cls(), set()
        for sentence in sentences:
            words = words_of(sentence)
            if len(words) >= FEWEST_WORDS:
                overlap.sentences.setdefault(words, sentence)
            else:
                short.add(words)
        overlap.num_short = len(short)
        return overlap

    def line(self, task: str) -> str:
        total = len(self.sentences)
        short = f", {self.num_short} with fewer than {FEWEST_WORDS} words not looked for" if self.num_short else ""
        return f"{task:8} {len(self.found)} of {total} sentences ({len(self.found) / max(1, total):.2%}){short}"


def search(documents: Iterable[str], overlaps: Iterable[Overlap]) -> None:
    """Note in each overlap which of its sentences stand in the documents. One pass, memory for the sentences alone."""
    by_beginning: dict[Words, list[tuple[Words, Overlap]]] = defaultdict(list)
    for overlap in overlaps:
        for words in overlap.sentences:
            by_beginning[words[:FEWEST_WORDS]].append((words, overlap))
    for document in documents:
        words = words_of(document)
        for start in range(len(words) - FEWEST_WORDS + 1):
            for sentence, overlap in by_beginning.get(words[start : start + FEWEST_WORDS], ()):
                if words[start : start + len(sentence)] == sentence:
                    overlap.found.add(sentence)


def parse_arguments(argv: list[str] | None = None):
    parser = ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("--sources", nargs="+", required=True, help="training text, as --dataset_sources")
    parser.add_argument("-d", "--data-dir", type=Path, default=Path(), help="holds the benchmarks (default: .)")
    parser.add_argument("--tasks", nargs="+", choices=NAMES, metavar="TASK",
                        help=f"of {', '.join(NAMES)} (default: those whose folder is in DATA)")  # fmt: skip
    parser.add_argument("--show", type=int, default=3, help="sentences to print of each benchmark (default: 3)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    try:
        tasks = options.tasks or [
            name for name in NAMES if task_files.find_task_directory(options.data_dir, name) is not None
        ]
        if not tasks:
            raise ValueError(f"{options.data_dir} holds no benchmark (a folder named as one of {', '.join(NAMES)})")
        overlaps = {task: Overlap.of(sentences_of(task, options.data_dir)) for task in tasks}
        documents = iterate_documents(options.sources)
        search(tqdm(documents, unit="document", leave=False, disable=None, delay=2), overlaps.values())
    except (ValueError, OSError) as error:
        return fail(PROGRAM, error)
    for task, overlap in overlaps.items():
        print(overlap.line(task))
        for words in sorted(overlap.found)[: options.show]:
            print(f"         {overlap.sentences[words]}")
    return int(any(overlap.found for overlap in overlaps.values()))


if __name__ == "__main__":
    sys.exit(main())
