"""Whole-word masking: form of a batch, whole words, budget, shares of replacements, seeds and workers."""

import copy
import itertools
import multiprocessing
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from src.models.tokenizer import load_tokenizer
from tasks.mlm import mask_kernel
from tasks.mlm.data import make_training_dataset
from tasks.mlm.whole_word_mask import DataCollatorForWholeWordMask

TOKENIZER_PATH = Path(__file__).resolve().parents[3] / "demo" / "tokenizer"
PAD, UNKNOWN, CLS, SEP, MASK = range(5)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TOKENIZER_PATH)


@pytest.fixture(scope="module")
def instances(tokenizer):
    """Instances of the bundled text, 128 tokens and less."""
    dataset = make_training_dataset(tokenizer, shuffle_seed=0, max_sequence_length=128)
    return list(itertools.islice(dataset, 400))


def make_instance(ids, label=0):
    return {
        "input_ids": ids,
        "token_type_ids": [0] * len(ids),
        "special_tokens_mask": [0] * len(ids),
        "sentence_order_label": label,
    }


def restore(batch):
    """Ids as they were before masking, and which were chosen."""
    chosen = batch["labels"] != -100
    return torch.where(chosen, batch["labels"], batch["input_ids"]), chosen


def words_of(tokenizer, ids) -> list[list[int]]:
    """Positions of each word, one token after the other: a naive reference."""
    words, previous = [], CLS
    for position, token in enumerate(ids):
        if token in (PAD, CLS, SEP):
            previous = token
            continue
        piece = tokenizer.convert_ids_to_tokens(token)
        if piece.startswith("▁") or previous in (CLS, SEP):
            words.append([])
        words[-1].append(position)
        previous = token
    return words


