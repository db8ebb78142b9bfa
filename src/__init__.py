"""LeanALBERT: weight-sharing masked language models and their collaborative pretraining.

The models are loaded when one of their names is first asked for: programs that need no model start sooner.
"""

__all__ = [
    "LeanAlbertConfig",
    "LeanAlbertForMaskedLM",
    "LeanAlbertForPreTraining",
    "LeanAlbertForSequenceClassification",
    "LeanAlbertModel",
    "load_tokenizer",
]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import models

    return getattr(models, name)
