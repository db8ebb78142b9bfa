import random
import string
from collections import Counter

import pytest

from tasks.finetuning import metrics

CLASSES = 3


def naive_f1(labels, predictions, positive):
    true = sum(a == b == positive for a, b in zip(labels, predictions, strict=True))
    predicted, real = predictions.count(positive), labels.count(positive)
    precision, recall = (true / predicted if predicted else 0.0), (true / real if real else 0.0)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def naive_mcc(labels, predictions):
    pairs = Counter(zip(labels, predictions, strict=True))
    tp, tn, fp, fn = pairs[1, 1], pairs[0, 0], pairs[0, 1], pairs[1, 0]
    denominator = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    return (tp * tn - fp * fn) / denominator if denominator else 0.0


def test_metrics_equal_values_worked_out_by_hand():
    # classes 0, 1, 2 have precision 1/2, 1/1, 0 and recall 1/1, 1/2, 0: F1 2/3, 2/3, 0
    assert metrics.macro_f1([0, 1, 1], [0, 1, 0], num_classes=3) == pytest.approx(4 / 9)
    assert metrics.accuracy([0, 1, 1], [0, 1, 0]) == pytest.approx(2 / 3)
    # tp 2, tn 1, fp 1, fn 1: (2 * 1 - 1 * 1) / sqrt(3 * 3 * 2 * 2)
    assert metrics.mcc([1, 1, 1, 0, 0], [1, 1, 0, 1, 0]) == pytest.approx(1 / 6)
    assert metrics.mcc([1, 0, 1], [1, 1, 1]) == 0
    assert metrics.binary_f1([1, 1, 1, 0, 0], [1, 1, 0, 1, 0]) == pytest.approx(2 / 3)


def test_muserc_scores_of_the_notes():
    """Three questions, one wrong answer in all: EM 2/3 by question, F1a 0.8 over all answers."""
    labels = [1, 0, 1, 0, 1]
    predictions = [1, 0, 1, 0, 0]
    questions = [(0, 0), (0, 0), (0, 1), (0, 1), (1, 2)]
    assert metrics.group_exact_match(labels, predictions, questions) == pytest.approx(2 / 3)
    assert metrics.binary_f1(labels, predictions) == pytest.approx(0.8)


def test_rucos_answers_are_compared_without_case_punctuation_and_extra_spaces():
    assert metrics.normalize_answer("  Анна-Мария,  «Лиса»! ") == "аннамария «лиса»"
    assert metrics.best_exact_match("боровск.", ["Клинка", "Боровск"]) == 1
    assert metrics.best_exact_match("Боровск", ["Боровска"]) == 0
    # one of two predicted tokens is among the three expected: 2 * 1 / (2 + 3)
    assert metrics.token_f1("Анна Клинка", "Анна Ивановна Лисицына") == pytest.approx(0.4)
    assert metrics.best_token_f1("Анна", ["Клинка", "Анна Лисицына"]) == pytest.approx(2 / 3)
    assert metrics.token_f1("Анна", "...") == 0


def test_token_f1_counts_a_repeated_token_as_often_as_it_occurs_in_both():
    assert metrics.token_f1("да да да", "да да нет") == pytest.approx(2 / 3)


@pytest.mark.parametrize("seed", range(20))
def test_metrics_equal_an_independent_implementation_on_random_predictions(seed):
    generator = random.Random(seed)
    size = generator.randrange(1, 60)
    labels = [generator.randrange(CLASSES) for _ in range(size)]
    predictions = [generator.randrange(CLASSES) for _ in range(size)]
    expected = sum(naive_f1(labels, predictions, c) for c in range(CLASSES)) / CLASSES
    assert metrics.macro_f1(labels, predictions, num_classes=CLASSES) == pytest.approx(expected)
    assert metrics.accuracy(labels, predictions) == pytest.approx(
        sum(a == b for a, b in zip(labels, predictions, strict=True)) / size
    )
    labels, predictions = [min(a, 1) for a in labels], [min(a, 1) for a in predictions]
    assert metrics.mcc(labels, predictions) == pytest.approx(naive_mcc(labels, predictions))
    assert metrics.binary_f1(labels, predictions) == pytest.approx(naive_f1(labels, predictions, 1))
    groups = [generator.randrange(10) for _ in range(size)]
    wrong = {g for a, b, g in zip(labels, predictions, groups, strict=True) if a != b}
    expected = 1 - len(wrong) / len(set(groups))
    assert metrics.group_exact_match(labels, predictions, groups) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(20))
def test_token_f1_equals_an_independent_implementation_on_random_answers(seed):
    generator = random.Random(seed)
    vocabulary = ["Клинка", "клинка", "мост.", "«Лиса»", "да-да", "!", "  "]
    first, second = (" ".join(generator.choices(vocabulary, k=generator.randrange(1, 6))) for _ in range(2))

    def tokens(text):
        return text.translate(str.maketrans("", "", string.punctuation)).lower().split()

    predicted, expected = tokens(first), tokens(second)
    common, rest = 0, list(expected)
    for token in predicted:
        if token in rest:
            rest.remove(token)
            common += 1
    value = 0.0
    if common:
        precision, recall = common / len(predicted), common / len(expected)
        value = 2 * precision * recall / (precision + recall)
    assert metrics.token_f1(first, second) == pytest.approx(value)
