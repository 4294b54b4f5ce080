import copy

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from attack.match.activations import ForwardLoss, ForwardMatching, course_for
from attack.match.strided import Strided, quickened
from network.chain import index_of, modules, substituted
from network.stage import Residual, Stage, run
from network.tracing import stages
from network.zoo import build_model


def derivative(function, x, delta):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x), x, delta)[0]


@given(
    sides=st.tuples(st.integers(5, 17), st.integers(5, 17)),
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    stride=st.integers(2, 4),
)
def test_the_derivative_is_autograds(sides, kernel, padding, stride):
    assume(all(side + 2 * p >= k for side, p, k in zip(sides, padding, kernel, strict=True)))
    layer = nn.Conv2d(3, 5, kernel, stride, padding).double()
    x = torch.rand(2, 3, *sides, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outputs = layer(x)
    assert torch.equal(Strided(layer)(x), outputs)
    delta = torch.rand(outputs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(derivative(Strided(layer), x, delta), derivative(layer, x, delta))


class Own(nn.Conv2d):
    """A plain convolution of a class of its own, whose derivative is the library's."""

    @classmethod
    def of(cls, module):
        """The module, or if it is a convolution, one of this class with the same weights."""
        if type(module) is nn.Conv2d:
            module = copy.copy(module)
            module.__class__ = cls
        return module


class Standardised(nn.Conv2d):
    """Convolves with other weights than it holds."""

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight - self.weight.mean(), self.bias, self.stride, self.padding)


def convolution(channels=3, **other):
    return nn.Conv2d(channels, 8, 3, **({"stride": 2, "padding": 1} | other))


@pytest.mark.parametrize(
    ("layer", "is_changed"),
    [
        (convolution(), True),
        (convolution(stride=1), False),
        (convolution(64), False),  # the library's own is faster
        (convolution(stride=(2, 1)), False),
        (convolution(dilation=2), False),
        (convolution(4, groups=2), False),
        (convolution(padding_mode="reflect"), False),
        (convolution(stride=1, padding="same"), False),
        (Standardised(3, 8, 3, 2, 1), False),
    ],
)
def test_what_is_changed_and_what_is_not(layer, is_changed):
    chain = quickened([Stage("block", Residual([Stage("conv", layer)], [Stage("shortcut", layer)]))])
    assert [isinstance(module, Strided) for module in modules(chain)] == [is_changed] * 2
    x = torch.rand(2, layer.in_channels, 9, 9)
    torch.testing.assert_close(run(chain, x), 2 * layer(x))


@pytest.mark.parametrize(("name", "start"), [("lenet", "conv3"), ("resnet18", "body.layer1.0")])
def test_known_activations_are_matched_through_quick_layers(name, start):
    """The same loss and the same derivative, in the first phase, where kinks are soft, and in the last."""
    draw = torch.Generator().manual_seed(1)
    images, guess = torch.rand(2, 2, 3, 32, 32, generator=draw)

    net = build_model(name, image_shape=(3, 32, 32), num_classes=10, generator=torch.Generator().manual_seed(0))
    index = index_of(stages(net), start)

    def matching(chain):
        with torch.no_grad():
            inputs = run(chain[:index], images)
        loss = ForwardLoss(chain, (3, 32, 32), index, inputs, torch.tensor([1, 2]), {})
        return ForwardMatching(loss, course_for(chain[:index], loss))

    quick, plain = matching(stages(net)), matching(substituted(stages(net), Own.of))
    assert [any(isinstance(m, Strided) for m in modules(each.loss.chain)) for each in (quick, plain)] == [True, False]
    assert quick.course == plain.course
    for phase in (0, len(quick.course.phases) - 1):
        values, slopes = [], []
        for each in (quick, plain):
            each.enter(phase, guess)
            x = guess.clone().requires_grad_()
            values.append(each(x, torch.zeros(2, 10), torch.arange(2)).total)
            slopes.append(torch.autograd.grad(values[-1], x)[0])
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-6 * float(slopes[0].abs().max()))
