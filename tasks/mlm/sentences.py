"""Sentences of Russian text."""

import re

from sentencex import segment

# sentencex ends a sentence after «Привет!» even when «— сказал он» follows.
CONTINUATION = re.compile(r"[—–-]?\s*[a-zа-яё]")


def split_sentences(document: str) -> list[str]:
    """Sentences without surrounding whitespace. A line break always ends one, a lower-case letter never begins one."""
    sentences = []
    for paragraph in document.splitlines():
        if not paragraph or paragraph.isspace():
            continue
        first = len(sentences)
        for sentence in segment("ru", paragraph):
            sentence = sentence.strip()
            if not sentence:
                continue
            if len(sentences) > first and CONTINUATION.match(sentence):
                sentences[-1] = f"{sentences[-1]} {sentence}"
            else:
                sentences.append(sentence)
    return sentences
