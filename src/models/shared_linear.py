"""Linear layers whose weight matrix may be used by several layers, and what they keep for the backward pass."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from .products import linear_product
from .recompute import get_autocast_options
from .weight_of_pass import weight_in_use


class PreparedLinear(torch.autograd.Function):
    """Computes linear(prepare(inputs, *parameters), weight, bias), keeping `inputs` instead of what `prepare` returns.

    `prepare` is cheap and element- or row-wise (layer norm, activation): the backward pass runs it again and lets
    autograd differentiate it, so any such function may be used. The matrix product is not repeated. With a
    `gradient_sum` the weight's gradient goes there, and autograd gets none.
    """

    @staticmethod
    def forward(ctx, prepare, gradient_sum, inputs, weight, bias, *parameters):
        PreparedLinear.keep(ctx, prepare, gradient_sum, inputs, weight, bias, *parameters)
        return linear_product(prepare(inputs, *parameters), weight, bias)

    @staticmethod
    def keep(ctx, prepare, gradient_sum, inputs, weight, bias, *parameters):
        ctx.autocast_options = get_autocast_options(inputs.device.type)
        ctx.prepare, ctx.gradient_sum = prepare, gradient_sum
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(inputs, weight, *parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_outputs):
        inputs, weight, *parameters = ctx.saved_tensors
        _, _, needs_inputs, needs_weight, needs_bias, *needs_parameters = ctx.needs_input_grad
        sources = [
            tensor.detach().requires_grad_(needed)
            for tensor, needed in zip([inputs, *parameters], [needs_inputs, *needs_parameters], strict=True)
        ]
        with torch.enable_grad(), torch.autocast(**ctx.autocast_options):
            prepared = ctx.prepare(*sources)

        # Casts are explicit because the backward pass usually runs outside of autocast.
        grad_rows = grad_outputs.flatten(0, -2)  # [rows, out_features]
        grad_weight = grad_bias = None
        if needs_weight:
            prepared_rows = prepared.detach().flatten(0, -2).to(grad_rows.dtype)  # [rows, in_features]
            if ctx.gradient_sum is None:
                grad_weight = linear_product(grad_rows.t(), prepared_rows.t()).to(weight.dtype)
            else:
                ctx.gradient_sum.add(grad_rows, prepared_rows)
        if needs_bias:
            grad_bias = grad_rows.sum(0, dtype=ctx.bias_dtype)

        grad_sources = [None] * len(sources)
        if prepared.requires_grad:
            grad_prepared = linear_product(grad_outputs, weight.to(grad_outputs.dtype).t()).to(prepared.dtype)
            needed = [index for index, source in enumerate(sources) if source.requires_grad]
            found = torch.autograd.grad(prepared, [sources[index] for index in needed], grad_prepared)
            for index, grad in zip(needed, found, strict=True):
                grad_sources[index] = grad
        return None, None, grad_sources[0], grad_weight, grad_bias, *grad_sources[1:]


class PreparedLinearWithoutResult(PreparedLinear):
    """The same with any values for a result, for a checkpointed function that runs again: backward needs none."""

    @staticmethod
    def forward(ctx, prepare, gradient_sum, inputs, weight, bias, *parameters):
        PreparedLinear.keep(ctx, prepare, gradient_sum, inputs, weight, bias, *parameters)
        cast = ctx.autocast_options["enabled"] and inputs.dtype != torch.float64
        dtype = ctx.autocast_options["dtype"] if cast else inputs.dtype
        return inputs.new_empty(*inputs.shape[:-1], weight.shape[0], dtype=dtype)


def identity(inputs):
    return inputs


def prepared_linear(prepare, inputs, weight, bias, *parameters, gradient_sum=None, result_is_unused=False):
    """linear(prepare(inputs, *parameters), weight, bias) that does not keep its prepared input for backward.

    gradient_sum: see `weight_of_pass`. With `result_is_unused` (a checkpointed function that runs again) the result has
    the right shape and any values. torch.compile chooses by itself what to keep and what to compute again, so it sees
    the plain expression.
    """
    prepare = prepare or identity
    if torch.compiler.is_compiling():
        return F.linear(prepare(inputs, *parameters), weight, bias)
    if not torch.is_grad_enabled():
        return linear_product(prepare(inputs, *parameters), weight, bias)
    function = PreparedLinearWithoutResult if result_is_unused else PreparedLinear
    return function.apply(prepare, gradient_sum, inputs, weight, bias, *parameters)


class SharedMatrix(nn.Module):
    """A [out_features, in_features] matrix with an optional low-rank term, held by every layer that uses it.

    num_parts: of its rows, equal ones with a meaning of their own, as queries, keys and values have; 0 where the weight
    is not stored as one dense matrix. For optimizers that treat a matrix as a whole.
    """

    def __init__(self, in_features, out_features, *, lowrank_dim=0, num_parts=1):
        super().__init__()
        self.in_features, self.out_features, self.num_parts = in_features, out_features, num_parts
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.lowrank_first = self.lowrank_second = None
        if lowrank_dim:
            self.lowrank_first = nn.Parameter(torch.empty(lowrank_dim, in_features))
            self.lowrank_second = nn.Parameter(torch.empty(out_features, lowrank_dim))

    def multiply(self, inputs, bias, *, prepare=None, parameters=(), result_is_unused=False):
        """Product with the matrix without its low-rank term: [..., in_features] -> [..., out_features]."""
        weight, gradient_sum = weight_in_use(self)
        options = {"gradient_sum": gradient_sum, "result_is_unused": result_is_unused}
        return prepared_linear(prepare, inputs, weight, bias, *parameters, **options)


def dense_matrices(model):
    """{weight: its number of parts} of the shared matrices of a model, which are most of its parameters."""
    return {module.weight: module.num_parts for module in model.modules()
            if isinstance(module, SharedMatrix) and module.num_parts}  # fmt: skip


class SharedLinear(nn.Module):
    """Linear layer over a matrix it may share; bias and adapter (arXiv 2106.09685, no scaling) are its own."""

    def __init__(self, shared_matrix, *, bias=True, adapter_dim=0):
        super().__init__()
        in_features, out_features = shared_matrix.in_features, shared_matrix.out_features
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.adapter_first = self.adapter_second = None
        if adapter_dim:
            self.adapter_first = nn.Parameter(torch.empty(adapter_dim, in_features))
            self.adapter_second = nn.Parameter(torch.empty(out_features, adapter_dim))
        self.shared_matrix = shared_matrix

    def forward(self, inputs, prepare=None, *parameters, result_is_unused=False):
        """[..., in_features] -> [..., out_features]: the layer applied to prepare(inputs, *parameters).

        The prepared input is computed again in backward rather than kept; without `prepare` it is `inputs`.
        result_is_unused: see `prepared_linear`.
        """
        outputs = self.shared_matrix.multiply(
            inputs, self.bias, prepare=prepare, parameters=parameters, result_is_unused=result_is_unused
        )
        pairs = (
            (self.shared_matrix.lowrank_first, self.shared_matrix.lowrank_second),
            (self.adapter_first, self.adapter_second),
        )
        for first, second in pairs:
            if first is not None:
                reduced = prepared_linear(prepare, inputs, first, None, *parameters)  # [..., rank]
                outputs = outputs + F.linear(reduced, second)
        return outputs


def shared_matrix_index(block, *, num_blocks, num_shared, num_inner_matrices):
    """Which of the shared matrices of one kind the given block uses; blocks come in the order of their groups."""
    if not num_shared:
        return block
    return (block * num_shared // num_blocks) * num_inner_matrices + block % num_inner_matrices
