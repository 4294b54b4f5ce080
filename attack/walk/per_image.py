"""The equations of a layer with GroupNorm, InstanceNorm or LayerNorm right behind it, in its own input u (B, ...).

Such a norm takes mean and deviation of each image and group of channels by itself. With z = W * u + b, mean mu and
deviation sigma of each image's groups, z^ = (z - mu) / sigma, Delta the derivative of each image's loss by the norm's
output y = gamma z^ + beta, and q = gamma Delta:

    delta z   = (q - mean q - z^ mean(q z^)) / sigma,    means over the image's group
    gradient  sum_i corr(delta z_i, u_i) = G
    forward   gamma z^ + beta = y           wherever y is known

mu and sigma are those of the present u. Images are not mixed, so Delta is known for each by itself. What the norm hides
of each image is a factor, where the layer has no bias that differs within a group; see `Factors`.

The search begins far off, and the equations are quadratic: with 1.4 equations for each unknown it ends in a wrong
place, with 2.1 it does not. So it asks for `ROOM`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attack.solve.least_squares import least_squares
from attack.walk.equations import ForwardRows, GradientRows, Rows
from attack.walk.noise import beside, is_active
from attack.walk.sources import BehindNormSource, LayerSource, NormAt
from network.kinds.affine import LinearMap
from network.kinds.image_norm import ImageStatistics
from network.known_outputs import FLOOR, UndeterminedError

USUAL = 0.6  # root mean square of an input that the search begins with: behind a ReLU and a norm it is 0.7
ROOM = 2.0  # equations for each unknown
REWEIGHED, FAR = 4, 20.0  # times that channels are left out that miss their sum by so many times the middle one
FEW, MOST = 3, 0.7  # channels beyond the images, and share of all, that must agree
AGREED = 1e-3  # relative: shifts' gradients that no factors make are those of something else


@dataclass(frozen=True)
class ImageNormSource(BehindNormSource):
    """A layer with a norm of each image right behind it; `above` is what is known of the norm's output.

    Attributes:
        norm: mean and deviation of each image's groups, gamma and beta.
    """

    norm: ImageStatistics

    @cached_property
    def known(self) -> Tensor:
        """Where z^ is known beyond doubt."""
        return self.above.sure & (self.norm.scale != 0)

    @cached_property
    def known_values(self) -> Tensor:
        """gamma z^ (B, c, ...) where it is known; zero elsewhere."""
        return torch.where(self.known, self.above.values - self.norm.shift, 0.0)

    @cached_property
    def forward_weights(self) -> Tensor:
        """One over the noise of the norm's output, where it is known."""
        return torch.where(self.known, 1 / self.above.noise, 0.0)

    def flip_direction(self) -> Tensor:
        """The sign of what each entry's flip adds to the delta of the layer's output."""
        return super().flip_direction() * self.norm.scale.sign()

    @property
    def hides_factor(self) -> bool:
        """Whether u -> a u changes nothing: a bias that is the same within each group is taken off with the mean."""
        bias = self.bias.view(self.columns).expand(self.above.values.shape[1:])[None]
        return not (bias - self.norm.wide(self.norm.means(bias), bias)).abs().max() > FLOOR * bias.abs().max()

    @property
    def right_sides(self) -> list[Tensor]:
        """What the gradient rows and the forward rows should be, weighted."""
        return [self.gradient_weights * self.gradient, self.forward_weights * self.known_values]

    def normalised(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """z^ (B, c, ...) and sigma (B, groups, 1) of an input u."""
        z = self.map.outputs(u)
        return self.norm.normalised(z + self.bias.view(self.columns))

    def delta_before(self, values: Tensor, deviation: Tensor) -> Tensor:
        """delta of the layer's output from z^ and sigma."""
        return self.norm.delta(self.above.delta, values, deviation)


@dataclass(frozen=True)
class ImageNormAt(NormAt):
    """A source's equations at one u: z^ (B, c, ...), sigma (B, groups, 1) and delta z (B, c, ...)."""

    source: ImageNormSource

    @classmethod
    def before(cls, source: ImageNormSource, like: Tensor) -> "ImageNormAt":
        """Where no u is known yet: z^ as known, elsewhere what makes its mean zero, and a usual sigma."""
        norm, known = source.norm, source.known
        values = torch.where(known, source.known_values / torch.where(known, norm.scale, 1.0), 0.0)
        open_ = norm.sums((~known).to(values)).clamp(min=1)
        values = torch.where(known, values, norm.wide(-norm.sums(values) / open_, values))
        size = USUAL * float(source.map.weight.flatten(1).norm(dim=1).mean())
        deviation = torch.full_like(open_, size)
        return cls(source, torch.zeros_like(like), values, deviation, source.delta_before(values, deviation))

    def residuals(self) -> list[Tensor]:
        """Targets less what u makes of them, weighted: gradient, forward."""
        s = self.source
        off = torch.where(s.known, s.known_values - s.norm.scale * self.values, 0.0)
        return [s.gradient_weights * s.residual(self.u), s.forward_weights * off]

    def rows(self) -> list[Rows]:
        """The linear equations for u that hold if z^, sigma and a mean of zero are right."""
        s = self.source
        found = [Rows(GradientRows(s.map, self.delta), s.gradient, s.gradient_weights)]
        if s.known.any():
            deviation = s.norm.wide(self.deviation, self.values)
            target = torch.where(s.known, deviation * self.values - s.bias.view(s.columns), 0.0)
            weight = s.forward_weights * (s.norm.scale / deviation).abs()
            found.append(Rows(ForwardRows(s.map, s.known), target, weight))
        return found

    def linearised(self, dtype: torch.dtype = torch.float32) -> "LinearisedImageNorm":
        """How the equations move with u."""
        s = self.source
        weighted = s.norm.scale * s.above.delta
        slope = s.norm.wide(s.norm.means(weighted * self.values), weighted)
        deviation = s.norm.wide(self.deviation, weighted)
        tensors = (
            self.u, self.values, deviation, self.delta, weighted, slope, s.gradient_weights,
            s.forward_weights * s.norm.scale,
        )  # fmt: skip
        linear = s.map.with_weight(s.map.weight.to(dtype))
        return LinearisedImageNorm(linear, s.norm, *(t.to(dtype) for t in tensors))


@dataclass(frozen=True)
class LinearisedImageNorm:
    """du to the change of gradient and forward rows, weighted; see the head of this file.

    With zeta = W * du, m = mean zeta and s = mean(z^ zeta), over an image's group: dz^ = (zeta - m - s z^) / sigma, and
    d delta z = -(dz^ mean(q z^) + z^ mean(q dz^) + s delta z) / sigma.
    """

    map: LinearMap
    norm: ImageStatistics
    u: Tensor
    values: Tensor
    deviation: Tensor
    delta: Tensor
    weighted: Tensor  # q
    slope: Tensor  # mean(q z^)
    gradient_weights: Tensor
    forward_weights: Tensor

    def _means(self, values: Tensor) -> Tensor:
        return self.norm.wide(self.norm.means(values), values)

    def forward(self, x: Tensor) -> list[Tensor]:
        """One tensor for each kind of rows."""
        z = self.map.outputs(x)
        along = self._means(self.values * z)
        unit = (z - self._means(z) - self.values * along) / self.deviation
        bent = unit * self.slope + self.values * self._means(self.weighted * unit) + self.delta * along
        gradient = self.map.weights(x, self.delta) - self.map.weights(self.u, bent / self.deviation)
        return [self.gradient_weights * gradient, self.forward_weights * unit]

    def adjoint(self, y: Sequence[Tensor]) -> Tensor:
        """Of u's shape."""
        gradient = self.gradient_weights * y[0]
        met = -self.map.with_weight(gradient).outputs(self.u) / self.deviation  # cotangent of what is bent
        unit = met * self.slope + self._means(met * self.values) * self.weighted + self.forward_weights * y[1]
        moved = unit / self.deviation
        along = self._means(met * self.delta) - self._means(moved * self.values)
        z = moved - self._means(moved) + along * self.values
        return self.map.inputs(self.delta, gradient) + self.map.inputs(z)


@dataclass(frozen=True)
class FactorsHidden:
    """Whether a factor of each image is hidden, and changes without it."""

    factors: bool

    def without(self, change: Tensor, u: Tensor) -> Tensor:
        """A change of u (B, C, ...) without its part along each image's own values."""
        if not self.factors:
            return change
        along = (change * u).flatten(1).sum(1) / u.square().flatten(1).sum(1).clamp(min=1e-300)
        return change - beside(along, u) * u


@dataclass(frozen=True)
class Factors:
    """How the factor of each image is told that a norm hides: u -> a u leaves z^ and the gradient as they are.

    In front of u stands a ReLU, and in front of that a shift beta_c. The gradient of that shift is the sum over images
    of delta over active entries, and each image's part goes with one over its factor.

    Attributes:
        is_rectified: whether u comes out of a ReLU.
        shift_gradient: (C,) of the shift right in front of that ReLU, summed over the batch; None where there is none.
    """

    is_rectified: bool = False
    shift_gradient: Tensor | None = None

    def hidden(self, sources: Sequence[LayerSource], u: Tensor) -> FactorsHidden:
        """What these sources leave open of an input shaped as u."""
        norms = [source for source in sources if isinstance(source, ImageNormSource)]
        return FactorsHidden(len(norms) == len(sources) and all(source.hides_factor for source in norms))

    def fixed(self, u: Tensor, sources: Sequence[LayerSource]) -> Tensor:
        """u with each image's factor as the shift's gradient has it.

        Raises:
            UndeterminedError: nothing tells the factors.
        """
        return u * beside(self._told(u, sources)[0], u) if self.hidden(sources, u).factors else u

    def errors(self, u: Tensor, sources: Sequence[LayerSource]) -> Tensor:
        """The relative error (B,) of each image's factor, at a u whose factors are fixed."""
        return self._told(u, sources)[1] if self.hidden(sources, u).factors else u.new_zeros(len(u))

    def _told(self, u: Tensor, sources: Sequence[LayerSource]) -> tuple[Tensor, Tensor]:
        """What each image of u must be multiplied by, (B,), and the relative errors."""
        why = "each image's norm hides a factor of the image"
        if not self.is_rectified or self.shift_gradient is None:
            raise UndeterminedError(f"{why}, and no shift in front of a ReLU tells it")
        delta = sum(source.delta(u) for source in sources)
        sums = (delta * is_active(u)).flatten(2).sum(2).T if u.dim() > 2 else (delta * is_active(u)).T  # (C, B)
        kept = torch.ones(len(sums), dtype=torch.bool, device=u.device)
        for _ in range(REWEIGHED):  # a channel with a wrong mask misses by far more than the others
            inverse = least_squares(sums[kept], self.shift_gradient[kept, None])[:, 0]
            missed = (sums @ inverse - self.shift_gradient).abs()
            kept = missed <= FAR * missed.median()
        left, goal = missed[kept].norm(), self.shift_gradient[kept].norm()
        errors = torch.linalg.pinv(sums[kept]).norm(dim=1) * left / max(1, len(missed) - len(u)) ** 0.5 / inverse.abs()
        is_agreed = left < AGREED * goal and int(kept.sum()) >= max(len(u) + FEW, MOST * len(kept))
        if not is_agreed or not (inverse > 0).all():
            raise UndeterminedError(f"{why}, and the shift in front of the ReLU does not tell it")
        return 1 / inverse, errors
