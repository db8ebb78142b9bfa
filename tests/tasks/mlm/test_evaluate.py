"""Held-out scores against values worked out by hand, and the same batches at each call."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from src import load_tokenizer
from tasks.mlm.evaluate import evaluate, held_out_batches


class ScriptedModel(torch.nn.Module):
    """Predicts token 5 with probability 1/2 and tokens 6, 7 with 1/4 each; order 0 always."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(sparse_prediction=False)

    def forward(self, labels, sentence_order_label, **_):
        logits = torch.full((8,), -1e9)
        logits[5], logits[6], logits[7] = math.log(0.5), math.log(0.25), math.log(0.25)
        masked = labels[labels != -100]
        logits = logits.expand(len(masked), -1)
        return SimpleNamespace(
            mlm_loss=torch.nn.functional.cross_entropy(logits, masked),
            prediction_logits=logits,
            sop_logits=torch.tensor([1.0, 0.0]).expand(len(sentence_order_label), -1),
        )


def batch(labels, orders):
    labels = torch.tensor(labels)
    return {"input_ids": torch.zeros_like(labels), "labels": labels, "sentence_order_label": torch.tensor(orders)}


def test_evaluate_matches_values_worked_out_by_hand():
    batches = [batch([[5, -100, 5], [6, -100, -100]], [0, 1]), batch([[7, -100, -100]], [-100])]
    score = evaluate(ScriptedModel(), batches)
    assert score.num_masked == 4
    assert score.loss == pytest.approx((2 * math.log(2) + 2 * math.log(4)) / 4)
    assert score.accuracy == pytest.approx(0.5)  # both fives
    assert score.order_accuracy == pytest.approx(0.5)  # one of the two rows that have an order
    assert score.unigram_entropy == pytest.approx(1.5 * math.log(2))  # frequencies 1/2, 1/4, 1/4


def test_evaluate_leaves_the_model_as_it_was():
    model = ScriptedModel().train()
    evaluate(model, [batch([[5]], [0])])
    assert model.training
    assert model.config.sparse_prediction is False


def test_held_out_batches_are_the_same_at_each_call(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Это документ номер {i}. В нём две фразы." for i in range(40)), encoding="utf-8")
    tokenizer = load_tokenizer(Path(__file__).resolve().parents[3] / "demo" / "tokenizer")
    first, second = (
        held_out_batches(tokenizer, [str(text)], num_instances=12, max_sequence_length=32, batch_size=4)
        for _ in range(2)
    )
    assert len(first) == 3
    for one, other in zip(first, second, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name])


def test_held_out_text_is_laid_out_as_it_was_trained_and_masked_at_15_percent(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Это документ номер {i}. В нём две фразы." for i in range(80)), encoding="utf-8")
    tokenizer = load_tokenizer(Path(__file__).resolve().parents[3] / "demo" / "tokenizer")
    options = {"num_instances": 64, "max_sequence_length": 64}
    two, one = (held_out_batches(tokenizer, [str(text)], **options, sentence_order=order) for order in (True, False))
    assert any(batch["token_type_ids"].any() for batch in two)
    assert not any(batch["token_type_ids"].any() for batch in one)
    num_masked = sum(int((batch["labels"] != -100).sum()) for batch in one)
    num_words = sum(int(batch["attention_mask"].sum()) - 2 * len(batch["labels"]) for batch in one)
    assert num_masked / num_words == pytest.approx(0.15, abs=0.02)
    assert {int(label) for batch in one for label in batch["sentence_order_label"]} == {-100}


def test_order_that_nobody_predicts_has_no_score():
    assert evaluate(ScriptedModel(), [batch([[5, 6]], [-100])]).order_accuracy is None
