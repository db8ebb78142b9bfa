"""A tiny configuration, random parameters and a padded batch for the tests of the models."""

import pytest
import torch

from src import LeanAlbertConfig

TINY_OPTIONS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "embedding_size": 16,
    "vocab_size": 61,
    "num_hidden_layers": 3,
    "max_position_embeddings": 24,
}


@pytest.fixture
def tiny_config():
    """Builds a tiny configuration; keyword arguments change its options."""
    return lambda **options: LeanAlbertConfig(**{**TINY_OPTIONS, **options})


@pytest.fixture
def randomise():
    """Gives every parameter a random value, so that no bias, norm or adapter is at a value that hides a mistake."""

    def randomise_parameters(model, seed=0):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.2 * noise + ("norm.weight" in name))
        return model

    return randomise_parameters


@pytest.fixture
def batch():
    """Two rows of 11 tokens, the second with 4 tokens of padding; 5 labels; an order label for the first row only."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(5, 61, (2, 11), generator=generator)
    attention_mask = torch.ones(2, 11, dtype=torch.long)
    attention_mask[1, 7:] = 0
    input_ids[1, 7:] = 0
    token_type_ids = torch.zeros(2, 11, dtype=torch.long)
    token_type_ids[:, 4:] = 1
    labels = torch.full((2, 11), -100)
    labels[0, [1, 4, 9]] = input_ids[0, [1, 4, 9]]
    labels[1, [2, 3]] = torch.tensor([7, 60])
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "token_type_ids": token_type_ids,
        "labels": labels,
        "sentence_order_label": torch.tensor([1, -100]),
    }


@pytest.fixture
def encoder_inputs(batch):
    return {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
