"""The original's whole-word-mask collator: a Python loop over the tokens of each row, then the usual 80/10/10 draws."""

import random

import torch


class WholeWordMaskLoop:
    """Masks words, in random order, while they fit a budget of `mlm_probability` of the row.

    Rows are padded to `width`, or to the longest without one.
    """

    def __init__(self, tokenizer, mlm_probability: float = 0.15, seed: int = 0, width: int = 0):
        self.tokenizer, self.mlm_probability = tokenizer, mlm_probability
        self.width, self.random = width, random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, instances: list[dict]) -> dict[str, torch.Tensor]:
        width = self.width or max(len(instance["input_ids"]) for instance in instances)
        rows, types, attention, chosen = [], [], [], []
        for instance in instances:
            ids = instance["input_ids"]
            padding = width - len(ids)
            rows.append(torch.tensor([*ids, *[self.tokenizer.pad_token_id] * padding]))
            types.append(torch.tensor([*instance["token_type_ids"], *[0] * padding]))
            attention.append(torch.tensor([1] * len(ids) + [0] * padding))
            tokens = [self.tokenizer._convert_id_to_token(token) for token in ids]
            chosen.append(torch.tensor(self.choose(tokens) + [0] * padding))
        input_ids, labels = self.hide(torch.stack(rows), torch.stack(chosen).bool())
        return {
            "input_ids": input_ids,
            "attention_mask": torch.stack(attention),
            "token_type_ids": torch.stack(types),
            "labels": labels,
            "sentence_order_label": torch.tensor([instance["sentence_order_label"] for instance in instances]),
        }

    def choose(self, tokens: list[str]) -> list[int]:
        """1 for each token of a row that belongs to a chosen word."""
        special = {self.tokenizer.cls_token, self.tokenizer.sep_token, self.tokenizer.pad_token}
        words, after_special = [], True
        for position, token in enumerate(tokens):
            if token in special:
                after_special = True
                continue
            if token.startswith("▁") or after_special:
                words.append([position])
            else:
                words[-1].append(position)
            after_special = False
        self.random.shuffle(words)
        budget = max(1, round(sum(map(len, words)) * self.mlm_probability))
        chosen = set()
        for word in words:
            if len(chosen) >= budget:
                break
            if len(chosen) + len(word) <= budget:
                chosen.update(word)
        return [int(position in chosen) for position in range(len(tokens))]

    def hide(self, input_ids: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        labels = input_ids.where(chosen, -100)
        draws = torch.rand(input_ids.shape, generator=self.generator)
        hidden = chosen & (draws < 0.8)
        changed = chosen & (draws >= 0.8) & (draws < 0.9)
        random_ids = torch.randint(len(self.tokenizer), input_ids.shape, generator=self.generator)
        return input_ids.masked_fill(hidden, self.tokenizer.mask_token_id).where(~changed, random_ids), labels
