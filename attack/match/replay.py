"""The client's training, replayed on what was found: the share of the update that is left."""

import math

import torch
from torch import Tensor, nn

from attack.solve.rounding import precision_of
from network.head import measured_noise
from update.shared import SharedUpdate
from update.training import train_locally


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
