"""Sequence classification on any backbone, and choice between several inputs."""

import copy

import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.utils import ModelOutput

import src.models  # noqa: F401, makes LeanALBERT known to the Auto classes

CLASSIFIER_DROPOUT_OPTIONS = ("classifier_dropout_prob", "classifier_dropout", "cls_dropout", "summary_last_dropout")


def sequence_classifier(backbone: nn.Module, *, num_labels: int, dropout: float) -> nn.Module:
    """The architecture's own classification model around the given backbone, with a fresh classifier.

    `dropout` is that of the classifier alone, whatever the architecture calls it. A pooler that the classifier does
    not use is taken off the backbone, so that no parameter is left without a gradient.
    """
    config = copy.deepcopy(backbone.config)
    config.num_labels = num_labels
    for option in CLASSIFIER_DROPOUT_OPTIONS:
        if hasattr(config, option):
            setattr(config, option, dropout)
    model = AutoModelForSequenceClassification.from_config(config)
    if getattr(model.base_model, "pooler", None) is None and getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None
    setattr(model, model.base_model_prefix, backbone)
    return model


class ChoiceModel(nn.Module):
    """Scores each of several inputs with a one-label classifier; the scores of a row compete in a softmax."""

    def __init__(self, scorer: nn.Module):
        super().__init__()
        self.scorer = scorer

    def forward(self, input_ids, labels=None, **inputs):
        """logits [batch, choices]; input_ids and other inputs: [batch, choices, length]; labels: [batch]."""
        batch_size, num_choices, _ = input_ids.shape
        flat = {name: value.flatten(0, 1) for name, value in inputs.items()}  # [batch * choices, length]
        logits = self.scorer(input_ids=input_ids.flatten(0, 1), **flat).logits.view(batch_size, num_choices)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return ModelOutput(loss=loss, logits=logits)
