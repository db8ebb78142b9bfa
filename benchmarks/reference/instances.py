"""The original's instance builder: every text is tokenised twice, and what does not make a pair is dropped.

Sentences are tokenised one by one to count their tokens and joined until the length is reached; the halves on both
sides of a random cut, as text again, go through the tokenizer together, which truncates them. A chunk of one sentence
makes no pair and is dropped.
"""

import random
from collections.abc import Iterable, Iterator

import razdel


def make_instances(
    documents: Iterable[str], tokenizer, *, max_sequence_length: int, generator: random.Random
) -> Iterator[dict]:
    for document in documents:
        chunk, num_tokens = [], 0
        for sentence in razdel.sentenize(document):
            chunk.append(sentence.text)
            num_tokens += len(tokenizer.encode(sentence.text, add_special_tokens=False))
            if num_tokens >= max_sequence_length:
                yield from make_pair(chunk, tokenizer, max_sequence_length, generator)
                chunk, num_tokens = [], 0
        yield from make_pair(chunk, tokenizer, max_sequence_length, generator)


def make_pair(chunk: list[str], tokenizer, max_sequence_length: int, generator: random.Random) -> Iterator[dict]:
    if len(chunk) < 2:
        return
    cut = generator.randint(1, len(chunk) - 1)
    first, second = " ".join(chunk[:cut]), " ".join(chunk[cut:])
    label = int(generator.random() < 0.5)
    if label:
        first, second = second, first
    encoded = tokenizer(
        first,
        second,
        truncation="longest_first",
        max_length=max_sequence_length,
        return_special_tokens_mask=True,
        return_attention_mask=False,
    )
    yield {**encoded, "sentence_order_label": label}
