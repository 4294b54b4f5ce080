"""How far recovered inputs may be off, image by image and entry by entry."""

import torch
from torch import Tensor

from network.chain import Chain
from network.kinds import kind_of
from network.known_outputs import FLOOR, ZERO

FEW = 0.1  # share of an image's entries that is taken for zeros without a look: of all layers tried, 0.3 and more are
WITHIN = 0.4  # standard deviations within which a third of the zeros lie: that tenth, where 0.3 are zeros
GATHERED = 1e-2  # of the median: zeros stand apart at least so far
SAMPLE = 8  # negative entries that are enough to measure noise by


def beside(each: Tensor, values: Tensor) -> Tensor:
    """A number for each image, (B,), in a shape that broadcasts to values (B, ...)."""
    return each.view(-1, *(1,) * (values.dim() - 1))


def relative(error: Tensor, values: Tensor) -> Tensor:
    """|error| / |values| of each image, (B,)."""
    return error.flatten(1).norm(dim=1) / values.flatten(1).norm(dim=1).clamp(min=1e-300)


def size_of(values: Tensor) -> Tensor:
    """Root mean square of each image's values, (B,)."""
    return values.flatten(1).square().mean(1).sqrt()


def at_least(error: Tensor, spread: Tensor, values: Tensor) -> Tensor:
    """The spread (B, 1, ...) or (B, C, ...) of values' errors, in each image no less than a relative error (B,).

    Equations that hardly determine their unknowns leave errors in a few directions, far larger than the spread of any
    one entry shows, and no residual shows them at all. The recovery test does.
    """
    own = size_of(spread.expand_as(values)).clamp(min=1e-300)
    return spread * beside((error * size_of(values) / own).clamp(min=1.0), values)


def noise_of(values: Tensor, spread: Tensor, *, is_after_relu: bool) -> Tensor:
    """Standard deviation of the errors of values (B, C, ...), from what it should be, (B, 1, ...).

    Out of a ReLU nothing is negative: what is, shows the lower half of the errors. Each image's is measured by it, and
    then each channel's, where the channel is worse than the others.
    """
    spread = spread.maximum(FLOOR * beside(size_of(values), values)).expand_as(values)
    if not is_after_relu:
        return spread
    spread = spread * _cluster(values / spread).clamp(min=1.0)
    for dims in (tuple(range(1, values.dim())), (0, *range(2, values.dim()))):
        lower = (values / spread).clamp(max=0)
        count = (lower < 0).sum(dims, keepdim=True)
        measured = (lower.square().sum(dims, keepdim=True) / count.clamp(min=1)).sqrt()
        spread = spread * torch.where(count >= SAMPLE, measured, 1.0).clamp(min=1.0)
    return spread


def _cluster(values: Tensor) -> Tensor:
    """The size (B, 1, ...) of the values that gather around zero, of each image; 0 where none do.

    Images whose loss is all but zero take up some of the other images' inputs, which are positive. Such errors show
    below zero as little as in the residual, but they keep zeros from being zeros.
    """
    sizes = values.abs().flatten(1)
    low, middle = sizes.quantile(FEW, dim=1), sizes.median(dim=1).values
    return beside(torch.where(low < GATHERED * middle, low / WITHIN, 0.0), values)


def is_active(values: Tensor) -> Tensor:
    """Which outputs (B, ...) of a ReLU are more than what the noise that shows below zero makes of zeros."""
    return values > ZERO * noise_below_zero(values)


def noise_below_zero(values: Tensor) -> Tensor:
    """Standard deviation of the errors of outputs (B, ...) of a ReLU, by nothing but what shows below zero."""
    return noise_of(values, torch.zeros_like(beside(size_of(values), values)), is_after_relu=True)


def without_noise(values: Tensor, noise: Tensor) -> Tensor:
    """Outputs of a ReLU, with zeros where they are zero but for noise (broadcasts to the values)."""
    return torch.where(values > ZERO * noise, values, 0.0)


def is_after_relu(chain: Chain) -> bool:
    """Whether the chain's outputs come out of a ReLU, perhaps pooled or flattened, and so are never negative."""
    for stage in reversed(chain):
        kind = kind_of(stage.module)
        if not kind.keeps_sign:
            return kind.is_sparse
    return False
