"""Heads for fine-tuning tasks whose inputs mark spans of the text: span pairs (RUSSE) and entity choice (RuCoS).

Both wrap any backbone that returns `last_hidden_state`; where it returns no `pooler_output`, the first token's state
takes its place.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

IMPOSSIBLE_LOGIT = -10000.0
PADDED_ENTITY = -1


class FullyConnected(nn.Module):
    """Dropout, tanh (unless `activated` is False), linear."""

    def __init__(self, in_features, out_features, *, dropout_prob, activated=True):
        super().__init__()
        activation = [nn.Tanh()] if activated else []
        self.layers = nn.Sequential(nn.Dropout(dropout_prob), *activation, nn.Linear(in_features, out_features))

    def forward(self, inputs):
        return self.layers(inputs)


def span_means(hidden_states, masks):
    """Mean state of each span, [batch, spans, hidden_size], by one batched matrix product; 0 for an empty span.

    hidden_states: [batch, length, hidden_size]; masks: [batch, spans, length], non-zero inside the span. As in the
    original, states are weighted by the mask and divided by the number of its non-zero entries.
    """
    counts = (masks != 0).sum(dim=-1, keepdim=True).clamp(min=1)  # [batch, spans, 1]
    return (masks.to(hidden_states.dtype) @ hidden_states) / counts


class SpanClassificationModel(nn.Module):
    """Classifies a pair of spans from [first token, span 1, span 2] (R-BERT, arXiv 1905.08284)."""

    def __init__(self, backbone, num_labels=2, *, hidden_size=None, dropout_prob=0.1):
        super().__init__()
        hidden_size = hidden_size or backbone.config.hidden_size
        self.backbone = backbone
        self.cls_fc_layer = FullyConnected(hidden_size, hidden_size, dropout_prob=dropout_prob)
        self.e1_fc_layer = FullyConnected(hidden_size, hidden_size, dropout_prob=dropout_prob)
        self.e2_fc_layer = FullyConnected(hidden_size, hidden_size, dropout_prob=dropout_prob)
        self.label_classifier = FullyConnected(3 * hidden_size, num_labels, dropout_prob=dropout_prob, activated=False)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, *, e1_mask, e2_mask, labels=None):
        """logits [batch, num_labels]; e1_mask, e2_mask: [batch, length]; labels: [batch] classes."""
        outputs = self.backbone(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        hidden_states = outputs.last_hidden_state
        pooled = getattr(outputs, "pooler_output", None)
        if pooled is None:
            pooled = hidden_states[:, 0]
        spans = span_means(hidden_states, torch.stack([e1_mask, e2_mask], dim=1))  # [batch, 2, hidden_size]
        features = [self.cls_fc_layer(pooled), self.e1_fc_layer(spans[:, 0]), self.e2_fc_layer(spans[:, 1])]
        logits = self.label_classifier(torch.cat(features, dim=-1))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels.flatten())
        return SequenceClassifierOutput(loss=loss, logits=logits)


class EntityChoiceModel(nn.Module):
    """Scores every candidate entity of a text from the mean state of its tokens."""

    def __init__(self, backbone, *, hidden_size=None, dropout_prob=0.1):
        super().__init__()
        hidden_size = hidden_size or backbone.config.hidden_size
        self.backbone = backbone
        self.clf = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Dropout(dropout_prob), nn.Linear(hidden_size, 1)
        )

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, *, entity_mask, labels=None):
        """logits [batch, entities]; entity_mask: [batch, entities, length]; labels: [batch, entities], 1 = right
        answer, 0 = wrong one, -1 = padding.

        An entity without tokens gets a logit of -10000 and so never wins. The loss is the binary cross-entropy,
        averaged over the real entities of a row, then over rows.
        """
        outputs = self.backbone(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        means = span_means(outputs.last_hidden_state, entity_mask)
        logits = self.clf(means).squeeze(-1)  # [batch, entities]
        logits = logits.masked_fill(~(entity_mask != 0).any(dim=-1), IMPOSSIBLE_LOGIT)
        loss = None if labels is None else entity_choice_loss(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def entity_choice_loss(logits, labels):
    real = labels != PADDED_ENTITY
    targets = labels.clamp(min=0).to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none")
    losses = losses.masked_fill(~real, 0.0)
    return (losses.sum(dim=-1) / (real.sum(dim=-1) + 1e-8)).mean()
