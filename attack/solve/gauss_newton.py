"""Nonlinear least squares without a matrix: Gauss-Newton, each step by conjugate gradients.

The residual is r(x) = target - A f(x), f a function that torch can differentiate, A linear and known. f is linearised
where x stands, in float32, by reverse mode twice: the derivative of J' c by c, along v, is J v (Pearlmutter 1994 has
the idea), so whatever f is made of, pools and all, needs no derivative of its own. Steps are solved by CGLS on J, and
not to the end: what so few iterations do not reach stays where it was, which is all the damping that is needed (Hanke
1997, Inverse Problems 13, 79). A step that does not lower the residual is halved.

Unknowns that may not be negative are projected (Bertsekas 1982): those at zero that want to go lower stay out
of a step.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from attack.solve.budget import WorkBudget
from attack.solve.cgls import Operator, Solution, cgls

INNER, LAST = 60, 400  # iterations of CGLS in a step: while masks change anyway, and once the residual has settled
STEPS = 60  # at most
HALVINGS = 6  # of a step
EXACT = 1e-12  # relative: CGLS in float32 never gets there, and goes on for all its iterations
COARSE, ROUNDED = 1e-2, 1e-5  # bounds of a step's tolerance where it follows the residual
UNSETTLED, LOOK_BACK = 0.8, 2  # a residual has settled that so many steps in a row leave above this share of it


class Tangent:
    """A function of x with several values, linearised: products with its Jacobian J and with the transposed.

    Args:
        function: x to a tuple of tensors.
        at: x.
    """

    def __init__(self, function: Callable[[Tensor], Sequence[Tensor]], at: Tensor) -> None:
        with torch.enable_grad():
            self._x = at.detach().clone().requires_grad_()
            self._values = function(self._x)
            self._cotangents = [torch.zeros_like(value, requires_grad=True) for value in self._values]
            (self._pulled,) = torch.autograd.grad(self._values, self._x, self._cotangents, create_graph=True)

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        """J x, one tensor for each value."""
        return torch.autograd.grad(self._pulled, self._cotangents, x, retain_graph=True)

    def adjoint(self, y: Sequence[Tensor]) -> Tensor:
        """J' y."""
        (x,) = torch.autograd.grad(self._values, self._x, y, retain_graph=True)
        return x

    @property
    def shapes(self) -> Sequence[torch.Size]:
        """Of the values."""
        return [value.shape for value in self._values]


@dataclass(frozen=True)
class Flat:
    """The operator that flattens tensors of a shape: of values that are equations themselves."""

    shape: torch.Size

    def forward(self, x: Tensor) -> Tensor:
        """In a row."""
        return x.flatten()

    def adjoint(self, y: Tensor) -> Tensor:
        """In its shape."""
        return y.view(self.shape)


class LinearisedEquations(Operator, Protocol):
    """A J at one x, in float32, on scaled unknowns."""

    def start(self) -> Tensor:
        """No step."""
        ...

    def step(self, x: Tensor) -> Tensor:
        """What a solution in the scaled unknowns adds to x."""
        ...


class Equations(Protocol):
    """r(x) = 0, nearly."""

    is_positive: bool  # whether no x is negative; its linearisation then has `within`
    size: float  # |targets|

    def residual(self, x: Tensor) -> Tensor:
        """r(x), flat."""
        ...

    def linearised(self, x: Tensor) -> LinearisedEquations:
        """-r' at x."""
        ...

    def held(self, x: Tensor) -> Tensor:
        """x within its bounds."""
        ...


@dataclass(frozen=True)
class NonlinearEquations:
    """rows[k] on the k-th value of function(x), with as many targets.

    Attributes:
        function: x to a tuple of tensors.
        rough: the same in float32.
        rows: linear operators on these values, in x's dtype.
        rough_rows: the same in float32.
        targets: of the rows, flat.
        scale: of x, broadcasts to it: what CGLS takes steps in is x / scale.
        is_positive: whether no x is negative.
    """

    function: Callable[[Tensor], Sequence[Tensor]]
    rough: Callable[[Tensor], Sequence[Tensor]]
    rows: Sequence[Operator]
    rough_rows: Sequence[Operator]
    targets: Sequence[Tensor]
    scale: Tensor
    is_positive: bool

    @property
    def size(self) -> float:
        """|targets|."""
        return math.hypot(*(float(target.norm()) for target in self.targets))

    def residual(self, x: Tensor) -> Tensor:
        """targets - A f(x), one after the other."""
        parts = zip(self.targets, self.rows, self.function(x), strict=True)
        return torch.cat([target - operator.forward(value) for target, operator, value in parts])

    def linearised(self, x: Tensor) -> "Linearised":
        """A J at x, in float32, on x / scale."""
        counts = [len(target) for target in self.targets]
        everything = torch.ones_like(x, dtype=torch.float32)
        return Linearised(Tangent(self.rough, x.float()), self.rough_rows, counts, self.scale.float() * everything)

    def held(self, x: Tensor) -> Tensor:
        """x, no entry below zero where none may be."""
        return x.clamp(min=0) if self.is_positive else x


