"""softmax(queries @ keys.T) @ values by the fastest kernel for the device, keeping no scores for the backward pass."""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .fastest import MEASURE, TORCH, chosen_kernels, fastest
from .products import linear_product

SCORES_AT_ONCE = 2**19  # 2 MB in fp32: whole rows of them stay in the caches
HEAD_SCORES_AT_ONCE = 2**18  # of whole heads, for each thread: copies of their queries, keys and values stay there, too
MIN_LENGTH_PER_THREAD = 256  # for blocks of queries: shorter ones take longer to begin than to compute
LONGEST_MEASURED = 2048
BLOCKS, HEADS = "blocks of queries", "whole heads"


@dataclass(frozen=True)
class Spans:
    """Which positions attend to each other in rows of instances put end to end: begin and end of each, by row."""

    rows: tuple[tuple[tuple[int, int], ...], ...]
    length: int

    @classmethod
    def of(cls, instance_index):
        """[batch, length] numbers that change from instance to instance; padding is one, too."""
        rows = []
        for row in instance_index:
            ends = row.unique_consecutive(return_counts=True)[1].cumsum(0).tolist()
            rows.append(tuple(zip([0, *ends[:-1]], ends, strict=True)))
        return cls(tuple(rows), instance_index.shape[1])

    def mask(self, device):
        """The same as a boolean mask, [batch, 1, query, key]."""
        mask = torch.zeros(len(self.rows), 1, self.length, self.length, dtype=torch.bool)
        for row, spans in zip(mask, self.rows, strict=True):
            for begin, end in spans:
                row[:, begin:end, begin:end] = True
        return mask.to(device)

    @property
    def longest(self):
        return max(end - begin for spans in self.rows for begin, end in spans)


def attention_core(query, key, value, attention_mask=None, dropout_prob=0.0):
    """softmax(query @ key.T / sqrt(head_size)) @ value, all [batch, heads, length, head_size].

    attention_mask: boolean, True = may be attended to, broadcast to [batch, heads, query, key], or `Spans`, or None for
    all. Each query may attend to one key at least. The result is laid out as the queries are.
    """
    kernel = _choose(query, attention_mask, dropout_prob)
    if kernel != TORCH:
        return KERNELS[kernel].apply(query, key, value, attention_mask)
    if isinstance(attention_mask, Spans):
        attention_mask = attention_mask.mask(query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, dropout_p=dropout_prob)


class BlockedAttention(torch.autograd.Function):
    """Attention of a block of queries at a time, in fp32 at least, by the products of `linear_product`.

    Queries, keys and values are kept for backward, nothing else. Scores are computed again there, as in every
    memory-efficient attention (arXiv 2205.14135); as blocks hold whole rows of them, so is the softmax' normaliser.
    """

    @staticmethod
    def forward(ctx, query, key, value, attention_mask):
        keep(ctx, query, key, value, attention_mask)
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
        query, key, value, attention_mask = kept(ctx)
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


class HeadAttention(torch.autograd.Function):
    """Attention of several short heads at a time by batched products, in the type of the queries.

    Keeps queries, keys and values only, as `BlockedAttention`; scores are rounded to their type before the softmax, as
    by plain products.
    """

    @staticmethod
    def forward(ctx, query, key, value, attention_mask):
        keep(ctx, query, key, value, attention_mask)
        attended = torch.empty_like(query)
        with torch.autocast("cpu", enabled=False):
            for part, bias in _parts(query, attention_mask):
                queries, keys, values = _stacks(part, query, key, value)
                attended[part] = torch.bmm(_stacked_probabilities(queries, keys, bias), values).view_as(attended[part])
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_attended):
        query, key, value, attention_mask = kept(ctx)
        grads = grad_query, grad_key, grad_value = [torch.empty_like(tensor) for tensor in (query, key, value)]
        scale = query.shape[-1] ** -0.5
        with torch.autocast("cpu", enabled=False):
            for part, bias in _parts(query, attention_mask):
                queries, keys, values, gradients = _stacks(part, query, key, value, grad_attended)
                probabilities = _stacked_probabilities(queries, keys, bias)
                grad_scores = torch.ops.aten._softmax_backward_data(
                    torch.bmm(gradients, values.mT), probabilities, -1, probabilities.dtype
                )
                shape = grad_query[part].shape
                grad_query[part] = torch.bmm(grad_scores, keys).mul_(scale).view(shape)
                grad_key[part] = torch.bmm(grad_scores.mT, queries).mul_(scale).view(shape)
                grad_value[part] = torch.bmm(probabilities.mT, gradients).view(shape)
        return *grads, None


KERNELS = {BLOCKS: BlockedAttention, HEADS: HeadAttention}


def keep(ctx, query, key, value, attention_mask):
    is_tensor = isinstance(attention_mask, torch.Tensor)
    ctx.spans = None if is_tensor else attention_mask
    ctx.save_for_backward(query, key, value, attention_mask if is_tensor else None)


