"""Pictures by known activations without a course."""

import pytest
import torch
from batchnorm import drawn, smooth
from conftest import generator
from torch import nn

from attack.match.activations import ForwardLoss
from attack.match.estimate import MARGIN, estimated_pictures
from data import load_batch, open_source
from network.stage import run
from network.tracing import stages

SIDE = 8


def loss_at(*below, images=None, width=8):
    """The loss on what these layers make of images."""
    model = drawn(nn.Sequential(*below, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)))
    images = smooth(3, generator(2), SIDE) if images is None else images
    chain, start = stages(model), len(below)
    with torch.no_grad():
        inputs = run(chain[:start], images)
    return ForwardLoss(chain, images.shape[1:], start, inputs, torch.arange(3), {}), images


def samples():
    """Three of the bundled images."""
    source = open_source("sample", None)
    return load_batch(source, [0, 1, 2], labels="dataset", num_classes=10, generator=generator()).images


def errors(pictures, images):
    return (pictures - images).square().mean((1, 2, 3))


@pytest.mark.parametrize("below", [
    (nn.Conv2d(3, 24, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
    (nn.Conv2d(3, 24, 3, 2, 1), nn.Sigmoid(), nn.MaxPool2d(2)),
    (nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
])  # fmt: skip
def test_it_is_nearer_to_the_images_than_their_mean_colours(below):
    loss, images = loss_at(*below, images=samples(), width=24)
    pictures = estimated_pictures(loss, generator(1))
    guess = images.mean((2, 3), keepdim=True)
    assert (errors(pictures, images) < errors(guess, images) / 4).all()
    assert MARGIN - 1e-6 < float(pictures.min()) < float(pictures.max()) < 1 - MARGIN + 1e-6


def test_each_image_is_estimated_by_itself_and_the_same_seed_estimates_the_same():
    loss, images = loss_at(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    both, again = (estimated_pictures(loss, generator(1)) for _ in range(2))
    assert torch.equal(both, again)
    alone = estimated_pictures(loss.alone([1], images), generator(1))
    torch.testing.assert_close(alone, both[1:2], rtol=0, atol=1e-4)


def test_activations_that_never_vary_do_no_harm():
    convolution = nn.Conv2d(3, 8, 3, padding=1)
    layers = [convolution, nn.ReLU(), nn.MaxPool2d(2)]
    loss_at(*layers)  # draws the weights
    with torch.no_grad():
        convolution.bias[0] -= 100.0
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    images = smooth(3, generator(2), SIDE)
    with torch.no_grad():
        inputs = run(stages(model)[:3], images)
    assert not inputs[:, 0].any()
    loss = ForwardLoss(stages(model), images.shape[1:], 3, inputs, torch.arange(3), {})
    assert estimated_pictures(loss, generator(1)).isfinite().all()


@pytest.mark.parametrize("below", [
    (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2)),  # 3 positions for 8 pixels
    (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()),  # a position for each pixel
    (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d((2, 4))),  # not square
])  # fmt: skip
def test_it_has_no_place_where_positions_do_not_fit_the_pixels(below):
    loss, _ = loss_at(*below)
    assert estimated_pictures(loss, generator(1)) is None


def test_it_has_no_place_where_images_are_run_together():
    stem = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    model = drawn(nn.Sequential(*stem, nn.Flatten(), nn.Linear(128, 10))).train()
    images, chain = smooth(3, generator(2), SIDE), stages(model)
    with torch.no_grad():
        inputs = run(chain[:4], images)
    loss = ForwardLoss(chain, images.shape[1:], 4, inputs, torch.arange(3), {})
    assert estimated_pictures(loss, generator(1)) is None
