"""Terms beside matching and prior: known features, known BatchNorm statistics, and copies that should agree."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from network.chain import Moments, mixes_images
from network.head import features_of
from network.stage import Chain, run
from update.batchnorm import batchnorms

EPS = 1e-5  # that BatchNorm adds to a variance

# Expected errors up to which features that were read are close enough: the gradient they were read from is matched too,
# and knows no less. LeNet, B=4, activations in bfloat16, 300 evaluations: 20.4 dB with 1, 25.4 with 3, 30.3 with 6, and
# 30.0 without features. With noise of 1e-3 and 1e-4, B=8, all are within 0.3 dB.
CLOSE_ENOUGH = 6.0
FEATURE_DISTANCES = ("l2", "relative", "cosine")


@dataclass(frozen=True)
class Penalty:
    """A term beside matching and prior, by its name: weight times `loss` at images (B, C, H, W)."""

    name: str
    weight: float
    loss: Callable[[Tensor], Tensor]

    def __call__(self, images: Tensor) -> Tensor:
        """The weighted term, a scalar."""
        return self.weight * self.loss(images)

    def __repr__(self) -> str:
        return f"{self.weight:g} {self.name}"


@dataclass(frozen=True)
class FeatureLoss:
    """How far the features of the leading images are from the known features h_i (N, d), as a mean over the batch.

    l2 takes |phi(x_i) - h_i|^2, relative divides that by |h_i|^2, cosine takes 1 - cos (Kariyappa et al. 2023). Read
    features have expected relative `errors` (N,). From l2 and relative the square of CLOSE_ENOUGH times the expected
    error is subtracted, down to zero: a closer match would be a match to noise.
    """

    model: nn.Module
    features: Tensor
    distance: str = "l2"
    errors: Tensor | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """The loss of images (B, C, H, W)."""
        count = len(self.features)
        needed = images if mixes_images(self.model.modules()) else images[:count]
        features = features_of(self.model, needed)[:count]
        if self.distance == "cosine":
            return (1 - nn.functional.cosine_similarity(features, self.features)).sum() / len(images)
        apart, sizes = (features - self.features).square().sum(1), self.features.square().sum(1)
        if self.errors is not None:
            apart = (apart - (CLOSE_ENOUGH * self.errors).square() * sizes).relu()
        return (apart / sizes if self.distance == "relative" else apart).sum() / len(images)


@dataclass(frozen=True)
class BatchNormLoss:
    """How far the batch's statistics are from the running statistics of the model's BatchNorm layers.

    Sum over layers of |mean(x) - running mean| + |var(x) - running variance|, x being the layer's input.

    Source: Yin et al. 2021 (arXiv 2104.07586), eq. 11.
    """

    model: nn.Module

    @property
    def layers(self) -> list[nn.Module]:
        """The layers compared; none in a model without BatchNorm."""
        return list(batchnorms(self.model))

    def __call__(self, images: Tensor) -> Tensor:
        """The loss of images (B, C, H, W)."""
        distances = []

        def compare(layer: nn.Module, inputs: tuple[Tensor]) -> None:
            axes = [axis for axis in range(inputs[0].dim()) if axis != 1]
            variance, mean = torch.var_mean(inputs[0], axes, correction=0)
            distances.extend([(mean - layer.running_mean).norm(), (variance - layer.running_var).norm()])

        hooks = [layer.register_forward_pre_hook(compare) for layer in self.layers]
        try:
            self.model(images)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(distances).sum()


@dataclass(frozen=True)
class MomentsLoss:
    """How far the moments of a chain's BatchNorm layers are from those that normalised the client's batch.

    See `statistics_distance`. The chain runs in the client's mode.
    """

    chain: Chain
    moments: Moments

    def __call__(self, images: Tensor) -> Tensor:
        """The loss of images (B, C, H, W)."""
        seen: list[Tensor] = []
        shared: list[Tensor] = []

        def compare(layer: nn.Module, inputs: tuple[Tensor]) -> None:
            axes = [axis for axis in range(inputs[0].dim()) if axis != 1]
            variance, mean = torch.var_mean(inputs[0], axes, correction=0)
            seen.extend([mean, variance])
            shared.extend(self.moments[layer])

        hooks = [layer.register_forward_pre_hook(compare) for layer in self.moments]
        try:
            run(self.chain, images)
        finally:
            for hook in hooks:
                hook.remove()
        return statistics_distance(seen, shared)


def statistics_distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Mean over layers of the mean over channels of ((mean - shared) / sigma)^2 + (variance / shared - 1)^2.

    What BatchNorm does to a channel depends on these two alone: a mean that is off by a part of sigma shifts it by as
    much, however large the mean is.

    Args:
        a: mean and variance (C,) by turns, of each layer.
        b: those that the client shares, with its sigma.
    """
    off = []
    for mean, variance, shared, square in zip(a[::2], a[1::2], b[::2], b[1::2], strict=True):
        scale = square.clamp(min=0) + EPS
        off.append(((mean - shared).square() / scale + ((variance + EPS) / scale - 1).square()).mean())
    return torch.stack(off).mean()


def disagreement(copies: Tensor) -> Tensor:
    """Mean squared distance of copies (R, B, C, H, W) of a batch from their mean image, a scalar.

    Source: group consistency, Yin et al. 2021 (arXiv 2104.07586), eq. 12. There copies are first registered to each
    other; here the mean is that of the unregistered pixels.
    """
    return (copies - copies.mean(0)).square().mean()
