"""What says something of a layer's input: the layer's own equations, or the input itself, known in places."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attack.walk.equations import ForwardRows, GradientRows, KnownRows, Rows
from network.kinds.affine import LinearMap
from network.known_outputs import KnownOutputs

CANCELLED = 1e-3  # of the strongest row: by cancellation no row is more exact than that one would be


@dataclass(frozen=True)
class LayerSource:
    """A linear or convolutional layer on the input that is sought.

    Attributes:
        name: of the layer.
        map: its linear part.
        bias: (c_out,), zeros where it has none.
        above: what is known of its output.
        gradient: B G, the sum of the images' gradients; None where the update has none.
        precision: relative error of each entry of G.
        additive: absolute error of each entry of B G.
        mask_error: (B,) relative error of each image's delta by wrong masks, of the images that are too weak; zero for
            all others.
    """

    name: str
    map: LinearMap
    bias: Tensor
    above: KnownOutputs
    gradient: Tensor | None
    precision: float
    additive: float
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
            found.append(Rows(operator, self.gradient, self.gradient_weights()))
        known = self.above.sure
        if known.any():
            target = torch.where(known, self.above.values - self.bias.view(self.columns), 0.0)
            found.append(Rows(ForwardRows(self.map, known), target, torch.where(known, 1 / self.above.noise, 0.0)))
        return found

    def gradient_weights(self) -> Tensor:
        """One over the noise of each output channel's row."""
        length = self.gradient.flatten(1).square().mean(1).sqrt()  # (c_out,)
        noise = (self.precision * length).maximum(length.new_tensor(self.additive))
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
            return torch.ones_like(self.bias)
        squares = by_channel(self.above.delta.square())
        errors = squares * by_channel(self.above.rounding.square())
        return (errors.sum(1) / squares.sum(1).clamp(min=1e-300)).sqrt().clamp(min=1.0)

    def delta(self) -> Tensor:
        """delta at the input."""
        return self.map.inputs(self.above.delta)

    @property
    def noise(self) -> float:
        """What noise leaves of the gradient rows, weighted, relative to them: rounding alone its precision."""
        if self.gradient is None:
            return 0.0
        weights = self.gradient_weights()
        size = float((weights * self.gradient).norm())
        return self.gradient[weights.flatten() > 0].numel() ** 0.5 / size if size else 0.0

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
class IdentitySource:
    """The input itself, known in places. It has no gradient rows, and no masks of its own to be judged by them."""

    above: KnownOutputs
    gradient = None

    def rows(self) -> list[Rows]:
        """Its known rows."""
        known = self.above.sure
        target = torch.where(known, self.above.values, 0.0)
        return [Rows(KnownRows(known), target, torch.where(known, 1 / self.above.noise, 0.0))] if known.any() else []

    def delta(self) -> Tensor:
        """delta at the input."""
        return self.above.delta

    @property
    def noise(self) -> float:
        """None: there are no gradient rows."""
        return 0.0

    def coarser(self, factor: float) -> "IdentitySource":
        """With masks for so many times the noise."""
        return replace(self, above=self.above.coarser(factor))

    def flipped(self, flips: Tensor) -> "IdentitySource":
        """With the masks of these entries changed."""
        return replace(self, above=self.above.flipped(flips))


Source = LayerSource | IdentitySource


def by_channel(t: Tensor) -> Tensor:
    """(B, c, ...) as (c, B * positions)."""
    return t.transpose(0, 1).flatten(1)
