"""The official scores of Russian SuperGLUE and RuCoLA, computed with scikit-learn. All are fractions, not per cent."""

import re
import string
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


def accuracy(labels: Sequence[int], predictions: Sequence[int]) -> float:
    return float(accuracy_score(labels, predictions))


def macro_f1(labels: Sequence[int], predictions: Sequence[int], *, num_classes: int) -> float:
    """Unweighted mean of the F1 of all classes; a class neither present nor predicted counts as 0."""
    classes = list(range(num_classes))
    return float(f1_score(labels, predictions, labels=classes, average="macro", zero_division=0))


def mcc(labels: Sequence[int], predictions: Sequence[int]) -> float:
    """Matthews correlation coefficient; 0 for constant predictions or labels."""
    if len(set(labels)) == 1 or len(set(predictions)) == 1:  # scikit-learn gives 0 too, with a warning
        return 0.0
    return float(matthews_corrcoef(labels, predictions))


def binary_f1(labels: Sequence[int], predictions: Sequence[int]) -> float:
    """F1 of class 1 over all items at once (MuSeRC's F1a)."""
    return float(f1_score(labels, predictions, zero_division=0))


def group_exact_match(labels: Sequence[int], predictions: Sequence[int], groups: Sequence[Hashable]) -> float:
    """Share of groups all of whose items are predicted right (MuSeRC's EM: a group is a question)."""
    all_right = defaultdict(lambda: True)
    for label, prediction, group in zip(labels, predictions, groups, strict=True):
        all_right[group] &= bool(label == prediction)
    return float(np.mean(list(all_right.values())))


def normalize_answer(text: str) -> str:
    """Lower case, no ASCII punctuation, single spaces: the form in which RuCoS compares answers."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\s+", " ", text).strip()


def token_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of token precision and recall of two normalised answers."""
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(answer).split()
    num_common = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * num_common / (len(predicted) + len(expected)) if num_common else 0.0


def best_token_f1(prediction: str, answers: Sequence[str]) -> float:
    return max((token_f1(prediction, answer) for answer in answers), default=0.0)


def best_exact_match(prediction: str, answers: Sequence[str]) -> float:
    return float(any(normalize_answer(prediction) == normalize_answer(answer) for answer in answers))
