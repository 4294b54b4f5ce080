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
FLOATS = ("float16", "bfloat16")  # defences after which entries say what they said before


def squared_distance(a: Gradient, b: Gradient) -> Tensor:
    """Sum of squared differences over all parameters."""
    return sum((p - q).square().sum() for p, q in zip(a, b, strict=True))


@dataclass(frozen=True)
class Entries:
    """Entries that were sent as they are, but for noise.

    Attributes:
        sent: the shared average, one tensor for each parameter.
        is_whole: whether they are the gradient's, but for noise.
    """

    sent: Gradient
    is_whole = True

    def __call__(self, gradient: Gradient) -> Tensor:
        """The squared distance of a gradient, a scalar."""
        return squared_distance(gradient, self.sent)


class Pruned(Entries):
    """Entries of which the largest were sent: one that was not is no larger than the least of those.

    Where nothing was pruned the least one is close to zero, and this the squared distance.
    """

    is_whole = False

    @cached_property
    def least(self) -> float:
        """The smallest magnitude that was sent."""
        return min(float(q[q != 0].abs().min()) for q in self.sent if q.any())

    def __call__(self, gradient: Gradient) -> Tensor:
        """The squared distance of a gradient from what was sent, and of what was not from the least of it."""
        pairs = zip(gradient, self.sent, strict=True)
        return sum(torch.where(q != 0, p - q, (p.abs() - self.least).relu()).square().sum() for p, q in pairs)


class Signs(Entries):
    """Signs of the entries, and each tensor's mean magnitude."""

    is_whole = False

    def __call__(self, gradient: Gradient) -> Tensor:
        """Squares of entries whose signs are wrong, and of differences of mean magnitudes, for each entry alike."""
        total = torch.zeros(()).to(gradient[0])
        for p, q in zip(gradient, self.sent, strict=True):
            wrong = (-q.sign() * p).relu().square().sum()
            total = total + WRONG_SIGN * wrong + q.numel() * (p.abs().mean() - q.abs().max()).square()
        return total


@dataclass(frozen=True)
class Rounded(Entries):
    """Entries rounded up or down at random to `steps` equal steps of each tensor's largest, right on average.

    An entry r steps from what was sent was rounded to it with a chance of 1 - |r|. The negative logarithm, times twice
    the mean variance of an entry, is what squared distances are where that variance is the same for all entries. It is
    not: small entries, which most are, vary least, and tell most.
    """

    steps: int

    @cached_property
    def sizes(self) -> list[float]:
        """A step of each tensor; 0 of one of zeros, which was not rounded."""
        return [float(q.abs().max()) / self.steps for q in self.sent]

    @cached_property
    def variance(self) -> float:
        """Of an entry's rounding, mean over all: that of the small ones, |q| times a step, or of any, step^2 / 6."""
        pairs = zip(self.sent, self.sizes, strict=True)
        each = [q.numel() * min(float(q.abs().mean()) * step, step**2 / 6) for q, step in pairs]
        return sum(each) / sum(q.numel() for q in self.sent)

    def __call__(self, gradient: Gradient) -> Tensor:
        """The gradient's negative log likelihood, times twice the mean variance."""
        total = torch.zeros(()).to(gradient[0])
        for p, q, step in zip(gradient, self.sent, self.sizes, strict=True):
            if not step:
                total = total + p.square().sum()
                continue
            r = ((p - q) / step).square().add(CORNER**2).sqrt() - CORNER
            beyond = (r - UNLIKELY).relu() / (1 - UNLIKELY)
            unlikely = beyond + beyond.square() / 2 - torch.log1p(-r.clamp(max=UNLIKELY))
            total = total + 2 * self.variance * unlikely.sum()
        return total


def observed(update: SharedUpdate, model: nn.Module) -> Entries:
    """What the entries of an update say of the gradient by the parameters of `model`.

    The last defence decides; what those before it did is in there as noise is.
    """
    sent, defences = update.targets(model), Defences.parse(update.defence)
    last = next((step for step in reversed(defences.steps) if step.name not in FLOATS), None)
    if last is None or last.name not in ("topk", "sign", "quantise"):
        return Entries(sent)
    if last.name == "quantise":
        return Rounded(sent, 2 ** int(last.amounts[0]) - 1)
    return Pruned(sent) if last.name == "topk" else Signs(sent)
