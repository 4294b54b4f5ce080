"""What noise makes of features that were read from the head's gradient, simulated to first order."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attack.read.head.equations import HeadEquations, HeadPoint

NOISES = 64  # of noise: they give the errors' size to a few percent, their degrees of freedom to a fifth
EXPLAINED = 3.0  # a residual below this multiple of what noise leaves means that the gradient is explained
NEARLY_SINGULAR = 1e-15  # of the mean diagonal: what cannot be told apart is uncertain, not a failure


@dataclass(frozen=True)
class ErrorPerNoise:
    """What noise of unit deviation in every entry of the weighted gradient makes of a solution, to first order.

    Attributes:
        length: (B,) root mean square of each image's error, infinite where it is not determined.
        freedom: (B,) of that error.
        cost: mean |f|^2 that is left of the residual.
    """

    length: Tensor
    freedom: Tensor
    cost: float

    def expected(self, noise: float, cost: float) -> Tensor:
        """(B,) root mean square errors under this noise, or under what the residual |f|^2 shows if that is no noise."""
        shown = math.sqrt(cost / self.cost)
        return self.length * (noise if shown < EXPLAINED * noise else shown)


def error_per_noise(
    equations: HeadEquations, at: HeadPoint, weight: Tensor, right: Tensor, generator: torch.Generator
) -> ErrorPerNoise:
    """Simulate noise N (K, d) in D G, whose first-order consequences for features h = R^T q + o are three.

    R is turned: o = -B (E E^T)^-1 E N (1 - R^T R) is missing from the features, E = [D e_i]. Their logits then lack
    W o, which the residual f takes for something that q must explain. And f itself holds -N R^T. All of f that can be
    explained moves q, by -(J^T J)^-1 J^T f.

    Args:
        equations, at: a solution and what it solves.
        weight: W (K, d).
        right: R (r, d).
        generator: what noise is drawn from, on the CPU.
    """
    size, rank = at.q.shape
    matrix, gram = equations.normal(at), at.e @ at.e.T
    for m in (matrix, gram):
        m.diagonal().add_(NEARLY_SINGULAR * m.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(matrix)
    gram_factor, gram_failed = torch.linalg.cholesky_ex(gram)
    if failed or gram_failed:
        return ErrorPerNoise(at.q.new_full((size,), torch.inf), at.q.new_ones(size), torch.inf)
    squares, costs = [], []
    for _ in range(NOISES):
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(at.q)
        column = torch.randn(len(weight), 1, generator=generator, dtype=torch.float64).to(at.q)  # of D gamma
        inside = noise @ right.T  # (K, r)
        missing = size * torch.cholesky_solve(at.e @ (noise - inside @ right), gram_factor)  # -o, (B, d)
        f = equations.jvp(at, missing @ weight.T) - torch.cat([inside, column], 1)[:, : at.x.shape[1]]
        pull = equations.vjp(at, f).reshape(-1, 1)
        moved = -torch.cholesky_solve(pull, factor)
        squares.append(moved.view(size, rank).square().sum(1) + missing.square().sum(1))
        costs.append(float(f.square().sum() + (pull * moved).sum()))
    variance, mean = torch.var_mean(torch.stack(squares), 0)
    return ErrorPerNoise(mean.sqrt(), (2 * mean.square() / variance).clamp(1, weight.shape[1]), sum(costs) / NOISES)
