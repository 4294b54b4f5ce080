"""Levenberg-Marquardt for several small least-squares problems side by side, each with its own damping.

A step solves (J^T J + damping mean(diag J^T J)) step = -J^T f. A step that does not lower |f|^2 is refused and the
damping grows; otherwise the damping falls, by a fixed factor or by the gain ratio (Nielsen 1999). With geodesic
acceleration (Transtrum, Sethna 2012, arXiv 1201.5885) a step is bent along the path that it begins, which follows
curved valleys about five times as fast.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.func import jvp, vmap

from attack.solve.budget import WorkBudget

TOGETHER = 128  # unknowns by which a residual is differentiated at once
BENT = 0.75  # largest |2 acceleration| / |step|: beyond it the path bends too much for a parabola (Transtrum, Sethna)
SLOW = 0.999  # a step that leaves more of |f|^2 than this was slow
GAIN = 0.2, 3.0  # least and largest factor of the damping by the gain ratio


class Problems(Protocol):
    """N least-squares problems min |f_n(x_n)|^2, x_n of d entries; `which` are the indices (n,) of some of them."""

    def cost(self, x: Tensor, which: Tensor) -> Tensor:
        """|f|^2 (n,) at x (n, d)."""
        ...

    def linearised(self, x: Tensor, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """|f|^2 (n,), J^T J (n, d, d) and J^T f (n, d) at x (n, d)."""
        ...

    def bend(self, x: Tensor, step: Tensor, which: Tensor) -> Tensor:
        """J^T f'' (n, d), f'' the second derivative of f along a step (n, d). Only for acceleration."""
        ...


@dataclass(frozen=True)
class Differentiated:
    """One problem, from its residual f (m,) as a differentiable function of the unknowns (d,)."""

    residual: Callable[[Tensor], Tensor]

    def slopes(self, x: Tensor) -> Tensor:
        """J^T (d, m) at x (d,), by forward differentiation."""
        return vmap(lambda v: jvp(self.residual, (x,), (v,))[1], chunk_size=TOGETHER)(torch.eye(len(x)).to(x))

    def cost(self, x: Tensor, which: Tensor) -> Tensor:
        """|f|^2 (1,) at x (1, d)."""
        return self.residual(x[0]).square().sum()[None]

    def linearised(self, x: Tensor, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """|f|^2 (1,), J^T J (1, d, d) and J^T f (1, d) at x (1, d)."""
        f, slopes = self.residual(x[0]), self.slopes(x[0])
        return f.square().sum()[None], (slopes @ slopes.T)[None], (slopes @ f)[None]


@dataclass(frozen=True)
class DampingRule:
    """How the damping, in units of the mean diagonal of J^T J, changes from step to step.

    Attributes:
        first: at the start; 1e-3 is a Gauss-Newton step, hardly shortened.
        least: below float64's last digits the matrix is its own again.
        most: beyond it |f|^2 is taken to be least.
        refused: factor after a refused step.
        accepted: factor after an accepted step; None: by the gain ratio.
        refusals: in a row, after which |f|^2 is taken to be least; None: as many as the damping allows.
        patience: slow steps in a row that end it.
        counts_refusals: whether a refused step counts as an iteration.
        is_scaled: whether each unknown is damped in units of its own entry of the diagonal, for unknowns that have no
            common unit (Marquardt 1963).
    """

    first: float = 1e-3
    least: float = 1e-15
    most: float = math.inf
    refused: float = 2.0
    accepted: float | None = None
    refusals: int | None = 12
    patience: int = 6
    counts_refusals: bool = False
    is_scaled: bool = False


@dataclass(frozen=True)
class LevenbergSolution:
    """x (N, d), |f|^2 (N,), and J^T J (N, d, d) there."""

    x: Tensor
    cost: Tensor
    normal: Tensor


def levenberg(
    problems: Problems,
    start: Tensor,
    rule: DampingRule,
    *,
    iterations: int,
    budget: WorkBudget,
    enough: float = 0.0,
    accelerated: bool = False,
) -> LevenbergSolution:
    """Minimise each |f_n|^2 from start (N, d).

    A problem ends once |f|^2 is at most `enough`, after `iterations`, or by its damping rule.

    Raises:
        OutOfTimeError: the budget's clock has run out.
    """
    count = len(start)
    x, everything = start.clone(), torch.arange(count, device=start.device)
    cost, normal, gradient = problems.linearised(x, everything)
    damping = x.new_full((count,), rule.first)
    refused, slow, taken = (torch.zeros_like(everything) for _ in range(3))
    while True:
        going = (damping <= rule.most) & (slow < rule.patience) & (taken < iterations) & (cost > enough)
        if rule.refusals is not None:
            going &= refused < rule.refusals
        which = going.nonzero()[:, 0]
        if not len(which):
            break
        budget.check()
        diagonal = normal[which].diagonal(dim1=1, dim2=2).contiguous()
        units = diagonal if rule.is_scaled else diagonal.mean(1, keepdim=True)
        shift = damping[which][:, None] * units  # (n, 1) or (n, d)
        factor, step = _damped_step(normal[which], gradient[which], shift)
        trial, is_straight = x[which] + step, torch.ones_like(which, dtype=torch.bool)
        if accelerated:
            trial, is_straight = _bent(problems, x[which], step, factor, which)
        costs = problems.cost(trial, which)
        better = (costs < cost[which]) & is_straight
        worse, which, before = which[~better], which[better], cost[which[better]]
        damping[worse] *= rule.refused
        refused[worse] += 1
        taken[worse] += int(rule.counts_refusals)
        if not len(which):
            continue
        expected = _damped_square(step[better], shift[better]) - (step[better] * gradient[which]).sum(1)
        x[which] = trial[better]
        cost[which], normal[which], gradient[which] = problems.linearised(x[which], which)
        damping[which] = (damping[which] * _factor(rule, (before - cost[which]) / expected)).clamp(min=rule.least)
        refused[which], taken[which] = 0, taken[which] + 1
        slow[which] = torch.where(cost[which] > SLOW * before, slow[which] + 1, 0)
    return LevenbergSolution(x, cost, normal)


def _damped_step(normal: Tensor, gradient: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factor of J^T J + shift and -(J^T J + shift)^-1 J^T f, (n, d); no step where that is singular."""
    damped = normal.clone()
    damped.diagonal(dim1=1, dim2=2).add_(shift)
    factor, failed = torch.linalg.cholesky_ex(damped)
    step = -torch.cholesky_solve(gradient[..., None], factor)[..., 0]
    return factor, torch.where((failed == 0)[:, None], step, 0.0).nan_to_num(0.0)


def _damped_square(step: Tensor, shift: Tensor) -> Tensor:
    """step^T diag(shift) step (n,) of shifts (n, 1) or (n, d)."""
    square = step.square()
    return (square * shift).sum(1) if shift.shape[1] > 1 else shift[:, 0] * square.sum(1)


def _bent(problems: Problems, x: Tensor, step: Tensor, factor: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    """Where step and acceleration lead, (n, d), and which steps are straight enough to be trusted, (n,)."""
    force = problems.bend(x, step, which)
    acceleration = -torch.cholesky_solve(force[..., None], factor)[..., 0].nan_to_num(0.0)
    return x + step + acceleration / 2, 2 * acceleration.norm(dim=1) <= BENT * step.norm(dim=1)


def _factor(rule: DampingRule, gain: Tensor) -> Tensor | float:
    """What an accepted step multiplies the damping by, from the gain it brought over the gain expected."""
    return rule.accepted or (1 - (2 * gain - 1) ** 3).clamp(*GAIN)
