import math

import pytest
import torch

from priors import (
    SMOOTHING,
    Prior,
    Roughness,
    anisotropic_variation,
    opponent_basis,
    rotate_colours,
)

FLAT = math.sqrt(SMOOTHING)


def of_order(order):
    """The mean length of differences of one order, all channels together."""

    def roughness(images, power=1.0):
        weights = (0.0,) * (order - 1) + (1.0,)
        return Roughness.apply(images, weights, ((images.shape[1], 1.0),), power)

    return roughness


total_variation, curvature, third_variation = map(of_order, (1, 2, 3))


def step_image(height=4, width=6, jump=0.5, channels=1):
    """Dark left half, bright right half."""
    image = torch.zeros(1, channels, height, width, dtype=torch.float64)
    image[..., width // 2 :] = jump
    return image


def test_total_variation_of_a_step_is_its_height_times_its_length():
    image = step_image()
    edge, pixels = 4 * math.hypot(0.5, FLAT), 4 * 6
    assert total_variation(image).item() == pytest.approx((edge + (pixels - 4) * FLAT) / pixels)
    assert anisotropic_variation(image).item() == pytest.approx(0.5 / 5)  # five differences in a row, one is 0.5


def test_total_variation_couples_directions_and_channels():
    image = torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    image[0, 0, 0, 1] = 0.3  # right of the corner, in one channel
    image[0, 1, 1, 0] = 0.4  # below it, in the other
    corner, others = math.hypot(0.5, FLAT), math.hypot(0.3, FLAT) + math.hypot(0.4, FLAT) + FLAT
    assert total_variation(image).item() == pytest.approx((corner + others) / 4)


def test_curvature_is_blind_to_ramps_but_not_to_steps():
    ramp = torch.linspace(0, 1, 8, dtype=torch.float64).expand(1, 3, 8, 8)
    assert curvature(ramp).item() == pytest.approx(FLAT)
    assert curvature(step_image()).item() > 0.01
    assert total_variation(ramp).item() > 0.1


def test_third_variation_is_blind_to_quadratic_shading():
    across = torch.linspace(0, 1, 8, dtype=torch.float64)
    bowl = (across[:, None].square() - across[:, None] * across + across.square()).expand(1, 3, 8, 8)
    assert third_variation(bowl).item() == pytest.approx(FLAT)
    assert curvature(bowl).item() > 10 * FLAT
    spike = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    spike[..., 4, 4] = 1
    assert third_variation(spike).item() == pytest.approx(third_variation(spike.mT).item())
    assert third_variation(spike).item() > curvature(spike).item()


def test_a_power_below_one_prefers_one_steep_edge_to_a_ramp():
    edge, ramp = step_image(jump=1.0, width=8), torch.linspace(0, 1, 8, dtype=torch.float64).expand(1, 1, 4, 8)
    rises = [total_variation(image, 0.5).item() for image in (edge, ramp)]
    assert rises[0] < 0.7 * rises[1]
    assert total_variation(edge).item() == pytest.approx(total_variation(ramp).item(), rel=0.02)


def test_opponent_basis_is_orthonormal_and_puts_grey_on_luma():
    basis = opponent_basis(3, dtype=torch.float64)
    assert torch.allclose(basis @ basis.T, torch.eye(3, dtype=torch.float64))
    grey = torch.full((1, 3, 2, 2), 0.5, dtype=torch.float64)
    assert rotate_colours(grey, basis)[:, 1:].abs().max() < 1e-12
    assert torch.equal(opponent_basis(1), torch.eye(1))


def test_chroma_weight_acts_on_colour_edges_only():
    grey_edge = step_image(channels=3)
    colour_edge = grey_edge.clone()
    colour_edge[:, 1:] = 0
    light, heavy = Prior("opponent", 1.0), Prior("opponent", 4.0)
    assert heavy(grey_edge).item() == pytest.approx(light(grey_edge).item() + 3 * FLAT)
    assert heavy(colour_edge) > 1.5 * light(colour_edge)


def test_opponent_prior_of_grey_images_is_plain_total_variation():
    image = step_image(channels=1)
    assert Prior("opponent", 5.0)(image) == total_variation(image)


@pytest.mark.parametrize("prior", [Prior("opponent", 2.0, 0.7, 0.4, 0.8), Prior("rgb", 1.0, 0.3), Prior("anisotropic")])
def test_gradient_agrees_with_finite_differences(prior):
    images = torch.rand(2, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(prior, images.requires_grad_())


@pytest.mark.parametrize("name", ["opponent", "rgb", "anisotropic"])
def test_weight_means_the_same_at_every_batch_size(name):
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    prior = Prior(name, 2.0, 1.0)
    assert prior(images.repeat(3, 1, 1, 1)).item() == pytest.approx(prior(images).item(), rel=1e-5)


def test_prior_names_itself():
    assert "opponent" in repr(Prior("opponent", 2.5))
    assert "2.5" in repr(Prior("opponent", 2.5))
    with pytest.raises(ValueError, match="wavelet"):
        Prior("wavelet")
