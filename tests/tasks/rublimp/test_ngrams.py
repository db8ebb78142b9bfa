"""The n-gram models are distributions, and those of Witten and Bell."""

import math

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tasks.rublimp.ngrams import NGramModel


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Кот спит. Кот ест.\n\nПёс спит у реки, кот спит дома.\n", encoding="utf-8")
    return [str(path)]


@pytest.mark.parametrize("order", [1, 3])
def test_probabilities_of_any_context_sum_to_one(order, text, demo_tokenizer):
    model = NGramModel(demo_tokenizer, order).fit(text)
    vocabulary = np.arange(model.vocabulary_size, dtype=np.int32)
    cat, sleeps = (demo_tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("кот", "спит"))
    start = model.vocabulary_size
    for context in ([start, start], [start, cat], [cat, sleeps], [5, 6]):
        grams = np.column_stack([np.full_like(vocabulary, token) for token in context[: order - 1]] + [vocabulary])
        probabilities = model.probabilities(grams.astype(np.int32))
        assert probabilities.sum() == pytest.approx(1.0) and (probabilities > 0).all()


def test_probabilities_are_those_of_witten_and_bell(tmp_path):
    """By hand, for the sentences а б, а б, а в."""
    pipeline = Tokenizer(models.WordLevel({"<unk>": 0, "а": 1, "б": 2, "в": 3, "г": 4}, unk_token="<unk>"))
    pipeline.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "t.txt").write_text("а б\nа б\nа в\n", encoding="utf-8")
    model = NGramModel(PreTrainedTokenizerFast(tokenizer_object=pipeline), 3).fit([str(tmp_path / "t.txt")])
    unigram = (2 + 3 / 5) / (6 + 3)  # б: 2 of 6 tokens, which are of 3 kinds; 5 in the vocabulary
    bigram = (2 + 2 * unigram) / (3 + 2)  # after а: б twice, в once
    trigram = (2 + 2 * bigram) / (3 + 2)  # after а at the start: the same
    start = 5
    found = model.probabilities(np.array([[start, 1, 2], [2, 1, 2], [1, 4, 2]], dtype=np.int32))
    assert found == pytest.approx([trigram, bigram, unigram])
    (likelihood,) = model(["а б"])
    first = (3 + 1 * (3 + 3 / 5) / (6 + 3)) / (3 + 1)  # а at the start: 3 of 3, of one kind
    first = (3 + 1 * first) / (3 + 1)
    assert likelihood.num_tokens == 2 and likelihood.total == pytest.approx(math.log(first) + math.log(trigram))


def test_unigrams_know_no_order_and_grams_do(text, demo_tokenizer):
    pair = ["Кот спит дома", "дома спит Кот"]
    numbers = {tuple(sorted(demo_tokenizer(one, add_special_tokens=False)["input_ids"])) for one in pair}
    assert len(numbers) == 1, "else this test says nothing"
    first, second = NGramModel(demo_tokenizer, 1).fit(text)(pair)
    assert first == second, "a tie, to the last bit"
    first, second = NGramModel(demo_tokenizer, 3).fit(text)(pair)
    assert first.total > second.total and first.num_tokens == second.num_tokens


def test_text_decides_the_fingerprint_and_text_without_tokens_is_an_error(tmp_path, text, demo_tokenizer):
    model = NGramModel(demo_tokenizer, 3).fit(text)
    assert model.fingerprint() == NGramModel(demo_tokenizer, 3).fit(text).fingerprint()
    (tmp_path / "other.txt").write_text("Пёс ест.", encoding="utf-8")
    assert model.fingerprint() != NGramModel(demo_tokenizer, 3).fit([str(tmp_path / "other.txt")]).fingerprint()
    assert [one.num_tokens for one in model(["", "Кот"])] == [0, 1]
    (tmp_path / "none.txt").write_text("\u200b", encoding="utf-8")
    with pytest.raises(ValueError, match=r"none\.txt: holds n"):
        NGramModel(demo_tokenizer, 1).fit([str(tmp_path / "none.txt")])
