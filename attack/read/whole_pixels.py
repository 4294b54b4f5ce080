"""Inputs of a layer whose images have pixels of whole steps of 1/255, as those of a client that read 8-bit files."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attack.local.levels import LEVELS, UNLIKE, nearest_levels, off_levels
from attack.read.carried import inverted
from network.stage import Chain, run

# Steps of 1/255, root mean square, that pixels may be off whole ones: 0.289 by chance, and every pixel is rounded to
# the right step.
ROUNDED = 0.08


@dataclass(frozen=True)
class WholePixels:
    """The images of a layer's inputs, where exact inverses of the stages below the layer lead to them.

    Attributes:
        chain: the stages below the layer.
        shapes: of one image's activations, before each of them and after the last.
    """

    chain: Chain = ()
    shapes: Sequence[tuple[int, ...]] = ()

    def images(self, inputs: Tensor) -> Tensor | None:
        """The images (N, C, H, W) of inputs (N, ...); None where the stages below the layer do not tell them."""
        if not self.shapes:
            return None
        how = (len(self.chain), inputs.view(-1, *self.shapes[len(self.chain)]))
        start, images = inverted(self.chain, self.shapes, *how, with_parameters=True)
        return None if start else images

    def rounded(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs (N, n) that images of whole pixels have, and which these are, (N,); the others as they are.

        Images of few different pixels prove nothing: a mixture of two colours comes near whole ones by chance.
        """
        images = self.images(inputs) if len(inputs) else None
        if images is None:
            return inputs, torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
        whole = nearest_levels(images)
        values = torch.tensor([len(image.unique()) for image in whole], device=inputs.device)
        near = (LEVELS * (whole - images)).flatten(1).square().mean(1).sqrt() < ROUNDED
        is_whole = near & (values >= UNLIKE) & (off_levels(images) < ROUNDED)
        return torch.where(is_whole[:, None], run(self.chain, whole).flatten(1), inputs), is_whole
