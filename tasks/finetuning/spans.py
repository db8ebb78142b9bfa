"""Spans of characters and of tokens: find a word in a sentence, mark the tokens of a span.

Character spans are (start, end) with an exclusive end. The annotation of RUSSE is off by a character or more, so a span
is only a hint of where the word is; Russian inflects, so the word is looked for in all its forms.
"""

import functools
import re
import unicodedata

import numpy as np

STRESS_MARKS = "\u0300\u0301"
SOFT_HYPHEN = "\u00ad"
SIMPLE_WORD = re.compile(rf"[^\W_]+(?:[{STRESS_MARKS}{SOFT_HYPHEN}]+[^\W_]+)*[{STRESS_MARKS}]*")
COMPOUND_WORD = re.compile(rf"{SIMPLE_WORD.pattern}(?:[-‐‑'’]{SIMPLE_WORD.pattern})+")

Span = tuple[int, int]


@functools.cache
def morphology():
    """The morphological analyser, loaded when first needed (about 0.1 s and 20 MB)."""
    import pymorphy3

    return pymorphy3.MorphAnalyzer(lang="ru")


def plain_word(word: str) -> str:
    """Lower case, ё as е, no stress marks or soft hyphens."""
    decomposed = "".join(c for c in word if c not in STRESS_MARKS and c != SOFT_HYPHEN)
    return unicodedata.normalize("NFC", decomposed).lower().replace("ё", "е")


@functools.lru_cache(maxsize=10_000)
def word_forms(word: str) -> frozenset[str]:
    """All inflected forms of a dictionary word, as plain words.

    Readings of which the word is the dictionary form come first: "жила" is a vein here, not "she lived". Where there
    is none, all readings count: RUSSE lists "дети", "деньги" and "дежурная", which the analyser derives from others.
    """
    readings = morphology().parse(word.lower())
    own = [reading for reading in readings if plain_word(reading.normal_form) == plain_word(word)]
    forms = {plain_word(form.word) for reading in own or readings for form in reading.lexeme}
    return frozenset(forms | {plain_word(word)})


@functools.lru_cache(maxsize=100_000)
def lemmas(word: str) -> frozenset[str]:
    """The dictionary forms of all readings of a word form, as plain words."""
    return frozenset(plain_word(reading.normal_form) for reading in morphology().parse(plain_word(word)))


def clamp_span(text: str, start: int, end: int) -> Span:
    """The part of a span that lies inside the text, without spaces and marks at its ends."""
    start, end = max(0, min(start, len(text))), max(0, min(end, len(text)))
    while start < end and not text[start].isalnum():
        start += 1
    while start < end and not text[end - 1].isalnum():
        end -= 1
    return start, end


def words_of(text: str) -> list[Span]:
    """Spans of all words; "дом-музей" is there as a whole and in its parts."""
    spans = [match.span() for pattern in (COMPOUND_WORD, SIMPLE_WORD) for match in pattern.finditer(text)]
    return sorted(spans, key=lambda span: (span[0], -span[1]))


def grow_to_words(text: str, span: Span) -> Span:
    """The smallest span of whole words that covers the span; the span itself when it touches no word."""
    touched = [
        match.span() for match in SIMPLE_WORD.finditer(text) if match.start() < span[1] and span[0] < match.end()
    ]
    return (touched[0][0], touched[-1][1]) if touched else span


def is_form_of(candidate: str, word: str) -> bool:
    """Whether a word of a text is a form of the dictionary word."""
    return plain_word(candidate) in word_forms(word) or plain_word(word) in lemmas(candidate)


def _distance(span: Span, hint: Span) -> int:
    return abs(span[0] - hint[0]) + abs(span[1] - hint[1])


def find_word(text: str, word: str, hint: Span) -> Span | None:
    """The span of a form of the word: at the hint if it is there, else the nearest one in the text, else None."""
    hint = clamp_span(text, *hint)
    grown = grow_to_words(text, hint)
    if grown[0] < grown[1] and is_form_of(text[slice(*grown)], word):
        return grown
    if " " in word.strip():
        pattern = re.compile(rf"(?<!\w){re.escape(word.strip())}(?!\w)", re.IGNORECASE)
        spans = [match.span() for match in pattern.finditer(text)]
    else:
        spans = [span for span in words_of(text) if is_form_of(text[slice(*span)], word)]
    return min(spans, key=lambda span: _distance(span, hint), default=None)


def find_text(text: str, part: str, hint: int) -> Span | None:
    """The occurrence of a part of a text nearest to a position, on word borders, whatever the case; None if absent."""
    pattern = re.compile(rf"(?<!\w){re.escape(part)}(?!\w)", re.IGNORECASE)
    spans = [match.span() for match in pattern.finditer(text)]
    return min(spans, key=lambda span: abs(span[0] - hint), default=None)


def text_offsets(encoding, sequence: int, *, window: int | None = None) -> np.ndarray:
    """Character offsets of the tokens of one text (0 or 1) of an encoding, [length, 2]; (0, 0) for all other tokens.

    window chooses one of the parts that a tokenizer returns for an overflowing text.
    """
    offsets = np.array(encoding["offset_mapping"] if window is None else encoding["offset_mapping"][window])
    owners = np.array([-1 if owner is None else owner for owner in encoding.sequence_ids(window or 0)])
    return np.where((owners == sequence)[:, None], offsets, 0)


def tokens_of_span(offsets: np.ndarray, span: Span) -> np.ndarray:
    """Positions of the tokens that share a character with the span."""
    return np.flatnonzero((offsets[:, 0] < span[1]) & (span[0] < offsets[:, 1]))


def mask_of_span(encoding, sequence: int, span: Span | None) -> tuple[np.ndarray, bool]:
    """A 0/1 array over tokens, and whether any token of the span is left.

    A span that is unknown or was cut off by truncation is replaced by its whole text, so that a mean over the mask
    always exists.
    """
    offsets = text_offsets(encoding, sequence)
    positions = tokens_of_span(offsets, span if span is not None else (0, 0))
    found = len(positions) > 0
    if not found:
        positions = np.flatnonzero(offsets[:, 1] > 0)
    mask = np.zeros(len(offsets), dtype=np.int8)
    mask[positions if len(positions) else slice(None)] = 1  # a text with no tokens at all: the whole input
    return mask, found
