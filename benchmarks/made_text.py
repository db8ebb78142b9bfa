"""Russian-looking text of any size from the bundled one, the same on every machine.

Sentences keep their shape; most of their words are replaced, some by words that the bundled text has as often, others
by words put together from the first half of one and the second half of another. The latter follow Zipf's law and never
come to an end, as in real text: a memory of words that have been seen is never complete.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator

from tasks.mlm.sentences import split_sentences
from tasks.mlm.sources import DEFAULT_SOURCE, iterate_documents

WORD = re.compile(r"\w+")
KEPT, MADE = 0.3, 0.22  # shares of words: as they are; put together
# Ranks of words put together, by the Zipf-Mandelbrot law: of the words of each half million characters, 0.38, 0.23 and
# 0.19 have not been there before (in Russian prose 0.32, 0.23 and 0.20).
SHIFT, EXPONENT = 3000, 0.5


class Words:
    """Draws words; `number` of one put together decides what it is."""

    def __init__(self, words: list[str], generator: random.Random):
        counts = Counter(words)
        self.words, self.generator = sorted(words, key=lambda word: (-counts[word], word)), generator
        self.long = sorted({word for word in words if len(word) > 5 and word.islower()})

    def draw(self) -> str:
        if self.generator.random() >= MADE / (1 - KEPT):
            return self.words[int(len(self.words) * self.generator.random() ** 2)]  # frequent ones more often
        rank = SHIFT * ((1 - self.generator.random()) ** (-1 / EXPONENT) - 1)
        number = int(min(rank, 1e15)) * 0x9E3779B97F4A7C15 % 2**64  # neighbouring ranks have nothing in common
        first, second = self.long[number % len(self.long)], self.long[number // 2**32 % len(self.long)]
        return first[: len(first) // 2 + number // 2**20 % 2] + second[len(second) // 2 :]

    def replace(self, found: re.Match) -> str:
        word = found[0]
        if self.generator.random() < KEPT or not word.isalpha():
            return word
        drawn = self.draw()
        return drawn.capitalize() if word[0].isupper() else drawn


def make_documents(num_characters: int, *, seed: int = 0) -> Iterator[str]:
    """Documents of some 10,000 characters each (log-normal lengths), until there are so many characters of them."""
    generator = random.Random(seed)
    sentences = [sentence for text in iterate_documents(DEFAULT_SOURCE) for sentence in split_sentences(text)]
    words = Words([word for sentence in sentences for word in WORD.findall(sentence)], generator)
    while num_characters > 0:
        wanted, document, length = generator.lognormvariate(9, 0.6), [], 0
        while length < wanted:
            document.append(WORD.sub(words.replace, generator.choice(sentences)))
            length += len(document[-1]) + 1
        num_characters -= length
        yield " ".join(document)
