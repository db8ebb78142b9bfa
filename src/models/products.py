"""Matrix products without autograd, by the fastest library that torch has for the device."""

import math

import torch
import torch.nn.functional as F

from .fastest import MEASURE, ONEDNN, TORCH, chosen_kernels, fastest

SMALLEST_MEASURED = 2**18  # multiplications; below, the call takes as long as the product
LARGEST_SIDE = 1024  # what is faster for sides of that length is faster for longer ones, too


def linear_product(inputs, weight, bias=None):
    """inputs @ weight.T + bias for [..., in_features], [out_features, in_features] and [out_features] or None.

    On CPU torch multiplies fp32 matrices by MKL, and on some processors oneDNN is much faster; torch has it, but offers
    it to its compiler only. Not differentiable there.
    """
    if _may_use_onednn(inputs, weight) and _choose(inputs, weight) == ONEDNN:
        return by_onednn(inputs, weight, bias)
    return F.linear(inputs, weight, bias)


def by_onednn(inputs, weight, bias=None):
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


def has_onednn():
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled


def _may_use_onednn(*matrices):
    return (
        all(matrix.device.type == "cpu" and matrix.dtype == torch.float32 for matrix in matrices)
        and all(matrix.numel() for matrix in matrices)
        and not torch.is_autocast_enabled("cpu")
        and has_onednn()
        and chosen_kernels() != TORCH
    )


def _choose(inputs, weight):
    if chosen_kernels() != MEASURE:
        return chosen_kernels()
    num_rows = inputs.numel() // inputs.shape[-1]
    if num_rows * weight.numel() < SMALLEST_MEASURED:
        return TORCH
    sides = tuple(side_class(side) for side in (num_rows, *weight.shape))
    transposed = _is_transposed(inputs), _is_transposed(weight)
    return _find_fastest(sides, transposed, torch.get_num_threads())


def side_class(side):
    """A power of two that stands for it and its like."""
    return min(LARGEST_SIDE, 2 ** round(math.log2(side)))


def _is_transposed(matrix):
    return matrix.dim() == 2 and matrix.stride(0) == 1 and matrix.shape[0] > 1


_found = {}  # the same as the file's, without a text for each key


def _find_fastest(sides, transposed, num_threads):
    key = sides, transposed, num_threads
    if key not in _found:
        names = ["transposed" if is_transposed else "plain" for is_transposed in transposed]
        text = f"fp32 product of {sides}, {names[0]} by {names[1]}, {num_threads} threads"
        _found[key] = fastest(text, (TORCH, ONEDNN), lambda: _candidates(sides, transposed))
    return _found[key]


def _candidates(sides, transposed):
    num_rows, out_features, in_features = sides
    generator = torch.Generator().manual_seed(0)

    def make(rows, is_transposed):
        shape = (in_features, rows) if is_transposed else (rows, in_features)
        matrix = torch.randn(shape, generator=generator)
        return matrix.t() if is_transposed else matrix

    inputs, weight = make(num_rows, transposed[0]), make(out_features, transposed[1])
    return {TORCH: lambda: F.linear(inputs, weight), ONEDNN: lambda: by_onednn(inputs, weight)}
