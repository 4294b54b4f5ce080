"""The equations of a layer with BatchNorm in training mode right behind it: quadratic in its own input u (B, ...).

`BehindNorm` solves them, and those of a layer in front of a norm of each image by itself (`per_image`).

With z = W * u, mean mu and deviation sigma of each channel over the batch and all positions, z^ = (z - mu) / sigma, and
Delta the derivative of the batch's summed loss by BatchNorm's output y = gamma z^ + beta, N = B P values a channel:

    delta z   = (gamma / sigma) (Delta - dbeta / N - (dgamma / N) z^),    both gradients stand in the update
    gradient  sum_i corr(delta z_i, u_i) = B G
    forward   gamma z^ + beta = y           wherever y is known
    scale     sum Delta z^ = dgamma

mu and sigma are always those of the present u, even where the client shares its statistics: z^ then stays normalised,
and Gauss-Newton converges in four steps where statistics held at their shared values take nine. What this leaves open
are the directions that BatchNorm hides, see `gauge`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attack.solve.budget import WorkBudget
from attack.solve.cgls import Product, Solution, cgls
from attack.solve.gauss_newton import gauss_newton
from attack.walk.block import PATIENT
from attack.walk.equations import ForwardRows, GradientRows, Rows, Scaling, stack
from attack.walk.gauge import Gauge
from attack.walk.methods import by_loudness, noisiest, rows_of
from attack.walk.noise import beside, relative, size_of
from attack.walk.per_image import ROOM, Factors, ImageNormAt, ImageNormSource, LinearisedImageNorm
from attack.walk.sources import BehindNormSource, NormalisedSource, NormAt, Source, over_batch, wide
from network.kinds.affine import LinearMap

START = 150  # iterations of CGLS for the linear start
FORCING = 0.03  # a step's system is solved down to this times the relative residual: quadratic convergence asks no more
RECOVERY = 600  # iterations of CGLS, at most, that a known input may take to come back
FIRST, ROUNDED = 1e-5, 1e-6  # relative tolerance of that start, and of a recovery test: float32 has no more
EXACT = 1e-9  # the same of a recovery test in float64
MOVED = 1e-2  # relative change of u by what fixes the open directions, beyond which all is solved anew
RESCALED = 2  # steps whose place the scaling is made anew for


@dataclass(frozen=True)
class NormalisedAt(NormAt):
    """A source's equations at one u: z^ (B, c, ...), sigma (c,) and delta z (B, c, ...)."""

    source: NormalisedSource

    @classmethod
    def before(cls, source: NormalisedSource, like: Tensor) -> "NormalisedAt":
        """Where no u is known yet: with the server's sigma, and z^ as known, elsewhere what makes its mean zero."""
        known, values = source.known, source.known_values
        unknown = over_batch((~known).to(values)).clamp(min=1)
        values = torch.where(known, values, source.wide(-over_batch(values) / unknown))
        deviation = source.norm.usual_deviation
        return cls(source, torch.zeros_like(like), values, deviation, source.delta_before(values, deviation))

    def residuals(self) -> list[Tensor]:
        """Targets less what u makes of them, weighted: gradient, forward, scale."""
        s = self.source
        off = s.wide(self.deviation) * torch.where(s.known, s.known_values - self.values, 0.0)
        scale = s.norm.scale_gradient - over_batch(s.above.delta * self.values)
        return [s.gradient_weights * s.residual(self.u), s.forward_weights * off, s.scale_weights * scale]

    def rows(self) -> list[Rows]:
        """The linear equations for u that hold if z^, sigma and the mean are what they are here."""
        s = self.source
        found = [Rows(GradientRows(s.map, self.delta), s.gradient, s.gradient_weights)]
        if s.known.any():
            target = s.wide(s.norm.usual_mean) + s.wide(self.deviation) * s.known_values
            found.append(Rows(ForwardRows(s.map, s.known), torch.where(s.known, target, 0.0), s.forward_weights))
        return found

    def linearised(self) -> "LinearisedNorm":
        """How the equations move with u, in float32."""
        s = self.source
        pull = -(s.norm.scale / self.deviation) * s.norm.scale_gradient / s.count
        tensors = (
            self.u, self.values, self.deviation, self.delta, s.wide(pull), s.gradient_weights, s.forward_weights,
            s.scale_weights, s.above.delta,
        )  # fmt: skip
        return LinearisedNorm(s.map.float(), *(t.float() for t in tensors))


