"""A tiny model learns 32 real records of every task by heart: what is labelled, masked or paired wrongly cannot be."""

import pytest
import torch

from src.models import LeanAlbertConfig, LeanAlbertModel
from tasks.finetuning.inference import predict_logits
from tasks.registry import TASKS

NUM_RECORDS, BATCH_SIZE, MAX_STEPS, WARMUP = 32, 16, 800, 30
LEARNT_TASKS = [task for task in TASKS.values() if task.trained_on is None]


@pytest.mark.parametrize("task", LEARNT_TASKS, ids=lambda task: task.name)
def test_tiny_model_learns_32_real_records_by_heart(task, shared_data_dir, demo_tokenizer):
    records = mixed_labels(task, task.load(shared_data_dir, splits=("train",))["train"])[:NUM_RECORDS]
    encoded = task.encode_split(records, demo_tokenizer, max_length=192, training=True)
    collator = task.collator(demo_tokenizer)
    torch.manual_seed(0)
    model = task.build_model(tiny_encoder(len(demo_tokenizer)), dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    for step in range(1, MAX_STEPS + 1):
        model.train()
        optimizer.zero_grad()
        rows = torch.randperm(len(encoded.rows))[:BATCH_SIZE]
        model(**collator([encoded.rows[i] for i in rows])).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 and training_accuracy(task, model, collator, encoded, records) == 1.0:
            return
    pytest.fail(f"accuracy {training_accuracy(task, model, collator, encoded, records):.4f} after {step} steps")


def tiny_encoder(vocab_size: int) -> LeanAlbertModel:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "embedding_size": 32}
    return LeanAlbertModel(LeanAlbertConfig(**sizes, num_hidden_layers=2, vocab_size=vocab_size))


def mixed_labels(task, records):
    """The records with one of each label in turn, so that the first 32 hold as many of each."""
    if task.name == "RuCoS":
        return [record for record in records if not has_divided_answer(task, record)]
    by_label = {}
    for record in records:
        by_label.setdefault(record["label"], []).append(record)
    return [record for group in zip(*by_label.values(), strict=False) for record in group]


def has_divided_answer(task, record) -> bool:
    """Whether two wrong candidates make up a right one, as "МИДа" and "Олег Волошин" do "МИДа Олег Волошин".

    The mean state of the whole lies between theirs; a head that sees means takes very long to score it above both.
    """
    spans = task.candidates(record, training=True)
    return any(
        task.is_answer(record, (start, end))
        and any(other[0] == start and other[1] < end for other in spans)
        and any(other[1] == end and other[0] > start for other in spans)
        for start, end in spans
    )


def training_accuracy(task, model, collator, encoded, records) -> float:
    """The share of records (RuCoS, MuSeRC: of questions) that are answered right, by the task's own score."""
    logits = predict_logits(model, encoded.rows, collator, batch_size=32, precision="fp32")
    scores = task.score(task.predict(logits, encoded, records), records)
    return scores["em"] if "em" in scores else scores["accuracy"]
