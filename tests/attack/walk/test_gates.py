"""The walk through gates: squeeze-and-excitation between convolutions, and in a block."""

import dataclasses

import pytest
import torch
from passes import generator, sample_images
from torch import nn

from attack.read.forecast import explain
from attack.read.reader import read_layers
from client.victim import share_update
from judge.layers import relative_errors
from network.stage import Gate
from network.tracing import stages


class Excitation(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.inner, self.outer = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x):
        return x * self.outer(self.inner(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


def net(activation=nn.ReLU):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=4, padding=1), activation(), Excitation(16),
            nn.Conv2d(16, 48, 3, padding=1), activation(), Excitation(48), nn.Flatten(), nn.Linear(48 * 16, 10),
        ).eval()  # fmt: skip


def shared(model, count=4):
    batch = sample_images(range(count))
    return batch, share_update(model, "gates", batch.images, batch.labels, 10, generator=generator(2))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU], ids=lambda kind: kind.__name__)
def test_gates_are_passed_as_promised(activation):
    model = net(activation)
    batch, update = shared(model)
    table = {row["layer"]: row for row in explain(stages(model), (3, 16, 16), 4)}
    reading = read_layers(update, model, generator=generator(3))
    errors = relative_errors(reading.recovered, model, batch.images)
    claimed = {row["layer"]: row["uncertainty"] for row in reading.layers}
    assert table["3"]["known"]
    for layer in ("3", "5.inner", "5.outer"):
        assert errors[layer] < 1e-4
        assert errors[layer] < 6 * claimed[layer]
    assert next(row["layer"] for row in table.values() if row["deepest"]) in errors


def test_no_layer_of_a_gate_is_the_deepest_one():
    table = explain(stages(net()), (3, 16, 16), 2)
    (deepest,) = [row["layer"] for row in table if row["deepest"]]
    within = [stage for stage in stages(net()) if isinstance(stage.module, Gate)]
    assert not any(deepest.startswith(f"{stage.name}.") for stage in within)


def test_a_gate_whose_gradient_contradicts_its_inputs_ends_the_walk():
    model = net()
    _, update = shared(model)
    gradients = update.gradients | {"5.inner.weight": 1.1 * update.gradients["5.inner.weight"]}
    reading = read_layers(dataclasses.replace(update, gradients=gradients), model, generator=generator(3))
    assert "3" not in reading.recovered
    assert any("5.inner.weight, in its gate, contradicts" in row["note"] for row in reading.layers)


class Block(nn.Module):
    """A convolution and its gate beside the identity, with a ReLU behind the sum."""

    def __init__(self, channels):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(channels, channels, 3, padding=1), Excitation(channels)

    def forward(self, x):
        return (x + self.gate(self.conv(x))).relu()


def test_a_gate_in_front_of_a_sum_is_not_promised():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=4, padding=1), nn.ReLU(), Block(16), nn.Flatten(), nn.Linear(256, 10)
        ).eval()
    table = {row["layer"]: row for row in explain(stages(model), (3, 16, 16), 2)}
    assert not table["2.gate.inner"]["known"]
    assert "all of its outputs" in table["2.conv"]["reason"]
