import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import encoder
from benchmarks.encoder import LEVELS, ORIGINAL, PEER, block_flops, make_lean, make_sides
from benchmarks.reference.lean_layers import original_encoder
from src.models.fastest import ONEDNN, chosen_kernels


def test_reference_of_the_original_layers_computes_what_our_block_computes():
    module = make_lean(128, "cpu").double()
    inputs = torch.randn(2, 9, 128, dtype=torch.float64, requires_grad=True)
    results = []
    for outputs in (module(inputs)[0], original_encoder(module, inputs)):
        results.append((outputs, torch.autograd.grad(outputs.square().sum(), [inputs, *module.parameters()])))
    torch.testing.assert_close(results[1], results[0])


def test_bytes_kept_by_a_block_of_each_side():
    units = {row.side: row.value for row in encoder.byte_rows("cpu")}
    log_sum_exp = (
        0 if chosen_kernels() == ONEDNN else round(1 / 64, 3)
    )  # torch's attention kernel keeps it, ours does not
    assert units == {
        PEER: pytest.approx(28, abs=0.05),
        ORIGINAL: pytest.approx(11, abs=0.05),
        "default": pytest.approx(10 + log_sum_exp, abs=1e-3),
        "lean": pytest.approx(2 + log_sum_exp, abs=1e-3),
        "checkpoint": 1,
    }


class CountProducts(TorchDispatchMode):
    """Multiplications and additions of the matrix products inside (the attention kernel of CPUs is not one)."""

    flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            first, second = args[-2:]
            self.flops += 2 * first.shape[0] * first.shape[1] * second.shape[1]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("side", [PEER, *LEVELS])
def test_matrix_products_of_a_step_are_as_counted(side):
    """In fp64, where all products are torch's own."""
    encoder_of, module = make_sides(128, "cpu", (side,))[side]
    module.double()
    length = 16
    embedding_flops = 2 * 3 * 128 * 128 if side == PEER else 0  # ALBERT's mapping in front of its blocks
    inputs = torch.randn(1, length, 128, dtype=torch.float64, requires_grad=True)
    with CountProducts() as counter:
        encoder_of(inputs).sum().backward()
    measured = counter.flops / length - embedding_flops
    core = 14 * length * 128 + (4 * length * 128 if side == "checkpoint" else 0)
    assert measured == block_flops(128, length, side) - core
