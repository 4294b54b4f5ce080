"""ReLU: inputs are known where it is active, and delta passes there alone."""

import math
from dataclasses import replace

import torch
from torch import nn

from network.kinds.kind import Kind, Shape
from network.known_outputs import ZERO, KnownOutputs


class ReLU(Kind):
    """max(0, z), softened by softplus log(1 + exp(beta z)) / beta."""

    modules = (nn.ReLU,)
    calls = {"relu": lambda *_, **__: [nn.ReLU()]}  # noqa: RUF012
    output_range = (0.0, math.inf)
    is_activation = True
    is_sparse = True
    is_rectifier = True
    has_kink = True
    known_share = 0.5

    def why_not(self, module: nn.Module, inputs: Shape, outputs: Shape) -> str:
        """Never: what is not active is known not to be."""
        return ""

    def pulled(self, module: nn.Module, outputs: KnownOutputs, shape: Shape) -> KnownOutputs:
        """Entries within noise of zero are taken for inactive."""
        active = outputs.known & (outputs.values > ZERO * outputs.noise)
        return replace(
            outputs,
            known=active,
            delta=torch.where(active, outputs.delta, 0.0),
            masked_delta=torch.where(active, 0.0, outputs.delta),
            margin=outputs.values / outputs.noise,
            is_gated=True,
        )

    def slope_below_zero(self, module: nn.Module) -> float | None:
        """0."""
        return 0.0

    def softened(self, module: nn.Module, beta: float) -> nn.Module:
        """Softplus."""
        return nn.Softplus(beta)
