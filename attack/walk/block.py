"""Several layers together: what their equations tell of an input that no single layer determines.

Inside a residual block, y = relu(body(u) + u), let h be what a layer of the body takes in. Its gradient has c_out k^2
rows for B H W unknowns in each channel; a ResNet-18 at B = 16 has 576 for 1,024 in its first stage. But h is no free
tensor: it is what the layers below make of u, and u and h make y, most of which is known. Over the block's input there
are

    gradient rows of h(u)       36,864
    known entries of y(u)       some 48,000 of 65,536, those where the ReLU behind the sum is active
    u >= 0, and about a quarter of it zero

for 65,536 unknowns. All are continuous in u, so no mask of the body's ReLUs has to be known beforehand, and
Gauss-Newton (`newton`) finds u from as far as y, which is what the shortcut makes of it. The gradients of the layers
below h jump with these masks. They are left out until h is found; then they are the witness, and add to u.

Weights. All equations are exact but for noise, so weights decide how fast they are solved and not what for. Each kind
of equation counts as much as every other, and each image's known entries as much as its delta is strong: where images
differ in that by 40, as on a trained network they do, equal weights leave the weak ones at an error of 1e-2.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attack.solve.budget import WorkBudget
from attack.solve.cgls import Solution, cgls
from attack.solve.gauss_newton import NonlinearEquations, gauss_newton
from attack.walk.equations import GatedGradientRows, GradientRows, KnownRows, Rows, stack
from attack.walk.noise import beside, relative, size_of
from network.chain import in_float32
from network.stage import Residual, run

SETTLED_NOISE = 40.0  # units of the gradient's own noise up to which masks are right: float32 updates leave 1 to 16
FAINT = 1e-3  # of the strongest delta: no image counts for less
PATIENT = 2000  # iterations of CGLS, at most, that a known input may take to come back


class Together:
    """The input h of a layer in a block's body, as a function of the block's input u.

    Args:
        block: the residual stage's module, in float64.
        index: of the layer in its body.
        shape: of u, (B, ...).
        output: what is known of the block's output.
        delta: (B, ...) of the layer's output: how loud each image is in the gradient.
        is_positive: whether u is out of a ReLU.
        generator: what recovery tests are drawn from, on the CPU.
        budget: whose clock is asked.

    `u` is the last solution, where the next one starts.
    """

    def __init__(
        self,
        block: Residual,
        index: int,
        shape: Sequence[int],
        output: Sequence[Rows],
        delta: Tensor,
        *,
        is_positive: bool,
        generator: torch.Generator,
        budget: WorkBudget,
    ) -> None:
        self.block, self.index, self.output = block, index, list(output)
        self.rough = Residual(*(in_float32(branch) for branch in block.branches))
        self.is_positive, self.generator, self.budget = is_positive, generator, budget
        loudness = delta.flatten(1).norm(dim=1)
        self.loudness = (loudness / loudness.max()).clamp(min=FAINT)
        self.u = self._start(shape)

    def _start(self, shape: Sequence[int]) -> Tensor:
        """What is known of the output, where the block's input has that shape."""
        like = self.loudness.new_zeros(tuple(shape))
        known = [rows.target for rows in self.output if rows.target.shape == like.shape]
        return known[0].clone() if known else like

    def count(self, above: Sequence[Rows], below: Sequence[Rows] = ()) -> int:
        """All equations, with those rows on h and on u."""
        return sum(r.count for r in [*above, *self.output, *below])

    def noise(self, above: Sequence[Rows], below: Sequence[Rows] = ()) -> float:
        """What noise leaves of all equations, relative to them."""
        kinds = [*above, *self.output, *below]
        return math.hypot(*(float(self._noise_of(r).norm()) for r in kinds)) / math.sqrt(len(kinds))

    def solve(self, above: Sequence[Rows], below: Sequence[Rows] = ()) -> tuple[Tensor, Tensor, Solution]:
        """h, u and the solver's word."""
        enough = SETTLED_NOISE * self.noise(
            above, below
        )  # what a wrong mask leaves is not worth being brought down to the end
        solution = gauss_newton(self._equations(above, below), self.u, enough=enough, budget=self.budget)
        self.u = solution.x
        return self._function(self.block)(self.u)[0], self.u, solution

    def recovery_test(self, above: Sequence[Rows], below: Sequence[Rows], noise: float) -> Tensor:
        """The relative error (B,) with which a random input comes back through the equations linearised at u.

        They are disturbed by their noise, times as much as is needed to make it `noise` in all.
        """
        equations = self._equations(above, below)
        system = equations.linearised(self.u)
        if self.is_positive:
            system = system.within(self.u > 0)
        play = torch.randn(self.u.shape, generator=self.generator).to(system.scale)
        play *= beside(size_of(self.u).float(), self.u) * (system.scale > 0) / equations.scale.float()
        kinds = [[self._noise_of(r) for r in group] for group in (above, self.output, below)]
        one = torch.cat([each.flatten() for group in kinds for each in group]).float()
        factor = noise / max(self.noise(above, below), 1e-300)
        target = system.forward(play) + factor * one * torch.randn(one.shape, generator=self.generator).to(one)
        back = cgls(system, target, torch.zeros_like(play), iterations=PATIENT, budget=self.budget)
        scale = system.scale
        return relative(scale * (back.x - play), scale * play)

    def _noise_of(self, rows: Rows) -> Tensor:
        """Standard deviation of the noise in the targets, as they are weighted here."""
        weight = _balanced(rows, self.loudness).weight
        return torch.where(rows.weight > 0, weight / rows.weight, 0.0).expand_as(rows.target)

    def _equations(self, above: Sequence[Rows], below: Sequence[Rows]) -> NonlinearEquations:
        groups = [group for group in (above, self.output, below) if group]
        values = [[_balanced(r, self.loudness) for r in group] for group in groups]
        gated = [r.operator for r in above if isinstance(r.operator, GatedGradientRows)]
        values[0] = [_of_made(r) for r in values[0]]
        stacked = [stack(group) for group in values]
        return NonlinearEquations(
            function=self._function(self.block, bool(below), gated),
            rough=self._function(self.rough, bool(below), [rows.float() for rows in gated]),
            rows=[operator for operator, _ in stacked],
            rough_rows=[stack([r.float() for r in group])[0] for group in values],
            targets=[target for _, target in stacked],
            scale=1 / beside(self.loudness, self.u),
            is_positive=self.is_positive,
        )

    def _function(
        self, block: Residual, with_u: bool = False, gated: Sequence[GatedGradientRows] = ()
    ) -> Callable[[Tensor], Sequence[Tensor]]:
        """u to h, to what the block puts out if that is known, and to itself; to the gradient of a gated layer for h.

        Only one layer takes h, so rows on it are all of one kind.
        """

        def values(u: Tensor) -> Sequence[Tensor]:
            h = run(block.body[: self.index], u)
            found = [gated[0].forward(h) if gated else h]
            if self.output:
                found.append(run(block.body[self.index :], h) + run(block.shortcut, u))
            return [*found, u.clone()] if with_u else found

        return values


def _of_made(rows: Rows) -> Rows:
    """Rows on what `Together` makes of u: a gradient behind a gate is made already."""
    if not isinstance(rows.operator, GatedGradientRows):
        return rows
    return replace(rows, operator=KnownRows(torch.ones_like(rows.target, dtype=torch.bool)))


def _balanced(rows: Rows, loudness: Tensor) -> Rows:
    """With weights that make the whole of them one, and each image in them as loud as it is."""
    weight = rows.weight
    if not isinstance(rows.operator, GradientRows):
        known = (weight != 0).expand_as(rows.target)
        size = (known * rows.target).flatten(1).square().sum(1) / known.flatten(1).sum(1).clamp(min=1)
        weight = known * beside(loudness / size.sqrt().clamp(min=1e-300), rows.target)
    return replace(rows, weight=weight / (weight * rows.target).norm().clamp(min=1e-300))
