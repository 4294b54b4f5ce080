"""Bottlenecks are entered at the convolution inside them."""

import pytest
import torch
from torch import nn

from attack.read.forecast import explain
from attack.read.layer_choice import candidate_layers, farther_up, order
from attack.read.reader import read_layers
from client.victim import share_update
from data import load_batch, open_source
from judge.layers import relative_errors
from network.stage import run
from network.tracing import stages
from update.batchnorm import use_batch_statistics


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with BatchNorm, beside a skip."""

    def __init__(self, channels, inner, kernel=1, groups=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, kernel, padding=kernel // 2, bias=False)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False, groups=groups)
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(inner), nn.BatchNorm2d(inner), nn.BatchNorm2d(channels)

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn3(self.conv3(self.bn2(self.conv2(y)).relu()))
        return (x + y).relu()


class Bottlenecks(nn.Module):
    """A stem of stride 4, one or two bottlenecks at 4x4 places, and a mean over these places before the head."""

    def __init__(self, blocks=1, inner=96, **block):
        super().__init__()
        self.stem = nn.Conv2d(3, 128, 4, stride=4)
        self.layers = nn.Sequential(*[Bottleneck(128, inner, **block) for _ in range(blocks)])
        self.fc = nn.Linear(128, 10)

    def forward(self, x):
        x = self.layers(self.stem(x).relu())
        return self.fc(x.mean((2, 3)))


def images(count):
    draw = {"labels": "dataset", "num_classes": 10, "generator": torch.Generator().manual_seed(0), "image_size": 16}
    return load_batch(open_source("sample", None), range(count), **draw)


def calibrated(net):
    """The net in eval mode, its running statistics those of images that are not the client's."""
    net.train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        net(images(64).images[32:])
    return net.eval()


def read(net, count):
    batch = images(count)
    update = share_update(net, "net", batch.images, batch.labels, 10, generator=torch.Generator().manual_seed(2))
    return batch, read_layers(update, net, generator=torch.Generator().manual_seed(3))


def explained(net, count):
    return {row["layer"]: row for row in explain(stages(net), (3, 16, 16), count)}


@pytest.mark.parametrize(
    "how", [{"blocks": 1}, {"blocks": 2}, {"inner": 192, "groups": 2}], ids=["one", "two", "in groups"]
)
def test_a_bottleneck_gives_its_input_and_labels_away(how):
    net = calibrated(Bottlenecks(**how))
    assert explained(net, 2)["layers.0.conv2"]["known"]
    batch, reading = read(net, 2)
    assert len(reading) == 2
    rows = {row["layer"]: row for row in reading.layers}
    assert "2 of 2 images told apart" in rows["layers.0.conv2"]["note"]
    assert rows["layers.0.conv1"]["note"] == "known by layers.0.conv2"
    chain = stages(net.double())
    truth = run(chain[: reading.start], batch.images.double()).flatten(1)
    errors, which = (torch.cdist(reading.inputs.flatten(1), truth) / truth.norm(dim=1)).min(1)
    assert sorted(which.tolist()) == [0, 1]
    assert errors.max() < 1e-3
    assert torch.equal(reading.signals.labels, batch.labels[which])
    assert relative_errors(reading.recovered, net.float(), batch.images)["layers.0.conv2"] < 1e-3


def test_what_the_reading_enters_is_forecast():
    table = explained(calibrated(Bottlenecks()), 2)
    assert table["layers.0.conv2"]["known"]
    assert table["layers.0.conv1"]["known"]
    assert not table["layers.0.conv3"]["known"]


@pytest.mark.parametrize(
    ("block", "count"),
    [({"kernel": 3}, 2), ({"groups": 4}, 2), ({}, 4)],
    ids=["wider than one place", "in groups", "more patches than active channels"],
)
def test_blocks_that_do_not_tell_their_input_are_not_entered_there(block, count):
    assert not explained(calibrated(Bottlenecks(**block)), count)["layers.0.conv2"]["known"]


def test_bottlenecks_that_mix_their_images_are_not_entered_there():
    net = Bottlenecks()
    use_batch_statistics(net)
    assert not explained(net, 2)["layers.0.conv2"]["known"]


def test_after_an_inner_layer_that_does_not_tell_all_images_one_halfway_up_is_asked():
    chain, shape = stages(Bottlenecks(blocks=6).eval()), (3, 16, 16)
    waiting, asked = order(candidate_layers(chain, shape, {}, 2), 2, torch.zeros(1)), []
    inner = {f"layers.{i}.conv2" for i in range(6)}
    everything = {layer.name for layer in waiting}
    while waiting:
        failed = waiting.pop(0)
        asked.append(failed.name)
        waiting = farther_up(waiting, failed)
    assert set(asked) == everything > inner
    assert len(asked) == len(everything)
    assert asked[:3] == ["layers.0.conv2", "layers.3.conv2", "layers.5.conv2"]
    assert asked[-3:] == ["layers.1.conv2", "layers.4.conv2", "layers.2.conv2"]  # halfway up again
