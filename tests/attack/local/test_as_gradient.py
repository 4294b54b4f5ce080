"""Several steps taken for one gradient, and one step that was several: what was found says whether that was right."""

from dataclasses import replace

import pytest
import torch
from passes import OnePass, generator

from attack.ahead import Means, read_ahead
from attack.local.as_gradient import judged
from attack.read.reader import read_layers
from update.evidence import contradictions
from update.training import FEDSGD, LocalTraining


def means(signals="on"):
    return Means(signals, "optimise", 1e9, lambda: None)


def declared(scene, training):
    """The scene's update, said to be of another training."""
    return replace(scene.update, training=training)


@pytest.mark.long  # on some processors the two images are told apart without their zeros, and nothing is said
@pytest.mark.parametrize(("count", "batches", "rate"), [(4, 2, 0.5)])
def test_minibatches_declared_as_one_step_leave_nothing_certain(count, batches, rate):
    """Where not all images are told apart, those that are may be of later steps, and are not what was declared."""
    scene = OnePass("convnet", count, batches, rate, trained=True)
    known = read_ahead(declared(scene, FEDSGD), scene.net, means(), generator(3))
    assert 0 < len(known.signals) < count
    assert "the client made other steps" in contradictions(known.evidence)[0].said


@pytest.mark.long
def test_one_step_is_not_doubted():
    scene = OnePass("convnet", 3, 1, 0.05, trained=True)
    reading = read_layers(declared(scene, FEDSGD), scene.net, generator=generator(3))
    assert len(reading) == 3
    assert reading.doubts == ()


@pytest.mark.long
def test_one_step_declared_as_several_is_said_to_be_one():
    scene = OnePass("convnet", 3, 1, 0.3, trained=True)
    known = read_ahead(declared(scene, LocalTraining(4, 1, 0.3)), scene.net, means(), generator(3))
    assert len(known.signals) == 3
    assert "the client made one step" in contradictions(known.evidence)[0].said


def test_the_training_above_true_inputs_leaves_nothing():
    scene = OnePass("convnet", 4, 2, 0.05)
    found = judged(scene.update, scene.net, 6, scene.truth(6), scene.batch.labels)
    assert found.is_certified
    assert found.left < 1e-4
    assert found.drift > 0.01
    wrong = judged(scene.update, scene.net, 6, scene.truth(6), scene.batch.labels.roll(1))
    assert not wrong.is_certified
    assert not wrong.is_one_step


def test_a_network_without_trained_layers_above_is_not_judged():
    scene = OnePass("convnet", 4, 2, 0.05)
    gradients = {name: g for name, g in scene.update.gradients.items() if "head" not in name}
    with pytest.raises(ValueError, match="no layer above"):
        judged(replace(scene.update, gradients=gradients), scene.net, 6, torch.zeros(4, 1), scene.batch.labels)
