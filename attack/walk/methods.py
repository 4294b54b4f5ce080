"""Two methods for the input of a layer: from its own linear equations, or from those of a whole residual block.

`layer_solve` decides masks and whether a layer is believed. A method counts equations, solves them, and makes the
recovery test: a known input is put through the same equations with as much noise, and must come back.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_ as is_same
from typing import Protocol

import torch
from torch import Tensor

from attack.solve.budget import WorkBudget
from attack.solve.cgls import Operator, Product, Solution, refined
from attack.walk.block import PATIENT, Together
from attack.walk.equations import GatedGradientRows, GradientRows, Rows, Scaling, stack
from attack.walk.noise import beside, relative, size_of
from network.known_outputs import FLOOR

# Iterations of CGLS until it shows whether a known input is on its way back, and until it must have come. Determined
# layers take 1 to 120. The known input of `layer3.0` of a ResNet-18, 224 pixels, has a relative error of 7e-2 after
# 300, 4e-2 after 600, 7e-4 after 2,000, 1e-5 after 3,000; that of a LeNet's `conv3`, B = 8, is done after 1,313; that
# of a LeNet's `conv2`, 16 pixels, B = 4, has 0.20 to 0.27 after 300 and less than 1e-4 after 1,000.
LOOK = 300
HOPELESS = 0.3  # relative error after LOOK iterations beyond which a known input is not on its way
EVEN = 0.1  # rounding is relative: an input channel's errors go with its gradient's size, but for this share


class RowSource(Protocol):
    """What gives equations for the input that is sought."""

    @property
    def noise(self) -> float:
        """What noise leaves of its rows, relative to them."""
        ...

    def rows(self) -> list[Rows]:
        """Linear equations."""
        ...


class SolveMethod(Protocol):
    """How the input (B, ...) that all sources agree on is found."""

    unknowns: int
    is_linear: bool  # whether the recovery test can be made before anything is solved
    room: float  # equations for each unknown without which it is not tried
    tries_noise: bool  # whether masks for other noise are tried, where the residual contradicts these
    least: float  # of a method that is not linear: a residual that is no contradiction, however small the noise is

    def count(self, sources: Sequence[RowSource]) -> int:
        """Equations."""
        ...

    def noise(self, sources: Sequence[RowSource]) -> float:
        """The residual that noise leaves."""
        ...

    def solve(self, sources: Sequence[RowSource]) -> tuple[Tensor, Solution]:
        """The input, and the solver's word."""
        ...

    def recovery_test(self, sources: Sequence[RowSource], noise: float) -> Tensor:
        """The relative error (B,) with which a random input comes back through the equations with so much noise."""
        ...

    def spread(self, sources: Sequence[RowSource], u: Tensor, solution: Solution, error: Tensor) -> Tensor:
        """Standard deviation (B, 1, ...) or (B, C, ...) of u's errors, from the solution and the recovery test."""
        ...


def rows_of(sources: Sequence[RowSource]) -> list[Rows]:
    """All rows of all sources."""
    return [rows for source in sources for rows in source.rows()]


def noisiest(sources: Sequence[RowSource]) -> float:
    """The noise of the noisiest source."""
    return max(FLOOR, *(source.noise for source in sources))


