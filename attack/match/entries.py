"""How far a gradient is from those that the client could have turned into what it sent.

A client that prunes, rounds or sends signs makes that public (`update.defences`), and what it sends then says something
else of its gradient than the value of each entry: matched as they stand, entries that were left out would pull the
gradient to zero. What they do say is matched here, each on the scale of a squared distance of entries.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from update.defences import Defences
from update.shared import SharedUpdate

Gradient = tuple[Tensor, ...]

WRONG_SIGN = 4.0  # weight of an entry of the wrong sign beside the mean magnitudes (measured)
CORNER = 0.3  # of a step: below it the likelihood of a rounded entry is smooth, its kink would stop L-BFGS (measured)
UNLIKELY = 0.9  # of a step: beyond it the likelihood, which ends at one, goes on as a parabola
SILENT = 1e-6  # of the mean square of all entries: a tensor's is not taken for smaller
FLOATS = ("float16", "bfloat16")  # defences after which entries say what they said before


def squared_distance(a: Gradient, b: Gradient) -> Tensor:
    """Sum of squared differences over all parameters."""
    return sum((p - q).square().sum() for p, q in zip(a, b, strict=True))


@dataclass(frozen=True)
class Entries:
    """Entries that were sent as they are, but for noise.

    Attributes:
        sent: the shared average, one tensor for each parameter.
        relative: measure squares by the mean square of their tensor, and take their mean over all entries. Tensors of
            a trained network differ a thousandfold in size, and the small ones say as much of the images.
        is_whole: whether entries are the gradient's, but for noise.
    """

    sent: Gradient
    relative: bool = False
    is_whole = True

    @cached_property
    def units(self) -> list[float]:
        """What squares of each tensor's entries are divided by."""
        if not self.relative:
            return [1.0] * len(self.sent)
        count = sum(q.numel() for q in self.sent)
        least = SILENT * float(sum(q.square().sum() for q in self.sent)) / count
        return [count * max(float(q.square().mean()), least) or 1.0 for q in self.sent]

    def scaled(self, gradient: Gradient) -> Gradient:
        """A gradient whose squares are in these units."""
        return tuple(p / unit**0.5 for p, unit in zip(gradient, self.units, strict=True))

    def __call__(self, gradient: Gradient) -> Tensor:
        """The distance of a gradient, a scalar."""
        return sum(self.of_one(p, at) / unit for at, (p, unit) in enumerate(zip(gradient, self.units, strict=True)))

    def of_one(self, p: Tensor, at: int) -> Tensor:
        """The distance of one parameter's gradient from what was sent of it, in no units."""
        return self._of_one(p, self.sent[at], at)

    def _of_one(self, p: Tensor, q: Tensor, at: int) -> Tensor:
        return (p - q).square().sum()


class Pruned(Entries):
    """Entries of which the largest were sent: one that was not is no larger than the least of those.

    Where nothing was pruned the least one is close to zero, and this the distance of all.
    """

    is_whole = False

    @cached_property
    def least(self) -> float:
        """The smallest magnitude that was sent."""
        return min(float(q[q != 0].abs().min()) for q in self.sent if q.any())

    def _of_one(self, p: Tensor, q: Tensor, at: int) -> Tensor:
        return torch.where(q != 0, p - q, (p.abs() - self.least).relu()).square().sum()


class Signs(Entries):
    """Signs of the entries, and each tensor's mean magnitude."""

    is_whole = False

    def _of_one(self, p: Tensor, q: Tensor, at: int) -> Tensor:
        wrong = (-q.sign() * p).relu().square().sum()
        return WRONG_SIGN * wrong + q.numel() * (p.abs().mean() - q.abs().max()).square()


@dataclass(frozen=True, kw_only=True)
class Rounded(Entries):
    """Entries rounded up or down at random to `steps` equal steps of each tensor's largest, right on average.

    An entry r steps from what was sent was rounded to it with a chance of 1 - |r|. The negative logarithm, times twice
    an entry's variance, is what squared distances are where that variance is the same for all entries. It is not:
    small entries, which most are, vary least, and tell most.
    """

    steps: int

    @cached_property
    def sizes(self) -> list[float]:
        """A step of each tensor; 0 of one of zeros, which was not rounded."""
        return [float(q.abs().max()) / self.steps for q in self.sent]

    @cached_property
    def variances(self) -> list[float]:
        """Of an entry's rounding: that of small ones, |q| times a step, or of any, step^2 / 6, as means over entries.

        They are each tensor's own if sizes are relative to it, else the mean over all.
        """
        own = [min(float(q.abs().mean()) * step, step**2 / 6) for q, step in zip(self.sent, self.sizes, strict=True)]
        if self.relative:
            return own
        counts = [q.numel() for q in self.sent]
        return [sum(n * variance for n, variance in zip(counts, own, strict=True)) / sum(counts)] * len(own)

    def _of_one(self, p: Tensor, q: Tensor, at: int) -> Tensor:
        if not (step := self.sizes[at]):
            return super()._of_one(p, q, at)
        r = ((p - q) / step).square().add(CORNER**2).sqrt() - CORNER
        beyond = (r - UNLIKELY).relu() / (1 - UNLIKELY)
        unlikely = beyond + beyond.square() / 2 - torch.log1p(-r.clamp(max=UNLIKELY))
        return 2 * self.variances[at] * unlikely.sum()


def observed(update: SharedUpdate, model: nn.Module, *, relative: bool = False) -> Entries:
    """What the entries of an update say of the gradient by the parameters of `model`.

    The last defence decides; what those before it did is in there as noise is.
    """
    sent, defences = update.targets(model), Defences.parse(update.defence)
    last = next((step for step in reversed(defences.steps) if step.name not in FLOATS), None)
    if last is None or last.name not in ("topk", "sign", "quantise"):
        return Entries(sent, relative)
    if last.name == "quantise":
        return Rounded(sent, relative, steps=2 ** int(last.amounts[0]) - 1)
    return Pruned(sent, relative) if last.name == "topk" else Signs(sent, relative)
