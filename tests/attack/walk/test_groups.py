"""The walk through grouped and depthwise convolutions, and past blocks whose output tells their input."""

import pytest
import torch
from passes import generator, sample_images
from torch import nn

from attack.read.forecast import explain
from attack.read.reader import read_layers
from client.victim import share_update
from judge.layers import relative_errors
from network.tracing import stages


def made(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def separable():
    """A depthwise convolution, with nothing between it and the 1x1 convolution behind it."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.Conv2d(8, 48, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(48 * 64, 10),
    )  # fmt: skip


def in_groups():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 48, 3, stride=2, padding=1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(48 * 16, 10),
    )  # fmt: skip


class Inverted(nn.Module):
    """MobileNet's block: wide inside, depthwise, and no activation behind the sum."""

    def __init__(self, activation):
        super().__init__()
        self.expand, self.depthwise = nn.Conv2d(8, 32, 1), nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.project, self.activation = nn.Conv2d(32, 8, 1), activation()

    def forward(self, x):
        x = x + self.project(self.activation(self.depthwise(self.activation(self.expand(x)))))
        return x


def inverted(activation):
    entry = nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.ReLU(), Inverted(activation)
    return nn.Sequential(*entry, nn.Conv2d(8, 48, 1), nn.ReLU(), nn.Flatten(), nn.Linear(48 * 16, 10))


def walked(model, count=1):
    """By layer, what was promised, and the true relative error of what was read."""
    images = sample_images(range(count))
    table = {row["layer"]: row for row in explain(stages(model), (3, 16, 16), count)}
    update = share_update(model, "own", images.images, images.labels, 10)
    reading = read_layers(update, model, generator=generator(3))
    claimed = {row["layer"]: row["uncertainty"] for row in reading.layers}
    return table, relative_errors(reading.recovered, model, images.images), claimed


@pytest.mark.parametrize(("make", "layer", "count"), [(separable, "2", 1), (in_groups, "2", 2)])
def test_inputs_of_a_grouped_layer_are_told_as_promised(make, layer, count):
    table, errors, claimed = walked(made(make), count)
    assert table[layer]["known"]
    assert errors[layer] < 1e-4
    assert errors[layer] < 6 * claimed[layer]


def test_a_block_with_nothing_behind_its_sum_is_passed_by_its_last_layer():
    table, errors, claimed = walked(made(lambda: inverted(nn.ELU)))
    for layer in ("2.expand", "2.depthwise", "2.project"):
        assert table[layer]["known"]
        assert errors[layer] < 1e-4
        assert errors[layer] < 6 * claimed[layer]


class Before(nn.Module):
    """A block that activates before its layer, behind which a ReLU hides half of the sum."""

    def __init__(self):
        super().__init__()
        self.stem, self.layer = nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last, self.head = nn.Conv2d(8, 48, 3, padding=1), nn.Linear(48 * 16, 10)

    def forward(self, x):
        x = self.stem(x)
        x = (x + self.layer(x.relu())).relu()
        return self.head(self.last(x).relu().flatten(1))


def test_a_blocks_input_is_not_promised_where_only_entries_of_it_are_known():
    table, errors, _ = walked(made(Before))
    assert table["last"]["known"]
    assert "last" in errors
    assert not table["stem"]["known"]
    assert "stem" not in errors
