"""Guesses without an update: grey, the mean of images that no table shows, and what an attack's prior paints."""

from dataclasses import replace

import torch
from torch import Tensor

from bench.batches import tuning_images
from data import ImageSource, load_batch
from update.shared import SharedUpdate

GREY, MEAN = "grey_image", "mean_image"
GUESSES = (GREY, MEAN)
PRIOR = "prior_alone"  # this program's attack on `of_noise`, which may have flags of its own


def guess(name: str, source: ImageSource, like: Tensor) -> Tensor:
    """Images (B, C, H, W), all alike: 0.5 everywhere, or the mean of the source's tuning images.

    Where the source has no tuning images, both guesses are grey.
    """
    indices = tuning_images(len(source))
    if name == GREY or not indices:
        return torch.full_like(like, 0.5)
    how = {"labels": "random", "num_classes": 2, "generator": torch.Generator(), "image_size": tuple(like.shape[2:])}
    images = load_batch(source, indices, **how).images
    return images.mean(0).expand_as(like)


def of_noise(update: SharedUpdate, generator: torch.Generator) -> SharedUpdate:
    """An update that says nothing of the images: normal noise as long as each gradient, the server's own statistics.

    `generator` is on the CPU.
    """

    def noise(like: Tensor) -> Tensor:
        drawn = torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)
        return drawn * (like.norm() / drawn.norm())

    return replace(
        update,
        gradients={name: noise(gradient) for name, gradient in update.gradients.items()},
        statistics={name: update.weights[name] for name in update.statistics},
    )
