"""Images whose pixels are whole steps of 1/255, as those of a client are that read 8-bit files.

Known images of a layer span a space of few dimensions. It holds the true images, and hardly any other point whose
pixels are all whole. So an image that is nearly right is rounded, projected back onto the space, rounded again, and
comes out right: rounding takes off most of the error, and the projection most of what rounding has added.
"""

from collections.abc import Callable

import torch
from torch import Tensor

LEVELS = 255.0
ROUNDS = 20  # of rounding and projection, at most
# Steps of 1/255, root mean square, that an image in the space may be off whole ones: 0.289 by chance, and with 0.08
# every pixel is rounded to the right step, six deviations wide.
ROUNDED = 0.08
# Entries of a layer's inputs, unlike one another, beyond the dimensions of their space, without which whole pixels
# prove nothing: those of an image of one colour are three, and mixtures of two colours come near whole ones by chance.
UNLIKE = 16
ALIKE = 1e-4  # of the largest: entries of the space that differ by less are one


def off_levels(images: Tensor) -> Tensor:
    """How far pixels of images (N, C, H, W) are from whole steps of 1/255, in steps, (N,): 0.289 by chance, rms."""
    values = LEVELS * images.flatten(1)
    return (values - values.round()).square().mean(1).sqrt()


def nearest_levels(images: Tensor) -> Tensor:
    """Images whose pixels are the nearest whole steps of 1/255, from black to white."""
    return ((LEVELS * images).round() / LEVELS).clamp(0, 1)


def snapped(
    inputs: Tensor, basis: Tensor, pixels: Callable[[Tensor], Tensor], layers: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The images (N, C, H, W) of inputs (N, n), those with whole pixels rounded, and which these are, (N,).

    Args:
        inputs: of a layer, nearly right.
        basis: (r, n), orthonormal rows that span the layer's inputs.
        pixels: the images of the layer's inputs.
        layers: the layer's inputs of images.
    """
    images, moved = pixels(inputs), inputs
    for _ in range(ROUNDS):
        whole = nearest_levels(pixels(moved))
        before, moved = moved, layers(whole).flatten(1) @ basis.T @ basis
        if torch.equal(nearest_levels(pixels(moved)), whole) or torch.equal(moved, before):
            break
    in_space = pixels(moved)
    different = torch.unique((basis / (ALIKE * basis.abs().max())).round(), dim=1).shape[1]
    is_whole = (off_levels(in_space) < ROUNDED) & (different >= len(basis) + UNLIKE)
    whole = (LEVELS * in_space).round() / LEVELS
    return torch.where(is_whole[:, None, None, None], whole, images), is_whole
