"""How values are written for the way between peers, and that all members of a round end with the same ones."""

import math

import bitsandbytes.functional  # noqa: F401, takes seconds: before averagers fork, as in a trainer
import hivemind
import pytest
import torch
from hivemind.averaging import DecentralizedAverager
from hivemind.compression import CompressionInfo, Float16Compression

from src.swarm.averagers import LeanGradientAverager, LeanStateAverager
from src.swarm.compression import (
    BLOCK,
    BYTES_PER_BLOCK,
    EIGHT_BIT_THRESHOLD,
    FourBitQuantization,
    compression_type,
    gradient_compression,
    parameter_compression,
    read_tensor,
)
from tests.swarm.test_averagers import averager_options, loopback_addresses, run_together

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
SHAPES = ((300, 256), (70_001,), (17,))


def packed(tensor: torch.Tensor, compression=None):
    return (compression or FourBitQuantization()).compress(tensor, CompressionInfo.from_tensor(tensor))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e6])
@pytest.mark.parametrize("shape", [(2**16,), (1,), (63,), (65,), (5, 13)], ids=str)
def test_four_bits_keep_values_to_a_sixteenth_of_their_blocks_range(shape, scale):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale
    message = packed(tensor)
    assert len(message.buffer) == BYTES_PER_BLOCK * math.ceil(tensor.numel() / BLOCK)
    read = read_tensor(message)
    assert read.shape == tensor.shape and read.dtype == torch.float32
    for block, values in zip(read.flatten().split(BLOCK), tensor.flatten().split(BLOCK), strict=True):
        step = float(values.abs().max()) / 8
        assert float((block - values).abs().max()) <= 1.1 * step, "the largest on the other side, if as large"
        assert float(((block - values) / scale).norm()) <= 0.6 * step / scale * math.sqrt(len(values))
    if tensor.numel() == 2**16:
        assert len(message.buffer) * 8 == 4.25 * tensor.numel()
        assert float(((read - tensor) / scale).norm() / (tensor / scale).norm()) == pytest.approx(0.095, rel=0.02)


def test_four_bits_keep_zeros_and_do_not_hide_what_is_not_finite():
    tensor = torch.zeros(3 * BLOCK)
    assert not read_tensor(packed(tensor)).any() and read_tensor(packed(torch.empty(0, 3))).shape == (0, 3)
    tensor[5], tensor[BLOCK + 1], tensor[-1] = math.nan, -math.inf, 3e38
    blocks = read_tensor(packed(tensor)).split(BLOCK)
    assert [bool(block.isfinite().all()) for block in blocks] == [False, False, True]
    assert blocks[2][:-1].abs().max() == 0 and float(blocks[2][-1]) == pytest.approx(3e38, rel=0.01)


def test_four_bits_written_again_are_the_same():
    once = read_tensor(packed(torch.randn(1000)))
    assert torch.equal(read_tensor(packed(once)), once)


@pytest.mark.parametrize(("bits", "large"), [(8, 5), (4, 64)])
def test_large_tensors_travel_in_the_bits_of_the_run_and_small_ones_in_sixteen(bits, large):
    types = [
        compression_type(gradient_compression(bits), CompressionInfo.from_tensor(torch.empty(size)))
        for size in (EIGHT_BIT_THRESHOLD, EIGHT_BIT_THRESHOLD - 1)
    ]
    assert types == [large, 2]
    assert compression_type(Float16Compression(), CompressionInfo.from_tensor(torch.empty(2))) == 2


# -- real averagers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_nodes():
    nodes = []
    for _ in range(3):
        nodes.append(hivemind.DHT(start=True, initial_peers=loopback_addresses(nodes), host_maddrs=[LOOPBACK]))
    yield nodes
    for node in nodes:
        node.shutdown()


def tensors_of(averager) -> list[torch.Tensor]:
    with averager.get_tensors() as tensors:
        return [tensor.clone() for tensor in tensors]


@pytest.mark.swarm
@pytest.mark.parametrize("bits", [8, 4])
def test_members_of_a_complete_round_hold_equal_gradients(three_nodes, shut_down_at_end, bits):
    """To the last bit, who averages and who is a client; near the mean of what they had."""
    generator = torch.Generator().manual_seed(bits)
    gradients = [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in three_nodes]
    averagers = []
    for node, is_client in zip(three_nodes, (False, False, True), strict=True):
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
        options = {**averager_options(f"bits_{bits}", gradient_compression(bits)), "client_mode": is_client,
                   "part_size_bytes": 2**15, "min_group_size": 3, "target_group_size": 4}  # fmt: skip
        averager = LeanGradientAverager(parameters, dht=node, reuse_grad_buffers=True, **options)
        averagers.append(shut_down_at_end(averager))

    def start_steps():
        for averager, own in zip(averagers, gradients, strict=True):
            for parameter, gradient in zip(averager.parameters, own, strict=True):
                parameter.grad.copy_(gradient)
            averager.accumulate_grads_(1)
            yield averager.step(wait=False, timeout=15)

    assert [len(result) for result in run_together(lambda: list(start_steps()))] == [3, 3, 3]
    results = [tensors_of(averager) for averager in averagers]
    for tensors in zip(*results, strict=True):
        assert all(torch.equal(tensor, tensors[0]) for tensor in tensors[1:])
    for averaged, own in zip(results[0], zip(*gradients, strict=True), strict=True):
        mean = sum(own) / 3
        assert float((averaged - mean).norm() / mean.norm()) < (0.03 if bits == 8 else 0.2)


@pytest.mark.swarm
def test_peers_of_other_bits_find_no_group_together(three_nodes, shut_down_at_end):
    steps = []
    for node, bits in zip(three_nodes[:2], (8, 4), strict=True):
        averager = LeanGradientAverager(
            [torch.nn.Parameter(torch.zeros(300, 256))], dht=node, reuse_grad_buffers=True,
            **averager_options("other_bits", gradient_compression(bits)),
        )  # fmt: skip
        shut_down_at_end(averager)
        averager.accumulate_grads_(1)
        steps.append(averager.step(wait=False, timeout=3, allow_retries=False))
    for step in steps:
        with pytest.raises(Exception, match="could not find a group"):
            step.result(30)


@pytest.mark.swarm
@pytest.mark.parametrize("differ", [True, False], ids=["that differ", "that are equal"])
def test_members_of_a_complete_round_hold_equal_parameters(three_nodes, shut_down_at_end, differ):
    """Equal ones stay as exact as they were, although they travel as float16."""
    start = torch.randn(50_000, generator=torch.Generator().manual_seed(0)) * 0.02
    averagers = [
        shut_down_at_end(
            LeanStateAverager(
                dht=node,
                params=[{"params": [torch.nn.Parameter(start + 1e-5 * number * differ)]}],
                optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
                initialize_optimizer=False,
                **{**averager_options(f"state_{differ}", parameter_compression()), "part_size_bytes": 2**14},
            )
        )
        for number, node in enumerate(three_nodes[:2])
    ]
    steps = run_together(
        lambda: [DecentralizedAverager.step(averager, wait=False, timeout=15, gather=5) for averager in averagers]
    )
    assert [len(step) for step in steps] == [2, 2]
    one, other = (tensors_of(averager)[0] for averager in averagers)
    assert torch.equal(one, other)
    if differ:
        torch.testing.assert_close(one, start + 0.5e-5, rtol=1e-3, atol=1e-6)
    else:
        assert torch.equal(one, start)
