"""Leaky ReLU: exactly invertible; only the slope is in doubt, where an entry is within noise of zero."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from network.kinds.kind import Kind, Shape
from network.known_outputs import KnownOutputs


class SoftLeakyReLU(nn.Module):
    """s z + (1 - s) log(1 + exp(beta z)) / beta, s the slope below zero."""

    def __init__(self, slope: float, beta: float) -> None:
        super().__init__()
        self.slope, self.soft = slope, nn.Softplus(beta)

    def forward(self, z: Tensor) -> Tensor:
        """Of z's shape."""
        return self.slope * z + (1 - self.slope) * self.soft(z)


class LeakyReLU(Kind):
    """z above zero and s z below, 0 < s."""

    modules = (nn.LeakyReLU,)
    calls = {"leaky_relu": lambda slope=0.01, *_, **how: [nn.LeakyReLU(how.get("negative_slope", slope))]}  # noqa: RUF012
    is_activation = True
    has_kink = True

    def why_not(self, module: nn.LeakyReLU, inputs: Shape, outputs: Shape) -> str:
        """A slope of zero or below folds inputs onto each other."""
        return "" if module.negative_slope > 0 else f"a leaky ReLU of slope {module.negative_slope:g} is not invertible"

    def before(self, module: nn.LeakyReLU, outputs: Tensor) -> tuple[Tensor, Tensor] | None:
        """Everywhere."""
        if module.negative_slope <= 0:
            return None
        slope = torch.where(outputs > 0, 1.0, module.negative_slope)
        return outputs / slope, slope

    def pulled(self, module: nn.LeakyReLU, outputs: KnownOutputs, shape: Shape) -> KnownOutputs:
        """With the other slope as what a residual may ask for."""
        values, slope = self.before(module, outputs.values)
        other = torch.where(outputs.values > 0, module.negative_slope, 1.0)
        margin = outputs.values.abs() / outputs.noise
        return replace(outputs.scaled(values, slope), masked_delta=outputs.delta * other, margin=margin, is_gated=False)

    def slope_below_zero(self, module: nn.LeakyReLU) -> float | None:
        """As the module has it."""
        return module.negative_slope

    def softened(self, module: nn.LeakyReLU, beta: float) -> nn.Module:
        """Its kink rounded off as a ReLU's."""
        return SoftLeakyReLU(module.negative_slope, beta)
