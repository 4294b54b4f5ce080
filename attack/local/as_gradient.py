"""Several steps, read as one gradient: what says whether that was right.

A reading takes the update for a gradient at the server's weights. The update of several steps is a mean of gradients
along the way, and is off by their drift. Random images foretell this drift badly, 2 to 160 times too large. So the
reading is made, and judged by what it finds: the layers above the images' known inputs are trained on them as the
client was, and in one step. The difference of the two is the drift. What the first leaves of the update is the
certificate; where the second leaves nothing and the first does, the client made one step.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from attack.read.signals import Signals
from attack.solve.rounding import share_of
from network.chain import parameters
from network.parameters import trainable
from network.stage import run
from network.tracing import stages
from update.shared import SharedUpdate
from update.training import LocalTraining, train_locally

REPLAYED = 1e-2  # share of the layers' part of the update that their training on the images may leave


@dataclass(frozen=True)
class Judged:
    """A reading of all images as a gradient, judged.

    Attributes:
        left: share of the update, in the layers above, that the declared training leaves.
        left_by_one: share that one step leaves.
        drift: of the declared training from one step, relative to that step.
    """

    left: float
    left_by_one: float
    drift: float

    @property
    def is_certified(self) -> bool:
        """Whether the declared training on what was read makes the update."""
        return self.left <= REPLAYED

    @property
    def is_one_step(self) -> bool:
        """Whether one step does, and the declared training does not."""
        return not self.is_certified and self.left_by_one <= REPLAYED

    def drifted(self, signals: Signals) -> Signals:
        """The signals, no surer than the drift."""
        return replace(
            signals, uncertainty=torch.hypot(signals.uncertainty, torch.full_like(signals.uncertainty, self.drift))
        )


def judged(update: SharedUpdate, model: nn.Module, start: int, inputs: Tensor, labels: Tensor) -> Judged:
    """What the training above known inputs says of them.

    Args:
        update: of several steps.
        model: that the server sent out.
        start: the stage whose inputs are known, of all images.
        inputs: of that stage, (B, ...).
        labels: (B,).

    Raises:
        ValueError: the layers above have no part in the update, or depend on more than these inputs.
    """
    if update.training.uses_batch_statistics:
        raise ValueError("BatchNorm in training mode shows the images below, too")
    above = _Above(model, start, update.gradients)
    names = list(trainable(above))
    if not names:
        raise ValueError("no layer above is trained")
    goal = [update.gradients[name.removeprefix(_Above.PREFIX)].to(inputs) for name in names]
    at_once = LocalTraining(loss=update.training.loss, precision=update.training.precision)
    own, one = (train_locally(above, inputs, labels, each).average for each in (update.training, at_once))
    return Judged(_apart(own, goal), _apart(one, goal), _apart(own, one))


class _Above(nn.Module):
    """The stages from one on, in float64, of which only the parameters that the client trains are trainable."""

    PREFIX = "whole."

    def __init__(self, model: nn.Module, start: int, trained: dict[str, Tensor]) -> None:
        super().__init__()
        self.whole = copy.deepcopy(model).double()
        self._chain = tuple(stages(self.whole)[start:])
        held = set(parameters(self._chain))
        for name, parameter in self.whole.named_parameters():
            parameter.requires_grad_(parameter in held and name in trained)

    def forward(self, inputs: Tensor) -> Tensor:
        return run(self._chain, inputs)


def _apart(own: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """|own - other| / |other|; infinite where it is no number."""
    return share_of([p - q for p, q in zip(own, other, strict=True)], other)
