"""Matrix products without autograd, by the fastest library that torch has for the device."""

import torch
import torch.nn.functional as F


def linear_product(inputs, weight, bias=None):
    """inputs @ weight.T + bias for [..., in_features], [out_features, in_features] and [out_features] or None.

    On CPU torch multiplies fp32 matrices by MKL, and oneDNN is faster on AVX-512 machines for the shapes of a
    transformer (on AVX2 ones it is slower); torch has it, but offers it to its compiler only. Not differentiable there.
    """
    if _suits_onednn(inputs, weight):
        return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return F.linear(inputs, weight, bias)


def onednn_is_faster():
    """Whether torch has oneDNN and the processor AVX-512."""
    return torch.cpu._is_avx512_supported() and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled


def _suits_onednn(*matrices):
    return (
        all(matrix.device.type == "cpu" and matrix.dtype == torch.float32 for matrix in matrices)
        and all(matrix.numel() for matrix in matrices)
        and not torch.is_autocast_enabled("cpu")
        and onednn_is_faster()
    )
