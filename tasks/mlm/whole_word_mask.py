"""Whole-word masking: batches of instances with words hidden for the model to predict (BERT, arXiv 1810.04805)."""

import itertools
import os
from array import array
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch.utils.data import get_worker_info

from tasks.mlm import mask_kernel

IGNORED_LABEL = -100
PROBED_WORDS = ("мы", "дом", "весна", "the", "word")  # beside some of the vocabulary's own
NUM_PROBED_WORDS = 50


def lay_out(rows: Iterable[Sequence[int]]) -> np.ndarray:
    """Rows end to end, int32. Rows that are arrays, as the dataset gives them, are copied without a loop in Python."""
    arrays = (row if isinstance(row, array) and row.typecode == "i" else array("i", row) for row in rows)
    return np.frombuffer(bytearray().join(arrays), dtype=np.int32)


def read_value(number) -> float:
    """A number, or what a multiprocessing.Value holds now."""
    return getattr(number, "value", number)


def check_word_marks(tokenizer, tokens: Sequence[str], starts_word: Sequence[bool]) -> None:
    """Raises ValueError unless the tokenizer begins words with "▁".

    A vocabulary that holds "▁" need not: one made of web text has it as a character like any other and marks the
    insides of words ("##") or bytes after a blank ("Ġ"). So some words are tokenised, each twice in one text, because
    a tokenizer may leave out the mark at a text's very start.
    """
    if not any(starts_word):
        raise ValueError("no token of the vocabulary starts with '▁', so the words' borders are not known")
    candidates = [
        token[1:] for token, starts in zip(tokens, starts_word, strict=True) if starts and token[1:].isalpha()
    ]
    words = [*PROBED_WORDS, *candidates[:: len(candidates) // NUM_PROBED_WORDS + 1]]
    rows = tokenizer([f"{word} {word}" for word in words], add_special_tokens=False)["input_ids"]
    rows = [row for row in rows if any(token_id != tokenizer.unk_token_id for token_id in row)]
    num_marked = sum(any(starts_word[token_id] for token_id in row) for row in rows)
    if 2 * num_marked <= len(rows):
        raise ValueError(
            "the vocabulary holds '▁', but the tokenizer does not begin words with it, so the words' borders are not "
            "known; take one of the SentencePiece kind"
        )


class DataCollatorForWholeWordMask:
    """Pad a list of instances to the longest and mask whole words: tensors for `LeanAlbertForPreTraining`.

    A word begins at a piece with "▁" or after a special token. Words are visited in random order and masked while they
    fit a budget of round(mlm_probability * real tokens), at least 1, per row; a word that would exceed it is skipped. A
    row in which no word fits gets its shortest one, so that every row has something to predict. Words that hold an
    unknown piece are never masked. Of the chosen tokens 80 % become [MASK], 10 % a random ordinary token, 10 % stay.

    mlm_probability: a number, or a multiprocessing.Value read at each batch, so that it may change. seed: None takes
    fresh entropy. Each DataLoader worker has a generator of its own.
    """

    def __init__(
        self,
        tokenizer,
        mlm_probability=0.15,
        pad_to_multiple_of: int | None = None,
        seed: int | None = None,
    ):
        if tokenizer.mask_token is None or tokenizer.pad_token is None:
            missing = "mask_token" if tokenizer.mask_token is None else "pad_token"
            raise ValueError(f"the tokenizer has no {missing}; name it in its special_tokens_map.json")
        if not 0 < read_value(mlm_probability) < 1:
            raise ValueError(f"mlm_probability is {read_value(mlm_probability)}, should lie between 0 and 1")
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of is {pad_to_multiple_of}, should be at least 1")
        self.mlm_probability = mlm_probability
        self.pad_to_multiple_of = pad_to_multiple_of
        self.seed = seed
        self.mask_token_id, self.pad_token_id = tokenizer.mask_token_id, tokenizer.pad_token_id
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        starts_word = [token.startswith("▁") for token in tokens]
        check_word_marks(tokenizer, tokens, starts_word)
        self.kinds = np.array(starts_word, dtype=np.uint8)  # of each id, see mask_kernel
        self.kinds[tokenizer.all_special_ids] = mask_kernel.BORDER
        if tokenizer.unk_token_id is not None:
            self.kinds[tokenizer.unk_token_id] = mask_kernel.UNKNOWN
        self.ordinary_ids = np.flatnonzero(self.kinds < mask_kernel.BORDER).astype(np.int32)
        self._generator: np.random.Generator | None = None
        self._generator_owner: tuple | None = None

    def __call__(self, instances: Sequence[dict]) -> dict[str, torch.Tensor]:
        """int64 input_ids, attention_mask, token_type_ids, labels: [batch, length]; sentence_order_label: [batch].

        Packed rows also give instance_index, see `LeanAlbertForPreTraining.forward`, and their sentence_order_label is
        [instances]. The masks are those that the same instances would get one by one.
        """
        lengths = np.array([len(instance["input_ids"]) for instance in instances], dtype=np.int32)
        ids = lay_out(instance["input_ids"] for instance in instances)
        types = lay_out(instance["token_type_ids"] for instance in instances)
        is_packed = "instance_lengths" in instances[0]
        instance_lengths = lay_out(each["instance_lengths"] for each in instances) if is_packed else lengths
        ids, labels = self._mask(ids, np.cumsum(instance_lengths, dtype=np.int32))
        fields = {
            "input_ids": (ids, self.pad_token_id),
            "attention_mask": (np.ones_like(ids), 0),
            "token_type_ids": (types, 0),
            "labels": (labels, IGNORED_LABEL),
        }
        order_labels = [instance["sentence_order_label"] for instance in instances]
        if is_packed:
            numbers = np.arange(1, len(instance_lengths) + 1, dtype=np.int32)
            fields["instance_index"] = (np.repeat(numbers, instance_lengths), 0)
            order_labels = list(itertools.chain.from_iterable(order_labels))
        batch = self._pad(fields, np.cumsum(lengths, dtype=np.int32), int(lengths.max()))
        return {**batch, "sentence_order_label": torch.tensor(order_labels)}

    def _pad(self, fields: dict[str, tuple[np.ndarray, int]], ends: np.ndarray, longest: int) -> dict:
        """Name -> values of the rows laid end to end and what to fill up with; int64 [rows, width] of each."""
        multiple = self.pad_to_multiple_of or 1
        width = -(-longest // multiple) * multiple
        # One block of memory: glibc would return several to the system after each batch, and getting them back is slow.
        padded = np.empty((len(fields), len(ends), width), dtype=np.int64)
        for (values, filler), target in zip(fields.values(), padded, strict=True):
            mask_kernel.pad_rows(values, ends, filler, target)
        return {name: torch.from_numpy(values) for name, values in zip(fields, padded, strict=True)}

    def _mask(self, ids: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Input ids with the chosen tokens hidden, which overwrites them, and labels: both int32 [tokens]."""
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(self.kinds):  # compiled code would read anything
            found = f"token ids {ids.min()} to {ids.max()}"
            raise ValueError(f"{found} for a vocabulary of {len(self.kinds)}: made by another tokenizer?")
        state = self.generator().integers(2**64, size=1, dtype=np.uint64)
        labels = np.full_like(ids, IGNORED_LABEL)
        mask_kernel.choose_tokens(ids, ends, self.kinds, read_value(self.mlm_probability), state, labels)
        mask_kernel.hide(ids, labels, self.mask_token_id, self.ordinary_ids, state)
        return ids, labels

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
