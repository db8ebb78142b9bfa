"""softmax(queries @ keys.T) @ values by the fastest kernel for the device, keeping no scores for the backward pass."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .products import linear_product, onednn_is_faster

SCORES_AT_ONCE = 2**19  # 2 MB in fp32: whole rows of them stay in the caches
MIN_LENGTH_PER_THREAD = 256  # below, torch's kernel is faster: its threads take a head each, ours share each product


def attention_core(query, key, value, attention_mask=None, dropout_prob=0.0):
    """softmax(query @ key.T / sqrt(head_size)) @ value, all [batch, heads, length, head_size].

    attention_mask: boolean, True = may be attended to, broadcast to [batch, heads, query, key], or None for all. Each
    query may attend to one key at least. The result is laid out as the queries are.
    """
    if _suits_blocks(query, dropout_prob):
        return BlockedAttention.apply(query, key, value, attention_mask)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, dropout_p=dropout_prob)


class BlockedAttention(torch.autograd.Function):
    """Attention of a block of queries at a time, in fp32 at least, by oneDNN's products.

    Queries, keys and values are kept for backward, nothing else. Scores are computed again there, as in every
    memory-efficient attention (arXiv 2205.14135); as blocks hold whole rows of them, so is the softmax' normaliser.
    """

    @staticmethod
    def forward(ctx, query, key, value, attention_mask):
        ctx.save_for_backward(query, key, value, attention_mask)
        attended = torch.empty_like(query)
        with torch.autocast("cpu", enabled=False):
            for head, queries, keys, bias in _heads(query, key, attention_mask):
                values = _matrix(value[head]).t().contiguous()  # [head_size, length]
                for rows in _blocks(queries, keys):
                    attended[head][rows] = linear_product(_probabilities(queries, keys, bias, rows), values)
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_attended):
        query, key, value, attention_mask = ctx.saved_tensors
        grad_query, grad_key, grad_value = (torch.empty_like(tensor) for tensor in (query, key, value))
        with torch.autocast("cpu", enabled=False):
            for head, queries, keys, bias in _heads(query, key, attention_mask):
                values, gradients = _matrix(value[head]), _matrix(grad_attended[head])
                scaled_keys = keys.t() * query.shape[-1] ** -0.5
                key_sum = value_sum = 0.0
                for rows in _blocks(queries, keys):
                    probabilities = _probabilities(queries, keys, bias, rows)
                    grad_scores = torch.ops.aten._softmax_backward_data(
                        linear_product(gradients[rows], values), probabilities, -1, probabilities.dtype
                    )
                    grad_query[head][rows] = linear_product(grad_scores, scaled_keys)
                    # [head_size, length]: so the large operand is read as it lies, which is faster.
                    value_sum = linear_product(gradients[rows].t(), probabilities.t()) + value_sum
                    key_sum = linear_product(queries[rows].t(), grad_scores.t()) + key_sum
                grad_key[head], grad_value[head] = key_sum.t(), value_sum.t()
        return grad_query, grad_key, grad_value, None


def _heads(query, key, attention_mask):
    """For each head of each sequence its index, scaled queries and keys, [length, head_size] each, and what to add to
    the scores: 0 or -inf, [length, length], or None."""
    batch, num_heads, length, head_size = query.shape
    for sequence in range(batch):
        bias = None
        if attention_mask is not None:
            mask = attention_mask.expand(batch, -1, -1, -1)[sequence]
            bias = torch.zeros(mask.shape, dtype=_dtype(query)).masked_fill_(~mask, -torch.inf)
            bias = bias.expand(num_heads, length, -1)
        for number in range(num_heads):
            head = sequence, number
            queries = _matrix(query[head]) * head_size**-0.5
            yield head, queries, _matrix(key[head]), None if bias is None else bias[number]


def _blocks(queries, keys):
    num_rows = max(1, SCORES_AT_ONCE // len(keys))
    return [slice(start, start + num_rows) for start in range(0, len(queries), num_rows)]


def _probabilities(queries, keys, bias, rows):
    scores = linear_product(queries[rows], keys)
    if bias is not None:
        scores += bias[rows]
    return torch.softmax(scores, dim=-1)


def _dtype(tensor):
    return torch.promote_types(tensor.dtype, torch.float32)


def _matrix(tensor):
    return tensor.to(_dtype(tensor)).contiguous()


def _suits_blocks(query, dropout_prob):
    """Whether blocks are faster than torch's kernel, whose fp32 products are MKL's, and whose bf16 ones need AMX."""
    return (
        not torch.compiler.is_compiling()
        and query.device.type == "cpu"
        and (query.dtype == torch.float32 or (query.dtype == torch.bfloat16 and not torch.cpu._is_amx_tile_supported()))
        and query.shape[-2] >= MIN_LENGTH_PER_THREAD * torch.get_num_threads()
        and dropout_prob == 0
        and onednn_is_faster()
    )
