import pytest
import torch

from src.models import products
from src.models.fastest import ONEDNN, TORCH, use_cpu_kernels


@pytest.fixture(params=[TORCH, ONEDNN])
def library(request):
    use_cpu_kernels(request.param)
    yield request.param
    use_cpu_kernels(None)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_linear_product_equals_the_fp64_product(library, transposed, with_bias):
    generator = torch.Generator().manual_seed(0)
    inputs, bias = torch.randn(3, 5, 7, generator=generator), torch.randn(11, generator=generator)
    weight = torch.randn(7, 11, generator=generator).t() if transposed else torch.randn(11, 7, generator=generator)
    bias = bias if with_bias else None
    may_use = products._may_use_onednn(inputs, weight)
    assert may_use == (library == ONEDNN and torch.backends.mkldnn.is_available())
    expected = inputs.double() @ weight.double().t() + (0 if bias is None else bias.double())
    torch.testing.assert_close(products.linear_product(inputs, weight, bias).double(), expected, rtol=1e-5, atol=1e-5)


def test_linear_product_leaves_other_types_and_empty_batches_to_torch():
    inputs, weight = torch.ones(2, 3), torch.ones(4, 3)
    assert not products._may_use_onednn(inputs.double(), weight.double())
    assert not products._may_use_onednn(inputs.bfloat16(), weight.bfloat16())
    assert products.linear_product(torch.ones(0, 3), weight).shape == (0, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear_product(inputs, weight).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert not products._may_use_onednn(inputs, weight)
        assert products.linear_product(inputs, weight).eq(3).all()


def test_each_kind_of_product_is_measured_once(monkeypatch):
    asked = []
    monkeypatch.setattr(products, "_found", {})
    monkeypatch.setattr(
        products, "fastest", lambda key, names, candidates: asked.append((key, set(candidates()))) or TORCH
    )
    use_cpu_kernels("measure")
    try:
        inputs, weight = torch.ones(70, 100), torch.ones(50, 100)
        for _ in range(2):
            products.linear_product(inputs, weight)
            products.linear_product(inputs[:60], weight)  # like 70
        assert asked == [("fp32 product of (64, 64, 128), plain by plain, 1 threads", {TORCH, ONEDNN})]
        products.linear_product(inputs.t(), torch.ones(50, 70))
        products.linear_product(inputs[:1], weight[:1])  # too small to measure
        assert [key for key, _ in asked[1:]] == ["fp32 product of (128, 64, 64), transposed by plain, 1 threads"]
    finally:
        use_cpu_kernels(None)
