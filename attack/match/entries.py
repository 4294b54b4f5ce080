"""How far a gradient is from those that the client's defence could have turned into the update.

A client that prunes, truncates, rounds or sends signs makes its defence public (`update.defences`). An entry of its
update then no longer has the gradient's value: matched by value, entries left out would pull the gradient to zero. This
module compares what the entries still tell of the gradient, on the scale of a squared distance of entries.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from attack.solve.quotients import bounds_of
from network.parameters import trainable
from update.defences import EIGHT_BITS, Defence, Defences
from update.shared import SharedUpdate
from update.training import LocalTraining

Gradient = tuple[Tensor, ...]

WRONG_SIGN = 4.0  # weight of an entry of the wrong sign beside the mean magnitudes (measured)
CORNER = 0.3  # of a step: below it the likelihood of a rounded entry is smooth, its kink would stop L-BFGS (measured)
UNLIKELY = 0.9  # of a step: beyond it the likelihood, which ends at one, goes on as a parabola
SILENT = 1e-6  # lower bound on a tensor's mean square, relative to the mean square of all entries
FLOATS = ("float16", "bfloat16")  # defences that change no entry but by rounding to 16 bits
PRUNING = ("topk", "feedback", "percentile")  # those of which a missing entry is no larger than the least that was sent
BOUNDING = (*PRUNING, "truncate", "int8")  # those after which an entry bounds the gradient's
AT_GAMMA = 1 - 2**-8  # of GAMMA: from there on an entry may have been truncated, and then rounded to 16 bits


def squared_distance(a: Gradient, b: Gradient) -> Tensor:
    """Sum of squared differences over all parameters."""
    return sum((p - q).square().sum() for p, q in zip(a, b, strict=True))


@dataclass(frozen=True)
class Entries:
    """Entries that have the gradient's values, but for noise.

    Attributes:
        sent: the shared average, one tensor for each parameter.
        relative: divide squares by the mean square of their tensor, and take the mean over all entries. Tensors of a
            trained network differ a thousandfold in size, and small tensors say as much of the images as large ones.
        is_whole: whether every entry has the gradient's value, but for noise.
        is_legible: whether some entries have it, so that single images can be read.
    """

    sent: Gradient
    relative: bool = False
    is_whole = True
    is_legible = True

    def imitated(self, training: LocalTraining) -> LocalTraining:
        """The training whose update is compared with the entries: the client's."""
        return training

    @property
    def missing(self) -> list[float]:
        """The share of each tensor's gradient that the defence left out and no noise shows, at most 1."""
        return [0.0] * len(self.sent)

    @cached_property
    def units(self) -> list[float]:
        """The divisors of the squares of each tensor's entries."""
        if not self.relative:
            return [1.0] * len(self.sent)
        count = sum(q.numel() for q in self.sent)
        least = SILENT * float(sum(q.square().sum() for q in self.sent)) / count
        return [count * max(float(q.square().mean()), least) or 1.0 for q in self.sent]

    def scaled(self, gradient: Gradient) -> Gradient:
        """A gradient divided such that its squares are in these units."""
        return tuple(p / unit**0.5 for p, unit in zip(gradient, self.units, strict=True))

    def __call__(self, gradient: Gradient) -> Tensor:
        """The distance of a gradient, a scalar."""
        return sum(self.of_one(p, at) / unit for at, (p, unit) in enumerate(zip(gradient, self.units, strict=True)))

    def of_one(self, p: Tensor, at: int) -> Tensor:
        """The distance of one parameter's gradient from its part of the update, undivided."""
        return self._of_one(p, self.sent[at], at)

    def _of_one(self, p: Tensor, q: Tensor, at: int) -> Tensor:
        return (p - q).square().sum()


