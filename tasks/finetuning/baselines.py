"""The floor that a model must beat: bag-of-words logistic regression and the most frequent answer."""

import random
from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline, make_union

from tasks.finetuning.base import FinetuningTask

MAX_TRAINING_TEXTS = 20_000  # of all candidates of RuCoS there are over a million


def tfidf_classifier():
    """TF-IDF over words (1-2) and characters (2-5), logistic regression with C=1: the notes' second floor."""
    features = make_union(TfidfVectorizer(ngram_range=(1, 2)), TfidfVectorizer(analyzer="char", ngram_range=(2, 5)))
    return make_pipeline(features, LogisticRegression(C=1.0, max_iter=1000))


def tfidf_predictions(task: FinetuningTask, train: Sequence[Mapping], records: Sequence[Mapping]) -> list:
    """Predictions of a TF-IDF model trained on the labelled records.

    A record with one baseline text is classified; among several texts (choices, candidates) the most likely one wins.
    """
    examples = [
        example
        for record in train
        for example in zip(task.baseline_texts(record), task.baseline_targets(record), strict=True)
    ]
    if len(examples) > MAX_TRAINING_TEXTS:
        examples = random.Random(0).sample(examples, MAX_TRAINING_TEXTS)
    texts, targets = zip(*examples, strict=True)
    if len(set(targets)) == 1:  # logistic regression needs two classes
        return task.majority_predictions(train, records)
    classifier = tfidf_classifier().fit(texts, targets)
    return [
        task.choose(record, scores) for record, scores in zip(records, _scores(task, classifier, records), strict=True)
    ]


def _scores(task: FinetuningTask, classifier, records: Sequence[Mapping]) -> list[np.ndarray]:
    """For each record the probability of each class (0 for one not seen), or of each of its texts to be right."""
    texts = [task.baseline_texts(record) for record in records]
    flat = [text for group in texts for text in group]
    probabilities = classifier.predict_proba(flat) if flat else np.zeros((0, 2))
    is_choice = any(len(group) != 1 for group in texts)
    if is_choice:
        ends = np.cumsum([len(group) for group in texts])[:-1]
        return np.split(probabilities[:, list(classifier.classes_).index(1)], ends)
    spread = np.zeros((len(flat), len(task.labels)))
    spread[:, classifier.classes_] = probabilities
    return list(spread)
