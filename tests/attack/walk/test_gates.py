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
    """Convolutions and a gate beside a shortcut, with a ReLU behind the sum."""

    def __init__(self, channels, out, stride, depth):
        super().__init__()
        sizes = [channels, *[out] * depth]
        layers = [[nn.Conv2d(a, out, 3, 1 if i else stride, 1), nn.BatchNorm2d(out)] for i, a in enumerate(sizes[:-1])]
        body = [module for pair in layers for module in (nn.ReLU(), *pair)][1:]
        self.body, self.gate = nn.Sequential(*body), Excitation(out)
        self.shortcut = nn.Conv2d(channels, out, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        return (self.shortcut(x) + self.gate(self.body(x))).relu()


def block_net(channels, out, stride, depth):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stem = nn.Conv2d(3, channels, 3, 4 // stride, 1)
        net = nn.Sequential(stem, nn.ReLU(), Block(channels, out, stride, depth), nn.Flatten(), nn.Linear(out * 16, 10))
        for module in net.modules():
            if isinstance(module, Excitation):  # a gate that is open here and nearly closed there
                module.outer.weight.data *= 4
    return net.eval()


@pytest.mark.parametrize("block", [(8, 8, 1, 2), (4, 16, 2, 2)], ids=["with the identity", "with a stride"])
def test_a_gate_in_front_of_a_sum_is_told_with_the_layer_below_it(block):
    model = block_net(*block)
    batch, update = shared(model, 2)
    table = {row["layer"]: row for row in explain(stages(model), (3, 16, 16), 2)}
    reading = read_layers(update, model, generator=generator(3))
    errors = relative_errors(reading.recovered, model, batch.images)
    claimed = {row["layer"]: row["uncertainty"] for row in reading.layers}
    for layer in ("2.body.0", "2.body.3", "2.gate.inner", "2.gate.outer"):
        assert table[layer]["known"]
        assert errors[layer] < 1e-5
        assert errors[layer] < 6 * claimed[layer]


@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_a_gate_in_front_of_a_sum_is_compared_with_its_own_gradient(factor):
    model = block_net(8, 8, 1, 1)
    _, update = shared(model, 2)
    gradients = update.gradients | {"2.gate.outer.bias": factor * update.gradients["2.gate.outer.bias"]}
    reading = read_layers(dataclasses.replace(update, gradients=gradients), model, generator=generator(3))
    is_contradicted = any("2.gate.outer.bias, in its gate, contradicts" in row["note"] for row in reading.layers)
    assert is_contradicted == (factor != 1)
    assert ("2" in reading.recovered) == (factor == 1)
