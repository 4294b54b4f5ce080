"""Products of two branches: which are gates, and what a gate's outputs tell of its inputs."""

import pytest
import torch
from torch import nn

from network.kinds import kind_of, pulled_below, share_below
from network.kinds.scaling import hardsigmoid
from network.known_outputs import KnownOutputs, UndeterminedError
from network.stage import Gate, Product, Stage, run
from network.tracing import stages, why_not_walked

CHANNELS = 6


class Excited(nn.Module):
    """Squeeze-and-excitation, in one of the ways in which it is written, below a linear head."""

    def __init__(self, how):
        super().__init__()
        self.how, self.pool, self.conv = how, nn.AdaptiveAvgPool2d(1), nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.fc = nn.Sequential(nn.Linear(CHANNELS, 3), nn.ReLU(inplace=True), nn.Linear(3, CHANNELS), nn.Sigmoid())
        self.other = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.head = nn.Linear(CHANNELS * 16, 10)

    def forward(self, x):
        return self.head(self.how(self, self.conv(x)).flatten(1))


def by_views(m, x):
    b, c, _, _ = x.size()
    y = m.fc(m.pool(x).view(b, c)).view(b, c, 1, 1)
    return x * y.expand_as(x)


def in_place(m, x):
    y = m.fc(m.pool(x).flatten(1)).unsqueeze(-1).unsqueeze(-1)
    x *= y
    return x


GATES = {
    "views": by_views,
    "in place": in_place,
    "an index": lambda m, x: m.fc(x.mean((2, 3)))[:, :, None, None] * x,
    "shapes": lambda m, x: torch.mul(x, m.fc(x.mean((-1, -2))).reshape(x.shape[0], x.shape[1], 1, 1)),
}


def excited(how):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Excited(how).eval()


def images(seed=0):
    return torch.randn(3, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", GATES)
def test_a_gate_is_one_stage_however_it_is_written(name):
    model = excited(GATES[name])
    assert not why_not_walked(model)
    assert [type(stage.module) for stage in stages(model)] == [nn.Conv2d, Gate, nn.Flatten, nn.Linear]
    assert torch.allclose(run(stages(model), images()), model(images()))


PRODUCTS = {
    "of two layers": lambda m, x: m.other(x) * x.relu(),
    "that may be negative": lambda m, x: x * m.pool(m.other(x)).tanh(),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_another_product_is_run_as_a_stage_and_tells_neither_factor(name):
    model = excited(PRODUCTS[name])
    chain = stages(model)
    assert type(chain[1].module) is Product
    assert torch.allclose(run(chain, images()), model(images()))
    assert "their product tells neither" in kind_of(chain[1].module).why_not(chain[1].module, (6, 4, 4), (6, 4, 4))


def test_an_input_times_its_sigmoid_is_a_silu():
    chain = stages(excited(lambda m, x: x * x.sigmoid()))
    assert isinstance(chain[1].module, nn.SiLU)


def gate(last=None, scale=3.0, seed=0):
    """Squeeze-and-excitation in float64, that opens some channels and all but shuts others."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(CHANNELS, 3, 1), nn.ReLU(), nn.Conv2d(3, CHANNELS, 1)]
    layers[3].weight.data *= scale
    layers += last or [nn.Sigmoid()]
    modules = (layer.double().requires_grad_(False) if isinstance(layer, nn.Module) else layer for layer in layers)
    return Gate([Stage(str(index), module) for index, module in enumerate(modules)])


def told(module, x, noise=1e-9):
    delta = torch.randn(x.shape, generator=torch.Generator().manual_seed(7), dtype=x.dtype)
    return KnownOutputs.of(module(x), delta, torch.full_like(x, noise))


@pytest.mark.parametrize("last", [None, hardsigmoid()], ids=["sigmoid", "hard sigmoid"])
def test_outputs_of_a_gate_tell_its_inputs_and_delta_passes_both_ways(last):
    module, x = gate(last, scale=1.5), images().double().relu().requires_grad_()
    outputs = told(module, x.detach())
    (expected,) = torch.autograd.grad((module(x) * outputs.delta).sum(), x)
    inputs = pulled_below(module, outputs, x.shape[1:])
    assert inputs.known.all()
    assert torch.allclose(inputs.values, x, rtol=1e-9, atol=1e-12)
    assert torch.allclose(inputs.delta, expected, rtol=1e-8, atol=1e-12)


def test_errors_of_outputs_are_claimed_of_the_inputs_times_what_the_gate_took_off():
    module, x, noise = gate(), images().double(), 1e-6
    exact = told(module, x)
    noisy = KnownOutputs.of(exact.values + noise * images(1), exact.delta, torch.full_like(x, noise))
    inputs = pulled_below(module, noisy, x.shape[1:])
    off = (inputs.values - x) / inputs.noise
    assert 0.5 < float(off.square().mean().sqrt()) < 2


def test_a_channel_that_a_gate_has_closed_hides_its_inputs():
    module, x = gate(hardsigmoid(), scale=1.5), images().double().relu()
    module.body[3].module.bias.data[2] = -30.0
    with pytest.raises(UndeterminedError, match="closed 1 of 6 channels"):
        pulled_below(module, told(module, x), x.shape[1:])


def test_a_gates_inputs_are_told_by_all_of_its_outputs_alone():
    module, x = gate(), images().double()
    assert share_below(module, 1.0, x.shape[1:], x.shape[1:]) == 1.0
    assert share_below(module, 0.5, x.shape[1:], x.shape[1:]) is None
    with pytest.raises(UndeterminedError, match="all of its outputs"):
        pulled_below(module, told(module, x).told_of(2), x.shape[1:])


def test_a_gate_of_something_else_than_means_is_not_inverted():
    for first in (nn.AdaptiveMaxPool2d(1), nn.AvgPool2d(2), nn.Identity()):
        stages_of = [Stage("0", first), Stage("1", nn.Conv2d(CHANNELS, CHANNELS, 1)), Stage("2", nn.Sigmoid())]
        assert "mean of each channel" in kind_of(Gate(stages_of)).why_not(Gate(stages_of), (6, 4, 4), (6, 4, 4))


def test_a_gate_with_batch_statistics_mixes_the_images():
    body = [Stage("0", nn.AdaptiveAvgPool2d(1)), Stage("1", nn.BatchNorm2d(CHANNELS)), Stage("2", nn.Sigmoid())]
    assert "mixes the images" in kind_of(Gate(body)).why_not(Gate(body), (6, 4, 4), (6, 4, 4))