@dataclass(frozen=True, kw_only=True)
class Within(Entries):
    """Entries that bound the gradient's: by how much it lies outside its bounds is what counts.

    Where nothing was pruned, truncated or rounded, both bounds are the entry, and the distance is that of all entries.

    Attributes:
        steps: the defences, in their order, with their amounts in units of the gradient.
    """

    steps: tuple[Defence, ...]
    is_whole = False

    @cached_property
    def least(self) -> float:
        """The smallest magnitude that was sent."""
        return min(float(q[q != 0].abs().min()) for q in self.sent if q.any())

    @cached_property
    def bounds(self) -> list[tuple[Tensor, Tensor]]:
        """What each tensor's entries of the gradient are at least and at most."""
        return [self._bounds(q) for q in self.sent]

    @property
    def missing(self) -> list[float]:
        """As in `Entries`: by how much missing, truncated and late entries may be off; rounded ones have noise."""
        found = []
        for q, (low, high) in zip(self.sent, self.bounds, strict=True):
            half = (high - low).double() / 2
            if any(step.name == "int8" for step in self.steps):
                half = torch.where(q == 0, half, half - float(q.abs().max()) / EIGHT_BITS / 2)
            share = float((half.square().sum() / 3).sqrt() / q.double().norm())
            found.append(min(1.0, share) if q.any() else 1.0)
        return found

    def _bounds(self, q: Tensor) -> tuple[Tensor, Tensor]:
        low, high = q, q
        for step in reversed(self.steps):
            if step.name == "int8":
                half = float(q.abs().max()) / EIGHT_BITS / 2
                low, high = low - half, high + half
            elif step.name == "truncate":
                gamma = step.amounts[0] * AT_GAMMA
                low, high = low.masked_fill(low <= -gamma, -math.inf), high.masked_fill(high >= gamma, math.inf)
            elif step.name == "feedback":  # a sent entry is the gradient's as often as it waited, and was due but once
                least = torch.maximum(q.abs() / step.amounts[1], q.abs() - self.least)
                low, high = torch.where(q > 0, least, low), torch.where(q < 0, -least, high)
            if step.name in PRUNING:
                low, high = torch.where(q == 0, -self.least, low), torch.where(q == 0, self.least, high)
        return low, high

    def _of_one(self, p: Tensor, q: Tensor, at: int) -> Tensor:
        low, high = self.bounds[at]
        return ((low - p).relu() + (p - high).relu()).square().sum()


@dataclass(frozen=True, kw_only=True)
class Answers(Entries):
    """Some of the entries with Laplace noise, clamped to [-gamma, gamma]; the others are missing and tell nothing.

    What was sent is compared with the mean of what a gradient would send. By value, clamped noise would pull every
    entry to +-gamma.

    Attributes:
        gamma: as in `client.defences.sparse_vector`, in units of the gradient.
        spread: the scale of the noise.
    """

    gamma: float
    spread: float
    is_whole = False
    is_legible = False

    def _of_one(self, p: Tensor, q: Tensor, at: int) -> Tensor:
        size = p.abs()
        near, far = (torch.exp(-gap / self.spread) for gap in ((size - self.gamma).abs(), size + self.gamma))
        mean = size.clamp(max=self.gamma) - self.spread / 2 * (near - far)
        beyond = torch.where(q.abs() < self.gamma, (size - self.gamma).relu(), 0)  # else the mean says nothing of it
        return torch.where(q != 0, p.sign() * (mean + beyond) - q, 0).square().sum()


class Signs(Entries):
    """Signs of the entries, and each tensor's mean magnitude."""

    is_whole = False
    is_legible = False

    def _of_one(self, p: Tensor, q: Tensor, at: int) -> Tensor:
        wrong = (-q.sign() * p).relu().square().sum()
        return WRONG_SIGN * wrong + q.numel() * (p.abs().mean() - q.abs().max()).square()


