"""What features look like before anything is known of the images: those of random ones."""

import torch
from torch import Tensor, nn

from network.head import features_of

SAMPLE = 384  # random images that tell how features and softmax vary
TEXTURE = {2: 1.0, 4: 1.0, 8: 0.8, 16: 0.6, 32: 0.25}  # of textured images: a grid's nodes to a side, its amplitude
CONTRAST = 0.4, 1.2  # least of the amplitude's factor, and how much more it may be
COLOUR = 0.35, 0.4  # of the channels' own share in texture, and in the whole image
BRIGHTNESS = 1.2  # standard deviation of an image's logit
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


def textured_images(shape: tuple[int, int, int], count: int, generator: torch.Generator) -> Tensor:
    """Images (count, C, H, W) in [0, 1] with structure of all sizes: noise on grids of 2 to 32 pixels, the finer the
    fainter, mostly the same in all channels, at a random contrast and around a random colour."""
    channels, height, width = shape
    images = BRIGHTNESS * torch.randn(count, 1, 1, 1, generator=generator)
    images = images + COLOUR[1] * torch.randn(count, channels, 1, 1, generator=generator)
    contrast = CONTRAST[0] + CONTRAST[1] * torch.rand(count, 1, 1, 1, generator=generator)
    for grid, strength in TEXTURE.items():
        grey = torch.randn(count, 1, grid, grid, generator=generator)
        noise = grey + COLOUR[0] * torch.randn(count, channels, grid, grid, generator=generator)
        fine = nn.functional.interpolate(noise, size=(height, width), mode="bilinear")
        images = images + strength * contrast * fine
    return torch.sigmoid(images)