class SplitMix64:
    """The draws of the compiled code, from Python's own integers."""

    def __init__(self, seed: int):
        self.state = seed

    def draw_below(self, limit: int) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) % 2**64
        bits = (self.state ^ self.state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
        return ((bits ^ bits >> 31) >> 32) * limit >> 32


def choose_greedily(words: list[list[int]], budget: int, draw_below) -> set[int]:
    """The positions of the words that fit the budget, visited in an order shuffled by the given draws."""
    words, visited, left = list(words), [], budget
    while words and left:
        words[0], words[other] = words[(other := draw_below(len(words)))], words[0]
        visited.append(words.pop(0))
        if len(visited[-1]) <= left:
            left -= len(visited[-1])
        else:
            visited[-1] = ()
    return set(itertools.chain.from_iterable(visited))


def test_batch_holds_the_padded_instances(tokenizer, instances):
    batch = DataCollatorForWholeWordMask(tokenizer, seed=0)(instances[:32])
    width = max(len(instance["input_ids"]) for instance in instances[:32])
    ids, _ = restore(batch)
    for row, instance in enumerate(instances[:32]):
        length = len(instance["input_ids"])
        padding = width - length
        assert ids[row].tolist() == [*instance["input_ids"], *[PAD] * padding]
        assert batch["token_type_ids"][row].tolist() == [*instance["token_type_ids"], *[0] * padding]
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * padding
        assert batch["sentence_order_label"][row] == instance["sentence_order_label"]
    assert all(values.dtype == torch.int64 for values in batch.values())
    expected = {"input_ids", "attention_mask", "token_type_ids", "labels", "sentence_order_label"}
    assert set(batch) == expected


@pytest.mark.parametrize("multiple, width", [(None, 9), (1, 9), (4, 12), (9, 9), (128, 128)])
def test_width_is_padded_to_a_multiple(tokenizer, multiple, width):
    collator = DataCollatorForWholeWordMask(tokenizer, pad_to_multiple_of=multiple)
    batch = collator([make_instance([CLS, *range(10, 17), SEP]), make_instance([CLS, 10, SEP])])
    assert {values.shape for name, values in batch.items() if name != "sentence_order_label"} == {(2, width)}


def test_words_are_masked_whole_and_specials_never(tokenizer, instances):
    collator = DataCollatorForWholeWordMask(tokenizer, seed=0)
    num_long = 0
    for start in range(0, 400, 50):
        ids, chosen = restore(collator(instances[start : start + 50]))
        assert not chosen[(ids == PAD) | (ids == CLS) | (ids == SEP)].any()
        for row in range(50):
            for word in words_of(tokenizer, ids[row].tolist()):
                assert len({bool(chosen[row, position]) for position in word}) == 1
                num_long += len(word) > 1 and bool(chosen[row, word[0]])
    assert num_long > 500


def test_words_with_an_unknown_piece_are_not_masked(tokenizer):
    starts = [token for token in range(5, 400) if tokenizer.convert_ids_to_tokens(token).startswith("▁")]
    inside = [token for token in range(5, 400) if not tokenizer.convert_ids_to_tokens(token).startswith("▁")]
    ids = [CLS, starts[0], UNKNOWN, inside[0], starts[1], inside[1], UNKNOWN, SEP, UNKNOWN, inside[2], starts[2], SEP]
    collator = DataCollatorForWholeWordMask(tokenizer, mlm_probability=0.99, seed=0)
    for _ in range(20):
        _, chosen = restore(collator([make_instance(ids)]))
        assert chosen[0].nonzero().flatten().tolist() in ([10], [])
        assert chosen[0, 10]


def test_budget_is_kept_in_every_row_and_nearly_used_up(tokenizer, instances):
    collator = DataCollatorForWholeWordMask(tokenizer, seed=0)
    num_chosen, num_real = 0, 0
    for start in range(0, 400, 40):
        ids, chosen = restore(collator(instances[start : start + 40]))
        real = (ids > MASK).sum(1)
        budgets = torch.round(real * 0.15).clamp(min=1)
        for row in (chosen.sum(1) > budgets).nonzero().flatten().tolist():  # a row in which no word fits
            words = words_of(tokenizer, ids[row].tolist())
            shortest = min(map(len, words))
            assert int(chosen[row].sum()) == shortest > budgets[row]
        assert (chosen.sum(1) > budgets).float().mean() < 0.2
        num_chosen, num_real = num_chosen + int(chosen.sum()), num_real + int(real.sum())
    assert 0.147 < num_chosen / num_real < 0.153


@pytest.mark.parametrize("share", [0.05, 0.15, 0.3, 0.4, 0.8])
def test_share_of_masked_tokens_is_the_one_asked_for_and_so_are_their_replacements(tokenizer, instances, share):
    probability = multiprocessing.Value("d", 0.5)
    collator = DataCollatorForWholeWordMask(tokenizer, mlm_probability=probability, seed=0)
    probability.value = share  # it may change while batches are made
    batches = [collator(instances[start : start + 40]) for start in range(0, 400, 40)]
    num_chosen = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    num_hidden = sum(int((batch["input_ids"] == MASK).sum()) for batch in batches)
    num_real = sum(int((restore(batch)[0] > MASK).sum()) for batch in batches)
    assert num_chosen / num_real == pytest.approx(share, rel=0.05)
    assert num_hidden / num_chosen == pytest.approx(0.8, abs=4 * (0.8 * 0.2 / num_chosen) ** 0.5)


def test_every_row_predicts_something(tokenizer):
    inside = [token for token in range(5, 400) if not tokenizer.convert_ids_to_tokens(token).startswith("▁")]
    start = next(token for token in range(5, 400) if tokenizer.convert_ids_to_tokens(token).startswith("▁"))
    long_words = [CLS, start, *inside[:5], start, inside[0], SEP]
    batch = [make_instance(long_words), make_instance([CLS, start, SEP]), make_instance([CLS, start, inside[0], SEP])]
    _, chosen = restore(DataCollatorForWholeWordMask(tokenizer, seed=0)(batch))
    assert [row.nonzero().flatten().tolist() for row in chosen] == [[7, 8], [1], [1, 2]]


def test_a_piece_after_a_special_token_begins_a_word(tokenizer):
    inside = next(token for token in range(5, 400) if not tokenizer.convert_ids_to_tokens(token).startswith("▁"))
    start = next(token for token in range(5, 400) if tokenizer.convert_ids_to_tokens(token).startswith("▁"))
    collator = DataCollatorForWholeWordMask(tokenizer, mlm_probability=0.99, seed=0)
    _, chosen = restore(collator([make_instance([CLS, inside, SEP, inside, inside, start, SEP])]))
    assert chosen[0].nonzero().flatten().tolist() == [1, 3, 4, 5]


@pytest.mark.parametrize("probability", [0.05, 0.15, 0.6])
def test_choice_equals_visiting_the_words_one_by_one(tokenizer, instances, probability):
    collator = DataCollatorForWholeWordMask(tokenizer, probability)
    num_filled = 0
    for seed, instance in enumerate(instances):
        ids = np.array(instance["input_ids"], dtype=np.int32)
        labels = np.full_like(ids, -100)
        state = np.array([seed], dtype=np.uint64)
        mask_kernel.choose_tokens(ids, np.array([len(ids)], np.int32), collator.kinds, probability, state, labels)
        words = [word for word in words_of(tokenizer, ids.tolist()) if UNKNOWN not in ids[word]]
        num_known = int((ids > MASK).sum())
        budget = max(1, round(probability * num_known))
        expected = choose_greedily(words, budget, SplitMix64(seed).draw_below)
        if not expected:
            continue  # see test_every_row_predicts_something
        assert set(np.flatnonzero(labels != -100).tolist()) == expected
        assert (labels == np.where(labels == -100, -100, ids)).all()
        num_filled += len(expected) == round(probability * num_known)
    assert num_filled > 200


def test_chosen_tokens_are_replaced_in_the_shares_80_10_10(tokenizer, instances):
    collator = DataCollatorForWholeWordMask(tokenizer, seed=1)
    hidden, kept, other, replacements = 0, 0, 0, set()
    for start in range(0, 400, 10):
        batch = collator(instances[start : start + 10])
        ids, labels = batch["input_ids"][batch["labels"] != -100], batch["labels"][batch["labels"] != -100]
        hidden += int((ids == MASK).sum())
        kept += int((ids == labels).sum())
        changed = ids[(ids != MASK) & (ids != labels)]
        other += len(changed)
        replacements.update(changed.tolist())
    total = hidden + kept + other
    assert total > 4000
    for count, share in ((hidden, 0.8), (kept, 0.1), (other, 0.1)):
        assert abs(count / total - share) < 4 * (share * (1 - share) / total) ** 0.5 + 1 / 4000
    assert min(replacements) > MASK and len(replacements) > 0.7 * other
    assert max(replacements) > 0.9 * len(tokenizer)


def test_every_word_is_masked_about_equally_often(tokenizer):
    starts = [token for token in range(5, 400) if tokenizer.convert_ids_to_tokens(token).startswith("▁")][:40]
    collator = DataCollatorForWholeWordMask(tokenizer, seed=0)
    _, chosen = restore(collator([make_instance([CLS, *starts, SEP])] * 2000))
    rates = chosen[:, 1:41].float().mean(0)
    assert ((rates - 0.15).abs() < 0.04).all()


def equal(first, second) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_seed_decides_the_masks(tokenizer, instances):
    def make(seed):
        return DataCollatorForWholeWordMask(tokenizer, seed=seed)

    first = make(1)
    batches = [first(instances[:8]) for _ in range(2)]
    assert not equal(*batches)
    assert equal(make(1)(instances[:8]), batches[0])
    assert not equal(make(2)(instances[:8]), batches[0])
    assert not equal(make(None)(instances[:8]), make(None)(instances[:8]))


def test_state_continues_with_the_same_masks(tokenizer, instances, tmp_path):
    collator = DataCollatorForWholeWordMask(tokenizer, seed=1)
    collator(instances[:8])
    torch.save(collator.state_dict(), tmp_path / "state.pt")
    expected = collator(instances[:8])
    resumed = DataCollatorForWholeWordMask(tokenizer, seed=None)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert equal(resumed(instances[:8]), expected)


@pytest.mark.parametrize("seed", [5, None])
def test_workers_mask_differently(tokenizer, instances, seed):
    collator = DataCollatorForWholeWordMask(tokenizer, seed=seed)
    collator(instances[:4])  # a generator made before the fork must not be repeated in the workers
    loader = DataLoader(instances[:4] * 2, batch_size=4, collate_fn=collator, num_workers=2)
    one, other = list(loader)
    assert torch.equal(restore(one)[0], restore(other)[0]) and not equal(one, other)
    assert equal(one, next(iter(loader))) == (seed is not None)


def test_instances_are_left_unchanged(tokenizer, instances):
    before = copy.deepcopy(instances[:8])
    DataCollatorForWholeWordMask(tokenizer, seed=0)(instances[:8])
    assert instances[:8] == before


def test_lists_tensors_and_arrays_give_the_same_batch(tokenizer, instances):
    def convert(kind):
        names = ("input_ids", "token_type_ids", "special_tokens_mask")
        return [each | {name: kind(each[name]) for name in names} for each in instances[:8]]

    expected = DataCollatorForWholeWordMask(tokenizer, seed=0)(instances[:8])
    for kind in (list, np.array, torch.tensor):
        assert equal(DataCollatorForWholeWordMask(tokenizer, seed=0)(convert(kind)), expected)


@pytest.mark.parametrize("token", [-1, 4000])
def test_ids_of_another_vocabulary_are_an_error(tokenizer, token):
    with pytest.raises(ValueError, match="for a vocabulary of 4000: made by another tokenizer"):
        DataCollatorForWholeWordMask(tokenizer)([make_instance([CLS, token])])


@pytest.mark.parametrize(
    "arguments, message",
    [({"mlm_probability": 0}, "mlm_probability is 0"), ({"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0")],
)
def test_unfit_arguments_are_named(tokenizer, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DataCollatorForWholeWordMask(tokenizer, **arguments)


def test_vocabulary_without_word_starts_is_refused(tokenizer, monkeypatch):
    class Renamed:
        mask_token, pad_token, mask_token_id, pad_token_id, unk_token_id = "[MASK]", "<pad>", MASK, PAD, UNKNOWN
        all_special_ids = (0, 1, 2, 3, 4)

        def __len__(self):
            return 9

        def convert_ids_to_tokens(self, ids):
            return [random.choice("абв") for _ in ids]

    with pytest.raises(ValueError, match="starts with '▁'"):
        DataCollatorForWholeWordMask(Renamed())


def make_word_piece(*more):
    """Marks the insides of words with ##, whatever else its vocabulary holds."""
    vocabulary = ["[PAD]", "[UNK]", "[MASK]", *"весна", *(f"##{letter}" for letter in "весна"), "мы", "дом", *more]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


@pytest.mark.parametrize("more", [["▁"], ["▁", "▁▁", "▁весна", "▁мы", "##▁"]])
def test_vocabulary_in_which_the_mark_is_a_character_like_others_is_refused(more):
    with pytest.raises(ValueError, match="does not begin words with it"):
        DataCollatorForWholeWordMask(make_word_piece(*more))


@pytest.mark.parametrize("prepend_scheme", ["always", "first", "never"])
def test_vocabulary_that_marks_words_may_hold_other_marks_as_characters(prepend_scheme):
    pieces = [(piece, 0.0) for piece in ("[PAD]", "[UNK]", "[MASK]", "##", "Ġ", "▁", "▁мы", "▁дом", *"весна#")]
    backend = Tokenizer(models.Unigram(pieces, unk_id=1))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    DataCollatorForWholeWordMask(PreTrainedTokenizerFast(tokenizer_object=backend, **roles))
