"""What says something of a layer's input: the layer's own equations, or the input itself, known in places."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TypeVar

import torch
from torch import Tensor

from attack.walk.equations import ForwardRows, GatedGradientRows, GradientRows, KnownRows, Rows
from attack.walk.trajectory import MovingMap
from network.kinds.affine import LinearMap
from network.known_outputs import KnownOutputs
from network.stage import Chain, Residual, delta_before, run

CANCELLED = 1e-3  # of the strongest row: by cancellation no row is more exact than that one would be


@dataclass(frozen=True)
class LayerSource:
    """A linear or convolutional layer on the input that is sought.

    Attributes:
        name: of the layer.
        map: its linear part.
        bias: (c_out,), zeros where it has none; (B, c_out) where it moves between images.
        above: what is known of its output.
        gradient: B G, the sum of the images' gradients; None where the update has none.
        precision: relative error of each entry of G.
        additive: absolute error of each entry of B G, (c_out,) or one number.
        mask_error: (B,) relative error of each image's delta by wrong masks, of the images that are too weak; zero for
            all others.
    """

    name: str
    map: LinearMap | MovingMap
    bias: Tensor
    above: KnownOutputs
    gradient: Tensor | None
    precision: float
    additive: Tensor | float
    mask_error: Tensor

    @property
    def columns(self) -> tuple[int, ...]:
        """The shape in which a vector over channels broadcasts to the output."""
        return (-1, *(1,) * (self.above.values.dim() - 2))

    def rows(self) -> list[Rows]:
        """Its gradient rows and forward rows."""
        found = []
        if self.gradient is not None:
            operator = GradientRows(self.map, self.above.delta)
            found.append(Rows(operator, self.gradient, self.gradient_weights))
        known = self.above.sure
        if known.any():
            target = torch.where(known, self.above.values - wide(self.bias, self.above.values), 0.0)
            found.append(Rows(ForwardRows(self.map, known), target, torch.where(known, 1 / self.above.noise, 0.0)))
        return found

    @cached_property
    def gradient_weights(self) -> Tensor:
        """One over the noise of each output channel's row."""
        length = self.gradient.flatten(1).square().mean(1).sqrt()  # (c_out,)
        noise = (self.precision * length).clamp(min=self.additive)
        noise = (noise * self._rounding()).clamp(min=self.precision * CANCELLED * float(length.max()))
        if self.mask_error.any():
            noise = noise.hypot(self._wrong_by_masks(length))
        weights = torch.where(length == 0, 0.0, 1 / noise)
        return weights.view(-1, *(1,) * (self.gradient.dim() - 1))

    def _wrong_by_masks(self, length: Tensor) -> Tensor:
        """(c_out,) errors of gradient rows of that length by wrong masks of the images that are too weak."""
        both = self.above.delta.abs(), self.above.masked_delta.abs()
        loud, masked = (t.flatten(2).sum(2) if t.dim() > 2 else t for t in both)  # (B, c_out)
        unit = (length / loud.sum(0).clamp(min=1e-300)).median()
        return unit * (self.mask_error @ (loud + masked))

    def _rounding(self) -> Tensor:
        """(c_out,) units of rounding that each channel's delta has, its strong entries above all."""
        if self.above.rounding is None:
            return self.gradient.new_ones(len(self.gradient))
        squares = by_channel(self.above.delta.square())
        errors = squares * by_channel(self.above.rounding.square())
        return (errors.sum(1) / squares.sum(1).clamp(min=1e-300)).sqrt().clamp(min=1.0)

    def delta(self, u: Tensor) -> Tensor:
        """delta at the input u."""
        return self.map.inputs(self.above.delta)

    def flip_direction(self) -> Tensor:
        """The sign of what each entry's flip adds to the delta of the layer's output."""
        return (self.above.masked_delta - self.above.delta).sign()

    @property
    def noise(self) -> float:
        """What noise leaves of the gradient rows, weighted, relative to them: rounding alone its precision."""
        if self.gradient is None:
            return 0.0
        weights = self.gradient_weights
        size = float((weights * self.gradient).norm())
        return self.gradient[weights.flatten() > 0].numel() ** 0.5 / size if size else 0.0

    def told_of(self, count: int) -> "LayerSource":
        """With known outputs of the first so many images alone."""
        return replace(self, above=self.above.told_of(count))

    def coarser(self, factor: float) -> "LayerSource":
        """With masks for so many times the noise."""
        return replace(self, above=self.above.coarser(factor))

    def flipped(self, flips: Tensor) -> "LayerSource":
        """With the masks of these entries changed."""
        return replace(self, above=self.above.flipped(flips))

    def residual(self, u: Tensor) -> Tensor:
        """What the gradient leaves unexplained at u, of its shape."""
        return self.gradient - self.map.weights(u, self.above.delta)


