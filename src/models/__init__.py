"""LeanALBERT models. Importing this package makes them known to transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
)

from .albert import (
    LeanAlbertForMaskedLM,
    LeanAlbertForPreTraining,
    LeanAlbertForSequenceClassification,
    LeanAlbertModel,
)
from .config import LeanAlbertConfig
from .tokenizer import load_tokenizer

__all__ = [
    "LeanAlbertConfig",
    "LeanAlbertForMaskedLM",
    "LeanAlbertForPreTraining",
    "LeanAlbertForSequenceClassification",
    "LeanAlbertModel",
    "load_tokenizer",
]

AutoConfig.register(LeanAlbertConfig.model_type, LeanAlbertConfig, exist_ok=True)
AutoModel.register(LeanAlbertConfig, LeanAlbertModel, exist_ok=True)
AutoModelForPreTraining.register(LeanAlbertConfig, LeanAlbertForPreTraining, exist_ok=True)
AutoModelForMaskedLM.register(LeanAlbertConfig, LeanAlbertForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(LeanAlbertConfig, LeanAlbertForSequenceClassification, exist_ok=True)
