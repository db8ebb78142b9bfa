import pytest
import torch
import torch.nn.functional as F

from src.models import linear_cross_entropy as subject
from src.models.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy


def make_inputs(num_rows, dtype=torch.float64):
    generator = torch.Generator().manual_seed(num_rows)
    shapes = (num_rows, 6), (11, 6), (11,)
    tensors = [torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    return tensors, torch.randint(11, (num_rows,), generator=generator)


def plain(inputs, weight, bias, labels):
    return F.cross_entropy(F.linear(inputs, weight, bias).float(), labels)


@pytest.fixture(autouse=True)
def few_rows_at_once(monkeypatch):
    monkeypatch.setattr(subject, "ROWS_AT_ONCE", 3)


@pytest.mark.parametrize("num_rows", [1, 3, 8])
def test_linear_cross_entropy_and_gradients_equal_the_plain_ones(num_rows):
    tensors, labels = make_inputs(num_rows)
    actual = linear_cross_entropy(*tensors, labels)
    expected = F.cross_entropy(F.linear(*tensors), labels)
    torch.testing.assert_close(actual, expected)
    # The loss is one of several terms: the gradient that arrives is not 1.
    gradients = [torch.autograd.grad(loss * -2.5, tensors, retain_graph=True) for loss in (actual, expected)]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(torch.autograd.grad(actual * -2.5, tensors), gradients[0], rtol=0, atol=0)


def test_linear_cross_entropy_gradients_match_finite_differences():
    tensors, labels = make_inputs(4)
    assert torch.autograd.gradcheck(lambda *inputs: LinearCrossEntropy.apply(*inputs, labels), tensors)


def test_linear_cross_entropy_asks_onednn_for_full_parts_only(monkeypatch):
    """It keeps code for every number of rows, and each batch leaves another one."""
    asked, onednn = [], subject.linear_product
    monkeypatch.setattr(subject, "linear_product", lambda *tensors: asked.append(len(tensors[0])) or onednn(*tensors))
    for num_rows in (4, 5, 9):
        tensors, labels = make_inputs(num_rows)
        linear_cross_entropy(*tensors, labels)
    assert set(asked) == {subject.ROWS_AT_ONCE}


@pytest.mark.parametrize("frozen", range(3))
def test_linear_cross_entropy_skips_gradients_that_nobody_needs(frozen):
    tensors, labels = make_inputs(5)
    tensors[frozen].requires_grad_(False)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    actual = torch.autograd.grad(linear_cross_entropy(*tensors, labels), wanted)
    torch.testing.assert_close(actual, torch.autograd.grad(F.cross_entropy(F.linear(*tensors), labels), wanted))
    with torch.no_grad():
        assert not linear_cross_entropy(*tensors, labels).requires_grad


def test_linear_cross_entropy_is_exact_where_probabilities_vanish():
    weight, bias = torch.eye(3), torch.tensor([0.0, 500.0, -500.0])
    loss = linear_cross_entropy(torch.zeros(1, 3, requires_grad=True), weight, bias, torch.tensor([2]))
    assert loss.item() == 1000


def test_linear_cross_entropy_of_no_rows_is_zero():
    tensors, labels = make_inputs(0)
    loss = linear_cross_entropy(*tensors, labels)
    loss.backward()
    assert loss == 0
    assert all(tensor.grad.eq(0).all() for tensor in tensors)


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_linear_cross_entropy_under_autocast_is_close_to_fp32(autocast_dtype):
    tensors, labels = make_inputs(8, torch.float32)
    expected = plain(*tensors, labels)
    with torch.autocast("cpu", autocast_dtype):
        actual = linear_cross_entropy(*tensors, labels)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0)
    scale = 2.0**12  # of a gradient scaler: gradients are multiplied in fp32, where they do not overflow
    actual, expected = (torch.autograd.grad(loss * scale, tensors) for loss in (actual, expected))
    for first, second in zip(actual, expected, strict=True):
        assert first.dtype == torch.float32
        torch.testing.assert_close(first, second, rtol=0.05, atol=0.02 * second.abs().max().item())
