"""How far off what was read may be: the expected error of each image, and the probability that it is small.

An error of d dimensions is not that of one: its length hardly varies where d is large. If it is Gaussian with the
covariance C, |error|^2 has the mean tr C and the variance 2 tr C^2, as chi-square with k = (tr C)^2 / tr C^2 degrees of
freedom has when scaled (Satterthwaite 1946). k is between 1, where one direction is far weaker than the others, and d.
"""

import torch
from torch import Tensor

WITHIN = 0.01  # relative error that `confidence` speaks of


def confidence(uncertainty: Tensor, freedom: Tensor) -> Tensor:
    """Probability that a relative error is at most 1 %, if its root mean square is `uncertainty` and it is Gaussian.

    Args:
        uncertainty, freedom: (N,), `freedom` the degrees of freedom of the error, k above.
    """
    half = freedom.double() / 2
    return torch.special.gammainc(half, half * (WITHIN / uncertainty.double().clamp(min=1e-12)).square())
