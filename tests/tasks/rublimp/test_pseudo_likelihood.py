"""Batches of masked sentences give what one mask at a time gives, for models of any family."""

import math
from types import SimpleNamespace

import pytest
import torch
import transformers

from benchmarks.reference.pseudo_likelihood import plain_likelihood
from src.models import LeanAlbertConfig, LeanAlbertForMaskedLM
from tasks.finetuning.console import InputError
from tasks.rublimp.pseudo_likelihood import PseudoLikelihood, check_tokenizer, encode, split_words

TEXTS = ["Кот спит.", "Мэр Боровска Анна Лисицына открыла мост через Клинку.", "Да", "Прежний мост — унесло весной!",
         "Кот спит."]  # fmt: skip
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
        "initializer_range": 0.4, "embedding_size": 32, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48,
        "type_vocab_size": 2}  # fmt: skip
FAMILIES = ("LeanAlbert", "Bert", "Roberta", "Albert", "DistilBert", "MobileBert", "DebertaV2")


def make_model(family: str, tokenizer):
    torch.manual_seed(0)
    if family == "LeanAlbert":
        size = {name: value for name, value in SIZE.items() if name in LeanAlbertConfig.__dataclass_fields__}
        return LeanAlbertForMaskedLM(LeanAlbertConfig(**size, vocab_size=len(tokenizer), share_large_matrices=1)).eval()
    config = getattr(transformers, f"{family}Config")(vocab_size=len(tokenizer), pad_token_id=0, **SIZE)
    return getattr(transformers, f"{family}ForMaskedLM")(config).eval()


@pytest.mark.parametrize("by_word", [False, True], ids=["by token", "by word"])
@pytest.mark.parametrize("family", FAMILIES)
def test_batches_give_what_one_mask_at_a_time_gives(family, by_word, tiny_tokenizer):
    model = make_model(family, tiny_tokenizer)
    found = PseudoLikelihood(model, tiny_tokenizer, by_word=by_word, tokens_at_once=100)(TEXTS)
    for text, likelihood in zip(TEXTS, found, strict=True):
        offsets = tiny_tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
        words = split_words(text, offsets) if by_word else None
        total, number = plain_likelihood(model, tiny_tokenizer, text, words)
        assert likelihood.num_tokens == number == len(offsets)
        assert likelihood.total == pytest.approx(total, abs=1e-4)
        assert likelihood.total < -1.0


def test_only_hidden_positions_go_through_the_decoder(tiny_tokenizer):
    model, seen = make_model("Bert", tiny_tokenizer), []
    model.get_output_embeddings().register_forward_hook(lambda module, given, out: seen.append(out.shape[:2].numel()))
    found = PseudoLikelihood(model, tiny_tokenizer, tokens_at_once=100)(TEXTS[:4])
    assert sum(seen) == sum(one.num_tokens for one in found) and len(seen) > 1


def test_same_tokens_have_the_same_score_to_the_last_bit(demo_tokenizer):
    texts = [TEXTS[1], TEXTS[1].replace(" ", "  ")]
    ids = [encode(demo_tokenizer, text, by_word=False).inputs["input_ids"] for text in texts]
    assert ids[0] == ids[1], "else this test says nothing"
    model, seen = make_model("LeanAlbert", demo_tokenizer), []
    model.get_output_embeddings().register_forward_hook(lambda module, given, out: seen.append(len(out)))
    first, second, third = PseudoLikelihood(model, demo_tokenizer, tokens_at_once=64)([*texts, TEXTS[3]])
    assert first == second and sum(seen) == first.num_tokens + third.num_tokens, "computed once, whatever the batches"


@pytest.mark.parametrize(
    ("text", "offsets", "words"),
    [
        ("Из-за зимней, 90-х?", [(0, 2), (2, 3), (3, 5), (6, 9), (9, 12), (12, 13), (14, 15), (15, 16), (16, 17),
                                (17, 18), (18, 19)],
         [[0], [1], [2], [3, 4], [5], [6, 7], [8], [9], [10]]),
        ("а бв", [(0, 1), (1, 2), (2, 3), (3, 4)], [[0], [1, 2, 3]]),  # a blank of its own begins the word
        ("а бв", [(0, 1), (1, 3), (3, 4)], [[0], [1, 2]]),  # a blank that counts with the letter
        ("аб", [(0, 1), (0, 2)], [[0, 1]]),  # a mark in front of a text
        ("ё—", [(0, 1), (0, 1), (1, 2), (1, 2)], [[0, 1], [2, 3]]),  # bytes of one character
        ("за\u0301мок", [(0, 2), (2, 3), (3, 6)], [[0, 1, 2]]),
    ],
)  # fmt: skip
def test_words_are_runs_of_letters(text, offsets, words):
    assert split_words(text, offsets) == words


def test_word_form_hides_the_rest_of_the_word(tiny_tokenizer):
    sentence = encode(tiny_tokenizer, "открыла.", by_word=True)
    pieces = tiny_tokenizer.convert_ids_to_tokens(sentence.inputs["input_ids"])
    assert len(pieces) > 4 and pieces[-2] == "."
    last = len(pieces) - 2
    assert sentence.hidden == (*(tuple(range(place, last)) for place in range(1, last)), (last,))


def test_memory_that_runs_out_makes_batches_smaller(tiny_tokenizer):
    model = make_model("Bert", tiny_tokenizer)
    expected, forward = PseudoLikelihood(model, tiny_tokenizer)(TEXTS), model.forward

    def with_little_memory(**inputs):
        if inputs["input_ids"].numel() > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(**inputs)

    model.forward, limit = with_little_memory, 120
    score = PseudoLikelihood(model, tiny_tokenizer, tokens_at_once=256)
    for one, other in zip(score(TEXTS), expected, strict=True):
        assert one.total == pytest.approx(other.total, abs=1e-4)
    assert score.tokens_at_once <= 128, "it is kept to"
    limit = 3
    with pytest.raises(MemoryError, match="even with one masked sentence"):
        score(TEXTS)


def test_what_cannot_be_scored_is_said(tiny_tokenizer):
    model = make_model("Bert", tiny_tokenizer)
    model.bert.embeddings.word_embeddings.weight.data[7] = math.nan
    with pytest.raises(InputError, match="not finite"):
        PseudoLikelihood(model, tiny_tokenizer)(TEXTS)
    slow = SimpleNamespace(mask_token_id=4, is_fast=False, name_or_path="slow")
    with pytest.raises(ValueError, match="--form word: the tokenizer slow does not tell"):
        check_tokenizer(slow, by_word=True)
    check_tokenizer(slow, by_word=False)
    with pytest.raises(ValueError, match="has no mask token"):
        check_tokenizer(SimpleNamespace(mask_token_id=None, name_or_path="gpt"), by_word=False)
