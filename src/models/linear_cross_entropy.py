"""Cross-entropy of a linear layer's logits that never holds all logits."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .products import linear_product

ROWS_AT_ONCE = 128  # fewer rows make the matrix products slower, more of them take more memory


class LinearCrossEntropy(torch.autograd.Function):
    """Sum over rows of cross_entropy(linear(inputs, weight, bias), labels), computed in fp32 at least.

    Logits exist for `ROWS_AT_ONCE` rows at a time, so everything made of them is made in the forward pass: the sum's
    gradients are kept, as large as the inputs and parameters, and backward only multiplies them by the gradient it is
    given (the weight of the loss; a factor against underflow in fp16).
    """

    @staticmethod
    def forward(ctx, inputs, weight, bias, labels):
        device_type = inputs.device.type
        dtype = inputs.dtype
        if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            total, *gradients = sum_and_gradients(
                inputs.to(dtype), weight.to(dtype), bias.to(dtype), labels, ctx.needs_input_grad
            )
        ctx.dtypes = inputs.dtype, weight.dtype, bias.dtype
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):
        gradients = (
            None if gradient is None else (gradient * grad_total).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *gradients, None


def sum_and_gradients(inputs, weight, bias, labels, needed):
    """The sum and its gradients by inputs, weight and bias (None where not needed), all in fp32 at least."""
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    needs_inputs, needs_weight, needs_bias, _ = needed
    grad_inputs = torch.empty_like(inputs, dtype=dtype) if needs_inputs else None
    grad_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
    grad_bias = torch.zeros_like(bias, dtype=dtype) if needs_bias else None
    total = torch.zeros((), dtype=dtype, device=inputs.device)

    # The buffer is used again for all parts: touching fresh memory costs as much as computing what is put there.
    buffer = torch.empty(min(ROWS_AT_ONCE, len(inputs)), len(weight), dtype=dtype, device=inputs.device)
    ones = buffer.new_ones(len(buffer))
    for start in range(0, len(inputs), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        some, targets = inputs[part], labels[part, None]
        # oneDNN keeps code for every number of rows that it meets, for good, and each batch ends with another number.
        product = linear_product if len(some) == ROWS_AT_ONCE else F.linear
        logits = product(some, weight, bias).to(dtype)  # [rows, out_features]
        probabilities = torch.softmax(logits, dim=-1, out=buffer[: len(some)])
        # softmax is exp(logit - largest) / sum, and so 1 / sum where the logit is largest.
        largest, largest_probability = logits.amax(dim=-1, keepdim=True), probabilities.amax(dim=-1, keepdim=True)
        total += (largest - largest_probability.log() - logits.gather(1, targets)).sum()
        del logits  # before the next part's are made

        grad_logits = probabilities.scatter_add_(1, targets, probabilities.new_full(targets.shape, -1))
        if needs_bias:
            grad_bias.addmv_(grad_logits.t(), ones[: len(some)])
        grad_logits = grad_logits.to(inputs.dtype)
        if needs_inputs:
            grad_inputs[part] = product(grad_logits, weight.t())
        if needs_weight and inputs.dtype == dtype:
            grad_weight.addmm_(grad_logits.t(), some)
        elif needs_weight:
            grad_weight += grad_logits.t() @ some
    return total, grad_inputs, grad_weight, grad_bias


def linear_cross_entropy(inputs, weight, bias, labels):
    """Mean over rows of cross_entropy(linear(inputs, weight, bias), labels), a scalar; 0 without rows.

    inputs: [rows, in_features]; weight: [out_features, in_features]; bias: [out_features]; labels: [rows].
    """
    return LinearCrossEntropy.apply(inputs, weight, bias, labels) / max(len(labels), 1)
