"""How exactly numbers are given."""

import torch
from torch import Tensor


def precision_of(gradient: Tensor) -> float:
    """Relative rounding error of the numbers as they are: a float32 tensor may hold values rounded to fewer bits."""
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    fitting = [kind for kind in kinds if torch.equal(gradient, gradient.to(kind).to(gradient))]
    return torch.finfo(fitting[0] if fitting else torch.float64).eps
