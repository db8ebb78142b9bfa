"""What travels in a round: tensors and objections, checked before anything is made of them."""

import math
from collections.abc import Callable
from typing import AsyncIterator  # noqa: UP035, hivemind tells a stream by this type, not by that of collections.abc

from hivemind.averaging.partition import AllreduceException
from hivemind.proto import averaging_pb2, runtime_pb2

from src.swarm.compression import BLOCK, BLOCKWISE_4BIT, BYTES_PER_BLOCK

ROUND_DTYPES = {"float32", "float16", "bfloat16", "float64"}  # only such values have an average
WIRE_DTYPES = ROUND_DTYPES | {"uint8", "int64", "int32", "bool"}  # the optimizer's state has those, too
MAX_OBJECTION_LENGTH = 200  # bytes
MAX_DIMENSIONS = 8
BLOCK_SIZE, CODE_BOOK_SIZE = 4096, 256  # of hivemind's blockwise quantization


def check_wire_tensor(tensor: runtime_pb2.Tensor, dtypes: set[str] = WIRE_DTYPES) -> None:
    """Raises ValueError if a tensor message contradicts itself, or is none of ``dtypes``.

    To be called before anything is made of it: bitsandbytes reads a blockwise tensor without checks, with a short code
    book beyond the buffer; and what is made of four bits a value is seven times as large.
    """
    if tensor.dtype not in dtypes:
        raise ValueError(f"a tensor of type {tensor.dtype!r}")
    if len(tensor.size) > MAX_DIMENSIONS:  # the product of a million of them takes minutes
        raise ValueError(f"a tensor of {len(tensor.size)} dimensions")
    if min(tensor.size, default=0) < 0:
        raise ValueError(f"a tensor of shape {list(tensor.size)}")
    if tensor.compression == runtime_pb2.BLOCKWISE_8BIT:
        _check_eight_bits(tensor, math.prod(tensor.size))
    elif tensor.compression == BLOCKWISE_4BIT:
        _check_four_bits(tensor, math.prod(tensor.size))
    elif tensor.compression not in runtime_pb2.CompressionType.values():
        raise ValueError(f"a tensor of the unknown compression {tensor.compression}")
    # the others are read by numpy and torch, which check


def _check_eight_bits(tensor: runtime_pb2.Tensor, num_values: int) -> None:
    num_blocks = -(-num_values // BLOCK_SIZE)
    if len(tensor.buffer) == 16 + 4 * (num_blocks + CODE_BOOK_SIZE) + num_values:
        header = num_blocks.to_bytes(8, "little") + CODE_BOOK_SIZE.to_bytes(8, "little")
        if tensor.buffer.startswith(header):
            return
    raise ValueError("a blockwise quantized tensor whose sizes contradict each other")


def _check_four_bits(tensor: runtime_pb2.Tensor, num_values: int) -> None:
    if tensor.dtype != "float32":
        raise ValueError(f"a tensor of type {tensor.dtype!r} in 4 bits")
    if len(tensor.buffer) != BYTES_PER_BLOCK * -(-num_values // BLOCK):
        raise ValueError(f"a tensor in 4 bits of {num_values} values and {len(tensor.buffer)} bytes")


async def checked_messages(
    stream, on_violation: Callable[[str], None] = lambda reason: None
) -> AsyncIterator[averaging_pb2.AveragingData]:
    """The messages of a round, as long as their tensors are well-formed; then an `AllreduceException`.

    ``on_violation(reason)`` is called before that: no honest peer ever sends such a thing.
    """
    async for message in stream:
        if message.HasField("tensor_part"):
            try:
                check_wire_tensor(message.tensor_part, ROUND_DTYPES)
            except ValueError as error:
                on_violation(f"sent {error}")
                raise AllreduceException(f"sent {error}") from error
            # hivemind (compression/serialization.py, `deserialize_torch_tensor`) does as it is told here: then whatever
            # is computed with this part asks for a gradient, too, in the end the averager's own tensors
            message.tensor_part.requires_grad = False
        yield message


def objection_message(code: int, reason: str) -> averaging_pb2.AveragingData:
    """A message that says what is wrong with the other side's values, in a field that hivemind leaves empty there."""
    return averaging_pb2.AveragingData(code=code, peer_id=reason.encode()[:MAX_OBJECTION_LENGTH])


def objection_in(message: averaging_pb2.AveragingData) -> str:
    return message.peer_id[:MAX_OBJECTION_LENGTH].decode(errors="replace")
