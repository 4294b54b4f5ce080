"""What all kinds of layers promise, and what each promises beside."""

import math

import pytest
import torch
from torch import nn

from network.kinds import KINDS, UNKNOWN, called, kind_of, pulled_below, share_below
from network.kinds.joining import Among, Part, is_joined
from network.kinds.pool import SoftMaximum
from network.kinds.scaling import scaling
from network.known_outputs import KnownOutputs, UndeterminedError
from network.stage import Residual, Stage

ACTIVATIONS = [
    nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.1), nn.Sigmoid(), nn.Tanh(), nn.SiLU(), nn.GELU(), nn.ELU(), nn.Hardswish(),
    nn.Mish(), nn.SELU(), nn.Softplus(),
]  # fmt: skip
TOLD = [module for module in ACTIVATIONS if not kind_of(module).why_not(module, (), ())]


def named(modules):
    return [type(module).__name__ for module in modules]


def double(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def known(values, delta, noise=1e-9):
    return KnownOutputs.of(values, delta, torch.full_like(values, noise))


def passed(module, z, seed=1):
    """What is known below a module of inputs z, and the delta that autograd has there."""
    z = z.clone().requires_grad_()
    a = module(z)
    delta = double(*a.shape, seed=seed)
    (expected,) = torch.autograd.grad((a * delta).sum(), z)
    return pulled_below(module, known(a.detach(), delta), z.shape[1:]), expected


def test_every_module_and_every_call_has_one_kind():
    modules = [module for kind in KINDS for module in kind.modules]
    calls = [name for kind in KINDS for name in kind.calls]
    assert len(set(modules)) == len(modules)
    assert len(set(calls)) == len(calls)


@pytest.mark.parametrize("module", ACTIVATIONS, ids=named(ACTIVATIONS))
def test_outputs_lie_in_the_range_of_the_kind_and_reach_its_lower_end(module):
    least, most = kind_of(module).output_range
    a = module(torch.linspace(-30, 30, 60001, dtype=torch.float64))
    assert least <= float(a.min())
    assert float(a.max()) <= most
    if math.isfinite(least):
        assert float(a.min()) < least + 2e-3


@pytest.mark.parametrize("module", ACTIVATIONS, ids=named(ACTIVATIONS))
def test_a_kind_is_smooth_or_has_a_kink_and_not_both(module):
    kind = kind_of(module)
    assert kind.is_activation
    assert not (kind.is_smooth and kind.has_kink)


@pytest.mark.parametrize("module", TOLD, ids=named(TOLD))
def test_known_inputs_are_the_inputs_and_delta_is_that_of_autograd(module):
    z = double(4, 5, 3, 3)
    if isinstance(module, (nn.SiLU, nn.GELU, nn.Hardswish)):
        z = z.clamp(min=-0.7)  # right of the minimum
    found, expected = passed(module, z)
    assert found.known.any()
    assert torch.allclose(found.values[found.known], z[found.known])
    assert torch.allclose(found.delta, expected, atol=1e-7)
    assert share_below(module, 1.0, (5, 3, 3), (5, 3, 3)) == kind_of(module).known_share


def test_outputs_of_hardswish_that_are_zero_are_those_of_inputs_that_were_cut_off():
    z = torch.linspace(-6, -3.5, 20, dtype=torch.float64).view(2, 10)
    found, expected = passed(nn.Hardswish(), z)
    assert not found.known.any()
    assert torch.equal(found.delta, expected)
    assert found.masked_delta.all()


@pytest.mark.parametrize("module", [nn.Flatten(), nn.AdaptiveAvgPool2d(1), nn.MaxPool2d(1)], ids=str)
def test_layers_that_only_reshape_pass_everything(module):
    z = double(2, 4, 1, 1)
    found, expected = passed(module, z)
    assert torch.equal(found.values, z)
    assert torch.equal(found.delta, expected)
    assert found.known.all()


CONSTANT = torch.tensor([0.5, 0.0, -2.0], dtype=torch.float64).view(3, 1, 1)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div", "rsub"])
@pytest.mark.parametrize("is_first", [False, True])
def test_a_constant_is_undone_wherever_it_does_not_multiply_by_zero(name, is_first):
    if name == "div" and is_first:
        with pytest.raises(LookupError):
            scaling(name, CONSTANT, is_first=is_first)
        return
    c = CONSTANT + 4 * (name == "div")
    module, z = scaling(name, c, is_first=is_first), double(2, 3, 4, 4)
    operation = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "rsub": torch.rsub}[name]
    assert torch.equal(module(z), operation(c, z) if is_first else operation(z, c))
    found, expected = passed(module, z)
    alive = (c != 0).expand_as(z) if name == "mul" else torch.ones_like(z, dtype=torch.bool)
    assert torch.equal(found.known, alive)
    assert torch.allclose(found.values[alive], z[alive])
    assert torch.allclose(found.delta, expected)
    inverted = kind_of(module).inverted(module, module(z), z.shape[1:])
    assert inverted is None if name == "mul" else torch.allclose(inverted, z)


