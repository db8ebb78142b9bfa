"""What holds for the encoded records of every task."""

import copy

import pytest
import torch

from src.models import LeanAlbertConfig, LeanAlbertModel
from tasks.registry import TASKS

tasks = pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))


def length(row):
    ids = row["input_ids"]
    return max(map(len, ids)) if isinstance(ids, list) else len(ids)


@tasks
@pytest.mark.parametrize("max_length", [16, 40, 512])
def test_no_row_is_longer_than_max_length(task, max_length, data_dir, tiny_tokenizer):
    for split, records in task.load(data_dir).items():
        encoded = task.encode_split(records, tiny_tokenizer, max_length=max_length, training=split == "train")
        assert encoded.rows
        assert max(map(length, encoded.rows)) <= max_length
        assert sorted(set(encoded.owners)) == list(range(len(records)))


@tasks
def test_rows_have_labels_exactly_where_records_have(task, data_dir, tiny_tokenizer):
    for split, records in task.load(data_dir).items():
        encoded = task.encode_split(records, tiny_tokenizer, max_length=64, training=split == "train")
        known = split != "test" or task.name == "LiDiRus"
        assert all(("labels" in row) == known for row in encoded.rows)


@tasks
def test_encoding_leaves_records_as_they_are(task, data_dir, tiny_tokenizer):
    for records in task.load(data_dir).values():
        before = copy.deepcopy(records)
        task.encode_split(records, tiny_tokenizer, max_length=64, training=True)
        assert records == before


@tasks
def test_model_trains_on_the_batches_and_its_logits_become_a_submission(task, data_dir, tiny_tokenizer, tmp_path):
    torch.manual_seed(0)
    splits = task.load(data_dir)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = LeanAlbertConfig(**sizes, embedding_size=8, vocab_size=len(tiny_tokenizer))
    model = task.build_model(LeanAlbertModel(config), dropout=0.1)
    collate = task.collator(tiny_tokenizer, pad_to_multiple_of=8)
    records = splits.get("train", splits["test"])
    train = task.encode_split(records, tiny_tokenizer, max_length=64, training=True)
    batch = collate(train.rows)
    before = batch["labels"].clone()
    model(**batch).loss.backward()
    assert torch.equal(batch["labels"], before)

    test = task.encode_split(splits["test"], tiny_tokenizer, max_length=64, training=False)
    model.eval()
    with torch.no_grad():
        logits = [
            row
            for start in range(0, len(test.rows), 2)
            for row in model(**collate(test.rows[start : start + 2])).logits.numpy()
        ]
    predictions = task.predict(logits, test, splits["test"])
    path = task.write_submission(tmp_path, splits["test"], predictions)
    task.check_submission(path, splits["test"])
    if "validation" in splits:
        shown = task.encode_split(splits["validation"], tiny_tokenizer, max_length=64, training=False)
        with torch.no_grad():
            logits = list(model(**collate(shown.rows)).logits.numpy())
        scores = task.score(task.predict(logits, shown, splits["validation"]), splits["validation"])
        assert task.main_metric in scores
        assert all(isinstance(value, float) for value in scores.values())


@tasks
def test_slow_tokenizers_are_refused(task):
    class SlowTokenizer:
        is_fast = False

    with pytest.raises(ValueError, match="needs a fast tokenizer"):
        task.encode_split([], SlowTokenizer(), max_length=8, training=False)


@tasks
def test_published_scores_use_the_names_of_the_metrics(task, data_dir):
    splits = task.load(data_dir)
    records = splits.get("validation", splits["test"])
    train = splits.get("train", splits["test"])
    scores = task.score(task.majority_predictions(train, records), records)
    assert all(published.keys() <= scores.keys() for published in task.published_scores.values())
    assert task.main_metric in scores
    assert "RuLeanALBERT" in task.published_scores or task.name == "RuCoLA"
