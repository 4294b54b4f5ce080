"""What BatchNorm hides of a layer's input, and how it is told after all."""

from dataclasses import replace

import pytest
import torch
from batchnorm import relative_errors
from conftest import generator
from torch import nn

from attack.walk.gauge import Gauge, factor_by_shift, hidden
from attack.walk.sources import IdentitySource, Normalisation, NormalisedSource
from network.kinds.affine import LinearMap
from network.known_outputs import KnownOutputs, UndeterminedError


def normalised(layer, u, delta=None, *, shared=False):
    """Equations of a layer in front of BatchNorm in training mode, exact at u."""
    layer = layer.double().requires_grad_(False)
    z = layer(u)
    axes = (0, *range(2, z.dim()))
    delta = torch.randn(z.shape, generator=generator(5), dtype=z.dtype) if delta is None else delta
    mean, variance = z.mean(axes), z.var(axes, unbiased=False)
    wide = (-1, *(1,) * (z.dim() - 2))
    values = (z - mean.view(wide)) / (variance + EPS).sqrt().view(wide)
    ones = torch.ones_like(mean)
    moments = (mean, (variance + EPS).sqrt()) if shared else (None, None)
    gradients = (delta * values).sum(axes), delta.sum(axes)
    norm = Normalisation(ones, 0 * ones, EPS, *gradients, 0 * ones, ones, *moments)
    known = KnownOutputs.of(values, delta, 1e-7 * torch.ones_like(values)).untold()
    linear = LinearMap.of(layer, tuple(u.shape[1:]))
    return NormalisedSource("layer", linear, 0 * ones, known, torch.ones_like(layer.weight), 1e-7, 0.0, ones[:1], norm)


def rectified(*shape):
    return torch.randn(shape, generator=generator(3), dtype=torch.float64).relu()


EPS = 1e-12  # a larger one tells the factor, a little
CONV = {"kernel_size": 3, "padding": 1, "bias": False}


@pytest.mark.parametrize(
    ("layer", "shape", "places"),
    [
        (nn.Conv2d(2, 8, **CONV), (3, 2, 6, 6), 0),
        (nn.Conv2d(2, 8, stride=2, **CONV), (3, 2, 6, 6), 1),
        (nn.Conv2d(2, 8, 1, bias=False), (3, 2, 6, 6), 1),
        (nn.Conv2d(2, 8, 1, stride=2, bias=False), (3, 2, 6, 6), 4),
        (nn.Conv2d(2, 8, stride=2, **CONV), (3, 2, 2, 2), 4),
        (nn.Linear(5, 8, bias=False), (3, 5), 1),
    ],
)
def test_hidden_shifts_change_nothing_and_others_do(layer, shape, places):
    u = rectified(*shape)
    source = normalised(layer, u)
    is_open = hidden([source], u)
    assert is_open.factor
    assert len(is_open.places) == places
    values, _ = source.normalised(u)
    for place in is_open.places:
        assert torch.allclose(source.normalised(u + 0.3 * place)[0], values)
    whole = source.normalised(u + 0.3)[0]
    assert torch.allclose(whole, values) == (places > 0 and bool((sum(is_open.places) > 0).all()))


def test_an_identity_beside_it_pins_the_factor_and_the_channels_it_knows():
    u = rectified(3, 2, 6, 6)
    source = normalised(nn.Conv2d(2, 8, 1, bias=False), u)
    known = KnownOutputs.of(u, torch.zeros_like(u), 1e-7 * torch.ones_like(u))
    half = replace(known, known=known.known & (torch.arange(2).view(-1, 1, 1) == 0))
    is_open = hidden([source, IdentitySource(half)], u)
    assert not is_open.factor
    assert is_open.channels[0].tolist() == [False, True]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shared", [True, False])
def test_factor_and_shifts_are_found(stride, shared):
    """By shared deviations and the zeros of the ReLU, or by the gradient of the shift in front of it."""
    u = rectified(3, 4, 8, 8)
    source = normalised(nn.Conv2d(4, 12, stride=stride, **CONV), u, shared=shared)
    shift = (source.delta(u) * (u > 0)).sum((0, 2, 3))
    place = torch.zeros(8, 8, dtype=torch.float64)
    place[::2, ::2] = stride == 2
    other = 0.7 * u + torch.tensor([0.2, -0.1, 0.3, 0.0]).view(-1, 1, 1) * place
    gauge = Gauge(is_rectified=True, shift_gradient=None if shared else shift)
    assert relative_errors(gauge.fixed(other, [source]), u).max() < 1e-6


def test_shared_means_tell_shifts_where_no_zeros_do():
    u = torch.rand((3, 4, 8, 8), generator=generator(3), dtype=torch.float64)
    source = normalised(nn.Conv2d(4, 12, stride=2, **CONV), u, shared=True)
    place = torch.zeros(8, 8, dtype=torch.float64)
    place[::2, ::2] = 1
    other = 1.3 * u + torch.tensor([0.2, -0.1, 0.3, 0.1]).view(-1, 1, 1) * place
    assert relative_errors(Gauge().fixed(other, [source]), u).max() < 1e-6


@pytest.mark.parametrize("shared", [True, False])
def test_a_sum_decides_whether_a_single_lowest_value_is_a_zero(shared):
    """One position: each column has a value for each image. What is never zero has the mean that BatchNorm gives it."""
    raw = torch.randn((4, 30), generator=generator(3), dtype=torch.float64)
    shift = torch.linspace(0.2, 1.5, 30, dtype=torch.float64)
    u = (raw - raw.mean(0) + shift).relu()
    lowest = u.amin(0)
    assert 3 < int((lowest > 0).sum()) < 20
    source = normalised(nn.Linear(30, 40, bias=False), u, shared=shared)
    sums = (source.delta(u) * (u > 0)).sum(0)
    gauge = Gauge(is_rectified=True, shift_gradient=sums, mean=shift)
    other = 0.6 * u + torch.randn(30, generator=generator(4), dtype=torch.float64)
    assert relative_errors(gauge.fixed(other, [source]), u).max() < 1e-6


def test_nothing_is_made_up():
    u = torch.rand((3, 4, 8, 8), generator=generator(3), dtype=torch.float64)
    source = normalised(nn.Conv2d(4, 12, stride=2, **CONV), u)
    with pytest.raises(UndeterminedError, match="a factor common to all images"):
        Gauge().fixed(u, [source])
    few = normalised(nn.Conv2d(4, 3, stride=2, **CONV), u, shared=True)
    with pytest.raises(UndeterminedError, match="shared means do not tell so many"):
        Gauge().fixed(u, [few])
    delta = torch.randn(u.shape, generator=generator(6), dtype=torch.float64)
    with pytest.raises(UndeterminedError, match="do not agree"):
        factor_by_shift(u, delta, torch.ones(4, dtype=torch.float64))
