"""What features look like before anything is known of the images: those of random ones."""

import torch
from torch import Tensor, nn

from network.head import features_of

SAMPLE = 384  # random images that tell how features and softmax vary
UNIFORM = 0.5  # variation of a softmax over random images, relative to its mean: untrained ones lie far below


def varies(softmax: Tensor) -> bool:
    """Whether the softmax (N, K) differs from random image to random image, as a trained network's does."""
    return not float(softmax.std(0).mean() / softmax.mean()) < UNIFORM


@torch.no_grad()
def random_features(model: nn.Module, shape: tuple[int, int, int], count: int, generator: torch.Generator) -> Tensor:
    """Features (count, d) of random images."""
    return features_of(model, random_images(shape, count, generator).to(next(model.parameters())))


def random_images(shape: tuple[int, int, int], count: int, generator: torch.Generator) -> Tensor:
    """Smooth images (count, C, H, W) in [0, 1]: noise on a 4x4 grid, enlarged, around a random colour."""
    channels, height, width = shape
    coarse = 1.5 * torch.randn(count, channels, 4, 4, generator=generator)
    colour = torch.randn(count, channels, 1, 1, generator=generator)
    return torch.sigmoid(nn.functional.interpolate(coarse, size=(height, width), mode="bilinear") + colour)
