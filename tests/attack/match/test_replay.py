"""The training replayed on known images: the certificate, and trainings that were not declared."""

from dataclasses import replace

import pytest
import torch
from conftest import generator

from attack.match.replay import left_over, noise_share, replayed
from attack.prepare import Known
from client.victim import share_update
from network.zoo import build_model
from update.optimiser import LocalOptimiser
from update.training import FEDSGD, LocalTraining

CLIENT = LocalTraining(6, 2, 0.1, optimiser=LocalOptimiser(momentum=0.9))


def scene(training):
    net = build_model(
        "mlp", image_shape=(3, 16, 16), num_classes=10, generator=generator(1), activation="relu", width=20
    )
    images, labels = torch.rand(4, 3, 16, 16, generator=generator(2)), torch.tensor([3, 1, 4, 1])
    return share_update(net, "mlp", images, labels, 10, training=training), net, images, labels


def read_exactly(images):
    """What is known where all pixels were read."""
    values = images.flatten(1)
    return Known(len(images), None, values[:0], None, start=0, inputs=values, pixels=images)


def declared_as(update, training):
    """The same weights, read by the combination of another training."""
    true, other = update.training.combination(), training.combination()
    weights = {name: update.weights[name] for name in update.gradients}
    moved = {n: (true.alpha - 1) * w - true.total * update.gradients[n] for n, w in weights.items()}
    gradients = {name: other.of_move(weights[name], each) for name, each in moved.items()}
    return replace(update, gradients=gradients, training=training)


def replay_of(update, net, images, labels):
    return replayed(update, net, read_exactly(images), images, torch.nn.functional.one_hot(labels, 10).float(), 0)


def test_true_images_under_the_true_training_are_certified():
    update, net, images, labels = scene(CLIENT)
    replay = replay_of(update, net, images, labels)
    assert replay.left < 1e-4
    assert replay.fits
    assert replay.is_needed
    assert replay.is_certificate
    assert replay.evidence == []


@pytest.mark.parametrize(
    ("true", "wrong", "words"),
    [
        (CLIENT, replace(CLIENT, optimiser=LocalOptimiser()), "6 steps of SGD, momentum 0.9 at rate 0.1"),
        (replace(CLIENT, steps=12, batches=4, optimiser=LocalOptimiser()), LocalTraining(6, 2, 0.1), "4 minibatches"),
        (LocalTraining(2, 2, 0.4), LocalTraining(6, 2, 0.4), "2 steps of plain SGD"),
        (LocalTraining(4, 1, 0.1, optimiser=LocalOptimiser("adam")), LocalTraining(4, 1, 0.1), "4 steps of Adam"),
        (LocalTraining(1, 1, 0.3), LocalTraining(3, 1, 0.3), "one step of plain SGD at rate 0.3"),
    ],
)
def test_a_wrong_training_is_said_to_be_wrong_and_the_nearest_is_proposed(true, wrong, words):
    update, net, images, labels = scene(true)
    replay = replay_of(declared_as(update, wrong), net, images, labels)
    assert not replay.is_certificate
    (evidence,) = replay.evidence
    assert evidence.contradicts
    assert words in evidence.said
    assert replay.nearest[1] < 0.01


def test_without_a_rate_nothing_is_proposed():
    update, net, images, labels = scene(LocalTraining(4, 2, 0.5))
    replay = replay_of(replace(update, training=FEDSGD), net, images, labels)
    assert replay.contradicts
    assert replay.nearest is None


def test_an_order_that_nobody_knows_contradicts_nothing():
    training = LocalTraining(6, 2, 0.5, shuffle=True)
    update, net, images, labels = scene(CLIENT)
    replay = replay_of(declared_as(update, training), net, images, labels)
    assert replay.left > 0.1
    assert replay.evidence == []
    assert not replay.is_certificate


def test_weights_that_were_sent_leave_their_rounding():
    for rate in (1e-3, 1e-5):
        training = LocalTraining(2, 1, rate)
        update, net, images, labels = scene(training)
        left = left_over(update, net, images, labels)
        assert 0.1 * left < noise_share(update, net) < 10 * left
