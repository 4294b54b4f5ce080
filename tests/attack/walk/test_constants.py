"""Every constant of the walk, held from both sides where both matter: a test fails if its constant moves fourfold."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from attack.solve.budget import unlimited
from attack.solve.cgls import Solution
from attack.walk.block import Together
from attack.walk.equations import ForwardRows, Rows
from attack.walk.layer_solve import LayerSolver
from attack.walk.methods import Alone
from attack.walk.noise import noise_of, without_noise
from attack.walk.sources import LayerSource
from network.kinds.affine import LinearMap
from network.known_outputs import KnownOutputs
from network.stage import Residual, Stage


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def double(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------
# Masks


@dataclass
class MadeLayer:
    """A convolution on two images whose masks are partly wrong, and what is right."""

    source: LayerSource
    truth: torch.Tensor
    right: torch.Tensor  # delta behind the right masks

    def solved(self):
        solver = LayerSolver(unlimited(), too_weak=torch.zeros(2).bool(), needs_all=False)
        method = Alone(self.truth.shape, generator(), unlimited())
        return solver.solve("conv", [self.source], method, is_after_relu=False)

    def is_mended(self):
        solved = self.solved()
        return solved.record.determined and torch.equal(solved.sources[0].above.delta, self.right)


def made_layer(width, seen, margin, right, delta, noise=0.0, seed=1):
    conv, truth = nn.Conv2d(3, width, 3, padding=1, dtype=torch.float64), double(2, 3, 4, 4)
    linear = LinearMap.of(conv, (3, 4, 4))
    gradient = linear.weights(truth, right)
    gradient = gradient * (1 + noise * double(*gradient.shape, seed=9))
    outputs = KnownOutputs.of(linear.outputs(truth), torch.where(seen, delta, 0.0), torch.full_like(delta, 1e-9))
    masked = torch.where(seen, 0.0, delta)
    above = replace(outputs.untold(), masked_delta=masked, margin=margin, is_gated=True)
    precision = max(1.2e-7, noise)
    source = LayerSource("conv", linear, conv.bias.detach(), above, gradient, precision, 0.0, 0 * double(2))
    return MadeLayer(source, truth, right)


def with_wrong_masks(count, width=48, loudness=1.0, noise=0.0):
    """So many entries are masked that were active; as many others are as near to the kink."""
    delta = double(2, width, 4, 4, seed=1)
    delta[1] *= loudness
    picked = torch.randperm(delta.numel(), generator=generator(1))
    margin, seen = torch.full_like(delta, 45.0), torch.ones_like(delta, dtype=torch.bool)
    margin.view(-1)[picked[: 2 * count]] = 1.0
    seen.view(-1)[picked[:count]] = False
    return made_layer(width, seen, margin, delta, delta, noise)


def with_misjudged_noise(factor, width=48, active=0.5, seed=1):
    """Noise is so many times what it was taken for: masks are those of the wrong noise, in all channels."""
    delta = double(2, width, 4, 4, seed=seed)
    is_active = torch.rand(delta.shape, generator=generator(5)) < active
    far = 6.0 * factor * (1 + double(*delta.shape, seed=7).abs())
    near = 3.0 * factor * double(*delta.shape, seed=8).clamp(-1.9, 1.9)
    margin = torch.where(is_active, far, near)
    return made_layer(width, margin > 6, margin, torch.where(is_active, delta, 0.0), delta)


def test_wrong_masks_are_mended_up_to_many_in_a_channel():  # EXPLAINED upwards, SINGLE_FLIPS downwards
    assert with_wrong_masks(1).is_mended()
    assert with_wrong_masks(30, width=24, loudness=1e-3).is_mended()


def test_what_noise_might_have_left_is_changed_where_it_is_notable():  # NOTABLE upwards
    assert with_wrong_masks(30, loudness=1e-3, noise=1e-5).is_mended()


@pytest.mark.parametrize("factor", [4, 16, 64])
def test_masks_of_other_noise_are_tried(factor):  # COARSER, ZERO, RANGE and EXPLAINED downwards
    assert with_misjudged_noise(factor).is_mended()


def test_masks_of_less_noise_are_tried_too():  # the last of COARSER
    assert with_misjudged_noise(0.4, width=24).is_mended()


def test_zero_lies_between_three_and_twelve_deviations():  # ZERO
    values = torch.tensor([[3.0, 12.0]])
    assert without_noise(values, torch.ones(1, 1)).tolist() == [[0.0, 12.0]]


def test_what_is_sure_lies_between_twenty_and_eighty_deviations():  # RANGE
    outputs = KnownOutputs.of(double(1, 2), double(1, 2), torch.ones(1, 1).double())
    assert replace(outputs, margin=torch.tensor([[20.0, 80.0]])).sure.tolist() == [[False, True]]


def test_a_row_lost_by_cancellation_weighs_no_more_than_a_thousand_times_the_strongest():  # CANCELLED
    layer = with_wrong_masks(1).source
    gradient = layer.gradient.clone()
    gradient[0] *= 1e-9
    weights = replace(layer, gradient=gradient).gradient_weights.flatten()
    strongest = gradient.flatten(1).square().mean(1).sqrt().max()
    assert 0.3e3 < float(weights[0] * layer.precision * strongest) < 3e3


# ----------------------------------------------------------------------------------------------------
# Whether a layer is believed


class Scripted:
    """A method that comes to a given end."""

    unknowns = 10

    tries_noise = True
    least = 0.0

    room = 1.0

    def __init__(self, residual, noise, error, is_linear):
        self.residual, self.is_linear, self._noise, self._error = residual, is_linear, noise, error

    def count(self, sources):
        return 20

    def noise(self, sources):
        return self._noise

    def solve(self, sources):
        return torch.ones(len(self._error), 5).double(), Solution(torch.ones(1), self.residual, 1, "converged")

    def recovery_test(self, sources, noise):
        return torch.tensor(self._error).double()

    def spread(self, sources, u, solution, error):
        return torch.full((len(u), 1), 1e-9).double()


def believed(residual=1e-9, noise=1e-9, error=(1e-6,) * 10, *, is_linear=True):
    solver = LayerSolver(unlimited(), too_weak=torch.zeros(len(error)).bool(), needs_all=False)
    return solver.solve("layer", [], Scripted(residual, noise, error, is_linear), is_after_relu=False).record.determined


def test_a_known_input_must_come_back_to_a_hundredth():  # DETERMINED
    assert believed(error=(3e-3,) * 10)
    assert not believed(error=(3e-2,) * 10)


def test_a_tenth_of_the_images_may_be_too_weak():  # TOO_WEAK
    assert believed(error=(1.0,) + (1e-6,) * 9)
    assert not believed(error=(1.0,) * 3 + (1e-6,) * 7)


def test_equations_may_contradict_each_other_by_a_thousandth():  # TRUSTED
    assert believed(residual=5e-4, noise=1e-6, error=(1e-9,) * 10)
    assert not believed(residual=2e-3, noise=1e-6, error=(1e-9,) * 10)


def test_or_by_three_times_the_noise():  # CONTRADICTED
    assert believed(residual=2e-2, noise=1e-2)
    assert not believed(residual=6e-2, noise=1e-2)


def test_and_those_of_a_block_by_forty_times():  # SETTLED_NOISE
    assert believed(residual=2e-5, noise=1e-6, is_linear=False)
    assert not believed(residual=8e-5, noise=1e-6, is_linear=False)


# ----------------------------------------------------------------------------------------------------
# Noise


def sparse(share, size):
    """Values of 400 entries about one, of which a share gathers around zero, not below it, with so much noise."""
    values = 1 + double(1, 400).abs()
    zeros = torch.rand(1, 400, generator=generator(1)) < share
    return torch.where(zeros, size * double(1, 400, seed=2).abs(), values)


def measured(values):
    return float(noise_of(values, torch.zeros(1, 1).double(), is_after_relu=True).median())


def test_the_width_of_the_zeros_is_measured_where_nothing_is_negative():  # FEW, WITHIN
    assert 0.7e-3 < measured(sparse(0.3, 1e-3)) < 1.6e-3


def test_zeros_are_those_that_stand_apart():  # GATHERED
    assert measured(sparse(0.3, 1e-2)) > 3e-3
    assert measured(sparse(0.3, 0.2)) < 1e-5


def test_a_handful_of_negative_entries_measures_noise_and_fewer_do_not():  # SAMPLE
    values = 1 + double(1, 400).abs()
    values[0, :4] = -1e-2
    assert measured(values) < 1e-5
    values[0, :16] = -1e-2
    assert measured(values) == pytest.approx(1e-2)


# ----------------------------------------------------------------------------------------------------
# Solving


class Given:
    """A source of given rows."""

    noise, gradient = 1e-9, None

    def __init__(self, *rows):
        self._rows = list(rows)

    def rows(self):
        return self._rows

    def flipped(self, flips):
        return self

    above = KnownOutputs.of(double(1, 1), double(1, 1), double(1, 1))


def ill_conditioned(singular_values):
    """Forward rows of a linear layer with these singular values, and the input that they are of."""
    size = len(singular_values)
    left, right = torch.linalg.qr(double(size, size))[0], torch.linalg.qr(double(size, size, seed=1))[0]
    layer = nn.Linear(size, size, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(left @ torch.diag(singular_values) @ right)
    linear, truth = LinearMap.of(layer, (size,)), double(1, size, seed=2)
    known = torch.ones(1, size, dtype=torch.bool)
    rows = Rows(ForwardRows(linear, known), linear.outputs(truth), torch.ones(1, size).double())
    return Given(rows), truth


def test_an_input_on_its_way_back_is_waited_for():  # LOOK, PATIENT and HOPELESS downwards
    source, truth = ill_conditioned(torch.linspace(1, 2e-3, 300).double())
    method = Alone(truth.shape, generator(), unlimited())
    assert float(method.recovery_test([source], 1e-9).max()) < 1e-3
    assert method.iterations > 500
    u, solution = method.solve([source])
    assert solution.iterations > 500
    assert (u - truth).norm() < 1e-3 * truth.norm()


def test_a_hopeless_input_is_not():  # LOOK and HOPELESS upwards
    source, truth = ill_conditioned(torch.logspace(0, -4, 300).double())
    method = Alone(truth.shape, generator(), unlimited())
    assert float(method.recovery_test([source], 1e-9).max()) > 1e-2
    assert method.solve([source])[1].iterations < 600


def test_a_channel_without_gradient_has_a_quarter_of_the_usual_error():  # EVEN
    layer = with_wrong_masks(1).source
    layer = replace(layer, gradient=layer.gradient * torch.tensor([1.0, 1.0, 0.0]).view(1, -1, 1, 1))
    method = Alone((2, 3, 4, 4), generator(), unlimited())
    u, solution = method.solve([layer])
    spread = method.spread([layer], u, solution, None).mean((0, 2, 3))
    assert 0.15 < float(spread[2] / spread[:2].mean()) < 0.35


def test_a_silent_image_counts_as_one_a_thousandth_as_loud():  # FAINT
    block = Residual([Stage("a", nn.Conv2d(2, 2, 1).double())])
    delta = torch.ones(2, 2, 3, 3).double() * torch.tensor([1.0, 1e-9]).view(-1, 1, 1, 1)
    how = {"is_positive": True, "generator": generator(), "budget": unlimited()}
    together = Together(block, 0, (2, 2, 3, 3), [], delta, **how)
    assert together.loudness.tolist() == pytest.approx([1.0, 1e-3])
