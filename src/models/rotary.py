"""Rotary position embeddings (RoFormer, arXiv 2104.09864), rotating the two halves of each head as GPT-NeoX does."""

import torch
from torch.autograd.function import once_differentiable


def rotary_cos_sin(positions, head_size, base):
    """Cosines and sines of the rotation angles, fp32, [..., length, 1, head_size / 2] for positions [..., length].

    They are computed once per forward pass rather than kept in buffers: nothing to store in a checkpoint, nothing
    left uninitialised by loading on the meta device, and `.bfloat16()` does not round them.
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device=positions.device) / head_size
    angles = positions[..., None, None].float() * base**-exponents
    return angles.cos(), angles.sin()


def rotate(states, cos, sin):
    """Rotates [batch, length, ..., heads, head_size] by the given angles; the inverse rotation has -sin."""
    first, second = states.chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(states.dtype)


class RotateInPlace(torch.autograd.Function):
    """Rotates queries and keys inside [batch, length, 3 * heads * head_size] and keeps only the angles.

    Forward and backward take about half the CPU time of autograd over `rotate`, which writes every product and the
    joined halves to tensors of their own. Queries, keys and values stay views of what the projection wrote.
    """

    @staticmethod
    def forward(ctx, projected, num_heads, cos, sin):
        ctx.num_heads = num_heads
        ctx.save_for_backward(cos, sin)
        ctx.mark_dirty(projected)
        return rotate_in_place(projected, num_heads, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_outputs):
        cos, sin = ctx.saved_tensors
        return rotate_in_place(grad_outputs.clone(), ctx.num_heads, cos, -sin), None, None, None


def rotate_in_place(projected, num_heads, cos, sin):
    queries_and_keys = projected.unflatten(-1, (3, num_heads, -1))[:, :, :2]  # [batch, length, 2, heads, head_size]
    first, second = queries_and_keys.chunk(2, dim=-1)
    rotated_first = torch.addcmul(first * cos, second, sin, value=-1)
    rotated_second = torch.addcmul(second * cos, first, sin)
    first.copy_(rotated_first)
    second.copy_(rotated_second)
    return projected


def rotate_queries_and_keys(projected, num_heads, cos, sin):
    """Rotates the first two thirds of [batch, length, 3 * heads * head_size]; may overwrite its input.

    cos, sin: [batch or 1, length, 1, head_size / 2].
    """
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # [batch or 1, length, 1, 1, head_size / 2]
    if torch.compiler.is_compiling():
        states = projected.unflatten(-1, (3, num_heads, -1))
        return torch.cat([rotate(states[:, :, :2], cos, sin), states[:, :, 2:]], dim=2).flatten(2)
    return RotateInPlace.apply(projected, num_heads, cos, sin)
