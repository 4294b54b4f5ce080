"""Inputs behind a ReLU that their zeros alone tell apart, whatever the network above them.

An input of a batch is an extreme ray of the cone of non-negative inputs in A, with far more zeros than other rays have:
about half of its entries. All entries in which the likeliest other direction of A differs there say that the ray is an
image, and no chance. Neither the tail nor a label is asked. So these images are found where the tail is not known: a
client that has made several steps has used each minibatch with weights of its own.
"""

import torch
from torch import Tensor

from attack.read.candidates import UNSURE, ImageEquations
from attack.read.rays import extreme_rays, pinned, single_programme
from attack.solve.budget import WorkBudget

# Zeros, for each dimension of A, that must stand against any other direction. An extreme ray has as many zeros of its
# own as A has dimensions, less one. A trained ConvNet's images have 500 to 1,700 in 8 or 9 dimensions, other rays up to
# 30.
STANDING = 4.0
RAYS = 4  # proposed in a round for each dimension of A, at least FEWEST
FEWEST = 16
FRUITLESS = 3  # rounds in a row without a new image, after which the rest is given up
SAME = 1e-2  # relative distance below which two rays are one
BLURRED = 5.0  # or below so many times their expected errors


def told_by_zeros(equations: ImageEquations, generator: torch.Generator, budget: WorkBudget) -> tuple[Tensor, Tensor]:
    """The images of a span of as many dimensions: coordinates (N, dim A) and their zeros (N, n), surest first.

    Fewer than all where no more rays stand out from the others, or the budget's work is spent.

    Raises:
        OutOfTimeError: the budget's clock has run out.
    """
    span, fruitless = equations.span, 0
    c, errors = span.basis.new_zeros(0, span.dimension), span.basis.new_zeros(0)
    zeros = torch.zeros(0, span.basis.shape[1], dtype=torch.bool, device=c.device)
    while len(c) < span.dimension and fruitless < FRUITLESS and not budget.is_spent:
        budget.check()
        count = max(FEWEST, RAYS * span.dimension)
        rays, _ = extreme_rays(span, single_programme(span), count, generator, budget)
        rays, silent = pinned(span, equations.along, rays)
        standing, error = equations.by_zeros(rays, silent)
        stands = (standing >= STANDING * span.dimension) & (error < UNSURE)
        known = len(c)
        c, zeros, errors = (torch.cat([old, new[stands]]) for old, new in ((c, rays), (zeros, silent), (errors, error)))
        kept = _different(c @ span.basis, errors)
        c, zeros, errors = c[kept], zeros[kept], errors[kept]
        fruitless = 0 if len(c) > known else fruitless + 1
    return c[: span.dimension], zeros[: span.dimension]


def _different(values: Tensor, errors: Tensor) -> Tensor:
    """Indices of inputs (N, n), the surest first, each once."""
    kept: list[int] = []
    for i in errors.argsort().tolist():
        apart = (
            (values[i] - values[j]).norm() > max(SAME, BLURRED * float(errors[i] + errors[j])) * values[j].norm()
            for j in kept
        )
        if all(apart):
            kept.append(i)
    return torch.tensor(kept, dtype=torch.long, device=values.device)
