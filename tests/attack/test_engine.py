import time

import pytest
import torch
from torch import nn

from attack.signals.engine import read_layers
from client.victim import share_update
from data import load_batch, open_source
from update.models import build_model
from update.stages import run, stages


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Scene:
    """A float32 net, what a client sends, and what a reading ought to find."""

    def __init__(self, name, count, num_classes=10, trained=False, labels="dataset", frozen=(), defence="none", **net):
        self.net = build_model(name, image_shape=(3, 16, 16), num_classes=num_classes, generator=generator(1), **net)
        source = open_source("sample", None)
        draw = {"num_classes": num_classes, "generator": generator(), "image_size": 16}
        self.batch = load_batch(source, range(count), labels=labels, **draw)
        if trained:  # a few steps make its softmax unlike that of random images
            more = load_batch(source, range(20, 120), labels="dataset", **draw)
            optimiser = torch.optim.Adam(self.net.parameters(), 3e-3)
            for _ in range(20):
                optimiser.zero_grad()
                nn.functional.cross_entropy(self.net(more.images), more.labels).backward()
                optimiser.step()
        self.update = share_update(
            self.net,
            name,
            self.batch.images,
            self.batch.labels,
            num_classes,
            frozen=frozen,
            defence=defence,
            generator=generator(2),
        )

    def read(self, seed=3, seconds=30.0, **settings):
        return read_layers(self.update, self.net, generator=generator(seed), max_seconds=seconds, **settings)

    @torch.no_grad()
    def truth(self, start):
        net = build_model_like(self.net)
        return run(stages(net)[:start], self.batch.images.double())

    def errors(self, reading):
        """By image read: the relative error of its inputs, and which of the batch it is, by its features."""
        features = self.truth(len(stages(self.net)) - 1)
        which = torch.cdist(reading.signals.features, features).argmin(1)
        truth = self.truth(reading.start)[which].flatten(1)
        return (reading.inputs.flatten(1) - truth).norm(dim=1) / truth.norm(dim=1), which


def build_model_like(net):
    import copy

    return copy.deepcopy(net).double()


def assert_all_read(scene, reading, error=1e-3):
    off, which = scene.errors(reading)
    assert sorted(which.tolist()) == list(range(len(scene.batch.labels)))  # each once
    assert torch.equal(reading.signals.labels, scene.batch.labels[which])
    assert off.max() < error
    head = build_model_like(scene.net).head
    errors = head(reading.signals.features).softmax(1) - nn.functional.one_hot(
        reading.signals.labels, scene.update.num_classes
    )
    assert torch.allclose(reading.signals.errors, errors.detach(), atol=1e-5)
    assert (reading.signals.uncertainty.diff() >= 0).all()  # surest first


KINDS = [
    ("mlp", 6, {"width": 64}),
    ("mlp", 6, {"width": 64, "activation": "tanh"}),
    ("mlp", 6, {"width": 64, "activation": "gelu"}),
    ("mlp", 6, {"width": 64, "activation": "relu", "depth": 3}),
    ("lenet", 4, {}),
    ("lenet5", 4, {}),
    ("convnet", 4, {}),
    ("resnet18", 3, {}),
    ("resnet18_cifar", 2, {}),
    ("vgg11", 3, {}),
]


@pytest.mark.parametrize(("name", "count", "net"), KINDS)
def test_every_kind_of_network_gives_its_images_away(name, count, net):
    scene = Scene(name, count, **net)
    t = time.perf_counter()
    reading = scene.read()
    print(name, net, reading.start, stages(scene.net)[reading.start].name, time.perf_counter() - t)
    assert_all_read(scene, reading)
