"""What is known of a stage's outputs, image by image: values, deltas, and how far each is trusted."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

ZERO = 6.0  # standard deviations of an image's noise up to which an entry behind a ReLU is taken for zero
RANGE = 40.0  # standard deviations up to which a residual may change the mask of an entry
# What is said of an entry of which nothing is known, and on which no loss depends.
NOTHING = {
    "values": 0.0, "known": False, "delta": 0.0, "masked_delta": 0.0, "noise": 1.0, "margin": math.inf, "rounding": 1.0,
}  # fmt: skip
FLOOR = 1.2e-7  # relative: no noise is taken for less than rounding of the float32 that the victim computed in


class UndeterminedError(ValueError):
    """What is known of a stage's outputs does not tell its inputs; the message says why."""


@dataclass(frozen=True)
class KnownOutputs:
    """What is known between two stages, of every image.

    A kind of layer turns what is known of its outputs into what is known of its inputs (`Kind.pulled`).

    Attributes:
        values: (B, ...).
        known: where `values` are right.
        delta: (B, ...) derivative of each image's loss.
        masked_delta: what `delta` would be if the activation's other branch were taken: behind a ReLU, what the ReLU
            has set to zero.
        noise: standard deviation of the error of `values`, broadcasts to them.
        margin: distance of an entry from the activation's kink, in units of its noise, negative on the other side of a
            ReLU's; infinite without a kink.
        is_told: whether `values` mean anything at all.
        is_gated: whether an entry on the other side of the kink has lost its value, as behind a ReLU.
        rounding: units of rounding in delta, which a sigmoid or tanh has left: its slope y (1 - y) is rounded by as
            much at y = 1 - 1e-5 as at 1/2. None: one everywhere.
    """

    values: Tensor
    known: Tensor
    delta: Tensor
    masked_delta: Tensor
    noise: Tensor
    margin: Tensor
    is_told: bool = True
    is_gated: bool = False
    rounding: Tensor | None = None

    @classmethod
    def of(cls, values: Tensor, delta: Tensor, noise: Tensor) -> "KnownOutputs":
        """All values known, and no activation behind them yet."""
        everywhere, far = torch.ones_like(values, dtype=torch.bool), torch.full_like(values, torch.inf)
        return cls(values, everywhere, delta, torch.zeros_like(values), noise, far)

    @property
    def sure(self) -> Tensor:
        """Where `values` are right beyond doubt: an entry that only seems to be active is in truth far below zero."""
        return self.known & (self.margin > RANGE)

    def untold(self) -> "KnownOutputs":
        """The same without the values."""
        return replace(self, known=torch.zeros_like(self.known), is_told=False)

    def told_of(self, count: int) -> "KnownOutputs":
        """The same with the values of the first so many images alone."""
        known = self.known.clone()
        known[count:] = False
        return replace(self, known=known)

    def coarser(self, factor: float) -> "KnownOutputs":
        """As if the noise had been so many times what it was taken for."""
        if not self.is_gated:
            return self
        flips = (self.margin > ZERO * factor) ^ (self.margin > ZERO)
        return replace(self.flipped(flips), margin=self.margin / factor)

    def flipped(self, flips: Tensor) -> "KnownOutputs":
        """The same with the other branch of the activation where `flips` says so."""
        return replace(
            self,
            known=self.known ^ flips if self.is_told and self.is_gated else self.known,
            delta=torch.where(flips, self.masked_delta, self.delta),
            masked_delta=torch.where(flips, self.delta, self.masked_delta),
        )

    def scaled(self, values: Tensor, slope: Tensor, known: Tensor | None = None) -> "KnownOutputs":
        """Below an elementwise stage of that slope (broadcasts), which made these values into the present ones."""
        return replace(
            self,
            values=values,
            known=self.known if known is None else self.known & known,
            delta=self.delta * slope,
            masked_delta=self.masked_delta * slope,
            noise=self.noise / slope.abs(),
        )

    def part(self, images: slice) -> "KnownOutputs":
        """The same of some of the images."""
        return replace(self, **{name: t.expand_as(self.values)[images] for name, t in self._tensors.items()})

    @classmethod
    def joined(cls, parts: Sequence["KnownOutputs"]) -> "KnownOutputs":
        """Of all images, from the same stage's of some of them each, in turn."""
        wide = [part.part(slice(None)) for part in parts]
        return replace(wide[0], **{name: torch.cat([vars(part)[name] for part in wide]) for name in wide[0]._tensors})

    def channels(self, first: int, count: int) -> "KnownOutputs":
        """The same of some channels."""
        return replace(
            self, **{name: t.expand_as(self.values)[:, first : first + count] for name, t in self._tensors.items()}
        )

    def among(self, first: int, total: int) -> "KnownOutputs":
        """Among so many channels, of whose others nothing is known, and on which no loss depends."""
        whole = {}
        for name, t in self._tensors.items():
            wide = t.expand_as(self.values)
            rest = (total - first - wide.shape[1], NOTHING[name])
            sides = [
                wide.new_full((len(wide), size, *wide.shape[2:]), value) for size, value in ((first, rest[1]), rest)
            ]
            whole[name] = torch.cat([sides[0], wide, sides[1]], 1)
        return replace(self, **whole)

    def in_order(self, index: Tensor, shape: tuple[int, ...]) -> "KnownOutputs":
        """In another order, and of that shape: the entries (n,) with these indices in the flattened present ones."""
        tensors = {name: t.expand_as(self.values).flatten(1) for name, t in self._tensors.items()}
        return replace(self, **{name: t[:, index].view(len(t), *shape) for name, t in tensors.items()})

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def reshaped(self, shape: tuple[int, ...]) -> "KnownOutputs":
        """Each image's activations in another shape."""
        tensors = {name: t.expand_as(self.values) for name, t in self._tensors.items()}
        return replace(self, **{name: t.reshape(len(t), *shape) for name, t in tensors.items()})
