"""Independent component analysis: tracks that were mixed linearly are unmixed if they are independent, not Gaussian.

Source: Hyvarinen 1999, "Fast and robust fixed-point algorithms for independent component analysis".
"""

import torch
from torch import Tensor

ITERATIONS = 500  # iterations of the fixed point, at most
SETTLED = 1e-8  # the fixed point has converged once every direction turns by less than this in one iteration


def fast_ica(mixed: Tensor, generator: torch.Generator) -> Tensor:
    """The matrix (r, r) that unmixes tracks (r, d) into independent tracks of unit variance: symmetric, log cosh.

    Source: Hyvarinen 1999, eqs. 20 and 38.
    """
    centred = mixed - mixed.mean(1, keepdim=True)
    variance, axes = torch.linalg.eigh(centred @ centred.T / centred.shape[1])
    whitening = axes / variance.sqrt() @ axes.T
    white = whitening @ centred
    start = torch.randn(len(mixed), len(mixed), generator=generator, dtype=torch.float64).to(mixed)
    rotation = _nearest_rotation(start)
    for _ in range(ITERATIONS):
        slope = (rotation @ white).tanh()
        turned = slope @ white.T / white.shape[1] - (1 - slope.square()).mean(1, keepdim=True) * rotation
        turned = _nearest_rotation(turned)
        turn = (1 - (turned * rotation).sum(1).abs()).max()
        rotation = turned
        if turn < SETTLED:
            break
    return rotation @ whitening


def _nearest_rotation(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix)
    return left @ right
