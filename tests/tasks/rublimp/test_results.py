"""Accuracies, their intervals, and what the tables hold."""

import pytest

from tasks.rublimp import results
from tasks.rublimp.pairs import Pair
from tasks.rublimp.pseudo_likelihood import Likelihood
from tasks.rublimp.results import ScoredPair, wilson_interval


def scored(first: tuple, second: tuple, *, paradigm="a", level="Syntax", phenomenon="P") -> ScoredPair:
    """likelihoods: (sum, tokens)"""
    return ScoredPair(Pair(paradigm, "1", level, phenomenon, "x", "y"), (Likelihood(*first), Likelihood(*second)))


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (120, 200, 0.5309, 0.6654)],
)
def test_interval_is_that_of_wilson(right, total, low, high):
    assert wilson_interval(right, total) == pytest.approx((low, high), abs=1e-4)


def test_interval_holds_the_share_that_was_found_to_the_last_bit():
    """A picture's error bar of -1e-16 is refused."""
    for total in range(1, 400):
        for right in {0, 1, total // 2, total}:
            low, high = wilson_interval(right, total)
            assert 0.0 <= low <= right / total <= high <= 1.0, (right, total)


def test_forms_differ_where_numbers_of_tokens_do_and_a_tie_is_not_right():
    longer = scored((-12.0, 4), (-10.0, 3))  # means -3 and -3.33
    assert longer.is_right("mean") and not longer.is_right("sum") and not longer.is_right("word")
    tie = scored((-6.0, 3), (-6.0, 3))
    assert not tie.is_right("mean") and not tie.is_right("sum")
    empty = scored((0.0, 0), (-1.0, 1))
    assert empty.is_right("mean")
    shorter = scored((-9.0, 2), (-10.0, 3))
    found = results.summary([longer, tie, shorter, empty], "mean")
    assert found["all"]["pairs"] == 4 and found["all"]["accuracy"] == 0.5 and found["ties"] == 1
    assert found["all"]["equal_tokens"] == {
        "pairs": 1,
        "accuracy": 0.0,
        "low": 0.0,
        "high": pytest.approx(0.7935, abs=1e-4),
    }
    assert found["fewer_tokens_win"] == (0 + 0.5 + 1 + 1) / 4
    assert found["other_forms"] == {"mean": 0.5, "sum": 0.5}
    assert results.accuracy([], "mean").as_record() == {"pairs": 0, "accuracy": None, "low": None, "high": None}


def test_groups_pool_the_pairs_of_their_paradigms():
    right, wrong = ((-1.0, 2), (-2.0, 2)), ((-2.0, 2), (-1.0, 3))
    pairs = [
        *(scored(*right, paradigm="b", level="Semantics", phenomenon="T") for _ in range(3)),
        scored(*wrong, paradigm="a", level="Semantics", phenomenon="T"),
        scored(*right, paradigm="c", level="Morphology", phenomenon="W"),
        scored(*right, paradigm="d", level="Own", phenomenon="Z"),
    ]
    found = results.summary(pairs, "mean")
    assert list(found["levels"]) == ["Morphology", "Semantics", "Own"], "the benchmark's order first"
    assert found["phenomena"]["T"]["accuracy"] == 0.75 and found["paradigms"]["b"]["accuracy"] == 1.0
    lines = results.paradigms_csv(pairs, "mean").splitlines()
    assert lines[0] == "paradigm,phenomenon,level,pairs,accuracy,low,high"
    assert [line.split(",")[0] for line in lines[1:]] == ["c", "a", "b", "d"]
    assert lines[3] == "b,T,Semantics,3,1.000000,0.438503,1.000000"
    table = results.table(pairs, "mean").splitlines()
    assert [line.split()[0] for line in table[1:]] == [
        "all",
        "Morphology",
        "W",
        "c",
        "Semantics",
        "T",
        "a",
        "b",
        "Own",
        "Z",
        "d",
    ]
    assert table[7].split() == ["a", "1", "0.000", "0.000-0.793", "0", "-"]
