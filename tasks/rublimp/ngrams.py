"""What a model must beat: unigram and 3-gram models of the training text, over the tokens of a tokenizer.

Interpolated after Witten and Bell (1991), which has nothing to tune: a context that was seen c times, with t different
tokens after it, leaves t / (c + t) to the shorter context; below the unigrams stand equal shares for all tokens.
"""

import hashlib
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from src.models.tokenizer import raw_tokenizer
from tasks.mlm.sentences import split_sentences
from tasks.mlm.sources import iterate_documents
from tasks.rublimp.pseudo_likelihood import Likelihood

ORDERS = {"unigram": 1, "trigram": 3}
DOCUMENTS_AT_ONCE = 256


class NGramModel:
    """Log-probabilities of sentences from left to right; their ends are not predicted, their beginnings are context."""

    def __init__(self, tokenizer, order: int):
        if not tokenizer.is_fast:
            raise ValueError(f"--tokenizer {tokenizer.name_or_path}: has no fast version; pass another one")
        self.tokenizer, self.order = raw_tokenizer(tokenizer), order
        self.vocabulary_size = len(tokenizer)
        self.base = self.vocabulary_size + 1  # the last id stands for what is before a sentence
        self.counts: list[tuple[np.ndarray, np.ndarray]] = []  # of n-grams, n = 1, 2 ...: sorted keys and counts
        self.contexts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # keys, counts, tokens that follow

    def fit(self, text: Sequence[str]) -> "NGramModel":
        """Count the n-grams of text, written as --dataset_sources. Raises ValueError if there is none."""
        sentences = []
        documents = iterate_documents(text)
        while block := list(itertools.islice(documents, DOCUMENTS_AT_ONCE)):
            sentences += self._encode([sentence for document in block for sentence in split_sentences(document)])
        grams = self._grams(sentences)
        if not len(grams):
            raise ValueError(f"--text {' '.join(text)}: holds not a single token")
        for number in range(1, self.order + 1):
            keys, counts = np.unique(self._key(grams[:, self.order - number :]), return_counts=True)
            self.counts.append((keys, counts))
            begins = np.flatnonzero(np.diff(keys // self.base, prepend=-1))  # n-grams of a context stand together
            numbers = np.diff(np.append(begins, len(keys)))
            self.contexts.append((keys[begins] // self.base, np.add.reduceat(counts, begins), numbers))
        return self

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.tokenizer.to_str().encode())
        for keys, counts in self.counts:
            digest.update(keys.tobytes() + counts.tobytes())
        return digest.hexdigest()

    def __call__(self, texts: Sequence[str]) -> list[Likelihood]:
        sentences = self._encode(texts)
        logarithms = np.log(self.probabilities(self._grams(sentences)))
        ends = np.cumsum([len(sentence) for sentence in sentences])
        parts = np.split(logarithms, ends[:-1])
        # an exact sum: sentences of the same tokens in another order are a tie
        return [Likelihood(math.fsum(part.tolist()), len(part)) for part in parts]

    def probabilities(self, grams: np.ndarray) -> np.ndarray:
        """[n]: of the last token of each row of [n, order] after those before it."""
        found = np.full(len(grams), 1.0 / self.vocabulary_size)
        for number, (counted, contexts) in enumerate(zip(self.counts, self.contexts, strict=True), 1):
            keys = self._key(grams[:, self.order - number :])
            count = _look_up(counted[0], counted[1], keys)
            total = _look_up(contexts[0], contexts[1], keys // self.base)
            kinds = _look_up(contexts[0], contexts[2], keys // self.base)
            seen = total > 0
            found[seen] = (count[seen] + kinds[seen] * found[seen]) / (total[seen] + kinds[seen])
        return found

    def _encode(self, texts: Iterable[str]) -> list[np.ndarray]:
        encodings = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _grams(self, sentences: Sequence[np.ndarray]) -> np.ndarray:
        """[tokens of all sentences, order]: each with those before it."""
        before = np.full(self.order - 1, self.vocabulary_size, dtype=np.int32)
        padded = [np.concatenate([before, sentence]) for sentence in sentences if len(sentence)]
        windows = [np.lib.stride_tricks.sliding_window_view(sentence, self.order) for sentence in padded]
        return np.concatenate([np.empty((0, self.order), dtype=np.int32), *windows])

    def _key(self, grams: np.ndarray) -> np.ndarray:
        """One number for each row of token ids; of a vocabulary of two million, three still fit into 63 bits."""
        keys = np.zeros(len(grams), dtype=np.int64)
        for column in range(grams.shape[1]):
            keys = keys * self.base + grams[:, column]
        return keys


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 for one that is not there; keys are sorted."""
    places = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)
