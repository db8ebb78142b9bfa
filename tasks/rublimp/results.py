"""Accuracies over minimal pairs, with 95 % intervals of Wilson (1927): as a table, a CSV file and a picture."""

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.rublimp.pairs import LEVELS, PARADIGMS, Pair
from tasks.rublimp.pseudo_likelihood import Likelihood

FORMS = ("mean", "sum", "word")
INTERVAL = "95 % interval of Wilson"
NORMAL_QUANTILE = 1.959964
CHANCE = 0.5
CSV_COLUMNS = ("paradigm", "phenomenon", "level", "pairs", "accuracy", "low", "high")
COLOURS = dict(zip(LEVELS, ("tab:blue", "tab:green", "tab:orange"), strict=True))


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """The shares of a population of which a sample of ``total`` with so many right ones is not unlikely."""
    share, weight = right / total, NORMAL_QUANTILE**2 / total
    middle = (share + weight / 2) / (1 + weight)
    half = math.sqrt(weight * share * (1 - share) + weight**2 / 4) / (1 + weight)
    # the share lies in it; at 0 and 1 it is one end, from which rounding may part it
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


@dataclass(frozen=True)
class Accuracy:
    """``low`` and ``high``: of the interval; all three are None of no pairs."""

    right: int
    pairs: int

    @property
    def accuracy(self) -> float | None:
        return self.right / self.pairs if self.pairs else None

    @property
    def low(self) -> float | None:
        return wilson_interval(self.right, self.pairs)[0] if self.pairs else None

    @property
    def high(self) -> float | None:
        return wilson_interval(self.right, self.pairs)[1] if self.pairs else None

    def as_record(self) -> dict:
        return {name: getattr(self, name) for name in ("pairs", "accuracy", "low", "high")}


@dataclass(frozen=True)
class ScoredPair:
    """A pair and the likelihoods of its sentences, the grammatical one first."""

    pair: Pair
    likelihoods: tuple[Likelihood, Likelihood]

    def values(self, form: str) -> tuple[float, float]:
        """What is compared: the mean over the tokens, which orders as pseudo-perplexity does, or the sum."""
        first, second = self.likelihoods
        if form == "mean":
            return first.total / max(1, first.num_tokens), second.total / max(1, second.num_tokens)
        return first.total, second.total

    def is_right(self, form: str) -> bool:
        """A tie is not right."""
        first, second = self.values(form)
        return first > second

    @property
    def token_difference(self) -> int:
        return self.likelihoods[1].num_tokens - self.likelihoods[0].num_tokens


def score_pairs(score: Callable[[Sequence[str]], list[Likelihood]], pairs: Sequence[Pair]) -> list[ScoredPair]:
    """``score`` is a `PseudoLikelihood` or an `NGramModel`."""
    likelihoods = score([text for pair in pairs for text in pair.texts])
    return [ScoredPair(pair, (likelihoods[2 * n], likelihoods[2 * n + 1])) for n, pair in enumerate(pairs)]


def accuracy(scored: Iterable[ScoredPair], form: str) -> Accuracy:
    answers = [one.is_right(form) for one in scored]
    return Accuracy(sum(answers), len(answers))


def equal_tokens(scored: Iterable[ScoredPair]) -> list[ScoredPair]:
    """The pairs that no form can decide by the number of tokens."""
    return [one for one in scored if one.token_difference == 0]


def grouped(scored: Iterable[ScoredPair], *names: str) -> dict[tuple, list[ScoredPair]]:
    """By these fields of `Pair`; levels in the benchmark's order, all else by the alphabet."""
    groups: dict[tuple, list[ScoredPair]] = {}
    for one in scored:
        groups.setdefault(tuple(getattr(one.pair, name) for name in names), []).append(one)
    places = {level: place for place, level in enumerate(LEVELS)}
    return dict(sorted(groups.items(), key=lambda item: [(places.get(name, len(places)), name) for name in item[0]]))


def summary(scored: Sequence[ScoredPair], form: str) -> dict:
    """All that is known of a run's accuracies: over all pairs, by level, phenomenon and paradigm."""

    def describe(group: Sequence[ScoredPair]) -> dict:
        equal = accuracy(equal_tokens(group), form).as_record()
        return accuracy(group, form).as_record() | {"equal_tokens": equal}

    parts = {
        plural: {name[0]: describe(group) for name, group in grouped(scored, field).items()}
        for plural, field in (("levels", "level"), ("phenomena", "phenomenon"), ("paradigms", "paradigm"))
    }
    return {
        "all": describe(scored),
        **parts,
        "other_forms": {other: accuracy(scored, other).accuracy for other in ("mean", "sum")},
        "fewer_tokens_win": fewer_tokens_win(scored),
        "ties": sum(one.values(form)[0] == one.values(form)[1] for one in scored),
    }


