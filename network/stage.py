"""A stage of a model's chain, and the residual stage, which holds two chains."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Stage:
    """One step of the chain: `module` maps activations to activations."""

    name: str
    module: Callable[[Tensor], Tensor]


Chain = Sequence[Stage]


@dataclass(frozen=True)
class Residual:
    """body(x) + shortcut(x); an empty chain is the identity."""

    body: Chain
    shortcut: Chain = ()

    def __call__(self, x: Tensor) -> Tensor:
        """The sum of both branches."""
        return run(self.body, x) + run(self.shortcut, x)


def run(chain: Chain, x: Tensor) -> Tensor:
    """What comes out of the chain's end."""
    for stage in chain:
        x = stage.module(x)
    return x
