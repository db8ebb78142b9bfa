import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from src import LeanAlbertModel
from src.models.heads import EntityChoiceModel, SpanClassificationModel, span_means


class Backbone(nn.Module):
    """An encoder that is not ours: an embedding, returning `last_hidden_state` alone."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(61, 32)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        return types.SimpleNamespace(last_hidden_state=self.embedding(input_ids))


@pytest.fixture
def entities(encoder_inputs):
    mask = torch.zeros(2, 4, 11, dtype=torch.long)
    mask[0, 0, 2:4] = 1
    mask[0, 1, 5] = 1
    mask[0, 2, 6:9] = 1
    mask[1, 0, 1:3] = 1
    mask[1, 2, 4] = 1  # marked, and yet labelled as padding
    labels = torch.tensor([[0, 1, 0, -1], [1, -1, -1, -1]])
    return {**encoder_inputs, "entity_mask": mask, "labels": labels}


def test_span_means_are_means_of_the_marked_states():
    states = torch.arange(24.0).view(1, 6, 4)
    masks = torch.tensor([[[0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]]])
    expected = torch.stack([states[0, 1:3].mean(0), states[0, 5], torch.zeros(4)])
    torch.testing.assert_close(span_means(states, masks), expected[None])


def test_span_classification_works_without_a_pooler(encoder_inputs):
    model = SpanClassificationModel(Backbone(), 3, hidden_size=32, dropout_prob=0.0)
    masks = {"e1_mask": torch.zeros(2, 11), "e2_mask": torch.ones(2, 11)}
    outputs = model(**encoder_inputs, **masks, labels=torch.tensor([2, 0]))
    states = model.backbone.embedding(encoder_inputs["input_ids"])
    parts = [
        model.cls_fc_layer.layers[2](states[:, 0].tanh()),
        model.e1_fc_layer.layers[2](torch.zeros(2, 32)),
        model.e2_fc_layer.layers[2](states.mean(1).tanh()),
    ]
    expected = model.label_classifier.layers[1](torch.cat(parts, -1))
    torch.testing.assert_close(outputs.logits, expected)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(expected, torch.tensor([2, 0])))


def test_entity_choice_loss_counts_real_entities_of_each_row(entities):
    model = EntityChoiceModel(Backbone(), hidden_size=32).eval()
    outputs = model(**entities)
    logits = outputs.logits
    first = F.binary_cross_entropy_with_logits(logits[0, :3], torch.tensor([0.0, 1.0, 0.0]))
    second = F.binary_cross_entropy_with_logits(logits[1, :1], torch.tensor([1.0]))
    torch.testing.assert_close(outputs.loss, (first + second) / 2)


def test_entity_choice_leaves_labels_alone_and_empty_entities_never_win(entities):
    model = EntityChoiceModel(Backbone(), hidden_size=32).eval()
    with torch.no_grad():
        model.clf[3].bias.fill_(-1000.0)
    before = entities["labels"].clone()
    logits = model(**entities).logits
    assert torch.equal(entities["labels"], before)
    empty = entities["entity_mask"].sum(-1) == 0
    assert (logits[empty] == -10000).all()
    assert not empty.gather(1, logits.argmax(-1, keepdim=True)).any()


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_entity_choice_makes_no_tensor_of_entities_times_length_times_hidden(entities):
    model = EntityChoiceModel(Backbone(), hidden_size=32)
    mask = entities["entity_mask"].repeat(1, 8, 1)
    with LargestTensor() as seen:
        model(**{**entities, "entity_mask": mask, "labels": None})
    assert 0 < seen.largest < mask.numel() * 32


def test_heads_train_under_autocast(tiny_config, entities):
    model = EntityChoiceModel(LeanAlbertModel(tiny_config()))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**entities).loss
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    unused = {name for name, gradient in gradients.items() if gradient is None}
    assert unused == {"backbone.pooler.weight", "backbone.pooler.bias"}