def test_a_hard_sigmoid_is_a_shifted_relu6():
    z = double(4, 5)
    for module in (stages := called("hardsigmoid", (), {})):
        assert kind_of(module) is not UNKNOWN
        z = module(z)
    assert len(stages) == 3
    assert torch.allclose(z, nn.functional.hardsigmoid(double(4, 5)))


def test_a_relu_tells_what_is_active_and_no_more():
    z = double(4, 5)
    found, _ = passed(nn.ReLU(), z)
    assert torch.equal(found.known, z > 0)
    assert torch.equal(found.delta + found.masked_delta, double(4, 5, seed=1))


def test_a_leaky_relu_is_known_everywhere_and_has_the_other_slope_at_hand():
    z = double(4, 5)
    found, expected = passed(nn.LeakyReLU(0.1), z)
    assert found.known.all()
    assert torch.allclose(found.masked_delta, torch.where(z > 0, 0.1 * expected, 10 * expected))
    assert torch.equal(found.flipped(z > 0).known, found.known)


def test_a_leaky_relu_of_no_slope_is_refused():
    with pytest.raises(UndeterminedError, match="slope 0"):
        passed(nn.LeakyReLU(0.0), double(2, 3))


@pytest.mark.parametrize("module", [nn.SiLU(), nn.GELU()], ids=named([nn.SiLU(), nn.GELU()]))
def test_left_of_its_minimum_a_dipping_activation_has_the_right_delta_at_hand(module):
    turning = kind_of(module).turning
    z = turning - 0.05 - double(4, 5).abs().clamp(max=2)
    found, expected = passed(module, z)
    assert not found.known.any()
    assert torch.allclose(found.masked_delta, expected, atol=1e-6)
    assert torch.allclose(found.flipped(torch.ones_like(found.known)).delta, expected, atol=1e-6)


def test_an_inactive_entry_of_relu6_may_be_cut_off_at_six():
    z = torch.tensor([[-1.0, 3.0, 7.0]], dtype=torch.float64)
    found, expected = passed(nn.ReLU6(), z)
    assert found.known.tolist() == [[False, True, False]]
    assert torch.equal(found.delta, expected)


def test_batch_norm_is_a_scale_and_a_shift_but_for_a_closed_channel():
    norm = nn.BatchNorm2d(3, dtype=torch.float64).eval()
    with torch.no_grad():
        for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
            tensor.uniform_(0.5, 2, generator=torch.Generator().manual_seed(5))
        norm.weight[1] = 0
    z = double(2, 3, 4, 4)
    found, expected = passed(norm, z)
    assert found.known.sum((0, 2, 3)).tolist() == [32, 0, 32]
    assert torch.allclose(found.values[found.known], z[found.known])
    assert torch.allclose(found.delta, expected)
    assert kind_of(norm).inverted(norm, norm(z), (3, 4, 4)) is None


def test_batch_norm_of_vectors_is_inverted():
    norm = nn.BatchNorm1d(3, dtype=torch.float64).eval()
    z = double(5, 3)
    assert torch.allclose(kind_of(norm).inverted(norm, norm(z).detach(), (3,)), z)


def test_batch_norm_in_training_mode_mixes_the_images():
    norm = nn.BatchNorm2d(3).train()
    assert kind_of(norm).mixes_images(norm)
    assert share_below(norm, 1.0, (3, 4, 4), (3, 4, 4)) is None
    with pytest.raises(UndeterminedError, match="mixes the images"):
        pulled_below(norm, known(double(2, 3, 4, 4), double(2, 3, 4, 4)), (3, 4, 4))


