"""The pixels that fit known activations where nothing bounds them."""

import torch
from conftest import generator
from torch import nn

from attack.match.activations import ForwardLoss
from attack.match.unbounded import unbounded_pixels
from network.stage import run
from network.tracing import stages


def test_they_are_found_through_a_strided_stem_whose_gradient_is_not_contiguous():
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 32, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    chain = stages(nn.Sequential(*stem, nn.Flatten(), nn.Linear(32 * 16, 10)).eval())
    images = torch.rand(2, 3, 16, 16, generator=generator(1))
    known = run(chain[:4], images).detach()
    loss = ForwardLoss(chain, (3, 16, 16), 4, known, torch.tensor([1, 2]), {}, uses_gradients=False)
    pixels, left = unbounded_pixels(loss, lambda: None)
    assert pixels.shape == images.shape
    assert 0 <= left < 1
