import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tasks.finetuning import spans


def found(text, word, hint):
    span = spans.find_word(text, word, hint)
    return None if span is None else text[slice(*span)]


def test_clamp_span_drops_marks_and_what_lies_outside_the_text():
    assert spans.clamp_span("«Двор»!", 0, 99) == (1, 5)
    assert spans.clamp_span("двор", -3, 2) == (0, 2)
    assert spans.clamp_span("двор", 9, 12) == (4, 4)
    start, end = spans.clamp_span("— !", 0, 3)
    assert start == end


@pytest.mark.parametrize(
    ("text", "word", "hint", "expected"),
    [
        ("Осталось двадцать дворов", "двор", (18, 25), "дворов"),  # end beyond the sentence
        ("Двор, а во дворе дом", "двор", (0, 5), "Двор"),  # end on the comma
        ("мемориальная доска, надпись", "доска", (13, 17), "доска"),  # end cut short
        ("Наш домашний дом.", "дом", (4, 12), "дом"),  # not inside a longer word
        ("ДОМОМ стал лес", "дом", (7, 11), "ДОМОМ"),  # far from the hint, in capitals
        ("Дом и ещё дом", "дом", (9, 9), "дом"),  # the nearest of several
        ("В моём доме-музее", "дом", (7, 17), "доме"),  # a part of a compound
        ("Съели всего ежа", "еж", (0, 3), "ежа"),
        ("Во́ды реки", "вода", (0, 4), "Во́ды"),  # stress mark
        ("Видели всех детей", "дети", (0, 2), "детей"),  # listed in the plural
        ("Зелёная ёлка", "ёлка", (0, 2), "ёлка"),
        ("Зеленая елка", "ёлка", (0, 2), "елка"),
        ("в его жилах текла кровь, они жили тут", "жила", (29, 33), "жилах"),  # not "they lived"
        ("Ни слова", "дом", (0, 2), None),
        ("", "дом", (0, 2), None),
        ("Съел 2-х", "2-х", (0, 2), "2-х"),
    ],
)
def test_find_word_finds_the_form_of_the_word(text, word, hint, expected):
    assert found(text, word, hint) == expected


def test_find_word_takes_the_nearest_form():
    text = "дом у дома на доме"
    assert spans.find_word(text, "дом", (100, 110)) == (14, 18)
    assert spans.find_word(text, "дом", (6, 8)) == (6, 10)


def test_find_text_respects_word_borders_and_case():
    assert spans.find_text("Он не она, он", "он", 9) == (11, 13)
    assert spans.find_text("она", "он", 0) is None


def test_mask_of_span_marks_exactly_the_tokens_of_the_span(tiny_tokenizer):
    first, second = "Лиса поймала мышь.", "Мышь поймали лисы"
    encoding = tiny_tokenizer(first, second, return_offsets_mapping=True)
    for sequence, text, word in ((0, first, "поймала"), (1, second, "лисы"), (1, second, "Мышь")):
        start = text.index(word)
        mask, is_there = spans.mask_of_span(encoding, sequence, (start, start + len(word)))
        assert is_there
        assert tiny_tokenizer.decode(np.asarray(encoding["input_ids"])[mask == 1]).strip() == word
        assert {encoding.sequence_ids()[i] for i in np.flatnonzero(mask)} == {sequence}


def test_mask_of_span_marks_words_of_byte_level_tokenizers():
    """As in RoBERTa: pieces are bytes, two for a Cyrillic letter, and hold the space before a word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["лиса поймала мышь"], trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    text = "Лиса поймала (мышь)."
    encoding = fast(text, return_offsets_mapping=True)
    for word in ("Лиса", "поймала", "мышь"):
        mask, _ = spans.mask_of_span(encoding, 0, (text.index(word), text.index(word) + len(word)))
        assert fast.decode(np.asarray(encoding["input_ids"])[mask == 1]).strip() == word


def test_mask_of_a_lost_span_is_its_whole_text(tiny_tokenizer):
    encoding = tiny_tokenizer(
        "Лиса", "Мышь и сыр и ещё сыр", truncation=True, max_length=8, return_offsets_mapping=True
    )
    mask, is_there = spans.mask_of_span(encoding, 1, (16, 20))
    assert not is_there
    assert [o for o, marked in zip(encoding.sequence_ids(), mask, strict=True) if marked] == [1] * mask.sum()
    assert mask.sum() == encoding.sequence_ids().count(1) > 0


def test_importing_spans_does_not_load_the_morphology():
    """The analyser costs memory and time that only RUSSE and RWSD need."""
    code = "import sys, tasks.registry; sys.exit('pymorphy3' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
