"""Pseudo-log-likelihood as it is defined: one forward pass a token, logits at all positions."""

import torch


@torch.no_grad()
def plain_likelihood(model, tokenizer, text: str, words: list[list[int]] | None = None) -> tuple[float, int]:
    """(sum of log-probabilities, number of tokens). words: numbers of each word's tokens, for the form by words."""
    encoding = tokenizer(text, return_tensors="pt", return_special_tokens_mask=True)
    special = encoding.pop("special_tokens_mask")[0]
    positions = [place for place in range(len(special)) if not special[place]]
    total = 0.0
    for number, position in enumerate(positions):
        word = [number] if words is None else next(word for word in words if number in word)
        masked = {name: values.clone() for name, values in encoding.items()}
        for other in word[word.index(number) :]:
            masked["input_ids"][0, positions[other]] = tokenizer.mask_token_id
        logits = model(**masked).logits[0, position]
        total += float(torch.log_softmax(logits, dim=-1)[encoding["input_ids"][0, position]])
    return total, len(positions)
