"""LeanALBERT: weight-sharing masked language models and their collaborative pretraining."""

from .models import (
    LeanAlbertConfig,
    LeanAlbertForMaskedLM,
    LeanAlbertForPreTraining,
    LeanAlbertForSequenceClassification,
    LeanAlbertModel,
    load_tokenizer,
)

__all__ = [
    "LeanAlbertConfig",
    "LeanAlbertForMaskedLM",
    "LeanAlbertForPreTraining",
    "LeanAlbertForSequenceClassification",
    "LeanAlbertModel",
    "load_tokenizer",
]