@dataclass(frozen=True, kw_only=True)
class Rounded(Entries):
    """Entries rounded up or down at random to `steps` equal steps of each tensor's largest, right on average.

    A true entry that lies r steps from the sent entry was rounded to it with a chance of 1 - |r|. The distance is the
    negative logarithm of that chance, times twice an entry's variance. A squared distance would be right if all
    entries had one variance. But small entries, which are most, vary least and tell most.
    """

    steps: int

    @cached_property
    def sizes(self) -> list[float]:
        """The step of each tensor; 0 for a tensor of zeros, which was not rounded."""
        return [float(q.abs().max()) / self.steps for q in self.sent]

    @cached_property
    def variances(self) -> list[float]:
        """The variance of an entry's rounding, as a mean over entries: |q| times a step, or step^2 / 6 if that is less.

        Each tensor has its own variance if distances are relative, else all share the mean.
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


@dataclass(frozen=True, kw_only=True)
class Quotients(Entries):
    """Entries that Adam's first step has divided: |gradient| lies between bounds, far apart for large entries.

    Distances are of sign(g) log(1 + |g| / size), `size` being a tensor's median entry: small entries, which are most
    and have the closest bounds, would not count beside large ones otherwise.

    Attributes:
        bounds: least and largest magnitude, for each parameter.
        pulls: Adam's weight decay times the weights, which it divides with the gradient.
    """

    bounds: tuple[tuple[Tensor, Tensor], ...]
    pulls: Gradient
    is_whole = False

    @classmethod
    def of(cls, update: SharedUpdate, model: nn.Module) -> "Quotients":
        """The entries of an update of one step of Adam."""
        rule, sent = update.training.optimiser, update.targets(model)
        weights = [weight.detach() for weight in trainable(model).values()]
        told = [bounds_of(u, w, update.training.rate, rule.eps) for u, w in zip(sent, weights, strict=True)]
        bounds = tuple((least.to(w), most.to(w)) for (least, most), w in zip(told, weights, strict=True))
        decay = rule.decay if rule.name == "adam" else 0.0
        return cls(sent, bounds=bounds, pulls=tuple(decay * weight for weight in weights))

    @cached_property
    def units(self) -> list[float]:
        """The divisors of the squares of each tensor's entries."""
        count = sum(q.numel() for q in self.sent)
        squares = [self._compressed(least, at).square() for at, (least, _) in enumerate(self.bounds)]
        return [count * float(each.mean()) or 1.0 for each in squares]

    @cached_property
    def sizes(self) -> list[float]:
        """The median of each tensor's entries that are not zero."""
        least = [low[low > 0] for low, _ in self.bounds]
        return [float(each.median()) if len(each) else 1.0 for each in least]

    def imitated(self, training: LocalTraining) -> LocalTraining:
        """Without Adam's division."""
        return training.undivided

    def _compressed(self, values: Tensor, at: int) -> Tensor:
        return values.sign() * torch.log1p(values.abs() / self.sizes[at])

    def _of_one(self, p: Tensor, q: Tensor, at: int) -> Tensor:
        (least, most), own = self.bounds[at], self._compressed(p + self.pulls[at], at)
        own = torch.where(q == 0, own, q.sign() * own)
        below = (self._compressed(least, at) - own).relu()
        bounded = most < torch.inf
        above = (own - self._compressed(torch.where(bounded, most, 0.0), at)).relu() * bounded
        return below.square().sum() + above.square().sum()


def observed(update: SharedUpdate, model: nn.Module, *, relative: bool = False) -> Entries:
    """The entries of an update, and what they still tell of the gradient by the parameters of `model`.

    The last defence decides, together with those before it that leave bounds. The effects of earlier defences count as
    noise, and so do all after one step of Adam.
    """
    if update.training.is_quotient:
        return Quotients.of(update, model)
    return told_by(update.targets(model), update, relative=relative)


def told_by(sent: Gradient, update: SharedUpdate, *, relative: bool = False) -> Entries:
    """What these tensors of an update still tell of the gradient, by the defences of the update; not of Adam's step."""
    told = Defences.parse(update.defence).of_gradient(update.training)
    left = [step for step in told if step.name not in FLOATS]
    last = left[-1].name if left else "none"
    if last == "quantise":
        return Rounded(sent, relative, steps=2 ** int(left[-1].amounts[0]) - 1)
    if last == "sign":
        return Signs(sent, relative)
    if last == "svt":
        _, _, noise_var, gamma, _ = left[-1].amounts
        return Answers(sent, relative, gamma=gamma, spread=2 * gamma / noise_var)
    bounding = tuple(reversed([*itertools.takewhile(lambda step: step.name in BOUNDING, reversed(left))]))
    return Within(sent, relative, steps=bounding) if bounding else Entries(sent, relative)
