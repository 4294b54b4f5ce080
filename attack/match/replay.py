"""The client's training, replayed on what was found: the share of the update that is left."""

import math

import torch
from torch import Tensor, nn

from attack.match.phases import is_pooled
from attack.prepare import Known
from attack.solve.rounding import precision_of
from network.chain import is_walked
from network.head import measured_noise
from network.tracing import stages
from update.shared import SharedUpdate
from update.training import train_locally

EXACT = 1e-2  # share of the update that pixels which were read may leave: they are exact to a hundredth
# Share that pictures may leave which follow the known activations of all images, from FEW evaluations on. A ConvNet's
# leave 0.02 to 0.11 after 20 evaluations and fewer later, and 0.51 to 0.89 where the client normalised its images.
CLOSE = 0.4
FEW = 20


def left_at_most(known: Known, model: nn.Module, evaluations: int) -> float:
    """The share of the update that the client's training may leave on what was found, but for noise.

    Infinite where nothing vouches for the pictures. Below a max-pool good pictures leave most of it: which entry was
    the largest decides on gradients.
    """
    if known.is_exact:
        return EXACT
    chain = stages(model)[: known.start] if known.is_followed else []
    is_followed = known.is_followed and is_walked(chain) and not is_pooled(chain)
    return CLOSE if is_followed and evaluations >= FEW else math.inf


def left_over(update: SharedUpdate, model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """|u - g| / |g|, with g the update and u that of the same training on other images.

    Args:
        update: the client's.
        model: that it was computed on, BatchNorm in the mode of the training.
        images: (B, C, H, W), in [0, 1].
        labels: class probabilities (B, K).
    """
    goal = update.targets(model)
    with torch.enable_grad():
        own = train_locally(model, images.detach(), labels.detach(), update.training).average
    left = sum(float((u - g).detach().double().square().sum()) for u, g in zip(own, goal, strict=True))
    size = sum(float(g.double().square().sum()) for g in goal)
    return (left / size) ** 0.5 if size else math.inf


def noise_share(update: SharedUpdate, model: nn.Module) -> float:
    """The share of the update that is noise: what its head's sums show, and rounding."""
    rounding = max(precision_of(gradient) for gradient in update.gradients.values())
    shown = measured_noise(update.gradients, model) if update.training.loss.is_cross_entropy else 0.0
    return max(rounding, shown / update.strength())
