import pytest
import torch

from src.models import products


@pytest.fixture(params=[True, False], ids=["AVX-512", "AVX2"])
def avx512(request, monkeypatch) -> bool:
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: request.param)
    return request.param


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_linear_product_equals_the_fp64_product(avx512, transposed, with_bias):
    generator = torch.Generator().manual_seed(0)
    inputs, bias = torch.randn(3, 5, 7, generator=generator), torch.randn(11, generator=generator)
    weight = torch.randn(7, 11, generator=generator).t() if transposed else torch.randn(11, 7, generator=generator)
    bias = bias if with_bias else None
    assert products._suits_onednn(inputs, weight) == (avx512 and torch.backends.mkldnn.is_available())
    expected = inputs.double() @ weight.double().t() + (0 if bias is None else bias.double())
    torch.testing.assert_close(products.linear_product(inputs, weight, bias).double(), expected, rtol=1e-5, atol=1e-5)


def test_linear_product_leaves_other_types_and_empty_batches_to_torch(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    inputs, weight = torch.ones(2, 3), torch.ones(4, 3)
    assert not products._suits_onednn(inputs.double(), weight.double())
    assert not products._suits_onednn(inputs.bfloat16(), weight.bfloat16())
    assert products.linear_product(torch.ones(0, 3), weight).shape == (0, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear_product(inputs, weight).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert not products._suits_onednn(inputs, weight)
        assert products.linear_product(inputs, weight).eq(3).all()
