"""One model on one sample of pairs: score what is missing, keep every pair that is done, report."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from src.console import format_seconds
from src.files import append_lines, write_atomically
from src.version import VERSION
from tasks.finetuning.console import InputError
from tasks.finetuning.ledger import Ledger, settings_key
from tasks.rublimp import results
from tasks.rublimp.pairs import PARADIGMS, TASK, Pair, fingerprint, missing_paradigms
from tasks.rublimp.pseudo_likelihood import Likelihood
from tasks.rublimp.results import ScoredPair, score_pairs

PAIRS_FILE, CSV_FILE, PICTURE, RUN_FILE = "pairs.jsonl", "paradigms.csv", "rublimp.png", "run.json"
PAIRS_AT_ONCE = 16  # between two writes
SECONDS_BETWEEN_LINES = 60.0  # where there is no terminal for a bar
TWINS = {"mean": "sum", "sum": "mean"}  # forms of the same scores


@dataclass
class Experiment:
    """A model, under a name for folders, and the pairs; ``max_tokens``: the longest sentence that it reads."""

    model: str
    source: str
    model_fingerprint: str
    pairs: Sequence[Pair]
    form: str
    ledger: Ledger
    score: Callable[[Sequence[str]], list[Likelihood]]
    pairs_each: int
    left_out: Sequence[Pair] = ()

    def __post_init__(self):
        self.data_fingerprint = fingerprint([*self.pairs, *self.left_out])
        self.key = self.key_of(self.form)

    def key_of(self, form: str) -> str:
        return settings_key(task=TASK, model=self.model_fingerprint, data=self.data_fingerprint, form=form)

    def directory_of(self, key: str) -> Path:
        return self.ledger.path.parent / self.model / TASK / key

    @property
    def directory(self) -> Path:
        return self.directory_of(self.key)

    def run(self) -> dict:
        """Score, write the files of the run and its row of the ledger, once; returns that row."""
        started = time.time()
        scored = self._score_all()
        row = self._row(scored, seconds=round(time.time() - started, 1))
        write_atomically(self.directory / CSV_FILE, results.paradigms_csv(scored, self.form))
        results.plot_paradigms(
            scored, self.form, self.directory / PICTURE, model=self.model, missing=missing_paradigms(self.pairs)
        )
        text = json.dumps({**row, **results.summary(scored, self.form)}, ensure_ascii=False, indent=1)
        write_atomically(self.directory / RUN_FILE, text)
        if not self.ledger.finished(self.key):
            self.ledger.append(row)
        print(f"\n{results.table(scored, self.form)}\n\n{self._remarks(scored)}")
        return row

    def _row(self, scored: Sequence[ScoredPair], *, seconds: float) -> dict:
        levels = results.grouped(scored, "level").items()
        scores = {level.lower(): results.accuracy(group, self.form).accuracy for (level,), group in levels}
        equal = results.accuracy(results.equal_tokens(scored), self.form)
        scores |= {"equal_tokens": equal.accuracy} if equal.pairs else {}
        return {
            "task": TASK,
            "model": self.model,
            "source": self.source,
            "key": self.key,
            "seed": 0,  # nothing is random here; the rows of other tasks have one
            "arguments": {"form": self.form, "pairs": self.pairs_each},
            "dev": {"accuracy": results.accuracy(scored, self.form).accuracy, **scores},
            "num_pairs": len(scored),
            "missing": missing_paradigms(self.pairs),
            "left_out": len(self.left_out),
            "interval": results.INTERVAL,
            "data_fingerprint": self.data_fingerprint,
            "model_fingerprint": self.model_fingerprint,
            "directory": str(self.directory.relative_to(self.ledger.path.parent)),
            "version": VERSION,
            "seconds": seconds,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }

    def _remarks(self, scored: Sequence[ScoredPair]) -> str:
        """What the table does not say."""
        found, missing = results.summary(scored, self.form), missing_paradigms(self.pairs)
        of_all = results.accuracy(scored, self.form)
        lines = [
            f"{self.model}, {self.form} form: {of_all.accuracy:.4f} of {of_all.pairs} pairs ({results.INTERVAL}: "
            f"{of_all.low:.4f}-{of_all.high:.4f}); chance {results.CHANCE}, fewer tokens win "
            f"{found['fewer_tokens_win']:.4f}"
        ]
        twin = TWINS.get(self.form, "mean")
        also = f"{twin} form" if self.form in TWINS else "the mean over the same tokens"
        lines.append(f"{also}: {found['other_forms'][twin]:.4f}; ties, which count as wrong: {found['ties']}")
        if missing:
            lines.append(f"{len(missing)} of {len(PARADIGMS)} paradigms are not in the data: {', '.join(missing)}")
        if self.left_out:
            lines.append(f"{len(self.left_out)} pairs are longer than the model reads, and left out")
        lines.append(f"kept in {self.directory}")
        return "\n".join(lines)

    def _score_all(self) -> list[ScoredPair]:
        path = self.directory / PAIRS_FILE
        self._take_from_twin(path)
        finished = read_finished(path)
        missing = [pair for pair in self.pairs if pair.identity not in finished]
        print(
            f"{TASK}: {self.model}, {self.form} form, {len(self.pairs)} pairs of "
            f"{len({pair.paradigm for pair in self.pairs})} paradigms"
            + (f", {len(self.pairs) - len(missing)} of them scored before" if len(missing) < len(self.pairs) else "")
        )
        # long sentences first: whether they fit into memory shows at once, and neighbours are of similar length
        missing.sort(key=lambda pair: -sum(map(len, pair.texts)))
        pace = Pace(missing)
        for start in range(0, len(missing), PAIRS_AT_ONCE):
            chunk = missing[start : start + PAIRS_AT_ONCE]
            scored = score_pairs(self.score, chunk)
            append_lines(path, *map(as_record, scored))
            finished |= {one.pair.identity: one.likelihoods for one in scored}
            pace.add(chunk)
        pace.close()
        return [ScoredPair(pair, finished[pair.identity]) for pair in self.pairs]

    def _take_from_twin(self, path: Path) -> None:
        """The mean form is made of the same scores as the sum form."""
        if self.form in TWINS and not path.exists():
            other = self.directory_of(self.key_of(TWINS[self.form])) / PAIRS_FILE
            if other.is_file():
                write_atomically(path, other.read_bytes())


def as_record(scored: ScoredPair) -> dict:
    """A line of pairs.jsonl; in the lists the grammatical sentence comes first."""
    return {
        "paradigm": scored.pair.paradigm,
        "id": scored.pair.id,
        "pair": scored.pair.digest,
        "log_likelihood": [one.total for one in scored.likelihoods],
        "tokens": [one.num_tokens for one in scored.likelihoods],
    }


def read_finished(path: Path) -> dict[tuple[str, str], tuple[Likelihood, Likelihood]]:
    """By the pairs' identities. A last line without a line break was cut off by a crash and does not count."""
    if not path.is_file():
        return {}
    finished = {}
    whole_lines = path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(whole_lines, 1):
        try:
            record = json.loads(line)
            totals, numbers = map(float, record["log_likelihood"]), map(int, record["tokens"])
            first, second = (Likelihood(*one) for one in zip(totals, numbers, strict=True))
            finished[str(record["paradigm"]), str(record["pair"])] = first, second
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InputError(
                f"{path}:{number}: not the scores of a pair; remove the line, and the pair is scored again"
            ) from error
    return finished


class Pace:
    """A progress bar; where there is no terminal, a line a minute with the time that is left."""

    def __init__(self, pairs: Sequence[Pair]):
        self.total, self.started, self.said = len(pairs), time.monotonic(), time.monotonic()
        self.work, self.done, self.number = sum(map(work_of, pairs)), 0, 0
        self.bar = tqdm(total=self.total, desc=TASK, unit="pair", leave=False, disable=None)

    def add(self, pairs: Sequence[Pair]) -> None:
        self.bar.update(len(pairs))
        self.number += len(pairs)
        self.done += sum(map(work_of, pairs))
        now = time.monotonic()
        if not sys.stderr.isatty() and now - self.said >= SECONDS_BETWEEN_LINES and self.number < self.total:
            left = (now - self.started) * (self.work / self.done - 1)
            print(f"{TASK}: {self.number} of {self.total} pairs, {format_seconds(left)} left", flush=True)
            self.said = now

    def close(self) -> None:
        self.bar.close()


def work_of(pair: Pair) -> int:
    """In proportion to the time that a pair takes: a sentence is computed once for each of its tokens."""
    return sum(len(text) ** 2 for text in pair.texts)
