"""How well a pretrained model fills in held-out text."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from src.models import LeanAlbertForPreTraining
from tasks.mlm.data import make_training_dataset
from tasks.mlm.whole_word_mask import DataCollatorForWholeWordMask


@dataclass(frozen=True)
class HeldOutScore:
    """Scores over masked tokens; entropy and loss in nats.

    ``unigram_entropy`` is the entropy of the masked tokens' own frequencies: the loss of a model that ignores context
    and knows these very frequencies, on which every masked language model first lingers. ``order_accuracy``: None for
    text in which there is no order to predict.
    """

    loss: float
    accuracy: float
    order_accuracy: float | None
    unigram_entropy: float
    num_masked: int


def held_out_batches(
    tokenizer,
    sources: Sequence[str],
    *,
    num_instances: int = 2048,
    max_sequence_length: int = 128,
    batch_size: int = 32,
    sentence_order: bool = True,
) -> list[dict[str, torch.Tensor]]:
    """Batches of held-out text, the same ones at each call, in the layout that was trained; 15 % of it is masked,
    whatever a run trains with."""
    dataset = make_training_dataset(
        tokenizer, sources=sources, shuffle_seed=0, max_sequence_length=max_sequence_length, batch_size=batch_size,
        sentence_order=sentence_order,
    )  # fmt: skip
    instances = list(itertools.islice(dataset, num_instances))
    collator = DataCollatorForWholeWordMask(tokenizer, seed=0)
    return list(DataLoader(instances, batch_size=batch_size, collate_fn=collator))


@torch.no_grad()
def evaluate(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> HeldOutScore:
    """Score a `LeanAlbertForPreTraining` on batches from `held_out_batches`."""
    was_training, sparse = model.training, model.config.sparse_prediction
    model.eval()
    model.config.sparse_prediction = True
    device = next(model.parameters()).device
    loss_sum, right, right_order, num_orders, frequencies = 0.0, 0, 0, 0, Counter()
    try:
        for batch in batches:
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            outputs = model(**batch)
            labels = batch["labels"][batch["labels"] != -100]
            loss_sum += float(outputs.mlm_loss) * len(labels)
            right += int((outputs.prediction_logits.argmax(-1) == labels).sum())
            frequencies.update(labels.tolist())
            order = batch["sentence_order_label"]
            right_order += int((outputs.sop_logits.argmax(-1) == order)[order != -100].sum())
            num_orders += int((order != -100).sum())
    finally:
        model.config.sparse_prediction = sparse
        model.train(was_training)
    total = sum(frequencies.values())
    entropy = -sum(count / total * math.log(count / total) for count in frequencies.values())
    order_accuracy = right_order / num_orders if num_orders else None
    return HeldOutScore(loss_sum / total, right / total, order_accuracy, entropy, total)


def checkpoint_scorer(
    tokenizer, sources: Sequence[str], *, num_batches: int, sentence_order: bool = True
) -> Callable[[Path], dict[str, float]]:
    """A function that scores a checkpoint directory on held-out text, always the same batches of 32 x 128 tokens.

    The text is read here, so that a wrong source is an error now and not at the first checkpoint.
    """
    batch_size = 32
    batches = held_out_batches(tokenizer, sources, num_instances=num_batches * batch_size, batch_size=batch_size,
                               sentence_order=sentence_order)  # fmt: skip

    def score(checkpoint: Path) -> dict[str, float]:
        return dataclasses.asdict(evaluate(LeanAlbertForPreTraining.from_pretrained(checkpoint), batches))

    return score
