"""ReLU6: a ReLU that is cut off at six as well."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from network.kinds.kind import Shape
from network.kinds.relu import ReLU
from network.known_outputs import ZERO, KnownOutputs

MOST = 6.0


class SoftReLU6(nn.Module):
    """Softplus of z less that of z - 6."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.soft = nn.Softplus(beta)

    def forward(self, z: Tensor) -> Tensor:
        """Of z's shape."""
        return self.soft(z) - self.soft(z - MOST)


class ReLU6(ReLU):
    """min(6, max(0, z))."""

    modules = (nn.ReLU6,)
    calls = {"relu6": lambda *_, **__: [nn.ReLU6()]}  # noqa: RUF012
    output_range = (0.0, MOST)
    is_rectifier = False  # at six it stops what is too large

    def pulled(self, module: nn.Module, outputs: KnownOutputs, shape: Shape) -> KnownOutputs:
        """Entries within noise of zero or six are taken for cut off."""
        inside = torch.minimum(outputs.values, MOST - outputs.values)
        active = outputs.known & (inside > ZERO * outputs.noise)
        return replace(
            super().pulled(module, outputs, shape),
            known=active,
            delta=torch.where(active, outputs.delta, 0.0),
            masked_delta=torch.where(active, 0.0, outputs.delta),
            margin=inside / outputs.noise,
        )

    def slope_below_zero(self, module: nn.Module) -> float | None:
        """It is no such activation above six."""
        return None

    def softened(self, module: nn.Module, beta: float) -> nn.Module:
        """Both kinks rounded off."""
        return SoftReLU6(beta)
