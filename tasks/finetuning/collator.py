"""Pads rows of a split to a batch, with any extra fields a task has."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch


def pad_arrays(values: Sequence, *, length: int, pad_value: int, side: str) -> np.ndarray:
    """Stacks 1-d arrays of different lengths: [len(values), length]."""
    padded = np.full((len(values), length), pad_value, dtype=np.int64)
    for row, value in zip(padded, values, strict=True):
        if side == "left":
            row[length - len(value) :] = value  # not row[-len(value):], which is the whole row for an empty value
        else:
            row[: len(value)] = value
    return padded


class PaddingCollator:
    """Turns a list of rows into a dictionary of int64 tensors.

    A row's field is an integer ([batch]), an array over tokens ([batch, length]) or a list of such arrays
    ([batch, items, length]: the two choices of PARus, the candidates of RuCoS). Missing items are rows of padding.
    `labels` are integers ([batch]) or lists of one label per item ([batch, items], padded with -1). The rows
    themselves are never changed.
    """

    label_padding = -1

    def __init__(self, tokenizer, *, pad_to_multiple_of: int | None = None):
        self.pad_values = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        self.padding_side = tokenizer.padding_side
        self.pad_to_multiple_of = pad_to_multiple_of

    def fields(self, row: Mapping) -> dict:
        """The fields of a row that go to the model."""
        return dict(row)

    def __call__(self, rows: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        batch = [self.fields(row) for row in rows]
        for number, row in enumerate(batch):
            if row.keys() != batch[0].keys():
                odd = ", ".join(sorted(row.keys() ^ batch[0].keys()))
                raise ValueError(f"rows 0 and {number} of a batch have different fields: {odd}")
        return {
            name: torch.from_numpy(self._collate(name, [row[name] for row in batch], self._batch_length(batch)))
            for name in batch[0]
        }

    def _batch_length(self, batch: list[dict]) -> int:
        length = max(len(item) for row in batch for item in _as_items(row["input_ids"]))
        multiple = self.pad_to_multiple_of or 1
        return -(-length // multiple) * multiple

    def _collate(self, name: str, values: list, length: int) -> np.ndarray:
        if isinstance(values[0], int):
            return np.asarray(values, dtype=np.int64)
        if name == "labels":
            num_items = max(map(len, values))
            return pad_arrays(values, length=num_items, pad_value=self.label_padding, side="right")
        pad_value = self.pad_values.get(name, 0)
        if isinstance(values[0], np.ndarray):
            return pad_arrays(values, length=length, pad_value=pad_value, side=self.padding_side)
        padded = np.full((len(values), max(map(len, values)), length), pad_value, dtype=np.int64)
        for row, items in zip(padded, values, strict=True):
            if items:
                row[: len(items)] = pad_arrays(items, length=length, pad_value=pad_value, side=self.padding_side)
        return padded


def _as_items(value) -> list:
    return value if isinstance(value, list) else [value]
