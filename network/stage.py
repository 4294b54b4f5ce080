"""A stage of a model's chain, and stages that hold two chains side by side: their sum, and their product."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stage:
    """One step of the chain: `module` maps activations to activations."""

    name: str
    module: Callable[[Tensor], Tensor]


Chain = Sequence[Stage]


@dataclass(frozen=True)
class Branched:
    """Two chains side by side on the same inputs; an empty chain is the identity."""

    body: Chain
    shortcut: Chain = ()

    @property
    def branches(self) -> tuple[Chain, Chain]:
        """Both chains."""
        return self.body, self.shortcut

    def together(self, left: Tensor, right: Tensor) -> Tensor:
        """The stage's outputs, from those of its body and its shortcut."""
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Tensor:
        """Both branches, put together."""
        return self.together(run(self.body, x), run(self.shortcut, x))


@dataclass(frozen=True)
class Residual(Branched):
    """body(x) + shortcut(x)."""

    def together(self, left: Tensor, right: Tensor) -> Tensor:
        """The sum."""
        return left + right


@dataclass(frozen=True)
class Product(Branched):
    """body(x) shortcut(x)."""

    def together(self, left: Tensor, right: Tensor) -> Tensor:
        """The product."""
        return left * right


@dataclass(frozen=True)
class Gate(Product):
    """body(x) x, with a body that puts out nothing negative, as in squeeze-and-excitation."""


def delta_before(function: Callable[[Tensor], Tensor], inputs: Tensor, delta: Tensor) -> Tensor:
    """The derivatives (B, ...) by a function's inputs from those by its outputs there."""
    with torch.enable_grad():
        leaf = inputs.detach().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf, delta)[0]


def run(chain: Chain, x: Tensor) -> Tensor:
    """What comes out of the chain's end."""
    for stage in chain:
        x = stage.module(x)
    return x