def by_loudness(spread: Tensor, gradients: Sequence[Tensor], channels: int) -> Tensor:
    """Errors (B, 1, ...) of an input, channel by channel: as loud as each of these C is in weighted gradients.

    Gradients are (c_out, C, ...), or (c_out, C / groups, ...) of a grouped convolution.
    """
    grouped = (g.square().unflatten(0, (channels // g.shape[1], -1)) for g in gradients)
    loud = sum(g.sum((1, *range(3, g.dim()))).flatten() for g in grouped)  # (C,)
    return spread * (EVEN + loud / loud.mean()).sqrt().view(-1, *(1,) * (spread.dim() - 2))


# ----------------------------------------------------------------------------------------------------
# Alone


class Alone:
    """From the rows of its sources, by linear least squares.

    Args:
        shape: of the input, (B, ...).
        generator: what recovery tests are drawn from, on the CPU.
        budget: whose clock is asked.
    """

    is_linear = True
    room = 1.0
    tries_noise = True
    least = 0.0

    def __init__(self, shape: Sequence[int], generator: torch.Generator, budget: WorkBudget) -> None:
        self.shape, self.unknowns = torch.Size(shape), math.prod(shape)
        self.generator, self.budget = generator, budget
        self.iterations = LOOK
        self._kept: tuple | None = None  # sources of the last system of equations, and the system

    def count(self, sources: Sequence[RowSource]) -> int:
        """The rows."""
        return sum(rows.count for rows in rows_of(sources))

    def noise(self, sources: Sequence[RowSource]) -> float:
        """That of the noisiest source."""
        return noisiest(sources)

    def solve(self, sources: Sequence[RowSource]) -> tuple[Tensor, Solution]:
        """The input u (B, ...) and the solver's word."""
        system = self._system(sources)
        solution = self._solved(system, system.target)
        return system.scaling.forward(solution.x), solution

    def approached(self, sources: Sequence[RowSource], start: Tensor | None) -> Tensor:
        """The input (B, ...) from another (None: zeros), while what the equations hold is still to settle."""
        system = self._system(sources)
        first = system.target.new_zeros(self.shape) if start is None else system.scaling.undone(start)
        how = {"iterations": self.iterations, "budget": self.budget}
        return system.scaling.forward(refined(system.exact, system.rough, system.target, first, **how).x)

    def recovery_test(self, sources: Sequence[RowSource], noise: float) -> Tensor:
        """The relative error (B,) with which a random input comes back through the equations with so much noise."""
        system = self._system(sources)
        draw = {"generator": self.generator, "dtype": system.target.dtype}
        play = torch.randn(self.shape, **draw).to(system.target).relu()
        disturbed = system.rows.forward(play)
        disturbance = torch.randn(len(disturbed), **draw).to(disturbed) * (disturbed != 0)
        disturbed += disturbance * (noise * disturbed.norm() / disturbance.norm().clamp(min=1e-300))
        solution = self._solved(system, disturbed)
        error = relative(system.scaling.forward(solution.x) - play, play)
        if solution.stopped == "iterations" and self.iterations < PATIENT and float(error.max()) < HOPELESS:
            self.iterations = PATIENT
            solution = self._solved(system, disturbed, solution.x)
            error = relative(system.scaling.forward(solution.x) - play, play)
        return error

    def spread(self, sources: Sequence[RowSource], u: Tensor, solution: Solution, error: Tensor) -> Tensor:
        """Standard deviation (B, 1, ...) of u's errors: that of unit noise, times the noise that the residual shows.

        Where no equation is left over to show noise, it is what it was taken for.
        """
        rows = rows_of(sources)
        freedom = sum(r.count for r in rows) - u.numel()
        system = self._system(sources)
        shown = solution.residual * float(system.target.norm()) / math.sqrt(freedom) if freedom > 0 else 1.0
        spread = system.scaling.spread(u.shape) * shown
        columns = [r.weight * r.target for r in rows if isinstance(r.operator, GradientRows)]
        return by_loudness(spread, columns, u.shape[1]) if columns else spread

    def _solved(self, system: "_System", target: Tensor, start: Tensor | None = None) -> Solution:
        """The scaled unknowns with which the rows come closest to a target."""
        start = target.new_zeros(self.shape) if start is None else start
        how = {"iterations": self.iterations, "budget": self.budget}
        return refined(system.exact, system.rough, target, start, **how)

    def _system(self, sources: Sequence[RowSource]) -> "_System":
        """The equations of all sources; the last ones are kept."""
        kept = self._kept[0] if self._kept else ()
        if not kept or len(kept) != len(sources) or not all(map(is_same, kept, sources)):
            self._kept = sources, _System.of(rows_of(sources), self.shape)
        return self._kept[1]


@dataclass(frozen=True)
class _System:
    """All rows as one operator, their targets, what makes them well conditioned, and the product of both, twice."""

    rows: Operator
    target: Tensor
    scaling: Scaling
    exact: Operator
    rough: Operator  # in float32

    @classmethod
    def of(cls, rows: list[Rows], shape: torch.Size) -> "_System":
        """For unknowns of that shape."""
        stacked, target = stack(rows)
        scaling = Scaling.of(rows, shape)
        rough, _ = stack([r.float() for r in rows])
        return cls(stacked, target, scaling, Product(stacked, scaling), Product(rough, scaling.float()))


# ----------------------------------------------------------------------------------------------------
# In a block


class _InBlock:
    """By all that is known of the block; sources give rows on a layer in it, or on its input."""

    is_linear = False
    room = 1.0
    tries_noise = True
    least = 0.0

    def __init__(self, together: Together) -> None:
        self.together, self.unknowns = together, together.u.numel()

    def _rows(self, sources: Sequence[RowSource]) -> tuple[list[Rows], list[Rows]]:
        """Those on the input h of the layer, and those on the block's input u."""
        raise NotImplementedError

    def count(self, sources: Sequence[RowSource]) -> int:
        """All rows, those of the block's output among them."""
        return self.together.count(*self._rows(sources))

    def noise(self, sources: Sequence[RowSource]) -> float:
        """The residual that noise leaves."""
        return self.together.noise(*self._rows(sources))

    def recovery_test(self, sources: Sequence[RowSource], noise: float) -> Tensor:
        """At the block's input, (B,)."""
        return self.together.recovery_test(*self._rows(sources), noise)

    def spread(self, sources: Sequence[RowSource], u: Tensor, solution: Solution, error: Tensor) -> Tensor:
        """As large, relatively, as the recovery test's at the block's input."""
        return beside(error * size_of(u), u)


class LayerInBlock(_InBlock):
    """The input h of a layer in a block's body."""

    def _rows(self, sources: Sequence[RowSource]) -> tuple[list[Rows], list[Rows]]:
        return rows_of(sources), []

    def solve(self, sources: Sequence[RowSource]) -> tuple[Tensor, Solution]:
        """h (B, ...), and the solver's word."""
        h, _, solution = self.together.solve(*self._rows(sources))
        return h, solution


class BlockInput(_InBlock):
    """The input of a block, once `LayerInBlock` has found the input of a layer of its body, or of a gated layer.

    Args:
        together: the equations in which that layer's input was found, or those around a gated layer that takes the
            block's input itself.
        above: that layer's rows, their masks decided; none of a gated one, which is a source.
    """

    def __init__(self, together: Together, above: Sequence[Rows]) -> None:
        super().__init__(together)
        self.above = list(above)

    def _rows(self, sources: Sequence[RowSource]) -> tuple[list[Rows], list[Rows]]:
        gated = [rows for rows in rows_of(sources) if isinstance(rows.operator, GatedGradientRows)]
        return [*self.above, *gated], _gradients(sources)

    def solve(self, sources: Sequence[RowSource]) -> tuple[Tensor, Solution]:
        """u (B, ...), and the solver's word."""
        _, u, solution = self.together.solve(*self._rows(sources))
        return u, solution


def _gradients(sources: Sequence[RowSource]) -> list[Rows]:
    """The lowest layers' linear gradient rows; the block's own equations hold what is known of their outputs."""
    every = [rows for rows in rows_of(sources) if isinstance(rows.operator, GradientRows)]
    return [rows for rows in every if not isinstance(rows.operator, GatedGradientRows)]
