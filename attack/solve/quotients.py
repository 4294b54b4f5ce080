"""What a quotient u = g / (|g| + eps) still tells of g, if u has been rounded.

Adam's first step divides each entry of a gradient so. The sign is left of large entries, but |g| = eps |u| / (1 - |u|)
of small ones: with eps = 1e-8, weights of some hundredths and a rate of 1e-3, of all entries below 1e-3 or so.
"""

import torch
from torch import Tensor

from attack.solve.rounding import rounding_of

WIDE = 2.0  # deviations of its rounding that an entry's bounds leave room for


def bounds_of(quotients: Tensor, weights: Tensor, rate: float, eps: float) -> tuple[Tensor, Tensor]:
    """The least and the largest |g| of each entry, float64; infinite where nothing bounds it, 0 of entries without g.

    Args:
        quotients: u, as the difference of weights before and after the step tells it.
        weights: before the step, in the numbers in which they are sent.
        rate: of the step.
        eps: of Adam.
    """
    size = quotients.double().abs()
    rounding = rounding_of(weights)
    if rounding is None:
        rounding = torch.finfo(torch.float64).eps * weights.double().abs()
    off = WIDE * (rounding / rate + torch.finfo(weights.dtype).eps * size)
    low, high = (size - off).clamp(min=0), 1 - size - off
    least = torch.where(size > 0, eps * low / (1 - low).clamp(min=off.clamp(min=1e-300)), 0.0)
    most = torch.where(high > 0, eps * (size + off) / high.clamp(min=1e-300), torch.inf)
    return least, torch.where(size > 0, most, 0.0)
