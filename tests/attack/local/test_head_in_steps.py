from dataclasses import replace

import pytest
import torch
from passes import OnePass, generator

from attack.local.head_in_steps import features_in_steps
from attack.read.arithmetic import rounding_of_weights
from attack.read.layer_choice import candidate_layers
from attack.solve.budget import WorkBudget
from network.chain import index_of
from network.tracing import stages


def features(scene, labels):
    update, net = scene.update, scene.net
    layer = candidate_layers(stages(net), update.image_shape, update.gradients)[-1]
    floor = rounding_of_weights(update, net, "head")
    span = layer.span(update.gradients, len(scene.steps), torch.zeros(1, dtype=torch.float64), floor)
    with torch.no_grad():
        return features_in_steps(update, net, span, labels, generator(), WorkBudget())


def errors(scene, found):
    """Of each image, relative to itself and to how far images are apart."""
    truth = scene.truth(index_of(stages(scene.net), "head"))
    apart = torch.cdist(found.values, truth)
    pairs = apart.argmin(1)
    assert sorted(pairs.tolist()) == list(range(len(truth)))
    assert torch.equal(scene.steps[pairs], scene.steps)
    off = apart.amin(1)
    return off / truth.norm(dim=1)[pairs], off / (truth - truth.mean(0)).norm(dim=1)[pairs]


@pytest.mark.parametrize(
    ("count", "batches", "rate", "how"),
    [
        (8, 4, 0.1, {}),
        (4, 2, 0.1, {"rules": {"momentum": 0.9, "weight_decay": 1e-3}}),
        (5, 3, 0.3, {"sizes": (2, 2, 1)}),
        (6, 2, 0.01, {}),
    ],
)
def test_features_are_those_of_each_images_own_step(count, batches, rate, how):
    scene = OnePass("lenet", count, batches, rate, num_classes=50, **how)
    found = features(scene, scene.batch.labels)
    assert len(found) == count
    relative, of_differences = errors(scene, found)
    assert of_differences.max() < 1e-3
    assert (relative < 5 * found.uncertainty).all()
    assert (relative > found.uncertainty / 20).all()  # the error bars are none too wide either
    assert (found.certificates - 1).abs().max() < 1e-3


def test_the_drift_of_features_is_larger_than_their_differences():
    """So no reading of this update as a gradient can be right."""
    scene = OnePass("lenet", 8, 4, 0.1, num_classes=50)
    at_once = OnePass("lenet", 8, 4, 1e-9, num_classes=50)
    start = index_of(stages(scene.net), "head")
    drift = (scene.truth(start) - at_once.truth(start)).norm(dim=1).max()
    truth = at_once.truth(start)
    assert drift > 2 * (truth - truth.mean(0)).norm(dim=1).max()


def test_wrong_labels_or_minibatches_explain_nothing():
    scene = OnePass("lenet", 4, 2, 0.1, num_classes=50)
    assert len(features(scene, scene.batch.labels)) == 4
    assert not len(features(scene, scene.batch.labels[[0, 2, 1, 3]]))
    assert not len(features(scene, (scene.batch.labels + torch.tensor([0, 0, 0, 1])) % 50))


def test_a_rate_that_was_not_the_clients_explains_nothing():
    scene = OnePass("lenet", 4, 2, 0.1, num_classes=50)
    scene.update = replace(scene.update, training=replace(scene.training, rate=0.2))
    assert not len(features(scene, scene.batch.labels))
