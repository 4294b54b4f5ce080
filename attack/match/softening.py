"""Kinks made soft: ReLU and max-pool in the attacker's copy of the network, soft at first, harder phase by phase.

A ReLU's second derivative is zero where it is defined, and its first derivative jumps at 0. The gradient that an image
leaves in a network of ReLUs therefore jumps wherever an activation changes sign. Between jumps the gradient says
nothing of the jumps, and a line search ends at the first one. Softplus log(1 + exp(beta z)) / beta for the ReLU and
logsumexp(beta z) / beta for the maximum have no kinks. Images are moved through this soft network. The shared gradient
is that of the hard network, so beta must grow until the difference no longer matters.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from attack.match.gradients import Matching, MatchingLoss
from network.chain import is_walked, modules
from network.kinds import kind_of
from network.stage import Branched, Chain, Stage, run
from network.tracing import stages_if_walked

SOFTENINGS = ("auto", "off")

# The kinks' hardness, in equal parts of the prior's annealing: beta times the root mean square of the values that enter
# a kink. Trained ConvNet, labels optimised, 2,000 evaluations, see docs/results.md, "What is softening kinks worth
# without signals?".
HARDNESSES = (5.0, 15.0, 50.0, 150.0, 500.0)

FAINTEST = 1e-6  # lower bound on the root mean square of a kink's inputs, so an upper bound on beta


@torch.no_grad()
def softened(chain: Chain, hardness: float, images: Tensor) -> Chain:
    """The chain with its kinks rounded off, as their kinds say; the chain itself if hardness is infinite.

    Each beta is the hardness over the root mean square of that kink's inputs at `images`.
    """
    if math.isinf(hardness):
        return chain
    return _soften(chain, hardness, images)[0]


def _soften(chain: Chain, hardness: float, x: Tensor) -> tuple[list[Stage], Tensor]:
    """The softened chain, and its outputs at the images x."""
    soft = []
    for stage in chain:
        module = stage.module
        if isinstance(module, Branched):
            soft_branches = [_soften(branch, hardness, x) for branch in module.branches]
            module = type(module)(*(branch for branch, _ in soft_branches))
            x = module.together(*(outputs for _, outputs in soft_branches))
        else:
            beta = hardness / max(float(x.square().mean().sqrt()), FAINTEST)
            module = kind_of(module).softened(module, beta)
            x = module(x)
        soft.append(Stage(stage.name, module))
    return soft, x


class SoftNetwork(nn.Module):
    """A chain in the model's place: other activations, the same layers and parameters in the same order."""

    def __init__(self, model: nn.Module, chain: Chain) -> None:
        super().__init__()
        self.model, self.chain = model, chain

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (B, K) of images (B, C, H, W)."""
        return run(self.chain, images)


class SoftenedMatching:
    """The matching loss through a copy of the network whose kinks harden from phase to phase.

    Args:
        loss: the matching loss of the hard network.
        chain: the stages of the hard network.
        hardnesses: one for each phase.
    """

    def __init__(self, loss: MatchingLoss, chain: Chain, hardnesses: Sequence[float] = HARDNESSES) -> None:
        self.loss, self.chain, self.hardnesses = loss, chain, hardnesses
        self._phase, self._soft = -1, loss

    def __repr__(self) -> str:
        return f"{self.loss}, kinks softened"

    @property
    def phases(self) -> int:
        """As many as there are hardnesses."""
        return len(self.hardnesses)

    def enter(self, phase: int, images: Tensor) -> None:
        """Soften the kinks as this phase asks; the phase's first images (B, C, H, W) set the scale of each kink."""
        if phase != self._phase:
            network = SoftNetwork(self.loss.model, softened(self.chain, self.hardnesses[phase], images))
            self._phase, self._soft = phase, replace(self.loss, network=network)

    def __call__(self, images: Tensor, label_logits: Tensor, subset: Tensor) -> Matching:
        """Evaluate at images (B, C, H, W), label logits (B, K) and the indices (S,) of the subset T."""
        return self._soft(images, label_logits, subset)


def kinked_chain(model: nn.Module) -> Chain | None:
    """The stages of a model that has kinks; None if the model has no kinks, or cannot be walked down to its images."""
    chain = stages_if_walked(model) or ()
    if not is_walked(chain):
        return None
    return chain if any(kind_of(module).has_kink for module in modules(chain)) else None