@dataclass(frozen=True)
class LinearisedNorm:
    """du to the change of gradient, forward and scale rows, weighted; see the head of this file.

    With zeta = W * du, m = mean zeta and s = mean(z^ zeta):  dz^ = (zeta - m - s z^) / sigma, and
    d delta z = pull dz^ - delta z s / sigma, pull = -(gamma / sigma) dgamma / N.
    """

    map: LinearMap
    u: Tensor
    values: Tensor
    deviation: Tensor
    delta: Tensor
    pull: Tensor
    gradient_weights: Tensor
    forward_weights: Tensor
    scale_weights: Tensor
    above: Tensor

    def forward(self, x: Tensor) -> list[Tensor]:
        """One tensor for each kind of rows."""
        z = self.map.outputs(x)
        mean, along = over_batch(z, torch.mean), over_batch(self.values * z, torch.mean)
        moved = z - wide(mean, z) - self.values * wide(along, z)  # sigma dz^
        unit = moved / wide(self.deviation, z)
        bent = self.pull * unit - self.delta * wide(along / self.deviation, z)
        gradient = self.map.weights(x, self.delta) + self.map.weights(self.u, bent)
        scale = over_batch(self.above * unit)
        return [self.gradient_weights * gradient, self.forward_weights * moved, self.scale_weights * scale]

    def adjoint(self, y: Sequence[Tensor]) -> Tensor:
        """Of u's shape."""
        gradient = self.gradient_weights * y[0]
        met = self.map.with_weight(gradient).outputs(self.u)
        unit = self.pull * met + wide(self.scale_weights * y[2], met) * self.above  # cotangent of dz^
        moved = self.forward_weights * y[1] + unit / wide(self.deviation, met)
        along = -over_batch(self.delta * met) / self.deviation - over_batch(self.values * moved)
        count = self.values.numel() / self.values.shape[1]
        z = moved + (wide(along, met) * self.values - wide(over_batch(moved), met)) / count
        return self.map.inputs(self.delta, gradient) + self.map.inputs(z)


# ----------------------------------------------------------------------------------------------------
# All sources of one input


@dataclass(frozen=True)
class _Linearised:
    """All rows of all sources as functions of x, u = scaling(x), in float32."""

    norms: Sequence[LinearisedNorm | LinearisedImageNorm]
    rows: Sequence[Rows]
    shapes: Sequence[torch.Size]  # of all rows' right sides, those of the norms first
    scaling: Scaling
    shape: torch.Size

    def forward(self, x: Tensor) -> Tensor:
        """(N,)."""
        return self.of_change(self.scaling.forward(x))

    def of_change(self, u: Tensor) -> Tensor:
        """The same of a change of u itself."""
        parts = [part for norm in self.norms for part in norm.forward(u)]
        parts += [r.weight * r.operator.forward(u) for r in self.rows]
        return torch.cat([part.flatten() for part in parts])

    def adjoint(self, y: Tensor) -> Tensor:
        """Of u's shape."""
        pieces = y.split([shape.numel() for shape in self.shapes])
        parts = [part.view(shape) for part, shape in zip(pieces, self.shapes, strict=True)]
        each = (len(self.shapes) - len(self.rows)) // len(self.norms)  # kinds of rows: all norms are of one kind
        found = sum(norm.adjoint(parts[each * i : each * (i + 1)]) for i, norm in enumerate(self.norms))
        rest = zip(self.rows, parts[each * len(self.norms) :], strict=True)
        return self.scaling.adjoint(found + sum(r.operator.adjoint(r.weight * part) for r, part in rest))

    def start(self) -> Tensor:
        """No step."""
        return self.scaling.factor.new_zeros(self.shape)

    def step(self, x: Tensor) -> Tensor:
        """What a solution in the scaled unknowns adds to u."""
        return self.scaling.forward(x)