def fewer_tokens_win(scored: Sequence[ScoredPair]) -> float:
    """The accuracy of taking the sentence with fewer tokens; a pair of equal numbers counts half."""
    points = [CHANCE if one.token_difference == 0 else float(one.token_difference > 0) for one in scored]
    return sum(points) / len(points)


def table(scored: Sequence[ScoredPair], form: str) -> str:
    """Levels, their phenomena and these one's paradigms, each with its interval and the pairs of equal numbers."""
    lines = [("all", scored)]
    for (level,), of_level in grouped(scored, "level").items():
        lines.append((level, of_level))
        for (phenomenon,), of_phenomenon in grouped(of_level, "phenomenon").items():
            lines.append((f"  {phenomenon}", of_phenomenon))
            lines += [(f"    {name}", group) for (name,), group in grouped(of_phenomenon, "paradigm").items()]
    width = max(len(name) for name, _ in lines) + 2
    head = f"  {'':<{width}}{'pairs':>6}{'accuracy':>10}{'95 %':>14}{'equal':>8}{'accuracy':>10}"
    return "\n".join([head, *(_line(name, group, form, width) for name, group in lines)])


def _line(name: str, group: Sequence[ScoredPair], form: str, width: int) -> str:
    found, equal = accuracy(group, form), accuracy(equal_tokens(group), form)
    of_equal = f"{equal.accuracy:.3f}" if equal.pairs else "-"
    interval = f"{found.low:.3f}-{found.high:.3f}"
    return f"  {name:<{width}}{found.pairs:>6}{found.accuracy:>10.3f}{interval:>14}{equal.pairs:>8}{of_equal:>10}"


def paradigms_csv(scored: Sequence[ScoredPair], form: str) -> str:
    """A row a paradigm; shares, not per cent."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for (level, phenomenon, paradigm), group in grouped(scored, "level", "phenomenon", "paradigm").items():
        found = accuracy(group, form)
        shares = [f"{share:.6f}" for share in (found.accuracy, found.low, found.high)]
        writer.writerow([paradigm, phenomenon, level, found.pairs, *shares])
    return buffer.getvalue()


def plot_paradigms(scored: Sequence[ScoredPair], form: str, path: Path, *, model: str, missing: Sequence[str]) -> Path:
    """A bar a paradigm with its interval, coloured by level; phenomena stand together."""
    from matplotlib.figure import Figure  # pyplot would look for a display

    groups = list(grouped(scored, "level", "phenomenon", "paradigm").items())
    figure = Figure(figsize=(9, 1.6 + 0.22 * len(groups)), layout="constrained")
    axes = figure.add_subplot()
    labelled = set()
    for place, ((level, phenomenon, _), group) in enumerate(groups):
        found = accuracy(group, form)
        errors = [[found.accuracy - found.low], [found.high - found.accuracy]]
        label = None if level in labelled else level
        labelled.add(level)
        axes.barh(place, found.accuracy, xerr=errors, color=COLOURS.get(level, "grey"), ecolor="black", alpha=0.75,
                  error_kw={"elinewidth": 0.8}, label=label)  # fmt: skip
        is_first = place == 0 or groups[place - 1][0][1] != phenomenon
        if is_first:
            axes.text(1.01, place, phenomenon, va="center", fontsize=7)
    axes.set_yticks(range(len(groups)), [paradigm for (*_, paradigm), _ in groups], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(CHANCE, color="grey", linestyle="--", linewidth=1, label="chance")
    overall = accuracy(scored, form)
    lacking = f"\n{len(missing)} of the {len(PARADIGMS)} paradigms are not there" if missing else ""
    axes.set(
        title=f"RuBLiMP, {model}, {form} form: {overall.accuracy:.3f} of {overall.pairs} pairs{lacking}",
        xlabel=f"share of pairs in which the grammatical sentence is the likelier one; {INTERVAL}",
        xlim=(0, 1),
    )
    axes.margins(y=0.01)
    figure.legend(fontsize="small", loc="outside lower center", ncols=1 + len(labelled))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