@pytest.mark.parametrize("module", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.ELU(), nn.LayerNorm(2)], ids=str)
def test_what_cannot_be_inverted_says_so(module):
    side = 4 if "Pool" in str(module) else 2
    with pytest.raises(UndeterminedError, match=r"pool|ELU|LayerNorm"):
        pulled_below(module, known(double(2, 3, 2, 2), double(2, 3, 2, 2)), (3, side, side))
    assert share_below(module, 1.0, (3, side, side), (3, 2, 2)) is None


KINKED = [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.1), nn.MaxPool2d(2)]


@pytest.mark.parametrize("module", KINKED, ids=named(KINKED))
def test_softened_layers_come_ever_closer_to_the_hard_ones(module):
    z, kind = double(2, 3, 4, 4), kind_of(module)
    off = [float((kind.softened(module, beta)(z) - module(z)).abs().max()) for beta in (1.0, 10.0, 100.0)]
    assert kind.has_kink
    assert off[0] > 5 * off[1] > 25 * off[2] > 0


@pytest.mark.parametrize("module", [module for module in ACTIVATIONS if not kind_of(module).has_kink], ids=str)
def test_layers_without_a_kink_stay_as_they_are(module):
    assert kind_of(module).softened(module, 3.0) is module


def test_a_softened_pool_is_the_soft_maximum():
    assert isinstance(kind_of(nn.MaxPool2d(2)).softened(nn.MaxPool2d(2), 1.0), SoftMaximum)


LAYERS = [
    (nn.Linear(4, 3), (5, 4)),
    (nn.Conv2d(4, 6, 3, padding=1, stride=2), (5, 4, 8, 8)),
    (nn.Conv2d(4, 6, 3, groups=2), (5, 4, 8, 8)),
    (nn.BatchNorm2d(4).eval(), (5, 4, 8, 8)),
    (nn.BatchNorm1d(4).eval(), (5, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda value: str(value)[:30])
def test_gradients_of_weights_are_those_of_autograd(layer, shape):
    layer, x = layer.double(), double(*shape)
    y = layer(x)
    delta = double(*y.shape, seed=1)
    expected = torch.autograd.grad((y * delta).sum(), [layer.weight, layer.bias])
    kind = kind_of(layer)
    assert kind.gives_weight_gradients(layer)
    for found, true in zip(kind.weight_gradients(layer, x, delta), expected, strict=True):
        assert torch.allclose(found, true)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(4).train(), nn.LayerNorm(4), nn.ReLU()],
    ids=lambda value: str(value)[:20],
)
def test_gradients_of_other_weights_are_not_given(layer):
    assert not kind_of(layer).gives_weight_gradients(layer)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(4, 6, 3, groups=2), ""),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), "circular"),
        (nn.Conv2d(4, 6, 3, padding="same"), "in pixels"),
        (nn.Conv2d(4, 6, 3), ""),
        (nn.Linear(4, 3), ""),
    ],
)
def test_a_layer_whose_equations_are_not_known_says_why(layer, reason):
    said = kind_of(layer).why_not(layer, (), ())
    assert reason in said
    assert bool(reason) == bool(said)


def test_channels_among_others_are_told_and_the_others_have_no_part_in_them():
    z, module = double(2, 3, 4, 4), Among(2, 3, 7)
    found, expected = passed(module, z)
    assert found.known.all()
    assert torch.equal(found.values, z)
    assert torch.equal(found.delta, expected)
    assert torch.equal(kind_of(module).inverted(module, module(z), (3, 4, 4)), z)
    with pytest.raises(ValueError, match="4 channels come where the model joins 3"):
        module(double(2, 4, 4, 4))


def test_a_part_of_the_channels_tells_these_and_nothing_of_the_others():
    z, module = double(2, 7, 4, 4), Part(2, 3)
    found, expected = passed(module, z)
    assert found.known[:, 2:5].all()
    assert not found.known[:, :2].any()
    assert not found.known[:, 5:].any()
    assert torch.equal(found.values[:, 2:5], z[:, 2:5])
    assert torch.equal(found.delta, expected)
    assert (found.noise > 0).all()


def test_a_stage_is_joined_where_each_branch_puts_out_channels_of_its_own():
    first, second, third = ([Stage("", Among(at, 2, 6))] for at in (0, 2, 4))
    assert is_joined(Residual(first, [Stage("", Residual(second, third))]))
    assert not is_joined(Residual(first, ()))
    assert not is_joined(Residual(first, [Stage("", nn.ReLU())]))
