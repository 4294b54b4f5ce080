"""Guesses without a gradient: a grey image, and the mean of images that no table shows."""

import torch
from torch import Tensor

from bench.batches import tuning_images
from data import ImageSource, load_batch

GREY, MEAN = "grey_image", "mean_image"
GUESSES = (GREY, MEAN)


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
