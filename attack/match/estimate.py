"""Pictures by known activations without a course: a linear estimate, fitted to images made at random.

The server can run any image through its own model, and see what activations it has. So patches of pixels are regressed
on the activations around them,

    patch = W a + m,    W = cov(patch, a) (cov(a, a) + RIDGE mean variance)^-1,

over random images of all scales (`textured_images`), every position of an image being one sample. The client's
activations then give a picture, overlapping patches weighed by how near a pixel is to their middle: 20 dB of
photographs by the inputs of a ResNet-18's `layer3.0`, in six seconds. Nobody's photographs are needed to fit it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from attack.match.activations import ForwardLoss
from attack.read.random_images import textured_images
from network.chain import mixes_images, modules
from network.stage import run

RIDGE = 1e-2  # of the activations' mean variance, which each is divided by before
MOST = 1200  # activations that a patch is regressed on: neighbours of a position where they are no more
SAMPLES = 40  # positions for each of them
FEWEST = 50  # random images at least
AT_ONCE = 20  # random images that the model runs at once
REACH = 2  # side of a patch over the pixels from one position to the next
MARGIN = 0.02  # between pictures and the ends of the range of pixels, where a sigmoid box has no slope


@torch.no_grad()
def estimated_pictures(loss: ForwardLoss, generator: torch.Generator) -> Tensor | None:
    """Images (B, C, H, W) in (0, 1) by the known activations; None where an estimate has no place.

    It has a place where images are run one by one, to activations (B, C', h, w) whose positions are as far from one
    another in both directions, by an even number of pixels.

    Args:
        loss: of the known activations.
        generator: of random images, on the CPU.
    """
    stride = _stride(loss)
    if stride is None:
        return None
    estimate = LinearEstimate.of(loss, stride, generator)
    return estimate(_activations(loss, loss.inputs)).clamp(MARGIN, 1 - MARGIN)


def _stride(loss: ForwardLoss) -> int | None:
    """Pixels from one position of the known activations to the next; None where an estimate has no place."""
    is_plain = loss.below is None and loss.uses is None and not mixes_images(modules(loss.chain))
    if not is_plain or loss.inputs.dim() != 4:
        return None
    (height, width), grid = loss.grey.shape[-2:], loss.inputs.shape[-2:]
    stride = height // grid[0]
    fits = stride > 0 and stride % 2 == 0 and (height, width) == (stride * grid[0], stride * grid[1])
    return stride if fits else None


def _activations(loss: ForwardLoss, outputs: Tensor) -> Tensor:
    """What is regressed on, of outputs (B, C', h, w) of the loss's chain."""
    return outputs.relu() if loss.is_rectified else outputs


@dataclass(frozen=True)
class LinearEstimate:
    """Patches of pixels as linear functions of activations, one function for all positions.

    Attributes:
        stride: pixels from one position to the next.
        radius: positions on each side whose activations are looked at.
        mean, scale: (F,) of these activations.
        weight: (F, P) of a patch's P values; `patch` (P,) is the mean one.
    """

    stride: int
    radius: int
    mean: Tensor
    scale: Tensor
    weight: Tensor
    patch: Tensor

    @classmethod
    def of(cls, loss: ForwardLoss, stride: int, generator: torch.Generator) -> "LinearEstimate":
        """Fitted to random images."""
        channels, *grid = loss.inputs.shape[1:]
        radius = 1 if 9 * channels <= MOST else 0
        count = max(FEWEST, math.ceil(SAMPLES * channels * (2 * radius + 1) ** 2 / math.prod(grid)))
        images = textured_images(tuple(loss.grey.shape[1:]), count, generator).to(loss.inputs)
        outputs = torch.cat([run(loss.chain, some) for some in images.split(AT_ONCE)])
        a = _around(_activations(loss, outputs), radius).flatten(0, 1)  # (N h w, F)
        patches = _patches(images, stride).flatten(0, 1)  # (N h w, P)
        mean, patch, scale = a.mean(0), patches.mean(0), a.std(0)
        scale = scale.clamp(min=float(scale.max()) * torch.finfo(scale.dtype).eps)  # of activations that never vary
        a = (a - mean) / scale
        covariance = (a.T @ a).double()
        covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
        weight = torch.linalg.solve(covariance, (a.T @ (patches - patch)).double())
        return cls(stride, radius, mean, scale, weight.to(a), patch)

    def __call__(self, activations: Tensor) -> Tensor:
        """Images (B, C, H, W) by activations (B, C', h, w)."""
        patches = ((_around(activations, self.radius) - self.mean) / self.scale) @ self.weight + self.patch
        margin, size = _margin(self.stride), [self.stride * side for side in activations.shape[-2:]]
        side = REACH * self.stride
        bell = torch.hann_window(side + 2, periodic=False).to(patches)[1:-1]
        bell = (bell[:, None] * bell).flatten().repeat(len(self.patch) // side**2)
        padded = [length + 2 * margin for length in size]

        def laid(values: Tensor) -> Tensor:
            return functional.fold(values.transpose(1, 2), padded, side, stride=self.stride)

        images = laid(patches * bell) / laid(bell.expand_as(patches))
        return images[..., margin : margin + size[0], margin : margin + size[1]]


def _margin(stride: int) -> int:
    """Pixels by which a patch reaches beyond its position's own on each side."""
    return (REACH - 1) * stride // 2


def _around(activations: Tensor, radius: int) -> Tensor:
    """(B, h w, F) of activations (B, C', h, w): those of each position and of its neighbours."""
    padded = functional.pad(activations, (radius,) * 4, mode="replicate")
    return functional.unfold(padded, 2 * radius + 1).transpose(1, 2)


def _patches(images: Tensor, stride: int) -> Tensor:
    """(N, h w, P) of images (N, C, H, W): the pixels about each position."""
    padded = functional.pad(images, (_margin(stride),) * 4, mode="reflect")
    return functional.unfold(padded, REACH * stride, stride=stride).transpose(1, 2)
