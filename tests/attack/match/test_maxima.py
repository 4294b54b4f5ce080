"""Known outputs of a max-pool, and which entries of its windows may be the largest."""

import pytest
import torch
from batchnorm import drawn, smooth
from conftest import generator
from torch import nn
from torch.nn import functional
from waits import waits_of

from attack.match.activations import ForwardLoss
from attack.match.maxima import Maxima
from attack.match.phases import ASSIGNED
from client.victim import share_update
from network.stage import run
from network.tracing import stages
from update.training import LocalTraining

SHAPE = (3, 16, 16)


def pooled(pool=None):
    """A stem with a max-pool that overlaps, and what it takes to tell images apart above it."""
    pool = pool or nn.MaxPool2d(3, 2, 1)
    stem = [nn.Conv2d(3, 8, 5, padding=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(), pool]
    return drawn(nn.Sequential(*stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)))


def scene(mode, noise=0.0, **how):
    """The images, the chain up to the pool, and what is known of it."""
    model, images, labels = pooled(**how), smooth(2, generator(3), 16), torch.tensor([3, 8])
    update = share_update(model, "net", images, labels, 10, training=LocalTraining(batchnorm=mode))
    chain, start, moments = stages(model), 4, update.batch_moments(model)
    with torch.no_grad():
        outputs = run(chain[:start], images)
        outputs = outputs * (1 + noise * torch.randn(outputs.shape, generator=generator(1)))
    loss = ForwardLoss(chain, SHAPE, start, outputs, labels, update.gradients, 1e-6, uses_gradients=False)
    facts = (outputs, loss.delta, update.gradients, SHAPE)
    return images, chain[:start], facts, moments


@pytest.mark.parametrize("mode", ["eval", "train", "train_private"])
def test_the_truth_has_no_loss_and_others_have(mode):
    images, chain, facts, moments = scene(mode)
    maxima = Maxima.of(chain, *facts, 1e-6, moments)
    outputs, gradient = (float(term.detach()) for term in maxima(images, ASSIGNED[-1].width))
    assert outputs < 1e-4
    assert gradient < 1e-3
    shifted = images.roll(1, 3)
    assert float(maxima(shifted, ASSIGNED[-1].width)[0].detach()) > 1e-2
    assert float(maxima(shifted, ASSIGNED[-1].width)[1].detach()) > 10 * gradient
    # with a width of the outputs' own size all entries share delta alike, and the gradient is another
    assert float(maxima(images, 10.0)[1].detach()) > 10 * gradient


def test_nothing_in_it_waits_for_the_device():
    images, chain, facts, moments = scene("train_private")
    maxima = Maxima.of(chain, *facts, 1e-6, moments)
    assert waits_of(lambda: maxima(images, 0.1)) == []


@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2), nn.MaxPool2d((3, 2), (2, 1), dilation=(1, 2))]
)
def test_the_largest_entry_is_among_those_that_may_be(pool):
    images, chain, facts, moments = scene("eval", pool=pool)
    maxima = Maxima.of(chain, *facts, 1e-6, moments)
    with torch.no_grad():
        y = run(chain[:2], images)
    assert (y <= maxima.bound + 1e-5).all()
    _, flat = functional.max_pool2d(y, pool.kernel_size, pool.stride, pool.padding, pool.dilation, return_indices=True)
    is_largest = maxima.places.view(maxima.may_be.shape) == flat.flatten(2)[:, :, None]
    is_on = maxima.known > 0
    assert ((maxima.may_be & is_largest).any(2) == is_on).double().mean() > 0.999
    overlaps = pool.stride != pool.kernel_size
    assert not overlaps or maxima.may_be.sum(2)[is_on].double().mean() < 0.7 * is_largest.shape[2]


def test_nothing_is_assigned_where_outputs_are_not_exact_or_no_pool_is_last():
    _, chain, (outputs, *rest), moments = scene("eval")
    assert Maxima.of(chain, outputs, *rest, 1e-3, moments) is None
    assert Maxima.of(chain[:3], outputs, *rest, 1e-6, moments) is None
    _, chain, facts, moments = scene("eval", pool=nn.MaxPool2d(3, 2, ceil_mode=True))
    assert Maxima.of(chain, *facts, 1e-6, moments) is None
