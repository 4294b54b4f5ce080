"""Norms of each image by itself: GroupNorm, InstanceNorm, and LayerNorm over all of an image's entries.

They take off mean and scale of each image's groups, which their outputs do not tell. A layer right in front of one has
equations of its own (`attack.walk.per_image`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from network.kinds.kind import Kind, Shape
from network.kinds.norm import Norm

TAKES_OFF = "{} takes off each image's mean and scale, and no convolution stands right in front of it"
POSITIONS_NORM = "LayerNorm takes off mean and scale of each position's channels"
IN_PART = "LayerNorm takes off mean and scale over {} of the {} dimensions of an image's entries"


class ImageNorm(Kind):
    """GroupNorm, and LayerNorm of all entries of an image; nothing is followed through LayerNorm of some dimensions."""

    modules = (nn.GroupNorm, nn.LayerNorm)

    def normalises_images(self, module: nn.Module, shape: Shape) -> bool:
        """Whether it normalises whole groups of channels of each image."""
        return isinstance(module, nn.GroupNorm) or tuple(module.normalized_shape) == tuple(shape)

    def why_not(self, module: nn.Module, inputs: Shape, outputs: Shape) -> str:
        """Always: mean and scale are gone."""
        if not self.normalises_images(module, inputs):
            count = len(module.normalized_shape)
            return POSITIONS_NORM if count == 1 else IN_PART.format(count, len(inputs))
        return TAKES_OFF.format(type(module).__name__)


class InstanceNorm(Norm):
    """InstanceNorm: by running statistics, as BatchNorm in eval mode, or by each image's own."""

    modules = (nn.modules.instancenorm._InstanceNorm,)

    def mixes_images(self, module: nn.Module) -> bool:
        """Never."""
        return False

    def normalises_images(self, module: nn.Module, shape: Shape) -> bool:
        """Where it takes the image's own statistics."""
        return module.training or module.running_mean is None

    def why_not(self, module: nn.Module, inputs: Shape, outputs: Shape) -> str:
        """Of the image's own statistics, mean and scale are gone."""
        return TAKES_OFF.format(type(module).__name__) if self.normalises_images(module, inputs) else ""

    def inverted(self, module: nn.Module, outputs: Tensor, shape: Shape) -> Tensor | None:
        """By running statistics, where no channel is closed."""
        return None if self.normalises_images(module, shape) else super().inverted(module, outputs, shape)

    def gives_weight_gradients(self, module: nn.Module) -> bool:
        """No."""
        return False


@dataclass(frozen=True)
class ImageStatistics:
    """What such a norm computes: y = gamma (z - mean) / sigma + beta, with mean and sigma of each image's groups.

    Attributes:
        groups: of channels.
        scale, shift: gamma and beta, broadcast to (B, c, ...).
        eps: of its variance.
    """

    groups: int
    scale: Tensor
    shift: Tensor
    eps: float

    @classmethod
    def of(cls, module: nn.Module, shape: Shape, like: Tensor) -> "ImageStatistics":
        """Of a norm for inputs of that shape, one image's."""
        groups = 1 if isinstance(module, nn.LayerNorm) else getattr(module, "num_groups", shape[0])
        both = []
        for value, usual in ((module.weight, 1.0), (module.bias, 0.0)):
            value = torch.full(shape[:1], usual) if value is None else value.detach()
            both.append(value.to(like).view(*value.shape, *(1,) * (len(shape) - value.dim()))[None])
        return cls(groups, *both, module.eps)

    def _grouped(self, values: Tensor) -> Tensor:
        return values.reshape(len(values), self.groups, -1)

    def sums(self, values: Tensor) -> Tensor:
        """Over each image's groups, (B, groups, 1)."""
        return self._grouped(values).sum(2, keepdim=True)

    def means(self, values: Tensor) -> Tensor:
        """Over each image's groups, (B, groups, 1)."""
        return self._grouped(values).mean(2, keepdim=True)

    def wide(self, each: Tensor, values: Tensor) -> Tensor:
        """Numbers (B, groups, 1) of each image's groups, in the shape of values (B, c, ...)."""
        return each.expand_as(self._grouped(values)).reshape(values.shape)

    def normalised(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(z - mean) / sigma, and sigma (B, groups, 1)."""
        centred = z - self.wide(self.means(z), z)
        deviation = (self.means(centred.square()) + self.eps).sqrt()
        return centred / self.wide(deviation, z), deviation

    def delta(self, delta: Tensor, values: Tensor, deviation: Tensor) -> Tensor:
        """The derivatives by z from those by y, the normalised values, and sigma."""
        weighted = self.scale * delta
        mean, along = self.means(weighted), self.means(weighted * values)
        inner = weighted - self.wide(mean, values) - values * self.wide(along, values)
        return inner / self.wide(deviation, values)
