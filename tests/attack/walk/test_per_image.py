"""The walk through norms that take mean and deviation of each image by itself."""

import pytest
import torch
from passes import generator, sample_images
from torch import nn

from attack.read.forecast import explain
from attack.read.reader import read_layers
from attack.walk.per_image import ImageNormAt, ImageNormSource
from client.victim import share_update
from judge.layers import relative_errors
from network.kinds.affine import LinearMap
from network.kinds.image_norm import ImageStatistics
from network.known_outputs import KnownOutputs
from network.tracing import stages

NORMS = [nn.GroupNorm(3, 6), nn.InstanceNorm2d(6), nn.InstanceNorm2d(6, affine=True), nn.LayerNorm([6, 4, 4])]


def double(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def drawn(norm):
    for index, parameter in enumerate(norm.double().parameters()):
        parameter.data = 1 + 0.3 * double(*parameter.shape, seed=index)
    return norm


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: str(norm)[:20])
def test_statistics_of_each_image_are_those_of_the_norm(norm):
    norm, z, delta = drawn(norm), double(2, 6, 4, 4).requires_grad_(), double(2, 6, 4, 4, seed=1)
    statistics = ImageStatistics.of(norm, (6, 4, 4), z)
    values, deviation = statistics.normalised(z)
    assert torch.allclose(statistics.scale * values + statistics.shift, norm(z))
    (expected,) = torch.autograd.grad((norm(z) * delta).sum(), z)
    assert torch.allclose(statistics.delta(delta, values, deviation), expected)


def test_equations_move_as_they_are_linearised():
    conv, norm = nn.Conv2d(3, 6, 3, padding=1).double(), drawn(nn.GroupNorm(3, 6))
    u, delta = double(2, 3, 4, 4), double(2, 6, 4, 4, seed=1)
    above = KnownOutputs.of(norm(conv(u)).detach(), delta, torch.ones_like(delta))
    how = {"precision": 1e-7, "additive": 0.0, "mask_error": torch.zeros(2)}
    facts = {"name": "conv", "map": LinearMap.of(conv, (3, 4, 4)), "bias": conv.bias.detach(), "above": above}
    statistics = ImageStatistics.of(norm, (6, 4, 4), u)
    source = ImageNormSource(**facts, gradient=double(6, 3, 3, 3, seed=2), norm=statistics, **how)
    system, step = ImageNormAt.of(source, u).linearised(torch.float64), double(2, 3, 4, 4, seed=3)
    moved = [ImageNormAt.of(source, u + 1e-6 * sign * step).residuals() for sign in (1, -1)]
    rows = [(before - after) / 2e-6 for after, before in zip(*moved, strict=True)]
    found = system.forward(step)
    for row, expected in zip(found, rows, strict=True):
        assert torch.allclose(row, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    y = [double(*row.shape, seed=4) for row in found]
    across = sum(float((row * each).sum()) for row, each in zip(found, y, strict=True))
    assert across == pytest.approx(float((system.adjoint(y) * step).sum()), rel=1e-9)


def normed(norm, *, bias):
    """A layer of many equations in front of a norm, behind a ReLU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.GroupNorm(2, 8), nn.ReLU(),
            nn.Conv2d(8, 48, 3, padding=1, bias=bias), norm(48), nn.ReLU(), nn.Flatten(), nn.Linear(48 * 16, 10),
        ).eval()  # fmt: skip


SLOW = "GroupNorm, whose factors a shift tells"
CASES = {
    "GroupNorm": (lambda width: nn.GroupNorm(6, width), {"bias": True}),
    SLOW: (lambda width: nn.GroupNorm(6, width), {"bias": False}),
    "InstanceNorm, which takes off the bias": (lambda width: nn.InstanceNorm2d(width, affine=True), {"bias": True}),
    "LayerNorm": (lambda width: nn.LayerNorm([width, 4, 4]), {"bias": True}),
    "InstanceNorm by running statistics": (
        lambda width: nn.InstanceNorm2d(width, affine=True, track_running_stats=True), {"bias": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.long if case == SLOW else ()) for case in CASES])
def test_inputs_of_a_layer_in_front_of_such_a_norm_are_told(case):
    make, how = CASES[case]
    model, batch = normed(make, **how), sample_images(range(2))
    update = share_update(model, "own", batch.images, batch.labels, 10)
    table = {row["layer"]: row for row in explain(stages(model), (3, 16, 16), 2)}
    reading = read_layers(update, model, generator=generator(3))
    assert table["3"]["known"]
    errors = relative_errors(reading.recovered, model, batch.images)
    claimed = {row["layer"]: row["uncertainty"] for row in reading.layers}
    assert errors["3"] < 1e-4
    assert errors["3"] < 10 * claimed["3"]
    assert not table["0"]["known"]
    assert "0" not in errors


class Around(nn.Module):
    """A norm of each image right behind a sum."""

    def __init__(self):
        super().__init__()
        self.stem, self.layer, self.norm = nn.Conv2d(3, 8, 3, 4, 1), nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.last, self.head = nn.Conv2d(8, 48, 3, padding=1), nn.Linear(48 * 16, 10)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head(self.last(self.norm(x + self.layer(x)).relu()).relu().flatten(1))


def test_a_norm_without_a_layer_in_front_of_it_ends_the_walk_in_words():
    reasons = {row["layer"]: row["reason"] for row in explain(stages(Around().eval()), (3, 16, 16), 2)}
    assert reasons["last"] == ""
    assert reasons["layer"].startswith("GroupNorm takes off each image's mean and scale")
