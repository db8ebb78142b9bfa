import numpy as np
import pytest

from tasks.finetuning.encoding import EncodedSplit, encode_text, model_inputs, with_label

SHORT, LONG = "Кто там?", "Лиса поймала мышь и унесла её в лес. " * 4 + "Конец"


def parts(tokenizer, encoding):
    owners = np.array([-1 if owner is None else owner for owner in encoding.sequence_ids()])
    return [tokenizer.decode(np.asarray(encoding["input_ids"])[owners == sequence]) for sequence in (0, 1)]


@pytest.mark.parametrize("kept", [SHORT, LONG])
@pytest.mark.parametrize("keep", ["first", "second"])
def test_encode_text_keeps_the_important_text_whole(tiny_tokenizer, kept, keep):
    """Also where it is the longer one."""
    max_length = len(tiny_tokenizer(kept)["input_ids"]) + 6
    pair = (kept, LONG) if keep == "first" else (LONG, kept)
    encoding = encode_text(tiny_tokenizer, *pair, max_length=max_length, keep=keep)
    assert len(encoding["input_ids"]) == max_length
    texts = parts(tiny_tokenizer, encoding)
    whole, cut = texts if keep == "first" else texts[::-1]
    assert whole == kept
    assert LONG.startswith(cut)


@pytest.mark.parametrize("keep", ["first", "second", None])
def test_encode_text_never_exceeds_the_length_even_if_the_important_text_does(tiny_tokenizer, keep):
    for max_length in range(5, 40, 7):
        for pair in ((LONG, LONG), (SHORT, LONG), (LONG, SHORT), (LONG, None)):
            encoding = encode_text(tiny_tokenizer, *pair, max_length=max_length, keep=keep)
            assert len(encoding["input_ids"]) <= max_length


def test_encode_text_leaves_short_texts_alone(tiny_tokenizer):
    assert (
        encode_text(tiny_tokenizer, SHORT, SHORT, max_length=64, keep="first")["input_ids"]
        == (tiny_tokenizer(SHORT, SHORT)["input_ids"])
    )


def test_model_inputs_follow_the_tokenizer(tiny_tokenizer):
    encoding = encode_text(tiny_tokenizer, SHORT, max_length=64)
    assert set(model_inputs(tiny_tokenizer, encoding)) == {"input_ids", "token_type_ids", "attention_mask"}


def test_with_label_adds_known_labels_only():
    row = {"input_ids": 1}
    assert with_label(row, {"label": 0}) == {"input_ids": 1, "labels": 0}
    assert with_label(row, {"label": None}) == row == {"input_ids": 1}


def test_rows_of_records_lists_records_without_rows_too():
    assert EncodedSplit(rows=[{}, {}, {}], owners=[0, 0, 2]).rows_of_records(4) == [[0, 1], [], [2], []]