@dataclass(frozen=True)
class GatedSource(LayerSource):
    """A layer in front of a gate whose outputs are not known; `above` is what is known of the gate's output: delta.

    Attributes:
        behind: the stages from the layer to the gate, the gate among them.
    """

    behind: Chain

    def _gradient_rows(self) -> GatedGradientRows:
        return GatedGradientRows(self.map, self.above.delta, self.bias, self.behind)

    def rows(self) -> list[Rows]:
        """Its gradient rows, which are not linear; none where the update has no gradient."""
        if self.gradient is None:
            return []
        return [Rows(self._gradient_rows(), self.gradient, self.gradient_weights)]

    def delta(self, u: Tensor) -> Tensor:
        """delta at the input u."""
        return self.map.inputs(self._gradient_rows().delta_at(u))

    def flip_direction(self) -> Tensor:
        """The sign of what each entry's flip adds to the delta of the layer's output: the gate itself has none."""
        nothing = torch.zeros_like(self.above.delta)
        return super().flip_direction() * delta_before(partial(run, self.behind), nothing, nothing + 1).sign()

    def residual(self, u: Tensor) -> Tensor:
        """What the gradient leaves unexplained at u, of its shape."""
        return self.gradient - self._gradient_rows().forward(u)


@dataclass(frozen=True)
class Normalisation:
    """BatchNorm in training mode: gamma and beta, both of the update's gradients, summed over the batch, and sigma.

    Attributes:
        scale, shift: gamma and beta, (c,).
        eps: of its variance.
        scale_gradient, shift_gradient: B dgamma and B dbeta, (c,).
        usual_mean, usual_deviation: of the server's running statistics, (c,), where the search begins.
        mean, deviation: of the client's batch, (c,), where the client shares its statistics; None where not.
    """

    scale: Tensor
    shift: Tensor
    eps: float
    scale_gradient: Tensor
    shift_gradient: Tensor
    usual_mean: Tensor
    usual_deviation: Tensor
    mean: Tensor | None = None
    deviation: Tensor | None = None