@dataclass(frozen=True)
class Linearised:
    """y = A J (scale x)."""

    tangent: Tangent
    rows: Sequence[Operator]
    counts: Sequence[int]
    scale: Tensor

    @classmethod
    def of_values(cls, tangent: Tangent, scale: Tensor) -> "Linearised":
        """With the function's values as they are: A is the identity."""
        shapes = tangent.shapes
        return cls(tangent, [Flat(shape) for shape in shapes], [shape.numel() for shape in shapes], scale)

    def forward(self, x: Tensor) -> Tensor:
        """(N,)."""
        values = self.tangent.forward(self.scale * x)
        return torch.cat([operator.forward(value) for operator, value in zip(self.rows, values, strict=True)])

    def adjoint(self, y: Tensor) -> Tensor:
        """Of x's shape."""
        parts = zip(self.rows, y.split(list(self.counts)), strict=True)
        return self.scale * self.tangent.adjoint([operator.adjoint(part) for operator, part in parts])

    def within(self, free: Tensor) -> "Linearised":
        """With the others of x kept at zero."""
        return Linearised(self.tangent, self.rows, self.counts, self.scale * free)

    def start(self) -> Tensor:
        """No step."""
        return torch.zeros_like(self.scale)

    def step(self, x: Tensor) -> Tensor:
        """What a solution in the scaled unknowns adds to x."""
        return self.scale * x


def gauss_newton(
    equations: Equations,
    start: Tensor,
    *,
    budget: WorkBudget,
    enough: float = math.inf,
    forcing: float = 0.0,
    inner: int = INNER,
    last: int = LAST,
    steps: int = STEPS,
) -> Solution:
    """Minimise |r(x)| from `start`; the iterations are those of CGLS.

    It ends `stalled` when no step lowers the residual, `settled` when it hardly falls any more, or for `iterations`. A
    residual that settles below `enough`, relative to the targets, is that of
    the solution, and steps are solved to the end from then on: what the residual hardly shows comes right last.

    With `forcing`, a step's system is solved down to that times the relative residual, between COARSE and ROUNDED, and
    no further (Eisenstat, Walker 1996): a well scaled system then takes tens of iterations a step, not hundreds.

    A step has `inner` iterations, and `last` once the residual has settled; at most `steps` are made.
    """
    x = equations.held(start)
    residual = equations.residual(x)
    lengths, spent, stopped = [float(residual.norm())], 0, "iterations"
    since = 0  # the steps that were made with fewer iterations than now
    for taken in range(steps):
        if taken - since >= LOOK_BACK and lengths[-1] > UNSETTLED * lengths[-1 - LOOK_BACK]:
            if inner == last or lengths[-1] > enough * equations.size:
                stopped = "settled"
                break
            inner, since = last, taken
        left = lengths[-1] / equations.size
        tolerance = max(ROUNDED, min(COARSE, forcing * left)) if forcing else EXACT
        step = _step(equations, x, residual, inner, tolerance, budget)
        spent += step.iterations
        found = _halved(equations, x, step.x, lengths[-1])
        if found is None:
            stopped = "stalled"
            break
        x, residual = found
        lengths.append(float(residual.norm()))
    return Solution(x, lengths[-1] / equations.size, spent, stopped)


def _step(
    equations: Equations, x: Tensor, residual: Tensor, iterations: int, tolerance: float, budget: WorkBudget
) -> Solution:
    """The step of x that linearised equations ask for."""
    length = residual.norm()
    operator, target = equations.linearised(x), (residual / length).float()
    if equations.is_positive:
        operator = operator.within((x > 0) | (operator.adjoint(target) > 0))
    step = cgls(operator, target, operator.start(), iterations=iterations, tolerance=tolerance, budget=budget)
    change = length * operator.step(step.x).to(x)
    return Solution(change, step.residual, step.iterations, step.stopped)


def _halved(equations: Equations, x: Tensor, step: Tensor, length: float) -> tuple[Tensor, Tensor] | None:
    """Where the step leads, and the residual there, with as much of it as lowers the residual; None if nothing does."""
    for _ in range(HALVINGS):
        trial = equations.held(x + step)
        residual = equations.residual(trial)
        if residual.norm() < length:
            return trial, residual
        step = step / 2
    return None
