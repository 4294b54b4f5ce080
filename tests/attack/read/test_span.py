import math

import pytest
import torch
from torch import nn

from attack.read.span import consistent_inputs, row_precision, span_of
from network.kinds.affine import Geometry

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def conv(c_in, c_out, kernel, **settings):
    return nn.Conv2d(c_in, c_out, kernel, bias=False, **settings)


def layer_gradient(geometry, inputs, deltas):
    """G = (1/B) sum_ip delta_ip patch_p(a_i)^T and gamma, by the definition."""
    patches = geometry.patches(inputs)
    deltas = deltas.flatten(2).transpose(1, 2) if deltas.dim() > 2 else deltas[:, None]
    return torch.einsum("npo,npi->oi", deltas, patches) / len(inputs), deltas.sum((0, 1)) / len(inputs)


def case(geometry, batch_size, seed=0, dtype=torch.float32):
    """Random inputs of a layer, and its gradients as an update would hold them."""
    inputs = randn(batch_size, *geometry.input_shape, seed=seed).relu()
    deltas = randn(batch_size, *geometry.output_shape, seed=seed + 1)
    gradient, bias_gradient = layer_gradient(geometry, inputs, deltas)
    return inputs, gradient.to(dtype), bias_gradient.to(dtype)


def outside(span, inputs):
    """The share of each input outside A."""
    flat = inputs.flatten(1)
    return (flat - flat @ span.basis.T @ span.basis).norm(dim=1) / flat.norm(dim=1)


