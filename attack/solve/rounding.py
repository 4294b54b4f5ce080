"""How exactly numbers are given, and how much of them is left."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def precision_of(gradient: Tensor) -> float:
    """Relative rounding error of the numbers as they are: a float32 tensor may hold values rounded to fewer bits."""
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    fitting = [kind for kind in kinds if torch.equal(gradient, gradient.to(kind).to(gradient))]
    return torch.finfo(fitting[0] if fitting else torch.float64).eps


def rounding_of(numbers: Tensor) -> Tensor | None:
    """The standard deviation of each number's rounding, evenly up to half a unit in its last place.

    None where the numbers are as exact as float64: nothing shows that they were rounded.
    """
    eps = precision_of(numbers)
    if eps <= torch.finfo(torch.float64).eps:
        return None
    tiny = torch.finfo(torch.float32).tiny
    return eps * torch.exp2(numbers.double().abs().clamp(min=tiny).log2().floor()) / math.sqrt(12)


def share_of(left: Sequence[Tensor], whole: Sequence[Tensor]) -> float:
    """|left| / |whole|; infinite where it is no number."""
    lengths = [sum(float(each.detach().double().square().sum()) for each in tensors) for tensors in (left, whole)]
    share = (lengths[0] / lengths[1]) ** 0.5 if lengths[1] else math.inf
    return share if math.isfinite(share) else math.inf