def _equations_of(source: Source) -> type[NormalisedAt] | type[ImageNormAt]:
    return ImageNormAt if isinstance(source, ImageNormSource) else NormalisedAt


class _Equations:
    """All equations for u (B, ...), as `gauss_newton` takes them."""

    is_positive = False

    def __init__(self, sources: Sequence[Source], shape: torch.Size) -> None:
        self.norms = [source for source in sources if isinstance(source, BehindNormSource)]
        others = [source for source in sources if not isinstance(source, BehindNormSource)]
        self.rows, self.shape, self.scaling, self.made = rows_of(others), shape, None, 0
        self.like = self.norms[0].gradient.new_zeros(shape)
        self.shapes = [part.shape for s in self.norms for part in s.right_sides] + [r.target.shape for r in self.rows]
        self.size = math.hypot(*(float(target.norm()) for target in self._targets()))

    def _targets(self) -> list[Tensor]:
        return [r.weight * r.target for r in self.rows] + [part for s in self.norms for part in s.right_sides]

    def at(self, u: Tensor) -> list[NormalisedAt | ImageNormAt]:
        """The equations of the normalised sources at u."""
        return [_equations_of(source).of(source, u) for source in self.norms]

    def held(self, u: Tensor) -> Tensor:
        """Nothing bounds u: that it is not negative is what shows its errors."""
        return u

    def residual(self, u: Tensor) -> Tensor:
        """All residuals at u, weighted, flat."""
        parts = [part for at in self.at(u) for part in at.residuals()]
        return torch.cat([part.flatten() for part in parts + [r.residual(u) for r in self.rows]])

    def linearised(self, u: Tensor, *, exact: bool = False) -> _Linearised:
        """At u, in float32 unless it is to be exact; the scaling of the first places serves all later ones."""
        at = self.at(u)
        if self.made < RESCALED:
            self.scaling = Scaling.of([*(r for each in at for r in each.rows()), *self.rows], self.shape)
            self.made += 1
        if exact:
            return _Linearised(
                [each.linearised(u.dtype) for each in at], self.rows, self.shapes, self.scaling, self.shape
            )
        norms, rough = [each.linearised() for each in at], [r.float() for r in self.rows]
        return _Linearised(norms, rough, self.shapes, self.scaling.float(), self.shape)

    def first(self, budget: WorkBudget) -> Tensor:
        """u from the equations that are linear once z^ and sigma are guessed."""
        at = [_equations_of(source).before(source, self.like) for source in self.norms]
        rows = [*(r for each in at for r in each.rows()), *self.rows]
        scaling = Scaling.of(rows, self.shape)
        rough, target = stack([r.float() for r in rows])
        start = torch.zeros(self.shape, dtype=torch.float32, device=target.device)
        how = {"iterations": START, "budget": budget, "tolerance": FIRST}
        found = cgls(Product(rough, scaling.float()), target, start, **how)
        return scaling.forward(found.x.to(self.like))


