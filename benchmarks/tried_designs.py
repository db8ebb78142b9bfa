"""Designs that were not taken, beside those that were: what NOTES.md says about them can be measured again here.

python -m benchmarks.tried_designs    # one thread, about a minute; not part of `make bench`
"""

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.encoder import computes_in_bf16
from benchmarks.measure import Row, interleave, options, ratio, report
from src.models import linear_cross_entropy
from src.models.attention_core import BlockedAttention, attention_core
from src.models.products import by_onednn, linear_product

HEAD_SIZE = 64


def products(rows, out_features, in_features):
    """A layer's outputs and the gradients of its inputs."""
    inputs, gradients = torch.randn(rows, in_features), torch.randn(rows, out_features)
    weight = torch.randn(out_features, in_features)
    return {
        name: lambda product=product: (product(inputs, weight), product(gradients, weight.t()))
        for name, product in (("as taken", linear_product), ("torch's product", F.linear), ("oneDNN", by_onednn))
    }


def weight_gradients(rows, out_features, in_features):
    """gradients.T @ inputs, [out_features, in_features]"""
    inputs, gradients = torch.randn(rows, in_features), torch.randn(rows, out_features)
    return {
        "as taken": lambda: linear_product(gradients.t(), inputs.t()),
        "torch's product": lambda: gradients.t() @ inputs,
        "oneDNN": lambda: by_onednn(gradients.t(), inputs.t()),
        "oneDNN, transposed": lambda: by_onednn(inputs.t(), gradients.t()).t().contiguous(),
        "oneDNN, operands copied": lambda: by_onednn(gradients.t().contiguous(), inputs.t().contiguous()),
    }


def attention(length, num_heads, dtype):
    """Forward and backward of the attention core, queries, keys and values laid out in several ways."""
    by_token, by_head = (1, length, num_heads, HEAD_SIZE), (3, 1, num_heads, length, HEAD_SIZE)
    query, (_, key, value) = torch.randn(by_token, dtype=dtype).transpose(1, 2), torch.randn(by_head, dtype=dtype)
    projected = torch.randn(1, length, 3, num_heads, HEAD_SIZE, dtype=dtype).transpose(1, 3)
    grad_outputs = torch.randn(by_token, dtype=dtype).transpose(1, 2)

    def run(attend, *parts):
        leaves = [part.detach().requires_grad_() for part in parts]
        torch.autograd.grad(attend(*leaves), leaves, grad_outputs)

    def in_blocks(query, key, value):
        """Plain products for 256 queries at a time; keeps all probabilities."""
        scale = HEAD_SIZE**-0.5
        blocks = [torch.softmax(part * scale @ key.transpose(2, 3), -1) @ value for part in query.split(256, dim=2)]
        return torch.cat(blocks, dim=2)

    kernel = F.scaled_dot_product_attention
    return {
        "as taken": partial(run, attention_core, query, key, value),
        "blocks of queries": partial(run, lambda *parts: BlockedAttention.apply(*parts, None), query, key, value),
        "torch's kernel, keys and values by head": partial(run, kernel, query, key, value),
        "torch's kernel, all by head": partial(run, kernel, *torch.randn(by_head, dtype=dtype)),
        "torch's kernel, all by token in one tensor": partial(run, kernel, *projected.unbind(2)),
        "plain products, 256 queries at a time": partial(run, in_blocks, query, key, value),
    }


def activation(rows, size):
    """gelu_pytorch_tanh: its value, and again its value and its gradient."""
    inputs, gradients = torch.randn(rows, size), torch.randn(rows, size)
    scale, cubic = 1.5957691216057308, 0.044715  # 0.5 * (1 + tanh(y)) is sigmoid(2 * y)

    def by_sigmoid():
        powers = inputs * inputs
        return powers.mul_(scale * cubic).add_(scale).mul_(inputs).sigmoid_().mul_(inputs)

    def by_sigmoid_with_gradient():
        squares = inputs * inputs
        slope = squares.mul(3 * scale * cubic).add_(scale).mul_(inputs)
        share = squares.mul_(scale * cubic).add_(scale).mul_(inputs).sigmoid_()
        return inputs * share, torch.addcmul(slope, share, slope, value=-1).add_(1).mul_(share).mul_(gradients)

    def by_torch():
        F.gelu(inputs, approximate="tanh")
        F.gelu(inputs, approximate="tanh")
        torch.ops.aten.gelu_backward(gradients, inputs, approximate="tanh")

    return {
        "torch's gelu (taken)": by_torch,
        "by sigmoid, value and gradient together": lambda: (by_sigmoid(), by_sigmoid_with_gradient()),
    }


def masked_loss(rows, vocab_size, size):
    """Loss of the masked positions with all gradients."""
    tensors = [torch.randn(*shape, requires_grad=True) for shape in ((rows, size), (vocab_size, size), (vocab_size,))]
    tensors[1].data.mul_(0.05)
    labels = torch.randint(vocab_size, (rows,))

    def ours(rows_at_once):
        linear_cross_entropy.ROWS_AT_ONCE = rows_at_once
        torch.autograd.grad(linear_cross_entropy.linear_cross_entropy(*tensors, labels), tensors)

    def plain():
        torch.autograd.grad(F.cross_entropy(F.linear(*tensors), labels), tensors)

    def of_torch():
        inputs, weight, bias = tensors
        chunks = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=128)
        loss = F.linear_cross_entropy(inputs, weight, labels, linear_bias=bias, options=chunks)
        torch.autograd.grad(loss, tensors)

    taken = linear_cross_entropy.ROWS_AT_ONCE
    sides = {f"{taken} rows at once (taken)": partial(ours, taken)}
    sides |= {f"{rows_at_once} rows at once": partial(ours, rows_at_once) for rows_at_once in (32, 512)}
    return {**sides, "all logits, F.cross_entropy": plain, "F.linear_cross_entropy, 128 rows at once": of_torch}


def main():
    flags = options(__doc__).parse_args()
    torch.set_num_threads(1)
    rows = []
    length, vocab_size, num_tokens = (128, 5000, 256) if flags.quick else (2048, 50257, 2048)
    cases = {
        f"{what} {out_features} x {in_features}, {num_tokens} rows": sides(num_tokens, out_features, in_features)
        for what, sides in (("outputs and inputs' gradients", products), ("weight gradient", weight_gradients))
        for out_features, in_features in ((1536, 512), (512, 512), (2048, 512), (512, 2048))
    }
    cases |= {
        f"attention, 8 heads, length {length}, fp32": attention(length, 8, torch.float32),
        f"activation, forward and backward, {num_tokens} x 2048": activation(num_tokens, 2048),
        f"masked-LM loss, 614 rows, vocabulary {vocab_size}": masked_loss(614, vocab_size, 128),
    }
    if computes_in_bf16("cpu"):
        cases[f"attention, 8 heads, length {length}, bf16"] = attention(length, 8, torch.bfloat16)
    for case, sides in cases.items():
        timings = interleave(sides, rounds=2 if flags.quick else 5)
        taken = next(iter(timings))
        for side, timing in timings.items():
            relative = None if side == taken else ratio(timing, timings[taken])
            rows.append(Row("tried designs", case, side, 1e3 * timing.median, "ms", relative, peer=taken))
    report("tried_designs", "Designs that were tried", rows, ["One thread, CPU time."], flags.results)


if __name__ == "__main__":
    main()
