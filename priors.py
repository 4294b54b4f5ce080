"""Image priors: measures of how unlike natural images are, without any training data.

Every prior maps images (B, C, H, W) in [0, 1] to one non-negative scalar, the mean over images and pixels, so the
prior's weight means the same at every batch and image size. The repr of a `Prior` names it, so that a run describes
itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

PRIORS = ("opponent", "rgb", "anisotropic")

# (q + SMOOTHING)^(power/2) keeps the prior differentiable on flat regions; its root, 1e-3, is below one grey level.
SMOOTHING = 1e-6


@cache  # every evaluation of the prior needs the basis
def opponent_basis(channels: int, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Tensor:
    """Orthonormal axes (C, C) whose rows are luma, red-green and yellow-blue; the identity for images other than RGB.

    Natural images vary most along luma, and their edges along the chroma axes are few. A prior that treats the three
    axes separately, and chroma more strictly, is worth several dB (docs/results.md, "What is each part worth?").
    """
    if channels != 3:
        return torch.eye(channels, dtype=dtype, device=device)
    axes = torch.tensor([[1.0, 1, 1], [1, -1, 0], [1, 1, -2]], dtype=dtype, device=device)
    return axes / axes.norm(dim=1, keepdim=True)


def rotate_colours(images: Tensor, basis: Tensor) -> Tensor:
    """Images (B, C, H, W) expressed on the rows of `basis` (C, C)."""
    return (basis @ images.flatten(2)).view_as(images)


class Roughness(torch.autograd.Function):
    """sum_n weight_n sum_g weight_g  mean over images and pixels of |n-th differences of channels g|^power.

    The length at a pixel is that of the whole tensor of n-th differences, over the channels of the group. Differences
    that would reach over an edge are left out. The gradient is written out by hand: autograd would build a graph of
    some sixty small operations, which costs more than the rest of an evaluation on a small net.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, images: Tensor, orders: Sequence[float], groups: Sequence[tuple[int, float]], power: float
    ) -> Tensor:
        """The value at images (B, C, H, W), for weights of orders 1, 2, ... and (size, weight) of groups."""
        levels = [[images]]  # levels[n][k] (B, C, H - n + k, W - k): n - k differences down and k to the right
        for _ in orders:
            levels.append([levels[-1][0].diff(dim=-2), *(component.diff(dim=-1) for component in levels[-1])])
        value, squares = images.new_zeros(()), torch.empty_like(images)
        for order, weight in enumerate(orders, 1):
            squares.zero_()
            places = [at_pixels(squares, order, k, component) for k, component in enumerate(levels[order])]
            for k, (component, place) in enumerate(zip(levels[order], places, strict=True)):
                place.addcmul_(component, component, value=math.comb(order, k))
            value += powers_of_lengths_(squares, groups, weight, power)
            for component, place in zip(levels[order], places, strict=True):
                component.mul_(place)  # the component now holds its derivative, over comb(order, k)
        levels[0] = [squares.zero_()]
        for order in range(len(orders), 0, -1):
            above, below = levels[order], levels[order - 1]
            add_transposed(below[0], above[0], dim=-2)
            for k, (component, right) in enumerate(zip(below, above[1:], strict=True), 1):
                add_transposed(component, right, dim=-1, times=order / k)  # comb(order, k) / comb(order - 1, k - 1)
        ctx.save_for_backward(levels[0][0])
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, slope: Tensor) -> tuple[Tensor, None, None, None]:
        """The derivative by the images, which `forward` has computed."""
        (gradient,) = ctx.saved_tensors
        return slope * gradient, None, None, None


def powers_of_lengths_(squares: Tensor, groups: Sequence[tuple[int, float]], weight: float, power: float) -> Tensor:
    """weight sum_g weight_g mean (sum of the group's squares)^(power/2); `squares` becomes twice the derivative."""
    parts = squares.split([size for size, _ in groups], 1)
    squared = torch.empty_like(squares[:, : len(parts)])  # (B, G, H, W)
    for part, own in zip(parts, squared.unbind(1), strict=True):
        torch.sum(part, 1, out=own)
    squared += SMOOTHING
    slopes = squared.log2().mul_(power / 2 - 1).exp2_()  # a power, in a third of its time
    share = weight * power * len(parts) / squared.numel()
    slopes *= group_weights(tuple(share * own for _, own in groups), dtype=squares.dtype, device=squares.device)
    value = torch.dot(slopes.flatten(), squared.flatten()) / power
    for part, slope in zip(parts, slopes.split(1, 1), strict=True):
        part.copy_(slope)
    return value


@cache  # every evaluation needs them
def group_weights(weights: Sequence[float], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The weights, shape (G, 1, 1)."""
    return torch.tensor(weights, dtype=dtype, device=device)[:, None, None]


def at_pixels(images: Tensor, order: int, k: int, component: Tensor) -> Tensor:
    """The part of images (B, C, H, W) whose pixels belong to a component's entries: straight second differences are
    centred, all others begin at their pixel."""
    top, left = {(2, 0): (1, 0), (2, 2): (0, 1)}.get((order, k), (0, 0))
    height, width = component.shape[-2:]
    return images[..., top : top + height, left : left + width]


def add_transposed(images: Tensor, differences: Tensor, dim: int, times: float = 1.0) -> None:
    """Add to `images`, in place, the transpose of the difference along `dim`, applied to `differences`."""
    images.narrow(dim, 1, differences.shape[dim]).add_(differences, alpha=times)
    images.narrow(dim, 0, differences.shape[dim]).sub_(differences, alpha=times)


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

        R = first + curvature_weight * second + third_weight * third,

    the mean lengths of the tensors of first, second and third differences, each to the `power`: total variation (Rudin,
    Osher, Fatemi 1992; coupled over channels as in Bresson, Chan 2008), curvature, which is zero on linear shading,
    where total variation builds steps (Lysaker, Lundervold, Tai 2003), and third differences, zero where shading is
    quadratic. Powers below 1 suit natural images, whose differences have heavier tails than power 1 implies (Krishnan,
    Fergus 2009). Luma is one channel, chroma the two others taken together. `rgb` is R on the
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
        orders = (1.0, self.curvature_weight, self.third_weight)
        if self.name == "rgb" or images.shape[1] != 3:
            return Roughness.apply(images, orders, ((images.shape[1], 1.0),), self.power)
        opponent = rotate_colours(images, opponent_basis(3, dtype=images.dtype, device=images.device))
        return Roughness.apply(opponent, orders, ((1, 1.0), (2, self.chroma_weight)), self.power)
