"""Block-sparse matrices with flat butterfly structure (Pixelated Butterfly, arXiv 2112.00029)."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .shared_linear import SharedMatrix


class ButterflyMatrix(SharedMatrix):
    """A matrix of block_size x block_size blocks that are zero unless their numbers differ in at most one bit.

    With n blocks along the shorter side (a power of two), input block i feeds the output blocks i and i ^ 2^k for all
    2^k < n; the pattern repeats along the longer side. That leaves (1 + log2 n) / n of the blocks.

    weight: stored with the shape [in_features, fan_out, block_size] that checkpoints have, in memory
    [in blocks, fan_out, block_size of the output, block_size of the input]; entry [i, k] maps input block i to output
    block backward_indices[i, k]. forward_indices[o] are the positions of output block o in the flattened
    backward_indices. Both are stored in checkpoints. The optional low-rank term is that of `SharedMatrix`.
    """

    def __init__(self, in_features, out_features, *, block_size, lowrank_dim=0):
        super().__init__(in_features, out_features, lowrank_dim=lowrank_dim, num_parts=0)
        self.block_size = block_size
        forward_indices, backward_indices = self.make_indices()
        self.weight = nn.Parameter(torch.empty(in_features, backward_indices.shape[1], block_size))
        self.register_buffer("forward_indices", forward_indices)
        self.register_buffer("backward_indices", backward_indices)

    def make_indices(self):
        return butterfly_indices(self.in_features, self.out_features, self.block_size)

    def multiply(self, inputs, bias, *, prepare=None, parameters=(), result_is_unused=False):
        def product(inputs, *parameters):
            return self._multiply(inputs if prepare is None else prepare(inputs, *parameters))

        if prepare is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            outputs = product(inputs, *parameters)
        else:
            # The small products are computed again in backward along with the prepared input.
            outputs = checkpoint(product, inputs, *parameters, use_reentrant=False, preserve_rng_state=False)
        return outputs if bias is None else outputs + bias.to(outputs.dtype)

    def _multiply(self, inputs):
        """[..., in_features] -> [..., out_features]"""
        num_in_blocks, fan_out = self.backward_indices.shape
        blocks = inputs.reshape(-1, num_in_blocks, self.block_size).transpose(0, 1)  # [in block, rows, in block_size]
        weight = self.weight.view(num_in_blocks, fan_out * self.block_size, self.block_size)
        products = torch.bmm(blocks, weight.transpose(1, 2)).unflatten(-1, (fan_out, self.block_size))
        products = products.transpose(1, 2).flatten(0, 1)  # [in block * fan_out, rows, block_size]
        gathered = products[self.forward_indices.long()]  # [out block, fan_in, rows, block_size]
        return gathered.sum(dim=1).transpose(0, 1).reshape(*inputs.shape[:-1], self.out_features)


def butterfly_indices(in_features, out_features, block_size):
    """forward_indices [out blocks, fan_in] (int32) and backward_indices [in blocks, fan_out] (int64), both sorted."""
    num_in_blocks, num_out_blocks = in_features // block_size, out_features // block_size
    short, long = sorted((num_in_blocks, num_out_blocks))
    if in_features % block_size or out_features % block_size or short & (short - 1) or long % short:
        raise ValueError(
            f"block_size={block_size} does not fit a {out_features} x {in_features} matrix: the shorter side must be "
            "a power of two blocks and the longer side a multiple of it"
        )
    differences = [0, *(1 << bit for bit in range(short.bit_length() - 1))]
    reached = [sorted((block % short) ^ difference for difference in differences) for block in range(num_in_blocks)]
    repeats = range(0, num_out_blocks, short)
    backward_indices = torch.tensor([[start + block for start in repeats for block in blocks] for blocks in reached])
    order = backward_indices.flatten().argsort(stable=True)
    return order.view(num_out_blocks, -1).to(torch.int32), backward_indices
