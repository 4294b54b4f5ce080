import math
import time

import pytest
import torch
from torch import nn

from attack.forward import ForwardLoss, Phase, SoftMaximum, phases_for, reconstruct, softened
from attack.pixels import PixelMap
from client.victim import share_update
from data import load_batch, open_source
from priors import Prior
from update.models import build_model
from update.stages import index_of, run, stages


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def scene(name, start, count=2, uses_gradients=None):
    """Images, and the loss from the true inputs of a stage."""
    net = build_model(name, image_shape=(3, 16, 16), num_classes=10, generator=generator())
    data = load_batch(
        open_source("sample", None),
        range(count),
        labels="dataset",
        num_classes=10,
        generator=generator(),
        image_size=16,
    )
    update = share_update(net, name, data.images, data.labels, 10)
    chain = stages(net)
    index = index_of(chain, start)
    with torch.no_grad():
        inputs = run(chain[:index], data.images)
    loss = ForwardLoss(chain, (3, 16, 16), index, inputs, data.labels, update.gradients, uses_gradients=uses_gradients)
    return data.images, loss


def psnr(a, b):
    return float(-10 * (a - b).square().flatten(1).mean(1).log10().mean())


@pytest.mark.parametrize("settings", [(2, 2, 0, False), (2, 2, 0, True), (3, 2, 1, False), (3, 1, 1, False)])
def test_the_soft_maximum_hardens_into_the_pool(settings):
    kernel, stride, padding, ceil = settings
    pool = nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil)
    x = torch.randn(2, 3, 7, 7, generator=generator())
    hard = pool(x)
    assert torch.allclose(SoftMaximum(pool, 1e4)(x), hard, atol=1e-3)
    soft = SoftMaximum(pool, 10.0)(x)
    assert soft.shape == hard.shape
    assert ((soft >= hard - 1e-6) & (soft <= hard + math.log(kernel**2) / 10 + 1e-6)).all()


def test_softening_is_in_units_of_what_goes_into_the_kink():
    chain = stages(build_model("convnet", image_shape=(3, 16, 16), num_classes=10, generator=generator()))
    x = torch.rand(2, 3, 16, 16, generator=generator())
    assert softened(chain, math.inf, x) is chain
    off = [
        float((run(softened(chain, beta, x)[:-1], x) - run(chain[:-1], x)).abs().max().detach())
        for beta in (10, 100, 1000)
    ]
    assert off[0] > 5 * off[1] > 25 * off[2] > 0


@pytest.mark.parametrize(
    ("name", "start"),
    [("lenet", "head"), ("lenet", "conv3"), ("convnet", "head"), ("resnet18", "body.layer1.1"), ("lenet5", "hidden1")],
)
def test_the_truth_has_no_loss(name, start):
    images, loss = scene(name, start, uses_gradients=True)
    activations, gradients = (term.detach() for term in loss(images))
    assert float(activations) < 1e-10
    assert float(gradients) < 1e-9
    noisy = (images + 0.1 * torch.randn(images.shape, generator=generator())).clamp(0, 1)
    assert all(float(term.detach()) > 1e-4 for term in loss(noisy))


def test_the_loss_chooses_gradients_by_what_is_known():
    assert scene("convnet", "head")[1].weights  # 1,024 activations for 768 pixels
    assert not scene("resnet18_cifar", "body.layer2.0")[1].weights  # 16,384
    assert not scene("resnet18", "body.layer1.0")[1].weights  # a max-pool below


def test_phases_are_gentler_below_a_max_pool():
    assert phases_for(scene("resnet18", "body.layer1.0")[1].chain)[0].hardness < 2
    assert phases_for(scene("convnet", "head")[1].chain)[0].hardness > 10
    assert all(math.isinf(phase.hardness) for phase in phases_for(scene("lenet", "head")[1].chain))


def test_images_come_back_from_activations():
    images, loss = scene("convnet", "head")
    pixels = PixelMap((3, 16, 16), "sigmoid", 0.5, 0.5)
    told = []
    phases = (Phase(60, 1e-2, 20), Phase(100, 1e-3, 20), Phase(150, 1e-4, 60))
    start = torch.full_like(images, 0.5)
    found = reconstruct(loss, Prior("opponent", 3.0, 1.0), pixels, start, phases=phases, observe=told.append)
    assert psnr(found, images) > 30
    assert [p.evaluations for p in told] == sorted(p.evaluations for p in told)
    assert told[-1].evaluations <= 330
    assert told[-1].activations < told[0].activations
    assert torch.equal(told[-1].images, found)


def test_it_ends_at_the_deadline_with_its_best():
    images, loss = scene("convnet", "head")
    pixels = PixelMap((3, 16, 16), "sigmoid", 0.5, 0.5)
    start = torch.full_like(images, 0.5)
    began = time.perf_counter()
    phases = (Phase(10**6, 1e-3),)
    found = reconstruct(loss, Prior("opponent", 2.0), pixels, start, phases=phases, deadline=began + 0.5)
    assert time.perf_counter() - began < 5
    assert psnr(found, images) > psnr(start, images)
