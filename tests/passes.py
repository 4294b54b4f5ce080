"""Clients of one pass through a few images, and the truth at the weights of every step."""

import copy
from functools import cache

import torch
from torch import nn
from torch.func import functional_call

from attack.read.reader import read_layers
from client.victim import share_update
from data import load_batch, open_source
from network.parameters import trainable
from network.stage import run
from network.tracing import stages
from network.zoo import build_model
from update.optimiser import LocalOptimiser
from update.training import LocalTraining


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sample_images(which, num_classes=10, labels="dataset"):
    """Bundled images of 16 pixels a side, those with these indices."""
    draw = {"num_classes": num_classes, "generator": generator(), "image_size": 16}
    return load_batch(open_source("sample", None), which, labels=labels, **draw)


@cache
def _net(name, num_classes, trained, settings):
    net = build_model(name, image_shape=(3, 16, 16), num_classes=num_classes, generator=generator(1), **dict(settings))
    more = sample_images(range(20, 120), num_classes) if trained else None
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(20 if trained else 0):  # a few steps make its softmax unlike that of random images
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(more.images), more.labels).backward()
        optimiser.step()
    return net


class OnePass:
    """A float32 net, of that name or given, what a client sends after one pass, and what a reading ought to find."""

    def __init__(
        self, name, count, batches, rate, *, num_classes=10, trained=False, sizes=None, first=0, rules=None, **net
    ):
        own = isinstance(name, nn.Module)
        self.net = copy.deepcopy(name if own else _net(name, num_classes, trained, tuple(net.items())))
        labels = "dataset" if num_classes == 10 else "random"
        self.batch = sample_images(range(first, first + count), num_classes, labels)
        rules = LocalOptimiser(**(rules or {}))
        self.training = LocalTraining(batches, batches, rate, optimiser=rules, sizes=sizes)
        batch = (self.batch.images, self.batch.labels)
        self.update = share_update(self.net, "own" if own else name, *batch, num_classes, training=self.training)
        self.parts = self.training.schedule(count)
        self.steps = torch.tensor([step for step, part in enumerate(self.parts) for _ in part])

    def read(self, seed=3, **settings):
        return read_layers(self.update, self.net, in_steps=True, generator=generator(seed), **settings)

    def truth(self, start):
        """The inputs (B, ...) of stage `start`, those of each image at its own step's weights."""
        net, found, learnt = copy.deepcopy(self.net).double(), [], []
        first = {name: weight.detach().clone() for name, weight in trainable(net).items()}
        table = self.training.coefficients()
        for step, part in enumerate(self.parts):
            moved = {
                name: table.alpha[step] * old - sum(table.beta[step, s] * own[name] for s, own in enumerate(learnt))
                for name, old in first.items()
            }
            images = self.batch.images[part].double()
            weights = {name: weight.detach().requires_grad_() for name, weight in moved.items()}
            loss = nn.functional.cross_entropy(functional_call(net, weights, (images,)), self.batch.labels[part])
            learnt.append(dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True)))
            now = copy.deepcopy(net)
            with torch.no_grad():
                for name, weight in now.named_parameters():
                    weight.copy_(moved[name])
                found.append(run(stages(now)[:start], images))
        return torch.cat(found)

    def matched(self, reading):
        """Of each image that was read: which image it is, and its relative error at the deepest stage."""
        truth, found = self.truth(reading.start).flatten(1), reading.inputs.flatten(1)
        apart = torch.cdist(found, truth) / truth.norm(dim=1)
        return apart.argmin(1), apart.amin(1)

    def judged(self, reading):
        """How many images are right in label and in step; each is right within its expected error, where certain."""
        which, error = self.matched(reading)
        certain = reading.signals.confidence > 0.999
        assert (error[certain] < 1e-2).all()
        assert (error < 5 * reading.signals.uncertainty + 1e-5).all()
        assert (self.batch.labels[which] == reading.signals.labels)[certain].all()
        labels = int((self.batch.labels[which] == reading.signals.labels).sum())
        return labels, int((self.steps[which] == self.steps[: len(which)]).sum()), float(error.max())
