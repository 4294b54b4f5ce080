"""Linear least squares without a matrix: CGLS on operators that are their forward and their adjoint, and no more.

It knows nothing of what it solves, and says why it stopped.

Sources: conjugate gradients on the normal equations (Hestenes, Stiefel 1952), in the form that never squares the
residual's precision (Björck 1996, section 7.4), and iterative refinement of its solutions (section 2.9 there).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from attack.solve.budget import WorkBudget

# A residual that falls by less than this share over PATIENCE iterations has stopped falling.
STALLED, PATIENCE = 1e-3, 20

# The share of |A' r| that is left of it before the residual is computed anew in full precision. Float32 reaches 1e-6
# or so; of 1e-2, 1e-3 and 1e-4 the last took the fewest iterations altogether, 15 more than full precision throughout.
REFINED = 1e-4


class Operator(Protocol):
    """A linear map A with <A x, y> = <x, A' y>."""

    def forward(self, x: Tensor) -> Tensor:
        """A x."""
        ...

    def adjoint(self, y: Tensor) -> Tensor:
        """A' y."""
        ...


@dataclass(frozen=True)
class Stacked:
    """Several operators on the same x, one above the other, each scaled: y is one long vector."""

    operators: Sequence[Operator]
    weights: Sequence[Tensor]  # what each operator's rows are multiplied by, broadcast to their shape
    shapes: Sequence[torch.Size]  # of each operator's y

    def forward(self, x: Tensor) -> Tensor:
        """All rows of x, (N,)."""
        rows = zip(self.operators, self.weights, strict=True)
        return torch.cat([(weight * operator.forward(x)).flatten() for operator, weight in rows])

    def adjoint(self, y: Tensor) -> Tensor:
        """Sum of the adjoints."""
        parts = y.split([shape.numel() for shape in self.shapes])
        rows = zip(self.operators, self.weights, self.shapes, parts, strict=True)
        return sum(operator.adjoint(weight * part.view(shape)) for operator, weight, shape, part in rows)


@dataclass(frozen=True)
class Product:
    """outer after inner."""

    outer: Operator
    inner: Operator

    def forward(self, x: Tensor) -> Tensor:
        """outer(inner(x))."""
        return self.outer.forward(self.inner.forward(x))

    def adjoint(self, y: Tensor) -> Tensor:
        """inner'(outer'(y))."""
        return self.inner.adjoint(self.outer.adjoint(y))


@dataclass(frozen=True)
class Solution:
    """What came out: x, |A x - b| / |b|, after how many iterations, and why no more: converged, stalled, ..."""

    x: Tensor
    residual: float
    iterations: int
    stopped: str


def cgls(
    operator: Operator,
    target: Tensor,
    start: Tensor,
    *,
    iterations: int,
    budget: WorkBudget,
    tolerance: float = 1e-12,
) -> Solution:
    """Minimise |A x - target| from `start`; what the rows leave open stays as it is there.

    It ends `converged` once |A' r| is below `tolerance` of |A' target|, `stalled` when the residual no longer falls,
    or for `iterations`.

    Raises:
        OutOfTimeError: the budget's clock has run out.
    """
    x, size = start.clone(), float(target.norm())
    residual = target - operator.forward(x)
    slope = operator.adjoint(residual)
    direction, square = slope, float(slope.square().sum())
    enough = tolerance * float(operator.adjoint(target).norm())
    lengths = [float(residual.norm())]
    stopped = "iterations"
    for _ in range(iterations):
        if math.sqrt(square) <= enough:
            stopped = "converged"
            break
        if len(lengths) > PATIENCE and lengths[-1] > (1 - STALLED) * lengths[-1 - PATIENCE]:
            stopped = "stalled"
            break
        budget.check()
        image = operator.forward(direction)
        step = square / float(image.square().sum())
        x, residual = x + step * direction, residual - step * image
        slope = operator.adjoint(residual)
        before, square = square, float(slope.square().sum())
        direction = slope + (square / before) * direction
        lengths.append(float(residual.norm()))
    return Solution(x, lengths[-1] / size if size else 0.0, len(lengths) - 1, stopped)


def refined(
    operator: Operator,
    rough: Operator,
    target: Tensor,
    start: Tensor,
    *,
    iterations: int,
    budget: WorkBudget,
) -> Solution:
    """Minimise |A x - target| as `cgls` does, with all but a few products in the dtype of `rough`, which is A in it.

    Corrections are solved for with `rough`; the residual that they leave is computed with A, and corrected again, until
    it no longer falls. On a CPU a product in float32 takes a third of the time that it takes in float64.
    """
    x, residual, size, spent, stopped = start.clone(), target - operator.forward(start), target.norm(), 0, "iterations"
    length = float(residual.norm())
    while length and spent < iterations:
        unit = (residual / length).float()
        step = cgls(
            rough, unit, start.new_zeros(start.shape).float(), iterations=iterations - spent, tolerance=REFINED,
            budget=budget,
        )  # fmt: skip
        spent, stopped = spent + step.iterations, step.stopped
        trial = x + length * step.x.to(x)
        left = target - operator.forward(trial)
        fell = float(left.norm()) < (1 - STALLED) * length
        if left.norm() < length:
            x, residual, length = trial, left, float(left.norm())
        if not fell:
            break
    return Solution(x, length / float(size) if size else 0.0, spent, stopped)
