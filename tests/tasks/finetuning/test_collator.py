import copy
from types import SimpleNamespace

import numpy as np
import pytest

from tasks.finetuning.collator import PaddingCollator


def settings(side="right"):
    return SimpleNamespace(pad_token_id=9, pad_token_type_id=0, padding_side=side)


def array(*values):
    return np.asarray(values, dtype=np.int32)


def test_collator_pads_token_fields_with_their_own_value():
    rows = [
        {"input_ids": array(2, 5, 3), "attention_mask": array(1, 1, 1), "e1_mask": array(0, 1, 0), "labels": 1},
        {"input_ids": array(2, 3), "attention_mask": array(1, 1), "e1_mask": array(1, 0), "labels": 0},
    ]
    batch = PaddingCollator(settings())(rows)
    assert batch["input_ids"].tolist() == [[2, 5, 3], [2, 3, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["e1_mask"].tolist() == [[0, 1, 0], [1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]


def test_collator_pads_on_the_left_where_the_tokenizer_does():
    rows = [{"input_ids": array(2, 5, 3)}, {"input_ids": array(4)}, {"input_ids": array()}]
    assert PaddingCollator(settings("left"))(rows)["input_ids"].tolist() == [[2, 5, 3], [9, 9, 4], [9, 9, 9]]


def test_collator_rounds_the_length_up_to_a_multiple():
    batch = PaddingCollator(settings(), pad_to_multiple_of=4)([{"input_ids": array(1, 1, 1, 1, 1)}])
    assert batch["input_ids"].tolist() == [[1, 1, 1, 1, 1, 9, 9, 9]]


def test_collator_pads_lists_of_arrays_in_both_directions():
    rows = [
        {"input_ids": array(2, 5, 3), "entity_mask": [array(0, 1, 0), array(0, 0, 1)], "labels": [1, 0]},
        {"input_ids": array(2, 3), "entity_mask": [array(1, 0)], "labels": [1]},
    ]
    batch = PaddingCollator(settings("left"))(rows)
    assert batch["entity_mask"].tolist() == [[[0, 1, 0], [0, 0, 1]], [[0, 1, 0], [0, 0, 0]]]
    assert batch["labels"].tolist() == [[1, 0], [1, -1]]


def test_collator_pads_the_choices_of_a_row_to_one_length():
    rows = [{"input_ids": [array(2, 5, 3), array(2, 3)]}, {"input_ids": [array(2), array(2, 7, 7, 3)]}]
    assert PaddingCollator(settings())(rows)["input_ids"].tolist() == [
        [[2, 5, 3, 9], [2, 3, 9, 9]],
        [[2, 9, 9, 9], [2, 7, 7, 3]],
    ]


def test_collator_leaves_its_rows_as_they_are():
    rows = [{"input_ids": array(2, 5), "labels": [1]}, {"input_ids": array(2), "labels": [0, 1]}]
    before = copy.deepcopy(rows)
    PaddingCollator(settings())(rows)
    for row, old in zip(rows, before, strict=True):
        assert row["labels"] == old["labels"]
        assert row["input_ids"].tolist() == old["input_ids"].tolist()


def test_collator_refuses_rows_with_different_fields():
    rows = [{"input_ids": array(2), "labels": 1}, {"input_ids": array(2)}]
    with pytest.raises(ValueError, match="rows 0 and 1 of a batch have different fields: labels"):
        PaddingCollator(settings())(rows)
