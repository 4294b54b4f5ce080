import pytest
import torch
from passes import OnePass
from torch import nn

from attack.local.closed_system import ClosedSystem
from attack.match.activations import ForwardLoss
from attack.match.below import TrainedBelow
from network.chain import index_of
from network.tracing import stages


def losses(scene, below_of):
    """The loss of known inputs of the head, and the true images."""
    chain, gradients = stages(scene.net), scene.update.gradients
    start = index_of(chain, "head") - 1
    inputs = scene.truth(start)
    what = (chain, scene.update.image_shape, start, inputs.float(), scene.batch.labels, gradients)
    return ForwardLoss(*what, uses_gradients=True, below=below_of(scene, start, inputs)), scene.batch.images


def in_steps(scene, start, inputs):
    deltas = ClosedSystem(scene.update, scene.net, start).deltas(inputs, scene.batch.labels)
    return TrainedBelow(scene.training, deltas.float())


@pytest.mark.parametrize("rules", [{}, {"momentum": 0.9, "weight_decay": 0.01}])
def test_at_the_true_images_activations_and_update_are_those_of_the_clients_steps(rules):
    scene = OnePass("convnet", 5, 3, 0.5, sizes=(2, 2, 1), rules=rules)
    loss, images = losses(scene, in_steps)
    activations, gradients = (float(term.detach()) for term in loss(images))
    assert activations < 1e-9
    assert gradients < 1e-6
    as_one_step, _ = losses(scene, lambda *_: None)
    activations, gradients = (float(term.detach()) for term in as_one_step(images))
    assert activations > 1e-5
    assert gradients > 1e-5


def test_the_loss_is_differentiated_through_the_weights_of_later_steps():
    scene = OnePass("convnet", 4, 2, 1.0)
    scene.net.double()
    chain, start = stages(scene.net), 2
    inputs = scene.truth(start)
    deltas = ClosedSystem(scene.update, scene.net, start).deltas(inputs, scene.batch.labels)
    gradients = {name: gradient.double() for name, gradient in scene.update.gradients.items()}
    what = (chain, scene.update.image_shape, start, inputs, scene.batch.labels, gradients)
    loss = ForwardLoss(*what, uses_gradients=True, below=TrainedBelow(scene.training, deltas))
    images = (0.5 * scene.batch.images.double() + 0.2).requires_grad_()
    (slope,) = torch.autograd.grad(sum(loss(images)), images)
    way = torch.zeros_like(images)
    way[0] = torch.randn(way[0].shape, generator=torch.Generator().manual_seed(0), dtype=way.dtype)  # of the first step
    step = 1e-6
    ahead, behind = (float(sum(loss(images.detach() + side * step * way)).detach()) for side in (1, -1))
    assert float((slope * way).sum()) == pytest.approx((ahead - behind) / (2 * step), rel=1e-4)


def test_behind_a_max_pool_the_update_is_matched_where_images_were_used_in_several_passes():
    pooled = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(8), nn.Flatten(), nn.Linear(16, 10)]
    scene = OnePass(nn.Sequential(*pooled), 4, 2, 0.1)
    chain, start = stages(scene.net), 3
    inputs = scene.truth(start)
    what = (chain, scene.update.image_shape, start, inputs.float(), scene.batch.labels, scene.update.gradients)
    below = in_steps(scene, start, inputs)
    assert not ForwardLoss(*what, below=below).weights
    assert ForwardLoss(*what, below=below, uses=(0, 1, 0, 1)).weights
