"""How noisy the head's gradient is, and from where on its singular values mean something."""

import torch
from torch import Tensor

# The decomposition's own rounding moves singular values by about 1e-14 of the largest; ten times that is noise too.
DECOMPOSITION = 1e-13
# The longest row's rounding can gather in one direction: a few units of it, four seen at most, are noise.
ROUNDING = 4
# The smallest singular value estimates the noise from one draw; a fifth more than the law of large matrices says.
EDGE = 1.2


def additive_noise(gradient: Tensor) -> float:
    """Noise in each entry of the head's gradient (K, d) that does not scale with the entry.

    It shows in the smallest singular value, which would be zero without, since softmax errors sum to zero. Pruning
    shows as zeros among the features that are in use: what was set to zero is smaller than anything that was not.
    """
    used = gradient[:, gradient.any(0)]
    pruned = float(used[used != 0].abs().min()) if (used == 0).any() and used.any() else 0.0
    return max(pruned, float(torch.linalg.svdvals(gradient)[-1]) / _noise_edges(gradient)[0])


def row_weights(gradient: Tensor, additive: float, eps: float) -> Tensor:
    """D (K,), one over the error of each row of the head's gradient (K, d), in units of rounding's: eps |row|."""
    error = torch.hypot(eps * gradient.norm(dim=1), gradient.new_tensor(additive * gradient.shape[1] ** 0.5))
    return torch.where(error > 0, eps / error, 0.0)


def noise_floor(gradient: Tensor, eps: float) -> float:
    """Singular values of the head's gradient (K, d), rows weighted or not, up to this are noise.

    The singular values of a noise matrix lie between sqrt(d) - sqrt(K) and sqrt(d) + sqrt(K) times the noise of one
    entry. The smallest of G is the lower end, see `additive_noise`. Rounding alone adds a few eps times the longest
    row, and the decomposition itself 1e-13.
    """
    narrow, wide = _noise_edges(gradient)
    return float(
        max(
            (ROUNDING * eps + DECOMPOSITION) * gradient.norm(dim=1).max(),
            EDGE * wide / narrow * torch.linalg.svdvals(gradient)[-1],
        )
    )


def _noise_edges(matrix: Tensor) -> tuple[float, float]:
    rows, columns = matrix.shape
    return max(1.0, abs(columns**0.5 - rows**0.5)), columns**0.5 + rows**0.5


def noise_level(gradient: Tensor, rank: int, eps: float) -> float:
    """Standard deviation of the noise in the entries of a matrix (K, d), from the singular values beyond its rank."""
    rows, columns = gradient.shape
    least = torch.finfo(torch.float64).eps * float(gradient.abs().max())
    rest = torch.linalg.svdvals(gradient)[rank:-1]
    if not len(rest):
        return max(least, eps * float(gradient.norm(dim=1).max()) / columns**0.5)
    return max(least, float(rest.square().sum() / ((rows - 1 - rank) * (columns - rank))) ** 0.5)