def kept(ctx):
    *states, mask = ctx.saved_tensors
    return *states, ctx.spans if mask is None else mask


def _heads(query, key, attention_mask):
    """For each head of each sequence, or of each span, its index, scaled queries and keys, [length, head_size] each,
    and what to add to the scores: 0 or -inf, [length, length], or None."""
    batch, num_heads, length, head_size = query.shape
    has_spans = isinstance(attention_mask, Spans)
    for sequence in range(batch):
        bias = None
        if attention_mask is not None and not has_spans:
            mask = attention_mask.expand(batch, -1, -1, -1)[sequence]
            bias = torch.zeros(mask.shape, dtype=_dtype(query)).masked_fill_(~mask, -torch.inf)
            bias = bias.expand(num_heads, length, -1)
        spans = attention_mask.rows[sequence] if has_spans else ((0, length),)
        for number in range(num_heads):
            for begin, end in spans:
                head = sequence, number, slice(begin, end)
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


def _parts(query, attention_mask):
    """Indices of so many sequences and heads that their scores fit, and what to add to these: [sequences, heads or 1,
    query or 1, key], or None."""
    batch, num_heads, length, _ = query.shape
    if isinstance(attention_mask, Spans):
        for sequence, spans in enumerate(attention_mask.rows):
            for begin, end in spans:
                for heads in _groups(num_heads, (end - begin) ** 2):
                    yield (slice(sequence, sequence + 1), heads, slice(begin, end)), None
        return
    bias = None
    if attention_mask is not None:
        bias = torch.zeros(attention_mask.shape, dtype=query.dtype).masked_fill_(~attention_mask, -torch.inf)
    for heads in _groups(num_heads, length**2):
        for sequences in _groups(batch, len(range(num_heads)[heads]) * length**2):
            part = sequences, heads, slice(None)
            yield part, None if bias is None else bias.expand(batch, num_heads, -1, -1)[part[:2]]


def _groups(count, num_scores):
    size = max(1, HEAD_SCORES_AT_ONCE * torch.get_num_threads() // num_scores)
    return [slice(start, start + size) for start in range(0, count, size)]


def _stacks(part, *tensors):
    """Of each tensor the part, [sequences * heads, length, head_size]."""
    return [tensor[part].flatten(0, 1) for tensor in tensors]


def _stacked_probabilities(queries, keys, bias):
    scores = torch.bmm(queries, keys.mT).mul_(queries.shape[-1] ** -0.5)
    if bias is not None:
        scores.view(*bias.shape[:2], *scores.shape[1:]).add_(bias)
    return torch.softmax(scores, dim=-1)


def _choose(query, attention_mask, dropout_prob):
    if (
        torch.compiler.is_compiling()
        or query.device.type != "cpu"
        or query.dtype not in (torch.float32, torch.bfloat16)
        or dropout_prob
        or not query.numel()
        or chosen_kernels() == TORCH
    ):
        return TORCH
    has_spans = isinstance(attention_mask, Spans)
    length = attention_mask.longest if has_spans else query.shape[-2]
    num_threads = torch.get_num_threads()
    names = []  # those that keep no number besides come first
    if length >= MIN_LENGTH_PER_THREAD * num_threads or (has_spans and length**2 > HEAD_SCORES_AT_ONCE):
        names.append(BLOCKS)
    if length**2 <= HEAD_SCORES_AT_ONCE:
        names.append(HEADS)
    if not has_spans:  # it would compute the whole square
        names.append(TORCH)
    if chosen_kernels() != MEASURE:
        return next(name for name in (BLOCKS, TORCH, HEADS) if name in names)
    return _find_fastest(tuple(names), query.dtype, length, query.shape[-1], num_threads)


_found = {}  # the same as the file's, without a text for each key


def _find_fastest(names, dtype, length, head_size, num_threads):
    length = min(LONGEST_MEASURED, 2 ** round(math.log2(length)))
    key = names, dtype, length, head_size, num_threads
    if len(names) == 1:
        return names[0]
    if key not in _found:
        text = f"attention by {' or '.join(names)}, {dtype}, length {length}, head {head_size}, {num_threads} threads"
        _found[key] = fastest(text, names, lambda: _candidates(names, dtype, length, head_size, num_threads))
    return _found[key]


def _candidates(names, dtype, length, head_size, num_threads):
    """Forward and backward passes of a few heads, laid out as `rotary.split_and_rotate` does."""
    num_heads = max(4 * num_threads if length < 1024 else num_threads, 2**12 // length)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(4, length, num_heads, head_size, generator=generator).to(dtype).transpose(1, 2)
    query, gradient = states[:1], states[1:2]
    key, value = states[2:, None].contiguous()
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]

    def run(name):
        function = KERNELS[name].apply if name in KERNELS else F.scaled_dot_product_attention
        torch.autograd.grad(function(*leaves, None), leaves, gradient)

    return {name: partial(run, name) for name in names}
