"""BatchNorm. In eval mode it is a scale and a shift for each channel; in training mode it mixes the images."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from network.kinds.kind import Kind, Shape
from network.known_outputs import FLOOR, KnownOutputs

MIXES = "BatchNorm in training mode mixes the images of the batch"


class Norm(Kind):
    """BatchNorm of any number of dimensions; the normalisation of pixels is one that nothing moves."""

    modules = (nn.modules.batchnorm._BatchNorm,)
    is_norm = True

    def mixes_images(self, module: nn.modules.batchnorm._BatchNorm) -> bool:
        """In training mode, and where there are no running statistics."""
        return module.training or module.running_mean is None

    def why_not(self, module: nn.modules.batchnorm._BatchNorm, inputs: Shape, outputs: Shape) -> str:
        """An image's delta below it depends on all images of the batch in training mode."""
        return MIXES if self.mixes_images(module) else ""

    def pulled(self, module: nn.modules.batchnorm._BatchNorm, outputs: KnownOutputs, shape: Shape) -> KnownOutputs:
        """A channel that BatchNorm has closed says nothing of its input."""
        scale, shift = scale_and_shift(module, outputs.values.dim())
        alive = scale.abs() > FLOOR
        values = (outputs.values - shift) / torch.where(alive, scale, 1.0)
        inputs = outputs.scaled(values, torch.where(alive, scale, FLOOR), alive.expand_as(values))
        return replace(inputs, delta=outputs.delta * scale, masked_delta=outputs.masked_delta * scale)

    def inverted(self, module: nn.modules.batchnorm._BatchNorm, outputs: Tensor, shape: Shape) -> Tensor | None:
        """Where no channel is closed."""
        if self.mixes_images(module):
            return None
        scale, shift = scale_and_shift(module, outputs.dim())
        return (outputs - shift) / scale if (scale.abs() > FLOOR).all() else None

    def gives_weight_gradients(self, module: nn.modules.batchnorm._BatchNorm) -> bool:
        """In eval mode, of torch's own layers."""
        return type(module) in (nn.BatchNorm1d, nn.BatchNorm2d) and not self.mixes_images(module)

    def weight_gradients(
        self, module: nn.modules.batchnorm._BatchNorm, inputs: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of weight and bias, in eval mode."""
        axes = [axis for axis in range(inputs.dim()) if axis != 1]
        mean, scale = (_columns(v, inputs.dim()) for v in (module.running_mean, _one_over_deviation(module)))
        return (delta * (inputs - mean) * scale).sum(axes), delta.sum(axes)


def scale_and_shift(module: nn.modules.batchnorm._BatchNorm, dimensions: int) -> tuple[Tensor, Tensor]:
    """What a BatchNorm in eval mode multiplies by and adds, (C, ...), to broadcast to activations of so many dims."""
    scale = _one_over_deviation(module)
    shift = -module.running_mean * scale
    if module.affine:
        scale, shift = scale * module.weight, shift * module.weight + module.bias
    return _columns(scale.detach(), dimensions), _columns(shift.detach(), dimensions)


def _one_over_deviation(module: nn.modules.batchnorm._BatchNorm) -> Tensor:
    return (module.running_var + module.eps).rsqrt()


def _columns(values: Tensor, dimensions: int) -> Tensor:
    """A vector over channels, to broadcast to (B, C, ...)."""
    return values.view(-1, *(1,) * (dimensions - 2))
