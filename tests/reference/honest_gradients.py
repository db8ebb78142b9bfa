"""Gradients of honest peers that have little in common: real ones, of a tiny model, at two points of its training."""

import torch

from src import LeanAlbertConfig, LeanAlbertForPreTraining

VOCAB_SIZE = 2000
WORDS = 990  # of each of two languages, with no word in common
FIRST_WORD = {"one": 5, "other": 1000}
MASK = 4

# what a peer computes its gradient from: samples, their length, language, whether they have order labels
KINDS = {
    "usual": (8, 16, "one", True),
    "no order": (8, 16, "one", False),
    "one sample": (1, 16, "one", True),
    "one short sample, no order": (1, 4, "one", False),
    "short": (8, 4, "one", True),
    "long": (8, 96, "one", True),
    "many": (64, 32, "one", True),
    "a thousand": (1000, 16, "one", True),
    "other language": (8, 16, "other", True),
    "other language, no order": (8, 16, "other", False),
    "many of the other language": (64, 32, "other", True),
}


class Peers:
    """A tiny model that has been trained on one of two languages for so many steps, and what peers make of it."""

    def __init__(self, num_steps: int, *, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)
        # four words of five follow from the one before, so that there is something to learn
        self.followers = {
            language: torch.randperm(WORDS, generator=torch.Generator().manual_seed(number))
            for number, language in enumerate(FIRST_WORD)
        }
        torch.manual_seed(seed)
        self.model = LeanAlbertForPreTraining(
            LeanAlbertConfig(
                hidden_size=32,
                intermediate_size=48,
                num_attention_heads=2,
                embedding_size=16,
                vocab_size=VOCAB_SIZE,
                num_hidden_layers=2,
                share_large_matrices=1,
                classifier_dropout_prob=0.0,
            )
        )
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        for step in range(num_steps):
            optimizer.param_groups[0]["lr"] = 1e-2 * min(1.0, (step + 1) / 50) * (1.0 - step / num_steps)
            optimizer.zero_grad()
            self.model(**self.batch(32, 16, "one", order=True)).loss.backward()
            optimizer.step()

    def batch(self, num_samples: int, length: int, language: str, order: bool) -> dict[str, torch.Tensor]:
        frequencies = 1.0 / torch.arange(1.0, WORDS + 1)

        def any_word():
            return torch.multinomial(frequencies, num_samples, replacement=True, generator=self.generator)

        def chance(*shape):
            return torch.rand(*shape, generator=self.generator)

        words = [any_word()]
        for _ in range(length - 1):
            follows = chance(num_samples) < 0.8
            words.append(torch.where(follows, self.followers[language][words[-1]], any_word()))
        words = torch.stack(words, dim=1)
        input_ids = words + FIRST_WORD[language]
        is_label = chance(num_samples, length) < 0.15
        is_label[:, length // 3] = True
        is_masked = is_label & (chance(num_samples, length) < 0.8)
        return {
            "input_ids": torch.where(is_masked, MASK, input_ids),
            "labels": torch.where(is_label, input_ids, -100),
            "token_type_ids": (torch.arange(length) >= length // 2).long().expand(num_samples, length),
            "sentence_order_label": words[:, 0] % 2 if order else torch.full((num_samples,), -100),
        }

    def gradient(self, kind: str) -> tuple[list[torch.Tensor], float]:
        """With the number of samples, by which it is weighted."""
        num_samples, length, language, order = KINDS[kind]
        self.model.zero_grad()
        self.model(**self.batch(num_samples, length, language, order)).loss.backward()
        return [parameter.grad.clone() for parameter in self.model.parameters()], float(num_samples)

    def gradients(self, kind: str, count: int) -> list[tuple[list[torch.Tensor], float]]:
        return [self.gradient(kind) for _ in range(count)]
