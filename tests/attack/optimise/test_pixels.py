import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attack.optimise.pixels import BOXES, HALF_LEVEL, PixelMap, dct_matrix


def images(shape, seed=0):
    return torch.rand(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(BOXES),
    st.sampled_from([1, 3]),
    st.integers(2, 17),
    st.floats(0, 2),
    st.floats(0.1, 3),
    st.integers(0, 99),
)
def test_decode_undoes_encode(box, channels, side, power, gain, seed):
    pixels = PixelMap((channels, side, side), box, power, gain, dtype=torch.float64)
    x = images((channels, side, side), seed).clamp(HALF_LEVEL, 1 - HALF_LEVEL)
    assert torch.allclose(pixels.decode(pixels.encode(x)), x, atol=1e-9)


@given(st.integers(1, 40))
def test_dct_matrix_is_orthonormal(n):
    matrix = dct_matrix(n)
    assert torch.allclose(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), atol=1e-12)


def test_plain_pixels_are_the_identity():
    x = images((3, 8, 8))
    assert torch.equal(PixelMap((3, 8, 8), "none", dtype=torch.float64).decode(x), x)


def test_low_frequencies_have_the_larger_gain():
    pixels = PixelMap((1, 16, 16), "none", 1.0, dtype=torch.float64)
    low, high = torch.zeros(2, 1, 1, 16, 16, dtype=torch.float64)
    low[..., 0, 1] = high[..., 15, 15] = 1
    assert pixels.decode(low).norm() > 9 * pixels.decode(high).norm()


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_images_are_on_average_as_large_as_their_variables(power):
    """Over all unit vectors: step sizes then mean the same with the spectral scaling as without it."""
    pixels = PixelMap((1, 6, 7), "none", power, dtype=torch.float64)
    units = torch.eye(42, dtype=torch.float64).view(42, 1, 6, 7)
    assert pixels.decode(units).square().sum((1, 2, 3)).mean().item() == pytest.approx(1)


def test_sigmoid_box_starts_inside_even_at_black_and_white():
    pixels = PixelMap((1, 2, 2), "sigmoid", dtype=torch.float64)
    z = pixels.encode(torch.tensor([[[[0.0, 1.0], [0.5, 0.25]]]], dtype=torch.float64))
    assert z.isfinite().all()


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_clamp_box_projects_and_the_others_leave_alone(power):
    x = images((3, 8, 8)) * 2 - 0.5
    for box in BOXES:
        pixels = PixelMap((3, 8, 8), box, power, dtype=torch.float64)
        z = PixelMap((3, 8, 8), "none", power, dtype=torch.float64).encode(x)
        before = z.clone()
        pixels.project_(z)
        if box == "clamp":
            assert torch.allclose(pixels.decode(z), x.clamp(0, 1), atol=1e-9)
        else:
            assert torch.equal(z, before)


def test_gradient_agrees_with_finite_differences():
    pixels = PixelMap((3, 4, 4), "sigmoid", 1.0, 0.5, dtype=torch.float64)
    assert torch.autograd.gradcheck(pixels.decode, images((3, 4, 4)).requires_grad_())


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="tanh"):
        PixelMap((1, 4, 4), "tanh")
    with pytest.raises(ValueError, match="0"):
        PixelMap((1, 4, 4), chroma_gain=0.0)
