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


class SplitAndRotate(torch.autograd.Function):
    """Queries, keys and values of [batch, length, 3 * heads * head_size], the first two rotated.

    Only the angles are kept. In the result the rows of a head's keys and values lie next to each other: attention
    kernels on CPU read them once for each block of queries, faster that way. Queries, which they read once, stay in the
    projection's order, and so do the attended values, which the kernels lay out as the queries. Both directions write
    every number once; autograd over `rotate` and views writes every product, the joined halves, the joined three and
    their permutation to tensors of their own.
    """

    @staticmethod
    def forward(ctx, projected, num_heads, cos, sin):
        ctx.save_for_backward(cos, sin)
        states = projected.unflatten(-1, (3, num_heads, -1))  # [batch, length, 3, heads, head_size]
        batch, length, _, _, head_size = states.shape
        outputs = projected.new_empty(3, batch, num_heads * length * head_size)
        query = outputs[0].view(batch, length, num_heads, head_size)
        key, value = outputs[1:].view(2, batch, num_heads, length, head_size).transpose(2, 3)
        for target, source in zip((query, key), states.unbind(2)[:2], strict=True):
            if cos is None:
                target.copy_(source)
            else:
                write_rotated(source, target, cos, sin)
        value.copy_(states[:, :, 2])
        return tuple(part.transpose(1, 2) for part in (query, key, value))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        cos, sin = ctx.saved_tensors
        batch, num_heads, length, head_size = gradients[0].shape
        grad_states = gradients[0].new_empty(batch, length, 3, num_heads, head_size)
        num_rotated = 0 if cos is None else 2
        for part, gradient in enumerate(gradients):
            if part < num_rotated:
                write_rotated(gradient.transpose(1, 2), grad_states[:, :, part], cos, -sin)
            else:
                grad_states[:, :, part] = gradient.transpose(1, 2)
        return grad_states.flatten(2), None, None, None


def write_rotated(source, target, cos, sin):
    """target = rotate(source), rounded once where the angles are of a wider type."""
    first, second = source.chunk(2, dim=-1)
    for part, own, other, sign in zip(target.chunk(2, dim=-1), (first, second), (second, first), (-1, 1), strict=True):
        if part.dtype == cos.dtype:
            torch.mul(own, cos, out=part).addcmul_(other, sin, value=sign)
        else:
            part.copy_((own * cos).addcmul_(other, sin, value=sign))


def split_and_rotate(projected, num_heads, cos=None, sin=None):
    """Queries, keys and values, each [batch, heads, length, head_size], from [batch, length, 3 * heads * head_size].
    Without angles nothing is rotated.

    cos, sin: [batch or 1, length, 1, head_size / 2].
    """
    if not torch.compiler.is_compiling():
        return SplitAndRotate.apply(projected, num_heads, cos, sin)
    parts = projected.unflatten(-1, (3, num_heads, -1)).unbind(2)  # each [batch, length, heads, head_size]
    if cos is not None:
        parts = [rotate(parts[0], cos, sin), rotate(parts[1], cos, sin), parts[2]]
    return tuple(part.transpose(1, 2) for part in parts)
