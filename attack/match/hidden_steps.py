"""How far features may be off because the client made several steps where one was declared, and rounding hides it.

Features are read at the weights of the step that used their image. If that was not the first one, those at the server's
weights are others: the layers below have moved meanwhile. The weights went no further than from the server's to those
that were sent, which the update tells with its rate. So two things are measured on the pictures that were found:

1. How far the features move on that way, when the stages below the known inputs move alone.
2. How far the certificates move, when the stages above move alone. A certificate that is right to so little says that
   the image was used as early on the way, and no earlier: no surer are its features.

Certificates of new weights that were rounded to float32 are blurred at small rates, and then the second hides the
first. The trained ConvNet, eight images in minibatches of two, declared as one step, rates 3e-4 and 1e-4: features are
off by 2e-4 to 1e-1, and by 0.04 to 2.1 times what is found here.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attack.prepare import Known
from attack.read.arithmetic import DIFFERENCES
from attack.solve.rounding import precision_of
from network.chain import mixes_images, modules
from network.head import Head, measured_noise
from network.parameters import trainable
from network.stage import Chain, run
from network.tracing import stages
from update.evidence import SCALE
from update.shared import SharedUpdate

SLIGHT = 0.1  # of features: as far a part of the way is followed, on which all moves in proportion
BLURRED = 3.0  # expected errors of an image by which its certificate may be off for their sake
TRIALS = 30  # of such a part, each shorter
TINY = 1e-12


def hidden_drift(update: SharedUpdate, model: nn.Module, known: Known, images: Tensor) -> Tensor | None:
    """Relative error (N,) of each image's features, if the client's steps were others; None where nothing drifts.

    Args:
        update: the client's, read as a gradient.
        model: that the server sent out.
        known: what was read of it.
        images: (B, C, H, W), those that were found, in the order of what was read.
    """
    if known.signals is None or not known.start or known.in_steps:
        return None
    reach = _reach(update, model)
    if not reach:
        return None
    count, chain = len(known.signals), stages(copy.deepcopy(model))
    whole = mixes_images(modules(chain))
    images = images if whole else images[:count]
    moved, far = _slightly(update, model, chain, known.start, images, reach)
    drift = moved.drift(images)[:count].double()
    early = torch.full_like(drift, reach / far)
    if update.training.is_gradient and not (whole and count < update.batch_size):
        signals = known.signals
        off = (signals.certificates - 1).abs() + BLURRED * signals.uncertainty
        early = early.minimum((off / moved.certificates(update, known).clamp(min=TINY)).to(early))
    found = early * drift
    return found.where(found.isfinite(), torch.inf)


def _reach(update: SharedUpdate, model: nn.Module) -> float:
    """How far the weights went, in units of the update; 0 where nothing tells.

    Where no rate was declared, noise is taken for the rounding of weights that were sent, which tells it.
    """
    training = update.training
    if training.rate is not None:
        scale = next((piece.figure for piece in update.evidence if piece.topic == SCALE and piece.figure), 1.0)
        return training.reach or abs(scale) * training.rate
    noise = measured_noise(update.gradients, model)
    if not noise:
        return 0.0
    weight = Head.of(model).layer.weight.detach()
    return DIFFERENCES * precision_of(weight) * float(weight.double().square().mean().sqrt()) / noise


def _slightly(
    update: SharedUpdate, model: nn.Module, chain: Chain, start: int, images: Tensor, reach: float
) -> tuple["_Moved", float]:
    """The network a part of the way on, and how far that is."""
    far = reach
    for _ in range(TRIALS):
        moved = _Moved(chain, stages(_further(model, update, far)), start)
        most = float(moved.drift(images).max())
        if most <= 2 * SLIGHT:
            break
        far *= SLIGHT / most if most < 1 else SLIGHT
    return moved, far


def _further(model: nn.Module, update: SharedUpdate, far: float) -> nn.Module:
    """The model with weights that have gone so far along the update."""
    own = copy.deepcopy(model)
    with torch.no_grad():
        for weight, gradient in zip(trainable(own).values(), update.targets(model), strict=True):
            weight -= far * gradient.to(weight)
    return own


@dataclass(frozen=True)
class _Moved:
    """A network before and after its weights have moved, and the stage whose inputs are known."""

    before: Chain
    after: Chain
    start: int

    @torch.no_grad()
    def drift(self, images: Tensor) -> Tensor:
        """How far the features (B,) move with the stages below, relative to them."""
        old, new = (
            run(self.before[self.start : -1], run(chain[: self.start], images)).flatten(1)
            for chain in (self.before, self.after)
        )
        return (new - old).norm(dim=1) / old.norm(dim=1).clamp(min=TINY)

    def certificates(self, update: SharedUpdate, known: Known) -> Tensor:
        """How far the certificates (N,) of the known inputs move with the stages above."""
        loss, labels = update.training.loss, known.signals.labels
        deltas = []
        for chain in (self.before, self.after):
            with torch.no_grad():
                outputs = chain[self.start].module(known.inputs.to(_like(self.before)))
            deltas.append(loss.delta(lambda x, own=chain: run(own[self.start + 1 :], x), outputs, labels).flatten(1))
        old, new = deltas
        return ((new - old) * old).sum(1).abs() / old.square().sum(1).clamp(min=TINY)


def _like(chain: Chain) -> Tensor:
    return chain[-1].module.weight.detach()
