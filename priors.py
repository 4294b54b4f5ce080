"""Image priors: what natural images look like, without any training data.

Every prior maps images (B, C, H, W) in [0, 1] to one non-negative scalar, the mean over images and pixels, so that
its weight means the same at every batch and image size. The repr of a `Prior` says what it is, so that a run
describes itself.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

PRIORS = ("opponent", "rgb", "anisotropic")

# (q + SMOOTHING)^(power/2) keeps the prior differentiable on flat regions; 1e-3 of the range is below one grey level.
SMOOTHING = 1e-6


@cache  # asked for in every evaluation of the prior
def opponent_basis(channels: int, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Tensor:
    """Orthonormal axes (C, C) whose rows are luma, red-green and yellow-blue; the identity for anything but RGB.

    Natural images vary most along luma, and their edges along the chroma axes are few: a prior that sees the three
    apart, and holds chroma tighter, is worth several dB (docs/results.md, "What each part is worth").
    """
    if channels != 3:
        return torch.eye(channels, dtype=dtype, device=device)
    axes = torch.tensor([[1.0, 1, 1], [1, -1, 0], [1, 1, -2]], dtype=dtype, device=device)
    return axes / axes.norm(dim=1, keepdim=True)


def rotate_colours(images: Tensor, basis: Tensor) -> Tensor:
    """Images (B, C, H, W) expressed on the rows of `basis` (C, C)."""
    return torch.einsum("ij,bjhw->bihw", basis, images)


def _differences(images: Tensor) -> tuple[Tensor, Tensor]:
    """Forward differences along rows and columns, same shape as `images`, zero across the last edge."""
    down = torch.nn.functional.pad(images[..., 1:, :] - images[..., :-1, :], (0, 0, 0, 1))
    right = torch.nn.functional.pad(images[..., 1:] - images[..., :-1], (0, 1))
    return down, right


def _mean_length(*components: Tensor, power: float = 1.0) -> Tensor:
    """Mean over images and pixels of the Euclidean length of the components, over channels too, raised to `power`."""
    squared = sum(c.square() for c in components).sum(1)  # (B, H, W)
    return ((squared + SMOOTHING) ** (power / 2)).mean()


def total_variation(images: Tensor, power: float = 1.0) -> Tensor:
    """Isotropic vectorial total variation: mean length of the (2C)-dimensional forward difference at each pixel.

    Source: Rudin, Osher, Fatemi 1992; coupled over channels as in Bresson, Chan 2008; powers below 1 as in Krishnan,
    Fergus 2009: the differences of natural images have heavier tails than power 1 speaks for.
    """
    return _mean_length(*_differences(images), power=power)


def curvature(images: Tensor, power: float = 1.0) -> Tensor:
    """Mean Frobenius length of the discrete Hessian at each pixel: zero on linear shading, where TV builds steps.

    Differences that would reach over an edge are left out, so that a ramp costs nothing anywhere.

    Source: Lysaker, Lundervold, Tai 2003 (second-order total variation).
    """
    pad = torch.nn.functional.pad
    vertical = images[..., 2:, :] - 2 * images[..., 1:-1, :] + images[..., :-2, :]
    horizontal = images[..., 2:] - 2 * images[..., 1:-1] + images[..., :-2]
    mixed = images[..., 1:, 1:] - images[..., 1:, :-1] - images[..., :-1, 1:] + images[..., :-1, :-1]
    twice = math.sqrt(2) * pad(mixed, (0, 1, 0, 1))
    return _mean_length(pad(vertical, (0, 0, 1, 1)), pad(horizontal, (1, 1)), twice, power=power)


def third_variation(images: Tensor, power: float = 1.0) -> Tensor:
    """Mean length of the tensor of third differences at each pixel: zero where shading is quadratic.

    Differences that would reach over an edge are left out, as in `curvature`.
    """
    order, components = 3, []
    for across in range(order + 1):
        component = images.diff(n=order - across, dim=-2).diff(n=across, dim=-1)
        component = torch.nn.functional.pad(component, (0, across, 0, order - across))
        components.append(math.sqrt(math.comb(order, across)) * component)
    return _mean_length(*components, power=power)


def anisotropic_variation(images: Tensor) -> Tensor:
    """The published form: mean absolute forward difference along rows plus the same along columns.

    Source: the MAGIA and Inverting Gradients scripts (arXiv 2509.18170, 2003.14053).
    """
    return (images[..., 1:, :] - images[..., :-1, :]).abs().mean() + (images[..., 1:] - images[..., :-1]).abs().mean()


def contrast(images: Tensor) -> Tensor:
    """Mean squared distance from mid-grey: the L2 image prior (Yin et al. 2021), there on images of zero mean."""
    return (images - 0.5).square().mean()


@dataclass(frozen=True)
class Prior:
    """A named prior with its weights; call it on images (B, C, H, W) in [0, 1].

    `opponent` is  R(luma) + chroma_weight * R(chroma)  with

        R = total_variation + curvature_weight * curvature + third_weight * third_variation,

    each of lengths to the `power`, luma one channel and chroma the two others taken together. `rgb` is R on the
    channels as they are, `anisotropic` the published mean form, which has no further weights. Without weights all three
    are plain: chroma as heavy as luma, first differences only.
    """

    name: str
    chroma_weight: float = 1.0
    curvature_weight: float = 0.0
    third_weight: float = 0.0
    power: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in PRIORS:
            raise ValueError(f"unknown prior {self.name!r}: choose one of {', '.join(PRIORS)}")

    def __call__(self, images: Tensor) -> Tensor:
        """The prior's value, a scalar."""
        if self.name == "anisotropic":
            return anisotropic_variation(images)
        if self.name == "rgb" or images.shape[1] != 3:
            return self._roughness(images)
        luma, chroma = rotate_colours(images, opponent_basis(3, dtype=images.dtype, device=images.device)).split(
            [1, 2], dim=1
        )
        return self._roughness(luma) + self.chroma_weight * self._roughness(chroma)

    def _roughness(self, images: Tensor) -> Tensor:
        roughness = total_variation(images, self.power)
        if self.curvature_weight:
            roughness = roughness + self.curvature_weight * curvature(images, self.power)
        if self.third_weight:
            roughness = roughness + self.third_weight * third_variation(images, self.power)
        return roughness