LAYERS = [
    (nn.Linear(30, 20), (30,)),
    (conv(12, 80, 3, padding=1), (12, 4, 4)),
    (conv(8, 64, 3), (8, 5, 5)),  # no padding
    (conv(6, 70, (3, 5), padding=(1, 2)), (6, 4, 4)),
    (conv(12, 50, 3, padding=1), (12, 1, 1)),  # the kernel touches padding but for its centre
    (conv(12, 50, 3), (12, 3, 3)),  # one position that covers the whole input
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_the_space_holds_the_batch_and_nothing_else(layer, shape):
    geometry = Geometry.of(layer, shape)
    inputs, gradient, bias_gradient = case(geometry, 3)
    span = span_of(gradient, geometry, 3, bias_gradient)
    assert span.determined
    assert span.rank == 3 * geometry.positions
    assert span.dimension == 3
    assert outside(span, inputs).max() < 2e-5
    assert torch.allclose(span.basis @ span.basis.T, torch.eye(3, dtype=F64), atol=1e-12)


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_the_bias_gradient_gives_every_patch_its_scale(layer, shape):
    geometry = Geometry.of(layer, shape)
    inputs, gradient, bias_gradient = case(geometry, 3)
    span = span_of(gradient, geometry, 3, bias_gradient)
    assert (geometry.patches(inputs) @ span.ones - 1).abs().max() < 1e-4
    assert span_of(gradient, geometry, 3).ones is None


@pytest.mark.parametrize(("layer", "shape"), [*LAYERS, (conv(6, 9, 3, padding=2, dilation=2, stride=3), (6, 8, 7))])
def test_patches_are_the_layers_own_and_assemble_is_their_adjoint(layer, shape):
    geometry = Geometry.of(layer, shape)
    inputs, patches = randn(2, *shape), randn(2, geometry.positions, layer.weight[0].numel(), seed=1)
    weight = layer.weight.detach().double().flatten(1)
    bias = 0 if layer.bias is None else layer.bias.detach().double()
    outputs = geometry.patches(inputs) @ weight.T + bias  # (2, P, c_out)
    assert torch.allclose(outputs.transpose(1, 2).reshape(2, *geometry.output_shape), layer.double()(inputs))
    layer.float()
    left, right = (geometry.patches(inputs) * patches).sum(), (inputs * geometry.assemble(patches)).sum()
    assert torch.allclose(left, right)


@pytest.mark.parametrize(
    "layer",
    [conv(14, 90, 2, stride=2), conv(14, 90, 3, padding=2, dilation=2)],  # every second pixel is a net of its own
)
def test_patches_that_are_not_linked_leave_the_space_too_large(layer):
    geometry = Geometry.of(layer, (14, 4, 4))
    _, gradient, _ = case(geometry, 3)
    span = span_of(gradient, geometry, 3)
    assert span.spanned
    assert not span.determined  # any mixture of patches is consistent


def test_a_stride_below_the_kernel_still_overlaps():
    geometry = Geometry.of(conv(8, 120, 5, stride=2, padding=2), (8, 8, 8))
    inputs, gradient, _ = case(geometry, 3)
    span = span_of(gradient, geometry, 3)
    assert span.determined
    assert outside(span, inputs).max() < 1e-4


@pytest.mark.parametrize(
    ("kernel", "padding", "shape", "are_tied"),
    [((3, 3), 1, (8, 4, 4), True), ((5, 1), (2, 0), (8, 4, 4), False), ((1, 5), (0, 2), (8, 1, 4), True)],
)
def test_patches_must_overlap_both_ways(kernel, padding, shape, are_tied):
    geometry = Geometry.of(nn.Conv2d(8, 60, kernel, padding=padding), shape)
    assert geometry.overlaps == are_tied
    _, gradient, _ = case(geometry, 2)
    assert span_of(gradient, geometry, 2).determined == are_tied


@pytest.mark.parametrize("batch_size", [5, 6])
def test_the_rank_bound_says_when_a_layer_is_no_use(batch_size):
    geometry = Geometry.of(nn.Linear(40, 6), (40,))
    inputs, gradient, _ = case(geometry, batch_size)
    span = span_of(gradient, geometry, batch_size)
    assert span.spanned == span.determined == (batch_size < 6)
    if span.determined:
        assert outside(span, inputs).max() < 1e-5


@pytest.mark.parametrize(("channels", "is_spanned"), [(47, False), (48, True), (49, True)])
def test_as_many_channels_as_patches_are_enough(channels, is_spanned):
    """Nothing is left over that would show noise, but overlapping patches show whether images are what is spanned."""
    geometry = Geometry.of(conv(12, channels, 3, padding=1), (12, 4, 4))
    inputs, gradient, _ = case(geometry, 3)
    span = span_of(gradient, geometry, 3)
    assert span.spanned == span.determined == is_spanned
    if is_spanned:
        assert span.dimension == 3
        assert outside(span, inputs).max() < 1e-3


def test_inputs_that_depend_on_each_other_span_less():
    geometry = Geometry.of(nn.Linear(30, 20), (30,))
    inputs = randn(3, 30)
    inputs[2] = inputs[0] + inputs[1]
    gradient, _ = layer_gradient(geometry, inputs, randn(3, 20, seed=1))
    assert span_of(gradient.float(), geometry, 3).dimension == 2


def test_weak_rows_are_as_good_as_strong_ones():
    """An image that only weak outputs see drowns in the raw matrix's rounding, not in the weighted one's."""
    geometry = Geometry.of(nn.Linear(60, 30), (60,))
    inputs, deltas = randn(3, 60), randn(3, 30, seed=1)
    deltas[2, :20] = 0
    deltas[:2, 20:] = 0
    deltas[2] *= 1e-9
    gradient = layer_gradient(geometry, inputs, deltas)[0].float()
    span = span_of(gradient, geometry, 3)
    assert span.rank == 3
    assert outside(span, inputs).max() < 1e-5


def test_the_rank_follows_the_noise():
    geometry = Geometry.of(nn.Linear(200, 100), (200,))
    inputs, deltas = randn(4, 200), randn(4, 100, seed=1)
    deltas[3] *= 1e-3
    gradient, _ = layer_gradient(geometry, inputs, deltas)
    quiet, loud = (gradient + level * randn(100, 200, seed=2) for level in (1e-7, 4e-3))
    assert span_of(quiet, geometry, 4).rank == 4
    assert outside(span_of(quiet, geometry, 4), inputs).max() < 1e-2
    assert span_of(loud, geometry, 4).rank == 3  # the weak image is gone, the others are not
    assert outside(span_of(loud, geometry, 4), inputs)[:3].max() < 5e-2


@pytest.mark.parametrize(("times", "rank"), [(0.5, 1), (2.5, 2)])
def test_what_counts_is_above_the_largest_singular_value_of_the_noise(times, rank):
    edge = 1e-4 * (100**0.5 + 200**0.5)
    left, right = torch.linalg.qr(randn(100, 2))[0], torch.linalg.qr(randn(200, 2, seed=1))[0]
    gradient = left @ torch.diag(torch.tensor([1.0, times * edge], dtype=F64)) @ right.T
    noisy = gradient + 1e-4 * randn(100, 200, seed=2)
    assert span_of(noisy, Geometry.of(nn.Linear(200, 100), (200,)), 2).rank == rank


def test_the_measured_noise_is_the_noise():
    geometry = Geometry.of(nn.Linear(200, 100), (200,))
    _, gradient, _ = case(geometry, 4, dtype=F64)
    span = span_of(gradient + 1e-4 * randn(100, 200, seed=5), geometry, 4)
    per_row = span.noise / span.rows
    assert 0.8e-4 < per_row.median() < 1.25e-4


def test_noise_closes_the_gap_of_a_convolution():
    geometry = Geometry.of(conv(12, 80, 3, padding=1), (12, 4, 4))
    _, gradient, _ = case(geometry, 3)
    gaps = [span_of(gradient + level * randn(80, 108, seed=3), geometry, 3).gap for level in (0, 1e-4, 1e-2)]
    assert gaps[0] > 20 * gaps[1] > 400 * gaps[2]


def test_a_row_without_gradient_has_no_weight():
    matrix = randn(5, 20)
    matrix[2] = 0
    rows = row_precision(matrix, 3, 1e-7)
    assert rows[2] == 0
    assert (rows[[0, 1, 3, 4]] > 0).all()


def test_a_gradient_of_zeros_determines_nothing():
    geometry = Geometry.of(conv(3, 40, 3, padding=1), (3, 4, 4))
    span = span_of(torch.zeros(40, 27), geometry, 2, torch.zeros(40))
    assert (span.rank, span.dimension, span.determined, span.ones) == (0, 0, False, None)


def test_one_position_has_nothing_to_contradict_it():
    geometry = Geometry.of(nn.Linear(4, 9), (4,))
    basis, angles, gap = consistent_inputs(torch.eye(4, dtype=F64)[:2], geometry, 2)
    assert basis.abs().sum() == 2
    assert angles.max() == 0
    assert gap == math.inf


@pytest.mark.parametrize(
    ("layer", "shape", "words"),
    [
        (conv(4, 4, 3, groups=2), (4, 8, 8), "2 groups"),
        (conv(4, 4, 3, padding_mode="reflect", padding=1), (4, 8, 8), "'reflect'"),
        (conv(4, 4, 3, padding="same"), (4, 8, 8), "'same'"),
        (conv(4, 4, 3), (3, 8, 8), r"\(4, H, W\), not \(3, 8, 8\)"),
        (conv(4, 4, 5), (4, 3, 3), "3x3 are smaller"),
        (nn.Linear(7, 3), (8,), r"\(7,\), not \(8,\)"),
        (nn.ReLU(), (8,), "ReLU is neither"),
        (nn.ConvTranspose2d(4, 4, 3), (4, 8, 8), "ConvTranspose2d is neither"),
    ],
)
def test_layers_that_cannot_be_read_say_why(layer, shape, words):
    with pytest.raises(ValueError, match=words):
        Geometry.of(layer, shape)


@pytest.mark.parametrize(
    ("gradient", "bias_gradient", "words"),
    [
        (torch.zeros(5, 8), None, r"\(5, 8\), the layer's weight 6 x 8"),
        (torch.zeros(6, 8), torch.zeros(5), "5 entries for 6 outputs"),
        (torch.full((6, 8), math.nan), None, "not finite"),
        (torch.zeros(6, 8), torch.full((6,), math.inf), "not finite"),
    ],
)
def test_gradients_that_do_not_fit_say_why(gradient, bias_gradient, words):
    with pytest.raises(ValueError, match=words):
        span_of(gradient, Geometry.of(nn.Linear(8, 6), (8,)), 2, bias_gradient)
