"""In how many bits values travel between peers: how they are written, and how what has come is read."""

import torch
from hivemind.compression import (
    BlockwiseQuantization,
    CompressionBase,
    CompressionInfo,
    Float16Compression,
    SizeAdaptiveCompression,
    deserialize_torch_tensor,
)
from hivemind.compression.adaptive import AdaptiveCompressionBase
from hivemind.proto import runtime_pb2

# Smaller tensors travel as float16: they cost little, and norms and biases are delicate.
EIGHT_BIT_THRESHOLD = 2**16 + 1
# hivemind's enum ends with BLOCKWISE_8BIT = 5 and knows no other kind; protobuf passes on any number.
BLOCKWISE_4BIT = 64
BLOCK = 64  # values with one scale
CODES = BLOCK // 2  # bytes of a block, after the two of its scale
BYTES_PER_BLOCK = 2 + CODES


class FourBitQuantization(CompressionBase):
    """Blocks of 64 values: a scale in bfloat16, then 16 levels, so 4.25 bits a value.

    The value furthest from zero becomes -8 times the scale, whose sign follows from it; all others are rounded to -8 to
    7 times it. So all 16 levels are used (an error of 9.5 % of normal values; with -7 to 7 it is 10.8 %). bfloat16 has
    the range of float32, which gradients need. A block with infinity or NaN is not finite when it is read, either.
    """

    compression_type = BLOCKWISE_4BIT

    @torch.no_grad()
    def compress(self, tensor: torch.Tensor, info: CompressionInfo, allow_inplace: bool = False) -> runtime_pb2.Tensor:
        """``tensor`` of any shape, float32; raises ValueError for other types."""
        if tensor.dtype != torch.float32:
            raise ValueError(f"values of type {tensor.dtype} do not travel in 4 bits")
        values = tensor.detach().reshape(-1)
        num_blocks = -(-len(values) // BLOCK)
        if num_blocks * BLOCK != len(values):
            values = torch.nn.functional.pad(values, (0, num_blocks * BLOCK - len(values)))
        blocks = values.view(num_blocks, BLOCK)
        packed = torch.empty(num_blocks, BYTES_PER_BLOCK, dtype=torch.uint8)
        if num_blocks:
            lowest, highest = torch.aminmax(blocks, dim=1)
            scale = torch.where(-lowest > highest, lowest, highest).div_(-8).bfloat16()
            inverse = scale.float().reciprocal_().nan_to_num_(0.0, 0.0, 0.0)  # of zeros; of what is not finite
            codes = torch.addcmul(torch.tensor(8.5), blocks, inverse[:, None]).clamp_(0.0, 15.0).to(torch.uint8)
            packed[:, :2] = scale.view(torch.uint8).view(num_blocks, 2)
            torch.add(codes[:, :CODES], codes[:, CODES:], alpha=16, out=packed[:, 2:])
        return runtime_pb2.Tensor(
            compression=self.compression_type,
            buffer=packed.numpy().tobytes(),
            size=tensor.shape,
            dtype="float32",
            requires_grad=tensor.requires_grad,
        )

    def extract(self, serialized_tensor: runtime_pb2.Tensor) -> torch.Tensor:
        """The values, float32; of a message that `src.swarm.wire.check_wire_tensor` has passed."""
        shape = torch.Size(serialized_tensor.size)
        if not shape.numel():
            return torch.empty(shape)
        packed = torch.frombuffer(bytearray(serialized_tensor.buffer), dtype=torch.uint8).view(-1, BYTES_PER_BLOCK)
        values = torch.empty(len(packed), BLOCK)
        values[:, :CODES], values[:, CODES:] = packed[:, 2:] & 15, packed[:, 2:] >> 4
        scale = packed[:, :2].contiguous().view(torch.bfloat16).float()  # [blocks, 1]
        return values.sub_(8.0).mul_(scale).view(-1)[: shape.numel()].view(shape)

    def estimate_compression_ratio(self, info: CompressionInfo) -> float:
        return BYTES_PER_BLOCK / (4 * BLOCK)


QUANTIZATIONS = {8: BlockwiseQuantization, 4: FourBitQuantization}


def gradient_compression(bits: int = 8) -> SizeAdaptiveCompression:
    """Blockwise, not uniform: with one scale for a whole tensor, the small gradients of rare words drown in the error
    (24 % of a row's norm in the median against 4 %), which LAMB then blows up to full steps."""
    return SizeAdaptiveCompression(
        threshold=EIGHT_BIT_THRESHOLD, less=Float16Compression(), greater_equal=QUANTIZATIONS[bits]()
    )


def parameter_compression() -> Float16Compression:
    """Parameters, unlike gradients, keep the error: in 8 bits it would be 1.3 % of them."""
    return Float16Compression()


def compression_type(compression: CompressionBase, info: CompressionInfo) -> int:
    """The number by which messages say how a tensor, or a part of one, is written."""
    if isinstance(compression, AdaptiveCompressionBase):
        compression = compression.choose_compression(info)
    return compression.compression_type


def read_tensor(message: runtime_pb2.Tensor) -> torch.Tensor:
    """The values of a message that `src.swarm.wire.check_wire_tensor` has passed."""
    if message.compression == BLOCKWISE_4BIT:
        return FourBitQuantization().extract(message)
    return deserialize_torch_tensor(message)
