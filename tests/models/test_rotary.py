import torch

from src.models.rotary import rotary_cos_sin, rotate, split_and_rotate

HEADS, SIZE = 2, 6


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def angles(positions, dtype=torch.float64):
    cos, sin = rotary_cos_sin(torch.tensor([positions]), SIZE, 100)
    return cos.to(dtype), sin.to(dtype)


def test_rotary_scores_depend_on_relative_position_only():
    query, key = random(2, 1, 1, 1, SIZE)
    scores = []
    for start in (0, 1, 37):
        cos, sin = rotary_cos_sin(torch.tensor([[start, start + 5]]), SIZE, 100)
        rotated_query = rotate(query, cos[:, :1], sin[:, :1])
        rotated_key = rotate(key, cos[:, 1:], sin[:, 1:])
        scores.append((rotated_query * rotated_key).sum())
    torch.testing.assert_close(scores[1:], scores[:1] * 2, atol=1e-5, rtol=0)
    assert abs(scores[0] - (query * key).sum()) > 0.1


def test_rotary_turns_the_pair_of_halves_by_position_times_frequency():
    cos, sin = rotary_cos_sin(torch.arange(4)[None], SIZE, 100)
    for position in range(4):
        for i in range(SIZE // 2):
            angle = torch.tensor(position * 100 ** (-2 * i / SIZE))
            torch.testing.assert_close(cos[0, position, 0, i], angle.cos())
            torch.testing.assert_close(sin[0, position, 0, i], angle.sin())
    unit = torch.zeros(1, 4, 1, SIZE)
    unit[..., 1] = 1
    rotated = rotate(unit, cos, sin)
    torch.testing.assert_close(rotated[0, :, 0, 1], cos[0, :, 0, 1])
    torch.testing.assert_close(rotated[0, :, 0, 1 + SIZE // 2], sin[0, :, 0, 1])


def test_split_leaves_values_and_rotates_by_the_plain_formula():
    projected = random(2, 5, 3 * HEADS * SIZE)
    cos, sin = angles([0, 1, 2, 3, 9])
    heads = projected.unflatten(-1, (3, HEADS, SIZE))
    expected = [rotate(heads[:, :, 0], cos, sin), rotate(heads[:, :, 1], cos, sin), heads[:, :, 2]]
    actual = split_and_rotate(projected, HEADS, cos, sin)
    torch.testing.assert_close([part.transpose(1, 2) for part in actual], expected)
    unrotated = split_and_rotate(projected, HEADS)
    torch.testing.assert_close([part.transpose(1, 2) for part in unrotated], list(heads.unbind(2)))


def test_rotation_gradients_match_finite_differences():
    cos, sin = angles([0, 1, 7])
    projected = random(2, 3, 3 * HEADS * SIZE).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: split_and_rotate(x, HEADS, cos, sin), (projected,))
    assert torch.autograd.gradcheck(lambda x: split_and_rotate(x, HEADS), (projected,))


def test_rotary_angles_keep_their_precision_in_low_precision_models():
    projected = random(1, 2, 3 * HEADS * SIZE).bfloat16()
    cos, sin = angles([0, 2001], dtype=torch.float32)
    rotated = split_and_rotate(projected, HEADS, cos, sin)[0]
    exact = split_and_rotate(projected.double(), HEADS, cos.double(), sin.double())[0]
    assert rotated.dtype == torch.bfloat16
    torch.testing.assert_close(rotated.double(), exact, rtol=2**-8, atol=2**-9)  # one rounding of the result


def test_rotated_states_of_a_narrow_type_are_rounded_once():
    cos, sin = rotary_cos_sin(torch.arange(40)[None], SIZE, 100)  # in fp32
    projected = random(2, 40, 3 * HEADS * SIZE).to(torch.bfloat16)
    exact = split_and_rotate(projected.float(), HEADS, cos, sin)
    for narrow, wide in zip(split_and_rotate(projected, HEADS, cos, sin), exact, strict=True):
        assert torch.equal(narrow, wide.to(torch.bfloat16))