@dataclass(frozen=True)
class BehindNormSource(LayerSource):
    """A layer with a norm right behind it that takes mean and deviation of the inputs: its equations are not linear.

    Subclasses say how z^ and sigma follow from u, and delta of the layer's output from these.
    """

    def rows(self) -> list[Rows]:
        """None that are linear."""
        return []

    def normalised(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """z^ (B, c, ...) and sigma of an input u."""
        raise NotImplementedError

    def delta_before(self, values: Tensor, deviation: Tensor) -> Tensor:
        """delta of the layer's output from z^ (B, c, ...) and sigma."""
        raise NotImplementedError

    def delta(self, u: Tensor) -> Tensor:
        """delta at the input u."""
        return self.map.inputs(self.delta_before(*self.normalised(u)))

    def residual(self, u: Tensor) -> Tensor:
        """What the gradient leaves unexplained at u, of its shape."""
        return self.gradient - self.map.weights(u, self.delta_before(*self.normalised(u)))


At = TypeVar("At", bound="NormAt")


@dataclass(frozen=True)
class NormAt:
    """The equations of a layer with a norm behind it at one u: z^ (B, c, ...), sigma and delta z (B, c, ...)."""

    source: BehindNormSource
    u: Tensor
    values: Tensor
    deviation: Tensor
    delta: Tensor

    @classmethod
    def of(cls: type[At], source: BehindNormSource, u: Tensor) -> At:
        """With the statistics of u itself."""
        values, deviation = source.normalised(u)
        return cls(source, u, values, deviation, source.delta_before(values, deviation))


@dataclass(frozen=True)
class NormalisedSource(BehindNormSource):
    """A layer with BatchNorm in training mode right behind it; `above` is what is known of BatchNorm's output.

    Its equations are not linear, see `attack.walk.normalised`.
    """

    norm: Normalisation

    @property
    def right_sides(self) -> list[Tensor]:
        """What gradient and forward rows are compared with, weighted, and the scale rows."""
        deviation = self.wide(self.norm.usual_deviation)
        return [self.gradient_weights * self.gradient, self.forward_weights * deviation, 0 * self.norm.scale_gradient]

    @property
    def count(self) -> int:
        """B P, the values that each channel's mean is taken of."""
        return self.above.values.numel() // self.above.values.shape[1]

    def wide(self, each: Tensor) -> Tensor:
        """A number for each channel, (c,), in a shape that broadcasts to the output."""
        return wide(each, self.above.values)

    @cached_property
    def known_values(self) -> Tensor:
        """z^ (B, c, ...) where it is known; zero elsewhere."""
        values = (self.above.values - self.wide(self.norm.shift)) / self.wide(self.norm.scale)
        return torch.where(self.known, values, 0.0)

    @cached_property
    def known(self) -> Tensor:
        """Where z^ is known beyond doubt."""
        return self.above.sure & self.wide(self.norm.scale != 0)

    @cached_property
    def forward_weights(self) -> Tensor:
        """One over the noise of the layer's output, where it is known."""
        noise = self.above.noise * self.wide(self.norm.usual_deviation / self.norm.scale.abs())
        return torch.where(self.known, 1 / noise, 0.0)

    @cached_property
    def scale_weights(self) -> Tensor:
        """One over the noise of dgamma, (c,)."""
        size = by_channel(self.above.delta).norm(dim=1)
        noise = ((self.precision * size).square() + self.additive**2).sqrt()
        return torch.where(size > CANCELLED * size.max(), 1 / noise, 0.0)

    def delta_before(self, values: Tensor, deviation: Tensor) -> Tensor:
        """delta of the layer's output from z^ (B, c, ...) and sigma (c,)."""
        means = [self.wide(g / self.count) for g in (self.norm.shift_gradient, self.norm.scale_gradient)]
        return self.wide(self.norm.scale / deviation) * (self.above.delta - means[0] - means[1] * values)

    def normalised(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """z^ (B, c, ...) and sigma (c,) of an input u."""
        z = self.map.outputs(u)
        axes = (0, *range(2, z.dim()))
        centred = z - z.mean(axes, keepdim=True)
        deviation = (centred.square().mean(axes) + self.norm.eps).sqrt()
        return centred / self.wide(deviation), deviation

    def flip_direction(self) -> Tensor:
        """The sign of what each entry's flip adds to the delta of the layer's output."""
        return super().flip_direction() * self.wide(self.norm.scale.sign())


@dataclass(frozen=True)
class IdentitySource:
    """The input itself, known in places. It has no gradient rows, and no masks of its own to be judged by them."""

    above: KnownOutputs
    gradient = None

    def rows(self) -> list[Rows]:
        """Its known rows."""
        known = self.above.sure
        target = torch.where(known, self.above.values, 0.0)
        return [Rows(KnownRows(known), target, torch.where(known, 1 / self.above.noise, 0.0))] if known.any() else []

    def delta(self, u: Tensor) -> Tensor:
        """delta at the input u."""
        return self.above.delta

    @property
    def noise(self) -> float:
        """None: there are no gradient rows."""
        return 0.0

    def told_of(self, count: int) -> "IdentitySource":
        """Itself: no weights move between its values and the input."""
        return self

    def coarser(self, factor: float) -> "IdentitySource":
        """With masks for so many times the noise."""
        return replace(self, above=self.above.coarser(factor))

    def flipped(self, flips: Tensor) -> "IdentitySource":
        """With the masks of these entries changed."""
        return replace(self, above=self.above.flipped(flips))


@dataclass(frozen=True)
class SkippedBlock(IdentitySource):
    """The input of a residual block, all of it told by the block's output and that of its body.

    Attributes:
        block: the residual stage's module.
        block_delta: (B, ...) of the block's output.
    """

    block: Residual
    block_delta: Tensor

    def delta(self, u: Tensor) -> Tensor:
        """delta at the input u, through body and shortcut."""
        return delta_before(self.block, u, self.block_delta)


Source = LayerSource | IdentitySource


def over_batch(values: Tensor, reduce: Callable = torch.sum) -> Tensor:
    """(B, c, ...) to (c,): over images and positions."""
    return reduce(values, (0, *range(2, values.dim())))


def wide(each: Tensor, values: Tensor) -> Tensor:
    """A number for each channel, (..., c), in a shape that broadcasts to values (B, c, ...)."""
    return each.view(*each.shape, *(1,) * (values.dim() - 2))


def by_channel(t: Tensor) -> Tensor:
    """(B, c, ...) as (c, B * positions)."""
    return t.transpose(0, 1).flatten(1)
