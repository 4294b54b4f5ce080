import itertools
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from passes import OnePass, generator
from torch import nn

from attack.local.closed_system import ClosedSystem, is_one_pass
from attack.local.peel_in_time import peel_in_time
from attack.read.arithmetic import rounding_of_weights
from attack.read.layer_choice import candidate_layers
from attack.read.reader import read_layers
from attack.solve.budget import WorkBudget
from network.chain import index_of
from network.tracing import stages
from update.optimiser import LocalOptimiser
from update.training import LocalTraining


@pytest.mark.parametrize(
    ("count", "batches", "how"),
    [
        (4, 4, {"rules": {"momentum": 0.9, "weight_decay": 1e-3}}),
        (6, 3, {"sizes": (3, 1, 2), "rules": {"prox": 0.1}}),
        (5, 2, {"rules": {"momentum": 0.9, "nesterov": True, "schedule": "1,0.3"}}),
    ],
)
def test_all_images_of_one_pass_are_read_with_their_labels_and_steps(count, batches, how):
    scene = OnePass("convnet", count, batches, 0.05, **how)
    reading = scene.read()
    assert len(reading) == count
    assert reading.in_steps
    labels, steps, error = scene.judged(reading)
    assert labels == count
    assert steps == count
    assert error < 1e-5  # 6e-7 measured
    assert (reading.signals.confidence > 0.999).all()


def test_what_is_read_at_the_head_is_that_of_each_images_own_step():
    scene = OnePass("convnet", 4, 2, 0.5)
    reading = scene.read()
    assert scene.judged(reading)[:2] == (4, 4)
    which, _ = scene.matched(reading)
    truth = scene.truth(index_of(stages(scene.net), "head"))[which]
    assert ((reading.signals.values - truth).norm(dim=1) < 1e-5 * truth.norm(dim=1)).all()


def test_behind_a_smooth_activation_the_tail_of_each_step_tells_its_images():
    scene = OnePass("mlp", 4, 2, 1.0, num_classes=50, activation="tanh")
    reading = scene.read()
    assert reading.start == 0  # pixels
    assert scene.judged(reading)[:2] == (4, 4)
    assert scene.judged(reading)[2] < 1e-5


def test_declared_as_one_step_the_same_update_gives_less():
    scene = OnePass("convnet", 4, 2, 0.05, trained=True)
    as_gradient = read_layers(scene.update, scene.net, generator=generator(3))
    assert len(as_gradient) < 4


def test_the_first_minibatch_is_read_where_the_training_was_another_than_declared():
    scene = OnePass("convnet", 4, 2, 0.005, trained=True)
    scene.update = replace(scene.update, training=replace(scene.training, rate=0.015))
    reading = scene.read()
    labels, steps, error = scene.judged(reading)
    assert len(reading) == labels == steps == 2
    assert set(scene.matched(reading)[0].tolist()) == {0, 1}
    assert error < 1e-4


def test_a_training_that_breaks_the_network_leaves_nothing_that_is_certain_and_wrong():
    scene = OnePass("convnet", 4, 2, 2.0, trained=True, first=4)
    found = _told_apart(scene, work=2e6)
    truth = scene.truth(6).flatten(1)
    error = torch.cdist(found.values.flatten(1), truth) / truth.norm(dim=1)
    assert len(found)
    assert (error.amin(1) < 1e-4).all()
    assert (scene.batch.labels[error.argmin(1)] == found.labels).all()


def _told_apart(scene, work, name="head"):
    layers = candidate_layers(stages(scene.net), scene.update.image_shape, scene.update.gradients)
    (layer,) = (layer.at_any_step(scene.update.gradients) for layer in layers if layer.name == name)
    like, floor = torch.zeros(1, dtype=torch.float64), rounding_of_weights(scene.update, scene.net, name)
    span = layer.span(scene.update.gradients, len(scene.steps), like, floor)
    with torch.no_grad():
        return peel_in_time(scene.update, scene.net, name, span, generator(), WorkBudget(work))


@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_in_front_of_a_trained_batchnorm_certificates_tell_the_scale(rate):
    """The BatchNorm's own bias tells it at the server's weights, and the client changes these."""
    scene = OnePass(_with_batchnorm(), 4, 2, rate)
    found = _told_apart(scene, 1e9, "conv")
    truth = scene.truth(index_of(stages(scene.net), "conv")).flatten(1)
    error = (torch.cdist(found.values.flatten(1), truth) / truth.norm(dim=1)).min(1)
    assert sorted(error.indices.tolist()) == [0, 1, 2, 3]
    assert torch.equal(scene.batch.labels[error.indices], found.labels)
    assert (error.values < 2e-5).all()
    assert (error.values < 5 * found.uncertainty).all()
    assert (found.uncertainty < 1e-4).all()


def _with_batchnorm():
    torch.manual_seed(0)
    names = itertools.cycle(("first", "norm", "on", "second", "norm2", "on2", "conv", "norm3", "on3"))
    layers = []
    for into, out, stride in ((3, 16, 2), (16, 32, 2), (32, 96, 1)):
        conv, norm = nn.Conv2d(into, out, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(out)
        norm.running_mean.normal_(0, 0.05)
        norm.running_var.uniform_(0.1, 0.4)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.1)
        layers += [conv, norm, nn.ReLU()]
    named = dict(zip(names, layers, strict=False))
    return nn.Sequential(OrderedDict(**named, flat=nn.Flatten(), head=nn.Linear(1536, 10))).eval()


@pytest.mark.parametrize("rules", [{}, {"momentum": 0.9, "weight_decay": 0.01, "prox": 0.1}])
def test_the_network_above_a_layer_makes_the_clients_own_steps(rules):
    scene = OnePass("convnet", 5, 3, 0.1, sizes=(2, 2, 1), rules=rules)
    system, inputs = ClosedSystem(scene.update, scene.net, 4), scene.truth(4)
    for part in scene.parts:
        system.learn(inputs[part], scene.batch.labels[part])
    assert set(system.update) == {"conv3.weight", "conv3.bias", "head.weight", "head.bias"}
    for name, own in system.update.items():
        sent = scene.update.gradients[name].double()
        assert (own - sent).norm() < 1e-4 * sent.norm()
    features, errors = system.at_the_head(inputs, scene.batch.labels)
    assert torch.allclose(features, scene.truth(7), rtol=1e-8, atol=1e-8)
    weights = torch.tensor(system.counts)[scene.steps, None].double() / len(inputs)
    mean = (weights * errors).sum(0)
    assert (mean - scene.update.gradients["head.bias"]).norm() < 1e-4 * mean.norm()


def test_only_a_pass_of_several_steps_that_are_linear_is_followed():
    assert is_one_pass(LocalTraining(3, 3, 0.1))
    assert is_one_pass(LocalTraining(3, 3, 0.1, optimiser=LocalOptimiser(momentum=0.9)))
    others = [LocalTraining(), LocalTraining(3, 1, 0.1), LocalTraining(6, 3, 0.1)]
    others += [LocalTraining(3, 3, 0.1, optimiser=LocalOptimiser(name="adam"))]
    others += [LocalTraining(3, 3, 0.1, optimiser=LocalOptimiser(clip=1.0))]
    assert not any(map(is_one_pass, others))
