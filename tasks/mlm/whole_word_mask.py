"""Whole-word masking: batches of instances with words hidden for the model to predict (BERT, arXiv 1810.04805)."""

import os
from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import get_worker_info

IGNORED_LABEL = -100
MASKED_SHARE, RANDOM_SHARE = 0.8, 0.1  # of the chosen tokens; the rest stays as it is


def choose_words(sizes: np.ndarray, keys: np.ndarray, *, rows: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    """Which words to mask: in each row, in the order of their keys, every word that fits what is left of the budget.

    sizes, keys, rows: tokens in each word, a random number below 2**24, the row it is in (ascending), int32 [words];
    budgets: tokens to mask in each row, int32 [rows]. Returns the chosen words' indices.
    The same choice as visiting the words one by one, made by prefix sums: a pass accepts the words up to the first that
    does not fit, then drops all that are larger than what is left. A few passes are enough.
    """
    assert len(sizes) < 2**24 and len(budgets) < 2**16
    order = (rows.astype(np.uint64) << 48) | (keys.astype(np.uint64) << 24) | np.arange(len(sizes), dtype=np.uint64)
    order.sort()  # sorting row, key and index as one number is several times faster than argsort
    words = (order & 0xFFFFFF).astype(np.int32)  # candidates, in the order of the visit
    left, chosen = budgets, []
    while len(words):
        sizes_now, rows_now = sizes[words], rows[words]
        totals = np.cumsum(sizes_now, dtype=np.int32)
        begins = np.searchsorted(rows_now, np.arange(len(left)))  # first candidate of each row
        before = np.concatenate(([0], totals))[begins]
        # totals grow along a row, so the words before the first that does not fit are those whose total does
        fits = totals <= (before + left)[rows_now]
        chosen.append(words[fits])
        left = left - np.bincount(rows_now[fits], weights=sizes_now[fits], minlength=len(left)).astype(np.int32)
        words = words[~fits & (sizes_now <= left[rows_now])]
    return np.concatenate(chosen) if chosen else words


class DataCollatorForWholeWordMask:
    """Pad a list of instances to the longest and mask whole words: tensors for `LeanAlbertForPreTraining`.

    A word begins at a piece with "▁" or after a special token. Words are visited in random order and masked while they
    fit a budget of round(mlm_probability * real tokens), at least 1, per row; a word that would exceed it is skipped. A
    row in which no word fits gets its shortest one, so that every row has something to predict. Words that hold an
    unknown piece are never masked. Of the chosen tokens 80 % become [MASK], 10 % a random ordinary token, 10 % stay.

    seed: None takes fresh entropy. Each DataLoader worker has a generator of its own.
    """

    def __init__(
        self,
        tokenizer,
        mlm_probability: float = 0.15,
        pad_to_multiple_of: int | None = None,
        seed: int | None = None,
    ):
        if tokenizer.mask_token is None or tokenizer.pad_token is None:
            missing = "mask_token" if tokenizer.mask_token is None else "pad_token"
            raise ValueError(f"the tokenizer has no {missing}; name it in its special_tokens_map.json")
        if not 0 < mlm_probability < 1:
            raise ValueError(f"mlm_probability is {mlm_probability}, should lie between 0 and 1")
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of is {pad_to_multiple_of}, should be at least 1")
        self.mlm_probability = mlm_probability
        self.pad_to_multiple_of = pad_to_multiple_of
        self.seed = seed
        self.mask_token_id, self.pad_token_id = tokenizer.mask_token_id, tokenizer.pad_token_id
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self.starts_word = np.array([token.startswith("▁") for token in tokens])
        if not self.starts_word.any():
            raise ValueError("no token of the vocabulary starts with '▁', so the words' borders are not known")
        self.is_special = np.zeros(len(tokens), dtype=bool)
        self.is_special[tokenizer.all_special_ids] = True
        self.unknown_token_id = tokenizer.unk_token_id
        self.ordinary_ids = np.flatnonzero(~self.is_special)
        self._generator: np.random.Generator | None = None
        self._generator_owner: tuple | None = None

    def __call__(self, instances: Sequence[dict]) -> dict[str, torch.Tensor]:
        """int64 input_ids, attention_mask, token_type_ids, labels: [batch, length]; sentence_order_label: [batch]."""
        lengths = np.array([len(instance["input_ids"]) for instance in instances])
        multiple = self.pad_to_multiple_of or 1
        width = -(-int(lengths.max()) // multiple) * multiple
        is_real = np.arange(width) < lengths[:, None]  # [batch, length]
        # array("i", list) is the fastest way from a list of numbers to their bytes, faster than numpy's own
        flat_ids = np.frombuffer(b"".join(array("i", each["input_ids"]) for each in instances), dtype=np.int32)
        flat_types = np.frombuffer(b"".join(bytes(each["token_type_ids"]) for each in instances), dtype=np.uint8)
        rows = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)  # row of each token, [tokens]
        is_chosen = self._choose_tokens(flat_ids, rows, num_rows=len(lengths))
        masked_ids, flat_labels = self._hide(flat_ids, is_chosen)

        def pad(values: np.ndarray, filler: int) -> torch.Tensor:
            padded = np.full(is_real.shape, filler, dtype=np.int64)
            padded[is_real] = values
            return torch.from_numpy(padded)

        return {
            "input_ids": pad(masked_ids, self.pad_token_id),
            "attention_mask": torch.from_numpy(is_real.astype(np.int64)),
            "token_type_ids": pad(flat_types, 0),
            "labels": pad(flat_labels, IGNORED_LABEL),
            "sentence_order_label": torch.tensor([instance["sentence_order_label"] for instance in instances]),
        }

    def _choose_tokens(self, ids: np.ndarray, rows: np.ndarray, *, num_rows: int) -> np.ndarray:
        """Which tokens of the batch, laid end to end, belong to the words to be masked: boolean, [tokens]."""
        is_special = self.is_special[ids]
        is_border = is_special & (ids != self.unknown_token_id)  # an unknown piece belongs to the word around it
        begins = self.starts_word[ids] | is_border
        begins[0] = True
        begins[1:] |= is_border[:-1]
        word_begins = np.flatnonzero(begins)
        sizes = np.diff(word_begins, append=len(ids)).astype(np.int32)
        is_ordinary = ~is_special[word_begins]
        if self.unknown_token_id is not None and (unknown := np.flatnonzero(ids == self.unknown_token_id)).size:
            is_ordinary[np.searchsorted(word_begins, unknown, side="right") - 1] = False
        words = np.flatnonzero(is_ordinary)
        budgets = np.rint(self.mlm_probability * np.bincount(rows[~is_special], minlength=num_rows)).astype(np.int32)
        keys = self.generator().integers(2**24, size=len(words), dtype=np.int32)
        chosen = self._choose_in_every_row(
            sizes[words], keys, rows=rows[word_begins[words]], budgets=np.maximum(budgets, 1)
        )
        is_chosen = np.zeros(len(sizes), dtype=bool)
        is_chosen[words[chosen]] = True
        return np.repeat(is_chosen, sizes)

    @staticmethod
    def _choose_in_every_row(sizes, keys, *, rows, budgets) -> np.ndarray:
        """The words of `choose_words`, and the shortest one of each row in which none fits."""
        chosen = choose_words(sizes, keys, rows=rows, budgets=budgets)
        has_choice = np.zeros(len(budgets), dtype=bool)
        has_choice[rows[chosen]] = True
        if has_choice.all():
            return chosen
        left_out = np.flatnonzero(~has_choice[rows])
        by_row_and_size = left_out[np.lexsort((keys[left_out], sizes[left_out], rows[left_out]))]
        shortest = by_row_and_size[np.unique(rows[by_row_and_size], return_index=True)[1]]
        return np.concatenate((chosen, shortest))

    def _hide(self, ids: np.ndarray, is_chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Input ids with the chosen tokens replaced, and labels: both [tokens]."""
        positions = np.flatnonzero(is_chosen)
        labels = np.full(len(ids), IGNORED_LABEL, dtype=np.int64)
        labels[positions] = ids[positions]
        masked_ids = ids.copy()
        draws = self.generator().random(len(positions))
        masked_ids[positions[draws < MASKED_SHARE]] = self.mask_token_id
        random_positions = positions[(draws >= MASKED_SHARE) & (draws < MASKED_SHARE + RANDOM_SHARE)]
        masked_ids[random_positions] = self.generator().choice(self.ordinary_ids, len(random_positions))
        return masked_ids, labels

    def generator(self) -> np.random.Generator:
        """This process' generator; a forked DataLoader worker would otherwise repeat the masks of its siblings."""
        worker_info = get_worker_info()
        owner = (os.getpid(), worker_info.id if worker_info else None)
        if self._generator_owner != owner:
            worker_entropy = [] if worker_info is None else [worker_info.id + 1]
            entropy = None if self.seed is None else [self.seed, *worker_entropy]
            self._generator, self._generator_owner = np.random.default_rng(entropy), owner
        return self._generator

    def state_dict(self) -> dict:
        return {"generator": self.generator().bit_generator.state}

    def load_state_dict(self, state: dict) -> None:
        """Continue with the masks that would have come next in the process that took the state."""
        self.generator().bit_generator.state = state["generator"]