class BehindNorm:
    """From equations that a norm behind the layer makes quadratic, by Gauss-Newton.

    Args:
        shape: of the input, (B, ...).
        generator: what recovery tests are drawn from, on the CPU.
        budget: whose clock is asked.
        gauge: what fixes the directions that the norm hides.
    """

    is_linear = False
    tries_noise = False  # masks fit BatchNorm's own gradients, see `masks.balanced`
    least = 3e-5  # inputs above that are off by 1e-5 leave as much; wrong masks leave 1e-4 and more

    def __init__(
        self, shape: Sequence[int], generator: torch.Generator, budget: WorkBudget, gauge: Gauge | Factors
    ) -> None:
        self.shape, self.unknowns = torch.Size(shape), math.prod(shape)
        self.generator, self.budget, self.gauge = generator, budget, gauge
        self.room = ROOM if isinstance(gauge, Factors) else 1.0
        self._kept: _Equations | None = None
        self.u = torch.empty(0)

    def count(self, sources: Sequence[Source]) -> int:
        """Gradient rows, known outputs, and one row of dgamma for each channel."""
        total = sum(rows.count for source in sources for rows in source.rows())
        for s in sources:
            if isinstance(s, BehindNormSource):
                heard = int((s.gradient_weights != 0).sum())
                own = isinstance(s, NormalisedSource)  # BatchNorm has its own row of dgamma
                total += heard * (s.gradient.shape[1] * s.map.taps + own) + int(s.known.sum())
        return total

    def noise(self, sources: Sequence[Source]) -> float:
        """That of the noisiest source."""
        return noisiest(sources)

    def solve(self, sources: Sequence[Source]) -> tuple[Tensor, Solution]:
        """The input u (B, ...) and the solver's word."""
        equations = self._kept = _Equations(sources, self.shape)
        first = self.u if self.u.numel() else equations.first(self.budget)
        found = gauss_newton(equations, first, budget=self.budget, forcing=FORCING)
        self.u = self.gauge.fixed(found.x, sources)
        if (self.u - found.x).norm() > MOVED * self.u.norm():  # BatchNorm's eps hides no factor: once more, from there
            found = gauss_newton(equations, self.u, budget=self.budget, forcing=FORCING)
            self.u = self.gauge.fixed(found.x, sources)
        if isinstance(self.gauge, Factors):
            self.u, found = self._polished(equations, found, sources)
        return self.u, found

    def _polished(self, equations: _Equations, found: Solution, sources: Sequence[Source]) -> tuple[Tensor, Solution]:
        """u after a last step, solved to its end in float64: what float32 leaves along weak directions shows little.

        The norm's eps tells a hidden direction after all, but worse than what has fixed it.
        """
        residual, change = equations.residual(self.u), equations.linearised(self.u, exact=True)
        how = {"iterations": PATIENT, "tolerance": EXACT, "budget": self.budget}
        step = change.step(cgls(change, residual, change.start(), **how).x)
        u = self.u + self.gauge.hidden(sources, self.u).without(step, self.u)
        left, before = (float(r.norm()) / equations.size for r in (equations.residual(u), residual))
        return (u, replace(found, residual=left)) if left < before else (self.u, replace(found, residual=before))

    def recovery_test(self, sources: Sequence[Source], noise: float) -> Tensor:
        """The relative error (B,) with which a change of u comes back through the linearised equations.

        Nothing that the norm hides is asked back.
        """
        equations, u = self._kept, self.u
        system, is_open = equations.linearised(u), self.gauge.hidden(sources, u)
        play = torch.randn(self.shape, generator=self.generator, dtype=u.dtype).to(u) * beside(size_of(u), u)
        play = is_open.without(play, u)
        how = {"iterations": RECOVERY, "budget": self.budget, "tolerance": ROUNDED}
        if isinstance(self.gauge, Factors):  # of these equations float32 leaves too much
            system, how = equations.linearised(u, exact=True), how | {"iterations": PATIENT, "tolerance": EXACT}
        target = system.of_change(play.to(system.start()))
        factor = max(1.0, noise / self.noise(sources))
        disturbance = torch.randn(target.shape, generator=self.generator).to(target) * (target != 0)
        back = cgls(system, target + factor * disturbance, system.start(), **how)
        return relative(is_open.without(system.step(back.x).to(u) - play, u), play)

    def spread(self, sources: Sequence[Source], u: Tensor, solution: Solution, error: Tensor) -> Tensor:
        """Standard deviation (B, C, ...) of u's errors: that of unit noise, times the noise that the residual shows."""
        equations = self._kept
        freedom = max(1, self.count(sources) - self.unknowns)
        shown = solution.residual * equations.size / math.sqrt(freedom)
        columns = [s.gradient_weights * s.gradient for s in equations.norms]
        spread = by_loudness(equations.scaling.spread(u.shape) * shown, columns, u.shape[1])
        return spread.hypot(beside(self.gauge.errors(u, sources) * size_of(u), spread))
